"""Noised copies in the stream: where they stand, what they carry, and the second interval of keys in every backend."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_streams import naive_attention, projections
from tiny import tiny
from torch import randn, tensor
from torch.nn.attention.flex_attention import create_block_mask

from transfusion_pytorch import Condition, WithCleanCopy
from transfusion_pytorch.network.attend import plan_attention
from transfusion_pytorch.sequence import masks
from transfusion_pytorch.sequence.blocks import BlockTables, block_tables_with_past

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=40)
MODEL = tiny()
SHAPES = st.lists(st.integers(1, 3), max_size=2)
TEXT = st.integers(1, 4).map(lambda size: torch.arange(size))
IMAGE = SHAPES.map(lambda shape: torch.zeros(*shape, 3))
PART = TEXT | IMAGE | IMAGE.map(Condition) | IMAGE.map(WithCleanCopy) | IMAGE.map(WithCleanCopy)
BATCH = st.lists(st.lists(PART, min_size=1, max_size=5), min_size=1, max_size=4)


def packed(samples, budget=None):
    return MODEL.packer(token_budget=budget)(samples)


def by_definition(stream):
    """Who sees whom, token by token: a copy is a span that is learned while another span has its place."""
    spans, n = stream.spans, len(stream.token)
    whole = stream.modulation_index.tolist()
    first = stream.spans.first_slot.tolist()
    is_copy = [spans.first[row] != first[row] for row in range(len(spans))]
    samples = [*stream.sample[: n - stream.num_padding].tolist(), *range(-stream.num_padding, 0)]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        row = whole[q] - 1
        for k in range(n):
            same_span = whole[q] == whole[k] > 0
            if whole[k] and is_copy[whole[k] - 1]:
                mask[q, k] = same_span
            elif whole[q] and is_copy[row]:
                mask[q, k] = samples[q] == samples[k] and k < first[row]
            else:
                mask[q, k] = samples[q] == samples[k] and (k <= q or same_span)
    return mask


# the layout


def test_the_documented_example():
    """`copies.py` shows it without the shape that is written before an image."""
    batch = packed([[WithCleanCopy(randn(2, 3)), tensor([5])]])
    stream, sos, eom = batch.stream, MODEL.sos_id, MODEL.eom_ids[0]
    opening = MODEL.vocabulary.opening(0, (2,)).tolist()
    k = len(opening) + 1
    assert stream.token.tolist() == [sos, *opening, 0, 0, eom, 5, MODEL.eos_id, 0, 0]
    assert stream.position.tolist() == [*range(k), k, k, k + 1, k + 2, k + 3, k, k]
    assert stream.modulation_index.tolist() == [0] * k + [1, 1, 0, 0, 0, 2, 2]
    assert stream.end.tolist() == [*range(1, k + 1), k + 2, k + 2, k + 3, k + 4, k + 5, k + 2, k + 2]
    assert (stream.label[:k].tolist(), stream.label[k:].tolist()) == (
        [*opening, -1],
        [-1, -1, 5, MODEL.eos_id, -1, -1, -1],
    )
    assert (stream.lengths, stream.layout.lengths) == ((k + 5,), (k + 5, 2))
    assert stream.spans.is_learned.tolist() == [False, True]
    assert (stream.spans.first, stream.spans.first_slot.tolist()) == ((k, k + 5), [k, k])
    assert (batch.num_tokens, MODEL.packer().num_tokens([WithCleanCopy(randn(2, 3)), tensor([5])])) == (k + 7, k + 7)
    assert batch.times.isnan().tolist() == [False, True]
    assert stream.placements[0].source.tolist() == [0, 1, 0, 1]


@QUICK
@given(samples=BATCH)
def test_samples_lie_in_front_as_they_do_without_copies(samples):
    plain = [[part.part if isinstance(part, WithCleanCopy) else part for part in sample] for sample in samples]
    ours, theirs = packed(samples).stream, packed(plain).stream
    n = len(theirs.token)
    for name in ("token", "sample", "modulation_index", "position", "label", "end"):
        assert torch.equal(getattr(ours, name)[:n], getattr(theirs, name)), name
    ours_runs, theirs_runs = ([run[:3] for run in each.layout.runs] for each in (ours, theirs))
    assert ours_runs[: len(theirs_runs)] == theirs_runs
    assert ours.lengths == theirs.lengths
    assert len(ours.token) == sum(map(MODEL.packer().num_tokens, samples))
    copies = sum(isinstance(part, WithCleanCopy) for sample in samples for part in sample)
    assert len(ours.spans) == len(theirs.spans) + copies
    assert int(ours.spans.is_learned.sum()) == int(theirs.spans.is_learned.sum())


def test_a_batch_without_copies_has_nothing_of_them():
    batch = packed([[tensor([1]), randn(2, 2, 3)], [tensor([2, 3])]], budget=64)
    layout = batch.stream.layout
    assert (layout.past_slots, layout.intervals.past, batch.stream.placements[0].source) == ({}, None, None)
    assert all(run.past is None for run in layout.runs)
    assert layout.intervals.mask_mod().__code__ is masks.visible(layout.end, layout.end).__code__


def test_random_numbers_are_those_of_the_span_that_is_copied():
    batch = [[tensor([1, 2]), randn(2, 3), tensor([3]), (1, randn(3, 2)), randn(4, 3), tensor([4])]]
    marked = [
        [
            part if isinstance(part, torch.Tensor) and not part.is_floating_point() else WithCleanCopy(part)
            for part in batch[0]
        ]
    ]
    plain, copied = (MODEL.packer()(samples, seeds=[5]) for samples in (batch, marked))
    assert torch.equal(copied.time_number[3:], plain.time_number)
    assert torch.equal(copied.noise[0][6:], plain.noise[0])
    assert torch.equal(copied.noise[1][3:], plain.noise[1])
    assert torch.equal(copied.drop_text_number, plain.drop_text_number)
    two = MODEL.packer()([[tensor([7])], *marked], seeds=[1, 5])
    assert torch.equal(two.time_number, copied.time_number)
    assert torch.equal(two.noise[0], copied.noise[0])


def test_text_that_conditions_any_copy_may_be_dropped_and_nothing_else():
    parts = [tensor([1, 2]), randn(2, 3), tensor([3]), randn(1, 3), tensor([4, 5])]
    marked = [part if part.dtype == torch.long else WithCleanCopy(part) for part in parts]
    plain, copied = packed([parts]), packed([marked])
    n = len(plain.is_droppable)
    assert plain.stream.token[plain.is_droppable].tolist() == [1, 2, 3]
    for batch in (copied, copied.with_times(copied.times)):
        assert torch.equal(batch.is_droppable[:n], plain.is_droppable)
        assert not batch.is_droppable[n:].any()
        assert torch.equal(batch.targets.is_droppable, plain.targets.is_droppable)
    last_alone = copied.with_times(tensor([1.0, 1.0, 1.0, 0.5]))
    assert last_alone.stream.token[last_alone.is_droppable].tolist() == [1, 2, 3]
    first_alone = copied.with_times(tensor([1.0, 1.0, 0.5, 1.0]))
    assert first_alone.stream.token[first_alone.is_droppable].tolist() == [1, 2]


def test_what_is_copied_is_noised_to_any_degree_and_never_clean_by_chance():
    """Neither the limit for captioned images nor their clean half: the caption sees them clean anyway."""
    captioned = [randn(2, 3), tensor([1])]
    pack = MODEL.packer()
    assert pack([captioned]).stream.spans.is_captioned.tolist() == [True]
    assert pack([[WithCleanCopy(captioned[0]), captioned[1]]]).stream.spans.is_captioned.tolist() == [False, False]


# who sees whom


@QUICK
@given(samples=BATCH, padding=st.sampled_from([None, 0, 5]))
def test_masks_are_those_of_the_definition(samples, padding):
    budget = None if padding is None else packed(samples).num_tokens + padding
    stream = packed(samples, budget).stream
    expected = by_definition(stream)
    assert torch.equal(stream.layout.prepare().intervals.dense(), expected)
    seen = torch.zeros_like(expected)
    for run in stream.layout.runs:
        length = (run.tokens.stop - run.tokens.start) // (run.samples.stop - run.samples.start)
        for first in range(run.tokens.start, run.tokens.stop, length):
            own = torch.arange(first, first + length)
            keys = own if run.past is None else torch.cat((torch.arange(run.past.start, run.past.stop), own))
            for queries, num_keys, is_causal, mask in run.chunks:
                rows = own[queries]
                part = torch.ones(len(rows), num_keys, dtype=torch.bool)
                if is_causal:
                    part = part.tril()
                elif mask is not None:
                    part = mask[(first - run.tokens.start) // length if len(mask) > 1 else 0, 0]
                seen[rows[:, None], keys[None, :num_keys]] = part
    assert torch.equal(seen, expected)
    assert expected.sum() == stream.layout.end.sum()


@QUICK
@given(samples=BATCH, padding=st.integers(0, 9), block=st.integers(1, 20))
def test_block_tables_are_those_of_the_whole_mask(samples, padding, block):
    stream = packed([*samples, [WithCleanCopy(torch.zeros(2, 3))]]).stream
    stream = packed([*samples, [WithCleanCopy(torch.zeros(2, 3))]], len(stream.token) + padding).stream
    intervals, n = stream.layout.prepare().intervals, len(stream.token)
    made = block_tables_with_past(
        intervals.start.long(), intervals.end.long(), tuple(each.long() for each in intervals.past), block
    )
    expected = create_block_mask(intervals.mask_mod(), None, None, n, n, device="cpu", BLOCK_SIZE=block)
    theirs = BlockTables(*(getattr(expected, name)[0, 0] for name in BlockTables._fields))
    assert listed(made) == listed(theirs)
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in made)
    assert all(((indices >= 0) & (indices < -(-n // block))).all() for indices in made[1::2])


def listed(tables):
    """For each of the four tables, and each row of it, the blocks that count."""
    return [
        [row[:count] for row, count in zip(indices.tolist(), counts.tolist(), strict=True)]
        for counts, indices in zip(tables[::2], tables[1::2], strict=True)
    ]


LONG = [
    [
        torch.zeros(300, dtype=torch.long),
        WithCleanCopy(torch.zeros(20, 15, 3)),
        tensor([1]),
        WithCleanCopy(torch.zeros(530, 3)),
    ]
]
MIXED = [
    [tensor([1, 2]), WithCleanCopy(torch.zeros(2, 2, 3)), WithCleanCopy(torch.zeros(2, 2, 3)), tensor([3])],
    [tensor([4, 5])],
    [WithCleanCopy(torch.zeros(1, 3)), torch.zeros(3, 3)],
    [tensor([4, 5])],
]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["ragged", "dense"])
@pytest.mark.parametrize(
    ("samples", "budget"), [(MIXED, None), (MIXED, 128), (LONG, None)], ids=["mixed", "padded", "long"]
)
def test_every_backend_computes_the_definition_and_its_gradients(samples, budget, kind, softcap):
    layout = packed(samples, budget).stream.layout
    inputs = projections(len(layout.end), kv_heads=2, requires_grad=True)
    expected = naive_attention(
        *inputs,
        by_definition(packed(samples, budget).stream) if samples is MIXED else layout.prepare().intervals.dense(),
        softcap,
    )
    out = plan_attention(layout, kind=kind).attend(*inputs, softcap=softcap)
    grad = randn(out.shape, dtype=out.dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    made, wanted = (torch.autograd.grad(each, inputs, grad) for each in (out, expected))
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_past_add_up_in_any_precision(dtype):
    layout = packed(MIXED).stream.layout
    inputs = projections(len(layout.end), kv_heads=2, dtype=dtype, requires_grad=True)
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    out, expected = plan_attention(layout).attend(*inputs), naive_attention(*exact, layout.prepare().intervals.dense())
    for leaf, made, wanted in zip(
        inputs, torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert made.dtype == leaf.dtype
        assert (made.double() - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("samples", [MIXED, LONG], ids=["mixed", "long"])
def test_flex_attention_takes_the_tables(samples):
    layout = packed(samples, None).stream.layout
    q, k, v = projections(len(layout.end), kv_heads=2, dtype=torch.float32)
    flex, dense = (plan_attention(layout, kind=kind).attend(q, k, v) for kind in ("flex", "dense"))
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-5)


def test_a_copy_gets_no_mask_and_no_rows_of_other_samples():
    layout = packed(MIXED).stream.layout
    for run in layout.runs:
        if run.past is not None:
            [chunk] = run.chunks
            assert chunk.mask is None
            assert chunk.num_keys == run.past.stop - run.past.start + run.tokens.stop - run.tokens.start


def test_intervals_travel_with_the_batch():
    batch = pickle.loads(pickle.dumps(MODEL.packer(token_budget=128)(MIXED)))
    moved = batch.to("meta").stream.layout.intervals
    assert all(bound.is_meta for bound in moved.past)
    assert batch.stream.placements[0].source.dtype == torch.int64
