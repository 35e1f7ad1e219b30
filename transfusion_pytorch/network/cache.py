"""The KV cache: keys and values of tokens that were read, preallocated and written in place.

A cache is made of blocks, one per capacity of 64, 128, 256, ... slots. A row lies in the smallest block that holds it
and moves to the next when it outgrows it, so one long row does not make the short ones larger. The rows of a block
have no gaps: where one is released, the last one takes its place.

g rows, h key/value heads, s slots, e channels of a head. `cache_views.py` has what attention sees of it.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

Copies = Sequence[tuple[Tensor, Tensor]]  # views: where to, and where from

SMALLEST = 64  # slots
GROWTH = 4096  # tokens by which a block grows at most, and so what it reserves in vain
_VERSIONS = count()


@dataclass(eq=False)
class CacheRow:
    """Where one sequence is stored: row `index` of a `block`, with `length` committed slots."""

    block: "CacheBlock"
    index: int
    length: int = 0


@dataclass(eq=False)
class CacheBlock:
    """All rows of one capacity: keys and values of every layer, `(g, h, s, e)` each.

    - `rows`: those in use, by index; the tensors may have room for more
    - `written`: how many slots of each index may hold anything, committed or not
    - `version`: changes whenever a row moves or a tensor is replaced; no two blocks ever have the same
    """

    capacity: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rows: list[CacheRow] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    version: int = field(default_factory=lambda: next(_VERSIONS))

    @property
    def room(self) -> int:
        """The number of rows that there is memory for."""
        return self.keys[0].shape[0] if self.keys else 0

    def tensors(self) -> Iterable[Tensor]:
        return (*self.keys, *self.values)

    def clear(self, index: int, start: int = 0) -> None:
        """Zeros what was written from `start` on. A masked slot has weight 0, but 0 times NaN is NaN."""
        if self.written[index] > start:
            for tensor in self.tensors():
                tensor[index, :, start : self.written[index]] = 0
            self.written[index] = start

    def exchange(self, one: int, other: int) -> None:
        """Notes that two rows have changed places."""
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        self.written[one], self.written[other] = self.written[other], self.written[one]
        self.rows[one].index, self.rows[other].index = one, other
        self.version = next(_VERSIONS)


class CacheBroken(RuntimeError):
    """An operation on the device failed while rows were exchanged or moved: nothing in the cache can be relied on."""


class KVCache:
    """The blocks of a cache, whose rows are taken with `acquire` and given back with `release`.

    Writes are tentative: they go behind the committed prefix of their row, and the next write replaces them. Only
    `commit` moves the prefix, so the evaluations of an ODE solver leave no trace.

    Memory is allocated before anything changes: every row is moved, copied or given back as a whole, or is as it was.
    Two failures leave a cache that `is_broken`, whose further use raises `CacheBroken`:

    - an interruption (Ctrl-C), which may come at any moment, inside of `unbroken`
    - an operation on the device that fails while it overwrites the only copy of a row

    `phases` are the rotary phases of the first positions, `(p, f, 2)`, once decode steps have asked for them.
    """

    def __init__(self, *, layers: int, kv_heads: int, dim_head: int, device: torch.device, dtype: torch.dtype):
        self.layers, self.kv_heads, self.dim_head = layers, kv_heads, dim_head
        self.device, self.dtype = device, dtype
        self.blocks: dict[int, CacheBlock] = {}
        self.phases: Tensor | None = None
        self.is_broken = False

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Around changes that only make sense as a whole."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.is_broken = True
            raise

    @contextmanager
    def _overwriting(self) -> Iterator[None]:
        """Around operations that overwrite the only copy of a row: where one fails, the cache is broken."""
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise

    def _check(self) -> None:
        if self.is_broken:
            raise CacheBroken("the KV cache is broken, because an operation failed while rows were moved")

    @property
    def rows(self) -> list[CacheRow]:
        """All rows in use. Another thread may ask."""
        return [row for block in tuple(self.blocks.values()) for row in block.rows]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes."""
        return 2 * self.layers * self.kv_heads * self.dim_head * self.dtype.itemsize

    @property
    def reserved_tokens(self) -> int:
        """Tokens for which memory is allocated."""
        return sum(block.room * block.capacity for block in tuple(self.blocks.values()))

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
        self._check()
        with self._room_in(self.capacity_for(length)) as block:
            row = CacheRow(block, len(block.rows))
            block.clear(row.index)
            block.rows.append(row)
        return row

    def stamp(self, rows: Sequence[CacheRow]) -> Hashable:
        """Stays the same while none of these rows moves. Views are void once it has changed."""
        if self.is_broken:
            return object()  # is equal to nothing
        return tuple(sorted({row.block.version for row in rows}))

    def release(self, row: CacheRow) -> None:
        """Gives a row back; the last one of its block takes its place."""
        self._check()
        self._close_gap(row.block, row.index, self._filling_of_gap(row))
        if not self.blocks:
            self.phases = None

    def reserve(self, rows: Sequence[CacheRow], lengths: Sequence[int]) -> None:
        """Makes room for `lengths[i]` tokens behind the prefix of `rows[i]`."""
        self._check()
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
        for copies in [_copies_of(source, row.block, row.index, length) for row in rows]:
            _run(copies)
        for row in rows:
            row.length = length

    def gather(self, rows: Sequence[CacheRow], *, at_end: bool = False) -> None:
        """Moves these rows next to each other: to the front of their blocks, or to their end."""
        self._check()
        by_block: dict[int, list[CacheRow]] = {}
        for row in rows:
            by_block.setdefault(row.block.capacity, []).append(row)
        for capacity, members in by_block.items():
            block, size = self.blocks[capacity], len(members)
            start = len(block.rows) - size if at_end else 0
            inside = set(range(start, start + size))
            free = sorted(inside - {row.index for row in members})
            for row, index in zip([row for row in members if row.index not in inside], free, strict=True):
                self._exchange(block, row.index, index)

    def _exchange(self, block: CacheBlock, one: int, other: int) -> None:
        """Exchanges two rows. Whatever needs memory comes first: where that fails, both are as they were."""
        most = max(block.written[one], block.written[other])
        pairs = [(tensor[one, :, :most], tensor[other, :, :most]) for tensor in block.tensors()]
        kept = torch.empty_like(pairs[0][0])
        with self._overwriting():
            for mine, theirs in pairs:
                kept.copy_(mine)
                mine.copy_(theirs)
                theirs.copy_(kept)
            block.exchange(one, other)

    @contextmanager
    def _room_in(self, capacity: int) -> Iterator[CacheBlock]:
        """The block of a capacity, with memory for one row more. Where what is done with it fails, a new block goes."""
        block = self.blocks.get(capacity) or CacheBlock(capacity)
        if len(block.rows) == block.room:
            more = max(1, min(block.room, GROWTH // capacity))  # twice as many, but of long rows one at a time
            self._resize(block, block.room + more)
        self.blocks[capacity] = block
        self.blocks = dict(sorted(self.blocks.items()))
        try:
            yield block
        finally:
            if not block.rows:
                self._shrink(block)

    def _resize(self, block: CacheBlock, room: int) -> None:
        """Reallocates a block. Copies only what was written: on a CPU, untouched memory costs nothing."""
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
        """Moves a row to a block of a larger capacity."""
        source, gap = row.block, row.index
        with self._room_in(capacity) as target:
            index = len(target.rows)
            copies, filling = _copies_of(row, target, index, row.length), self._filling_of_gap(row)
            self._fill(target, index, row.length, copies)
            with self._overwriting():
                target.rows.append(row)
                row.block, row.index = target, index
                source.version = next(_VERSIONS)
                self._close_gap(source, gap, filling)

    @staticmethod
    def _filling_of_gap(row: CacheRow) -> Copies:
        """What puts the last row of its block in the place of this one."""
        last = row.block.rows[-1]
        return [] if last is row else _copies_of(last, row.block, row.index, last.length)

    def _close_gap(self, block: CacheBlock, index: int, filling: Copies) -> None:
        last = block.rows[-1]
        if index != len(block.rows) - 1:
            self._fill(block, index, last.length, filling)
            block.rows[index], last.index = last, index
            block.version = next(_VERSIONS)
        block.rows.pop()
        self._shrink(block)

    @staticmethod
    def _fill(block: CacheBlock, index: int, length: int, copies: Copies) -> None:
        """Copies the committed tokens of a row, `length` of them, to a place whose contents nobody needs."""
        block.written[index] = max(block.written[index], length)
        _run(copies)
        block.clear(index, length)

    def _shrink(self, block: CacheBlock) -> None:
        """Frees memory that is no longer needed: all of an empty block, half of one that is used by a quarter."""
        if not block.rows:
            del self.blocks[block.capacity]
        elif 4 * len(block.rows) <= block.room:
            with suppress(Exception):  # no memory for the smaller copy now: the larger one stays
                self._resize(block, block.room // 2)


def _copies_of(row: CacheRow, block: CacheBlock, index: int, length: int) -> Copies:
    """What copies the first `length` tokens of a row to another place. They are prepared before anything changes."""
    tensors = zip(block.tensors(), row.block.tensors(), strict=True)
    return [(new[index, :, :length], old[row.index, :, :length]) for new, old in tensors]


def _run(copies: Copies) -> None:
    for new, old in copies:
        new.copy_(old)
