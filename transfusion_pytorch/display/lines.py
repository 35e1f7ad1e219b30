"""Samples on a terminal, and the parts that they consist of."""

import re
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion_pytorch.display.terminal import print_text

# A terminal obeys them, and what has a lone surrogate cannot be sent to a browser.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Part(NamedTuple):
    """A part of a sample: text, where `type` is None, or a modality of that type."""

    type: int | None
    tensor: Tensor


def print_modality_sample(sample: Any) -> None:
    """Prints one line for each part of a sample: what it is and its shape, and text in full.

    Takes a list of parts as users write and get them, or a single part.
    """
    for line in describe_sample(sample):
        print_text(line)


def describe_sample(sample: Any) -> list[str]:
    """The lines that `print_modality_sample` prints."""
    return [describe_part(part) for part in parse_parts(sample)]


def parse_parts(sample: Any) -> list[Part]:
    """The parts of a sample, or of a single part. Raises `TypeError` for anything else.

    Unlike the parser of what a model takes it knows no model: any type and any shape will do.
    """
    parts = sample if isinstance(sample, list) else [sample]
    if any(isinstance(part, list) for part in parts):
        raise TypeError("a part is a tensor or (type, tensor), got list; a list of samples is shown by show_samples")
    return [parse_part(part) for part in parts]


def parse_part(part: Any) -> Part:
    pair = isinstance(part, tuple) and len(part) == 2
    modality: Any = part[0] if pair else 0
    tensor: Any = part[1] if pair else part
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a part is a tensor or (type, tensor), got {type(part).__name__}")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"text is int64 and modalities are float32 or the like, got {tensor.dtype}")
    if pair and (isinstance(modality, bool) or not isinstance(modality, Integral)):
        raise TypeError(f"a pair is (type, tensor) with an int for its type, got {type(modality).__name__}")
    if pair and not tensor.is_floating_point():
        raise TypeError(f"modality {modality} must be floating point, got {tensor.dtype}; text has no type")
    if not tensor.is_floating_point():
        return Part(None, tensor.detach())
    return Part(int(modality), tensor.detach())


def describe_part(part: Part) -> str:
    modality, tensor = part
    if modality is None:
        return f"text  {tuple(tensor.shape)}  {spell_ids(tensor)}"
    if not tensor.numel():
        return f"modality {modality}  {tuple(tensor.shape)}  empty"
    return f"modality {modality}  {tuple(tensor.shape)}  mean {tensor.mean():.3f}  std {tensor.std(correction=0):.3f}"


def spell_ids(ids: Tensor) -> str:
    return " ".join(map(str, ids.reshape(-1).tolist()))


def decode(ids: Tensor, decode_text: Any) -> str:
    """Text as it may be printed: what `decode_text` makes of ids (n), or the ids themselves where it is None.

    Control characters become U+FFFD. Raises `TypeError` if `decode_text` returns something else than a string.
    """
    if decode_text is None:
        return spell_ids(ids)
    text = decode_text(ids.reshape(-1).cpu())
    if not isinstance(text, str):
        raise TypeError(f"decode_text takes ids, a 1-D tensor, and returns a str, got {type(text).__name__}")
    return without_controls(text.replace("\r\n", "\n"))


def without_controls(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters but tabs and line ends become U+FFFD."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)


def check_decode_text(decode_text: Any) -> None:
    if decode_text is not None and not callable(decode_text):
        raise TypeError(f"decode_text: expected a function from ids to str, got {type(decode_text).__name__}")


def check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
