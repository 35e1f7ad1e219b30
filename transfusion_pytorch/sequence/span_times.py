"""Times that a caller gives for the modalities of a batch.

b samples, m spans.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.sequence.stream import Spans


def as_times(times: Any) -> Float[Tensor, "..."]:
    """Numbers of any kind as a tensor, checked to lie in [0, 1] unless they are on a device that would be waited for.

    Raises `TypeError` for anything that is no real number and `ValueError` for one outside.
    """
    try:
        tensor = times.detach() if isinstance(times, Tensor) else as_exact(times)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"times must be a number or a tensor of them, got {type(times).__name__}: {error}") from error
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"times must be real numbers, got {tensor.dtype}")
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    if tensor.device.type == "cpu" and not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError("times must lie between 0 (noise) and 1 (data)")
    return tensor


def as_exact(numbers: Any) -> Tensor:
    """Plain numbers in double precision: rounded to single, 1 - 1e-9 would be 1."""
    tensor = torch.as_tensor(numbers, device="cpu")
    return torch.as_tensor(numbers, dtype=torch.float64, device="cpu") if tensor.is_floating_point() else tensor


def times_of_spans(times: Any, spans: Spans, num_samples: int) -> Float[Tensor, " m"]:
    """A caller's times, one for the k-th modality of each sample, looked up for every span on the device of `spans`.

    `times` is a scalar, `(b,)` (one for each sample) or `(b, m)`. Conditions take their column and stay at 1.
    """
    given = as_times(times)
    given = given.to(spans.sample.device, torch.float32 if spans.sample.device.type == "mps" else given.dtype)
    most = spans.most
    by_sample = given[:, None].expand(-1, most) if given.ndim == 1 else given
    if given.ndim == 0:
        looked_up = given.expand(len(spans))
    elif by_sample.ndim != 2 or len(by_sample) != num_samples or by_sample.shape[1] < most:
        raise ValueError(
            f"times must be a scalar, ({num_samples},) or ({num_samples}, {most}), one for each modality of each "
            f"sample, got {tuple(given.shape)}"
        )
    else:
        looked_up = by_sample[spans.sample, spans.index]
    return looked_up.masked_fill(~spans.is_learned, 1.0)
