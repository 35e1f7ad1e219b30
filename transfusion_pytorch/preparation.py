"""From what a user hands over to marked samples of latents, and back."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.modality import ModalityIO
from transfusion_pytorch.sequence.samples import (
    Modality,
    Piece,
    Text,
    check_finite,
    check_ids,
    mark,
    parse_batch,
    parse_samples,
    strip_markers,
)
from transfusion_pytorch.sequence.vocabulary import Vocabulary

Latents = dict[int, Tensor]  # by modality type: the flat latents (k, c) of all its spans, in the order of the stream


def prepare(
    samples: Any,
    modality_type: int | None,
    vocabulary: Vocabulary,
    modalities: Iterable[ModalityIO],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Piece]]:
    """Validates and encodes a batch of any kind. Mixed samples get their markers, batches of one kind have none."""
    modalities = list(modalities)
    if isinstance(samples, Tensor):
        if modality_type is not None and not samples.is_floating_point():
            raise TypeError(f"modality_type goes with a float batch (b, ...), got {samples.dtype}")
        parsed = parse_batch(samples, modality_type or 0, len(modalities), vocabulary.num_text)
        return encode(parsed, modalities, device=device, dtype=dtype)
    if modality_type is not None:
        raise TypeError("modality_type goes with a float batch (b, ...); in a list write (type, tensor)")
    parsed = parse_samples(samples, len(modalities))
    bare = [without_markers(sample, vocabulary, f"sample {i}") for i, sample in enumerate(parsed)]
    return [mark(sample, vocabulary) for sample in encode(bare, modalities, device=device, dtype=dtype)]


def without_markers(sample: list[Piece], vocabulary: Vocabulary, where: str) -> list[Piece]:
    """A bare sample: the markers of a returned one are dropped, to be placed anew; other ids beyond the text are
    refused.
    """
    if any(isinstance(piece, Text) and (piece.ids >= vocabulary.num_text).any() for piece in sample):
        sample = strip_markers(sample, vocabulary)
    for j, piece in enumerate(sample):
        if isinstance(piece, Text):
            check_ids(piece.ids, vocabulary.num_text, f"{where}, part {j}")
    return sample


def encode(
    samples: Sequence[Sequence[Piece]],
    modalities: Iterable[ModalityIO],
    *,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "sample",
) -> list[list[Piece]]:
    """Replaces raw data by channel-last latents, batched over equal shapes."""
    encoded = [list(sample) for sample in samples]
    for io in modalities:
        places = _places_of(encoded, io.spec.type)
        names = [f"{name} {i}, part {j}" for i, j in places]
        data = [encoded[i][j].tensor.detach().to(device, dtype) for i, j in places]
        check_finite(data, names)
        for (i, j), latents in zip(places, io.encode(data, names), strict=True):
            encoded[i][j] = encoded[i][j]._replace(tensor=latents)
    return encoded


def decode(
    samples: Sequence[Sequence[Piece]], modalities: Iterable[ModalityIO], *, device: torch.device, raw: bool = False
) -> list[list[Tensor | tuple[int, Tensor]]]:
    """The inverse of `encode`: samples as users see them, or their latents as they are if `raw`."""
    decoded: list[list[Any]] = [
        [piece.ids.to(device) if isinstance(piece, Text) else piece.tensor for piece in sample] for sample in samples
    ]
    for io in modalities:
        places = _places_of(samples, io.spec.type)
        latents = [decoded[i][j] for i, j in places]
        data = [io.spec.from_channel_last(part) for part in latents] if raw else io.decode(latents)
        for (i, j), instance in zip(places, data, strict=True):
            decoded[i][j] = (io.spec.type, instance)
    return decoded


def latents_by_type(samples: Iterable[Iterable[Piece]]) -> Latents:
    """The latents of encoded samples, flat, in the order in which `pack` lists their spans."""
    latents: dict[int, list[Tensor]] = {}
    for sample in samples:
        for piece in sample:
            if isinstance(piece, Modality):
                latents.setdefault(piece.type, []).append(piece.tensor.reshape(-1, piece.tensor.shape[-1]))
    return {modality: torch.cat(parts) for modality, parts in sorted(latents.items())}


def _places_of(samples: Sequence[Sequence[Piece]], modality: int) -> list[tuple[int, int]]:
    return [
        (i, j)
        for i, sample in enumerate(samples)
        for j, piece in enumerate(sample)
        if isinstance(piece, Modality) and piece.type == modality
    ]
