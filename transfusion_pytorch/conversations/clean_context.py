"""Samples with several drawn images, of which each is learned behind clean copies of those before it."""

from dataclasses import dataclass, replace

import torch

from transfusion_pytorch.conversations.dropout import modality_of
from transfusion_pytorch.sequence.samples import Condition, Sample, WithCleanCopy


@dataclass(frozen=True)
class CleanContext:
    """Marks drawn images `WithCleanCopy` that something learned follows: text and images behind them see them clean, as
    they are when a model continues its own drawings (BAGEL, arXiv 2505.14683).

    One forward pass learns all images and all text of a sample; each marked image costs its tokens twice. Without this,
    later parts of a sample are learned behind images that are noised to any degree.

    The `transform` of a conversation dataset: picklable, without any choice. Samples that draw fewer than `least`
    images stay as they are. Raises `ValueError` for a `least` below 1.
    """

    least: int = 2

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"least is a number of drawn images, at least 1, got {self.least}")

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        parts = list(sample.parts)
        is_drawn = [modality_of(part) is not None for part in parts]
        if sum(is_drawn) < self.least:
            return sample
        last_learned = max(i for i, part in enumerate(parts) if not isinstance(part, Condition))
        for i, part in enumerate(parts[:last_learned]):
            if is_drawn[i] and not isinstance(part, WithCleanCopy):
                parts[i] = WithCleanCopy(part)
        return replace(sample, parts=parts)
