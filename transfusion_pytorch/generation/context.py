"""How the engine asks the transformer: with a cache of what has been read, or by reading everything again.

A lane is one sequence as the transformer reads it. A guided sample has several: itself, the same without its text, and
without its modalities too.

r lanes, k latents of a span, c their channels, d model.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transfusion_pytorch.flow.times import CLEAN
from transfusion_pytorch.sequence.samples import Modality, Piece, Text, as_text
from transfusion_pytorch.sequence.stream import Past, TokenStream, pack_ids

READ_AT_ONCE = 8192  # tokens: 64 long prompts at once would take the memory of a training batch


@runtime_checkable
class Model(Protocol):
    """All that sampling needs to know of a model."""

    vocabulary: Any
    modalities: Any
    transformer: Any
    odeint_kwargs: dict[str, Any]
    fallback_to_default_shape_if_invalid: bool
    prob_uncond: float
    device: torch.device
    dtype: torch.dtype
    precision: torch.dtype

    def pack_stream(self, samples: Sequence[Sequence[Piece]], past: Sequence[Past] | None = None) -> TokenStream: ...
    def latents_by_type(self, samples: Sequence[Sequence[Piece]]) -> dict[int, Tensor]: ...
    def encode(self, samples: Sequence[Sequence[Piece]], name: str = "sample") -> list[list[Piece]]: ...
    def decode(self, samples: Sequence[Sequence[Piece]], *, raw: bool = False) -> list[list[Any]]: ...
    def forward_stream(self, stream: TokenStream, latents: dict[int, Tensor], t: Tensor, cache: Any = None) -> Any: ...
    def velocities(self, output: Any, stream: TokenStream, x_t: dict[int, Tensor], t: Tensor) -> dict[int, Tensor]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(eq=False)
class Lane:
    """What waits to be read, and what has been: `past`, of whose last token there are `features`. `row` is its place in
    the cache, once it is opened.

    Ids that follow the last pending piece are kept as plain numbers until they are read: a step of decoding is one of
    them, and has no use for more.
    """

    row: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    read: list[Piece] = field(default_factory=list)
    past: Past = field(default_factory=Past)
    features: Shaped[Tensor, " d"] | None = None

    def append(self, piece: Piece) -> None:
        if isinstance(piece, Text):
            self.ids += piece.ids.tolist()
        else:
            self.pieces = [*self.pending, piece]
            self.ids = []

    @property
    def is_pending(self) -> bool:
        return bool(self.ids or self.pieces)

    @property
    def pending(self) -> list[Piece]:
        return [*self.pieces, *as_text(self.ids)]

    @property
    def num_pending(self) -> int:
        """How much is pending, in ids and latents."""
        sizes = [len(it.ids) if isinstance(it, Text) else it.tensor.shape[:-1].numel() for it in self.pieces]
        return len(self.ids) + sum(sizes)

    def mark_read(self, num_tokens: int, features: Shaped[Tensor, " d"]) -> None:
        """`num_tokens` are those of what is pending; a span takes one position however long it is."""
        steps = len(self.ids) + sum(len(piece.ids) if isinstance(piece, Text) else 1 for piece in self.pieces)
        self.past = Past(self.past.length + num_tokens, self.past.position + steps)
        self.pieces, self.ids, self.features = [], [], features


@dataclass(frozen=True)
class SpanStream:
    """A stream for a set of spans that will be evaluated more than once, and where those spans are in it."""

    stream: TokenStream
    history: dict[int, Tensor]
    spans: list[int]
    view: Any = None


class Prefix(NamedTuple):
    """What was read first, in each of these rows: how far that came, and the features of its last token."""

    rows: list[int]
    past: Past
    features: Shaped[Tensor, " d"]


class CachedContext:
    """Reads every token once. What a solver tries is written behind the committed prefix, and replaced.

    What several lanes begin with is read once, and copied: samples of one prompt, and histories without text.
    """

    def __init__(self, model: Model):
        self.model = model
        self.cache = model.transformer.create_cache(device=model.device, dtype=model.dtype)
        self.tokens_read = 0
        self._prefixes: dict[Hashable, Prefix] = {}

    def open(self, lane: Lane) -> None:
        """Gives a lane its row, if it has none yet."""
        if lane.row is None:
            lane.row = self.cache.acquire()

    def close(self, lane: Lane) -> None:
        if lane.row is not None:
            for prefix in self._prefixes.values():
                if lane.row in prefix.rows:
                    prefix.rows.remove(lane.row)
            self._prefixes = {key: prefix for key, prefix in self._prefixes.items() if prefix.rows}
            self.cache.release(lane.row)
            lane.row = None

    def advance(self, lanes: Sequence[Lane]) -> None:
        """Reads what is pending and commits it."""
        readers, followers, fresh = [], [], set()
        for lane in lanes:
            key = None if lane.past.length else fingerprint(lane.pending)
            if key in self._prefixes or key in fresh:
                followers.append((key, lane))
            else:
                readers.append((key, lane))
                fresh |= set() if key is None else {key}
        for group in _groups([lane for _, lane in readers]):
            self._read(group)
        for key, lane in readers:
            if key is not None and lane.row is not None and lane.features is not None:
                self._prefixes[key] = Prefix([lane.row], lane.past, lane.features)
        together: dict[Hashable, list[Lane]] = {}
        for key, lane in followers:
            together.setdefault(key, []).append(lane)
        for key, members in together.items():
            self._copy(self._prefixes[key], members)

    def _copy(self, prefix: Prefix, lanes: Sequence[Lane]) -> None:
        rows = _rows(lanes)
        self.cache.copy(prefix.rows[0], rows, prefix.past.length)
        prefix.rows.extend(rows)
        for lane in lanes:
            lane.mark_read(prefix.past.length, prefix.features)

    def _read(self, lanes: Sequence[Lane]) -> None:
        past = [lane.past for lane in lanes]
        latents: dict[int, Tensor] = {}
        if any(lane.pieces for lane in lanes):
            samples = [lane.pending for lane in lanes]
            stream, latents = self.model.pack_stream(samples, past), self.model.latents_by_type(samples)
        else:
            stream = pack_ids([lane.ids for lane in lanes], past)
        rows, stream = _rows(lanes), stream.to(self.model.device)
        view = self.cache.view(rows, stream.layout)
        output = self.model.forward_stream(stream, latents, _clean_times(self.model, stream), view)
        self.cache.commit(rows, stream.lengths)
        self.tokens_read += sum(stream.lengths)
        for lane, length, features in zip(lanes, stream.lengths, output.hidden[stream.last], strict=True):
            lane.mark_read(length, features)

    def lay_out(self, lanes: Sequence[Lane], spans: Sequence[Modality]) -> SpanStream:
        """Lays out one span behind each lane."""
        order = sorted(range(len(lanes)), key=lambda i: (spans[i].type, spans[i].shape, lanes[i].row or 0))
        lanes = [lanes[i] for i in order]
        stream = self.model.pack_stream([[spans[i]] for i in order], [lane.past for lane in lanes]).to(
            self.model.device
        )
        view = None
        if any(lane.past.length for lane in lanes):
            for lane in lanes:
                self.open(lane)
            view = self.cache.view(_rows(lanes), stream.layout)
        return SpanStream(stream, {}, _inverse(order), view)

    def velocities(self, laid: SpanStream, x_t: Sequence[Tensor], times: Float[Tensor, " r"]) -> list[Tensor]:
        """The velocity of each span laid out, flat `(k, c)`, at its own time."""
        return _evaluate(self.model, laid, x_t, times)


class RecomputeContext:
    """Reads everything again each time: slower, and right by construction. The cache is held to it by the tests."""

    def __init__(self, model: Model):
        self.model = model
        self.tokens_read = 0

    def open(self, lane: Lane) -> None:
        pass

    def close(self, lane: Lane) -> None:
        lane.read = []

    def advance(self, lanes: Sequence[Lane]) -> None:
        samples = [lane.read + lane.pending for lane in lanes]
        stream = self.model.pack_stream(samples).to(self.model.device)
        output = self.model.forward_stream(
            stream, self.model.latents_by_type(samples), _clean_times(self.model, stream)
        )
        self.tokens_read += sum(stream.lengths)
        last = output.hidden[stream.last]
        for lane, sample, length, features in zip(lanes, samples, stream.lengths, last, strict=True):
            lane.read = sample
            lane.mark_read(length - lane.past.length, features)

    def lay_out(self, lanes: Sequence[Lane], spans: Sequence[Modality]) -> SpanStream:
        samples = [[*lane.read, span] for lane, span in zip(lanes, spans, strict=True)]
        stream = self.model.pack_stream(samples).to(self.model.device)
        sample = stream.spans.sample.tolist()
        last = [max(row for row, each in enumerate(sample) if each == i) for i in range(len(lanes))]
        return SpanStream(stream, self.model.latents_by_type(samples), last)

    def velocities(self, laid: SpanStream, x_t: Sequence[Tensor], times: Float[Tensor, " r"]) -> list[Tensor]:
        return _evaluate(self.model, laid, x_t, times)


Context = CachedContext | RecomputeContext


def fingerprint(pieces: Iterable[Piece]) -> Hashable:
    """Equal for equal pieces, to the bit."""
    return tuple(
        tuple(piece.ids.tolist())
        if isinstance(piece, Text)
        else (piece.type, piece.shape, piece.tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for piece in pieces
    )


def _groups(lanes: Sequence[Lane]) -> Iterator[list[Lane]]:
    """What is read in one forward: not too much at once, and those of one length in neighbouring rows together, which
    are one plain batch.
    """
    group: list[Lane] = []
    size = 0
    for lane in sorted(lanes, key=lambda lane: (lane.num_pending, lane.row)):
        if group and size + lane.num_pending > READ_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(lane)
        size += lane.num_pending
    if group:
        yield group


def _rows(lanes: Sequence[Lane]) -> list[int]:
    rows = [lane.row for lane in lanes if lane.row is not None]
    assert len(rows) == len(lanes), "a lane is opened before it is read"
    return rows


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each entry went: `[2 0 1] -> [1 2 0]`."""
    places = [0] * len(order)
    for place, i in enumerate(order):
        places[i] = place
    return places


def _clean_times(model: Model, stream: TokenStream) -> Tensor:
    return torch.full((len(stream.spans),), CLEAN, device=model.device, dtype=model.precision)


def _evaluate(model: Model, laid: SpanStream, x_t: Sequence[Tensor], times: Tensor) -> list[Tensor]:
    spans = laid.stream.spans
    now = dict(zip(laid.spans, x_t, strict=True))
    t = _clean_times(model, laid.stream)
    t[laid.spans] = times.to(t.dtype)
    latents = {}
    for modality in sorted(set(spans.types)):
        members = spans.of_type(modality)
        every = (_split(laid.history[modality], spans, members) if modality in laid.history else {}) | now
        latents[modality] = torch.cat([every[span] for span in members])
    velocities = model.velocities(model.forward_stream(laid.stream, latents, t, laid.view), laid.stream, latents, t)
    by_span: dict[int, Tensor] = {}
    for modality, flat in velocities.items():
        by_span |= _split(flat, spans, spans.of_type(modality))
    return [by_span[span] for span in laid.spans]


def _split(flat: Tensor, spans: Any, members: list[int]) -> dict[int, Tensor]:
    return dict(zip(members, flat.split([spans.sizes[span] for span in members]), strict=True))
