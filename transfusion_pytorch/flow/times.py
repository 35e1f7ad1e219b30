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

    def draw(self, is_context: Bool[Tensor, " m"]) -> Float[Tensor, " m"]:
        """A time for every span; `is_context` says which of them have something after them in their sample."""
        free = shift_times(self._draw_free(is_context), self.shift)
        return torch.where(is_context, self.noise_limit + (1 - self.noise_limit) * free, free)

    def _draw_free(self, like: Tensor) -> Float[Tensor, " m"]:
        if isinstance(self.distribution, (int, float)):
            return torch.full(like.shape, float(self.distribution), device=like.device)
        if self.distribution == "uniform":
            return torch.rand(like.shape, device=like.device)
        return torch.sigmoid(self.mean + self.std * torch.randn(like.shape, device=like.device))


CLEAN = 1.0


def shift_times(t: Float[Tensor, " m"], shift: float) -> Float[Tensor, " m"]:
    """Moves times towards noise for `shift` > 1; 0 and 1 stay where they are."""
    return t / (t + shift * (1 - t))


def times_of_spans(
    times: Float[Tensor, "..."] | float, sample: Int[Tensor, " m"], index: Int[Tensor, " m"], num_samples: int
) -> Float[Tensor, " m"]:
    """A user's times, one for the k-th modality of each sample, looked up for every span.

    `times` is a scalar, `(b,)` (one for each sample) or `(b, m)`. Raises `ValueError` where it has too few entries or
    leaves [0, 1].
    """
    times = torch.as_tensor(times, device=sample.device)
    times = times if times.is_floating_point() else times.to(torch.get_default_dtype())
    if not ((times >= 0) & (times <= 1)).all():
        raise ValueError("times must lie between 0 (noise) and 1 (data)")
    if times.ndim == 0:
        return times.expand(sample.shape)
    most = int(index.max()) + 1 if index.numel() else 0
    by_sample = times[:, None].expand(-1, most) if times.ndim == 1 else times
    if by_sample.ndim != 2 or len(by_sample) != num_samples or by_sample.shape[1] < most:
        raise ValueError(
            f"times must be a scalar, ({num_samples},) or ({num_samples}, {most}), one for each modality of each "
            f"sample, got {tuple(times.shape)}"
        )
    return by_sample[sample, index]
