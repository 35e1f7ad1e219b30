"""What is asked of the sampler: its options, and a prompt made ready."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any, TypeVar, no_type_check

import torch
from torch import Tensor

from transfusion_pytorch.sequence.samples import (
    Modality,
    Piece,
    Shape,
    Text,
    check_ids,
    parse_sample,
    split_opening,
    strip_markers,
)
from transfusion_pytorch.sequence.vocabulary import Vocabulary

ForcedModality = int | tuple[int, Shape]
Door = TypeVar("Door", bound=Callable)


def checks_itself(door: Door) -> Door:
    """Leaves the arguments of a function or dataclass to its own checks, which say more than those of `TYPECHECK`."""
    return no_type_check(door)


@checks_itself
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
            check_int(getattr(self, name), name)
        for name in ("text_temperature", "text_min_p", "cfg_scale"):
            check_number(getattr(self, name), name)
        if self.text_temperature < 0:
            raise ValueError(f"text_temperature must not be negative, got {self.text_temperature}")
        if not 0 <= self.text_min_p <= 1:
            raise ValueError(f"text_min_p must be between 0 and 1, got {self.text_min_p}")
        if self.fixed_modality_shape is not None:
            check_shape(self.fixed_modality_shape, "fixed_modality_shape")
        if self.init_modality_noise is not None:
            check_noise(self.init_modality_noise)
        if self.odeint_kwargs is not None and not isinstance(self.odeint_kwargs, Mapping):
            raise TypeError(
                "odeint_kwargs must be a dict of arguments of torchdiffeq.odeint, such as dict(method='euler'), got "
                f"{type(self.odeint_kwargs).__name__}"
            )


def check_int(value: Any, name: str, *, least: int = 1) -> None:
    """Raises `TypeError` or `ValueError` unless `value` is an int and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(value: Any, name: str) -> None:
    """Raises `TypeError` or `ValueError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_shape(shape: Any, name: str) -> None:
    """Raises `ValueError` unless `shape` is a tuple of positive ints."""
    is_shape = isinstance(shape, (tuple, list)) and all(isinstance(size, Integral) for size in shape)
    if not is_shape or any(int(size) < 1 for size in shape):
        raise ValueError(f"{name} must be a tuple of positive ints, such as (4, 4), got {shape!r}")


def check_noise(noise: Any) -> None:
    """Raises `ValueError` unless `noise` is a finite float tensor of two axes."""
    if not isinstance(noise, Tensor) or noise.ndim != 2 or not noise.is_floating_point():
        got = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"init_modality_noise must be a float tensor (n, d): rows of latents, channels, got {got}")
    if not noise.isfinite().all():
        raise ValueError("init_modality_noise contains NaN or infinity")


def check_type(modality: Any, num_modalities: int, name: str) -> int:
    """The type of one of a model's modalities. Raises `TypeError` or `ValueError` for anything else."""
    if isinstance(modality, bool) or not isinstance(modality, Integral):
        raise TypeError(f"{name}: a modality type is an int, got {modality!r}")
    if not 0 <= int(modality) < num_modalities:
        raise ValueError(f"{name}: unknown modality type {modality}, this model has {num_modalities} (from 0)")
    return int(modality)


def parse_prompt(prompt: Any, vocabulary: Vocabulary, where: str) -> list[Piece]:
    """The parts of a prompt as they came; none for None. Raises `TypeError` or `ValueError` that names the part at
    fault.
    """
    if prompt is None or (isinstance(prompt, list) and not prompt):
        return []
    pieces = parse_sample(prompt, vocabulary.num_modalities, where)
    for i, piece in enumerate(pieces):
        if isinstance(piece, Text):
            check_ids(piece.ids, vocabulary.num_logits, f"{where}, part {i}")
    return pieces


def bare_and_opened(pieces: Sequence[Piece], vocabulary: Vocabulary, where: str) -> tuple[list[Piece], list[int]]:
    """A bare sample to continue, and the ids of a modality that it opens at its end without giving it.

    A prompt may carry any markers that a returned sample has. Raises `ValueError` where one stands elsewhere.
    """
    bare, opened = split_opening(strip_markers(pieces, vocabulary), vocabulary)
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
    modality = check_type(modality, num_modalities, "force_modality_at_start, a type or (type, shape)")
    if shape is None:
        return modality, None if fixed_shape is None else tuple(fixed_shape)
    check_shape(shape, "the shape in force_modality_at_start")
    if fixed_shape is not None and tuple(shape) != tuple(fixed_shape):
        raise ValueError(
            f"force_modality_at_start asks for {tuple(shape)}, fixed_modality_shape for {tuple(fixed_shape)}"
        )
    return modality, tuple(shape)


def without_text(pieces: Sequence[Piece], vocabulary: Vocabulary) -> list[Piece]:
    """What guidance compares with: text becomes null, structure and modalities stay."""
    return [
        piece
        if isinstance(piece, Modality)
        else Text(torch.where(piece.ids < vocabulary.num_text, vocabulary.null, piece.ids))
        for piece in pieces
    ]
