"""One row of tokens for any batch: every field against worked examples and against a loop over tokens."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion_pytorch.sequence.samples import Modality, Text, mark
from transfusion_pytorch.sequence.stream import Past, TokenStream, pack
from transfusion_pytorch.sequence.vocabulary import Vocabulary

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=25)
VOCABULARY = Vocabulary(num_text=10, num_modalities=3)
FIELDS = ("token", "sample", "span", "position", "end", "label")


def text(*ids):
    return Text(torch.tensor(ids, dtype=torch.long))


def image(*shape, kind=0, is_context=False):
    return Modality(kind, torch.zeros(*shape, 4), is_context)


def halved(modality, shape):
    """What a U-Net half does to modality 1."""
    return tuple(-(-size // 2) for size in shape) if modality == 1 else shape


TEXTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda ids: text(*ids))
MODALITIES = st.builds(
    lambda kind, shape, is_context: image(*shape, kind=kind, is_context=is_context),
    st.integers(0, 2),
    st.lists(st.integers(1, 3), max_size=3),
    st.booleans(),
)
SAMPLES = st.lists(st.lists(TEXTS | MODALITIES, min_size=1, max_size=4), min_size=1, max_size=3)
PASTS = st.builds(Past, st.integers(0, 9), st.integers(0, 9))


def marked(samples):
    return [mark(sample, VOCABULARY) for sample in samples]


def token_by_token(samples, pasts, token_shape, ignore_index):
    """`pack` as one would write it without vectors: a row (token, sample, span, position, end) for each token."""
    rows, spans = [], 0
    for i, (sample, (length, position)) in enumerate(zip(samples, pasts, strict=True)):
        for piece in sample:
            if isinstance(piece, Text):
                for token in piece.ids.tolist():
                    length, position = length + 1, position + 1
                    rows.append((token, i, -1, position - 1, length))
            else:
                size = prod(token_shape(piece.type, piece.shape))
                length, position = length + size, position + 1
                rows += [(0, i, spans, position - 1, length)] * size
                spans += 1
    columns = dict(zip(FIELDS, map(list, zip(*rows, strict=True)), strict=False))
    labels = [b[0] if a[1] == b[1] and a[2] == b[2] == -1 else ignore_index for a, b in pairwise(rows)]
    return columns | {"label": [*labels, ignore_index]}


def columns(stream):
    return {field: getattr(stream, field).tolist() for field in FIELDS}


# worked examples


def test_every_field_of_the_documented_example():
    stream = pack([[text(5, 6), image(3), text(7)]])
    assert columns(stream) == {
        "token": [5, 6, 0, 0, 0, 7],
        "sample": [0, 0, 0, 0, 0, 0],
        "span": [-1, -1, 0, 0, 0, -1],
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
        "span": [0, 0, -1, -1, -1, 1, 2, 2, -1, -1],
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
    assert stream.span.tolist() == [0] * 6 + [-1] + [1] * 4
    assert stream.end.tolist() == [6] * 6 + [7] + [11] * 4
    assert stream.spans.shapes == ((4, 6), (4,))
    assert stream.spans.token_shapes == ((2, 3), (4,))
    assert stream.spans.sizes == [24, 4]


def test_marked_samples_say_what_is_context():
    stream = pack([mark([image(2), text(1), image(3)], VOCABULARY), mark([image(2), text(1)], VOCABULARY)])
    assert stream.spans.is_context.tolist() == [True, False, True]


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
    assert stream.is_text.tolist() == [span < 0 for span in expected["span"]]
    assert stream.last.tolist() == [n - 1 for n in torch.tensor(stream.lengths).cumsum(0).tolist()]


@QUICK
@given(samples=SAMPLES)
def test_the_table_of_spans_lists_modalities_in_order(samples):
    stream = pack(samples, token_shape=halved)
    rows = [
        (piece.type, i, k, piece.is_context, piece.shape, halved(piece.type, piece.shape))
        for i, sample in enumerate(samples)
        for k, piece in enumerate(piece for piece in sample if isinstance(piece, Modality))
    ]
    spans = stream.spans
    tensors = [spans.modality, spans.sample, spans.index, spans.is_context]
    assert list(zip(*(each.tolist() for each in tensors), spans.shapes, spans.token_shapes, strict=True)) == rows
    assert (len(spans), spans.sizes) == (len(rows), [prod(row[4]) for row in rows])
    for kind in range(3):
        assert spans.of_type(kind) == [i for i, row in enumerate(rows) if row[0] == kind]
        assert spans.shapes_of(kind) == [row[4] for row in rows if row[0] == kind]


@QUICK
@given(samples=SAMPLES)
def test_the_slots_of_all_types_are_what_is_no_text(samples):
    stream = pack(samples)
    slots = [stream.slots(kind) for kind in range(3)]
    for kind, of_kind in enumerate(slots):
        assert set(stream.span[of_kind].tolist()) == set(stream.spans.of_type(kind))
    assert torch.cat(slots).sort().values.tolist() == (~stream.is_text).nonzero().flatten().tolist()


def labelled(stream):
    return (stream.label != stream.ignore_index).nonzero().flatten()


@QUICK
@given(samples=SAMPLES, data=st.data())
def test_a_label_is_the_next_text_of_the_same_sample(samples, data):
    dropped = torch.tensor([data.draw(st.booleans()) for _ in samples])
    for stream in (packed := pack(marked(samples)), packed.drop_text(dropped, num_text=10, null=VOCABULARY.null)):
        here = labelled(stream)
        there = here + 1
        assert torch.equal(stream.label[here], stream.token[there])
        assert torch.equal(stream.sample[here], stream.sample[there])
        assert stream.is_text[here].all()
        assert stream.is_text[there].all()
        assert not (stream.label == VOCABULARY.null).any()
        assert not (stream.token[here] == VOCABULARY.null).any()


def test_without_text_there_is_nothing_to_predict():
    assert not len(labelled(pack([[image(2, 2)], [image(3)]])))


# guidance: dropping text


def test_text_before_a_modality_is_dropped_and_only_that():
    sample = mark([text(1, 2), image(2), text(3)], VOCABULARY)
    before, null = pack([sample, sample]), VOCABULARY.null
    after = before.drop_text(torch.tensor([False, True]), num_text=10, null=null)
    half = len(before.token) // 2
    assert torch.equal(after.token[:half], before.token[:half])
    assert torch.equal(after.label[:half], before.label[:half])
    sos, meta, two, som = VOCABULARY.sos, VOCABULARY.meta, VOCABULARY.first_char + 2, VOCABULARY.som[0]
    eom, eos = VOCABULARY.eom[0], VOCABULARY.eos
    assert after.token[half:].tolist() == [sos, null, null, meta, two, som, 0, 0, eom, 3, eos]
    assert after.label[half:].tolist() == [-1, -1, -1, two, som, -1, -1, -1, 3, eos, -1]


@QUICK
@given(samples=SAMPLES, data=st.data())
def test_dropping_is_a_loop_over_tokens(samples, data):
    dropped = [data.draw(st.booleans()) for _ in samples]
    before, null = pack(marked(samples)), VOCABULARY.null
    token, label, sample = before.token.tolist(), before.label.tolist(), before.sample.tolist()
    after = before.drop_text(torch.tensor(dropped), num_text=10, null=null)
    latents = [i for i, is_text in enumerate(before.is_text.tolist()) if not is_text]
    goes = [
        dropped[sample[i]]
        and i not in latents
        and token[i] < 10
        and any(j > i and sample[j] == sample[i] for j in latents)
        for i in range(len(token))
    ]
    assert after.token.tolist() == [null if gone else kept for kept, gone in zip(token, goes, strict=True)]
    hidden = [here or there for here, there in zip(goes, [*goes[1:], False], strict=True)]
    assert after.label.tolist() == [-1 if gone else kept for kept, gone in zip(label, hidden, strict=True)]
    assert (before.token.tolist(), before.label.tolist()) == (token, label)
    for field in ("sample", "span", "position", "end"):
        assert torch.equal(getattr(after, field), getattr(before, field))


def test_what_has_no_modality_after_it_is_never_dropped():
    everywhere = torch.tensor([True, True])
    for pieces in ([text(1, 2)], [image(2), text(1, 2)]):
        before = pack([mark(pieces, VOCABULARY)] * 2)
        after = before.drop_text(everywhere, num_text=10, null=VOCABULARY.null)
        assert columns(after) == columns(before)


# devices


def test_moving_moves_the_tokens_and_not_the_table():
    stream = pack([[text(1), image(2)]])
    assert stream.to("cpu") is stream
    moved = stream.to("meta")
    assert {getattr(moved, field).device.type for field in FIELDS if field != "end"} == {"meta"}
    assert moved.layout.device.type == "meta"
    assert moved.layout.end.device.type == moved.end.device.type == "cpu", "laid out without waiting for the device"
    assert moved.spans is stream.spans


def test_a_stream_is_frozen():
    stream: TokenStream = pack([[text(1)]])
    with pytest.raises(AttributeError, match="cannot assign"):
        stream.token = stream.label
