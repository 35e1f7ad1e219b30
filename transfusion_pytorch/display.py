"""Samples on a terminal."""

from typing import Any

from torch import Tensor


def print_modality_sample(sample: Any) -> None:
    """Prints one line for each part of a sample: what it is and its shape, and text in full.

    Takes a list of parts as users write and get them, or a single part.
    """
    for line in describe_sample(sample):
        print(line)


def describe_sample(sample: Any) -> list[str]:
    """The lines that `print_modality_sample` prints."""
    parts = sample if isinstance(sample, list) else [sample]
    return [_describe_part(part) for part in parts]


def _describe_part(part: Any) -> str:
    modality, tensor = part if isinstance(part, tuple) else (0, part)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a part is a tensor or (type, tensor), got {type(part).__name__}")
    if tensor.is_floating_point():
        return (
            f"modality {modality}  {tuple(tensor.shape)}  mean {tensor.mean():.3f}  std {tensor.std(correction=0):.3f}"
        )
    return f"text  {tuple(tensor.shape)}  {' '.join(map(str, tensor.reshape(-1).tolist()))}"
