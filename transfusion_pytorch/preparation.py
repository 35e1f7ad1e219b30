"""From what a user hands over to marked samples of latents, and back."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
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
    split_opening,
    strip_markers,
)
from transfusion_pytorch.sequence.vocabulary import Vocabulary


def prepare(
    samples: Any,
    modality_type: Any,
    vocabulary: Vocabulary,
    modalities: Iterable[ModalityIO],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Piece]]:
    """Validates and encodes a batch of any kind. Mixed samples get their markers, batches of one kind have none."""
    modalities = list(modalities)
    if modality_type is not None:
        check_modality_type(samples, modality_type)
    if isinstance(samples, Tensor):
        parsed = parse_batch(samples, int(modality_type or 0), len(modalities), vocabulary.num_text)
        return encode(parsed, modalities, device=device, dtype=dtype)
    parsed = parse_samples(samples, len(modalities))
    bare = [without_markers(sample, vocabulary, f"sample {i}") for i, sample in enumerate(parsed)]
    return [mark(sample, vocabulary) for sample in encode(bare, modalities, device=device, dtype=dtype)]


def check_modality_type(batch: Any, modality_type: Any) -> None:
    """Raises `TypeError` unless this is the type of a float batch."""
    if isinstance(modality_type, bool) or not isinstance(modality_type, Integral):
        raise TypeError(f"modality_type must be an int, got {type(modality_type).__name__}")
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        came = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"modality_type goes with a float batch (b, ...), got {came}; in a list write (type, tensor)")


def without_markers(sample: list[Piece], vocabulary: Vocabulary, where: str) -> list[Piece]:
    """A bare sample. One that begins with sos has been sampled: its markers are dropped, to be placed anew. Any other
    id beyond the text is refused.
    """
    first = sample[0]
    if isinstance(first, Text) and int(first.ids[0]) == vocabulary.sos:
        sample, _ = split_opening(strip_markers(sample, vocabulary), vocabulary)  # it may have been cut off there
        where = f"{where} without its markers"
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
        instances = _instances(samples, io.spec.type)
        names = [f"{name} {i}, part {j}" for i, j in instances]
        data = [instance.tensor.detach().to(device, dtype) for instance in instances.values()]
        check_finite(data, names)
        latents = [made.to(dtype) for made in io.encode(data, names)]  # under autocast an encoder gives less than that
        if io.encoder is not None:
            check_finite(latents, [f"{name}, encoded" for name in names])
        for ((i, j), instance), made in zip(instances.items(), latents, strict=True):
            encoded[i][j] = instance._replace(tensor=made)
    return encoded


def decode(
    samples: Sequence[Sequence[Piece]], modalities: Iterable[ModalityIO], *, device: torch.device, raw: bool = False
) -> list[list[Tensor | tuple[int, Tensor]]]:
    """The inverse of `encode`: samples as users see them, or their latents as they are if `raw`."""
    decoded: list[list[Any]] = [
        [piece.ids.to(device) if isinstance(piece, Text) else piece.tensor for piece in sample] for sample in samples
    ]
    for io in modalities:
        instances = _instances(samples, io.spec.type)
        latents = [instance.tensor for instance in instances.values()]
        data = [io.spec.from_channel_last(part) for part in latents] if raw else io.decode(latents)
        for (i, j), instance in zip(instances, data, strict=True):
            decoded[i][j] = (io.spec.type, instance)
    return decoded


def _instances(samples: Sequence[Sequence[Piece]], modality: int) -> dict[tuple[int, int], Modality]:
    """The instances of a modality by their sample and part."""
    return {
        (i, j): piece
        for i, sample in enumerate(samples)
        for j, piece in enumerate(sample)
        if isinstance(piece, Modality) and piece.type == modality
    }


def as_times(times: Any) -> Float[Tensor, "..."]:
    """Numbers of any kind as a tensor."""
    try:
        tensor = torch.as_tensor(times, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"times must be a number or a tensor of them, got {type(times).__name__}: {error}") from error
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"times must be real numbers, got {tensor.dtype}")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def check_probability(prob_uncond: float) -> float:
    if not 0 <= prob_uncond <= 1:
        raise ValueError(f"prob_uncond is a probability, got {prob_uncond}")
    return prob_uncond
