"""Conditions that are dropped in training, so that guidance can lead away from what lacks them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from transfusion_pytorch.sequence.samples import Condition, Latents, Sample, WithCleanCopy, is_typed

DEFAULT_VISION = 0.3


@dataclass(frozen=True)
class ConditionDropout:
    """Drops the images that a drawn image depends on, each branch on its own (BAGEL, arXiv 2505.14683):

    - `latents`: how often those of autoencoders are dropped
    - `vision`: how often those of the vision encoder, by default 0.3 where there is one
    - `vision_type`: the modality of the vision encoder; by default that of the dataset's format

    A dropped branch is left out of the sample, as guidance by modalities leaves it out (`modality_cfg_scale`). Samples
    in which nothing is drawn stay as they are, and so does what stands behind the last drawn image. Text is dropped by
    the model (`prob_uncond`, 0.1): guidance reads null in its place, which no sample can contain.

    The `transform` of a conversation dataset: picklable, and the same for the same generator. Raises `ValueError` for
    what is no probability, for `vision` without a vision encoder, and for a `vision_type` other than the format's.
    """

    latents: float = 0.3
    vision: float | None = None
    vision_type: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("latents", self.latents), ("vision", self.vision)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, got {value}")

    def for_vision_type(self, vision_type: int | None) -> "ConditionDropout":
        """The same for samples of a format with this `vision_type`, of which datasets tell their transform."""
        if self.vision_type not in (None, vision_type):
            raise ValueError(f"vision_type is {self.vision_type} here, and {vision_type} in the ConversationFormat")
        if self.vision and vision_type is None:
            raise ValueError(f"vision={self.vision}, but there is no vision_type, so no vision encoder to drop")
        return replace(self, vision_type=vision_type)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.vision and self.vision_type is None:
            raise ValueError(f"vision={self.vision} is of a vision encoder: set vision_type, too")
        number_of_latents, number_of_vision = torch.rand(2, generator=generator).tolist()
        drops_latents = number_of_latents < self.latents
        drops_vision = number_of_vision < (DEFAULT_VISION if self.vision is None else self.vision)
        last = last_drawn(sample.parts)
        kept = [
            part
            for i, part in enumerate(sample.parts)
            if i >= last
            or (kind := condition_type(part)) is None
            or not (drops_vision if kind == self.vision_type else drops_latents)
        ]
        return replace(sample, parts=kept)


def last_drawn(parts: Sequence[Any]) -> int:
    """Where the last learned modality stands, -1 for none."""
    drawn = [i for i, part in enumerate(parts) if modality_of(part) is not None]
    return max(drawn, default=-1)


def condition_type(part: Any) -> int | None:
    """The type of a modality that is a condition, None for any other part."""
    return modality_of(part.part) if isinstance(part, Condition) else None


def modality_of(part: Any) -> int | None:
    """The type of a modality that is learned, None for any other part."""
    if isinstance(part, WithCleanCopy):
        return modality_of(part.part)
    if isinstance(part, Latents):
        return part.type
    if is_typed(part):
        return int(part[0])
    return 0 if isinstance(part, torch.Tensor) and part.is_floating_point() else None
