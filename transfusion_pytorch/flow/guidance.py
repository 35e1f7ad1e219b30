"""Classifier-free guidance: by text, by what was drawn before, and kept within bounds.

k latents of one drawing, c their channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def guided(
    conditional: Float[Tensor, "k c"], unconditional: Float[Tensor, "k c"], scale: float
) -> Float[Tensor, "k c"]:
    """Walks away from the unconditional prediction: scale 1 is the conditional one, 0 the unconditional one (arXiv
    2207.12598).
    """
    return torch.lerp(unconditional, conditional, scale)


def guided_twice(
    conditional: Float[Tensor, "k c"],
    without_text: Float[Tensor, "k c"],
    without_all: Float[Tensor, "k c"],
    text_scale: float,
    modality_scale: float,
) -> Float[Tensor, "k c"]:
    """Guidance by text and by earlier modalities, each with a scale of its own (InstructPix2Pix, arXiv 2211.09800,
    equation 3): `0 + s_m (m - 0) + s_t (t - m)`.
    """
    return torch.lerp(without_all, without_text, modality_scale) + text_scale * (conditional - without_text)


def rescaled(guided: Float[Tensor, "k c"], conditional: Float[Tensor, "k c"], amount: float) -> Float[Tensor, "k c"]:
    """Brings the spread of a guided prediction back to that of the conditional one, by an `amount` from 0 (not at all)
    to 1 (arXiv 2305.08891, equations 15 and 16). Large scales otherwise oversaturate.
    """
    spread, wanted = guided.std(correction=0), conditional.std(correction=0)
    has_spread = (
        spread > torch.finfo(guided.dtype).eps * guided.abs().amax()
    )  # a single number, or a constant, has none
    ratio = torch.where(has_spread, wanted / spread, torch.ones_like(spread))
    return guided * torch.lerp(torch.ones_like(spread), ratio, amount)
