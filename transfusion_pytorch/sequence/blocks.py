"""Block tables of flex attention for a packed stream, in closed form.

Flex attention takes a mask as tables of blocks. `create_block_mask` finds them by evaluating the whole n x n mask (10
bytes per entry: 10 GiB for 32,768 tokens). The mask of a packed stream is one interval of keys per query, and both
bounds of the interval grow along the stream, so that every row of the block mask is an interval of blocks too.

n tokens of one stream, which are its queries and its keys; q_blocks blocks of queries, kv_blocks blocks of keys (the
same number, two names because the tables are not symmetric).
"""

from typing import NamedTuple

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

BLOCK = 128  # tokens of a block: the default of flex attention, and what its kernels are tuned for


class BlockTables(NamedTuple):
    """The tensors of a `BlockMask` without batch and heads, in the order of its constructor.

    A block of keys is full for a block of queries if every query sees every key of it, partial if some query sees some
    key of it. Row i of `*_indices` lists, in ascending order, the blocks that belong to block i; `*_num_blocks[i]`
    says how many entries are valid. The entries after them are valid block numbers without a meaning, because kernels
    may prefetch them.
    """

    # for each block of queries: blocks of keys, which the forward pass and dQ iterate over
    kv_num_blocks: Int32[Tensor, " q_blocks"]  # partial
    kv_indices: Int32[Tensor, "q_blocks kv_blocks"]
    full_kv_num_blocks: Int32[Tensor, " q_blocks"]
    full_kv_indices: Int32[Tensor, "q_blocks kv_blocks"]

    # for each block of keys: blocks of queries, which dK and dV iterate over
    q_num_blocks: Int32[Tensor, " kv_blocks"]  # partial
    q_indices: Int32[Tensor, "kv_blocks q_blocks"]
    full_q_num_blocks: Int32[Tensor, " kv_blocks"]
    full_q_indices: Int32[Tensor, "kv_blocks q_blocks"]


class BlockRanges(NamedTuple):
    """For each row, the blocks `start <= block < stop`. Both bounds are in ascending order over the rows."""

    start: Int32[Tensor, " rows"]
    stop: Int32[Tensor, " rows"]

    @property
    def count(self) -> Int32[Tensor, " rows"]:
        return self.stop - self.start

    def transposed(self) -> "BlockRanges":
        """For each block, the rows whose range contains it: rows [0, 2) and [1, 2) -> blocks [0, 1) and [0, 2).

        Row r contains block b if start[r] <= b < stop[r]. The first holds for the rows before a limit and the second
        from a limit on, because the bounds are sorted.
        """
        block = torch.arange(len(self.start), dtype=torch.int32)
        first, last = (
            torch.searchsorted(bound, block, right=True, out_int32=True) for bound in (self.stop, self.start)
        )
        return BlockRanges(first, last)


def block_tables(start: Int64[Tensor, " n"], end: Int64[Tensor, " n"], block: int = BLOCK) -> BlockTables:
    """The block tables of a stream in which query q sees exactly the keys `start[q] <= k < end[q]`, on the CPU.

    Every query must see itself, and both bounds must be in ascending order, as they are in a packed stream: samples
    follow each other, and so do the spans of a sample. Padding sees itself: start = q, end = q + 1.
    """
    _check_bounds(start, end)
    partial_or_full, full = _ranges(start, end, block)
    return BlockTables(*_rows(partial_or_full, full), *_rows(partial_or_full.transposed(), full.transposed()))


def block_tables_with_past(
    start: Int64[Tensor, " n"],
    end: Int64[Tensor, " n"],
    past: tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]],
    block: int = BLOCK,
) -> BlockTables:
    """The same where query q also sees the keys `past[0][q] <= k < past[1][q]`, on the CPU.

    By counting, for each pair of blocks, the queries that see some keys and those that see all: the blocks that a row
    sees are no interval here. An empty past is from 0 to 0. Between both intervals of a query there must be a key that
    is in neither, so that it sees a whole block by one of them or not at all.
    """
    blocks, row = -(-len(start) // block), (torch.arange(len(start)) // block).repeat(2)
    start, end = torch.cat((start, past[0])), torch.cat((end, past[1]))
    full_start = _ceil(start, block)
    seen = _count(row, _floor(start, block), _ceil(end, block), blocks) > 0
    full = _count(row, full_start, torch.maximum(full_start, _floor(end, block)), blocks) == block
    partial = seen & ~full
    return BlockTables(*_listed(partial), *_listed(full), *_listed(partial.T), *_listed(full.T))


def _count(row: Tensor, start: Tensor, stop: Tensor, blocks: int) -> Tensor:
    """How often each block of each row is in `start <= block < stop`: rows 0 0 with [0, 2) [1, 2) -> 1 2 in row 0."""
    change = torch.zeros(blocks, blocks + 1, dtype=torch.int32)
    one = torch.ones(len(row), dtype=torch.int32)
    change.index_put_((row, start.long()), one, accumulate=True)
    change.index_put_((row, stop.long()), -one, accumulate=True)
    return change.cumsum(1)[:, :blocks]


def _listed(is_in: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, how many blocks are in it, and which, in ascending order; zeros behind them."""
    row, block = is_in.nonzero().unbind(1)
    rank = is_in.cumsum(1)[row, block] - 1
    indices = torch.zeros(is_in.shape, dtype=torch.int32).index_put_((row, rank), block.int())
    return is_in.sum(1, dtype=torch.int32), indices


def _check_bounds(start: Tensor, end: Tensor) -> None:
    slot = torch.arange(len(start))
    if not ((start <= slot) & (slot < end)).all():
        raise ValueError("expected start[q] <= q < end[q]: every query sees itself, padding start = q and end = q + 1")
    for name, bound in (("start", start), ("end", end)):
        if (bound[1:] < bound[:-1]).any():
            raise ValueError(f"expected `{name}` in ascending order: samples, and spans in them, follow each other")
    if len(end) and end[-1] > len(end):
        raise ValueError(f"expected end <= {len(end)}, the length of the stream, got {int(end[-1])}")


def _ranges(start: Tensor, end: Tensor, block: int) -> tuple[BlockRanges, BlockRanges]:
    """For each block of queries, the blocks of keys that it sees at all, and those that it sees as a whole.

    The queries of a block see, together, the keys from their least `start` to their greatest `end`, without a hole:
    the intervals of neighbours q and q + 1 contain the slots q and q + 1, so that they overlap or touch. Each query
    sees what lies between the greatest `start` and the least `end`. Blocks of 4, samples of 6 and 2 tokens of text:

        queries 4..7    start 0 0 6 6    end 5 6 7 8    seen: 0..7, blocks [0, 2)    seen by all: none
    """
    n = len(start)
    first = torch.arange(0, n, block)
    last = (first + block - 1).clamp(max=n - 1)
    seen = BlockRanges(_floor(start[first], block), _ceil(end[last], block))
    full_start, full_stop = _ceil(start[last], block), _floor(end[first], block)
    full_stop = torch.maximum(full_start, full_stop)  # an empty range has one bound
    if n % block:
        # Flex attention fills the last block up with queries that see nothing, so it has no full blocks. It is the
        # lower bound that moves: it stays in ascending order.
        full_start[-1] = full_stop[-1]
    return seen, BlockRanges(full_start, full_stop)


def _floor(slots: Tensor, block: int) -> Tensor:
    return slots.div(block, rounding_mode="floor").int()


def _ceil(slots: Tensor, block: int) -> Tensor:
    return _floor(slots + block - 1, block)


def _rows(seen: BlockRanges, full: BlockRanges) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers and indices of the partial blocks, then of the full ones.

    The full blocks are a range inside the seen ones, so the partial ones are what is left on both sides of it:
    seen [2, 8) and full [4, 7) -> partial 2 3 7. Where no block is full, nothing is skipped.
    """
    blocks = len(seen.start)
    entry = torch.arange(blocks, dtype=torch.int32)
    before = (full.start - seen.start)[:, None]  # partial blocks on the left
    left, right = seen.start[:, None], (seen.start + full.count)[:, None]
    partial_indices = torch.where(entry < before, left, right).add_(entry).clamp_(max=blocks - 1)
    full_indices = (full.start[:, None] + entry).clamp_(max=blocks - 1)
    return seen.count - full.count, partial_indices, full.count, full_indices
