"""What a sampler tells while it works.

A stream of events is text as it is written and modalities as they clear, in the order of the sample:
`TextToken* (ModalityStarted DrawingProgress* ModalityDone TextToken*)* Ended`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.sequence.samples import Shape


class EndReason(str, Enum):
    """Why a sample came to its end.

    - `EOS`: it ended its sentence; `PLAN`: it came to the end of its plan
    - `STOP`: one of its `stop_ids` was written
    - `LENGTH`: it is `max_length` long, or the modality that it opened does not fit into that
    - `SHAPE`: it opened a modality of a shape that cannot be drawn
    - `CANCELLED`: nobody wants it any more
    - `ERROR`: something that the user gave (a logits processor, a decoder), or its solver, raised an error, or the
      model's logits were not finite
    """

    EOS = "eos"
    PLAN = "plan"
    STOP = "stop"
    LENGTH = "length"
    SHAPE = "shape"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class TextToken:
    """An id of text was written. Markers are not told: the other events say what they would."""

    id: int


@dataclass(frozen=True)
class ModalityStarted:
    """A modality was opened; `shape` is the axial shape of its latents."""

    type: int
    shape: Shape


@dataclass(frozen=True)
class DrawingProgress:
    """`step` of `num_steps` intervals of the solver are done, and the flow stands at `time`.

    `latents` are channel-last, in the scale of the network, as noisy as that time says. `estimate` is where they land
    if they keep going straight; `preview()` is that as users see it: decoded, in their scale, channels where they have
    them.
    """

    type: int
    step: int
    num_steps: int
    time: float
    latents: Float[Tensor, "..."]
    estimate: Float[Tensor, "..."]
    decode: Callable[[int, Tensor], Tensor]

    def preview(self) -> Float[Tensor, "..."]:
        return self.decode(self.type, self.estimate)


@dataclass(frozen=True)
class ModalityDone:
    """A modality is finished: `modality` as users see it. The network was evaluated `num_evaluations` times for it."""

    type: int
    modality: Float[Tensor, "..."]
    num_evaluations: int


@dataclass(frozen=True)
class Ended:
    """The sample is finished, and this is what `sample` would have returned. `error` is what ended it, if one did."""

    sample: list[Any]
    reason: EndReason
    error: Exception | None = None


Event = TextToken | ModalityStarted | DrawingProgress | ModalityDone | Ended
