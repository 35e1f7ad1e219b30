"""Negative prompts: the unconditional branch begins with them and has no other text."""

from math import prod

import pytest
import torch
from generation_models import (
    IMAGE,
    LINE,
    VECTOR,
    WRITES,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    options_over,
    shapes_of,
    text,
    to_pieces,
    velocity_behind,
    watch_evaluations,
)
from torchdiffeq import odeint

from transfusion_pytorch.sequence.samples import Modality, Text

PLAN = [("text", 2), (LINE, (3,)), ("text", 3), (IMAGE, (1, 2)), (VECTOR, ())]
PROMPTS = [None, text(1, 2), [latents(LINE, 2), text(3)], [text(0), latents(IMAGE, 2, 1), text(1)]]


options_with = options_over(max_length=80, plan=PLAN, cfg_scale=2.5)


def negated(model, before: list, negative) -> list:
    """The markers and modalities that stand before a span, behind sos and the negative prompt."""
    ids = torch.tensor([model.sos_id, *negative.tolist()])
    kept = [Text(it.ids[it.ids >= model.vocabulary.num_text]) if isinstance(it, Text) else it for it in before]
    return [Text(torch.cat([ids, kept[0].ids[1:]])), *kept[1:]]


def bare(model, before: list, negative) -> list:
    """The negative prompt, and the markers that open the span itself."""
    last = (before[-1].ids == model.meta_id).nonzero()[-1, 0]
    return [Text(torch.cat([text(model.sos_id), negative, before[-1].ids[last:]]))]


def assert_led_away(model, sample, given: int, negative, *, scale: float, modality_scale: float = 1.0, steps: int = 2):
    """Every modality but the `given` of the prompt, by the formula; everything is read again each time."""
    pieces = to_pieces(sample)
    places = [i for i, piece in enumerate(pieces) if isinstance(piece, Modality)]
    for i in places[given:]:
        modality, x = sample[i]
        shape, before = tuple(x.shape[:-1]), pieces[:i]
        has_modality = any(isinstance(piece, Modality) for piece in before)

        def velocity(t, flat, before=before, modality=modality, shape=shape, has_modality=has_modality):
            span = Modality(modality, flat.reshape(*shape, flat.shape[-1]))
            given = velocity_behind(model, before, span, t)
            without = velocity_behind(model, negated(model, before, negative), span, t)
            if modality_scale == 1 or not has_modality:
                return without + scale * (given - without)
            nothing = velocity_behind(model, bare(model, before, negative), span, t)
            return nothing + modality_scale * (without - nothing) + scale * (given - without)

        start = noise()[: prod(shape), : x.shape[-1]]
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        with torch.no_grad():
            expected = odeint(velocity, start, grid, method="midpoint")[-1]
        torch.testing.assert_close(x.reshape(expected.shape), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("negative", [text(3), text(0, 2, 2, 1)])
@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize("prompt", range(4))
def test_a_drawing_is_led_away_from_a_negative_prompt(prompt, negative, cache_kv):
    model, prompt = build(push=WRITES, seed=2), PROMPTS[prompt]
    sample = model.sample(prompt, negative_prompt=negative, cache_kv=cache_kv, **options_with())
    given = sum(isinstance(part, tuple) for part in prompt) if isinstance(prompt, list) else 0
    assert len(drawn(sample)) == given + 3
    assert_led_away(model, sample, given, negative, scale=2.5)
    other = model.sample(prompt, cache_kv=cache_kv, **options_with())
    assert (drawn(other)[given][1] - drawn(sample)[given][1]).abs().max() > 1e-3, "it is no null text"


@pytest.mark.parametrize("scale", [2.5, -1.0, 0.0])
@pytest.mark.parametrize("cache_kv", [True, False])
def test_both_guidances_begin_with_it(scale, cache_kv):
    model, negative = build(push=WRITES, seed=2), text(3, 0)
    options = options_with(cfg_scale=scale, modality_cfg_scale=1.7)
    for prompt, given in ((text(1), 0), ([text(0), latents(IMAGE, 2, 1), text(1)], 1)):
        sample = model.sample(prompt, negative_prompt=negative, cache_kv=cache_kv, **options)
        assert_led_away(model, sample, given, negative, scale=scale, modality_scale=1.7)


def test_it_works_without_any_text_in_the_sample(monkeypatch):
    """Where null text would leave nothing to guide with."""
    model, negative = build(push=WRITES), text(2, 1)
    options = options_with(plan=[(LINE, (2,))])
    evaluated = watch_evaluations(monkeypatch, model)
    sample = model.sample(None, negative_prompt=negative, **options)
    assert {count for count, _ in evaluated} == {2}
    assert_led_away(model, sample, 0, negative, scale=2.5)


def test_text_is_written_as_without_it():
    model = build(seed=3)
    free = options_with(plan=["text"], text_temperature=0.0, max_length=30)
    for prompt in PROMPTS:
        assert_same(model.sample(prompt, negative_prompt=text(1), **free), model.sample(prompt, **free))


def test_every_prompt_may_have_its_own():
    model, negatives = build(push=WRITES), [text(3), None, text(0, 1), text(3)]
    samples = model.sample_many(PROMPTS, negative_prompt=negatives, **options_with())
    engine = model.create_engine()
    requests = [
        engine.submit(prompt, negative_prompt=negative, **options_with())
        for prompt, negative in zip(PROMPTS, negatives, strict=True)
    ]
    engine.run()
    for prompt, negative, sample, request in zip(PROMPTS, negatives, samples, requests, strict=True):
        assert_same(sample, model.sample(prompt, negative_prompt=negative, **options_with()))
        assert_same(sample, request.result())
    alike = model.sample_many(PROMPTS, negative_prompt=text(3), **options_with())
    for sample, prompt in zip(alike, PROMPTS, strict=True):
        assert_same(sample, model.sample(prompt, negative_prompt=[text(3)], **options_with()))


@pytest.mark.parametrize("form", [torch.tensor(3), torch.tensor([[3]]), torch.tensor([3], dtype=torch.int32)])
def test_it_has_the_forms_of_text(form):
    model = build(push=WRITES)
    expected = model.sample(text(1), negative_prompt=text(3), **options_with())
    assert_same(model.sample(text(1), negative_prompt=form, **options_with()), expected)


def test_memory_of_it_is_the_callers():
    model, negative = build(push=WRITES), text(3, 1)
    engine = model.create_engine()
    request = engine.submit(text(1), negative_prompt=negative, **options_with())
    negative.fill_(0)
    engine.run()
    assert_same(request.result(), model.sample(text(1), negative_prompt=text(3, 1), **options_with()))


@pytest.fixture
def idle(monkeypatch):
    """A model that must not be run."""
    model = build()
    monkeypatch.setattr(model, "forward_stream", lambda *args, **options: pytest.fail("something was computed"))
    return model


def test_at_scale_1_it_is_an_error(idle):
    message = "negative_prompt: guidance is off .cfg_scale is 1.; set cfg_scale to another number"
    for call in (idle.sample, idle.sample_stream, idle.create_engine().submit):
        with pytest.raises(ValueError, match=message):
            call(text(1), negative_prompt=text(2), **options_with(cfg_scale=1.0))
    with pytest.raises(ValueError, match=message):
        idle.sample_many([text(1)] * 2, negative_prompt=[None, text(2)], **options_with(cfg_scale=1.0))
    with pytest.raises(ValueError, match=message):
        idle.sample(text(1), negative_prompt=text(2), **options_with(cfg_scale=1.0, modality_cfg_scale=2.0))


def test_at_scale_1_by_default_too():
    model = build(prob_uncond=0.0)
    with pytest.raises(ValueError, match="guidance is off"):
        model.sample(text(1), negative_prompt=text(2), **options_with(cfg_scale=None))


@pytest.mark.parametrize(
    ("negative", "error", "message"),
    [
        (text(1, 4), ValueError, "negative_prompt: token id 4"),
        (text(-1), ValueError, "negative_prompt: token id -1"),
        (text(), TypeError, r"negative_prompt must be an integer tensor of text ids \(n,\), got torch.* \(0,\)"),
        (text(1).float(), TypeError, r"negative_prompt must be .* got torch.float32 \(1,\)"),
        ("no dogs", TypeError, "negative_prompt must be .* got str"),
        ([1], TypeError, "negative_prompt must be .* got int"),
        ([text(1), text(2)], ValueError, "negative_prompt: 2 of them for 1 prompts; give one for each, or one for all"),
    ],
)
def test_what_is_no_negative_prompt_is_refused(idle, negative, error, message):
    with pytest.raises(error, match=message):
        idle.sample(text(1), negative_prompt=negative, **options_with())


def test_a_sample_does_not_show_it():
    model = build(push=WRITES)
    one, other = (model.sample(text(1), negative_prompt=it, **options_with()) for it in (text(3, 3, 3), text(0)))
    assert [len(part) for part in shapes_of(one)] == [len(part) for part in shapes_of(other)]
    assert one[0].tolist()[:2] == [model.sos_id, 1]
