"""Prompts: which are taken, what is left of them without markers, and what they open at their end."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion_pytorch.sequence.prompts import Prompt, parse_prompt, split_unfinished_modality, without_text
from transfusion_pytorch.sequence.samples import Condition, Modality, Sample, Text, mark, merge_texts
from transfusion_pytorch.sequence.vocabulary import Vocabulary

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=60)
VOCABULARY = Vocabulary(num_text=10, num_modalities=2)
SOS, EOS, META, SOM, EOM = VOCABULARY.sos, VOCABULARY.eos, VOCABULARY.meta, VOCABULARY.som, VOCABULARY.eom
FOUR, COMMA = VOCABULARY.encode_chars("4,").tolist()
IMAGE = torch.randn(2, 3, 4)

OPENINGS = {
    "meta": [META],
    "half a shape": [META, FOUR, COMMA],
    "a shape": [META, FOUR, COMMA, FOUR],
    "a shape and som": [META, FOUR, COMMA, FOUR, SOM[0]],
    "meta and som": [META, SOM[1]],
    "som alone": [SOM[0]],
}


def ids(*tokens):
    return torch.tensor(tokens, dtype=torch.long)


def seen(pieces):
    """Pieces as values that compare: ids of text; type and identity of a modality."""
    return [piece.ids.tolist() if isinstance(piece, Text) else (piece.type, id(piece.tensor)) for piece in pieces]


def split(*parts):
    """A prompt of text ids (a list) and modalities (a piece)."""
    pieces = [part if isinstance(part, Modality) else Text(ids(*part)) for part in parts]
    return split_unfinished_modality(pieces, VOCABULARY, "prompt 3")


# what is taken


@pytest.mark.parametrize("prompt", [None, [], [None], [None, None], Sample([None]), Sample(None), Sample([])])
def test_nothing_is_an_empty_prompt(prompt):
    assert parse_prompt(prompt, VOCABULARY, "prompt 0") == []


@pytest.mark.parametrize("prompt", [[None, ids(1)], [ids(1), None], [None, ids(1), None], Sample([None, ids(1)])])
def test_nothing_beside_something_is_left_out(prompt):
    assert seen(parse_prompt(prompt, VOCABULARY, "prompt 0")) == [[1]]


def test_parts_are_counted_as_the_caller_has_them():
    with pytest.raises(ValueError, match=r"^prompt 0, part 2: token id 999 is outside the vocabulary"):
        parse_prompt([None, ids(1), ids(999)], VOCABULARY, "prompt 0")
    with pytest.raises(TypeError, match=r"^prompt 0, part 1: .* got ndarray"):
        parse_prompt([None, np.ones(3)], VOCABULARY, "prompt 0")


@pytest.mark.parametrize("prompt", [[[None]], [Condition(None)], [(0, None)]])
def test_nothing_inside_something_is_refused(prompt):
    with pytest.raises(TypeError, match=r"^prompt 0, part 0: expected an integer tensor .* got .*(NoneType|list)"):
        parse_prompt(prompt, VOCABULARY, "prompt 0")


def test_a_sample_with_a_name_is_a_prompt():
    for parts in (ids(1, 2), [ids(1, 2)], [ids(1), ids(2)]):
        plain, named = (parse_prompt(it, VOCABULARY, "prompt 0") for it in (parts, Sample(parts, name="a", weight=2.0)))
        assert seen(named) == seen(plain)


@pytest.mark.parametrize("part", [torch.tensor(7), ids(7), ids(7)[None], ids(7).int()])
def test_text_has_no_axis_or_one_or_a_batch_axis_of_one(part):
    for prompt in (part, [part]):
        assert seen(parse_prompt(prompt, VOCABULARY, "prompt 0")) == [[7]]


def test_markers_are_taken_and_other_ids_beyond_text_are_not():
    everything = list(range(VOCABULARY.num_logits))
    assert seen(parse_prompt(ids(*everything), VOCABULARY, "prompt 0")) == [everything]
    for wrong in (-1, VOCABULARY.null):
        with pytest.raises(ValueError, match=f"^prompt 2, part 1: token id {wrong} is outside the vocabulary"):
            parse_prompt([IMAGE, ids(wrong)], VOCABULARY, "prompt 2")


def test_a_prompt_owns_its_memory():
    text, image = ids(1, 2), torch.ones(2, 3, 4, requires_grad=True)
    parsed = parse_prompt([text, image], VOCABULARY, "prompt 0")
    text.zero_()
    image.data.zero_()
    assert parsed[0].ids.tolist() == [1, 2]
    assert parsed[1].tensor.eq(1).all()
    assert not parsed[1].tensor.requires_grad


# what is opened at the end


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
def test_an_opening_at_the_end_is_split_off(opening):
    image = Modality(0, IMAGE)
    assert split(opening) == Prompt([], opening)
    for before, bare in [
        ([[1, 2]], [[1, 2]]),
        ([[SOS, 1], [2]], [[1, 2]]),
        ([image], seen([image])),
        ([[1], [META, FOUR, SOM[0]], image, [EOM[0], 2], image, [EOM[0]]], [[1], *seen([image]), [2], *seen([image])]),
    ]:
        for end in ([opening], [opening[:1], opening[1:]], [[*opening, EOS]]):
            prompt = split(*before, *end)
            assert seen(prompt.pieces) == bare
            assert prompt.opening == opening


def test_only_the_last_opening_is_split_off():
    for first, last in product(OPENINGS.values(), repeat=2):
        if first == [META] and last[0] != META:  # together they are one
            continue
        if first[-1] not in SOM and last == [SOM[0]]:
            continue
        prompt = split([1, *first, *last])
        assert (seen(prompt.pieces), prompt.opening) == ([[1]], last)


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
def test_an_opening_that_anything_follows_is_dropped(opening):
    """So a sample that was cut off in one goes on with the next turn, whatever that begins with."""
    image = Modality(0, IMAGE)
    assert seen(split([SOS, 1, *opening], [2, 3]).pieces) == [[1, 2, 3]]
    assert seen(split([SOS, *opening], image, [EOM[0], 2]).pieces) == [*seen([image]), [2]]
    assert seen(split([1, *opening, 2, *opening, 3], image, [4]).pieces) == [[1, 2, 3], *seen([image]), [4]]
    assert split([SOS, 1, *opening], [2]).opening == []


def test_a_bare_prompt_opens_nothing():
    image = Modality(1, IMAGE)
    for parts in ([], [[1, 2]], [image], [[1], image, [2]], [[SOS]], [[SOS, 1, EOS]], [image, [EOM[1]]]):
        assert split(*parts).opening == []


@pytest.mark.parametrize("text", [[EOM[0]], [1, FOUR], [COMMA, SOM[0]], [EOM[0], META], [META, FOUR, SOM[0], EOM[0]]])
def test_markers_that_open_nothing_and_close_nothing_are_refused(text):
    with pytest.raises(ValueError, match=r"^prompt 3: markers of a modality stand where there is none, in the text \["):
        split(text)


TEXTS = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(lambda tokens: Text(ids(*tokens)))
MODALITIES = st.builds(
    lambda modality, shape: Modality(modality, torch.zeros(*shape, 4)),
    st.integers(0, 1),
    st.lists(st.integers(1, 12), max_size=3),
)


@QUICK
@given(bare=st.lists(TEXTS | MODALITIES, max_size=5), opening=st.sampled_from([[], *OPENINGS.values()]))
def test_marking_and_opening_are_undone(bare, opening):
    marked = [*mark(bare, VOCABULARY, complete=False), Text(ids(*opening))]
    prompt = split_unfinished_modality(marked, VOCABULARY, "prompt")
    assert seen(prompt.pieces) == seen(merge_texts(bare))
    assert prompt.opening == opening


@QUICK
@given(bare=st.lists(TEXTS | MODALITIES, min_size=1, max_size=4), data=st.data())
def test_a_sample_cut_off_anywhere_and_continued_has_valid_markers(bare, data):
    """Marked anew, every opening is followed by its modality, and every modality by what closes it."""
    marked = merge_texts(mark(bare, VOCABULARY, complete=False))
    while isinstance(marked[-1], Text) and data.draw(st.booleans()) and len(marked[-1].ids) > 1:
        marked[-1] = Text(marked[-1].ids[:-1])
    prompt = split_unfinished_modality([*marked, Text(ids(1))], VOCABULARY, "prompt")
    assert prompt.opening == []
    again = merge_texts(mark(prompt.pieces, VOCABULARY))
    for i, piece in enumerate(again):
        if isinstance(piece, Modality):
            opening = VOCABULARY.opening(piece.type, piece.shape).tolist()
            assert again[i - 1].ids.tolist()[-len(opening) :] == opening
            assert again[i + 1].ids[0] == EOM[piece.type]
    markers = [token for piece in again if isinstance(piece, Text) for token in piece.ids.tolist() if token >= META]
    expected = sum(2 + len(VOCABULARY.opening(it.type, it.shape)) - 1 for it in again if isinstance(it, Modality))
    assert len(markers) == expected


def test_guidance_hides_text_and_keeps_everything_else():
    pieces = mark([Text(ids(1, 2)), Modality(0, IMAGE), Text(ids(3))], VOCABULARY)
    hidden = without_text(pieces, VOCABULARY)
    assert [type(piece) for piece in hidden] == [type(piece) for piece in pieces]
    for piece, other in zip(pieces, hidden, strict=True):
        if isinstance(piece, Modality):
            assert other is piece
        else:
            expected = [VOCABULARY.null if token < 10 else token for token in piece.ids.tolist()]
            assert other.ids.tolist() == expected
