"""Every time that training draws and that sampling tells the model about.

b samples, m spans. t = 0 is noise, t = 1 is data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transfusion_pytorch.saving.components import register_component

TimesFunction = Callable[[Int[Tensor, " b"]], Float[Tensor, "b m"]]


@register_component
@dataclass(frozen=True)
class TimePolicy:
    """How the noise of a training batch is distributed.

    `distribution` is `"uniform"`, `"logit_normal"` (a sigmoid of a normal with `mean` and `std`; SD3, arXiv
    2403.03206), `"beta"` (1 - t follows Beta(`concentration`, 1), which prefers noise, as actions need; pi0, arXiv
    2410.24164, appendix B) or a constant between 0 and 1. `shift` > 1 moves times towards noise, as larger images need:
    `t / (t + shift (1 - t))`.

    A modality is captioned if text follows it in its sample and none stands before. Captioning wants it to be
    recognisable, and drawing wants all times, so in training it is clean, without a flow loss, with probability
    `prob_clean_captioned`. Otherwise its times are squeezed into `[noise_limit, 1]`: 0.5 and `prob_clean_captioned=0`
    are what the Transfusion paper does with images that precede their caption (arXiv 2408.11039, section 4.3.4). All
    other modalities are noised freely, wherever they stand (docs/architecture.md has the measurements). With a
    constant none is clean.

    In sampling whatever is finished is at `CLEAN`.
    """

    distribution: Literal["uniform", "logit_normal", "beta"] | float = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    noise_limit: float = 0.0
    prob_clean_captioned: float = 0.5
    concentration: float = 1.5

    def __post_init__(self):
        if isinstance(self.distribution, (int, float)):
            if not 0 <= self.distribution <= 1:
                raise ValueError(f"a constant time must be between 0 (noise) and 1 (data), got {self.distribution}")
        elif self.distribution not in ("uniform", "logit_normal", "beta"):
            raise ValueError(
                f"distribution must be 'uniform', 'logit_normal', 'beta' or a constant, got {self.distribution!r}"
            )
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.shift < math.inf):
            raise ValueError(
                f"mean must be finite, std and shift positive, got {self.mean}, {self.std} and {self.shift}"
            )
        if not 0 < self.concentration < math.inf:
            raise ValueError(f"concentration must be positive, got {self.concentration}")
        for name in ("noise_limit", "prob_clean_captioned"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def prob_clean(self) -> float:
        """How often what is captioned is clean: not at all with a constant."""
        return 0.0 if isinstance(self.distribution, (int, float)) else self.prob_clean_captioned

    def draw(
        self, is_captioned: Bool[Tensor, " m"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " m"]:
        """A time for every span; `is_captioned` says to which of them the noise limit applies.

        Numbers are drawn on the device of the generator, or of `is_captioned`; the times are on the latter.
        """
        device = is_captioned.device if generator is None else generator.device
        uniform = torch.rand(is_captioned.shape, generator=generator, device=device)
        return self.times(uniform.to(is_captioned.device, non_blocking=True), is_captioned)

    def times(self, uniform: Float[Tensor, " m"], is_captioned: Bool[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The times that uniform numbers stand for: those below which so much of the distribution lies."""
        free = shift_times(self._quantile(uniform), self.shift)
        return torch.where(is_captioned, self.noise_limit + (1 - self.noise_limit) * free, free)

    def _quantile(self, uniform: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        if isinstance(self.distribution, (int, float)):
            return torch.full_like(uniform, float(self.distribution))
        if self.distribution == "uniform":
            return uniform
        if self.distribution == "beta":
            return 1 - (1 - uniform) ** (1 / self.concentration)
        normal = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
        return torch.sigmoid(self.mean + self.std * normal)


CLEAN = 1.0


def shift_times(t: Float[Tensor, " m"], shift: float) -> Float[Tensor, " m"]:
    """Moves times towards noise for `shift` > 1; 0 and 1 stay where they are."""
    return t / (t + shift * (1 - t))
