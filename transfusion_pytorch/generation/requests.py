"""What is asked of the sampler: its options, and a prompt made ready."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.sequence.samples import Modality, Piece, Shape, Text, check_ids, parse_sample, strip_markers
from transfusion_pytorch.sequence.vocabulary import Vocabulary

ForcedModality = int | tuple[int, Shape]


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; see `Transfusion.sample`. Raises `ValueError` or `TypeError` for what makes no sense."""

    max_length: int = 2048
    text_temperature: float = 1.0
    text_min_p: float = 0.1
    modality_steps: int = 16
    cfg_scale: float = 1.0
    fixed_modality_shape: Shape | None = None
    force_modality_at_start: ForcedModality | None = None
    init_modality_noise: Tensor | None = None
    cache_kv: bool = True
    max_modality_tokens: int = 4096
    odeint_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self):
        for name in ("max_length", "modality_steps", "max_modality_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (isfinite(self.text_temperature) and self.text_temperature >= 0):
            raise ValueError(f"text_temperature must be finite and not negative, got {self.text_temperature}")
        if not 0 <= self.text_min_p <= 1:
            raise ValueError(f"text_min_p must be between 0 and 1, got {self.text_min_p}")
        if not isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be finite, got {self.cfg_scale}")
        if self.fixed_modality_shape is not None:
            check_shape(self.fixed_modality_shape, "fixed_modality_shape")
        noise = self.init_modality_noise
        if noise is not None and (not isinstance(noise, Tensor) or noise.ndim != 2 or not noise.is_floating_point()):
            raise ValueError("init_modality_noise must be a float tensor (n, d): rows of latents, channels")


def check_shape(shape: Any, name: str) -> None:
    """Raises `ValueError` unless `shape` is a tuple of positive ints."""
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, Integral) and size > 0 for size in shape):
        raise ValueError(f"{name} must be a tuple of positive ints, such as (4, 4), got {shape!r}")


def parse_prompt(prompt: Any, vocabulary: Vocabulary, where: str) -> tuple[list[Piece], list[int]]:
    """A bare sample to continue, and the ids of a modality that it opens at its end without giving it.

    A prompt may carry any markers that a returned sample has. Raises as `parse_sample` does.
    """
    if prompt is None or (isinstance(prompt, list) and not prompt):
        return [], []
    pieces = parse_sample(prompt, vocabulary.num_modalities, where)
    for i, piece in enumerate(pieces):
        if isinstance(piece, Text):
            check_ids(piece.ids, vocabulary.num_logits, f"{where}, part {i}")
    bare = strip_markers(pieces, vocabulary)
    opened: list[int] = []
    if bare and isinstance(bare[-1], Text) and vocabulary.meta in bare[-1].ids.tolist():
        ids = bare[-1].ids.tolist()
        start = ids.index(vocabulary.meta)
        opened = ids[start:]
        bare = bare[:-1] + ([Text(torch.tensor(ids[:start]))] if start else [])
    for piece in bare:
        if isinstance(piece, Text) and (piece.ids >= vocabulary.num_text).any():
            raise ValueError(
                f"{where}: markers of a modality stand where there is none, in the text {piece.ids.tolist()}"
            )
    return bare, opened


def forced_modality(forced: Any, num_modalities: int, fixed_shape: Shape | None) -> tuple[int, Shape | None] | None:
    """`force_modality_at_start` as a type and a shape, if one was given."""
    if forced is None:
        return None
    modality, shape = forced if isinstance(forced, (tuple, list)) and len(forced) == 2 else (forced, None)
    if isinstance(modality, bool) or not isinstance(modality, Integral):
        raise TypeError(f"force_modality_at_start must be a type or (type, shape), got {forced!r}")
    if not 0 <= modality < num_modalities:
        raise ValueError(f"force_modality_at_start: unknown modality type {modality}, this model has {num_modalities}")
    if shape is not None:
        check_shape(shape, "the shape in force_modality_at_start")
        if fixed_shape is not None and tuple(shape) != tuple(fixed_shape):
            raise ValueError(f"force_modality_at_start asks for {tuple(shape)}, fixed_modality_shape for {fixed_shape}")
        return int(modality), tuple(shape)
    return int(modality), None if fixed_shape is None else tuple(fixed_shape)


def without_text(pieces: Sequence[Piece], vocabulary: Vocabulary) -> list[Piece]:
    """What guidance compares with: text becomes null, structure and modalities stay."""
    return [
        piece
        if isinstance(piece, Modality)
        else Text(torch.where(piece.ids < vocabulary.num_text, vocabulary.null, piece.ids))
        for piece in pieces
    ]
