"""Samples, and the events of a request.

The events of a request are its text as it is written and its modalities as they are denoised, in the order of the
sample: `TextToken* (ModalityStarted DrawingProgress* ModalityDone TextToken*)* Ended`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.sequence.samples import Shape


class EndReason(str, Enum):
    """Why a sample ended.

    - `EOS`: the model wrote `eos`; `PLAN`: its plan is complete
    - `STOP`: one of its `stop_ids` was written
    - `LENGTH`: it is `max_length` long, or the modality that it opened does not fit into that
    - `SHAPE`: it opened a modality of a shape that cannot be drawn
    - `CANCELLED`: it was cancelled; `TIMEOUT`: its `timeout` is over
    - `ERROR`: a user's logits processor, adapter or decoder, or the solver, raised an error, or logits or latents were
      not finite
    """

    EOS = "eos"
    PLAN = "plan"
    STOP = "stop"
    LENGTH = "length"
    SHAPE = "shape"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"


class Sample(list):
    """A returned sample: text, `(type, modality)`, text, ... and why it ended.

    - `reason`: why it ended
    - `log_probabilities`: with `SamplingOptions.log_probabilities` an entry for each part: `(n,)` for text, NaN where
      the model did not choose the id (prompt, forced markers), None for a modality
    """

    reason: EndReason
    log_probabilities: list[Float[Tensor, " n"] | None] | None

    def __init__(
        self, parts: Any = (), *, reason: EndReason = EndReason.EOS, log_probabilities: list[Any] | None = None
    ) -> None:
        super().__init__(parts)
        self.reason, self.log_probabilities = reason, log_probabilities


class _Comparable:
    """Equality by value, of tensors too."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _is_equal(getattr(self, it.name), getattr(other, it.name))
            for it in fields(self)  # type: ignore[arg-type]
            if it.compare
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class TextToken:
    """An id of text was written. Markers are not reported: the other events stand for them."""

    id: int
    log_probability: float | None = None


@dataclass(frozen=True)
class ModalityStarted:
    """A modality was opened; `shape` is the axial shape of its latents."""

    type: int
    shape: Shape


@dataclass(frozen=True, eq=False)
class DrawingProgress(_Comparable):
    """`step` of `num_steps` intervals of the solver are done, at `time` of the flow (0 is noise, 1 is data).

    `latents` are channel-last, in the scale of the network, at the noise of that time. `estimate` is the clean latents
    that the current velocity leads to. A request keeps the latest 16 of these until its events are taken.
    """

    type: int
    step: int
    num_steps: int
    time: float
    latents: Float[Tensor, "..."]
    estimate: Float[Tensor, "..."]
    show: Callable[[int, Tensor], Tensor] | None = field(compare=False, repr=False)

    def preview(self) -> Float[Tensor, "..."]:
        """The estimate as users see it: decoded, in their scale, channels where they have them.

        Raises `RuntimeError` for a copy of the event, which has no model.
        """
        if self.show is None:
            raise RuntimeError("a copied or pickled event cannot decode its estimate: take the preview() before")
        return self.show(self.type, self.estimate)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: the model stays where it is."""
        return vars(self) | {"show": None}


@dataclass(frozen=True, eq=False)
class ModalityDone(_Comparable):
    """A modality is finished: `modality` as users see it. The network was evaluated `num_evaluations` times for it."""

    type: int
    modality: Float[Tensor, "..."]
    num_evaluations: int


@dataclass(frozen=True, eq=False)
class Ended(_Comparable):
    """The sample is finished, and this is what `sample` would have returned. `error` is what ended it, if one did."""

    sample: list[Any]
    reason: EndReason
    error: BaseException | None = None


class FinishedModality(NamedTuple):
    """An event to come: `ModalityDone`, once modality `number` of the sample is decoded."""

    number: int
    num_evaluations: int


Event = TextToken | ModalityStarted | DrawingProgress | ModalityDone | Ended


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)
