"""How the engine asks the transformer: with a cache of what has been read, or by reading everything again.

A lane is one sequence as the transformer reads it. A guided sample has two, with its text and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transfusion_pytorch.flow.times import CLEAN
from transfusion_pytorch.sequence.samples import Modality, Piece, Text
from transfusion_pytorch.sequence.stream import Past, TokenStream


@runtime_checkable
class Model(Protocol):
    """All that sampling needs to know of a model."""

    vocabulary: Any
    modalities: Any
    transformer: Any
    odeint_kwargs: dict[str, Any]
    fallback_to_default_shape_if_invalid: bool
    device: torch.device
    dtype: torch.dtype

    def pack(self, samples: Sequence[Sequence[Piece]], past: Sequence[Past] | None = None) -> TokenStream: ...
    def latents_by_type(self, samples: Sequence[Sequence[Piece]]) -> dict[int, Tensor]: ...
    def encode(self, samples: Sequence[Sequence[Piece]], name: str = "sample") -> list[list[Piece]]: ...
    def run(self, stream: TokenStream, latents: dict[int, Tensor], t: Tensor, cache: Any = None) -> Any: ...
    def velocities(self, hidden: Any, stream: TokenStream, x_t: dict[int, Tensor], t: Tensor) -> dict[int, Tensor]: ...
    def logits(self, tokens: Tensor) -> Tensor: ...


@dataclass
class Lane:
    """What has been read, what waits to be read, and where the next token stands."""

    row: int
    pending: list[Piece] = field(default_factory=list)
    read: list[Piece] = field(default_factory=list)
    past: Past = field(default_factory=Past)

    def mark_read(self, num_tokens: int) -> None:
        """`num_tokens` are those of the pending pieces; a span takes one position however long it is."""
        steps = sum(len(piece.ids) if isinstance(piece, Text) else 1 for piece in self.pending)
        self.past = Past(self.past.length + num_tokens, self.past.position + steps)
        self.read += self.pending
        self.pending = []


@dataclass(frozen=True)
class Plan:
    """A stream for a set of spans that will be evaluated more than once, and where those spans are in it."""

    stream: TokenStream
    history: dict[int, Tensor]
    last_span: list[int]
    view: Any = None


class CachedContext:
    """Reads every token once. What a solver tries is written behind the committed prefix, and replaced."""

    def __init__(self, model: Model, rows: int):
        self.model = model
        self.cache = model.transformer.create_cache(rows, device=model.device, dtype=model.dtype)

    def advance(self, lanes: Sequence[Lane]) -> Shaped[Tensor, "r d"]:
        """Reads what is pending and commits it. Returns the last token's features for each lane."""
        samples = [lane.pending for lane in lanes]
        stream = self.model.pack(samples, [lane.past for lane in lanes])
        rows = [lane.row for lane in lanes]
        view = self.cache.view(rows, stream.layout)
        stream = stream.to(self.model.device)
        hidden = self.model.run(stream, self.model.latents_by_type(samples), _clean_times(self.model, stream), view)
        self.cache.commit(rows, stream.lengths)
        for lane, length in zip(lanes, stream.lengths, strict=True):
            lane.mark_read(length)
        return hidden.tokens[stream.last]

    def plan(self, lanes: Sequence[Lane], spans: Sequence[Modality]) -> Plan:
        """Lays out one span behind each lane."""
        stream = self.model.pack([[span] for span in spans], [lane.past for lane in lanes])
        view = self.cache.view([lane.row for lane in lanes], stream.layout)
        return Plan(stream.to(self.model.device), {}, list(range(len(lanes))), view)

    def velocities(self, plan: Plan, x_t: Sequence[Tensor], times: Float[Tensor, " r"]) -> list[Tensor]:
        """The velocity of each planned span, flat `(k, c)`, at its own time."""
        return _evaluate(self.model, plan, x_t, times)


class RecomputeContext:
    """Reads everything again each time: slower, and right by construction. The cache is held to it by the tests."""

    def __init__(self, model: Model, rows: int):
        self.model = model

    def advance(self, lanes: Sequence[Lane]) -> Shaped[Tensor, "r d"]:
        samples = [lane.read + lane.pending for lane in lanes]
        stream = self.model.pack(samples).to(self.model.device)
        hidden = self.model.run(stream, self.model.latents_by_type(samples), _clean_times(self.model, stream))
        for lane, length in zip(lanes, stream.lengths, strict=True):
            lane.mark_read(length - lane.past.length)
        return hidden.tokens[stream.last]

    def plan(self, lanes: Sequence[Lane], spans: Sequence[Modality]) -> Plan:
        samples = [[*lane.read, span] for lane, span in zip(lanes, spans, strict=True)]
        stream = self.model.pack(samples).to(self.model.device)
        last = [int((stream.spans.sample == i).nonzero().max()) for i in range(len(lanes))]
        return Plan(stream, self.model.latents_by_type(samples), last)

    def velocities(self, plan: Plan, x_t: Sequence[Tensor], times: Float[Tensor, " r"]) -> list[Tensor]:
        return _evaluate(self.model, plan, x_t, times)


Context = CachedContext | RecomputeContext


def _clean_times(model: Model, stream: TokenStream) -> Tensor:
    return torch.full((len(stream.spans),), CLEAN, device=model.device, dtype=model.dtype)


def _evaluate(model: Model, plan: Plan, x_t: Sequence[Tensor], times: Tensor) -> list[Tensor]:
    spans = plan.stream.spans
    now = dict(zip(plan.last_span, x_t, strict=True))
    t = _clean_times(model, plan.stream)
    t[plan.last_span] = times
    latents = {}
    for modality in spans.modality.unique().tolist():
        members = spans.of_type(modality)
        every = (_split(plan.history[modality], spans, members) if modality in plan.history else {}) | now
        latents[modality] = torch.cat([every[span] for span in members])
    velocities = model.velocities(model.run(plan.stream, latents, t, plan.view), plan.stream, latents, t)
    by_span: dict[int, Tensor] = {}
    for modality, flat in velocities.items():
        by_span |= _split(flat, spans, spans.of_type(modality))
    return [by_span[span] for span in plan.last_span]


def _split(flat: Tensor, spans: Any, members: list[int]) -> dict[int, Tensor]:
    return dict(zip(members, flat.split([spans.sizes[span] for span in members]), strict=True))
