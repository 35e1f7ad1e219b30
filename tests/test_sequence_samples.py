"""What users write becomes pieces, or an error that says where, what was expected and what came."""

import copy
import pickle
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion_pytorch.sequence.samples import (
    Condition,
    Modality,
    ModalitySpec,
    Text,
    TypedModality,
    check_finite,
    check_ids,
    check_text_batch,
    find_openings,
    is_typed,
    mark,
    merge_texts,
    parse_batch,
    parse_sample,
    parse_samples,
    strip_markers,
)
from transfusion_pytorch.sequence.stream import pack
from transfusion_pytorch.sequence.vocabulary import Vocabulary, parse_shape

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=60)
VOCABULARY = Vocabulary(num_text=10, num_modalities=2)
SOS, EOS, META, SOM, EOM = VOCABULARY.sos, VOCABULARY.eos, VOCABULARY.meta, VOCABULARY.som, VOCABULARY.eom
TEXT, IMAGE = torch.tensor([1, 2, 3]), torch.randn(2, 3, 4)


def text(*ids):
    return Text(torch.tensor(ids, dtype=torch.long))


def seen(pieces, *, context=False):
    """Pieces as values that compare: ids of text; type, identity and, where asked for, role of a modality."""
    return [
        piece.ids.tolist()
        if isinstance(piece, Text)
        else (piece.type, id(piece.tensor), *([piece.is_captioned] if context else []))
        for piece in pieces
    ]


TEXTS = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(lambda ids: text(*ids))
MODALITIES = st.builds(
    lambda modality, shape: Modality(modality, torch.zeros(*shape, 4)),
    st.integers(0, 1),
    st.lists(st.integers(1, 12), max_size=3),
)
BARE = st.lists(TEXTS | MODALITIES, min_size=1, max_size=5)


# parsing


def test_ints_are_text_floats_are_modality_zero_pairs_are_any_modality():
    [[first, second, third]] = parse_samples([[TEXT, IMAGE, (1, IMAGE)]], 2)
    assert seen([first, second, third], context=True) == [
        [1, 2, 3],
        (0, id(IMAGE), False),
        (1, id(IMAGE), False),
    ]


@pytest.mark.parametrize("part", [TEXT, IMAGE, (1, IMAGE)])
def test_a_lone_part_is_a_sample_of_one_part(part):
    assert seen(parse_samples([part], 2)[0]) == seen(parse_samples(([part],), 2)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32])
def test_text_of_any_integer_becomes_long(dtype):
    [[parsed]] = parse_samples([[torch.tensor([1, 2, 3]).to(dtype)]], 1)
    assert parsed.ids.dtype == torch.long
    assert parsed.ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize("part", [TEXT[None], TEXT[None].int(), torch.tensor([[7]])])
def test_a_batch_of_one_text_is_that_text(part):
    for sample in ([IMAGE, part], [IMAGE, Condition(part)]):
        [[_, parsed]] = parse_samples([sample], 1)
        assert parsed.ids.tolist() == part.flatten().tolist()
        assert parsed.is_learned != isinstance(sample[1], Condition)
    assert seen(parse_samples([part], 1)[0]) == [part.flatten().tolist()]


def test_a_single_id_is_text_of_length_one():
    assert seen(parse_samples([[torch.tensor(7)]], 1)[0]) == [[7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_float_is_a_modality_of_that_dtype(dtype):
    [[parsed]] = parse_samples([[IMAGE.to(dtype)]], 1)
    assert isinstance(parsed, Modality)
    assert parsed.tensor.dtype == dtype


@pytest.mark.parametrize("kind", [int, numpy.int64, numpy.uint8])
def test_a_type_is_any_integer(kind):
    [[parsed]] = parse_samples([[(kind(1), IMAGE)]], 2)
    assert type(parsed.type) is int
    assert parsed.type == 1


TENSOR_EXPECTED = r"expected an integer tensor \(text\), a floating point tensor \(modality 0\) or \(type, tensor\), "
BAD_PARTS = {
    "a python int": (3, TypeError, TENSOR_EXPECTED + "got int"),
    "a python float": (0.5, TypeError, TENSOR_EXPECTED + "got float"),
    "a string": ("hello", TypeError, TENSOR_EXPECTED + "got str"),
    "None": (None, TypeError, TENSOR_EXPECTED + "got NoneType"),
    "a list": ([TEXT], TypeError, TENSOR_EXPECTED + "got list"),
    "an array": (numpy.zeros(3), TypeError, TENSOR_EXPECTED + "got ndarray"),
    "a pair without tensor": ((0, 3.0), TypeError, TENSOR_EXPECTED + r"got \(int, float\)"),
    "a triple": ((0, IMAGE, IMAGE), TypeError, TENSOR_EXPECTED + r"got \(int, Tensor, Tensor\)"),
    "bools": (torch.tensor([True]), TypeError, "text is int64 and modalities are float32 .* got torch.bool"),
    "complex numbers": (IMAGE * 1j, TypeError, "text is int64 and modalities are float32 .* got torch.complex64"),
    "typed complex numbers": ((0, IMAGE * 1j), TypeError, "got torch.complex64"),
    "empty text": (torch.tensor([], dtype=torch.long), ValueError, r"the tensor is empty, of shape \(0,\); leave"),
    "an empty modality": (torch.zeros(4, 0, 2), ValueError, r"the tensor is empty, of shape \(4, 0, 2\); leave"),
    "a batch of texts": (
        torch.ones(2, 3, dtype=torch.long),
        ValueError,
        r"text is \(n,\), \(1, n\), .* got shape \(2, 3\); modalities are float",
    ),
    "text of three axes": (TEXT[None, None], ValueError, r"text is \(n,\), \(1, n\), .* got shape \(1, 1, 3\)"),
    "an unknown type": ((2, IMAGE), ValueError, r"unknown modality type 2, this model has 2 \(from 0\)"),
    "a negative type": ((-1, IMAGE), ValueError, r"unknown modality type -1, this model has 2 \(from 0\)"),
    "a bool for a type": ((True, IMAGE), TypeError, r"an int for its type, got \(bool, Tensor\)"),
    "a numpy bool for a type": ((numpy.bool_(True), IMAGE), TypeError, r"an int for its type, got \(bool_?, Tensor\)"),
    "a float for a type": ((1.0, IMAGE), TypeError, r"an int for its type, got \(float, Tensor\)"),
    "a tuple of parts": ((TEXT, IMAGE), TypeError, r"got \(Tensor, Tensor\); the parts of a sample stand in a list"),
    "typed text": ((1, TEXT), TypeError, "modality 1 must be floating point, got torch.int64; text has no type"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_bad_part_is_refused_by_name(name):
    part, error, message = BAD_PARTS[name]
    with pytest.raises(error, match=f"^sample 1, part 2: .*{message}"):
        parse_samples([[TEXT], [TEXT, IMAGE, part]], 2)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([], ValueError, "the batch is empty, expected at least one sample"),
        ((), ValueError, "the batch is empty"),
        ([[TEXT], []], ValueError, "sample 1 is empty, expected at least one part"),
        ({"text": TEXT}, TypeError, "a batch is a list of samples, got dict"),
        (iter([[TEXT]]), TypeError, "a batch is a list of samples, got list_iterator"),
        ("text", TypeError, "a batch is a list of samples, got str"),
    ],
)
def test_a_bad_batch_is_refused(batch, error, message):
    with pytest.raises(error, match=f"^{message}"):
        parse_samples(batch, 2)


def test_what_the_caller_holds_never_changes():
    parts = [TEXT.clone(), IMAGE.clone(), (1, IMAGE.clone()), torch.tensor([4, SOS, META])]
    samples, before = [parts, [parts[0]]], copy.deepcopy(parts)
    tensors = [part[1] if isinstance(part, tuple) else part for part in parts]
    parsed = parse_samples(samples, 2)
    for pieces in (parsed, [strip_markers(sample, VOCABULARY) for sample in parsed]):
        pack([mark(merge_texts(sample), VOCABULARY) for sample in pieces])
    assert [len(sample) for sample in samples] == [4, 1]
    assert all(now is part for now, part in zip(samples[0], parts, strict=True))
    torch.testing.assert_close(parts, before, rtol=0, atol=0)
    assert all(tensor._version == 0 for tensor in tensors)


# batches of one kind


def test_a_batch_of_ids_is_a_text_in_each_row():
    ids = torch.tensor([[1, 2], [3, 4]])
    for dtype in (torch.long, torch.int32, torch.uint8, torch.uint16):
        assert [seen(sample) for sample in parse_batch(ids.to(dtype), 0, 1, 5)] == [[[1, 2]], [[3, 4]]]


def test_rows_of_ids_are_padded_at_their_end():
    for ignored in (-1, -7):
        ids = torch.tensor([[1, 2, 3], [1, 2, ignored], [4, ignored, ignored], [0, 0, 0]])
        parsed = parse_batch(ids, 0, 1, 5, ignored)
        assert [seen(sample) for sample in parsed] == [[[1, 2, 3]], [[1, 2]], [[4]], [[0, 0, 0]]]
        assert torch.equal(ids[1], torch.tensor([1, 2, ignored]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], [-1, -1]], "sample 1 is empty: all of its ids are -1, which is padding; leave it out"),
        ([[1, 2, 3], [1, -1, 2]], r"sample 1, position 1: -1 \(ignore_index\) is padding, .* only at the end of a row"),
        ([[-1, 2]], r"sample 0, position 0: -1 \(ignore_index\) is padding"),
        ([[1, -1, -1], [1, 9, -1]], "sample 1, position 1: token id 9 is outside the vocabulary, expected 0 to 4"),
        ([[1, -2], [1, 2]], "sample 0, position 1: token id -2 is outside the vocabulary"),
    ],
)
def test_padding_anywhere_else_is_refused(rows, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_batch(torch.tensor(rows), 0, 1, 5)


def test_a_part_with_names_is_a_part_like_any_other():
    image = torch.randn(2, 4)
    part = TypedModality(1, image)
    assert isinstance(part, tuple)
    modality, tensor = part
    assert (modality, part.modality_type, len(part)) == (1, 1, 2)
    assert part.tensor is tensor is image
    assert is_typed(part)
    for sample, is_learned in ((part, True), ([part], True), ([Condition(part)], False)):
        [piece] = parse_sample(sample, 2, "sample 0")
        assert (piece.type, piece.is_learned) == (1, is_learned)
        assert torch.equal(piece.tensor, image)
    for copied in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), part._replace(modality_type=0)):
        assert type(copied) is TypedModality
        assert torch.equal(copied.tensor, image)


def test_a_batch_of_floats_is_an_instance_in_each_row():
    batch = torch.randn(3, 2, 4)
    parsed = parse_batch(batch, 1, 2, 5)
    assert [[piece.type for piece in sample] for sample in parsed] == [[1]] * 3
    assert torch.equal(torch.stack([sample[0].tensor for sample in parsed]), batch)


@pytest.mark.parametrize(
    ("batch", "modality", "error", "message"),
    [
        (torch.rand(4), 0, ValueError, r"a float batch is \(b, ...\), .* got shape \(4,\)"),
        (torch.rand(0, 4), 0, ValueError, r"a float batch is \(b, ...\), .* got shape \(0, 4\)"),
        (torch.rand(2, 4), 2, ValueError, "sample 0: unknown modality type 2, this model has 2"),
        (torch.tensor([1, 2]), 0, ValueError, r"a batch of text is \(b, n\), got shape \(2,\)"),
        (torch.zeros(2, 0, dtype=torch.long), 0, ValueError, r"a batch of text is \(b, n\), got shape \(2, 0\)"),
        (torch.tensor([[1, 10]]), 0, ValueError, "sample 0, position 1: token id 10 is outside .* 0 to 9"),
        (torch.tensor([[True]]), 0, TypeError, "a batch of text is an integer tensor .* got torch.bool"),
        (torch.ones(1, 2) * 1j, 0, TypeError, "a batch of text is an integer tensor .* got torch.complex64"),
    ],
)
def test_a_bad_batch_of_one_kind_is_refused(batch, modality, error, message):
    with pytest.raises(error, match=f"^{message}"):
        parse_batch(batch, modality, 2, 10)


@pytest.mark.parametrize("ids", [[[1, 2]], None, torch.rand(1, 2)])
def test_a_batch_of_text_is_an_integer_tensor(ids):
    with pytest.raises(TypeError, match="a batch of text is an integer tensor"):
        check_text_batch(ids, 10)


# checks


def test_ids_are_held_to_the_vocabulary():
    check_ids(torch.tensor([0, 9]), 10, "here")
    check_ids(torch.tensor([], dtype=torch.long), 10, "here")
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=f"^here: token id {wrong} is outside the vocabulary, expected 0 to 9"):
            check_ids(torch.tensor([3, wrong, 99]), 10, "here")
    with pytest.raises(ValueError, match="outside the vocabulary, which has no text"):
        check_ids(torch.tensor([0]), 0, "here")
    with pytest.raises(ValueError, match=r"^row 1, position 2: token id 10 is outside the vocabulary"):
        check_ids(torch.tensor([[3, 4, 5], [6, 7, 10], [-1, 10, 3]]), 10, "row")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_that_is_not_finite_is_named(value):
    bad = IMAGE.clone()
    bad[1, 2, 3] = value
    check_finite([], [])
    check_finite([IMAGE, IMAGE], ["a", "b"])
    with pytest.raises(ValueError, match=r"^b: the tensor contains NaN or infinity"):
        check_finite([IMAGE, bad, IMAGE, bad], ["a", "b", "c", "d"])


def spec(num_dim=None, channel_first=False):
    return ModalitySpec(1, 4, num_dim, None, channel_first, parse_shape)


@pytest.mark.parametrize("axes", range(4))
@pytest.mark.parametrize("known", [True, False])
def test_channels_go_last_and_back(axes, known):
    shape = (2, 3, 5)[:axes]
    last, first = (spec(axes if known else None, channel_first) for channel_first in (False, True))
    latents = torch.randn(4, *shape)
    assert torch.equal(first.to_channel_last(latents, ""), latents.movedim(0, -1))
    assert torch.equal(first.from_channel_last(first.to_channel_last(latents, "")), latents)
    assert torch.equal(first.from_channel_last(latents.movedim(0, -1)[None], batched=True), latents[None])
    assert torch.equal(last.from_channel_last(last.to_channel_last(latents.movedim(0, -1), "")), latents.movedim(0, -1))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (spec(2), (3, 4), r"takes latents of 2 axes and one of channels, got shape \(3, 4\); a batch is a list"),
        (spec(2), (1, 3, 3, 4), r"takes latents of 2 axes and one of channels, got shape \(1, 3, 3, 4\)"),
        (spec(), (1, 2, 3, 3, 4), r"takes latents of 0 to 3 axes and one of channels, got shape \(1, 2, 3, 3, 4\)"),
        (spec(), (), r"takes latents of 0 to 3 axes and one of channels, got shape \(\)"),
        (spec(0), (3, 4), r"takes latents of 0 axes and one of channels, got shape \(3, 4\)"),
        (spec(), (4, 3), r"of 4 channels, last, got shape \(4, 3\); set channel_first_latent=True"),
        (spec(channel_first=True), (3, 4), r"of 4 channels, first, got shape \(3, 4\); set channel_first_latent=False"),
    ],
)
def test_latents_of_the_wrong_shape_are_refused(spec, shape, message):
    with pytest.raises(ValueError, match=f"^sample 3, part 1: modality 1 .*{message}"):
        spec.to_channel_last(torch.zeros(shape), "sample 3, part 1")


# markers


def test_a_sample_is_framed_by_its_markers():
    two, comma, three = VOCABULARY.encode_chars("2,3").tolist()
    image, vector = Modality(0, IMAGE), Modality(1, torch.zeros(4))
    marked = mark([text(1, 2), image, vector], VOCABULARY)
    assert seen(marked, context=True) == [
        [SOS],
        [1, 2],
        [META, two, comma, three, SOM[0]],
        (0, id(IMAGE), False),
        [EOM[0]],
        [META, SOM[1]],
        (1, id(vector.tensor), False),
        [EOM[1]],
        [EOS],
    ]
    assert seen(mark([text(1)], VOCABULARY, complete=False)) == [[SOS], [1]]


@QUICK
@given(bare=BARE, complete=st.booleans())
def test_stripping_undoes_marking(bare, complete):
    stripped = strip_markers(mark(bare, VOCABULARY, complete=complete), VOCABULARY)
    assert seen(stripped) == seen(merge_texts(bare))


@QUICK
@given(bare=BARE, complete=st.booleans())
def test_marking_undoes_stripping(bare, complete):
    marked = mark(bare, VOCABULARY, complete=complete)
    again = mark(strip_markers(marked, VOCABULARY), VOCABULARY, complete=complete)
    assert seen(merge_texts(again), context=True) == seen(merge_texts(marked), context=True)


@QUICK
@given(bare=BARE, data=st.data())
def test_markers_may_be_there_in_part(bare, data):
    """sos, eos and eom may be missing; of an opening all of it, its end, or all but its end."""
    partial = []
    for piece in bare:
        if isinstance(piece, Text):
            partial.append(piece)
            continue
        opening, closing = VOCABULARY.opening(piece.type, piece.shape), VOCABULARY.closing(piece.type)
        part = data.draw(st.sampled_from([opening, opening[:-1], opening[-1:], opening[:0]]))
        partial += [Text(part), piece, Text(closing if data.draw(st.booleans()) else closing[:0])]
    partial = [text(SOS)] * data.draw(st.booleans()) + partial + [text(EOS)] * data.draw(st.booleans())
    assert seen(strip_markers(partial, VOCABULARY)) == seen(merge_texts(bare))


def test_markers_that_frame_nothing_are_left_alone():
    image, digit = Modality(0, IMAGE), VOCABULARY.first_char
    for ids in ([EOM[0], 1], [1, digit], [1, EOM[1]]):
        assert seen(strip_markers([text(*ids)], VOCABULARY)) == [ids]
    after = [image, text(EOM[1], 1)]
    assert seen(strip_markers(after, VOCABULARY)) == seen(after)


OPENINGS = [
    [META],
    [META, *VOCABULARY.encode_chars("4,").tolist()],
    [META, *VOCABULARY.encode_chars("4,4").tolist(), SOM[0]],
    [META, SOM[1]],
    [SOM[0]],
]


@pytest.mark.parametrize("opening", OPENINGS)
def test_an_opening_at_the_end_stays_and_all_others_go(opening):
    image = Modality(0, IMAGE)
    assert seen(strip_markers([text(1, *opening)], VOCABULARY)) == [[1, *opening]]
    assert seen(strip_markers([text(1), text(*opening)], VOCABULARY)) == [[1, *opening]]
    assert seen(strip_markers([text(*opening, EOS)], VOCABULARY)) == [opening]
    for after in ([text(2)], [image], [Text(TEXT, is_learned=False)], [text(*opening, 2), image]):
        expected = seen(strip_markers([text(1), *after], VOCABULARY))
        assert seen(strip_markers([text(1, *opening), *after], VOCABULARY)) == expected
    assert seen(strip_markers([text(*opening), image, text(EOM[0], *opening, 3)], VOCABULARY)) == seen([image, text(3)])
    assert seen(strip_markers([text(*opening, SOS, *opening)], VOCABULARY)) == [opening]


@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), data=st.data())
def test_openings_without_their_modality_change_nothing_wherever_they_stand(texts, data):
    openings = st.lists(st.sampled_from(OPENINGS), max_size=2).map(lambda many: [i for each in many for i in each])
    cut_off = [text(*data.draw(openings), *piece.ids.tolist()) for piece in texts]
    assert seen(strip_markers(cut_off, VOCABULARY)) == seen(merge_texts(texts))


def test_openings_are_found_from_meta_or_from_som_alone():
    four = VOCABULARY.encode_chars("4").tolist()
    ids = [*four, META, META, *four, *four, 1, META, *four, SOM[1], SOM[0], 2, META]
    found = [ids[opening] for opening in find_openings(ids, VOCABULARY)]
    assert found == [[META], [META, *four, *four], [META, *four, SOM[1]], [SOM[0]], [META]]
    assert list(find_openings([1, EOM[0], *four], VOCABULARY)) == []


def test_sentences_lose_sos_and_eos_wherever_they_stand():
    assert seen(strip_markers([text(SOS, 1, EOS, SOS, 2), text(EOS)], VOCABULARY)) == [[1, 2]]
    assert strip_markers([text(SOS, EOS)], VOCABULARY) == []


def test_neighbouring_texts_are_joined():
    image = Modality(0, IMAGE)
    pieces = [text(1), text(2, 3), image, image, text(4), text(5)]
    assert seen(merge_texts(pieces)) == seen([text(1, 2, 3), image, image, text(4, 5)])
    assert merge_texts([]) == []


@QUICK
@given(bare=BARE)
def test_joining_keeps_the_order_of_everything(bare):
    def flat(pieces):
        return [item for piece in seen(pieces) for item in (piece if isinstance(piece, list) else [piece])]

    merged = merge_texts(bare)
    assert flat(merged) == flat(bare)
    assert not any(isinstance(a, Text) and isinstance(b, Text) for a, b in pairwise(merged))
