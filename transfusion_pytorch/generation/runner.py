"""Forward passes for sampling: prefill, decode step, velocities of spans. With a KV cache, or without one.

r branches, k latents of a span, c their channels, d model.
"""

from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.times import CLEAN
from transfusion_pytorch.generation.batch_state import BatchState, Branch, Decoded, Item, as_pieces, fingerprint
from transfusion_pytorch.network.conditions import ConditionTable
from transfusion_pytorch.network.cpu.reordered import ReorderedWeights
from transfusion_pytorch.network.precision import precision_of
from transfusion_pytorch.network.step_graph import StepGraph, StepGraphs
from transfusion_pytorch.sequence.joined import JoinedSpans
from transfusion_pytorch.sequence.samples import Modality, Piece
from transfusion_pytorch.sequence.stream import Past, TokenStream

READ_AT_ONCE = 8192  # tokens of one prefill forward pass, and of one prompt in a step: others wait, memory is finite


@runtime_checkable
class Model(Protocol):
    """What sampling needs of a model."""

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

    def pack_stream(self, samples: Sequence[Sequence[Piece]], past: Sequence[Past] | None = None) -> TokenStream: ...
    def latents_by_type(self, samples: Sequence[Sequence[Piece]]) -> dict[int, Tensor]: ...
    def encode(self, samples: Sequence[Sequence[Piece]], name: str = "sample") -> list[list[Piece]]: ...
    def decode(self, samples: Sequence[Sequence[Piece]], *, raw: bool = False) -> list[list[Any]]: ...
    def with_positions(self, stream: TokenStream) -> TokenStream: ...
    def forward_stream(
        self, stream: TokenStream, latents: dict[int, Tensor], t: Tensor, cache: Any = None, conditioning: Any = None
    ) -> Any: ...
    def condition(self, modality: Tensor, t: Tensor) -> Tensor: ...
    def velocities(self, output: Any, stream: TokenStream, x_t: dict[int, Tensor], t: Tensor) -> dict[int, Tensor]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SpanStream:
    """The stream of denoising evaluations: one span behind each branch. It serves many of them.

    - `spans`: where each branch's span is in the span table; `joined`: how latents and velocities get in and out
    - `view`: the `rows` of the cache, void once their `stamp` has changed
    """

    stream: TokenStream
    spans: Sequence[int]
    joined: JoinedSpans
    view: Any = None
    rows: Sequence[Any] = ()
    stamp: Hashable = None

    def times_of_spans(self, times: Sequence[float]) -> list[float]:
        """The time of every span of the stream, from those of the branches; what was there before is clean."""
        every = [CLEAN] * len(self.stream.spans)
        for span, time in zip(self.spans, times, strict=True):
            every[span] = time
        return every


class Chunk(NamedTuple):
    """What one prefill reads of a branch: its next `items`, which are `length` tokens."""

    branch: Branch
    items: list[Item]
    length: int


class Prefix(NamedTuple):
    """A prompt that branches share: rows that hold it, and its size."""

    rows: list[Any]
    past: Past


class CachedRunner:
    """Reads every token once. Branches with equal prompts are read once and copied: samples of one prompt, and
    unconditional branches of equal length.
    """

    def __init__(self, model: Model):
        self.model = model
        self.graphs = StepGraphs(model)
        self.reordered = ReorderedWeights()
        self.tokens_read = 0
        self._num_tokens = partial(_num_tokens, model)
        self.restart()

    def restart(self) -> None:
        """Begins with an empty cache, in the type of the forward pass. No branch may keep its row."""
        model = self.model
        self.precision = precision_of(model.device, model.dtype)
        if self.graphs.device != model.device:
            self.graphs = StepGraphs(model)
        dtype = self.precision.autocast or self.precision.own
        self.cache = model.transformer.create_cache(device=model.device, dtype=dtype)
        self._prefixes: dict[Hashable, Prefix] = {}
        self.forget_weights()

    @property
    def must_restart(self) -> bool:
        """Whether nothing that was read can be relied on: an interruption has come in the middle of a change, or model
        or autocast are in another precision or on another device.
        """
        return self.cache.is_broken or self.precision != precision_of(self.model.device, self.model.dtype)

    @property
    def memory(self) -> tuple[int, int, int]:
        """Of the cache: bytes of a token, tokens that are committed, and tokens that there is memory for."""
        return self.cache.bytes_per_token, self.cache.used_tokens, self.cache.reserved_tokens

    def cache_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of the cache that branches of these lengths take."""
        return sum(map(self.cache.capacity_for, lengths))

    def forget_weights(self) -> None:
        """Drops what was made of the weights."""
        self.reordered.clear()

    def close(self, branch: Branch) -> None:
        if branch.row is not None and not self.cache.is_broken:
            with self.cache.unbroken():
                self._forget(branch.row)
                self.cache.release(branch.row)
        branch.row = None

    def _forget(self, row: Any) -> None:
        for key, prefix in list(self._prefixes.items()):
            if row in prefix.rows:
                prefix.rows.remove(row)
                if not prefix.rows:
                    del self._prefixes[key]

    # prefill

    def prefill(self, branches: Sequence[Branch], most: int | None = None) -> None:
        """Reads what is pending: at most `most` tokens in all, but at least one id or span. Of a longer prompt than
        `READ_AT_ONCE` the rest stays pending.
        """
        readers, followers, claimed = [], [], set()
        for branch in [branch for branch in branches if branch.needs_prefill]:  # others were read before a failure
            if not branch.past.length and branch.prefix_key is None:
                branch.prefix_key = fingerprint(branch.prefill_items)
            key = branch.prefix_key
            if not branch.past.length and (key in self._prefixes or key in claimed):
                followers.append(branch)
            else:
                readers.append(branch)
                claimed |= set() if key is None else {key}
        for chunks in self._batches(self._chunks(readers, most)):
            self._read(chunks)
        with self.cache.unbroken():
            self._copy_prefixes(followers)

    def _keep_prefix(self, branch: Branch) -> None:
        """Offers the prompt of a branch to others, once it is read to its end."""
        if branch.prefix_key is not None and not branch.needs_prefill:
            self._prefixes[branch.prefix_key] = Prefix([branch.row], branch.past)
            branch.prefix_key = None

    def _copy_prefixes(self, branches: Sequence[Branch]) -> None:
        by_key: dict[Hashable, list[Branch]] = {}
        for branch in branches:
            if branch.prefix_key in self._prefixes:
                by_key.setdefault(branch.prefix_key, []).append(branch)
        for key, members in by_key.items():
            prefix = self._prefixes[key]
            for branch in members:
                self._open(branch, prefix.past.length)
            rows = [branch.row for branch in members]
            self.cache.copy(prefix.rows[0], rows, prefix.past.length)
            prefix.rows.extend(rows)
            for branch in members:
                branch.mark_read(prefix.past.position, prefix.past.length)
                branch.prefix_key = None

    def _chunks(self, branches: Sequence[Branch], most: int | None) -> Iterable[Chunk]:
        """The next chunk of each branch, until they are `most` tokens together. Text may be split, a modality is not;
        the first item is always taken.
        """
        for branch in branches:
            if most is not None and most <= 0:
                break
            room = READ_AT_ONCE if most is None else min(most, READ_AT_ONCE)
            items: list[Item] = []
            length = 0
            for item in branch.prefill_items:
                size = self._num_tokens(item)
                if items and length + size > room:
                    break
                items.append(item)
                length += size
            most = None if most is None else most - length
            yield Chunk(branch, items, length)

    def _batches(self, chunks: Iterable[Chunk]) -> Iterable[list[Chunk]]:
        """The forward passes of a prefill: not too many tokens in one, and chunks of equal length together, since those
        are one plain batch.
        """
        batch: list[Chunk] = []
        for chunk in sorted(chunks, key=lambda it: it.length):
            if batch and sum(it.length for it in batch) + chunk.length > READ_AT_ONCE:
                yield batch
                batch = []
            batch.append(chunk)
        if batch:
            yield batch

    def _read(self, chunks: Sequence[Chunk]) -> None:
        with self.cache.unbroken():
            for chunk in chunks:
                self._open(chunk.branch, chunk.length)
            self.cache.reserve([it.branch.row for it in chunks], [it.length for it in chunks])
        chunks = sorted(chunks, key=lambda it: (it.length, *_place(it.branch)))
        rows, samples = [it.branch.row for it in chunks], [as_pieces(it.items) for it in chunks]
        stream = self.model.pack_stream(samples, [it.branch.past for it in chunks]).to(self.model.device)
        view = self._view(rows, stream)
        latents = self.model.latents_by_type(samples)
        self.model.forward_stream(stream, latents, _as_times(self.model, [CLEAN] * len(stream.spans)), view)
        with self.cache.unbroken():  # from here on nothing can fail
            self.cache.commit(rows, stream.lengths)
            self.tokens_read += sum(stream.lengths)
            for branch, items, length in chunks:
                branch.mark_read(len(items), length)
                self._keep_prefix(branch)

    def _view(self, rows: Sequence[Any], stream: TokenStream) -> Any:
        has_spans, num_latents = len(stream.spans) > 0, sum(map(prod, stream.spans.token_shapes))
        return self.model.transformer.cache_view(
            self.cache, rows, stream.layout, has_text=num_latents < len(stream.token), has_spans=has_spans
        )

    def _open(self, branch: Branch, length: int) -> None:
        """Gives a branch its row, if it has none yet."""
        if branch.row is None:
            branch.row = self.cache.acquire(length)

    # decode

    def batch_state(self, requests: Sequence[Any]) -> BatchState:
        """The state of a decode step for these requests. Their rows are moved together, with room for one token."""
        with self.cache.unbroken():
            for request in requests:
                self._open(request.branch, 1)
            rows = [request.branch.row for request in requests]
            self.cache.reserve(rows, [1] * len(rows))
            self.cache.gather(rows)
        ordered = sorted(requests, key=lambda request: _place(request.branch))
        rows = [request.branch.row for request in ordered]
        positions = [request.branch.past.position for request in ordered]
        device, dtype = self.model.device, self.model.dtype
        reordered = self.reordered if self._reorders(len(rows)) else None
        view = self.model.transformer.decode_view(
            self.cache, rows, positions, is_fixed=self.graphs.is_used, reordered=reordered
        )
        graph = StepGraph(self.graphs) if self.graphs.is_used and view.prepared is not None else None
        stamp = self.cache.stamp(rows)
        return BatchState(ordered, device, dtype, stamp=stamp, view=view, graph=graph, reordered=reordered)

    def _reorders(self, rows: int) -> bool:
        return self.reordered.serves(rows, self.model.dtype)

    def is_current(self, rows: Sequence[Any], stamp: Hashable) -> bool:
        """Whether none of these rows has moved since the stamp was made."""
        return stamp == self.cache.stamp(rows)

    def is_valid(self, state: BatchState) -> bool:
        """Whether the state can serve another step: no row has moved or is full, and its weights are in the order that
        serves.
        """
        rows = [branch.row for branch in state.branches]
        in_order = (state.reordered is not None) == self._reorders(len(rows))
        return in_order and state.view.num_steps > 0 and self.is_current(rows, state.stamp)

    def decode(self, state: BatchState) -> Decoded:
        """Reads the one pending id of every branch, in the order of the state, and chooses the next unless processors
        are to see the logits first. `commit` makes what was read permanent.
        """
        step = partial(self._step, state)
        if self.model.device.type == "cpu":
            self.reordered.note_step(len(state.branches), self.model.dtype)
        with torch.inference_mode(), nullcontext() if state.reordered is None else state.reordered.used():
            return step() if state.graph is None else state.graph.run(step)

    def _step(self, state: BatchState) -> Decoded:
        """Everything that a decode step does on the device, in fixed shapes: nothing is uploaded or read back."""
        model = self.model
        hidden = model.transformer(  # `forward_stream` without what it does for spans
            model.text_embedding(state.token), position=state.position, layout=state.layout, cache=state.view
        )
        logits = model.logits(hidden)
        return Decoded(logits, None if state.has_processors else state.choose(logits))

    def commit(self, branch: Branch) -> None:
        """Makes what a decode step has read of a branch permanent. Nothing of it can fail."""
        self.cache.commit([branch.row], [1])
        self.tokens_read += 1
        branch.mark_read(1, 1)

    # velocities

    def tabulate(self, times: Sequence[tuple[int, float]]) -> ConditionTable | None:
        """What spans of these types at these times take from the network besides attention, computed together."""
        model = self.model
        types = torch.tensor([type for type, _ in times], device="cpu").to(model.device, non_blocking=True)
        conditions = model.condition(types, _as_times(model, [time for _, time in times]))
        return ConditionTable(model.transformer, times, conditions)

    def lay_out(self, branches: Sequence[Branch], owners: Sequence[int], joined: Sequence[Modality]) -> SpanStream:
        """The stream of one span behind each branch: that of `joined[owners[i]]` behind branch i. Nothing of it is
        committed.
        """
        pieces = [joined[owner] for owner in owners]
        sizes = list(map(self._num_tokens, pieces))
        has_history = any(branch.past.length for branch in branches)
        if has_history:
            with self.cache.unbroken():
                for branch, size in zip(branches, sizes, strict=True):
                    self._open(branch, size)
                rows = [branch.row for branch in branches]
                self.cache.reserve(rows, sizes)
                self.cache.gather(sorted(rows, key=lambda row: row.index), at_end=True)
        keys = [(piece.type, piece.shape, *_place(branch)) for branch, piece in zip(branches, pieces, strict=True)]
        order = sorted(range(len(branches)), key=keys.__getitem__)
        samples, past = [[pieces[i]] for i in order], [branches[i].past for i in order]
        stream = self.model.with_positions(self.model.pack_stream(samples, past).to(self.model.device))
        spans = sorted(range(len(order)), key=order.__getitem__)  # where each went
        laid = SpanStream(stream, spans, JoinedSpans.of(stream, spans, owners, joined, {}))
        if not has_history:
            return laid
        rows = [branches[i].row for i in order]
        return replace(laid, view=self._view(rows, stream), rows=rows, stamp=self.cache.stamp(rows))

    def velocities(
        self, laid: SpanStream, x: Float[Tensor, "u w"], times: Sequence[float], table: ConditionTable | None
    ) -> Float[Tensor, "v w"]:
        """The velocities of each branch's span, one behind the other, each at its own time."""
        keys = list(zip(laid.stream.spans.types, laid.times_of_spans(times), strict=True))
        if table is None or not table.has(keys):
            return _evaluate(self.model, laid, x, times)
        index = None if laid.stream.has_equal_spans else laid.stream.modulation_index
        return _evaluate(self.model, laid, x, times, conditioning=table.conditioning(keys, index))


class UncachedRunner:
    """Reads everything again at every step: slow, and right by construction. Tests compare the cache with it, and a
    transformer without `create_cache` samples through it.
    """

    def __init__(self, model: Model):
        self.model = model
        self.tokens_read = 0

    def restart(self) -> None: ...

    @property
    def must_restart(self) -> bool:
        return False

    def forget_weights(self) -> None: ...

    @property
    def memory(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def cache_tokens(self, lengths: Sequence[int]) -> int:
        return 0

    def close(self, branch: Branch) -> None: ...

    def prefill(self, branches: Sequence[Branch], most: int | None = None) -> None:
        """Notes only what whoever comes next has to read."""
        for branch in branches:
            branch.mark_read(len(branch.prefill_items), 0)

    def batch_state(self, requests: Sequence[Any]) -> BatchState:
        return BatchState(requests, self.model.device, self.model.dtype)

    def is_current(self, rows: Sequence[Any], stamp: Hashable) -> bool:
        return True

    def is_valid(self, state: BatchState) -> bool:
        return True

    def decode(self, state: BatchState) -> Decoded:
        samples = [as_pieces(branch.items) for branch in state.branches]
        stream = self.model.pack_stream(samples).to(self.model.device)
        latents = self.model.latents_by_type(samples)
        output = self.model.forward_stream(stream, latents, _as_times(self.model, [CLEAN] * len(stream.spans)))
        self.tokens_read += sum(stream.lengths)
        return Decoded(self.model.logits(output.hidden[stream.last]), None)

    def commit(self, branch: Branch) -> None:
        branch.mark_read(1, 1)

    def tabulate(self, times: Sequence[tuple[int, float]]) -> ConditionTable | None:
        return None

    def lay_out(self, branches: Sequence[Branch], owners: Sequence[int], joined: Sequence[Modality]) -> SpanStream:
        samples = [[*as_pieces(branch.items), joined[owner]] for branch, owner in zip(branches, owners, strict=True)]
        stream = self.model.with_positions(self.model.pack_stream(samples).to(self.model.device))
        samples_of = stream.spans.sample.tolist()
        last = [max(span for span, sample in enumerate(samples_of) if sample == i) for i in range(len(branches))]
        history = self.model.latents_by_type(samples)
        return SpanStream(stream, last, JoinedSpans.of(stream, last, owners, joined, history))

    def velocities(
        self, laid: SpanStream, x: Float[Tensor, "u w"], times: Sequence[float], table: ConditionTable | None
    ) -> Float[Tensor, "v w"]:
        return _evaluate(self.model, laid, x, times)


Runner = CachedRunner | UncachedRunner


def create_runner(model: Model, *, cache_kv: bool = True) -> Runner:
    """With a cache, if that is wanted and the transformer has one (a user's own may not)."""
    return CachedRunner(model) if cache_kv and hasattr(model.transformer, "create_cache") else UncachedRunner(model)


def _num_tokens(model: Model, item: Item) -> int:
    return 1 if isinstance(item, int) else prod(model.modalities[item.type].token_shape(item.shape))


def _place(branch: Branch) -> tuple[int, int]:
    """Where it lies in the cache, to sort by."""
    return (0, 0) if branch.row is None else (branch.row.block.capacity, branch.row.index)


def _as_times(model: Model, times: Sequence[float]) -> Float[Tensor, " m"]:
    if len(set(times)) <= 1:  # nothing is uploaded
        return torch.full((len(times),), next(iter(times), CLEAN), device=model.device, dtype=model.precision)
    return torch.tensor(times, dtype=torch.float64, device="cpu").to(model.device, model.precision, non_blocking=True)


def _evaluate(
    model: Model, laid: SpanStream, x: Float[Tensor, "u w"], times: Sequence[float], **made: Any
) -> Float[Tensor, "v w"]:
    """One forward pass. `made` is what follows from the times, where it was computed before."""
    t, latents = _as_times(model, laid.times_of_spans(times)), laid.joined.latents(x)
    output = model.forward_stream(laid.stream, latents, t, laid.view, **made)
    return laid.joined.join(model.velocities(output, laid.stream, latents, t), x.shape[1])
