"""What a sample consists of where the user says so: plans, a modality at the start, and which may be opened at all."""

from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import numpy as np
import pytest
import torch
from generation_models import (
    CHANNELS,
    GREEDY,
    IMAGE,
    LINE,
    VECTOR,
    VIDEO,
    assert_drawn,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    num_given,
    shapes_of,
    slots_of,
    text,
)

from transfusion_pytorch.generation.events import EndReason

DEFAULTS = ((), (2,), (2, 1), (1, 1, 2))
META, SOM, FOUR = 6, (7, 8, 9, 10), 19  # ids of `build`
PROMPTS = [None, text(1, 2), [text(3), latents(IMAGE, 1, 2)], [latents(VECTOR), text(0), latents(LINE, 3), text(2)]]


def planner(**options):
    return build(modality_default_shape=DEFAULTS, **dict(push=dict(meta=0.3, eos=0.3)) | options)


@pytest.fixture(scope="module")
def model():
    return planner()


def asked(**options) -> dict:
    return GREEDY | dict(init_modality_noise=noise(), max_length=80, modality_steps=1) | options


def submitted(model, requests: list[tuple], **options) -> list[tuple[list, EndReason | None]]:
    """The sample of every (prompt, plan, options of its own), all worked on at once, and why it ended."""
    engine = model.create_engine()
    requests = [engine.submit(prompt, plan=plan, **asked(**options, **dict(*own))) for prompt, plan, *own in requests]
    engine.run()
    return [(request.result(), request.reason) for request in requests]


def most_of(part) -> float:
    return float("inf") if part == "text" else part[1]


def is_text(part) -> bool:
    return part == "text" or (isinstance(part, tuple) and part[0] == "text")


class Walked(NamedTuple):
    chosen: int  # ids
    forced: int  # texts that had to end
    ended_itself: bool  # the model wrote eos


def walk(model, sample: list, given: int, plan: list) -> Walked:
    """Follows a sample along its plan: every id of text is the likeliest of what the plan allows there, by one forward
    pass over all of it.
    """
    vocabulary, slots = model.vocabulary, slots_of(model, sample)
    with torch.no_grad():
        [logits] = model([sample], return_loss=False)
    assert len(logits) == len(slots)
    at, chosen, forced = given, 0, 0
    for i, part in enumerate(plan):
        if not is_text(part):
            modality, shape = part if isinstance(part, tuple) else (part, DEFAULTS[part])
            opening = vocabulary.opening(modality, shape).tolist()
            expected = [*opening, *[-1] * prod(shape), vocabulary.eom[modality]]
            assert slots[at : at + len(expected)] == expected
            at += len(expected)
            continue
        end = vocabulary.eos if i + 1 == len(plan) else vocabulary.meta
        ids = torch.tensor([*range(vocabulary.num_text), end])
        count = 0
        while count < most_of(part):
            assert slots[at] == ids[logits[at - 1, ids].argmax()], f"slot {at} of {slots}"
            chosen += 1
            if slots[at] == end:
                break
            at, count = at + 1, count + 1
        forced += count == most_of(part)
        assert slots[at] == end
    assert slots[at:] == [vocabulary.eos]
    return Walked(chosen, forced, is_text(plan[-1]) and count < most_of(plan[-1]))


KINDS = ["text", ("text", 1), ("text", 3), LINE, (IMAGE, (1, 3)), (VECTOR, ())]
PLANS = [
    [*plan]
    for length in (1, 2, 3)
    for plan in product(KINDS if length < 3 else KINDS[:1] + KINDS[2:5], repeat=length)
    if not any(is_text(one) and is_text(other) for one, other in pairwise(plan))
]


@pytest.mark.parametrize("prompt", PROMPTS[1::2], ids=("text", "mixed"))
def test_every_plan_is_followed_to_its_end(model, prompt):
    results = submitted(model, [(prompt, plan) for plan in PLANS])
    given, chosen, forced, own = num_given(model, prompt), 0, 0, 0
    num_prompted = sum(isinstance(part, tuple) for part in prompt) if isinstance(prompt, list) else 0
    for plan, (sample, reason) in zip(PLANS, results, strict=True):
        walked = walk(model, sample, given, plan)
        chosen, forced, own = chosen + walked.chosen, forced + walked.forced, own + walked.ended_itself
        assert len(drawn(sample)) == num_prompted + sum(not is_text(part) for part in plan)
        assert reason is (EndReason.EOS if walked.ended_itself else EndReason.PLAN)
    assert chosen > 90
    assert forced > 5
    assert own > 5


@pytest.mark.parametrize("seed", range(3))
def test_planned_modalities_are_drawn_like_any_other(seed):
    model, plan = planner(seed=seed), [(VECTOR, ()), (LINE, (3,)), ("text", 4), IMAGE, VIDEO]
    for prompt, given in [(None, 0), ([latents(IMAGE, 1, 2), text(1)], 1)]:
        [(sample, _)] = submitted(model, [(prompt, plan)], cfg_scale=1.7)
        assert_drawn(model, sample, given, steps=1, scale=1.7)


def test_plans_do_not_depend_on_what_stands_beside_them(model):
    requests = [(prompt, plan) for prompt in PROMPTS[1:3] for plan in PLANS[::9]]
    for (prompt, plan), (sample, _) in zip(requests, submitted(model, requests), strict=True):
        for cache_kv in (True, False):
            assert_same(model.sample_many([prompt], plan=plan, cache_kv=cache_kv, **asked())[0], sample)


def test_a_plan_may_be_spelled_in_several_ways(model):
    plans = [
        ["text", (LINE, (2,)), ("text", 2)],
        ("text", LINE, ["text", 2]),
        ["text", [LINE, [2]], ("text", np.int64(2))],
        ["text", (np.int64(LINE), None), ("text", 2)],
    ]
    samples = [sample for sample, _ in submitted(model, [(text(1), plan) for plan in plans])]
    for sample in samples[1:]:
        assert_same(sample, samples[0])


def test_the_fixed_shape_is_that_of_a_planned_type(model):
    options = asked(fixed_modality_shape=(3,))
    for part in (LINE, (LINE, (3,))):
        assert shapes_of(drawn(model.sample(plan=["text", part], **options))) == [(LINE, (3, CHANNELS[LINE]))]


def test_a_plan_asks_for_more_than_a_model_may_write(model):
    plan = [(LINE, (11,))]
    sample = model.sample(plan=plan, **asked(max_modality_tokens=2, allowed_modalities=()))
    assert shapes_of(drawn(sample)) == [(LINE, (11, CHANNELS[LINE]))]


def test_a_text_of_a_plan_is_neither_ended_nor_interrupted_by_what_does_not_belong_there():
    model = planner(push=dict(meta=50.0, eos=40.0))
    sample = model.sample(text(1), plan=["text", IMAGE, "text"], **asked())
    assert walk(model, sample, 2, ["text", IMAGE, "text"]) == (2, 0, True), "both texts are empty"
    model = planner(push=dict(eos=50.0, meta=-50.0))
    sample = model.sample(text(1), plan=[("text", 5), LINE, "text"], **asked())
    assert walk(model, sample, 2, [("text", 5), LINE, "text"]) == (6, 1, True)


@pytest.mark.parametrize(("stop", "in_text"), [(1, 0), (2, 0), (0, 1), (3, 1)])
def test_a_stop_id_ends_a_plan_early(stop, in_text):
    """In the first text of the plan, or in the second."""
    plan = [LINE, ("text", 2), IMAGE, ("text", 12)]
    silent = planner(push=dict(meta=-9.0, eos=-9.0))
    whole = slots_of(silent, silent.sample(text(1), plan=plan, **asked()))
    first = 2 + len(silent.vocabulary.opening(LINE, (2,))) + 2 + 1
    second = first + 2 + len(silent.vocabulary.opening(IMAGE, (2, 1))) + 2 + 1
    end = first + whole[first:].index(stop) + 1
    assert (end > second) == in_text
    [(sample, reason)] = submitted(silent, [(text(1), plan)], stop_ids=[stop])
    assert slots_of(silent, sample) == whole[:end]
    assert reason is EndReason.STOP


LONG = ["text", (IMAGE, (2, 3)), ("text", 4), VECTOR, (LINE, (5,)), "text"]


@pytest.mark.parametrize("prompt", [text(1), text(1, META, FOUR), [latents(LINE, 2), text(2)]])
@pytest.mark.parametrize("plan", [LONG, LONG[1:5], [*LONG[:3]], LONG[1:2], ["text"]])
@pytest.mark.filterwarnings("ignore:prompt 0 has")
def test_beyond_its_length_a_plan_has_its_modalities_and_no_text(model, prompt, plan):
    """Up to there it is what a longer one is; behind it stands every modality of the plan, without text between."""
    bare = text(1) if isinstance(prompt, torch.Tensor) else prompt  # a plan takes the place of an opening
    [(whole, _)] = submitted(model, [(prompt, plan)])
    slots, planned = slots_of(model, whole), [part for part in plan if not is_text(part)]
    lengths, given = range(1, len(slots) + 1), num_given(model, bare)
    results = submitted(model, [(prompt, plan, dict(max_length=most)) for most in lengths])
    for max_length, (short, reason) in zip(lengths, results, strict=True):
        cut = slots_of(model, short)
        same = next((i for i, (x, y) in enumerate(zip(cut, slots, strict=False)) if x != y), min(len(cut), len(slots)))
        assert same >= min(max_length, len(cut)), "the length changes nothing before the cut"
        expected = [(kind, (*shape, CHANNELS[kind])) for kind, shape in map(with_shape, planned)]
        assert shapes_of(drawn(short))[len(drawn(bare)) if isinstance(bare, list) else 0 :] == expected
        assert not any(0 <= token < 4 for token in cut[max(max_length, given) :]), "no text beyond it"
        if max_length < len(slots):
            assert reason is EndReason.LENGTH
            assert cut[-1] != model.eos_id
        else:
            assert_same(short, whole)
        assert_drawn(model, short, sum(isinstance(part, tuple) for part in prompt), steps=1, scale=3.0)


def with_shape(part) -> tuple:
    return part if isinstance(part, tuple) else (part, DEFAULTS[part])


# what is refused

REFUSED = {
    "a string": ("text", TypeError, "plan must be a list of parts.* got 'text'"),
    "a number": (3, TypeError, "plan must be a list of parts.* got 3"),
    "a dict": ({"text": 3}, TypeError, "plan must be a list"),
    "nothing": ([], TypeError, r"plan must be a list of parts.* got \[\]"),
    "a generator": ((part for part in ["text"]), TypeError, "plan must be a list"),
    "two texts": (["text", ("text", 3)], ValueError, "plan: two texts follow each other.*make them one"),
    "two texts later": ([LINE, "text", "text"], ValueError, "plan: two texts follow each other"),
    "a word": (["image"], ValueError, "plan, part 0: expected 'text', .* got 'image'"),
    "a pair with a word": (["text", ("image", (2, 2))], ValueError, "plan, part 1: expected 'text', .*'image'"),
    "an unknown type": ([4], ValueError, r"plan, part 0: unknown modality type 4, this model has 4 \(from 0\)"),
    "an unknown type with a shape": (["text", (9, (2,))], ValueError, "plan, part 1: unknown modality type 9"),
    "a type below 0": ([-1], ValueError, "plan, part 0: unknown modality type -1"),
    "a bool": ([True], TypeError, "plan, part 0: a modality type is an int, got True"),
    "a float": ([1.0], TypeError, "plan, part 0: a modality type is an int, got 1.0"),
    "None": ([None], TypeError, "plan, part 0: a modality type is an int, got None"),
    "a tensor": ([text(1)], TypeError, "plan, part 0: a modality type is an int"),
    "three in a part": ([(LINE, (2,), 3)], TypeError, "plan, part 0: a modality type is an int"),
    "text alone in a tuple": ([("text",)], TypeError, "plan, part 0: a modality type is an int"),
    "no id of text": ([("text", 0)], ValueError, "plan, part 0: the most ids of a text must be at least 1, got 0"),
    "ids below 0": ([LINE, ("text", -2)], ValueError, "plan, part 1: the most ids of a text must be at least 1"),
    "half an id": ([("text", 2.5)], TypeError, "plan, part 0: the most ids of a text must be an int, got 2.5"),
    "text of None": ([("text", None)], TypeError, "plan, part 0: the most ids of a text must be an int"),
    "too many axes": (
        [(LINE, (2, 2))],
        ValueError,
        r"plan, part 0: modality 1 cannot have the shape \(2, 2\): it has 1",
    ),
    "no axes": ([(IMAGE, ())], ValueError, r"plan, part 0: modality 2 cannot have the shape \(\): it has 2 axes"),
    "a size of 0": ([(LINE, (0,))], ValueError, "plan, part 0: the shape must be a tuple of 0 to 3 positive ints"),
    "a size that is none": ([(LINE, ("4",))], ValueError, "plan, part 0: the shape must be a tuple"),
    "a shape that is a number": ([(LINE, 4)], ValueError, "plan, part 0: the shape must be a tuple"),
}


@pytest.fixture
def idle(model, monkeypatch):
    """A model that must not be run."""
    monkeypatch.setattr(model, "forward_stream", lambda *args, **options: pytest.fail("something was computed"))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_makes_no_sense_is_refused(idle, name):
    plan, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        idle.sample(text(1), plan=plan, **asked())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(plan=[LINE], force_modality_at_start=LINE), "force_modality_at_start or a plan .* not both"),
        (
            dict(plan=[(LINE, (2,))], fixed_modality_shape=(3,)),
            r"plan, part 0: the shape \(2,\) is asked for, and fixed",
        ),
        (
            dict(plan=["text", IMAGE], fixed_modality_shape=(3,)),
            r"plan, part 1: modality 2 cannot have the shape \(3,\)",
        ),
        (
            dict(plan=["text", (LINE, (4,))], init_modality_noise=noise(3)),
            r"init_modality_noise needs 4 rows and 3 channels for shape \(4,\) of modality 1, got \(3, 3\)",
        ),
    ],
)
def test_a_plan_that_contradicts_other_options_is_refused(idle, options, message):
    with pytest.raises(ValueError, match=message):
        idle.sample(text(1), **asked(**options))


def test_a_planned_type_needs_a_shape():
    model = build()
    with pytest.raises(ValueError, match="plan, part 1: modality 1 has no default shape"):
        model.sample(plan=["text", LINE], **asked())
    assert shapes_of(drawn(model.sample(plan=["text", LINE], **asked(fixed_modality_shape=(3,))))) == [(LINE, (3, 3))]


@pytest.mark.parametrize("plan", [["text"], [("text", 3)], [LINE], ["text", (LINE, (4,))], [VECTOR, "text"]])
@pytest.mark.parametrize("ids", [(META,), (1, META, FOUR), (META, FOUR, SOM[LINE]), (2, SOM[IMAGE]), (META, SOM[0])])
def test_a_plan_takes_the_place_of_an_opening(model, ids, plan):
    words = [token for token in ids if token < 4]
    expected = model.sample(text(*words) if words else None, plan=plan, **asked())
    assert_same(model.sample(text(*ids), plan=plan, **asked()), expected)


@pytest.mark.parametrize("forced", [LINE, (LINE, (4,)), (IMAGE, (2, 2))])
@pytest.mark.parametrize("opening", [(META,), (META, FOUR), (META, FOUR, SOM[LINE]), (SOM[IMAGE],)])
def test_a_forced_modality_takes_the_place_of_an_opening(model, opening, forced):
    expected = model.sample(text(1), force_modality_at_start=forced, **asked())
    assert_same(model.sample(text(1, *opening), force_modality_at_start=forced, **asked()), expected)


# a modality at the start, and freedom behind it


FORCED = [VECTOR, LINE, (LINE, (4,)), (IMAGE, (2, 2))]


@pytest.mark.parametrize(("prompt", "forced"), [*zip(PROMPTS, FORCED, strict=True)])
def test_a_modality_at_the_start_is_the_beginning_of_a_plan(model, prompt, forced):
    free = model.sample(prompt, force_modality_at_start=forced, **asked(max_length=50))
    planned = model.sample(prompt, plan=[forced], **asked())
    assert planned[-1].tolist()[-1] == model.eos_id
    ended = len(slots_of(model, planned)) - 1
    assert slots_of(model, free)[:ended] == slots_of(model, planned)[:-1]
    for part, other in zip(drawn(planned), drawn(free), strict=False):
        assert_same([part], [other])
    assert_same(model.sample(planned, **asked(max_length=50)), free)


# what may be opened


@pytest.fixture(scope="module")
def eager():
    """A model that opens a modality whenever it may."""
    return build(push=dict(meta=9.0, eos=-3.0, som=5.0), modality_num_dim=None, num_text_tokens=3)


def opened(model, **options) -> set[tuple[int, tuple]]:
    """What it draws behind several prompts: types and shapes."""
    prompts = [None, text(1), text(2, 0), [text(1), latents(VIDEO, 1, 1, 1)]]
    settings = dict(text_temperature=1.0, text_min_p=0.0, max_length=40)
    samples = model.sample_many(prompts, **asked(**settings, **options))
    made = [part for sample in samples[:3] for part in drawn(sample)] + drawn(samples[3])[1:]
    return {(modality, tuple(x.shape[:-1])) for modality, x in made}


def test_only_what_is_allowed_is_opened(eager):
    everything = {modality for modality, _ in opened(eager)}
    assert everything == {VECTOR, LINE, IMAGE, VIDEO}
    for allowed in ((IMAGE, VIDEO), [LINE, LINE], [np.int64(LINE)]):
        assert {modality for modality, _ in opened(eager, allowed_modalities=allowed)} == {int(it) for it in allowed}
    assert opened(eager, allowed_modalities=()) == opened(eager, allowed_modalities=[]) == set()
    assert {modality for modality, _ in opened(eager, allowed_modalities=[0, 1, 2, 3])} == everything


def test_what_is_only_read_is_opened_only_where_it_is_named(eager, monkeypatch):
    """As the patches of a vision encoder, which no decoder shows."""
    monkeypatch.setattr(type(eager.modalities[LINE]), "is_read_only", property(lambda io: io.spec.type == LINE))
    assert {modality for modality, _ in opened(eager)} == {VECTOR, IMAGE, VIDEO}
    assert {modality for modality, _ in opened(eager, allowed_modalities=[LINE])} == {LINE}
    assert {modality for modality, _ in opened(eager, plan=[LINE], fixed_modality_shape=(2,))} == {LINE}


def test_what_is_allowed_has_the_fixed_shape(eager):
    assert opened(eager, fixed_modality_shape=(2, 1), allowed_modalities=[IMAGE]) == {(IMAGE, (2, 1))}
    assert opened(eager, fixed_modality_shape=(), allowed_modalities=[LINE, IMAGE]) == {(LINE, ()), (IMAGE, ())}
    strict = build(push=dict(meta=9.0, eos=-3.0))
    assert opened(strict, fixed_modality_shape=(2,)) == {(LINE, (2,))}
    assert opened(strict, fixed_modality_shape=(2,), allowed_modalities=[IMAGE]) == set(), "it cannot have that shape"


def test_all_types_allowed_are_no_restriction(eager):
    options = asked(max_length=40)
    free, listed = (eager.sample(text(1), **options | extra) for extra in (dict(), dict(allowed_modalities=range(4))))
    assert_same(free, listed, tolerance=0)


def test_no_modality_allowed_is_a_plan_of_text():
    model = build(push=dict(meta=3.0, eos=0.2))
    for prompt in PROMPTS:
        one = model.sample(prompt, allowed_modalities=(), **asked())
        assert_same(one, model.sample(prompt, plan=["text"], **asked()), tolerance=0)
        assert one[-1].tolist()[-1] == model.eos_id
        walk(model, one, num_given(model, prompt), ["text"])


def test_what_is_asked_for_need_not_be_allowed(eager):
    for options in (dict(plan=[(LINE, (2,)), "text"]), dict(force_modality_at_start=(LINE, (2,)))):
        sample = eager.sample(allowed_modalities=(), **asked(max_length=30, **options))
        assert shapes_of(drawn(sample)) == [(LINE, (2, CHANNELS[LINE]))]


@pytest.mark.parametrize(
    ("allowed", "error"),
    [(3, TypeError), ("01", TypeError), ([4], ValueError), ([-1], ValueError), ([True], TypeError), ([0.0], TypeError)],
)
def test_allowed_types_that_are_none_are_refused(idle, allowed, error):
    with pytest.raises(error, match="allowed_modalities"):
        idle.sample(text(1), allowed_modalities=allowed, **asked())


# models without text


def test_a_model_without_text_follows_its_plans():
    model = planner(num_text_tokens=0)
    for plan in ([LINE], [LINE, VECTOR], ["text", LINE, "text"], [("text", 3), (IMAGE, (1, 2)), ("text", 2), VECTOR]):
        [(sample, _)] = submitted(model, [(None, plan)])
        walk(model, sample, 1, plan)
    [(sample, reason)] = submitted(model, [(latents(LINE, 2), [IMAGE])])
    assert shapes_of(drawn(sample)) == [(LINE, (2, 3)), (IMAGE, (2, 1, 1))]
    assert reason is EndReason.PLAN


def test_a_model_without_text_or_leave_to_draw_can_only_end():
    model = build(num_text_tokens=0)
    assert shapes_of(model.sample(allowed_modalities=(), **asked())) == [[model.sos_id, model.eos_id]]
    free = model.sample(**asked(max_length=30))
    written = [token for token in slots_of(model, free)[1:] if token >= 0]
    assert set(written) & {model.eos_id, *model.som_ids}


def as_plan(model, sample: list) -> list:
    """What a sample from nothing consists of."""
    plan = []
    for part in sample:
        plan.append((part[0], tuple(part[1].shape[:-1])) if isinstance(part, tuple) else "text")
    return plan


def test_what_a_model_does_of_itself_comes_again_where_a_plan_says_just_that():
    num_drawn = 0
    for seed in range(6):
        model = build(seed=seed, push=dict(meta=0.9, eos=0.6))
        free = model.sample(**asked())
        if free[-1].tolist()[-1] == model.eos_id:
            assert_same(model.sample(plan=as_plan(model, free), **asked()), free)
            num_drawn += len(drawn(free))
    assert num_drawn > 2
