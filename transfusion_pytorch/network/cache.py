"""Keys and values of tokens that were read already, preallocated and written in place.

A cache is made of blocks, one per capacity of 64, 128, 256, ... slots. A row lies in the smallest block that holds it
and moves to the next when it outgrows it, so one long row does not make the short ones larger. The rows of a block
have no gaps: where one is released, the last one takes its place.

g rows, h key/value heads, s slots, e channels of a head, t new tokens of a row, r rows of all blocks.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.sequence.masks import Chunk, Layout

SMALLEST = 64  # slots
_VERSIONS = count()


@dataclass(eq=False)
class CacheRow:
    """Where one sequence lies: row `index` of a `block`, of which `length` slots are committed."""

    block: "CacheBlock"
    index: int
    length: int = 0


@dataclass(eq=False)
class CacheBlock:
    """All rows of one capacity: keys and values of every layer, `(g, h, s, e)` each.

    - `rows`: those in use, by index; the tensors may have room for more
    - `written`: how many slots of each index may hold anything, committed or not
    - `version`: a number that no block had before, whenever a row moves or a tensor is replaced
    """

    capacity: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rows: list[CacheRow] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    version: int = field(default_factory=lambda: next(_VERSIONS))

    @property
    def room(self) -> int:
        """For how many rows there is memory."""
        return self.keys[0].shape[0] if self.keys else 0

    def tensors(self) -> Iterable[Tensor]:
        return (*self.keys, *self.values)

    def clear(self, index: int, start: int = 0) -> None:
        """Zeros what was written from `start` on. A masked slot weighs nothing, but nothing times NaN is NaN."""
        if self.written[index] > start:
            for tensor in self.tensors():
                tensor[index, :, start : self.written[index]] = 0
            self.written[index] = start

    def swap(self, one: int, other: int) -> None:
        """Exchanges two rows."""
        most = max(self.written[one], self.written[other])
        index = torch.tensor([one, other], device=self.keys[0].device)
        for tensor in self.tensors():
            tensor[index, :, :most] = tensor[index.flip(0), :, :most]
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        self.written[one], self.written[other] = self.written[other], self.written[one]
        self.rows[one].index, self.rows[other].index = one, other
        self.version = next(_VERSIONS)


class KVCache:
    """The blocks of a cache, whose rows are taken with `acquire` and given back with `release`.

    Writes are tentative: they go behind the committed prefix of their row, and the next write replaces them. Only
    `commit` moves the prefix, so the evaluations of an ODE solver leave no trace.

    Memory is allocated before anything else changes: where that fails, the cache is as it was.
    """

    def __init__(self, *, layers: int, kv_heads: int, dim_head: int, device: torch.device, dtype: torch.dtype):
        self.layers, self.kv_heads, self.dim_head = layers, kv_heads, dim_head
        self.device, self.dtype = device, dtype
        self.blocks: dict[int, CacheBlock] = {}

    @property
    def rows(self) -> list[CacheRow]:
        """All rows in use."""
        return [row for block in self.blocks.values() for row in block.rows]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes."""
        return 2 * self.layers * self.kv_heads * self.dim_head * self.dtype.itemsize

    @property
    def reserved_tokens(self) -> int:
        """Tokens for which memory is allocated."""
        return sum(block.room * block.capacity for block in self.blocks.values())

    @property
    def used_tokens(self) -> int:
        """Tokens that are committed."""
        return sum(row.length for row in self.rows)

    @staticmethod
    def capacity_for(length: int) -> int:
        """The slots of the smallest block that holds so many tokens."""
        return max(SMALLEST, 1 << (length - 1).bit_length()) if length > 1 else SMALLEST

    def acquire(self, length: int = 0) -> CacheRow:
        """An empty row with room for `length` tokens. It grows when more is written."""
        block = self._block_with_room(self.capacity_for(length))
        row = CacheRow(block, len(block.rows))
        block.clear(row.index)
        block.rows.append(row)
        return row

    def stamp(self, rows: Sequence[CacheRow]) -> Hashable:
        """Stays the same as long as none of these rows has moved: a view is void once it has changed."""
        return tuple(sorted({row.block.version for row in rows}))

    def release(self, row: CacheRow) -> None:
        """Gives a row back; the last one of its block takes its place."""
        block, last = row.block, len(row.block.rows) - 1
        if row.index != last:
            self._copy_row(block.rows[last], block, row.index)
            block.version = next(_VERSIONS)
        block.rows.pop()
        self._shrink(block)

    def reset(self) -> None:
        """Frees all memory. Rows that were acquired are void."""
        self.blocks = {}

    def set_dtype(self, dtype: torch.dtype) -> None:
        """From now on keys and values are stored in this type."""
        if dtype == self.dtype:
            return
        converted = [
            ([tensor.to(dtype) for tensor in block.keys], [tensor.to(dtype) for tensor in block.values])
            for block in self.blocks.values()
        ]
        for block, (keys, values) in zip(self.blocks.values(), converted, strict=True):
            block.keys, block.values = keys, values
            block.version = next(_VERSIONS)
        self.dtype = dtype

    def reserve(self, rows: Sequence[CacheRow], lengths: Sequence[int]) -> None:
        """Makes room for `lengths[i]` tokens behind the prefix of `rows[i]`."""
        for row, length in zip(rows, lengths, strict=True):
            end = row.length + length
            if end > row.block.capacity:
                self._move(row, self.capacity_for(end))
        for row, length in zip(rows, lengths, strict=True):
            row.block.written[row.index] = max(row.block.written[row.index], row.length + length)

    def commit(self, rows: Sequence[CacheRow], lengths: Sequence[int]) -> None:
        """Makes the last write permanent: `lengths[i]` tokens more in `rows[i]`."""
        for row, length in zip(rows, lengths, strict=True):
            row.length += length

    def copy(self, source: CacheRow, rows: Sequence[CacheRow], length: int) -> None:
        """Gives each of `rows`, which are empty, the first `length` tokens of `source`."""
        self.reserve(rows, [length] * len(rows))
        for row in rows:
            for tensors in ("keys", "values"):
                for mine, theirs in zip(getattr(row.block, tensors), getattr(source.block, tensors), strict=True):
                    mine[row.index, :, :length] = theirs[source.index, :, :length]
            row.length = length

    def view(self, rows: Sequence[CacheRow], layout: Layout) -> "CacheView":
        """These rows as a forward pass over a stream sees them."""
        return CacheView(self, rows, layout)

    def decode_view(self, rows: Sequence[CacheRow], lengths: Int[Tensor, " r"] | None = None) -> "DecodeView":
        """These rows as a decode step sees them."""
        return DecodeView(self, rows, lengths)

    def gather(self, rows: Sequence[CacheRow], *, at_end: bool = False) -> None:
        """Moves these rows next to each other: to the front of their blocks, or to their end."""
        by_block: dict[int, list[CacheRow]] = {}
        for row in rows:
            by_block.setdefault(row.block.capacity, []).append(row)
        for capacity, members in by_block.items():
            block, size = self.blocks[capacity], len(members)
            start = len(block.rows) - size if at_end else 0
            inside = set(range(start, start + size))
            free = sorted(inside - {row.index for row in members})
            for row, index in zip([row for row in members if row.index not in inside], free, strict=True):
                block.swap(row.index, index)

    def _block_with_room(self, capacity: int) -> CacheBlock:
        """The block of a capacity, with memory for one row more."""
        block = self.blocks.get(capacity) or CacheBlock(capacity)
        if len(block.rows) == block.room:
            self._resize(block, max(1, 2 * block.room))
        self.blocks[capacity] = block
        self.blocks = dict(sorted(self.blocks.items()))
        return block

    def _resize(self, block: CacheBlock, room: int) -> None:
        """Copies what was written only: on a CPU, memory that was never touched costs nothing."""
        shape, count = (room, self.kv_heads, block.capacity, self.dim_head), len(block.rows)
        used = max(block.written[:count], default=0)
        made = [
            torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(2 * self.layers)
        ]  # all, or an error and nothing has changed
        for new, old in zip(made, block.tensors(), strict=False):
            new[:count, :, :used] = old[:count, :, :used]
        block.keys, block.values = made[: self.layers], made[self.layers :]
        block.written = block.written[:count] + [0] * (room - count)
        block.version = next(_VERSIONS)

    def _move(self, row: CacheRow, capacity: int) -> None:
        """To a block of a larger capacity."""
        target = self._block_with_room(capacity)
        old = CacheRow(row.block, row.index, row.length)
        old.block.rows[old.index] = old
        index = len(target.rows)
        target.clear(index)
        target.rows.append(row)
        self._copy_row(row, target, index)
        self.release(old)

    def _copy_row(self, row: CacheRow, block: CacheBlock, index: int) -> None:
        """Gives the committed tokens of a row another place."""
        source, start = row.block, row.index
        for tensors in ("keys", "values"):
            for new, old in zip(getattr(block, tensors), getattr(source, tensors), strict=True):
                new[index, :, : row.length] = old[start, :, : row.length]
        block.rows[index] = row
        row.block, row.index = block, index
        block.clear(index, row.length)
        block.written[index] = max(block.written[index], row.length)

    def _shrink(self, block: CacheBlock) -> None:
        """Frees memory that is no longer needed: all of an empty block, half of one that is used by a quarter."""
        if not block.rows:
            del self.blocks[block.capacity]
        elif 4 * len(block.rows) <= block.room:
            try:
                self._resize(block, block.room // 2)
            except (RuntimeError, MemoryError):
                pass  # there is no memory for the smaller copy just now: the larger one goes on


class CacheRun(NamedTuple):
    """Neighbouring rows of a block that get the same number of new tokens.

    - `tokens`: their slots in the stream; `rows`: their rows in the block
    - `slots`: `(g, 1)` row and `(g, t)` slot of every new token, or a slice where all rows write to the same slots
    """

    block: CacheBlock
    rows: slice
    tokens: slice
    slots: slice | tuple[Int[Tensor, "g 1"], Int[Tensor, "g t"]]
    chunks: Sequence[Chunk]

    @property
    def num_keys(self) -> int:
        return max(chunk.num_keys for chunk in self.chunks)

    def batched(self, part: Shaped[Tensor, "n h e"]) -> Shaped[Tensor, "g h t e"]:
        return part[self.tokens].unflatten(0, (self.rows.stop - self.rows.start, -1)).transpose(1, 2)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Shaped[Tensor, "g h k e"], Shaped[Tensor, "g h k e"]]:
        """Writes new keys and values `(g, h, t, e)`. Returns views of all that its queries may see."""
        return self._update(self.block.keys[layer], k), self._update(self.block.values[layer], v)

    def _update(self, stored: Tensor, new: Tensor) -> Tensor:
        if isinstance(self.slots, slice):
            stored[self.rows, :, self.slots] = new
        else:
            row_of, slot_of = self.slots
            stored[row_of, :, slot_of] = new.transpose(1, 2).to(stored.dtype)
        return stored[self.rows, :, : self.num_keys]


class CacheView:
    """The rows that take part in one forward pass over a stream: sample i of the `layout` continues `rows[i]`."""

    def __init__(self, cache: KVCache, rows: Sequence[CacheRow], layout: Layout):
        cache.reserve(rows, layout.lengths)
        numbers = tuple(row.block.capacity << 32 | row.index for row in rows)  # no neighbours in different blocks
        self.runs: list[CacheRun] = []
        for run in layout.runs_in(numbers):
            members = rows[run.samples]
            first = members[0]
            span = slice(first.index, first.index + len(members))
            slots = _slots(members, layout.lengths[run.samples.start], cache.device)
            self.runs.append(CacheRun(first.block, span, run.tokens, slots, run.chunks))


def _slots(rows: Sequence[CacheRow], length: int, device: torch.device) -> slice | tuple[Tensor, Tensor]:
    """Where `length` new tokens of each of these rows go."""
    past = [row.length for row in rows]
    if len(set(past)) == 1:
        return slice(past[0], past[0] + length)
    row_of = torch.tensor([row.index for row in rows], device="cpu")[:, None]
    slot_of = torch.tensor(past, device="cpu")[:, None] + torch.arange(length, device="cpu")
    return row_of.to(device, non_blocking=True), slot_of.to(device, non_blocking=True)


class DecodeRun(NamedTuple):
    """The first `count` rows of a block, each of which gets one token.

    - `tokens`: their slots in the stream
    - `slots`: where their keys and values go in the block, heads and rows flattened
    - `num_keys`: how many keys are attended to; `bias` is `-inf` where a row has fewer, None if all have as many
    """

    block: CacheBlock
    count: int
    tokens: slice
    slots: Int[Tensor, " g_h"]
    num_keys: int
    bias: Float[Tensor, "g 1 1 k"] | None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Shaped[Tensor, "g h k e"], Shaped[Tensor, "g h k e"]]:
        """Writes new keys and values `(g, h, e)`. Returns views of all that may be seen."""
        return self._update(self.block.keys[layer], k), self._update(self.block.values[layer], v)

    def _update(self, stored: Tensor, new: Tensor) -> Tensor:
        new = new.reshape(-1, stored.shape[-1]).to(stored.dtype)
        stored.view(-1, stored.shape[-1]).index_copy_(0, self.slots, new)
        return stored[: self.count, :, : self.num_keys]


class DecodeView:
    """The rows of a decode step, which get one token each.

    `rows` stand at the front of their blocks, in order. With `lengths` `(r,)` on the device nothing but those depends on
    what was written so far: all slots are attended to behind a mask, and one graph serves every step. Without, the
    host's lengths cut off what no row needs.
    """

    def __init__(self, cache: KVCache, rows: Sequence[CacheRow], lengths: Int[Tensor, " r"] | None = None):
        cache.reserve(rows, [1] * len(rows))
        self.runs: list[DecodeRun] = []
        start = 0
        while start < len(rows):
            block = rows[start].block
            members = [row for row in rows[start:] if row.block is block]
            assert [row.index for row in members] == list(range(len(members))), "rows to decode are gathered first"
            tokens = slice(start, start + len(members))
            self.runs.append(_decode_run(cache, block, members, tokens, None if lengths is None else lengths[tokens]))
            start = tokens.stop


def _decode_run(
    cache: KVCache, block: CacheBlock, rows: Sequence[CacheRow], tokens: slice, lengths: Tensor | None
) -> DecodeRun:
    count, past = len(rows), [row.length for row in rows]
    first = torch.arange(count * cache.kv_heads, device=cache.device) * block.capacity
    if lengths is None:
        num_keys = max(past) + 1
        at = torch.tensor(past, device="cpu").to(cache.device, non_blocking=True)
        bias = None if len(set(past)) == 1 else _bias(at, num_keys, cache.dtype)
    else:
        num_keys, at = block.capacity, lengths
        bias = _bias(at, num_keys, cache.dtype)
    return DecodeRun(block, count, tokens, first + at.repeat_interleave(cache.kv_heads), num_keys, bias)


def _bias(length: Int[Tensor, " g"], num_keys: int, dtype: torch.dtype) -> Float[Tensor, "g 1 1 k"]:
    """0 for the keys of a row up to its new token, -inf behind."""
    seen: Bool[Tensor, "g k"] = torch.arange(num_keys, device=length.device) <= length[:, None]
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None, None]
