"""Latents of a batch by modality type: flat, all spans of a type behind each other, in the order of the stream.

k latents of one type, c their channels, m spans.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.path import FlowSample, interpolate
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape
from transfusion_pytorch.sequence.stream import TokenStream

Latents = dict[int, Tensor]  # each (k, c)


def latents_by_type(samples: Iterable[Iterable[Piece]]) -> Latents:
    """The latents of encoded samples, in the order in which `pack` lists their spans."""
    latents: dict[int, list[Tensor]] = {}
    for sample in samples:
        for piece in sample:
            if isinstance(piece, Modality):
                latents.setdefault(piece.type, []).append(piece.tensor.reshape(-1, piece.tensor.shape[-1]))
    return {modality: torch.cat(parts) for modality, parts in sorted(latents.items())}


def latent_times(stream: TokenStream, modality: int, t: Float[Tensor, " m"]) -> Float[Tensor, " k"]:
    """The time of every latent of a type: that of its span."""
    sizes = [prod(shape) for shape in stream.spans.shapes_of(modality)]
    return t[stream.spans.of_type(modality)].repeat_interleave(torch.tensor(sizes, device=t.device))


def add_noise(clean: Latents, stream: TokenStream, t: Float[Tensor, " m"]) -> dict[int, FlowSample]:
    """Latents of every type on their way at the times of their spans, each from noise of its own."""
    return {
        modality: interpolate(latents, torch.randn_like(latents), latent_times(stream, modality, t))
        for modality, latents in clean.items()
    }


def x_t_of(flow: Mapping[int, FlowSample]) -> Latents:
    return {modality: sample.x_t for modality, sample in flow.items()}


def unflatten(latents: Float[Tensor, "k c"], shapes: Sequence[Shape]) -> list[Float[Tensor, "..."]]:
    """Flat latents as instances `(*axes, c)`."""
    parts = latents.split([prod(shape) for shape in shapes])
    return [part.reshape(*shape, part.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]
