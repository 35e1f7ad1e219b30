"""Every time that training draws and that sampling tells the model about.

b samples, m spans. t = 0 is noise, t = 1 is data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TimesFunction = Callable[[Int[Tensor, " b"]], Float[Tensor, "b m"]]


@dataclass(frozen=True)
class TimePolicy:
    """How the noise of a training batch is distributed.

    `distribution` is `"uniform"`, `"logit_normal"` (a sigmoid of a normal with `mean` and `std`; SD3, arXiv
    2403.03206) or a constant between 0 and 1. `shift` > 1 moves times towards noise, as larger images need: `t / (t +
    shift (1 - t))`.

    What has something after it in its sample is context for that something and must stay recognisable: its times are
    squeezed into `[noise_limit, 1]` (Transfusion, arXiv 2408.11039, section 4.3.4 caps its noise half-way). The last
    modality is free. `noise_limit = 0` treats all alike.

    In sampling whatever is finished is at `CLEAN`.
    """

    distribution: Literal["uniform", "logit_normal"] | float = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    noise_limit: float = 0.5

    def __post_init__(self):
        if isinstance(self.distribution, (int, float)):
            if not 0 <= self.distribution <= 1:
                raise ValueError(f"a constant time must be between 0 (noise) and 1 (data), got {self.distribution}")
        elif self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"distribution must be 'uniform', 'logit_normal' or a constant, got {self.distribution!r}")
        if not (isfinite(self.mean) and 0 < self.std < inf and 0 < self.shift < inf):
            raise ValueError(
                f"mean must be finite, std and shift positive, got {self.mean}, {self.std} and {self.shift}"
            )
        if not 0 <= self.noise_limit <= 1:
            raise ValueError(f"noise_limit must be between 0 and 1, got {self.noise_limit}")

    def draw(self, is_context: Bool[Tensor, " m"], *, generator: torch.Generator | None = None) -> Float[Tensor, " m"]:
        """A time for every span; `is_context` says which of them have something after them in their sample.

        Numbers are drawn where the generator is, or where `is_context` is, and stay where that is.
        """
        device = is_context.device if generator is None else generator.device
        drawn = self._draw_free(is_context.shape, generator, device).to(is_context.device, non_blocking=True)
        free = shift_times(drawn, self.shift)
        return torch.where(is_context, self.noise_limit + (1 - self.noise_limit) * free, free)

    def _draw_free(
        self, shape: torch.Size, generator: torch.Generator | None, device: torch.device
    ) -> Float[Tensor, " m"]:
        if isinstance(self.distribution, (int, float)):
            return torch.full(shape, float(self.distribution), device=device)
        if self.distribution == "uniform":
            return torch.rand(shape, generator=generator, device=device)
        return torch.sigmoid(self.mean + self.std * torch.randn(shape, generator=generator, device=device))


CLEAN = 1.0


def shift_times(t: Float[Tensor, " m"], shift: float) -> Float[Tensor, " m"]:
    """Moves times towards noise for `shift` > 1; 0 and 1 stay where they are."""
    return t / (t + shift * (1 - t))
