"""Classifier-free guidance (arXiv 2207.12598)."""

import torch
from jaxtyping import Float
from torch import Tensor


def guided(
    conditional: Float[Tensor, "..."], unconditional: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."]:
    """Walks away from the unconditional prediction: scale 1 is the conditional one, 0 the unconditional one."""
    return torch.lerp(unconditional, conditional, scale)
