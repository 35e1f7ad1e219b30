"""Samples between raw data, as users see them, and latents, as sampling does."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.modalities.io import ModalityIO
from transfusion_pytorch.sequence.samples import Modality, Piece, Text, TypedModality, check_finite


def encode(
    samples: Sequence[Sequence[Piece]],
    modalities: Iterable[ModalityIO],
    *,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "sample",
) -> list[list[Piece]]:
    """Replaces raw data by channel-last latents as the network sees them, batched over equal shapes."""
    encoded = [list(sample) for sample in samples]
    for io in modalities:
        instances = _instances(samples, io.spec.type)
        places = {key: f"{name} {key[0]}, part {key[1]}" for key in instances}
        data = {key: instance.tensor.detach().to(device, dtype) for key, instance in instances.items()}
        check_finite(list(data.values()), list(places.values()), devices=None)
        raw = [key for key, instance in instances.items() if not instance.is_encoded]
        made = io.encode([data[key] for key in raw], [places[key] for key in raw])
        if io.encoder is not None:
            check_finite(made, [f"{places[key]}, encoded" for key in raw], devices=None)
        latents = {key: io.spec.to_channel_last(data[key], places[key]) for key in instances if key not in raw}
        latents |= zip(raw, made, strict=True)
        for (i, j), instance in instances.items():
            # under autocast an encoder gives less than `dtype`
            normalized = io.statistics.normalize(latents[i, j].to(dtype))
            encoded[i][j] = instance._replace(tensor=normalized, is_encoded=True)
    return encoded


def decode(
    samples: Sequence[Sequence[Piece]], modalities: Iterable[ModalityIO], *, device: torch.device, raw: bool = False
) -> list[list[Tensor | TypedModality]]:
    """The inverse of `encode`: samples as users see them, or their latents in the encoder's scale if `raw`."""
    decoded: list[list[Any]] = [
        [piece.ids.to(device) if isinstance(piece, Text) else piece.tensor for piece in sample] for sample in samples
    ]
    for io in modalities:
        instances = _instances(samples, io.spec.type)
        latents = [instance.tensor for instance in instances.values()]
        data = [io.shown(part) for part in latents] if raw else io.decode(latents)
        for (i, j), instance in zip(instances, data, strict=True):
            decoded[i][j] = TypedModality(io.spec.type, instance)
    return decoded


def _instances(samples: Sequence[Sequence[Piece]], modality: int) -> dict[tuple[int, int], Modality]:
    """The instances of a modality by their sample and part."""
    return {
        (i, j): piece
        for i, sample in enumerate(samples)
        for j, piece in enumerate(sample)
        if isinstance(piece, Modality) and piece.type == modality
    }
