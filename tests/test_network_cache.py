"""The cache: reading in parts is reading at once, and what is only tried leaves no trace."""

from itertools import pairwise

import pytest
import torch
from einops import rearrange
from network_streams import cuts, naive_attention, stream

from transfusion_pytorch.network.attention import attend
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
        self.options = dict(softcap=options.pop("softcap", None), flex=options.pop("flex", False))
        self.cache = make_cache(num_rows, **options)
        generator = torch.Generator().manual_seed(seed)
        n = sum(map(len, samples))
        kv_heads = options.get("kv_heads", 4)
        shapes = (n, 4, 6), (n, kv_heads, 6), (n, kv_heads, 6)
        self.qkv = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        self.starts = [sum(map(len, samples[:i])) for i in range(len(samples))]

    def whole(self):
        """Without a cache, all at once: what each sample gets."""
        out = naive_attention(*self.qkv, stream(*self.samples).sees, self.options["softcap"])
        return out.split([len(sample) for sample in self.samples])

    def read(self, start, stop, *, noise=0.0, commit=True):
        part = stream(*self.samples, start=start, stop=stop)
        ranges = zip(self.starts, start, stop, strict=True)
        index = torch.cat([torch.arange(first + a, first + b) for first, a, b in ranges])
        q, k, v = (x[index] for x in self.qkv)
        view = self.cache.view(self.rows, part.layout)
        out = attend(q, k + noise, v + noise, part.layout, cache=view, **self.options)
        if commit:
            self.cache.commit(self.rows, part.layout.lengths)
        return out.split(part.layout.lengths)


RAGGED = ["ttAAAtBBt", "AAtt", "tB", "ttttttAAA"]
PLACES = {"in order": [0, 1, 2, 3], "reversed": [3, 2, 1, 0], "scattered": [5, 1, 4, 0]}


@pytest.mark.parametrize("rows", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("options", [dict(), dict(kv_heads=2, softcap=2.0), dict(flex=True)], ids=str)
@torch.no_grad()
def test_reading_in_two_parts_is_reading_at_once(rows, options):
    places = [cuts(sample) for sample in RAGGED]
    for turn in range(max(map(len, places))):
        reader = Reader(RAGGED, rows=rows, num_rows=6, **options)
        cut = [place[turn % len(place)] for place in places]
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
    q, k, v = torch.randn(3, 3, 4, 6, dtype=torch.float64).unbind()
    layout = stream("AAA").layout
    torch.testing.assert_close(
        attend(q, k, v, layout, cache=view), naive_attention(q, k, v, layout.dense()), rtol=0, atol=1e-10
    )


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


@torch.no_grad()
def test_a_cache_of_other_precision_rounds_keys_and_values_only():
    samples = ["ttAAt"]
    exact, rounded = (Reader(samples, rows=[0], num_rows=1, dtype=dtype) for dtype in (torch.float64, torch.float16))
    rounded.qkv[1:] = exact.qkv[1:] = [x.half().double() for x in exact.qkv[1:]]
    for reader in (exact, rounded):
        reader.read([0], [2])
    assert torch.equal(exact.read([2], [5])[0], rounded.read([2], [5])[0])
    assert torch.equal(*(reader.cache.keys[0][0, :, :5].double() for reader in (exact, rounded)))
