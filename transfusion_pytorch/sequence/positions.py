"""Rotary positions of tokens, and coordinates of latents inside their span.

n tokens, f frequencies (half of a head's channels).
"""

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor


def rotary_phases(
    position: Real[Tensor, " n"],
    dim_head: int,
    *,
    theta: float = 10_000.0,
    frequencies: Float[Tensor, " f"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n f 2"]:
    """Cosine and sine of the angle that rotates each pair of channels (RoFormer, arXiv 2104.09864).

    `frequencies` are radians per position; by default those of RoFormer, from 1 down to almost `1 / theta`.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    if frequencies is None:
        exponent = torch.arange(0, dim_head, 2, device=position.device, dtype=precise) / dim_head
        frequencies = theta**-exponent
    angle = position.to(precise)[:, None] * frequencies.to(precise)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Shaped[Tensor, "n h d"], phases: Float[Tensor, "n f 2"]) -> Shaped[Tensor, "n h d"]:
    """Rotates neighbouring pairs of channels."""
    (real, imaginary), (cos, sin) = x.to(phases.dtype).unflatten(-1, (-1, 2)).unbind(-1), phases[:, None].unbind(-1)
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def axial_coordinates(
    shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n a"]:
    """The coordinates of every latent, first axis slowest: `(2, 2) -> [[0 0] [0 1] [1 0] [1 1]]`."""
    if not shape:
        return torch.empty(1, 0, device=device, dtype=dtype)
    axes = [torch.arange(size, device=device, dtype=dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
