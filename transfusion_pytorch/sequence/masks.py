"""Who sees whom: one interval of keys for every token.

A token sees the keys of its own sample from the first up to `end`, which is the end of its span, or just past itself
for text. The masks of every attention backend come from that. A noised copy (see `copies.py`) is a sample of its own
that has a past: the slots before its clean copy. So its tokens see a second interval of keys.

n tokens, g samples of one length t, k keys.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from transfusion_pytorch.sequence.blocks import BlockTables, block_tables, block_tables_with_past
from transfusion_pytorch.sequence.moving import on_cpu

# Rows longer than this are attended in chunks of queries that see the keys up to their furthest `end` only. From about
# 1,000 tokens on that is faster than one masked call, and the mask stays small.
LONG_ROW = 512
QUERY_CHUNK = 256


class Chunk(NamedTuple):
    """Some queries of every sample in a run, the number of keys they need, and what of those each may see."""

    queries: slice
    num_keys: int
    is_causal: bool
    mask: Bool[Tensor, "#g 1 t k"] | None


class Run(NamedTuple):
    """Neighbouring samples of one length, which attention takes as a plain batch.

    `rows` are where they stand in a cache; without one, they are the `samples` again. `past` are the slots before the
    clean copy, if the run is a noised copy.
    """

    samples: slice
    rows: slice
    tokens: slice
    chunks: list[Chunk]
    past: slice | None = None

    def batched(self, part: Shaped[Tensor, "g_t ..."]) -> Shaped[Tensor, "g ..."]:
        """The tokens of this run, one sample behind the other, as `(g, h, t, ...)`."""
        return part.unflatten(0, (self.rows.stop - self.rows.start, -1)).transpose(1, 2)

    def keys(self, stream: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "g ..."]:
        """What the queries of this run may see, as `(g, k, s, ...)`: a view, or a copy if there is a past."""
        if self.past is None:
            return self.batched(stream[self.tokens])
        return self.batched(torch.cat((stream[self.past], stream[self.tokens])))

    def put_keys(self, stream: Shaped[Tensor, "n ..."], keys: Shaped[Tensor, "g ..."]) -> None:
        """Writes changed `keys(stream)` back, unless they are a view."""
        if self.past is not None:
            changed, size = keys[0].transpose(0, 1), self.past.stop - self.past.start
            stream[self.past], stream[self.tokens] = changed[:size], changed[size:]


class Intervals(NamedTuple):
    """The same as plain tensors on the device of the model: token q sees the slots `start[q] <= k < end[q]` of the
    stream. `blocks` are the tables of flex attention, where it is used. `past` are the bounds of a second interval of
    every token, empty but for noised copies; None where there are none.
    """

    start: Int[Tensor, " n"]
    end: Int[Tensor, " n"]
    blocks: BlockTables | None = None
    past: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Intervals":
        """Moves or pins all tensors."""
        blocks = None if self.blocks is None else BlockTables(*map(change, self.blocks))
        past = None if self.past is None else (change(self.past[0]), change(self.past[1]))
        return Intervals(change(self.start), change(self.end), blocks, past)

    def mask_mod(self) -> Callable[..., Tensor]:
        """As flex attention wants them."""
        own = visible(self.start, self.end)
        if self.past is None:
            return own
        past = visible(*self.past)
        return lambda batch, head, query, key: own(batch, head, query, key) | past(batch, head, query, key)

    def dense(self) -> Bool[Tensor, "n n"]:
        """The whole mask, from the same definition that flex attention gets."""
        slot = torch.arange(len(self.end), device=self.end.device)
        return self.mask_mod()(None, None, slot[:, None], slot[None, :])


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a stream, and how its samples lie in it.

    - `end` counts keys in the sample, those in the cache (`past`) included: `[t t i i i t] -> [1 2 5 5 5 6]`
    - `lengths` and `past` have an entry for each sample. A stream that is padded to a budget ends in samples of one
      token each, which see only themselves
    - `past_slots`: where the past of a sample lies in the stream and not in a cache, by the number of the sample: that
      of noised copies
    - `device` is the one that attends

    All but `intervals` stay on the CPU. `intervals` are what attention on another device needs. Packing may make them
    in a data worker (`prepare`), pin them and move them; otherwise they are made here when they are asked for.
    """

    end: Int[Tensor, " n"]
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    device: torch.device | str = "cpu"
    intervals: Intervals | None = None
    past_slots: Mapping[int, slice] = field(default_factory=dict)

    def prepare(self, blocks: bool = False) -> "Layout":
        """The same with its intervals, and with the `blocks` of flex attention if wanted. Nothing is made twice."""
        if self.intervals is not None and (self.intervals.blocks is not None or not blocks):
            return self
        if any(self.past) and not self.past_slots:
            raise ValueError("a stream that continues a cache has no intervals of its own slots")
        start, end, past, tables = self.start, self.start + self.end, None, None
        with on_cpu():
            if self.past_slots:
                past = self._past_bounds()
                end = end - (past[1] - past[0])
                tables = block_tables_with_past(start, end, past) if blocks else None
            elif blocks:
                tables = block_tables(start, end)
        made = Intervals(start, end, tables, past).apply(lambda bound: _move(bound.int(), device=self.device))
        return replace(self, intervals=made)

    def _past_bounds(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """For each token the first slot of its past and the one behind the last; 0 and 0 where it has none."""
        past = [self.past_slots.get(sample, slice(0, 0)) for sample in range(len(self.lengths))]
        bounds = torch.tensor([(each.start, each.stop) for each in past])
        first, stop = bounds.repeat_interleave(torch.tensor(self.lengths), dim=0).unbind(1)
        return first, stop

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Layout":
        """For attention on that device."""
        if _is_same(torch.device(self.device), torch.device(device)):
            return self
        move = partial(_move, device=device, non_blocking=non_blocking)
        return replace(self, device=device, intervals=self.intervals and self.intervals.apply(move))

    def pin_memory(self) -> "Layout":
        """With intervals in memory that a GPU reads without waiting."""
        return replace(self, intervals=self.intervals and self.intervals.apply(Tensor.pin_memory))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The stream as plain batches, in order."""
        return self.runs_in(tuple(range(len(self.lengths))))

    def runs_in(self, rows: tuple[int, ...]) -> tuple[Run, ...]:
        """The same where the samples stand in these rows of a cache: those of a batch are of one length, in
        neighbouring rows.
        """
        kinds = [
            (length, row - sample, self.past_slots.get(sample))
            for sample, (length, row) in enumerate(zip(self.lengths, rows, strict=True))
        ]
        runs, sample, token = [], 0, 0
        for (length, _, past), group in groupby(kinds):
            count = len(list(group))
            samples, tokens = slice(sample, sample + count), slice(token, token + count * length)
            chunks = list(_chunks(self.end[tokens].view(count, length), self.device))
            runs.append(Run(samples, slice(rows[sample], rows[sample] + count), tokens, chunks, past))
            sample, token = samples.stop, tokens.stop
        return tuple(runs)

    @cached_property
    def start(self) -> Int[Tensor, " n"]:
        """The slot where each token's sample starts in the stream."""
        lengths = torch.tensor(self.lengths, device="cpu")
        return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def visible(start: Int[Tensor, " n"], end: Int[Tensor, " n"]) -> Callable[..., Tensor]:
    """Token q sees keys `start[q] <= k < end[q]`: its sample up to the end of its span, or up to itself."""
    # A lambda, because flex attention counts arguments and the type checker hides those of any other function.
    return lambda batch, head, query, key: (key >= start[query]) & (key < end[query])


def _move(tensor: Tensor, *, device: torch.device | str, non_blocking: bool = True) -> Tensor:
    return tensor.to(device, non_blocking=non_blocking)


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Where `cuda` is any of them."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def _chunks(end: Int[Tensor, "g t"], device: torch.device | str) -> Iterator[Chunk]:
    length = end.shape[1]
    if torch.equal(end, torch.arange(1, length + 1, device="cpu").expand_as(end)):  # which leaves no room for a past
        yield Chunk(slice(0, length), length, True, None)
        return
    if (end == end[:1]).all():
        end = end[:1]  # one mask serves all samples of the run
    size = QUERY_CHUNK if length > LONG_ROW else length
    for start, stop in _edges(length, size):
        part = end[:, start:stop]
        num_keys = int(part.max())
        mask = None if int(part.min()) == num_keys else torch.arange(num_keys, device="cpu") < part[:, None, :, None]
        yield Chunk(slice(start, stop), num_keys, False, None if mask is None else mask.to(device, non_blocking=True))


def _edges(length: int, size: int) -> Iterator[tuple[int, int]]:
    edges = [0, *accumulate([size] * (length // size))]
    edges += [length] if edges[-1] < length else []
    return pairwise(edges)
