"""Rotary positions of tokens, and coordinates of latents inside their span.

n tokens, f frequencies (half of a head's channels).
"""

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor


def rotary_phases(
    position: Int[Tensor, " n"], dim_head: int, *, theta: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> Complex[Tensor, "n f"]:
    """Unit complex numbers that turn each pair of channels (RoFormer, arXiv 2104.09864)."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, dim_head, 2, device=position.device, dtype=precise) / dim_head
    angle = position.to(precise)[:, None] * theta**-exponent
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Shaped[Tensor, "n h d"], phases: Complex[Tensor, "n f"]) -> Shaped[Tensor, "n h d"]:
    """Turns neighbouring pairs of channels; one complex product is several times faster than moving halves around."""
    pairs = torch.view_as_complex(x.to(phases.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases[:, None]).flatten(-2).to(x.dtype)


def axial_coordinates(
    shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n a"]:
    """The coordinates of every latent, first axis slowest: `(2, 2) -> [[0 0] [0 1] [1 0] [1 1]]`."""
    return torch.ones(shape, dtype=torch.bool).nonzero().to(device, dtype)
