"""Samples with several drawn images, of which each is learned behind clean copies of those before it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from transfusion_pytorch.conversations.dropout import modality_of
from transfusion_pytorch.sequence.samples import Condition, Sample


@dataclass(frozen=True)
class CleanContext:
    """Of a sample with several drawn images one part for each visit: the text behind an image, up to and with the next.

    What stands before is read: text, and images clean, as they are when a model continues its own drawings (BAGEL,
    arXiv 2505.14683). A noised image so sees its past and itself, and nothing ever sees a noised image. What stands
    behind is left out. Parts are chosen evenly, so everything is learned equally often. Without this, later parts of a
    sample are learned behind images that are noised to any degree.

    The `transform` of a conversation dataset: picklable, and the same for the same generator. Samples that draw fewer
    than `least` images stay as they are. Raises `ValueError` for a `least` below 1.
    """

    least: int = 2

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"least is a number of drawn images, at least 1, got {self.least}")

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        number = torch.rand((), generator=generator).item()
        parts = list(sample.parts)
        drawn = [i for i, part in enumerate(parts) if modality_of(part) is not None]
        if len(drawn) < self.least:
            return sample
        begins, ends = [0, *(i + 1 for i in drawn)], [*(i + 1 for i in drawn), len(parts)]
        learned = [
            (begin, end)
            for begin, end in zip(begins, ends, strict=True)
            if any(not isinstance(part, Condition) for part in parts[begin:end])
        ]
        begin, end = learned[int(number * len(learned))]
        return replace(sample, parts=[*(as_condition(part) for part in parts[:begin]), *parts[begin:end]])


def as_condition(part: Any) -> Condition:
    """A part that is read and not learned."""
    return part if isinstance(part, Condition) else Condition(part)
