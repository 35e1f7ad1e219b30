"""Conditions that are dropped in training, so that guidance can lead away from what lacks them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from transfusion_pytorch.sequence.samples import Condition, Latents, Sample, is_typed


@dataclass(frozen=True)
class ConditionDropout:
    """Drops the images that a drawn image depends on, each branch on its own (BAGEL, arXiv 2505.14683):

    - `latents`: how often those of autoencoders are dropped
    - `vision`: how often those of the vision encoder, `vision_type`

    A dropped branch is left out of the sample, as guidance by modalities leaves it out (`modality_cfg_scale`). Samples
    in which nothing is drawn stay as they are, and so does what stands behind the last drawn image. Text is dropped by
    the model (`prob_uncond`, 0.1): guidance reads null in its place, which no sample can contain.

    The `transform` of a conversation dataset: picklable, and the same for the same generator.
    """

    latents: float = 0.3
    vision: float = 0.3
    vision_type: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("latents", self.latents), ("vision", self.vision)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, got {value}")

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        number_of_latents, number_of_vision = torch.rand(2, generator=generator).tolist()
        drops_latents, drops_vision = number_of_latents < self.latents, number_of_vision < self.vision
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
    if isinstance(part, Latents):
        return part.type
    if is_typed(part):
        return int(part[0])
    return 0 if isinstance(part, torch.Tensor) and part.is_floating_point() else None
