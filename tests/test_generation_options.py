"""The options of a request: what is refused, what may be said, and that its randomness is its own."""

import inspect
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from generation_models import (
    GREEDY,
    IMAGE,
    LINE,
    VECTOR,
    VIDEO,
    assert_drawn,
    assert_same,
    build,
    drawn,
    generators,
    latents,
    noise,
    noise_of,
    number_of,
    script,
    seed_of,
    shapes_of,
    slots_of,
    text,
)

from transfusion_pytorch import AsyncEngine, Transfusion
from transfusion_pytorch.generation.engine import Engine
from transfusion_pytorch.generation.options import SamplingOptions

GREEDILY = dict(text_temperature=0.0)
NAN, INFINITY = float("nan"), float("inf")
NUMBERS = [("1", TypeError), (True, TypeError), ([1.0], TypeError), (1j, TypeError), (NAN, ValueError)]
NUMBERS += [
    (INFINITY, ValueError),
    (-INFINITY, ValueError),
    (torch.tensor([1.0, 2.0]), TypeError),
]
NONE = (None, TypeError)
INTS = [("1", TypeError), (True, TypeError), (2.0, TypeError), (0, ValueError), (-1, ValueError), (NAN, TypeError)]
SHAPES = [(3, ValueError), ("33", ValueError), ((0,), ValueError), ((-2, 1), ValueError), ((1.0,), ValueError)]
SHAPES += [((1, 1, 1, 1), ValueError), ((None,), ValueError), ((True, 2), ValueError)]

REFUSED = {
    "max_length": [*INTS, NONE],
    "max_new_tokens": INTS,
    "stop_ids": [
        *[(value, TypeError) for value in (3, "3", b"3", torch.ones(1), [1.0], [True], [None], None, {1: 2})],
        *[(value, ValueError) for value in ([4], [-1], [0, 99])],
    ],
    "logits_processors": [(None, TypeError), (len, TypeError), ([3], TypeError), ("ab", TypeError), ({}, TypeError)],
    "text_repetition_penalty": [*NUMBERS, NONE, (0.0, ValueError), (-1.0, ValueError)],
    "text_top_k": INTS,
    "text_top_p": [*NUMBERS, NONE, (0.0, ValueError), (-0.1, ValueError), (1.01, ValueError), (50, ValueError)],
    "text_min_p": [*NUMBERS, NONE, (-0.1, ValueError), (1.01, ValueError)],
    "text_temperature": [*NUMBERS, NONE, (-0.1, ValueError), (10**400, ValueError)],
    "log_probabilities": [("yes", TypeError), (1, TypeError), NONE],
    "force_modality_at_start": [
        *[(value, TypeError) for value in ("0", True, 0.0, (LINE, (2,), 1), (LINE,), [])],
        *[(value, ValueError) for value in (4, -1, (LINE, 2), (LINE, (2, 2)), (9, (2,)))],
    ],
    "plan": [("text", TypeError), ([], TypeError), (LINE, TypeError), (["words"], ValueError), ([9], ValueError)],
    "allowed_modalities": [(0, TypeError), ("0", TypeError), ([4], ValueError), ([0.0], TypeError), ({0}, TypeError)],
    "fixed_modality_shape": SHAPES,
    "max_modality_tokens": INTS,
    "modality_steps": [*INTS, NONE],
    "time_shift": [*NUMBERS, NONE, (0.0, ValueError), (-1.0, ValueError)],
    "odeint_kwargs": [("midpoint", TypeError), (3, TypeError), ([("method", "euler")], TypeError)],
    "cfg_scale": NUMBERS,
    "modality_cfg_scale": [*NUMBERS, NONE],
    "cfg_interval": [
        *[(value, TypeError) for value in (0.5, None, (0.1,), (0.1, 0.2, 0.3), ("0", "1"), (False, True), "01")],
        *[(value, ValueError) for value in ((0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.0, NAN))],
    ],
    "cfg_rescale": [*NUMBERS, NONE, (-0.1, ValueError), (1.1, ValueError)],
    "negative_prompt": [
        *[(value, TypeError) for value in (3, "no", text(1).float(), torch.tensor([True]), text(), {1}, [1, 2])],
        *[(value, ValueError) for value in (text(4), text(-1), text(0, 99), [], [text(1)] * 3)],
    ],
    "init_modality_noise": [
        (value, ValueError) for value in ([[0.0]], torch.ones(3), torch.ones(3, 3).long(), torch.full((3, 3), NAN), 3)
    ],
    "init_modality": [
        *[(value, TypeError) for value in (3, "image", text(1), (LINE, text(1)))],
        *[(value, ValueError) for value in ((9, torch.ones(2)), (LINE, torch.ones(2, 2)), torch.full((2,), NAN))],
    ],
    "strength": [*NUMBERS, NONE, (0.0, ValueError), (-0.5, ValueError), (1.1, ValueError), (0.5, ValueError)],
    "modality_mask": [(torch.ones(2).bool(), ValueError), (True, ValueError)],
    "generator": [
        *[(value, TypeError) for value in (3, "cpu", [0], [torch.Generator(), 3], torch.Generator)],
        *[(value, ValueError) for value in ([], [torch.Generator()] * 3)],
    ],
    "return_unprocessed_modalities": [("yes", TypeError), (1, TypeError), NONE],
    "return_without_prompt": [(value, TypeError) for value in (1, "yes", None)],
}

# values at the very edges of what is refused, and options that say the same in another way
TAKEN = {
    "max_length": [(4, dict(max_length=np.int32(4))), (np.int64(9), dict(max_length=9))],
    "max_new_tokens": [(None, {}), (np.int64(2), dict(max_new_tokens=2))],
    "stop_ids": [
        ([], {}),
        ((0,), dict(stop_ids=[0])),
        ({1, 2}, dict(stop_ids=[2, 1])),
        *[(value, dict(stop_ids=[3])) for value in (frozenset([3]), text(3), [np.int64(3)], range(3, 4))],
    ],
    "logits_processors": [
        *[(value, {}) for value in ([], (), [lambda ids, logits: logits])],
        ((script(2, 2, given=2),), dict(logits_processors=[script(2, 2, given=2)])),
    ],
    "text_repetition_penalty": [
        *[(value, dict(text_repetition_penalty=np.float64(value))) for value in (1e-3, 1e3)],
        *[(1, {}), (Fraction(6, 5), dict(text_repetition_penalty=1.2))],
    ],
    "text_top_k": [(None, {}), (1, GREEDILY), (np.int32(3), dict(text_top_k=3)), (10**6, {})],
    "text_top_p": [
        (1e-9, GREEDILY),
        (1, {}),
        (np.float32(0.5), dict(text_top_p=0.5)),
        (Fraction(1, 2), dict(text_top_p=0.5)),
    ],
    "text_min_p": [(0, dict(text_min_p=0.0)), (1, GREEDILY), (0.5, dict(text_min_p=Fraction(1, 2)))],
    "text_temperature": [
        *[(0, dict(text_top_k=1)), (1e-12, GREEDILY)],
        *[(1e6, dict(text_temperature=10**6)), (np.float64(2), dict(text_temperature=2))],
    ],
    "log_probabilities": [(True, {}), (False, {})],
    "force_modality_at_start": [
        *[(None, {}), ((VECTOR, ()), dict(force_modality_at_start=[VECTOR, []]))],
        *[(value, dict(force_modality_at_start=(LINE, (np.int64(2),)))) for value in ((LINE, (2,)), [LINE, [2]])],
    ],
    "plan": [(None, {}), (["text"], dict(plan=("text",))), (("text", (VECTOR, ())), dict(plan=["text", (VECTOR, [])]))],
    "allowed_modalities": [(None, {}), ((), dict(allowed_modalities=[])), (range(2), dict(allowed_modalities=[1, 0]))],
    "fixed_modality_shape": [
        *[(None, {}), ((), dict(fixed_modality_shape=[])), ((2,), dict(fixed_modality_shape=[2]))],
        *[([1, 1], dict(fixed_modality_shape=(1, 1))), ((np.int64(1), 1, 1), dict(fixed_modality_shape=(1, 1, 1)))],
    ],
    "max_modality_tokens": [
        (None, dict(max_modality_tokens=None)),
        (1, dict(max_modality_tokens=np.int64(1))),
        (np.int64(3), dict(max_modality_tokens=3)),
    ],
    "modality_steps": [(1, dict(modality_steps=np.int64(1))), (np.int64(2), {})],
    "time_shift": [
        *[(1e-3, dict(time_shift=np.float64(1e-3))), (1, {}), (3.0, dict(time_shift=3))],
        (Fraction(3, 2), dict(time_shift=1.5)),
    ],
    "odeint_kwargs": [(None, {}), (dict(method="euler"), dict(odeint_kwargs=dict(method="euler", atol=0.1)))],
    "cfg_scale": [
        *[(None, {}), (0, dict(cfg_scale=0.0)), (1, dict(cfg_scale=1.0))],
        *[(-2.0, dict(cfg_scale=-2)), (np.float32(3), {})],
    ],
    "modality_cfg_scale": [(0, dict(modality_cfg_scale=0.0)), (1, {}), (2.5, dict(modality_cfg_scale=Fraction(5, 2)))],
    "cfg_interval": [
        *[((0, 1), {}), ([0.5, 0.5], dict(cfg_interval=(0.5, 0.5)))],
        ((np.float32(0.25), 1), dict(cfg_interval=(0.25, 1.0))),
    ],
    "cfg_rescale": [(0, {}), (1, dict(cfg_rescale=1.0)), (0.7, dict(cfg_rescale=np.float64(0.7)))],
    "negative_prompt": [
        *[(None, {}), ([None], {}), (torch.tensor(2), dict(negative_prompt=text(2)))],
        *[(value, dict(negative_prompt=text(0, 3))) for value in (text(0, 3).int(), [text(0, 3)], (text(0, 3),))],
    ],
    "init_modality_noise": [
        *[(None, {}), (noise(), dict(init_modality_noise=noise().clone()))],
        (noise().float(), dict(init_modality_noise=noise().float().double())),
    ],
    "init_modality": [(None, {}), (torch.ones(2), dict(init_modality=(VECTOR, torch.ones(2).double())))],
    "strength": [(1, {}), (1.0, {})],
    "modality_mask": [(None, {})],
    "generator": [(torch.Generator(), dict(generator=it)) for it in ([torch.Generator()], (torch.Generator(),))],
    "return_unprocessed_modalities": [(True, {}), (False, {})],
    "return_without_prompt": [(True, dict(return_without_prompt=True)), (False, {})],
}
DRAWING = {"modality_steps", "time_shift", "odeint_kwargs", "init_modality_noise", "return_unprocessed_modalities"}
DRAWING |= {"cfg_scale", "modality_cfg_scale", "cfg_interval", "cfg_rescale"}
WITHOUT_EFFECT = {
    "strength",
    "modality_mask",
    "log_probabilities",
    "return_unprocessed_modalities",
}  # of the values that are tried here
NAMES = [field.name for field in fields(SamplingOptions)]


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def idle(model, monkeypatch):
    """A model that must not be run."""
    monkeypatch.setattr(model, "forward_stream", lambda *args, **options: pytest.fail("something was computed"))
    return model


def cases(table):
    return [pytest.param(name, i, id=f"{name}-{i}") for name, values in table.items() for i in range(len(values))]


def test_every_option_is_tried_here():
    assert list(REFUSED) == list(TAKEN) == NAMES


@pytest.mark.parametrize(("name", "i"), cases(REFUSED))
def test_a_wrong_value_is_refused_by_name(idle, name, i):
    value, error = REFUSED[name][i]
    for call in (idle.sample, idle.create_engine().submit, lambda prompt, **it: idle.sample_many([prompt, None], **it)):
        with pytest.raises(error, match=name):
            call(text(1), **{name: value})
    with pytest.raises(error, match=name):
        next(idle.sample_stream(text(1), **{name: value}))


def sample_with(model, name: str, **options) -> list:
    """A sample in which the option of this name matters."""
    options = (
        dict(generator=torch.Generator().manual_seed(3), max_length=40, modality_steps=2, max_modality_tokens=4)
        | options
    )
    if name in DRAWING:
        options["force_modality_at_start"] = (LINE, (2,))
    return model.sample([text(1), latents(VECTOR), text(2)] if name in DRAWING else text(1), **options)


def are_same(sample: list, other: list) -> bool:
    return shapes_of(sample) == shapes_of(other) and all(
        torch.allclose(part[1], same[1], rtol=0, atol=1e-9)
        for part, same in zip(drawn(sample), drawn(other), strict=True)
    )


@pytest.mark.parametrize(("name", "i"), cases(TAKEN))
def test_a_value_does_what_it_says(model, name, i):
    value, same = TAKEN[name][i]
    assert_same(sample_with(model, name, **{name: value}), sample_with(model, name, **same))


@pytest.mark.parametrize("name", TAKEN)
def test_every_option_has_an_effect(model, name):
    plain = sample_with(model, name)
    changed = [not are_same(sample_with(model, name, **{name: value}), plain) for value, _ in TAKEN[name]]
    assert any(changed) == (name not in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 1).bool(), ValueError, r"modality_mask must have the axial shape of the latents, \(1, 2\), got"),
        (torch.ones(1, 2, 1).bool(), ValueError, r"got \(1, 2, 1\)"),
        (
            torch.ones(1, 2),
            TypeError,
            "modality_mask must be a bool tensor, True where to draw anew, got torch.float32",
        ),
        ([[True, False]], TypeError, "modality_mask must be a bool tensor.* got list"),
    ],
)
def test_a_mask_is_that_of_the_latents(idle, mask, error, message):
    with pytest.raises(error, match=message):
        idle.sample(text(1), init_modality=latents(IMAGE, 1, 2), modality_mask=mask)


def test_options_may_come_together(model):
    """`options=` is the same as its fields, and keywords beside it win."""
    options = SamplingOptions(**GREEDY, force_modality_at_start=(LINE, (2,)), init_modality_noise=noise())
    expected = model.sample(text(1), **GREEDY, force_modality_at_start=(LINE, (2,)), init_modality_noise=noise())
    engine = model.create_engine()
    request = engine.submit(text(1), options=options)
    *_, ended = model.sample_stream(text(1), options=options)
    for sample in (
        model.sample(text(1), options=options),
        model.sample_many([text(1)], options=options)[0],
        engine.sample_many([text(1)], options=options)[0],
        request.result(),
        ended.sample,
    ):
        assert_same(sample, expected)
    shorter = model.sample(text(1), options=options, max_length=9, force_modality_at_start=(LINE, (1,)))
    assert shapes_of(drawn(shorter))[0] == (LINE, (1, 3))
    assert options.max_length == GREEDY["max_length"]
    for wrong in (dict(max_length=3), "greedy", 3):
        with pytest.raises(TypeError, match=f"options must be SamplingOptions, got {type(wrong).__name__}"):
            model.sample(text(1), options=wrong)


def test_options_do_not_change():
    options = SamplingOptions()
    with pytest.raises(FrozenInstanceError):
        options.max_length = 3


# which options there are


@pytest.mark.parametrize("name", ["temperature", "top_k", "max_len", "text_topk", "seed", "batch_size"])
def test_an_unknown_option_is_refused(idle, name):
    for call in (idle.sample, idle.sample_one, idle.sample_stream, idle.create_engine().submit):
        with pytest.raises(TypeError, match=name):
            call(text(1), **{name: 1})
    with pytest.raises(TypeError, match=name):
        idle.sample_many([text(1)], **{name: 1})
    with pytest.raises(TypeError, match=name):
        idle.create_engine().sample_many([text(1)], **{name: 1})


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("sample", ["prompt", "max_length", "cache_kv", "progress", "options"]),
        ("sample_one", ["prompt", "max_length", "cache_kv", "progress", "options"]),
        ("sample_many", ["prompts", "max_length", "max_batch", "cache_kv", "progress", "options"]),
        ("sample_stream", ["prompt", "max_length", "cache_kv", "options"]),
        (Engine.submit, ["self", "prompt", "listen", "timeout", "options"]),
        (AsyncEngine.sample, ["self", "prompt", "timeout", "options"]),
        (AsyncEngine.stream, ["self", "prompt", "timeout", "options"]),
    ],
)
def test_signatures_show_every_option_with_its_default(model, method, own):
    given = [(method, own)]
    if isinstance(method, str):
        given = [(getattr(model, method), own), (getattr(Transfusion, method), ["self", *own])]
    for bound, before in given:
        parameters = inspect.signature(bound).parameters
        assert list(parameters) == [*before, *(name for name in NAMES if name not in before)]
        for field in fields(SamplingOptions):
            kind = "POSITIONAL_OR_KEYWORD" if field.name in before else "KEYWORD_ONLY"
            assert parameters[field.name].default == field.default
            assert parameters[field.name].kind.name == kind


def call_alone(model, kind: str, **options):
    if kind == "text":
        return model.generate_text_only(torch.tensor([[1]]), 3, **options)
    return model.generate_modality_only(**dict(modality_type=VECTOR, fixed_modality_shape=()) | options)


@pytest.mark.parametrize("kind", ["text", "modality"])
def test_what_is_made_alone_takes_its_own_options_only(idle, kind):
    taken = inspect.signature(getattr(idle, f"generate_{kind}_only")).parameters
    refused = [name for name in NAMES if name not in taken]
    assert {"plan", "allowed_modalities", "stop_ids", "cfg_scale", "max_length", "text_top_k"} <= set(refused)
    for name in refused:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call_alone(idle, kind, **{name: TAKEN[name][0]})


@pytest.mark.parametrize("name", ["repetition_penalty", "top_k", "top_p", "min_p", "temperature", "logits_processors"])
def test_options_of_text_alone_are_checked_alike(idle, name):
    for value, error in REFUSED[name if name == "logits_processors" else f"text_{name}"]:
        with pytest.raises(error, match=name):
            call_alone(idle, "text", **{name: value})


@pytest.mark.parametrize("name", ["modality_steps", "time_shift", "odeint_kwargs", "init_modality_noise", "strength"])
def test_options_of_a_modality_alone_are_checked_alike(idle, name):
    for value, error in REFUSED[name]:
        with pytest.raises(error, match=name):
            call_alone(idle, "modality", **{name: value})


# randomness


PROMPTS = [None, text(1), [text(2), latents(IMAGE, 1, 2)], latents(VECTOR), text(3, 1, 2)]
FREE = dict(max_length=24, modality_steps=1, max_modality_tokens=4, text_min_p=0.0, text_top_p=0.95, cfg_scale=1.0)


def endless(ids, logits):
    return logits.index_fill(0, torch.tensor([5, 6]), -50.0)  # neither eos nor meta


WORDY = FREE | dict(logits_processors=[endless])  # too long to be the same by chance


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def alone(model):
    """Every prompt by itself, with a seed of its own."""
    return [model.sample(prompt, generator=seeded(i), **FREE) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("order", "max_batch", "cache_kv"),
    [
        ([0, 1, 2, 3, 4], 64, True),
        ([4, 2, 0, 3, 1], 2, True),
        ([1, 3, 4, 0, 2], 1, True),
        ([3, 4, 1, 2, 0], 3, False),
    ],
)
def test_a_seed_makes_the_same_sample_in_any_company(model, alone, order, max_batch, cache_kv):
    samples = model.sample_many(
        [PROMPTS[i] for i in order], generator=generators(*order), max_batch=max_batch, cache_kv=cache_kv, **FREE
    )
    for i, sample in zip(order, samples, strict=True):
        assert_same(sample, alone[i])


def test_seeds_and_prompts_make_different_samples(model, alone):
    assert len({str(shapes_of(sample)) for sample in alone}) == len(alone)
    samples = model.sample_many([None] * 6, generator=generators(*range(6)), **WORDY)
    assert len({str(shapes_of(sample)) for sample in samples}) == 6
    again = model.sample_many([None] * 2, generator=generators(3, 3), **WORDY)
    for one, other in zip(again, samples[3:5], strict=True):
        assert (shapes_of(one) == shapes_of(other)) == (other is samples[3])


def test_every_way_to_ask_gives_the_same_sample(model, alone):
    engine = model.create_engine()
    requests = [
        engine.submit(PROMPTS[2], generator=[seeded(2)], **FREE),
        engine.submit(PROMPTS[2], generator=(seeded(2),), listen=False, **FREE),
    ]
    engine.run()
    *_, ended = model.sample_stream(PROMPTS[2], generator=seeded(2), **FREE)
    made = [request.result() for request in requests] + [ended.sample]
    made += engine.sample_many([PROMPTS[2]], generator=generators(2), **FREE)
    for sample in made:
        assert_same(sample, alone[2])


def test_the_generator_of_a_request_is_its_own_source(model, alone):
    """One prompt, one generator: it need not seed another."""
    engine = model.create_engine()
    request = engine.submit(PROMPTS[1], generator=seeded(1), **FREE)
    engine.run()
    assert_same(request.result(), alone[1])


def test_requests_that_come_while_others_are_under_way_are_no_different(model, alone):
    engine, requests = model.create_engine(max_batch=3), []
    for i in (3, 0, 4, 1, 2):
        requests.append((i, engine.submit(PROMPTS[i], generator=[seeded(i)], **FREE)))
        for _ in range(5):
            engine.step()
        if i == 4:
            engine.submit(None, **FREE).cancel()
    engine.run()
    for i, request in requests:
        assert_same(request.result(), alone[i])


def test_one_generator_seeds_all_prompts(model):
    first, again = (model.sample_many([None] * 4, generator=seeded(7), **WORDY) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert_same(one, other, tolerance=0)
    assert len({str(shapes_of(sample)) for sample in first}) == 4
    source = seeded(7)
    assert_same(model.sample_many([None] * 4, generator=source, max_batch=1, **WORDY)[3], first[3])
    later = model.sample_many([None] * 4, generator=source, **WORDY)
    assert shapes_of(later[0]) != shapes_of(first[0]), "it has moved on"
    other = model.sample_many([None] * 4, generator=seeded(6), **WORDY)
    assert shapes_of(other[0]) != shapes_of(first[0])


def test_one_generator_means_the_same_in_every_call(model):
    """One prompt with one generator: `sample`, `sample_many` of it alone, a request, a stream, and one of four."""
    engine = model.create_engine()
    request = engine.submit(None, generator=seeded(7), **WORDY)
    engine.run()
    *_, ended = model.sample_stream(None, generator=seeded(7), **WORDY)
    expected = model.sample(None, generator=seeded(7), **WORDY)
    for sample in (
        model.sample_many([None], generator=seeded(7), **WORDY)[0],
        model.sample_many([None], generator=[seeded(7)], **WORDY)[0],
        request.result(),
        ended.sample,
        model.sample_many([None] * 4, generator=seeded(7), **WORDY)[0],
    ):
        assert_same(sample, expected, tolerance=0)
    source = seeded(7)
    one_by_one = [model.sample(None, generator=source, **WORDY) for _ in range(4)]
    for one, other in zip(one_by_one, model.sample_many([None] * 4, generator=seeded(7), **WORDY), strict=True):
        assert_same(one, other)


def test_a_generator_serves_one_live_request_at_a_time(model):
    engine, source, message = model.create_engine(), seeded(7), "generator: it is that of a request which is not done"
    expected = model.sample_many([None] * 2, generator=seeded(7), **WORDY)
    request = engine.submit(None, generator=source, **WORDY)
    for refused in (
        lambda: engine.submit(None, generator=source, **WORDY),
        lambda: engine.submit(None, generator=[source], **WORDY),
        lambda: engine.sample_many([None], generator=source, **WORDY),
        lambda: engine.sample_many([None] * 2, generator=[seeded(1), source], **WORDY),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    engine.run()
    assert_same(request.result(), expected[0])
    following = engine.submit(None, generator=source, **WORDY)  # it has moved on by one seed, whatever was refused
    following.cancel()
    engine.submit(None, generator=source, **WORDY).cancel()
    second = engine.submit(None, generator=generators(7)[0], **WORDY)
    engine.run()
    assert_same(second.result(), expected[0])
    with pytest.raises(ValueError, match="generator: one is given twice"):
        engine.sample_many([None] * 2, generator=[source, source], **WORDY)


def test_a_generator_for_each_prompt_or_one_for_all(idle):
    for given, count in ((generators(1, 2), 3), (generators(1, 2), 1), ([], 2), (tuple(generators(1)), 2)):
        message = f"generator: {len(given)} of them for {count} prompts; give one for each, or one for all"
        with pytest.raises(ValueError, match=message):
            idle.sample_many([None] * count, generator=given)
    for given, name in ((7, "int"), ([7, 8], "list"), ([*generators(1), None], "list"), ("cpu", "str")):
        with pytest.raises(TypeError, match=f"generator must be a torch.Generator or a list of them, got {name}"):
            idle.sample_many([None] * 2, generator=given)
    with pytest.raises(ValueError, match="generator: 2 of them for 1"):
        idle.generate_text_only(torch.tensor([[1]]), 4, generator=generators(1, 2))
    with pytest.raises(TypeError, match="generator must be"):
        idle.generate_modality_only(2, generator=[1, 2])


def test_the_seed_of_torch_repeats_everything(model):
    def everything():
        torch.manual_seed(11)
        return [
            *model.sample_many(PROMPTS, **FREE),
            model.sample(text(1), **FREE),
            [model.generate_text_only(torch.tensor([[1], [2]]), 20).flatten()],
            [(LINE, model.generate_modality_only(2, modality_type=LINE, fixed_modality_shape=(3,), modality_steps=1))],
        ]

    one, other = everything(), everything()
    for sample, again in zip(one, other, strict=True):
        assert_same(sample, again, tolerance=0)
    assert shapes_of(model.sample(text(1), **FREE)) != shapes_of(one[5])


def test_noise_comes_from_the_generator_of_the_request(model):
    for modality, shape, rows in ((VECTOR, (), 1), (LINE, (3,), 3), (VIDEO, (1, 2, 2), 4)):
        channels = latents(modality, *shape)[1].shape[-1]
        start = noise_of(seeded(8), rows, channels)
        options = FREE | dict(plan=[(modality, shape)])
        samples = model.sample_many([None, text(1)], generator=generators(8, 8), **options)
        for sample, prompt in zip(samples, [None, text(1)], strict=True):
            assert_same(sample, model.sample(prompt, init_modality_noise=start, **options))
            assert_drawn(model, sample, steps=1, start=start)
        instances = model.generate_modality_only(
            3, modality_type=modality, fixed_modality_shape=shape, modality_steps=1, generator=generators(8, 9, 8)
        )
        expected = model.generate_modality_only(
            modality_type=modality, fixed_modality_shape=shape, modality_steps=1, init_modality_noise=start
        )
        torch.testing.assert_close(instances[[0, 2]], expected.expand(2, *expected.shape[1:]), atol=1e-9, rtol=0)
        assert (instances[1] - instances[0]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_all_random_numbers_follow_from_one_seed(model, seed):
    """Those of text are counted by the ids that the model chose, those of noise by the modalities of the sample."""
    plan = [("text", 3), (LINE, (2,)), ("text", 4), (IMAGE, (1, 2)), "text"]
    options = FREE | dict(plan=plan, max_length=60, text_top_p=1.0, text_temperature=0.7)
    prompt = [text(1), latents(VECTOR), text(2)]
    sample = model.sample(prompt, generator=seeded(seed), **options)
    own = seed_of(seeded(seed))
    for number, (rows, channels) in ((1, (2, 3)), (2, (2, 1))):
        before = sample[: 2 * number + 2]
        start = noise_of(seeded(seed), rows, channels, number)
        assert_drawn(model, before, given=number, steps=1, start=start)
    with torch.no_grad():
        [logits] = model([sample], return_loss=False)
    slots, chosen = slots_of(model, sample), 0
    at = len(slots_of(model, sample[:2])) + 2  # behind the vector: its eom, and 2
    for i, part in enumerate(plan):
        if isinstance(part, tuple) and part[0] != "text":
            at += slots[at:].index(model.eom_ids[part[0]]) + 1
            continue
        end = model.eos_id if i + 1 == len(plan) else model.meta_id
        ids = torch.tensor([0, 1, 2, 3, end])
        for _ in range(part[1] if isinstance(part, tuple) else 60):
            p = (logits[at - 1, ids] / 0.7).softmax(0).cumsum(0)
            expected = ids[int((p <= number_of(own, chosen) * p[-1]).sum())]
            assert slots[at] == expected, f"slot {at} of {slots}"
            chosen += 1
            if slots[at] == end:
                break
            at += 1
    assert chosen > 3


# the caller's own random numbers


def stream_a_little(model, **options):
    for _, _ in zip(range(3), model.sample_stream(**options), strict=False):
        pass


def draw_three(model, **options):
    model.generate_modality_only(3, modality_type=LINE, fixed_modality_shape=(2,), modality_steps=1, **options)


def fail(ids, logits):
    raise LookupError


ONE, MANY = 1, 3
CALLS = {
    "greedy": (MANY, lambda model, **options: model.sample_many([None] * 3, **GREEDY, **options)),
    "free": (MANY, lambda model, **options: model.sample_many([None, text(1), text(2)], **FREE, **options)),
    "one by one": (MANY, lambda model, **options: model.sample_many([None] * 3, max_batch=1, **FREE, **options)),
    "read again": (MANY, lambda model, **options: model.sample_many([None] * 3, cache_kv=False, **FREE, **options)),
    "fails": (MANY, lambda model, **options: model.sample_many([None] * 3, logits_processors=[fail], **options)),
    "drawn": (MANY, lambda model, **options: model.sample_many([None] * 3, plan=[(LINE, (3,))], **FREE, **options)),
    "one": (ONE, lambda model, **options: model.sample(text(1), **FREE, **options)),
    "a stream": (ONE, lambda model, **options: stream_a_little(model, **FREE, **options)),
    "a request": (ONE, lambda model, **options: model.create_engine().submit(**FREE, **options)),
    "text": (MANY, lambda model, **options: model.generate_text_only(torch.ones(3, 1).long(), 9, **options)),
    "modalities": (MANY, lambda model, **options: draw_three(model, **options)),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_taken_from_the_caller_but_seeds(model, name):
    count, call = CALLS[name]
    torch.manual_seed(3)
    torch.randint(2**62, (count,))
    expected = torch.get_rng_state()
    for given, state in ((None, expected), (generators(*range(count)), torch.manual_seed(3).get_state())):
        torch.manual_seed(3)
        numpy_state = np.random.get_state()[1].tolist()
        if name == "fails":
            with pytest.raises(LookupError):
                call(model, generator=given)
        else:
            call(model, generator=given)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.random.get_state()[1].tolist() == numpy_state


def test_modalities_of_one_sample_start_from_different_noise(model):
    sample = model.sample(generator=seeded(1), **FREE | dict(plan=[(LINE, (2,)), (LINE, (2,))], max_length=60))
    one, other = (x for _, x in drawn(sample))
    assert (one - other).abs().max() > 1e-3
