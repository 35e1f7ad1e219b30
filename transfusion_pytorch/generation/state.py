"""Where each sample is, between writing and drawing.

k latents of a span, c their channels.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.generation.context import Lane
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape


class Phase(Enum):
    WRITING = auto()
    DRAWING = auto()
    DONE = auto()


@dataclass
class Drawing:
    """A modality on its way from noise to data: `x` are its flat latents `(k, c)` after `step` intervals.

    It stands behind its `lane`, and for guidance also behind the same without text (`unconditional`).
    """

    type: int
    shape: Shape
    x: Float[Tensor, "k c"]
    lane: Lane
    unconditional: Lane | None = None
    step: int = 0

    def as_piece(self) -> Modality:
        return Modality(self.type, self.x.unflatten(0, self.shape) if self.shape else self.x[0])


@dataclass
class SampleState:
    """One sample in the making.

    - `pieces`: the sample so far, markers included
    - `length`: its tokens
    - `lane`: the sample as the transformer reads it; `unconditional`: the same without its text, once it is guided,
      in the row of the cache kept for that (`guide_row`)
    - `opening`: what it has written of the shape of a modality; `drawing`: the modality that is being drawn
    """

    lane: Lane
    guide_row: int
    phase: Phase = Phase.WRITING
    pieces: list[Piece] = field(default_factory=list)
    length: int = 0
    opening: str | None = None
    drawing: Drawing | None = None
    unconditional: Lane | None = None

    @property
    def lanes(self) -> list[Lane]:
        """What has to be read by now: without text, nothing is read but in order to draw."""
        if self.unconditional is None or self.phase is not Phase.DRAWING:
            return [self.lane]
        return [self.lane, self.unconditional]


class Sampled(NamedTuple):
    """A marked sample, text and modalities in turn, latents channel-last; and the first of its modalities as the prompt
    gave them.
    """

    pieces: list[Piece]
    given: list[Modality]
