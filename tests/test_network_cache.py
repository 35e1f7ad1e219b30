"""The cache: reading in parts is reading at once, and what is only tried leaves no trace."""

from itertools import pairwise

import pytest
import torch
from einops import rearrange
from network_streams import cuts, naive_attention, projections, stream

from transfusion_pytorch.network.attend import plan_attention
from transfusion_pytorch.network.cache import KVCache


def make_cache(rows, *, layers=1, kv_heads=4, dim_head=6, dtype=torch.float64, slots=4):
    return KVCache(
        layers=layers,
        rows=rows,
        kv_heads=kv_heads,
        dim_head=dim_head,
        device=torch.device("cpu"),
        dtype=dtype,
        slots=slots,
    )


class Reader:
    """Reads samples part by part into rows of a cache, from queries, keys and values that are given for all tokens."""

    def __init__(self, samples, *, rows, num_rows, seed=0, **options):
        self.samples, self.rows = samples, rows
        self.softcap, self.backend = options.pop("softcap", None), options.pop("backend", {})
        self.cache = make_cache(num_rows, **options)
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
        plan = plan_attention(part.layout, self.cache.view(self.rows, part.layout), **self.backend)
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
        assert reader.cache.lengths == [len(sample) if row == i else 0 for row in range(4)]


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
    before = [key.clone() for key in tried.cache.keys]
    wrong = tried.read(cut, stop, noise=5.0, commit=False)
    assert tried.cache.lengths == [1, 0, 2]
    assert torch.equal(tried.cache.keys[0][2, :, :2], before[0][2, :, :2])
    right = tried.read(cut, stop)
    expected = clean.read(cut, stop)
    for i in range(2):
        assert torch.equal(right[i], expected[i])
        assert not torch.allclose(wrong[i], right[i], atol=1e-2)
    assert torch.equal(tried.cache.keys[0][2, :, :5], clean.cache.keys[0][2, :, :5])
    assert torch.equal(tried.cache.values[0][0, :, :3], clean.cache.values[0][0, :, :3])


@torch.no_grad()
def test_a_shorter_write_after_a_longer_one_sees_nothing_of_it():
    tried, clean = (Reader(["tttttt"], rows=[0], num_rows=1) for _ in range(2))
    tried.read([0], [1])
    clean.read([0], [1])
    tried.read([1], [6], noise=5.0, commit=False)
    assert torch.equal(tried.read([1], [3])[0], clean.read([1], [3])[0])


@torch.no_grad()
def test_a_growing_cache_keeps_what_it_has():
    reader = Reader(["t" * 70], rows=[0], num_rows=2, slots=2)
    slots, parts = [], []
    for i in range(70):
        parts += reader.read([i], [i + 1])
        slots.append(reader.cache.slots)
    torch.testing.assert_close(torch.cat(parts), reader.whole()[0], rtol=0, atol=1e-10)
    assert sorted(set(slots)) == [2, 4, 8, 16, 32, 64, 128]  # doubled, or copying would cost more with every token
    assert torch.equal(reader.cache.values[0][0, :, :70], rearrange(reader.qkv[2], "n h e -> h n e"))


def test_a_cache_grows_as_far_as_one_long_write_needs():
    cache = make_cache(2, layers=3, slots=4)
    cache.view([1], stream("A" * 50).layout)
    assert cache.slots == 50
    assert {tuple(tensor.shape) for tensor in cache.keys + cache.values} == {(2, 4, 50, 6)}


def test_a_view_from_before_the_cache_grew_still_serves():
    """A plan for one row may be kept while another row makes the cache grow."""
    cache = make_cache(2, slots=4)
    view = cache.view([0], stream("AAA").layout)
    cache.view([1], stream("A" * 9).layout)
    inputs, made = projections(3), stream("AAA")
    ours = plan_attention(made.layout, view).attend(*inputs)
    torch.testing.assert_close(ours, naive_attention(*inputs, made.sees), rtol=0, atol=1e-10)


def test_neighbouring_rows_are_read_without_a_copy():
    cache = make_cache(4)
    layout, new = stream("tt", "tt").layout, torch.randn(2, 4, 2, 6, dtype=torch.float64)
    view = cache.view([1, 2], layout)
    keys, values = view.update(0, 0, new, -new)
    assert keys.data_ptr() == cache.keys[0][1:].data_ptr()
    assert torch.equal(keys, new)
    assert torch.equal(values, -new)
    apart = cache.view([2, 0], layout)
    assert [run.samples for run in apart.runs] == [slice(0, 1), slice(1, 2)], "a batch of their own each"
    assert [apart.update(0, i, new[:1], new[:1])[0].data_ptr() for i in (0, 1)] == [
        cache.keys[0][row].data_ptr() for row in (2, 0)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token_is_what_one_more_slot_takes(dtype):
    small, large = (make_cache(1, layers=3, kv_heads=2, dim_head=10, dtype=dtype, slots=slots) for slots in (7, 8))
    sizes = [sum(t.numel() * t.element_size() for t in cache.keys + cache.values) for cache in (small, large)]
    assert small.bytes_per_token == large.bytes_per_token == sizes[1] - sizes[0]
    assert small.bytes_per_token == 3 * 2 * 2 * 10 * dtype.itemsize


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
    assert torch.equal(*(reader.cache.keys[0][0, :, :5].double() for reader in (exact, rounded)))


# rows that come and go


def test_the_lowest_free_row_is_taken_and_none_twice():
    cache = make_cache(1)
    assert [cache.acquire() for _ in range(5)] == [0, 1, 2, 3, 4]
    for row in (3, 1, 4):
        cache.release(row)
    assert [cache.acquire() for _ in range(4)] == [1, 3, 4, 5]


def test_rows_double_and_keep_what_they_have():
    reader = Reader(["tAAt"], rows=[0], num_rows=1, layers=1)
    cache, numbers = reader.cache, []
    assert cache.acquire() == 0
    with torch.no_grad():
        first = reader.read([0], [3])
        before = [tensor[0, :, :3].clone() for tensor in cache.keys + cache.values]
        for _ in range(8):
            cache.acquire()
            numbers.append(len(cache.lengths))
        assert all(
            torch.equal(tensor[0, :, :3], old) for tensor, old in zip(cache.keys + cache.values, before, strict=True)
        )
        second = reader.read([3], [4])
    assert numbers == [2, 4, 4, 8, 8, 8, 8, 16]
    assert cache.lengths == [4] + [0] * 15
    torch.testing.assert_close(torch.cat([first[0], second[0]]), reader.whole()[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("grown", [False, True])
@torch.no_grad()
def test_what_a_former_tenant_left_is_cleared(grown):
    """Also what it only tried: NaN behind a mask would still be NaN."""
    samples = ["ttAAAt", "tt"]  # the second is read beside the first, which is longer: its mask covers the rest
    reader = Reader(samples, rows=[0, 1], num_rows=2)
    cache = reader.cache
    assert [cache.acquire(), cache.acquire()] == [0, 1]
    spoilt = Reader(["AAAA"], rows=[1], num_rows=2)
    spoilt.cache = cache
    spoilt.read([0], [4], noise=float("nan"), commit=False)
    assert cache.keys[0][1].isnan().any()
    cache.release(1)
    if grown:
        cache.view([0], stream("A" * 9).layout)
        assert cache.slots == 9
        assert cache.keys[0][1].isnan().any(), "what grows is copied as it is"
    assert cache.acquire() == 1
    assert cache.lengths == [0, 0]
    assert not any(tensor[1].any() for tensor in cache.keys + cache.values)
    first = reader.read([0, 0], [5, 1])
    second = reader.read([5, 1], [6, 2])
    for whole, *parts in zip(reader.whole(), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-10)


def test_clearing_a_row_touches_no_other():
    cache = make_cache(3, layers=2)
    for row in range(3):
        assert cache.acquire() == row
    layout = stream("tt", "tt", "tt").layout
    view = cache.view([0, 1, 2], layout)
    for layer in range(2):
        view.update(layer, 0, *torch.randn(2, 3, 4, 2, 6, dtype=torch.float64))
    cache.commit([0, 1, 2], layout.lengths)
    before = [tensor.clone() for tensor in cache.keys + cache.values]
    cache.release(1)
    assert cache.acquire() == 1
    assert cache.lengths == [2, 0, 2]
    for tensor, old in zip(cache.keys + cache.values, before, strict=True):
        assert torch.equal(tensor[[0, 2]], old[[0, 2]])
        assert not tensor[1].any()


def test_clearing_costs_only_what_was_written(monkeypatch):
    """A row is as long as the longest sample ever, most of it untouched."""
    cache = make_cache(2, slots=1000)
    cache.acquire()
    cache.view([0], stream("ttt").layout)
    for tensor in cache.keys + cache.values:
        tensor.fill_(5.0)
    cache.release(0)
    cache.acquire()
    for tensor in cache.keys + cache.values:
        assert not tensor[0, :, :3].any()
        assert (tensor[0, :, 3:] == 5.0).all()


@torch.no_grad()
def test_a_copied_beginning_is_a_beginning_that_was_read():
    """In any rows, longer than the slots there were in the target or not, and the copies go on by themselves."""
    samples = ["ttAAAtt", "ttAAAtBB", "ttAAA", "ttAAAt"]
    reader = Reader(samples, rows=[2, 0, 5, 3], num_rows=6, layers=1)
    qkv, start = reader.qkv, reader.starts
    for x in qkv:
        for first in start[1:]:
            x[first : first + 5] = x[:5]
    one = Reader([samples[0]], rows=[2], num_rows=6)
    one.qkv, one.cache = [x[:7] for x in qkv], reader.cache
    beginning = one.read([0], [5])[0]
    reader.cache.copy(2, [0, 5, 3], 5)
    assert reader.cache.lengths == [5, 0, 5, 5, 0, 5]
    for tensor in reader.cache.keys + reader.cache.values:
        for row in (0, 5, 3):
            assert torch.equal(tensor[row, :, :5], tensor[2, :, :5])
        assert not tensor[[1, 4]].any()
    rest = Reader([samples[i] for i in (0, 1, 3)], rows=[2, 0, 3], num_rows=6)
    ends = [start[0] + torch.arange(7), start[1] + torch.arange(8), start[3] + torch.arange(6)]
    rest.qkv, rest.cache = [x[torch.cat(ends)] for x in qkv], reader.cache
    parts = rest.read([5, 5, 5], [7, 8, 6])
    for whole, part in zip(rest.whole(), parts, strict=True):
        torch.testing.assert_close(torch.cat([beginning, part]), whole, rtol=0, atol=1e-10)


def test_a_part_of_what_a_row_has_may_be_copied():
    cache = make_cache(2)
    layout = stream("tttt").layout
    cache.view([0], layout).update(0, 0, *torch.randn(2, 1, 4, 4, 6, dtype=torch.float64))
    cache.commit([0], layout.lengths)
    cache.copy(0, [1], 2)
    assert cache.lengths == [4, 2]
    assert torch.equal(cache.keys[0][1, :, :2], cache.keys[0][0, :, :2])
    assert not cache.keys[0][1, :, 2:].any()


@pytest.mark.parametrize(
    ("limit", "slots"), [(None, [4, 8, 16, 32]), (20, [4, 8, 16, 20]), (9, [4, 8, 9]), (4, [4]), (3, [3])]
)
def test_slots_double_up_to_their_limit(limit, slots):
    cache = make_cache(1, slots=min(4, limit or 4))
    cache.limit = limit
    seen = []
    for _ in range(min(20, limit or 20)):
        cache.view([0], stream("t").layout)
        cache.commit([0], [1])
        seen.append(cache.slots)
    assert sorted(set(seen)) == slots


def test_num_bytes_is_what_the_tensors_take_as_they_grow():
    cache = make_cache(1, layers=3, kv_heads=2, dtype=torch.float32)
    for _ in range(3):
        cache.acquire()
        cache.view([0], stream("t" * 5 * len(cache.lengths)).layout)
        assert cache.num_bytes == sum(t.numel() * t.element_size() for t in cache.keys + cache.values)
        assert cache.num_bytes == cache.bytes_per_token * cache.slots * len(cache.lengths)


def test_no_row_is_lost_whatever_comes_and_goes():
    """Against a set of rows, for a thousand turns of chance."""
    cache, used, generator = make_cache(1), set(), torch.Generator().manual_seed(0)
    for _ in range(1000):
        if used and torch.rand((), generator=generator) < 0.45 + 0.02 * len(used):
            row = sorted(used)[int(torch.randint(len(used), (), generator=generator))]
            used.remove(row)
            cache.release(row)
        else:
            row = cache.acquire()
            assert row == min(set(range(len(cache.lengths))) - used)
            used.add(row)
    assert len(cache.lengths) < 64
