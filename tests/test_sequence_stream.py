"""One row of tokens for any batch: every field against worked examples and against a loop over tokens."""

import pickle
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion_pytorch.sequence.samples import Modality, Text, mark
from transfusion_pytorch.sequence.stream import Past, TokenStream, pack, pad_stream
from transfusion_pytorch.sequence.vocabulary import Vocabulary

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=25)
VOCABULARY = Vocabulary(num_text=10, num_modalities=3)
FIELDS = ("token", "sample", "modulation_index", "position", "end", "label")


def text(*ids):
    return Text(torch.tensor(ids, dtype=torch.long))


def image(*shape, kind=0, is_captioned=False):
    return Modality(kind, torch.zeros(*shape, 4), is_captioned)


def halved(modality, shape):
    """What a U-Net half does to modality 1."""
    return tuple(-(-size // 2) for size in shape) if modality == 1 else shape


TEXTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda ids: text(*ids))
MODALITIES = st.builds(
    lambda kind, shape, is_captioned: image(*shape, kind=kind, is_captioned=is_captioned),
    st.integers(0, 2),
    st.lists(st.integers(1, 3), max_size=3),
    st.booleans(),
)
SAMPLES = st.lists(st.lists(TEXTS | MODALITIES, min_size=1, max_size=4), min_size=1, max_size=3)
PASTS = st.builds(Past, st.integers(0, 9), st.integers(0, 9))


def marked(samples):
    return [mark(sample, VOCABULARY) for sample in samples]


def token_by_token(samples, pasts, token_shape, ignore_index):
    """`pack` as one would write it without vectors: a row for each token, in the order of `FIELDS`."""
    rows, spans = [], 0
    for i, (sample, (length, position)) in enumerate(zip(samples, pasts, strict=True)):
        for piece in sample:
            if isinstance(piece, Text):
                for token in piece.ids.tolist():
                    length, position = length + 1, position + 1
                    rows.append((token, i, 0, position - 1, length))
            else:
                size = prod(token_shape(piece.type, piece.shape))
                length, position = length + size, position + 1
                spans += 1
                rows += [(0, i, spans, position - 1, length)] * size
    columns = dict(zip(FIELDS, map(list, zip(*rows, strict=True)), strict=False))
    labels = [b[0] if a[1] == b[1] and a[2] == b[2] == 0 else ignore_index for a, b in pairwise(rows)]
    return columns | {"label": [*labels, ignore_index]}


def columns(stream):
    return {field: getattr(stream, field).tolist() for field in FIELDS}


# worked examples


def test_every_field_of_the_documented_example():
    stream = pack([[text(5, 6), image(3), text(7)]])
    assert columns(stream) == {
        "token": [5, 6, 0, 0, 0, 7],
        "sample": [0, 0, 0, 0, 0, 0],
        "modulation_index": [0, 0, 1, 1, 1, 0],
        "position": [0, 1, 2, 2, 2, 3],
        "end": [1, 2, 5, 5, 5, 6],
        "label": [6, -1, -1, -1, -1, -1],
    }
    assert (stream.lengths, stream.past, len(stream.spans)) == ((6,), (Past(),), 1)


def test_two_samples_start_anew_and_share_one_table_of_spans():
    stream = pack(
        [[image(2, kind=2), text(1, 2)], [text(3), image(), image(2, 1, kind=1), text(4, 5)]], ignore_index=-9
    )
    assert columns(stream) == {
        "token": [0, 0, 1, 2, 3, 0, 0, 0, 4, 5],
        "sample": [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        "modulation_index": [1, 1, 0, 0, 0, 2, 3, 3, 0, 0],
        "position": [0, 0, 1, 2, 0, 1, 2, 2, 3, 4],
        "end": [2, 2, 3, 4, 1, 2, 4, 4, 5, 6],
        "label": [-9, -9, 2, -9, -9, -9, -9, -9, 5, -9],
    }
    assert stream.lengths == (4, 6)
    assert stream.last.tolist() == [3, 9]
    assert stream.spans.modality.tolist() == [2, 0, 1]
    assert stream.spans.sample.tolist() == [0, 1, 1]
    assert stream.spans.index.tolist() == [0, 0, 1]
    assert stream.spans.shapes == stream.spans.token_shapes == ((2,), (), (2, 1))


def test_a_sample_continues_after_its_past():
    stream = pack([[text(1, 2)], [image(2), text(3)]], past=[Past(7, 3), Past(5, 5)])
    assert stream.position.tolist() == [3, 4, 5, 5, 6]
    assert stream.end.tolist() == [8, 9, 7, 7, 8]
    assert stream.layout.past == (7, 5)
    assert stream.layout.lengths == stream.lengths == (2, 3)


def test_a_downsampled_span_takes_as_many_slots_as_it_has_tokens():
    stream = pack([[image(4, 6, kind=1), text(1), image(4, kind=0)]], token_shape=halved)
    assert stream.modulation_index.tolist() == [1] * 6 + [0] + [2] * 4
    assert stream.end.tolist() == [6] * 6 + [7] + [11] * 4
    assert stream.spans.shapes == ((4, 6), (4,))
    assert stream.spans.token_shapes == ((2, 3), (4,))
    assert stream.spans.sizes == [24, 4]


def test_marked_samples_say_what_is_captioned():
    """Text follows it, and none stands before."""
    stream = pack([mark([image(2), text(1), image(3)], VOCABULARY), mark([image(2), text(1)], VOCABULARY)])
    assert stream.spans.is_captioned.tolist() == [True, False, True]
    for pieces, expected in (
        ([image(2), image(3), text(1)], [True, True]),
        ([text(1), image(2), text(1), image(3)], [False, False]),
        ([image(2), image(3)], [False, False]),
    ):
        assert pack([mark(pieces, VOCABULARY)]).spans.is_captioned.tolist() == expected


# properties


@QUICK
@given(data=st.data(), samples=SAMPLES, token_shape=st.sampled_from([halved, lambda modality, shape: shape]))
def test_packing_is_a_loop_over_tokens(data, samples, token_shape):
    some = st.lists(PASTS, min_size=len(samples), max_size=len(samples))
    past = data.draw(st.none() | some)
    samples = marked(samples) if data.draw(st.booleans()) else samples
    stream = pack(samples, past=past, ignore_index=-5, token_shape=token_shape)
    pasts = past or [Past()] * len(samples)
    expected = token_by_token(samples, pasts, token_shape, -5)
    assert columns(stream) == expected
    assert all(getattr(stream, field).dtype == torch.long for field in FIELDS)
    assert stream.lengths == tuple(expected["sample"].count(i) for i in range(len(samples)))
    assert stream.past == tuple(pasts)
    assert stream.is_text.tolist() == [index == 0 for index in expected["modulation_index"]]
    assert stream.last.tolist() == [n - 1 for n in torch.tensor(stream.lengths).cumsum(0).tolist()]


@QUICK
@given(samples=SAMPLES)
def test_the_table_of_spans_lists_modalities_in_order(samples):
    stream = pack(samples, token_shape=halved)
    rows = [
        (piece.type, i, k, piece.is_captioned, piece.shape, halved(piece.type, piece.shape))
        for i, sample in enumerate(samples)
        for k, piece in enumerate(piece for piece in sample if isinstance(piece, Modality))
    ]
    spans = stream.spans
    tensors = [spans.modality, spans.sample, spans.index, spans.is_captioned]
    assert list(zip(*(each.tolist() for each in tensors), spans.shapes, spans.token_shapes, strict=True)) == rows
    assert (len(spans), spans.sizes) == (len(rows), [prod(row[4]) for row in rows])
    for kind in range(3):
        assert spans.of_type(kind) == [i for i, row in enumerate(rows) if row[0] == kind]


@QUICK
@given(samples=SAMPLES)
def test_the_slots_of_all_types_are_what_is_no_text(samples):
    stream = pack(samples)
    slots = [stream.slots(kind) for kind in range(3)]
    for kind, of_kind in enumerate(slots):
        assert {index - 1 for index in stream.modulation_index[of_kind].tolist()} == set(stream.spans.of_type(kind))
    assert torch.cat(slots).sort().values.tolist() == (~stream.is_text).nonzero().flatten().tolist()


@QUICK
@given(samples=SAMPLES)
def test_a_label_is_the_next_text_of_the_same_sample(samples):
    stream = pack(marked(samples))
    here = (stream.label != stream.ignore_index).nonzero().flatten()
    there = here + 1
    assert torch.equal(stream.label[here], stream.token[there])
    assert torch.equal(stream.sample[here], stream.sample[there])
    assert stream.is_text[here].all()
    assert stream.is_text[there].all()


def test_what_is_a_condition_is_no_label():
    condition = text(1, 2)._replace(is_learned=False)
    assert pack([[condition, text(3, 4)]]).label.tolist() == [-1, 3, 4, -1]
    assert pack([[text(3, 4), condition]]).label.tolist() == [4, -1, -1, -1]


def test_without_text_there_is_nothing_to_predict():
    assert (pack([[image(2, 2)], [image(3)]]).label == -1).all()


# padding


@QUICK
@given(samples=SAMPLES, missing=st.integers(0, 5))
def test_padding_are_tokens_of_no_sample_that_see_themselves(samples, missing):
    stream = pack(marked(samples))
    length = len(stream.token)
    padded = pad_stream(stream, length + missing)
    assert padded.num_padding == missing
    for field in FIELDS:
        assert torch.equal(getattr(padded, field)[:length], getattr(stream, field))
    assert not padded.modulation_index[length:].any()
    assert (padded.label[length:] == -1).all()
    expected = torch.eye(length + missing, dtype=torch.bool)
    expected[:length, :length] = stream.layout.prepare().intervals.dense()
    assert torch.equal(padded.layout.prepare().intervals.dense(), expected)


def test_more_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="the batch has 3 tokens, more than the token budget of 2"):
        pad_stream(pack([[text(1, 2, 3)]]), 2)


# devices


def test_moving_moves_all_tensors_and_not_what_the_host_needs():
    stream = pack([[text(1), image(2)]])
    assert stream.to("cpu") is stream
    moved = stream.to("meta")
    assert {getattr(moved, field).device.type for field in FIELDS if field != "end"} == {"meta"}
    assert {moved.spans.modality.device.type, moved.placements[0].slots.device.type} == {"meta"}
    assert moved.layout.end.device.type == moved.end.device.type == "cpu", "laid out without waiting for the device"
    assert moved.spans.shapes == stream.spans.shapes


def test_a_stream_is_pickled():
    stream = pack([[text(1), image(2)], [text(3)]])
    assert columns(pickle.loads(pickle.dumps(stream))) == columns(stream)


def test_a_stream_is_frozen():
    stream: TokenStream = pack([[text(1)]])
    with pytest.raises(AttributeError, match="cannot assign"):
        stream.token = stream.label
