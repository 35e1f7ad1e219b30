"""Forward passes for sampling: prefill, decode step, velocities of spans. With a KV cache, or without one.

r branches, k latents of a span, c their channels, d model.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.times import CLEAN
from transfusion_pytorch.generation.batch_state import BatchState, Branch, Decoded, Item, as_pieces, fingerprint
from transfusion_pytorch.generation.sampler import upload
from transfusion_pytorch.network.conditions import ConditionTable
from transfusion_pytorch.network.cpu.reordered import ReorderedWeights
from transfusion_pytorch.network.precision import precision_of
from transfusion_pytorch.network.step_graph import StepGraph, StepGraphs
from transfusion_pytorch.sequence.joined import JoinedSpans
from transfusion_pytorch.sequence.samples import Modality, Piece
from transfusion_pytorch.sequence.stream import Past, TokenStream

T = TypeVar("T")
READ_AT_ONCE = 8192  # tokens of one prefill forward pass, and of one prompt in a step: others wait, memory is finite


@runtime_checkable
class Model(Protocol):
    """What sampling needs of a model, as `Transfusion` has it."""

    vocabulary: Any
    modalities: Any
    transformer: Any
    text_embedding: Any
    odeint_kwargs: dict[str, Any]
    fallback_to_default_shape_if_invalid: bool
    prob_uncond: float
    device: torch.device
    dtype: torch.dtype
    precision: torch.dtype
    encode: Callable[..., list[list[Piece]]]
    decode: Callable[..., list[list[Any]]]
    pack_stream: Callable[..., TokenStream]
    with_positions: Callable[[TokenStream], TokenStream]
    latents_by_type: Callable[..., dict[int, Tensor]]
    forward_stream: Callable[..., Any]
    condition: Callable[[Tensor, Tensor], Tensor]
    velocities: Callable[..., dict[int, Tensor]]
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SpanStream:
    """The stream of denoising evaluations: one span behind each branch. It serves many of them.

    - `index`: where each branch's span is in the span table; `joined`: how latents and velocities get in and out
    - `view`: the `rows` of the cache, void once their `stamp` has changed
    """

    stream: TokenStream
    index: Sequence[int]
    joined: JoinedSpans
    view: Any = None
    rows: Sequence[Any] = ()
    stamp: Hashable = None

    def times_of_spans(self, times: Sequence[float]) -> list[float]:
        """The time of every span of the stream, from those of the branches; what was there before is clean."""
        every = [CLEAN] * len(self.stream.spans)
        for span, time in zip(self.index, times, strict=True):
            every[span] = time
        return every


class PrefillChunk(NamedTuple):
    """What one prefill reads of a branch: its next `items`, which are `length` tokens."""

    branch: Branch
    items: list[Item]
    length: int


class Prefix(NamedTuple):
    """A prompt that branches share: rows that hold it, and its size."""

    rows: list[Any]
    past: Past


class UncachedRunner:
    """Reads everything again at every step: slow, and right by construction. Tests compare the cache with it, and a
    transformer without `create_cache` samples through it.
    """

    def __init__(self, model: Model):
        self.model = model
        self.reordered = ReorderedWeights()
        self.tokens_read = 0

    # of the cache, which is not there

    @property
    def must_restart(self) -> bool:
        """Whether nothing that was read can be relied on."""
        return False

    def restart(self) -> None:
        """Begins with an empty cache. No branch may keep its row."""

    @property
    def memory(self) -> tuple[int, int, int]:
        """Of the cache: bytes of a token, tokens that are committed, and tokens that there is memory for."""
        return 0, 0, 0

    def cache_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of the cache that branches of these lengths take."""
        return 0

    def close(self, branch: Branch) -> None:
        """Frees the row of a branch."""

    # prefill and decode

    def prefill(self, branches: Sequence[Branch], most: int | None = None) -> None:
        """Reads what comes before a decode step or a denoising: at most `most` tokens in all, but at least one item."""
        for branch in branches:
            branch.mark_read(len(branch.prefill_items), 0)

    def batch_state(self, requests: Sequence[Any]) -> BatchState:
        """The state of a decode step for these requests."""
        return BatchState(requests, self.model.device, self.model.dtype)

    def is_valid(self, state: BatchState) -> bool:
        """Whether the state can serve another step."""
        return True

    def decode(self, state: BatchState) -> Decoded:
        """Reads the last id of every branch, in the order of the state, and chooses the next unless processors are to
        see the logits first. `commit` makes what was read permanent.
        """
        samples = [as_pieces(branch.items) for branch in state.branches]
        stream = self.model.pack_stream(samples).to(self.model.device)
        times = _as_times(self.model, [CLEAN] * len(stream.spans))
        output = self.model.forward_stream(stream, self.model.latents_by_type(samples), times)
        self.tokens_read += sum(stream.lengths)
        return self._chosen(state, output.hidden[stream.last])

    def _chosen(self, state: BatchState, hidden: Float[Tensor, "r d"]) -> Decoded:
        logits = self.model.logits(hidden)
        return Decoded(logits, None if state.has_processors else state.choose(logits))

    def commit(self, branch: Branch) -> None:
        """Makes what a decode step has read of a branch permanent. Nothing of it can fail."""
        branch.mark_read(1, 1)

    # velocities

    def condition_table(self, times: Sequence[tuple[int, float]]) -> ConditionTable | None:
        """What spans of these types at these times take from the network besides attention, computed together."""
        return None

    def span_stream(self, order: Sequence[tuple[int, Branch]], modalities: Sequence[Modality]) -> SpanStream:
        """The stream of one span behind each branch of the order, that of `modalities[owner]` behind `(owner, branch)`.
        Nothing of it is committed.
        """
        samples = [[*as_pieces(branch.items), modalities[owner]] for owner, branch in order]
        stream = self.model.with_positions(self.model.pack_stream(samples).to(self.model.device))
        last = {sample: span for span, sample in enumerate(stream.spans.sample.tolist())}
        index, owners = [last[i] for i in range(len(order))], [owner for owner, _ in order]
        history = self.model.latents_by_type(samples)
        return SpanStream(stream, index, JoinedSpans.of(stream, index, owners, modalities, history))

    def is_current(self, spans: SpanStream) -> bool:
        """Whether the stream can serve another evaluation."""
        return True

    def velocities(
        self, spans: SpanStream, x: Float[Tensor, "u w"], times: Sequence[float], table: ConditionTable | None
    ) -> Float[Tensor, "v w"]:
        """The velocities of each branch's span, one behind the other, each at its own time."""
        every = spans.times_of_spans(times)
        keys = list(zip(spans.stream.spans.types, every, strict=True))
        conditioning = None
        if table is not None and table.has(keys):
            index = None if spans.stream.has_equal_spans else spans.stream.modulation_index
            conditioning = table.conditioning(keys, index)
        t, latents = _as_times(self.model, every), spans.joined.latents(x)
        output = self.model.forward_stream(spans.stream, latents, t, spans.view, conditioning)
        return spans.joined.join(self.model.velocities(output, spans.stream, latents, t), x.shape[1])


class CachedRunner(UncachedRunner):
    """Reads every token once. Branches with equal prompts are read once and copied: samples of one prompt, and
    unconditional branches of equal length.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        self.graphs = StepGraphs(model)
        self.restart()

    def restart(self) -> None:
        """The new cache has the type of the forward pass."""
        model = self.model
        self.precision = precision_of(model.device, model.dtype)
        if self.graphs.device != model.device:
            self.graphs = StepGraphs(model)
        dtype = self.precision.autocast or self.precision.own
        self.cache = model.transformer.create_cache(device=model.device, dtype=dtype)
        self._prefixes: dict[Hashable, Prefix] = {}
        self.reordered.clear()

    @property
    def must_restart(self) -> bool:
        """An interruption has come in the middle of a change, or model or autocast are in another precision or on
        another device.
        """
        return self.cache.is_broken or self.precision != precision_of(self.model.device, self.model.dtype)

    @property
    def memory(self) -> tuple[int, int, int]:
        return self.cache.bytes_per_token, self.cache.used_tokens, self.cache.reserved_tokens

    def cache_tokens(self, lengths: Sequence[int]) -> int:
        return sum(map(self.cache.capacity_for, lengths))

    def close(self, branch: Branch) -> None:
        if branch.row is not None and not self.cache.is_broken:
            with self.cache.unbroken():
                for prefix in self._prefixes.values():
                    if branch.row in prefix.rows:
                        prefix.rows.remove(branch.row)
                self._prefixes = {key: prefix for key, prefix in self._prefixes.items() if prefix.rows}
                self.cache.release(branch.row)
        branch.row = None

    def _open(self, branches: Sequence[Branch], lengths: Sequence[int]) -> list[Any]:
        """The rows of these branches, with room for so many more tokens."""
        for branch, length in zip(branches, lengths, strict=True):
            if branch.row is None:
                branch.row = self.cache.acquire(length)
        rows = [branch.row for branch in branches]
        self.cache.reserve(rows, lengths)
        return rows

    def _view(self, rows: Sequence[Any], stream: TokenStream) -> Any:
        has_spans, num_latents = len(stream.spans) > 0, sum(map(prod, stream.spans.token_shapes))
        return self.model.transformer.cache_view(
            self.cache, rows, stream.layout, has_text=num_latents < len(stream.token), has_spans=has_spans
        )

    # prefill

    def prefill(self, branches: Sequence[Branch], most: int | None = None) -> None:
        """Of a longer prompt than `READ_AT_ONCE` the rest is left for the next step."""
        readers, followers, claimed = [], [], set()
        for branch in [branch for branch in branches if branch.needs_prefill]:  # others were read before a failure
            if not branch.num_read and branch.prefix_key is None:
                branch.prefix_key = fingerprint(branch.prefill_items)
            key = branch.prefix_key
            if not branch.num_read and (key in self._prefixes or key in claimed):
                followers.append(branch)
            else:
                readers.append(branch)
                claimed.add(key)
        of_length = attrgetter("length")  # chunks of equal length together, since those are one plain batch
        for chunks in batches(sorted(self._chunks(readers, most), key=of_length), of_length, READ_AT_ONCE):
            self._read(chunks)
        with self.cache.unbroken():
            self._copy_prefixes(followers)

    def _chunks(self, branches: Sequence[Branch], most: int | None) -> Iterator[PrefillChunk]:
        """The next chunk of each branch, until they are `most` tokens together. Text may be split, a modality is not;
        the first item is always taken.
        """
        left = math.inf if most is None else most
        for branch in branches:
            items: list[Item] = []
            length = 0
            for item in branch.prefill_items if left > 0 else ():
                size = self._num_tokens(item)
                if items and length + size > min(left, READ_AT_ONCE):
                    break
                items.append(item)
                length += size
            left -= length
            if items:
                yield PrefillChunk(branch, items, length)

    def _read(self, chunks: Sequence[PrefillChunk]) -> None:
        with self.cache.unbroken():
            self._open([it.branch for it in chunks], [it.length for it in chunks])
        chunks = sorted(chunks, key=lambda it: (it.length, *_place(it.branch)))
        rows, samples = [it.branch.row for it in chunks], [as_pieces(it.items) for it in chunks]
        stream = self.model.pack_stream(samples, [it.branch.past for it in chunks]).to(self.model.device)
        view = self._view(rows, stream)
        times = _as_times(self.model, [CLEAN] * len(stream.spans))
        self.model.forward_stream(stream, self.model.latents_by_type(samples), times, view)
        with self.cache.unbroken():  # from here on nothing can fail
            self.cache.commit(rows, stream.lengths)
            self.tokens_read += sum(stream.lengths)
            for branch, items, length in chunks:
                branch.mark_read(len(items), length)
                self._keep_prefix(branch)

    def _keep_prefix(self, branch: Branch) -> None:
        """Offers the prompt of a branch to others, once it is read to its end."""
        if branch.prefix_key is not None and not branch.needs_prefill:
            self._prefixes[branch.prefix_key] = Prefix([branch.row], branch.past)
            branch.prefix_key = None

    def _copy_prefixes(self, branches: Sequence[Branch]) -> None:
        """Gives branches what others have read, as far as that is done."""
        branches = [branch for branch in branches if branch.prefix_key in self._prefixes]
        prefixes = [self._prefixes[branch.prefix_key] for branch in branches]
        rows = self._open(branches, [prefix.past.length for prefix in prefixes])
        for branch, row, prefix in zip(branches, rows, prefixes, strict=True):
            self.cache.copy(prefix.rows[0], [row], prefix.past.length)
            prefix.rows.append(row)
            branch.mark_read(prefix.past.position, prefix.past.length)
            branch.prefix_key = None

    def _num_tokens(self, item: Item) -> int:
        return 1 if isinstance(item, int) else prod(self.model.modalities[item.type].token_shape(item.shape))

    # decode

    def batch_state(self, requests: Sequence[Any]) -> BatchState:
        """Their rows are moved together, with room for one token."""
        with self.cache.unbroken():
            self.cache.gather(self._open([request.branch for request in requests], [1] * len(requests)))
        requests = sorted(requests, key=lambda request: _place(request.branch))
        rows = [request.branch.row for request in requests]
        positions = [request.branch.past.position for request in requests]
        reordered = self.reordered if self._reorders(len(rows)) else None
        view = self.model.transformer.decode_view(
            self.cache, rows, positions, is_fixed=self.graphs.is_used, reordered=reordered
        )
        return BatchState(
            requests,
            self.model.device,
            self.model.dtype,
            stamp=self.cache.stamp(rows),
            view=view,
            graph=StepGraph(self.graphs) if self.graphs.is_used and view.prepared is not None else None,
            reordered=reordered,
        )

    def is_valid(self, state: BatchState) -> bool:
        """No row has moved or is full, and its weights are in the order that serves."""
        rows = [branch.row for branch in state.branches]
        in_order = (state.reordered is not None) == self._reorders(len(rows))
        return in_order and state.view.num_steps > 0 and state.stamp == self.cache.stamp(rows)

    def _reorders(self, rows: int) -> bool:
        return self.reordered.serves(rows, self.model.dtype)

    def decode(self, state: BatchState) -> Decoded:
        step = partial(self._step, state)
        if self.model.device.type == "cpu":
            self.reordered.note_step(len(state.branches), self.model.dtype)
        with torch.inference_mode(), nullcontext() if state.reordered is None else state.reordered.used():
            return step() if state.graph is None else state.graph.run(step)

    def _step(self, state: BatchState) -> Decoded:
        """Everything that a decode step does on the device, in fixed shapes: nothing is uploaded or read back."""
        embedded = self.model.text_embedding(state.token)  # `forward_stream` without what it does for spans
        hidden = self.model.transformer(embedded, position=state.position, layout=state.layout, cache=state.view)
        return self._chosen(state, hidden)

    def commit(self, branch: Branch) -> None:
        self.cache.commit([branch.row], [1])
        self.tokens_read += 1
        branch.mark_read(1, 1)

    # velocities

    def condition_table(self, times: Sequence[tuple[int, float]]) -> ConditionTable | None:
        types = upload([type for type, _ in times], self.model.device)
        conditions = self.model.condition(types, _as_times(self.model, [time for _, time in times]))
        return ConditionTable(self.model.transformer, times, conditions)

    def span_stream(self, order: Sequence[tuple[int, Branch]], modalities: Sequence[Modality]) -> SpanStream:
        has_history = any(branch.length for _, branch in order)
        if has_history:
            with self.cache.unbroken():
                sizes = [self._num_tokens(modalities[owner]) for owner, _ in order]
                rows = self._open([branch for _, branch in order], sizes)
                self.cache.gather(sorted(rows, key=lambda row: row.index), at_end=True)
        keys = [(modalities[owner].type, modalities[owner].shape, *_place(branch)) for owner, branch in order]
        places = sorted(range(len(order)), key=keys.__getitem__)
        sorted_order = [order[i] for i in places]
        samples, past = [[modalities[owner]] for owner, _ in sorted_order], [branch.past for _, branch in sorted_order]
        stream = self.model.with_positions(self.model.pack_stream(samples, past).to(self.model.device))
        index = sorted(range(len(order)), key=places.__getitem__)  # where each went
        joined = JoinedSpans.of(stream, index, [owner for owner, _ in order], modalities, {})
        if not has_history:
            return SpanStream(stream, index, joined)
        rows = [branch.row for _, branch in sorted_order]
        return SpanStream(stream, index, joined, self._view(rows, stream), rows, self.cache.stamp(rows))

    def is_current(self, spans: SpanStream) -> bool:
        """No row has moved."""
        return not spans.rows or spans.stamp == self.cache.stamp(spans.rows)


def create_runner(model: Model, *, cache_kv: bool = True) -> UncachedRunner:
    """With a cache, if that is wanted and the transformer has one (a user's own may not)."""
    return CachedRunner(model) if cache_kv and hasattr(model.transformer, "create_cache") else UncachedRunner(model)


def batches(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Neighbours together, of at most `most` in size; a larger one is alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and total + size(item) > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def _place(branch: Branch) -> tuple[int, int]:
    """Where it lies in the cache, to sort by."""
    return (0, 0) if branch.row is None else (branch.row.block.capacity, branch.row.index)


def _as_times(model: Model, times: Sequence[float]) -> Float[Tensor, " m"]:
    if len(set(times)) <= 1:  # nothing is uploaded
        return torch.full((len(times),), next(iter(times), CLEAN), device=model.device, dtype=model.precision)
    return torch.tensor(times, dtype=torch.float64, device="cpu").to(model.device, model.precision, non_blocking=True)
