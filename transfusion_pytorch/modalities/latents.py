"""Latents of a batch by modality type: flat, all spans of a type behind each other, in the order of the stream.

k latents of one type, c their channels, m spans.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.path import FlowSample, interpolate
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape
from transfusion_pytorch.sequence.stream import TokenStream

LatentsByType = dict[int, Tensor]  # each (k, c)


def latents_by_type(samples: Iterable[Iterable[Piece]]) -> LatentsByType:
    """The latents of encoded samples, in the order in which `pack` lists their spans."""
    latents: dict[int, list[Tensor]] = {}
    for sample in samples:
        for piece in sample:
            if isinstance(piece, Modality):
                latents.setdefault(piece.type, []).append(piece.tensor.reshape(-1, piece.tensor.shape[-1]))
    return {modality: torch.cat(parts) for modality, parts in sorted(latents.items())}


def latent_times(stream: TokenStream, modality: int, t: Float[Tensor, " m"]) -> Float[Tensor, " k"]:
    """The time of every latent of a type: that of its span."""
    return t.index_select(0, stream.placements[modality].span_of_latent)


def add_noise(
    clean: LatentsByType,
    stream: TokenStream,
    t: Float[Tensor, " m"],
    *,
    noise: Any = None,
    generator: torch.Generator | None = None,
) -> dict[int, FlowSample]:
    """Latents of every type on their way at the times of their spans.

    `noise` is `(k, c)` of each type, in a dict, or of the only type as it is; else it is drawn, from the `generator`.
    """
    given = {} if noise is None else dict(noise) if isinstance(noise, Mapping) else dict.fromkeys(clean, noise)
    if unknown := sorted(set(given) - set(clean)):
        raise ValueError(f"noise for modalities {unknown}, which the batch has not; it has {sorted(clean)}")
    if isinstance(noise, Tensor) and len(clean) > 1:
        raise ValueError(f"noise for modalities {sorted(clean)} is a dict of one (k, c) for each, got one tensor")
    return {
        modality: interpolate(
            latents, draw_noise(latents, given.get(modality), generator), latent_times(stream, modality, t)
        )
        for modality, latents in clean.items()
    }


def draw_noise(
    latents: Float[Tensor, "k c"], given: Any = None, generator: torch.Generator | None = None
) -> Float[Tensor, "k c"]:
    """Noise for latents: what is given, or drawn on the generator's device, so that a CPU and a GPU draw the same."""
    if given is None:
        if generator is None:
            return torch.randn_like(latents)
        drawn = torch.randn(latents.shape, generator=generator, device=generator.device, dtype=latents.dtype)
        return drawn.to(latents.device, non_blocking=True)
    if not isinstance(given, Tensor) or given.shape != latents.shape:
        came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"noise has the shape of the flat latents of its modality, {tuple(latents.shape)}, got {came}")
    return given.to(latents)


def x_t_of(flow: Mapping[int, FlowSample]) -> LatentsByType:
    return {modality: sample.x_t for modality, sample in flow.items()}


def unflatten(latents: Float[Tensor, "k c"], shapes: Sequence[Shape]) -> list[Float[Tensor, "..."]]:
    """Flat latents as instances `(*axes, c)`."""
    parts = latents.split([prod(shape) for shape in shapes])
    return [part.reshape(*shape, part.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]
