"""Block tables in closed form, against those that flex attention makes from the whole mask."""

from math import ceil

import pytest
import torch
from checks import compiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_pytorch.sequence.blocks import BLOCK, BlockTables, block_tables
from transfusion_pytorch.sequence.masks import visible

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=150)
SIZES = st.just([1]) | st.lists(st.integers(1, 40), min_size=1, max_size=4) | st.integers(1, 60).map(lambda n: [1] * n)

# Samples as sizes of spans, a text token being of size 1, and then the number of padding tokens.
STREAMS = {
    "one token": ([[1]], 0),
    "less than a block": ([[1] * 40, [60]], 0),
    "a block of text": ([[1] * 128], 0),
    "a block and a token": ([[1] * 129], 0),
    "one span": ([[5 * 128]], 0),
    "one long sample": ([[1] * 1000 + [256] * 10 + [1] * 1440], 0),  # 5,000 tokens
    "spans across edges": ([[1] * 100 + [200] + [1] * 80 + [3], [127, 2, 300, 1]], 0),
    "spans on edges": ([[128, 256, 1], [127], [256]], 0),
    "samples of one token": ([[1]] * 300, 0),
    "many samples": ([[1] * (i % 7) + [i] for i in range(1, 60)], 0),
    "a sample per block": ([[64, 64]] * 5, 0),
    "padding": ([[1] * 90 + [300], [1, 20, 1]], 612),
    "padding alone": ([], 256),
}


def bounds(samples, padding=0):
    """The keys of each token: samples [1 2] and [1], a padding token -> start 0 0 0 3 4, end 1 3 3 4 5."""
    start, end = [], []
    for sizes in [*samples, *[[1]] * padding]:
        first = len(start)
        for size in sizes:
            end += [len(end) + size] * size
        start += [first] * sum(sizes)
    return torch.tensor(start), torch.tensor(end)


def block_mask(tables, start, end, block=BLOCK):
    """The tables with a batch and heads of 1, as flex attention takes them."""
    lengths = (len(start), len(start))
    return BlockMask(lengths, *(table[None, None] for table in tables), (block, block), visible(start, end))


def tables_of(mask):
    return BlockTables(*(getattr(mask, name)[0, 0] for name in BlockTables._fields))


def listed(tables):
    """What the tables say: for each of the four, and each row of it, the blocks that count."""
    return [
        [row[:count] for row, count in zip(indices.tolist(), counts.tolist(), strict=True)]
        for counts, indices in zip(tables[::2], tables[1::2], strict=True)
    ]


def check(start, end, block):
    n = len(start)
    made = block_tables(start, end, block)
    expected = create_block_mask(visible(start, end), None, None, n, n, device="cpu", BLOCK_SIZE=block)
    assert listed(made) == listed(tables_of(expected))
    assert torch.equal(block_mask(made, start, end, block).to_dense(), expected.to_dense())
    transposed = BlockMask.from_kv_blocks(*(table[None, None] for table in made[:4]), BLOCK_SIZE=block)
    assert listed(made) == listed(tables_of(transposed))
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in made)
    assert all(((indices >= 0) & (indices < ceil(n / block))).all() for indices in made[1::2])  # unused entries too


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *found])
        return out


def test_the_documented_examples():
    start, end = bounds([[1, 2], [1]], padding=1)
    assert (start.tolist(), end.tolist()) == ([0, 0, 0, 3, 4], [1, 3, 3, 4, 5])
    partial, full, partial_transposed, full_transposed = listed(block_tables(*bounds([[1] * 6, [1] * 2]), block=4))
    assert (partial, full) == ([[0], [0, 1]], [[], []])
    assert (partial_transposed, full_transposed) == ([[0, 1], [1]], [[], []])
    partial, full, *_ = listed(block_tables(*bounds([[1], [1] * 9 + [20], [1]]), block=4))
    assert partial[4] == [0, 7]  # queries 16..19 see the keys 1..29: blocks 1 to 6 as a whole
    assert full[4] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_tables_are_those_of_the_whole_mask(stream):
    check(*bounds(*stream), BLOCK)


@QUICK
@given(samples=st.lists(SIZES, min_size=1, max_size=6), padding=st.integers(0, 30), block=st.integers(1, 20))
def test_tables_of_any_stream_in_blocks_of_any_size(samples, padding, block):
    check(*bounds(samples, padding), block)


@QUICK
@given(samples=st.lists(SIZES, min_size=1, max_size=6), padding=st.integers(0, 30), block=st.integers(1, 20))
def test_blocks_with_the_mask_in_partial_ones_are_the_mask(samples, padding, block):
    """What a kernel computes: it evaluates the mask in partial blocks only, for queries and again for keys."""
    start, end = bounds(samples, padding)
    slot = torch.arange(len(start))
    dense = visible(start, end)(None, None, slot[:, None], slot)
    lists = listed(block_tables(start, end, block))
    for by_queries, (partial, full) in ((True, lists[:2]), (False, lists[2:])):
        mask = dense if by_queries else dense.T
        seen = torch.zeros_like(mask)
        for row, (some, whole) in enumerate(zip(partial, full, strict=True)):
            rows = slice(row * block, (row + 1) * block)
            for columns in (slice(i * block, (i + 1) * block) for i in some):
                seen[rows, columns] = mask[rows, columns]
            for columns in (slice(i * block, (i + 1) * block) for i in whole):
                seen[rows, columns] = True
        assert torch.equal(seen, mask)


def test_nothing_is_as_large_as_the_mask():
    n = 256 * BLOCK
    start, end = bounds([[1] * 100 + [5000] + [1] * 100] * 6, padding=n - 6 * 5200)
    with LargestTensor() as ours:
        tables = block_tables(start, end)
    assert ours.numel == tables.kv_indices.numel() == 256**2
    with LargestTensor() as theirs:
        create_block_mask(visible(start, end), None, None, 1000, 1000, device="cpu")
    assert theirs.numel >= 1000**2


def against_sdpa(kernel, name):
    """What flex attention makes of a stream with our tables, and dense attention with the whole mask."""
    start, end = bounds(*STREAMS[name])
    q, k, v = torch.randn(3, 1, 2, len(start), 16)
    slot = torch.arange(len(start))
    dense = visible(start, end)(None, None, slot[:, None], slot)
    flex = kernel(q, k, v, block_mask=block_mask(block_tables(start, end), start, end))
    return flex, scaled_dot_product_attention(q, k, v, attn_mask=dense)


# The eager form runs everywhere; torch warns that it is slow.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["one token", "spans across edges", "many samples", "padding"])
@torch.no_grad()
def test_eager_flex_attention_takes_the_tables(name):
    """It evaluates the mask everywhere, without a look at the tables: this is about how they are handed over."""
    torch.testing.assert_close(*against_sdpa(flex_attention, name), rtol=0, atol=1e-5)


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of the code generator
@torch.no_grad()
def test_compiled_flex_attention_follows_the_tables():
    """The kernel visits the blocks that the tables list, and evaluates the mask in the partial ones only."""
    kernel = torch.compile(flex_attention, dynamic=True)
    for name in ("spans across edges", "many samples", "padding", "one long sample"):
        torch.testing.assert_close(*against_sdpa(kernel, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ([0, 0], [2, 1], r"expected start\[q\] <= q < end\[q\]"),
        ([1, 1], [2, 2], r"expected start\[q\] <= q < end\[q\]"),
        ([0, 1, 0], [1, 2, 3], "expected `start` in ascending order"),
        ([0, 0, 0], [3, 2, 3], "expected `end` in ascending order"),
        ([0, 0], [1, 3], "expected end <= 2, the length of the stream, got 3"),
    ],
)
def test_bounds_that_are_no_packed_stream_are_refused(start, end, message):
    with pytest.raises(ValueError, match=message):
        block_tables(torch.tensor(start), torch.tensor(end))
