"""The cache: reading in parts is reading at once, rows move without a trace, and what is only tried leaves none."""

from itertools import pairwise

import pytest
import torch
from einops import rearrange
from generation_faults import ALLOCATES, OutOfMemory
from network_streams import cuts, naive_attention, projections, stream

from transfusion_pytorch.network.attend import plan_attention
from transfusion_pytorch.network.cache import GROWTH, SMALLEST, CacheBroken, CacheRow, KVCache
from transfusion_pytorch.network.cache_views import KEYS_AT_ONCE, CacheView, DecodeView


def make_cache(*, layers=1, kv_heads=4, dim_head=6, dtype=torch.float64):
    return KVCache(layers=layers, kv_heads=kv_heads, dim_head=dim_head, device=torch.device("cpu"), dtype=dtype)


def acquire(cache, count: int, length: int = 0) -> list[CacheRow]:
    return [cache.acquire(length) for _ in range(count)]


def stored(row: CacheRow) -> list[torch.Tensor]:
    """Everything in the slots of a row: keys and values of every layer."""
    return [tensor[row.index] for tensor in row.block.tensors()]


def committed(row: CacheRow) -> list[torch.Tensor]:
    return [tensor[:, : row.length].clone() for tensor in stored(row)]


def assert_consistent(cache) -> None:
    """Every row lies where it says, blocks have no gaps, and no more memory than four times what the rows take."""
    for capacity, block in cache.blocks.items():
        assert block.capacity == capacity == 1 << (capacity.bit_length() - 1) >= SMALLEST
        assert [row.index for row in block.rows] == list(range(len(block.rows)))
        assert all(row.block is block and row.length <= capacity for row in block.rows)
        assert all(tuple(t.shape) == (block.room, cache.kv_heads, capacity, cache.dim_head) for t in block.tensors())
        assert len(list(block.tensors())) == 2 * cache.layers
        assert len(block.rows) <= block.room <= max(1, 4 * len(block.rows) - 1)
        assert len(block.written) == block.room
        assert all(row.length <= written for row, written in zip(block.rows, block.written, strict=False))
    assert len({id(row) for row in cache.rows}) == len(cache.rows)


class Reader:
    """Reads samples part by part into rows of a cache, from queries, keys and values that are given for all tokens.
    `rows` are the places of its samples among `num_rows` of the cache.
    """

    def __init__(self, samples, *, rows, num_rows, seed=0, cache=None, **options):
        self.samples = samples
        self.softcap, self.backend = options.pop("softcap", None), options.pop("backend", {})
        self.cache = make_cache(**options) if cache is None else cache
        every = acquire(self.cache, num_rows) if cache is None else self.cache.rows
        self.rows = [every[i] for i in rows]
        generator = torch.Generator().manual_seed(seed)
        n, kv_heads = sum(map(len, samples)), options.get("kv_heads", 4)
        shapes = (n, 4, 6), (n, kv_heads, 6), (n, kv_heads, 6)
        self.qkv = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        self.starts = [sum(map(len, samples[:i])) for i in range(len(samples))]

    def whole(self):
        """Without a cache, all at once: what each sample gets."""
        out = naive_attention(*self.qkv, stream(*self.samples).sees, self.softcap)
        return out.split([len(sample) for sample in self.samples])

    def read(self, start, stop, *, noise=0.0, commit=True):
        part = stream(*self.samples, start=start, stop=stop)
        ranges = zip(self.starts, start, stop, strict=True)
        index = torch.cat([torch.arange(first + a, first + b) for first, a, b in ranges])
        q, k, v = (x[index] for x in self.qkv)
        plan = plan_attention(part.layout, CacheView(self.cache, self.rows, part.layout), **self.backend)
        out = plan.attend(q, k + noise, v + noise, softcap=self.softcap)
        if commit:
            self.cache.commit(self.rows, part.layout.lengths)
        return out.split(part.layout.lengths)


RAGGED = ["ttAAAtBBt", "AAtt", "tB", "ttttttAAA"]
PLACES = {"in order": [0, 1, 2, 3], "reversed": [3, 2, 1, 0], "scattered": [5, 1, 4, 0]}
BACKENDS = {kind: dict(kind=kind) for kind in ("auto", "flex", "dense")}
each_place = pytest.mark.parametrize("rows", PLACES.values(), ids=PLACES)
each_head = pytest.mark.parametrize("options", [dict(), dict(kv_heads=2), dict(softcap=2.0, kv_heads=1)], ids=str)


def ragged_cuts():
    """Every cut of every sample has its turn, and shorter samples several."""
    places = [cuts(sample) for sample in RAGGED]
    return [[place[turn % len(place)] for place in places] for turn in range(max(map(len, places)))]


@each_place
@each_head
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@torch.no_grad()
def test_reading_in_two_parts_is_reading_at_once(rows, options, backend):
    for cut in ragged_cuts():
        reader = Reader(RAGGED, rows=rows, num_rows=6, backend=backend, **options)
        first = reader.read([0] * 4, cut)
        second = reader.read(cut, [len(sample) for sample in RAGGED])
        for whole, *parts in zip(reader.whole(), first, second, strict=True):
            torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_reading_token_by_token_and_span_by_span_is_reading_at_once():
    """Only some of the rows at a time, as when one of them has ended."""
    for i, sample in enumerate(RAGGED):
        reader = Reader([sample], rows=[i], num_rows=4)
        edges = [0, *cuts(sample), len(sample)]
        parts = [reader.read([a], [b])[0] for a, b in pairwise(edges)]
        torch.testing.assert_close(torch.cat(parts), reader.whole()[0], rtol=0, atol=1e-10)
        assert [row.length for row in reader.cache.rows] == [len(sample) if row == i else 0 for row in range(4)]


@torch.no_grad()
def test_long_spans_behind_a_past_are_cut_into_chunks():
    samples = ["t" * 40 + "A" * 300 + "t" * 260, "t" * 12 + "B" * 560]
    reader = Reader(samples, rows=[1, 0], num_rows=2)
    first = reader.read([0, 0], [40, 12])
    second = reader.read([40, 12], [600, 572])
    assert all(len(run.chunks) > 1 for run in stream(*samples, start=[40, 12]).layout.runs)
    for whole, *parts in zip(reader.whole(), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_is_not_committed_is_replaced_and_leaves_no_trace():
    samples, cut, stop = ["ttAAAt", "tBBt"], [2, 1], [5, 3]
    tried, clean = (Reader(samples, rows=[2, 0], num_rows=3) for _ in range(2))
    tried.read([0, 0], cut)
    clean.read([0, 0], cut)
    before = committed(tried.rows[0])
    wrong = tried.read(cut, stop, noise=5.0, commit=False)
    assert [row.length for row in tried.cache.rows] == [1, 0, 2]
    assert_equal(committed(tried.rows[0]), before)
    right = tried.read(cut, stop)
    expected = clean.read(cut, stop)
    for i in range(2):
        assert torch.equal(right[i], expected[i])
        assert not torch.allclose(wrong[i], right[i], atol=1e-2)
        assert_equal(committed(tried.rows[i]), committed(clean.rows[i]))


def assert_equal(one, other) -> None:
    for part, wanted in zip(one, other, strict=True):
        assert torch.equal(part, wanted)


@torch.no_grad()
def test_a_shorter_write_after_a_longer_one_sees_nothing_of_it():
    tried, clean = (Reader(["tttttt"], rows=[0], num_rows=1) for _ in range(2))
    tried.read([0], [1])
    clean.read([0], [1])
    tried.read([1], [6], noise=5.0, commit=False)
    assert torch.equal(tried.read([1], [3])[0], clean.read([1], [3])[0])


def test_neighbouring_rows_are_read_without_a_copy():
    cache = make_cache()
    rows = acquire(cache, 4)
    layout, new = stream("tt", "tt").layout, torch.randn(4, 4, 6, dtype=torch.float64)
    [run] = CacheView(cache, rows[1:3], layout).runs
    keys, values = run.update(0, new, -new)
    assert keys.data_ptr() == rows[1].block.keys[0][1:].data_ptr()
    assert torch.equal(keys, run.batched(new))
    assert torch.equal(values, -run.batched(new))
    apart = CacheView(cache, [rows[2], rows[0]], layout).runs
    assert [run.tokens for run in apart] == [slice(0, 2), slice(2, 4)], "a batch of their own each"
    assert [run.update(0, new[:2], new[:2])[0].data_ptr() for run in apart] == [
        rows[2].block.keys[0][i].data_ptr() for i in (2, 0)
    ]


def test_rows_of_different_blocks_are_no_neighbours():
    cache = make_cache()
    rows = [cache.acquire(10), cache.acquire(), cache.acquire(100), cache.acquire(100)]
    new = torch.randn(4, 4, 6, dtype=torch.float64)
    for run in CacheView(cache, [rows[0], rows[3]], stream("tt", "tt").layout).runs:
        assert run.count == 1
        run.update(0, new[run.tokens], -new[run.tokens])
    for i, row in ((0, rows[0]), (2, rows[3])):
        keys, values = stored(row)
        assert torch.equal(keys[:, :2], new[i : i + 2].transpose(0, 1))
        assert torch.equal(values[:, :2], -new[i : i + 2].transpose(0, 1))
    assert not any(part.any() for row in rows[1:3] for part in stored(row))


@torch.no_grad()
def test_a_view_serves_every_evaluation_until_its_rows_move():
    """Of which each replaces the one before."""
    samples = ["ttAAA", "tBB"]
    kept, fresh = (Reader(samples, rows=[1, 0], num_rows=2) for _ in range(2))
    for reader in (kept, fresh):
        reader.read([0, 0], [2, 1])
    part = stream(*samples, start=[2, 1])
    view = CacheView(kept.cache, kept.rows, part.layout)
    for noise in (3.0, -1.0, 0.0):
        q, k, v = (x[[2, 3, 4, 6, 7]] for x in kept.qkv)
        got = plan_attention(part.layout, view).attend(q, k + noise, v + noise)
        expected = torch.cat(fresh.read([2, 1], [5, 3], noise=noise, commit=False))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token_is_what_a_slot_takes(dtype):
    cache = make_cache(layers=3, kv_heads=2, dim_head=10, dtype=dtype)
    assert cache.reserved_tokens == 0
    for length in (1, 64, 65, 300, 64):
        cache.acquire(length)
        taken = sum(t.numel() * t.element_size() for block in cache.blocks.values() for t in block.tensors())
        assert taken == cache.reserved_tokens * cache.bytes_per_token
    assert cache.bytes_per_token == 3 * 2 * 2 * 10 * dtype.itemsize


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@torch.no_grad()
def test_a_cache_of_other_precision_rounds_keys_and_values_only(backend):
    exact, rounded = (
        Reader(["ttAAt"], rows=[0], num_rows=1, dtype=dtype, backend=backend) for dtype in (torch.float64, torch.half)
    )
    rounded.qkv[1:] = exact.qkv[1:] = [x.half().double() for x in exact.qkv[1:]]
    for reader in (exact, rounded):
        reader.read([0], [2])
    assert torch.equal(exact.read([2], [5])[0], rounded.read([2], [5])[0])
    assert_equal(*([part.double() for part in committed(reader.rows[0])] for reader in (exact, rounded)))


# rows that come, grow and go


@torch.no_grad()
def test_a_growing_row_keeps_what_it_has():
    """From block to block, each of twice the capacity, while another row stays where it is."""
    reader = Reader(["t" * 300, "tt"], rows=[0, 1], num_rows=2)
    capacities, parts = [], []
    still, growing = reader.rows[1], Reader(["t" * 300], rows=[0], num_rows=2, cache=reader.cache)
    growing.qkv = [x[:300] for x in reader.qkv]
    parts += growing.read([0], [1])
    Reader(["tt"], rows=[1], num_rows=2, cache=reader.cache, seed=3).read([0], [2])
    before = committed(still)
    for i in range(1, 300):
        parts += growing.read([i], [i + 1])
        capacities.append(growing.rows[0].block.capacity)
        assert still.block.capacity == 64
        assert len(reader.cache.rows) == 2
    assert sorted(set(capacities)) == [64, 128, 256, 512]
    torch.testing.assert_close(torch.cat(parts), reader.whole()[0], rtol=0, atol=1e-10)
    assert torch.equal(committed(growing.rows[0])[1], rearrange(growing.qkv[2], "n h e -> h n e"))
    assert_equal(committed(still), before)
    assert sorted(reader.cache.blocks) == [64, 512], "a block that nobody is in is freed"
    assert_consistent(reader.cache)


@pytest.mark.parametrize(("length", "capacity"), [(0, 64), (1, 64), (64, 64), (65, 128), (128, 128), (1000, 1024)])
def test_a_row_lies_in_the_smallest_block_that_holds_it(length, capacity):
    cache = make_cache(layers=3)
    assert KVCache.capacity_for(length) == cache.acquire(length).block.capacity == capacity
    grown = cache.acquire()
    CacheView(cache, [grown], stream("A" * max(1, length)).layout)
    assert grown.block.capacity == capacity
    assert_consistent(cache)


def test_one_long_row_does_not_make_the_short_ones_larger():
    cache = make_cache()
    acquire(cache, 32)
    cache.reserve([cache.rows[5]], [4000])
    assert cache.reserved_tokens == 32 * 64 + 4096
    assert_consistent(cache)


@pytest.mark.parametrize("capacity", [64, 1024, 2 * GROWTH])
def test_blocks_double_but_those_of_long_rows_grow_row_by_row(capacity):
    cache, rooms = make_cache(kv_heads=1, dim_head=1), []
    for _ in range(9):
        cache.acquire(capacity)
        rooms.append(cache.blocks[capacity].room)
    if capacity > GROWTH:
        assert rooms == [*range(1, 10)]
    elif capacity * 8 <= GROWTH:
        assert rooms == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(room <= 2 * count for count, room in enumerate(rooms, start=1))
    assert all(capacity * (room - count) < max(GROWTH, 1) for count, room in enumerate(rooms, start=1))


def test_memory_is_freed_with_the_rows():
    cache = make_cache()
    rows = acquire(cache, 33)
    assert cache.reserved_tokens == 64 * 64
    reserved = []
    while rows:
        cache.release(rows.pop(len(rows) // 2))
        assert_consistent(cache)
        reserved.append(cache.reserved_tokens // 64)
    assert reserved == [64] * 16 + [32] * 8 + [16] * 4 + [8] * 2 + [4] + [2] + [0]
    assert cache.blocks == {}
    assert cache.acquire().block.room == 1


def test_where_memory_is_short_the_larger_block_goes_on(monkeypatch):
    """The smaller copy is made beside it."""
    cache = make_cache()
    rows = acquire(cache, 8)
    fill(rows)
    before = committed(rows[0])
    monkeypatch.setattr(torch, "zeros", no_memory(0))
    for row in rows[1:]:
        cache.release(row)
    assert cache.reserved_tokens == 8 * 64
    assert_equal(committed(rows[0]), before)
    monkeypatch.undo()
    cache.release(cache.acquire())
    assert cache.reserved_tokens < 8 * 64
    assert_equal(committed(rows[0]), before)


def fill(rows, length: int = 3, scale: float = 1.0) -> None:
    """Commits random keys and values, for which there is room."""
    for row in rows:
        row.length += length
        row.block.written[row.index] = max(row.length, row.block.written[row.index])
        for part in stored(row):
            new = part[:, row.length - length : row.length]
            new.copy_(scale * torch.randn(new.shape, dtype=new.dtype))


def no_memory(allowed: int):
    """Stands in for `torch.zeros`, which fails once so many tensors were made."""
    zeros, left = torch.zeros, iter(range(allowed))

    def limited(*size, **options):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory")
        return zeros(*size, **options)

    return limited


CHANGES = {
    "acquire into a full block": lambda cache, rows: cache.acquire(),
    "acquire into a new block": lambda cache, rows: cache.acquire(500),
    "a row that outgrows its block": lambda cache, rows: CacheView(cache, [rows[1]], stream("A" * 70).layout),
    "a decode step": lambda cache, rows: cache.reserve(rows[:2], [1, 1]),
    "copy": lambda cache, rows: cache.copy(rows[3], [rows[2]], 100),
}


def snapshot(cache):
    return (
        {capacity: (block.version, block.room, tuple(block.written)) for capacity, block in cache.blocks.items()},
        [(row.block.capacity, row.index, row.length) for row in cache.rows],
        [part for row in cache.rows for part in committed(row)],
    )


@pytest.mark.parametrize("allowed", range(4))
@pytest.mark.parametrize("name", CHANGES)
def test_a_failed_allocation_changes_nothing(monkeypatch, name, allowed):
    """Of four tensors, whichever fails; and afterwards the same goes on as if nothing had been."""
    cache = make_cache(layers=2)
    rows = [*acquire(cache, 3), cache.acquire(120)]
    fill(rows[:2], 64 if name == "a decode step" else 20)
    fill(rows[3:], 120)
    while cache.blocks[64].room > len(cache.blocks[64].rows):
        cache.acquire()
    before = snapshot(cache)
    monkeypatch.setattr(torch, "zeros", no_memory(allowed))
    with pytest.raises(torch.OutOfMemoryError):
        CHANGES[name](cache, rows)
    monkeypatch.undo()
    after = snapshot(cache)
    assert after[:2] == before[:2]
    assert_equal(after[2], before[2])
    CHANGES[name](cache, rows)
    assert_consistent(cache)
    assert_equal([part for row in rows[:2] for part in committed(row)], before[2][:8])


MOVES = CHANGES | {
    "gather": lambda cache, rows: cache.gather([rows[1], rows[2]]),
    "gather at the end": lambda cache, rows: cache.gather(rows[:2], at_end=True),
    "release": lambda cache, rows: cache.release(rows[0]),
}


@pytest.mark.parametrize("name", MOVES)
def test_whatever_makes_a_tensor_may_fail_and_every_row_is_whole(name):
    """Views too, unlikely as it is: a row whose keys have moved and whose values have not is that of nobody."""
    failures = 0
    for after in range(200):
        cache = make_cache(layers=2)
        rows = [*acquire(cache, 3), cache.acquire(120)]
        fill(rows[:2], 64 if name == "a decode step" else 20)
        fill(rows[3:], 120)
        while name == "acquire into a full block" and cache.blocks[64].room > len(cache.blocks[64].rows):
            cache.acquire()
        before = {id(row): (row.length, committed(row)) for row in rows}
        try:
            with OutOfMemory(MemoryError("injected"), names=ALLOCATES, after=after):
                MOVES[name](cache, rows)
        except MemoryError:
            failures += 1
        else:
            break
        for row in rows:
            length, content = before[id(row)]
            assert row.length == length
            assert_equal(committed(row), content)
        MOVES[name](cache, rows)
        assert_consistent(cache)
        for row in cache.rows:
            if id(row) in before and name != "another type":
                length, content = before[id(row)]
                assert_equal([part[:, :length] for part in committed(row)], content)
    assert 4 <= failures < 199


WRITES_IN_PLACE = {"copy_", "__setitem__"}


@pytest.mark.parametrize("name", MOVES)
def test_where_a_write_fails_every_row_is_whole_or_the_cache_is_broken(name):
    """A broken cache can be used for nothing, and views of it are void."""
    failures = broken = 0
    for after in range(200):
        cache = make_cache(layers=2)
        rows = [*acquire(cache, 3), cache.acquire(120)]
        fill(rows[:2], 64 if name == "a decode step" else 20)
        fill(rows[3:], 120)
        cache.blocks[64].written[3] = 5  # whoever takes it has to clear it first
        before = [(row.length, committed(row)) for row in rows]
        stamp = cache.stamp(rows)
        try:
            with OutOfMemory(RuntimeError("device-side assert"), names=WRITES_IN_PLACE, after=after):
                MOVES[name](cache, rows)
        except RuntimeError:
            failures += 1
        else:
            break
        if cache.is_broken:
            broken += 1
            assert cache.stamp(rows) != stamp
            for change in MOVES.values():
                with pytest.raises(CacheBroken, match="an operation failed while rows were moved"):
                    change(cache, rows)
            continue
        for row, (length, content) in list(zip(rows, before, strict=True))[
            name == "release" :
        ]:  # nobody needs the first
            assert row.length == length
            assert_equal(committed(row), content)
        assert_consistent(cache)
        MOVES[name](cache, rows)
        assert_consistent(cache)
        for row in set(cache.rows) & set(rows):
            length, content = before[rows.index(row)]
            assert_equal([part[:, :length] for part in committed(row)], content)
    assert (failures > 0) == (name != "acquire into a new block")
    assert (broken > 0) == (name in ("gather", "gather at the end", "a row that outgrows its block", "a decode step"))


def test_rows_that_had_moved_before_an_allocation_failed_are_whole(monkeypatch):
    """A row may be in its larger block already when there is none for the next."""
    cache = make_cache()
    rows = acquire(cache, 2)
    fill(rows, 60)
    before = [part for row in rows for part in committed(row)]
    monkeypatch.setattr(torch, "zeros", no_memory(2))
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(rows, [60, 300])
    assert [row.length for row in rows] == [60, 60]
    assert_equal([part for row in rows for part in committed(row)], before)
    assert_consistent(cache)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("moved", [True, False])
@torch.no_grad()
def test_what_a_former_tenant_left_is_cleared(last, moved):
    """Also what it only tried: NaN behind a mask would still be NaN. The row is the last of its block or not, and the
    one that takes its place grew out of a smaller block or not.
    """
    samples = ["ttAAAt", "tt"]  # the second is read beside the first, which is longer: its mask covers the rest
    cache = make_cache(layers=1)
    rows = acquire(cache, 3, 65)
    spoilt = rows[2 if last else 1]
    view = CacheView(cache, [spoilt], stream("A" * 80).layout)
    view.runs[0].update(0, *torch.full((2, 80, 4, 6), float("nan"), dtype=torch.float64))
    assert spoilt.block.keys[0][spoilt.index].isnan().any()
    cache.release(spoilt)
    rows.remove(spoilt)
    if moved:
        small = cache.acquire()
        fill([small], 2)
        cache.reserve([small], [64])
        fresh = small
    else:
        fresh = cache.acquire(65)
    used = {id(row): row for row in cache.rows}
    assert not any(part.isnan().any() for row in used.values() for part in stored(row))
    assert all(not part[:, row.length :].any() for row in used.values() for part in stored(row))
    fresh.length = 0
    reader = Reader(samples, rows=[0, 0], num_rows=0, cache=cache)
    reader.rows = [rows[0], fresh]
    first = reader.read([0, 0], [5, 1])
    second = reader.read([5, 1], [6, 2])
    for whole, *parts in zip(reader.whole(), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-10)


def test_clearing_costs_only_what_was_written():
    """A row may be longer than anything it ever held."""
    cache = make_cache()
    stays, row = acquire(cache, 2, 1000)
    CacheView(cache, [row], stream("ttt").layout)
    for tensor in row.block.tensors():
        tensor.fill_(5.0)
    cache.release(row)
    assert cache.acquire(1000).index == 1
    for tensor in stays.block.tensors():
        assert not tensor[1, :, :3].any()
        assert (tensor[1, :, 3:] == 5.0).all()
        assert (tensor[0] == 5.0).all()


def test_where_a_row_leaves_the_last_one_takes_its_place():
    cache = make_cache(layers=2)
    rows = acquire(cache, 5)
    fill(rows[:4], 5)
    fill(rows[4:], 2)
    before = {row: committed(row) for row in rows}
    stamp, other = cache.stamp(rows), cache.stamp([cache.acquire(200)])
    cache.release(rows[1])
    assert [row.index for row in rows] == [0, 1, 2, 3, 1]
    assert cache.stamp([rows[0]]) != stamp, "views of before are void"
    assert cache.stamp([cache.rows[-1]]) == other, "those of other blocks are not"
    for row in (rows[0], *rows[2:]):
        assert_equal(committed(row), before[row])
        assert not any(part[:, row.length :].any() for part in stored(row))
    stamp = cache.stamp(rows[2:])
    cache.release(rows[3])
    assert cache.stamp(rows[4:]) == stamp, "the last one leaves without moving another"
    assert_consistent(cache)


@pytest.mark.parametrize("at_end", [False, True])
def test_rows_are_gathered_at_either_end_of_their_blocks(at_end):
    cache = make_cache(layers=2)
    rows = [*acquire(cache, 6), *acquire(cache, 3, 100)]
    for i, row in enumerate(rows):
        fill([row], 1 + i)
    before = {row: committed(row) for row in rows}
    wanted = [rows[4], rows[1], rows[3], rows[7]]
    cache.gather(wanted, at_end=at_end)
    assert {row.index for row in wanted[:3]} == ({3, 4, 5} if at_end else {0, 1, 2})
    assert wanted[3].index == (2 if at_end else 0)
    for row in rows:
        assert_equal(committed(row), before[row])
    assert_consistent(cache)
    stamp = cache.stamp(rows)
    cache.gather(wanted, at_end=at_end)
    assert cache.stamp(rows) == stamp, "what lies right is not moved"


def test_rows_that_are_exchanged_take_all_that_was_written_with_them():
    """What a solver tries lies behind the committed prefix."""
    cache = make_cache()
    one, other = acquire(cache, 2)
    fill([one], 9)
    fill([other], 4)
    one.length = 2
    before = stored(one)[0].clone(), stored(other)[0].clone()
    cache.gather([other])
    assert (one.index, other.index) == (1, 0)
    assert torch.equal(stored(one)[0], before[0])
    assert torch.equal(stored(other)[0], before[1])
    assert one.block.written[:2] == [4, 9]


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 70])
def test_a_copied_beginning_is_a_beginning_that_was_read(length):
    """In any rows, longer than the slots there were in the target or not, and the copies go on by themselves."""
    beginning_of = "tt" + "A" * (length - 2)
    samples = [beginning_of + end for end in ("tt", "tBB", "", "t")]
    reader = Reader(samples, rows=[2, 0, 5, 3], num_rows=6, layers=1)
    qkv, start = reader.qkv, reader.starts
    for x in qkv:
        for first in start[1:]:
            x[first : first + length] = x[:length]
    source, *others = reader.rows
    one = Reader([samples[0]], rows=[], num_rows=0, cache=reader.cache)
    one.qkv, one.rows = [x[: length + 2] for x in qkv], [source]
    beginning = one.read([0], [length])[0]
    empty = [row for row in reader.cache.rows if row not in reader.rows]
    reader.cache.copy(source, others, length)
    assert [row.length for row in (source, *others)] == [length] * 4
    for row in others:
        assert_equal(committed(row), committed(source))
    assert [row.length for row in empty] == [0, 0]
    assert not any(part.any() for row in empty for part in stored(row))
    rest = Reader([samples[i] for i in (0, 1, 3)], rows=[], num_rows=0, cache=reader.cache)
    ends = [
        start[0] + torch.arange(length + 2),
        start[1] + torch.arange(length + 3),
        start[3] + torch.arange(length + 1),
    ]
    rest.qkv, rest.rows = [x[torch.cat(ends)] for x in qkv], [source, others[0], others[2]]
    parts = rest.read([length] * 3, [length + 2, length + 3, length + 1])
    for whole, part in zip(rest.whole(), parts, strict=True):
        torch.testing.assert_close(torch.cat([beginning, part]), whole, rtol=0, atol=1e-10)
    assert_consistent(reader.cache)


def test_a_part_of_what_a_row_has_may_be_copied():
    cache = make_cache()
    source, target = acquire(cache, 2)
    fill([source], 4)
    cache.copy(source, [target], 2)
    assert [source.length, target.length] == [4, 2]
    assert_equal(committed(target), [part[:, :2] for part in committed(source)])
    assert not any(part[:, 2:].any() for part in stored(target))


def test_used_tokens_are_those_that_are_committed():
    cache = make_cache()
    rows = [cache.acquire(), cache.acquire(100)]
    CacheView(cache, rows, stream("ttt", "tt").layout)
    assert cache.used_tokens == 0
    cache.commit(rows, [3, 2])
    assert cache.used_tokens == 5
    cache.release(rows[0])
    assert cache.used_tokens == 2
    cache.release(rows[1])
    assert cache.used_tokens == cache.reserved_tokens == 0


@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_lost_whatever_comes_and_goes(seed):
    """Rows and all that is in them, against lists, for many turns of chance, of which some find no memory."""
    cache, expected, generator = make_cache(), {}, torch.Generator().manual_seed(seed)

    def chance(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for turn in range(400):
        rows = list(expected)
        with pytest.MonkeyPatch.context() as patch:
            if turn % 3 == 0:
                patch.setattr(torch, "zeros", no_memory(chance(4)))
            try:
                kind = chance(5) if rows else 0
                if kind == 0 or (kind == 1 and len(rows) < 3):
                    row = cache.acquire(chance(150))
                    expected[row] = committed(row)
                elif kind == 1:
                    row = rows[chance(len(rows))]
                    del expected[row]
                    cache.release(row)
                elif kind == 2:
                    row, length = rows[chance(len(rows))], 1 + chance(60)
                    if row.length < 500:
                        cache.reserve([row], [length])
                        fill([row], length, scale=float(turn))
                        expected[row] = committed(row)
                elif kind == 3:
                    cache.gather([row for row in rows if chance(2)], at_end=bool(chance(2)))
                else:
                    source, row = rows[chance(len(rows))], cache.acquire()
                    expected[row] = committed(row)
                    cache.copy(source, [row], source.length)
                    expected[row] = committed(source)
            except torch.OutOfMemoryError:
                pass
        assert_consistent_after_failures(cache)
        assert set(cache.rows) == set(expected)
        for row, parts in expected.items():
            assert_equal(committed(row), parts)
    for row in list(expected):
        cache.release(row)
    assert cache.reserved_tokens == 0


def assert_consistent_after_failures(cache) -> None:
    """As `assert_consistent`, but a block that could not be made smaller may still be large."""
    for block in cache.blocks.values():
        assert [row.index for row in block.rows] == list(range(len(block.rows)))
        assert all(row.block is block for row in block.rows)
        assert 0 < len(block.rows) <= block.room


# decode steps


def decode_rows(lengths, *, kv_heads=4, dtype=torch.float64, long=()):
    """Rows of these lengths in one cache, and those at `long` in a block of larger capacity."""
    cache = make_cache(kv_heads=kv_heads, dtype=dtype)
    rows = [cache.acquire(100 if i in long else 0) for i in range(len(lengths))]
    for row, length in zip(rows, lengths, strict=True):
        fill([row], length)
    rows.sort(key=lambda row: (row.block.capacity, row.index))
    return cache, rows


PHASES = torch.arange(1000.0)[:, None, None].expand(-1, 3, 2)  # the phases of position p are p


def decode_view(cache, rows, *, phases=PHASES, **options) -> DecodeView:
    """Rows of text alone, whose positions are their lengths."""
    return DecodeView(cache, rows, [row.length for row in rows], phases, **options)


def assert_decoded(out, rows, q, k, v, softcap=None) -> None:
    """A step before it is committed: what each row gets from the books, and what lies in the cache then."""
    for i, row in enumerate(rows):
        past = [rearrange(part, "h n e -> n h e") for part in committed(row)]
        keys, values = (torch.cat([old, new[i : i + 1]]) for old, new in zip(past, (k, v), strict=True))
        sees = torch.ones(1, len(keys), dtype=torch.bool)
        expected = naive_attention(q[i : i + 1], keys, values, sees, softcap)
        torch.testing.assert_close(out[i : i + 1], expected, rtol=0, atol=1e-12)
        assert torch.equal(row.block.keys[0][row.index, :, row.length], k[i])
        assert torch.equal(row.block.values[0][row.index, :, row.length], v[i])


LENGTHS = {"one": [5], "equal": [7, 7, 7], "ragged": [3, 60, 1, 17], "one new": [9, 0, 4], "two blocks": [3, 70, 5, 99]}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", LENGTHS)
@torch.no_grad()
def test_a_decode_step_is_attention_over_all_that_its_row_has(name, kv_heads, softcap):
    """With the keys that are needed, with all slots of the block, and by the view of a stream."""
    long = [i for i, length in enumerate(LENGTHS[name]) if length > 64]
    outputs = []
    for kind in ("short", "fixed", "stream"):
        torch.manual_seed(1)
        cache, rows = decode_rows(LENGTHS[name], kv_heads=kv_heads, long=long)
        q, k, v = projections(len(rows), kv_heads=kv_heads)
        past = [row.length for row in rows]
        layout = stream(*["t" * (length + 1) for length in past], start=past).layout
        if kind == "stream":
            view = CacheView(cache, rows, layout)
        else:
            view = decode_view(cache, rows, is_fixed=kind == "fixed")
        outputs.append(plan_attention(layout, view).attend(q, k, v, softcap=softcap))
        assert_decoded(outputs[-1], rows, q, k, v, softcap)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=1e-12)


def to_next_step(cache, rows, view) -> None:
    """What whoever takes a step does behind it."""
    cache.commit(rows, [1] * len(rows))
    view.advance()
    view.num_steps -= 1


def pointers_of(view: DecodeView) -> list[int]:
    """Where all that changes from step to step lies."""
    changing = (it for run in view.runs for it in (run.slots, run.newest))
    return [it.data_ptr() for it in (view.position, *changing)]


def test_a_view_serves_no_more_steps_than_it_has_phases():
    cache, rows = decode_rows([3, 9])
    assert decode_view(cache, rows).num_steps == KEYS_AT_ONCE - 9
    assert decode_view(cache, rows, phases=PHASES[:14]).num_steps == 5


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
@torch.no_grad()
def test_one_view_serves_many_steps_in_place(name, is_fixed):
    """As many as it says, until the first row is full; and nothing of its shape changes."""
    long = [i for i, length in enumerate(LENGTHS[name]) if length > 64]
    cache, rows = decode_rows(LENGTHS[name], long=long)
    view, layout = decode_view(cache, rows, is_fixed=is_fixed), stream(*["t"] * len(rows)).layout
    pointers = pointers_of(view)
    room = min(row.block.capacity - row.length for row in rows)
    steps = view.num_steps
    assert steps == room if is_fixed else 0 < steps <= room
    for step in range(steps):
        assert view.num_steps == steps - step
        assert view.rotation()[:, 0, 0].tolist() == [row.length for row in rows]
        q, k, v = projections(len(rows))
        assert_decoded(plan_attention(layout, view).attend(q, k, v), rows, q, k, v)
        to_next_step(cache, rows, view)
    assert view.num_steps == 0
    assert pointers == pointers_of(view)
    assert all(row.length <= row.block.written[row.index] <= row.block.capacity for row in rows)


@torch.no_grad()
def test_what_many_steps_have_written_is_cleared_for_the_next_tenant():
    """Also where the steps were never committed."""
    cache, [stays, row] = decode_rows([3, 5])
    view, layout = decode_view(cache, [stays, row]), stream("t", "t").layout
    for _ in range(20):
        q, k, v = projections(2)
        plan_attention(layout, view).attend(q, k * float("nan"), v)
        view.advance()
    cache.release(row)
    assert not any(part.any() for part in stored(cache.acquire()))


@torch.no_grad()
def test_decode_step_by_step_is_reading_at_once():
    """Rows of different lengths that outgrow their blocks one after the other; a view is made anew when they do."""
    samples = ["t" * 70, "t" * 66, "t" * 30]
    reader = Reader(samples, rows=[0, 1, 2], num_rows=3)
    cache, parts = reader.cache, [[part] for part in reader.read([0, 0, 0], [61, 60, 5])]
    at, served, view, stamp = [61, 60, 5], [], None, None
    while active := {i for i in range(3) if at[i] < len(samples[i])}:
        rows = [reader.rows[i] for i in served]
        if set(served) != active or not view.num_steps or stamp != cache.stamp(rows):
            rows = [reader.rows[i] for i in active]
            cache.reserve(rows, [1] * len(rows))
            cache.gather(rows)
            served = sorted(active, key=lambda i: (reader.rows[i].block.capacity, reader.rows[i].index))
            rows = [reader.rows[i] for i in served]
            view, stamp = decode_view(cache, rows), cache.stamp(rows)
        index = [reader.starts[i] + at[i] for i in served]
        out = plan_attention(stream(*["t"] * len(rows)).layout, view).attend(*(x[index] for x in reader.qkv))
        to_next_step(cache, rows, view)
        for i, own in zip(served, out, strict=True):
            parts[i].append(own[None])
            at[i] += 1
    for whole, mine in zip(reader.whole(), parts, strict=True):
        torch.testing.assert_close(torch.cat(mine), whole, rtol=0, atol=1e-10)
    assert_consistent(cache)


@pytest.mark.parametrize("kv_heads", [2, 1])
@torch.no_grad()
def test_shared_keys_are_keys_that_are_repeated(kv_heads):
    """Grouped heads, and the same with a copy of the keys for every query head."""
    shared, rows = decode_rows([3, 9, 5], kv_heads=kv_heads)
    whole, repeats = make_cache(), 4 // kv_heads
    copies = acquire(whole, 3)
    for row, copy in zip(rows, copies, strict=True):
        fill([copy], row.length)
        for mine, theirs in zip(stored(copy), committed(row), strict=True):
            mine[:, : row.length] = theirs.repeat_interleave(repeats, dim=0)
    q, k, v = projections(3, kv_heads=kv_heads)
    layout = stream("t", "t", "t").layout
    got = plan_attention(layout, decode_view(shared, rows)).attend(q, k, v)
    k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    expected = plan_attention(layout, decode_view(whole, copies)).attend(q, k, v)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_step_copies_no_keys():
    cache, rows = decode_rows([3, 9, 5, 2])
    [run] = decode_view(cache, rows[:3]).runs
    keys, values = run.update(0, *torch.randn(2, 3, 4, 6, dtype=torch.float64))
    assert keys.data_ptr() == rows[0].block.keys[0].data_ptr()
    assert values.data_ptr() == rows[0].block.values[0].data_ptr()
    assert keys.shape == values.shape == (3, 4, 64, 6)


def test_a_step_sees_no_more_keys_than_its_rows_need():
    cache, rows = decode_rows([3, 70, 5], long=[0, 1, 2])
    cache.reserve(rows, [400] * 3)
    assert rows[0].block.capacity == 512
    [few], [many] = (decode_view(cache, some).runs for some in ([rows[0]], rows))
    [fixed] = decode_view(cache, rows, is_fixed=True).runs
    assert [run.keys.seen[0].shape[2] for run in (few, many, fixed)] == [64, 128, 512]


@pytest.mark.parametrize("lengths", [[4, 4], [3, 9]])
@torch.no_grad()
def test_a_decode_step_in_a_cache_of_other_precision_rounds_keys_and_values_only(lengths):
    outs = []
    for dtype in (torch.float64, torch.half):
        cache, rows = decode_rows(lengths, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        for row in rows:
            for part in stored(row):
                part[:, : row.length] = torch.randn(4, row.length, 6, generator=generator).half().to(dtype)
        torch.manual_seed(5)
        q, k, v = projections(2)
        k, v = k.half().double(), v.half().double()
        outs.append(plan_attention(stream("t", "t").layout, decode_view(cache, rows)).attend(q, k, v))
    assert outs[0].dtype == outs[1].dtype == torch.float64
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)


def test_rows_to_decode_are_gathered_first():
    cache, rows = decode_rows([3, 9, 5])
    with pytest.raises(AssertionError, match="gathered first"):
        decode_view(cache, [rows[0], rows[2]])
    cache.gather([rows[0], rows[2]])
    assert len(decode_view(cache, sorted([rows[0], rows[2]], key=lambda row: row.index)).runs) == 1


def test_versions_are_never_used_twice():
    """A block that is freed and made anew is another one."""
    cache, seen = make_cache(), set()
    for _ in range(5):
        row = cache.acquire()
        assert cache.stamp([row]) not in seen
        seen.add(cache.stamp([row]))
        cache.release(row)
