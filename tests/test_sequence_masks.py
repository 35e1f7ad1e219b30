"""Who sees whom, in every form that a backend gets, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from transfusion_pytorch.sequence import masks
from transfusion_pytorch.sequence.masks import Layout

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=40)
SAMPLE = st.lists(st.integers(1, 4), min_size=1, max_size=6)  # sizes of what sees itself as a whole: text is of size 1
BATCH = st.lists(SAMPLE, min_size=1, max_size=4)


def layout_of(batch, past=None):
    """A layout of samples given as sizes: [1 1 3 1] is two texts, a span of three latents, and a text."""
    past = past or [0] * len(batch)
    end = [before + sum(sizes[: i + 1]) for before, sizes in zip(past, batch, strict=True) for i in whole(sizes)]
    return Layout(torch.tensor(end), tuple(map(sum, batch)), tuple(past))


def whole(sizes):
    """Which whole each token is part of: [1 1 3 1] -> [0 1 2 2 2 3]."""
    return [i for i, size in enumerate(sizes) for _ in range(size)]


def by_definition(sizes, past=0):
    """A token sees the past, its sample up to itself, and the rest of its span."""
    of = whole(sizes)
    rows = [[True] * past + [k <= q or of[k] == of[q] for k in range(len(of))] for q in range(len(of))]
    return torch.tensor(rows)


def masks_of_runs(layout):
    """The dense mask of each sample, put together again from the chunks of its run."""
    dense = []
    for run in layout.runs:
        count = run.samples.stop - run.samples.start
        length = (run.tokens.stop - run.tokens.start) // count
        keys = length + max(layout.past[run.samples])
        seen = torch.zeros(count, length, keys, dtype=torch.bool)
        for chunk in run.chunks:
            size = chunk.queries.stop - chunk.queries.start
            if chunk.is_causal:
                assert chunk.mask is None
                part = torch.ones(size, chunk.num_keys, dtype=torch.bool).tril()
            else:
                part = torch.ones(1, chunk.num_keys, dtype=torch.bool) if chunk.mask is None else chunk.mask[:, 0]
            seen[:, chunk.queries, : chunk.num_keys] = part
        dense += [seen[i, :, : length + layout.past[run.samples.start + i]] for i in range(count)]
        assert not any(seen[i, :, length + layout.past[run.samples.start + i] :].any() for i in range(count))
    return dense


def check(batch, past=None):
    layout = layout_of(batch, past)
    samples = list(zip(layout.past, batch, strict=True))
    expected = [by_definition(sizes, before) for before, sizes in samples]
    for made, definition in zip(masks_of_runs(layout), expected, strict=True):
        assert torch.equal(made, definition)
    for run in layout.runs:
        for chunk in run.chunks:
            parts = [definition[chunk.queries, : chunk.num_keys] for definition in expected[run.samples]]
            sees_all = all(part.shape[1] == chunk.num_keys and bool(part.all()) for part in parts)
            assert (chunk.mask is None) == (sees_all or chunk.is_causal)
            if chunk.is_causal:
                assert all(before == 0 and set(sizes) == {1} for before, sizes in samples[run.samples])
    return layout


def test_the_documented_interval():
    assert layout_of([[1, 1, 3, 1]]).end.tolist() == [1, 2, 5, 5, 5, 6]
    assert by_definition([1, 2], past=1).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


@QUICK
@given(batch=BATCH)
def test_a_whole_stream_is_blocks_of_the_definition(batch):
    layout = check(batch)
    dense = torch.block_diag(*map(by_definition, batch)).bool()
    intervals = layout.prepare().intervals
    assert torch.equal(intervals.dense(), dense)
    n = len(layout.end)
    assert torch.equal(create_mask(intervals.mask_mod(), None, None, n, n, device="cpu")[0, 0], dense)


@QUICK
@given(batch=BATCH, data=st.data())
def test_every_sample_sees_its_own_past(batch, data):
    check(batch, [data.draw(st.integers(0, 5)) for _ in batch])


@QUICK
@given(batch=BATCH, data=st.data(), long_row=st.integers(1, 8), query_chunk=st.integers(1, 5))
def test_chunks_of_long_rows_cover_the_same_mask(batch, data, long_row, query_chunk):
    past = data.draw(st.none() | st.just([data.draw(st.integers(0, 3)) for _ in batch]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "LONG_ROW", long_row)
        patch.setattr(masks, "QUERY_CHUNK", query_chunk)
        layout = check(batch, past)
    for run in layout.runs:
        length = layout.lengths[run.samples.start]
        queries = [q for chunk in run.chunks for q in range(chunk.queries.start, chunk.queries.stop)]
        assert queries == list(range(length))
        assert len(run.chunks) == 1 or length > long_row
        assert length <= long_row or run.chunks[0].is_causal or len(run.chunks) == -(-length // query_chunk)


def test_keys_of_a_long_row_are_cut_at_the_furthest_that_a_chunk_sees():
    length, span = masks.LONG_ROW + masks.QUERY_CHUNK // 2, 100
    sizes = [1] * 200 + [span] + [1] * (length - 200 - span)
    layout = check([sizes, sizes])
    [run] = layout.runs
    assert [chunk.num_keys for chunk in run.chunks] == [300, 512, length]
    assert [chunk.mask.shape for chunk in run.chunks] == [(1, 1, 256, 300), (1, 1, 256, 512), (1, 1, 128, length)]


@pytest.mark.parametrize("length", [1, 5, masks.LONG_ROW, masks.LONG_ROW + 9])
def test_plain_text_is_causal_in_one_piece(length):
    [run] = check([[1] * length] * 2).runs
    assert run.chunks == [(slice(0, length), length, True, None)]


def test_text_that_continues_a_past_is_not_causal():
    [run] = check([[1, 1]], [3]).runs
    [chunk] = run.chunks
    assert not chunk.is_causal
    assert chunk.mask.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


@pytest.mark.parametrize("past", [0, 4])
def test_a_lone_span_needs_no_mask(past):
    [run] = check([[5]] * 3, [past] * 3).runs
    assert run.chunks == [(slice(0, 5), 5 + past, False, None)]


def test_a_step_of_rows_with_one_past_needs_no_mask_and_with_several_needs_a_row_each():
    [chunk] = check([[1]] * 3, [4, 4, 4]).runs[0].chunks
    assert (chunk.num_keys, chunk.mask) == (5, None)
    [chunk] = check([[1]] * 3, [4, 0, 2]).runs[0].chunks
    assert chunk.mask.shape == (3, 1, 1, 5)
    assert chunk.mask.sum(-1).flatten().tolist() == [5, 1, 3]


def test_samples_that_look_alike_share_one_mask():
    [run] = check([[1, 2, 1]] * 4).runs
    assert run.chunks[0].mask.shape == (1, 1, 4, 4)
    [run] = check([[1, 2, 1], [2, 1, 1]]).runs
    assert run.chunks[0].mask.shape == (2, 1, 4, 4)


def test_neighbours_of_one_length_are_a_run():
    layout = check([[1, 2], [3], [1], [2, 1]])
    assert [(run.samples, run.tokens) for run in layout.runs] == [
        (slice(0, 2), slice(0, 6)),
        (slice(2, 3), slice(6, 7)),
        (slice(3, 4), slice(7, 10)),
    ]
    assert [(run.samples, run.tokens) for run in layout.runs_in((4, 5, 9, 0))] == [
        (slice(0, 2), slice(0, 6)),
        (slice(2, 3), slice(6, 7)),
        (slice(3, 4), slice(7, 10)),
    ]
    assert [run.samples for run in layout.runs_in((5, 4, 6, 7))] == [slice(i, i + 1) for i in range(4)]
    assert layout.start.tolist() == [0, 0, 0, 3, 3, 3, 6, 7, 7, 7]
