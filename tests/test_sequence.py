"""Vocabulary and positions: ids that never meet, shapes that survive being written, turns of the plane."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion_pytorch.sequence.positions import axial_coordinates, rotary_phases, rotate
from transfusion_pytorch.sequence.vocabulary import ALPHABET, Vocabulary, format_shape, parse_shape

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=50)
VOCABULARIES = [Vocabulary(0, 1), Vocabulary(10, 1), Vocabulary(256, 3)]
SHAPES = st.lists(st.integers(1, 10_000), max_size=3).map(tuple)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_follow_each_other_without_gap_or_overlap(vocabulary):
    markers = [vocabulary.sos, vocabulary.eos, vocabulary.meta, *vocabulary.som, *vocabulary.eom]
    ids = [*range(vocabulary.num_text), *markers, *vocabulary.encode_chars(ALPHABET).tolist(), vocabulary.null]
    assert ids == list(range(vocabulary.size))
    assert len(vocabulary.som) == len(vocabulary.eom) == vocabulary.num_modalities


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_null_is_read_but_never_written(vocabulary):
    assert vocabulary.null == vocabulary.num_logits == vocabulary.size - 1
    assert not vocabulary.is_char(vocabulary.null)


def test_the_documented_vocabulary():
    vocabulary = Vocabulary(num_text=10, num_modalities=1)
    assert (vocabulary.sos, vocabulary.eos, vocabulary.meta) == (10, 11, 12)
    assert (vocabulary.som, vocabulary.eom, vocabulary.first_char, vocabulary.null) == ((13,), (14,), 15, 26)
    assert vocabulary.opening(0, (4, 6)).tolist() == [12, 19, 25, 21, 13]
    assert vocabulary.closing(0).tolist() == [14]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_only_the_alphabet_is_made_of_chars(vocabulary):
    chars = [token for token in range(vocabulary.size) if vocabulary.is_char(token)]
    assert "".join(map(vocabulary.char, chars)) == ALPHABET


@QUICK
@given(shape=SHAPES, modality=st.integers(0, 2))
def test_what_opens_a_modality_spells_its_shape(shape, modality):
    vocabulary = Vocabulary(10, 3)
    meta, *chars, som = vocabulary.opening(modality, shape).tolist()
    assert (meta, som) == (vocabulary.meta, vocabulary.som[modality])
    written = vocabulary.decode_chars(torch.tensor(chars, dtype=torch.long))
    assert written == format_shape(shape)
    assert parse_shape(written) == shape


@QUICK
@given(text=st.text(ALPHABET))
def test_chars_survive_a_round_trip(text):
    vocabulary = Vocabulary(10, 2)
    assert vocabulary.decode_chars(vocabulary.encode_chars(text)) == text


@pytest.mark.parametrize(
    "text", ["0", "4,0", ",", "3,", ",3", "3,,5", "-1", "+1", "1.5", " 3", "3 4", "a", "²", "٣", "1_0"]
)
def test_what_is_no_shape_is_none(text):
    assert parse_shape(text) is None


def test_only_shapes_are_encoded_and_only_chars_decoded():
    vocabulary = Vocabulary(10, 1)
    with pytest.raises(ValueError, match=r"characters '0123456789,', got \['x'\] in '4x6'"):
        vocabulary.encode_chars("4x6")
    for outside in (vocabulary.eom[0], vocabulary.null):
        with pytest.raises(ValueError, match=f"id {outside} is no character: those are 15 to 25"):
            vocabulary.decode_chars(torch.tensor([outside]))


def heads(n, *, h=2, d=8, dtype=torch.float64):
    return torch.randn(n, h, d, dtype=dtype)


def turned(x, position, **options):
    return rotate(x, rotary_phases(torch.as_tensor(position), x.shape[-1], dtype=x.dtype, **options))


def test_rotation_keeps_every_norm_and_leaves_position_zero_alone():
    x = heads(5)
    y = turned(x, [0, 1, 7, 1000, 123_456])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[0], x[0])
    assert not torch.allclose(y[1:], x[1:])


def test_rotated_dot_products_depend_on_the_distance_alone():
    q, k = heads(6), heads(6)
    near, far = torch.arange(6), torch.arange(6) + 4321
    dots = [(turned(q, at + 3) * turned(k, at)).sum(-1) for at in (near, far)]
    torch.testing.assert_close(*dots)
    further = (turned(q, near + 4) * turned(k, near)).sum(-1)
    assert not torch.allclose(dots[0], further)


@pytest.mark.parametrize("theta", [10_000.0, 50.0])
def test_rotation_is_a_matrix_for_each_pair_of_channels(theta):
    position, x = torch.tensor([0, 1, 2, 2, 90]), heads(5)
    expected = torch.empty_like(x)
    for n, pair in itertools.product(range(5), range(4)):
        angle = position[n].double() * theta ** (-2 * pair / 8)
        matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        channels = slice(2 * pair, 2 * pair + 2)
        expected[n, :, channels] = x[n, :, channels] @ matrix.T
    torch.testing.assert_close(turned(x, position, theta=theta), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_keeps_the_dtype(dtype):
    assert turned(heads(3, dtype=dtype), [0, 1, 2]).dtype == dtype


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 2), (3, 1), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_run_through_the_last_axis_first(shape, dtype):
    expected = torch.tensor(list(itertools.product(*map(range, shape))), dtype=dtype)
    coordinates = axial_coordinates(shape, dtype=dtype)
    assert coordinates.shape == expected.shape
    assert torch.equal(coordinates, expected)
    assert coordinates.dtype == dtype
