"""What may be written: every way ends in a shape that can be drawn, whatever the model would like to write."""

from itertools import product
from math import prod

import pytest
import torch
from generation_models import (
    GREEDY,
    IMAGE,
    LINE,
    VECTOR,
    VIDEO,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    shapes_of,
    slots_of,
    text,
)

from transfusion_pytorch import UNetDown, UNetUp
from transfusion_pytorch.generation import resolve
from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.sequence.grammar import Grammar, MostLatents
from transfusion_pytorch.sequence.vocabulary import ALPHABET, Vocabulary, format_shape, parse_shape

ANY = (0, 1, 2, 3)
AXES = [[[0]], [[1]], [[2]], [[3]], [ANY], [[0], [2]], [[1], [3]], [[3], [1], [1]], [[0], ANY], [[2], [0], [3]]]


def ids(mask) -> list[int]:
    return mask.nonzero().flatten().tolist()


def finished(grammar) -> set[tuple[str, int]]:
    """Everything that can be written after `meta`: the shape, and the modality it is for."""
    found, openings = set(), [""]
    while openings:
        opening = openings.pop()
        allowed = ids(grammar.allowed(opening))
        assert allowed, f"{opening!r} is a dead end"
        for token in allowed:
            if token in grammar.vocabulary.som:
                assert grammar.advance(opening, token) is None
                found.add((opening, grammar.vocabulary.som.index(token)))
            else:
                openings.append(grammar.advance(opening, token))
                assert openings[-1][:-1] == opening
                assert len(openings[-1]) < 20, "it goes on for ever"
    return found


def shapes_within(most: int, axes: int) -> set[tuple[int, ...]]:
    return {shape for shape in product(range(1, most + 1), repeat=axes) if prod(shape) <= most}


@pytest.mark.parametrize("most", [1, 2, 9, 12])
@pytest.mark.parametrize("axes", AXES)
def test_what_can_be_written_is_every_shape_within_the_limit(axes, most):
    grammar = Grammar(Vocabulary(5, len(axes)), axes, most=most)
    expected = {
        (format_shape(shape), modality)
        for modality, counts in enumerate(axes)
        for count in counts
        for shape in shapes_within(most, count)
    }
    assert finished(grammar) == expected
    assert all(parse_shape(opening) is not None for opening, _ in expected)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (4, 4), (3, 10, 2)])
def test_a_fixed_shape_is_all_that_can_be_written(shape):
    axes = [[count] if count == len(shape) else [] for count in ANY] + [[len(shape)]]
    grammar = Grammar(Vocabulary(5, 5), axes, most=1, fixed_shape=shape)  # what is asked for may be larger
    assert finished(grammar) == {(format_shape(shape), len(shape)), (format_shape(shape), 4)}


def test_text_is_free_and_markers_are_not():
    vocabulary = Vocabulary(5, 2)
    grammar = Grammar(vocabulary, [[1], [2]], most=4)
    assert ids(grammar.allowed(None)) == [0, 1, 2, 3, 4, vocabulary.eos, vocabulary.meta]
    assert grammar.advance(None, 3) is None
    assert grammar.advance(None, vocabulary.meta) == ""


def wilful(seed: int, wishes: list[int], **options):
    """A model that writes the first of its wishes that is allowed."""
    model = build(seed=seed, **options)
    for rank, token in enumerate(wishes):
        model.to_logits.push[token] = 1000.0 - 10 * rank
    return model


def chars(model, text: str) -> list[int]:
    return model.char_tokenizer(text).tolist()


WISHES = {
    "nines": lambda model: [model.meta_id, *chars(model, "9,876543210")],
    "ones": lambda model: [model.meta_id, *chars(model, "1,")],
    "commas": lambda model: [model.meta_id, *chars(model, ",")],
    "zeros": lambda model: [model.meta_id, *chars(model, "0")],
    "som": lambda model: [*model.som_ids, model.meta_id],
    "eom": lambda model: [*model.eom_ids, model.meta_id],
    "meta": lambda model: [model.meta_id],
    "sos": lambda model: [model.sos_id, model.meta_id],
    "characters outside": lambda model: chars(model, ALPHABET),
}


@pytest.mark.parametrize("num_dims", [(0, 1, 2, 3), (None, None), (3,)])
@pytest.mark.parametrize("name", WISHES)
def test_whatever_a_model_wishes_to_write_stays_within_limits(name, num_dims):
    options = dict(dim_latent=(2,) * len(num_dims), modality_num_dim=num_dims, num_text_tokens=2)
    model = wilful(0, WISHES[name](build(**options)), **options)
    model.to_logits.push[model.eos_id] = -1000.0
    sample = model.sample(text(1), **GREEDY | dict(max_length=50, modality_steps=1, max_modality_tokens=11))
    assert 40 < len(slots_of(model, sample)) <= 50
    assert drawn(sample) or name == "characters outside"
    for modality, x in drawn(sample):
        assert prod(x.shape[:-1]) <= 11
        assert num_dims[modality] in (None, x.ndim - 1)


def test_no_more_noise_is_made_than_the_limit_allows(monkeypatch):
    made, normal = [], resolve.normal
    monkeypatch.setattr(
        resolve, "normal", lambda seed, stream, size, *where: made.append(size) or normal(seed, stream, size, *where)
    )
    model = build(num_text_tokens=2)
    model = wilful(0, WISHES["nines"](model), num_text_tokens=2)
    model.sample(text(1), **GREEDY | dict(max_length=300, modality_steps=1, max_modality_tokens=99))
    assert made
    assert max(rows for rows, _ in made) == 99


def writes(model, *parts: str | int):
    """Lets the model write these ids, and the chars of these shapes."""
    script = [token for part in parts for token in ([part] if isinstance(part, int) else chars(model, part))]
    turn = iter(script)

    def logits(tokens):
        return torch.nn.functional.one_hot(torch.tensor([next(turn)]), model.vocabulary.num_logits).double()

    model.logits = logits
    return model


@pytest.mark.parametrize(
    ("modality", "shape"), [(VECTOR, ()), (LINE, (5,)), (IMAGE, (3, 5)), (IMAGE, (1, 12)), (VIDEO, (2, 1, 10))]
)
def test_shapes_that_the_model_writes_are_drawn(modality, shape):
    model = build()
    model = writes(model, 3, model.meta_id, format_shape(shape), model.som_ids[modality], model.eos_id)
    sample = model.sample(**GREEDY | dict(max_modality_tokens=20))
    assert shapes_of(drawn(sample)) == [(modality, (*shape, model.modalities[modality].spec.dim_latent))]
    assert sample[0].tolist() == [4, 3, *model.vocabulary.opening(modality, shape).tolist()]
    assert sample[2].tolist() == [model.eom_ids[modality], model.eos_id]


# max_length


@pytest.mark.parametrize("seed", range(2))
def test_max_length_cuts_a_sample_off_and_changes_nothing_before(seed):
    model = build(seed=seed, push=dict(meta=1.0, eos=-0.5))
    options = GREEDY | dict(init_modality_noise=noise(), cfg_scale=2.0)
    whole = model.sample(**options)
    slots = slots_of(model, whole)
    for max_length in (1, 2, *range(3, len(slots), 4)):
        short = model.sample(**options | dict(max_length=max_length))
        cut = slots_of(model, short)
        assert len(cut) <= max_length
        assert cut == slots[: len(cut)]
        if len(cut) < max_length:
            assert cut[-1] in model.som_ids, "a modality did not fit"
        assert_same(model.sample(short, **options), whole)


@pytest.mark.parametrize(("room", "fits"), [(0, True), (-1, False)])
def test_a_modality_is_drawn_where_there_is_just_enough_room(room, fits):
    model = build()
    model = writes(model, model.meta_id, "2,3", model.som_ids[IMAGE])
    sample = model.sample(**GREEDY | dict(max_length=1 + 5 + 6 + 1 + room))
    assert len(drawn(sample)) == fits
    assert slots_of(model, sample)[:6] == [4, *model.vocabulary.opening(IMAGE, (2, 3)).tolist()]
    assert len(slots_of(model, sample)) == (13 if fits else 6)


def test_room_is_for_tokens_which_a_unet_has_fewer_of_than_latents():
    sizes = dict(dim_hidden=4, num_dim=2)
    unet = (UNetDown(3, 8, **sizes), UNetUp(3, 8, **sizes))
    model = build(dim_latent=3, modality_num_dim=2, pre_post_transformer_enc_dec=unet)
    model = writes(model, model.meta_id, "8,8", model.som_ids[0])
    sample = model.sample(**GREEDY | dict(max_length=1 + 5 + 16 + 1, max_modality_tokens=64))
    assert shapes_of(drawn(sample)) == [(0, (8, 8, 3))]
    assert len(slots_of(model, sample)) == 23


@pytest.mark.parametrize("max_length", [1, 6, 18, 19, 20])
def test_a_forced_modality_is_drawn_whatever_room_there_is(max_length):
    """It is what the caller asks for; behind it the model writes on only where there is room."""
    model = build(push=dict(eos=-9.0))
    options = GREEDY | dict(force_modality_at_start=(LINE, (12,)), max_length=max_length)
    prompt = text(1) if max_length > 1 else None
    sample = model.sample(prompt, **options)
    assert shapes_of(drawn(sample)) == [(LINE, (12, 3))]
    given = 5 + (prompt is not None) + 12 + 1
    assert len(slots_of(model, sample)) == max(given, max_length)
    assert sample.reason is EndReason.LENGTH


@pytest.mark.parametrize("max_length", [10, 30, 60])
def test_without_a_limit_a_shape_may_be_as_large_as_max_length_allows(max_length):
    """Whatever is written fits into it from the start, with its markers; `max_modality_tokens` says otherwise."""
    vocabulary = Vocabulary(5, 2)
    grammar = Grammar(vocabulary, [[1], [2]], most=MostLatents(None, max_length))
    largest = {0: 0, 1: 0}
    for shape, modality in finished(grammar):
        sizes = parse_shape(shape)
        sample = 1 + len(vocabulary.opening(modality, sizes)) + prod(sizes) + 1
        assert sample <= max_length or prod(sizes) == 1
        largest[modality] = max(largest[modality], sample)
    assert largest[0] == max_length
    assert largest[1] >= max_length - 1


def test_default_limits_draw_a_picture_that_fits_into_max_length():
    model = build()
    model = writes(model, model.meta_id, "50,50", model.som_ids[IMAGE], model.eos_id)
    sample = model.sample(text_temperature=0.0, max_length=2600, modality_steps=1)
    assert shapes_of(drawn(sample)) == [(IMAGE, (50, 50, 1))]
    assert sample.reason is EndReason.EOS


# shapes of a user's own


def halved(written: str) -> tuple[int, ...]:
    """Sizes come doubled."""
    return tuple(int(size) // 2 for size in written.split(","))


def test_custom_shape_function_is_asked():
    model = build(to_modality_shape_fn=halved)
    model = writes(model, model.meta_id, "4,6", model.som_ids[IMAGE], model.eos_id)
    sample = model.sample(**GREEDY | dict(max_modality_tokens=24))
    assert shapes_of(drawn(sample)) == [(IMAGE, (2, 3, 1))]


@pytest.mark.parametrize(
    "parse", [lambda written: None, lambda written: (0, 3), lambda written: (3,), lambda written: (300, 300), int]
)
def test_shapes_that_are_none_fall_back_to_the_default_or_end_the_sample(parse):
    options = dict(to_modality_shape_fn=parse, modality_default_shape=((), (2,), (2, 1), (1, 1, 1)))
    for fallback in (True, False):
        model = build(**options, fallback_to_default_shape_if_invalid=fallback)
        model = writes(model, model.meta_id, "2,2", model.som_ids[IMAGE], model.eos_id)
        if fallback:
            assert shapes_of(drawn(model.sample(**GREEDY))) == [(IMAGE, (2, 1, 1))]
        else:
            assert shapes_of(model.sample(**GREEDY)) == [[4, *model.vocabulary.opening(IMAGE, (2, 2))]]


def test_a_default_that_does_not_fit_ends_the_sample():
    options = dict(to_modality_shape_fn=lambda written: None, fallback_to_default_shape_if_invalid=True)
    model = build(modality_default_shape=((), (2,), (5, 5), (1, 1, 1)), **options)
    model = writes(model, model.meta_id, "2,2", model.som_ids[IMAGE])
    assert shapes_of(model.sample(**GREEDY | dict(max_length=31))) == [[4, *model.vocabulary.opening(IMAGE, (2, 2))]]


def test_fixed_shape_is_that_of_everything_drawn():
    model = build(push=dict(meta=1.0, eos=-9.0), modality_num_dim=None)
    samples = model.sample_many([None, latents(LINE, 3)], **GREEDY | dict(fixed_modality_shape=(2, 1)))
    shapes = [x.shape[:-1] for sample in samples for _, x in drawn(sample)]
    assert shapes.count((2, 1)) == len(shapes) - 1 > 1
