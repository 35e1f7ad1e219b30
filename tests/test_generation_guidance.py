"""Guidance by text and by modalities, and what each request of an engine has to itself: grids, solvers and scales."""

from contextlib import suppress
from functools import cache
from itertools import pairwise

import pytest
import torch
from generation_models import (
    IMAGE,
    LINE,
    VECTOR,
    VIDEO,
    assert_flows,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    options_over,
    straight_to,
    text,
    watch_evaluations,
)

from transfusion_pytorch import EndReason, ModalityDone
from transfusion_pytorch.flow.solver import ADAPTIVE_METHODS, SINGLE_STEP_METHODS

TOLERANT = dict(atol=1.0, rtol=1.0)  # the flow of a model that learnt nothing is rough
STAGES = {  # the times, within an interval, at which each method asks for a velocity
    "euler": (0.0,),
    "midpoint": (0.0, 1 / 2),
    "heun2": (0.0, 1.0),
    "heun3": (0.0, 1 / 3, 2 / 3),
    "rk4": (0.0, 1 / 3, 2 / 3, 1.0),
}
LINE_OF_2 = (LINE, (2,))


options_with = options_over(plan=[LINE_OF_2], max_length=60)


# when guidance acts


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.9), (0.26, 0.27)])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_guidance_acts_at_evaluations_within_its_interval(monkeypatch, method, interval):
    model, steps = build(), 4
    evaluated = watch_evaluations(monkeypatch, model)
    sample = model.sample(
        text(1, 2),
        **options_with(cfg_scale=4.0, cfg_interval=interval, modality_steps=steps, odeint_kwargs=dict(method=method)),
    )
    times = [(step + stage) / steps for step in range(steps) for stage in STAGES[method]]
    assert [t for _, t in evaluated] == pytest.approx(times)
    assert [rows for rows, _ in evaluated] == [1 + (interval[0] <= t <= interval[1]) for t in times]
    assert_flows(model, sample, steps=steps, scale=4.0, interval=interval, method=method)


@pytest.mark.parametrize("steps", [4, 5, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_ends_of_the_interval_belong_to_it(monkeypatch, dtype, steps):
    model = build().to(dtype)
    evaluated = watch_evaluations(monkeypatch, model)
    for low, high in ((0, 3), (1, steps - 1), (2, 2)):
        interval, solver = (low / steps, high / steps), dict(odeint_kwargs=dict(method="euler"))
        evaluated.clear()
        model.sample(text(1), **options_with(cfg_interval=interval, modality_steps=steps, **solver))
        assert [rows for rows, _ in evaluated] == [1 + (low <= step <= high) for step in range(steps)], interval


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_guidance_outside_of_all_times_changes_nothing(method):
    model, solver = build(), dict(method=method) | TOLERANT
    plain, other, acting = (
        model.sample(text(1), **options_with(modality_steps=4, odeint_kwargs=solver, **guidance))
        for guidance in (
            dict(cfg_scale=1.0),
            dict(cfg_scale=9.0, cfg_interval=(0.051, 0.052)),
            dict(cfg_scale=9.0, cfg_interval=(0.0, 0.052)),
        )
    )
    assert_same(plain, other)
    assert not torch.allclose(drawn(plain)[0][1], drawn(acting)[0][1])


def test_rows_in_and_out_of_their_intervals_stand_in_one_batch(monkeypatch):
    model = build()
    evaluated = watch_evaluations(monkeypatch, model)
    options = options_with(modality_steps=4, odeint_kwargs=dict(method="euler"))
    wanted = [dict(cfg_interval=(0.2, 0.6)), dict(cfg_interval=(0.5, 1.0)), dict(cfg_scale=1.0)]
    engine = model.create_engine()
    requests = [engine.submit(text(1), **options | own) for own in wanted]
    engine.run()
    assert [rows for rows, _ in evaluated] == [3, 4, 5, 4]
    for request, interval, scale in zip(requests, [(0.2, 0.6), (0.5, 1.0), (0, 1)], [3.0, 3.0, 1.0], strict=True):
        assert_flows(model, request.result(), steps=4, method="euler", interval=interval, scale=scale)


@pytest.mark.parametrize("amount", [0.3, 1.0])
@pytest.mark.parametrize("prompt", [text(1), [latents(IMAGE, 2, 1), text(1)]])
def test_guided_velocities_are_brought_back_to_the_spread_of_the_unguided(prompt, amount):
    model, guidance = build(seed=1), dict(cfg_scale=5.0, modality_cfg_scale=2.0)
    options = options_with(plan=[(VIDEO, (2, 1, 2))], modality_steps=3, **guidance)
    sample, plain = (model.sample(prompt, **options, cfg_rescale=it) for it in (amount, 0.0))
    given = len(drawn(sample)) - 1
    assert_flows(model, sample, given, steps=3, scale=5.0, modality_scale=2.0, rescale=amount)
    assert not torch.allclose(drawn(sample)[-1][1], drawn(plain)[-1][1])


def test_without_guidance_there_is_nothing_to_bring_back():
    model = build()
    plain, rescaled = (
        model.sample(text(1), **options_with(cfg_scale=1.0, cfg_rescale=amount)) for amount in (0.0, 1.0)
    )
    assert_same(plain, rescaled, tolerance=0)


def test_a_single_number_is_guided_however_much_is_brought_back():
    model = build()
    rescaled, plain = (
        model.sample(text(1), **options_with(plan=[(IMAGE, (1, 1))], cfg_scale=2.0, cfg_rescale=amount))
        for amount in (1.0, 0.0)
    )
    assert_same(rescaled, plain)


# by what guidance acts

HISTORIES = {
    "nothing": (None, False, False),
    "text": (text(1, 3), True, False),
    "modality": (latents(IMAGE, 2, 1), False, True),
    "both": ([latents(IMAGE, 2, 1), text(1, 3)], True, True),
    "more": ([text(2), latents(LINE, 1), text(0, 1), latents(VIDEO, 1, 2, 1), latents(VECTOR)], True, True),
}


@pytest.mark.parametrize("scales", [(3.0, 1.0), (1.0, 2.0), (3.0, -1.0)])
@pytest.mark.parametrize("history", HISTORIES)
def test_guidance_takes_text_away_and_then_modalities(monkeypatch, history, scales):
    (prompt, has_text, has_modality), (scale, modality_scale), model = HISTORIES[history], scales, build(seed=3)
    evaluated = watch_evaluations(monkeypatch, model)
    options = options_with(cfg_scale=scale, modality_cfg_scale=modality_scale)
    sample = model.sample(prompt, **options)
    by_modality = has_modality and modality_scale != 1
    by_text = has_text and (scale != 1 or by_modality)  # the second row of three stands between the others
    assert [rows for rows, _ in evaluated] == [1 + by_text + by_modality] * 4
    given = len(drawn(sample)) - 1
    assert_flows(model, sample, given, scale=scale, modality_scale=modality_scale)
    assert_same(model.sample(prompt, cache_kv=False, **options), sample)


def test_each_scale_reaches_what_is_drawn():
    model, prompt = build(seed=3), HISTORIES["both"][0]
    made = [
        drawn(model.sample(prompt, **options_with(cfg_scale=scale, modality_cfg_scale=modality_scale)))[-1][1]
        for scale, modality_scale in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0), (2.0, 3.0))
    ]
    for i, one in enumerate(made):
        assert not any(torch.allclose(one, other) for other in made[:i])


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0), (3.0, 2.0)])
def test_only_what_guidance_needs_is_read(scales):
    scale, modality_scale = scales
    model, prompt = build(), HISTORIES["more"][0]
    engine = model.create_engine()
    engine.sample_many([prompt], **options_with(cfg_scale=scale, modality_cfg_scale=modality_scale))
    opening = len(model.vocabulary.opening(*LINE_OF_2))
    # 3 texts of 1, 2 and 0 ids; a line of 1, a video of 2 and a vector, with what opens and closes them
    markers = sum(len(model.vocabulary.opening(kind, shape)) + 1 for kind, shape in ((LINE, (1,)), (VIDEO, (1, 2, 1))))
    markers += len(model.vocabulary.opening(VECTOR, ())) + 1
    whole, bare = 1 + 3 + (1 + 2 + 1) + markers + opening, 1 + 3 + opening
    lanes = whole if scales == (1, 1) else 2 * whole + bare * (modality_scale != 1)
    assert engine.stats.tokens_read == lanes
    assert engine.stats.evaluations == 4


@pytest.mark.parametrize("written", [1, 2, 4])
def test_a_modality_that_a_prompt_opens_is_guided_as_any_other(written):
    model = build(push=dict(meta=-9.0))
    opened = torch.cat([text(2), model.vocabulary.opening(IMAGE, (1, 2))[:written]])
    options = options_with(plan=None, cfg_scale=2.0, modality_cfg_scale=3.0, max_length=26)
    sample = model.sample([latents(LINE, 2), text(1), opened], **options)
    assert len(drawn(sample)) == 2
    assert_flows(model, sample, 1, scale=2.0, modality_scale=3.0)


@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize("prompt", [None, text(1), latents(VECTOR)])
def test_what_was_drawn_before_guides_what_comes_after_it(prompt, cache_kv):
    model, flow = build(seed=2), dict(steps=2, scale=2.0, modality_scale=-0.5, interval=(0.2, 0.9), rescale=0.4)
    options = options_with(
        plan=[LINE_OF_2, ("text", 3), (IMAGE, (1, 2)), (VECTOR, ()), ("text", 2)],
        cfg_scale=2.0,
        modality_cfg_scale=-0.5,
        cfg_interval=(0.2, 0.9),
        cfg_rescale=0.4,
    )
    sample = model.sample(prompt, cache_kv=cache_kv, **options)
    assert [kind for kind, _ in drawn(sample)][-3:] == [LINE, IMAGE, VECTOR]
    assert_flows(model, sample, len(drawn(sample)) - 3, **flow)


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_prompts_of_every_guidance_are_as_one_by_one(method):
    model, prompts = build(seed=9, push=dict(meta=1.0, eos=-9.0)), [prompt for prompt, _, _ in HISTORIES.values()]
    guidance = dict(cfg_scale=2.0, modality_cfg_scale=1.5, cfg_interval=(0.2, 0.9), cfg_rescale=0.5)
    solver = dict(odeint_kwargs=dict(method=method) | TOLERANT)
    options = options_with(plan=None, max_length=34, **guidance, **solver)
    alone = [model.sample(prompt, **options) for prompt in prompts]
    assert sum(len(drawn(sample)) for sample in alone) > 8  # 5 of them are those of the prompts
    for run in (dict(), dict(max_batch=2), dict(cache_kv=False))[: 3 if method == "midpoint" else 1]:
        batch = model.sample_many([*prompts, prompts[3]], **run, **options)
        for sample, expected in zip(batch, [*alone, alone[3]], strict=True):
            assert_same(sample, expected)
    if method == "midpoint":
        for sample, given in zip(alone, (0, 0, 1, 1, 3), strict=True):
            assert_flows(model, sample, given, scale=2.0, modality_scale=1.5, interval=(0.2, 0.9), rescale=0.5)


def test_histories_of_one_length_without_anything_are_read_once():
    model, prompts = build(), [[latents(IMAGE, 1, 1, seed=seed), text(1, seed % 4)] for seed in range(3)]
    engine = model.create_engine()
    samples = engine.sample_many(prompts, **options_with(cfg_scale=2.0, modality_cfg_scale=3.0))
    for sample in samples:
        assert_flows(model, sample, 1, scale=2.0, modality_scale=3.0)
    whole, bare = 1 + len(model.vocabulary.opening(IMAGE, (1, 1))) + 2 + 2, 1 + 2
    opening = len(model.vocabulary.opening(*LINE_OF_2))
    assert engine.stats.tokens_read == 6 * (whole + opening) + bare + opening


def test_what_was_held_for_guidance_is_free_after_each_drawing():
    engine, plan = build().create_engine(), [LINE_OF_2] * 2
    taken = []
    for _ in range(4):
        engine.sample_many([latents(IMAGE, 1, 2), text(1)], **options_with(plan=plan, modality_cfg_scale=2.0))
        taken.append(engine.stats.cache_bytes)
    assert len(set(taken)) == 1


# grids and solvers


@pytest.mark.parametrize("shift", [0.3, 3.0])
@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_shifted_grids_are_solved_step_for_step(monkeypatch, method, shift):
    model, steps = build(seed=5), 3
    evaluated = watch_evaluations(monkeypatch, model)
    options = options_with(modality_steps=steps, time_shift=shift, odeint_kwargs=dict(method=method), cfg_scale=2.0)
    sample = model.sample(text(1), **options)
    grid = [i / steps / (i / steps + shift * (1 - i / steps)) for i in range(steps + 1)]
    times = [low + stage * (high - low) for low, high in pairwise(grid) for stage in STAGES[method]]
    assert [t for _, t in evaluated] == pytest.approx(times)
    assert_flows(model, sample, steps=steps, shift=shift, scale=2.0, method=method)


@pytest.mark.parametrize("shift", [0.3, 3.0])
@pytest.mark.parametrize("method", ["dopri5", "fixed_adams"])
def test_shifted_grids_are_solved_by_the_other_methods(method, shift):
    model, solver = build(seed=7), dict(method=method) | TOLERANT
    sample = model.sample(text(1), **options_with(modality_steps=3, time_shift=shift, odeint_kwargs=solver))
    if method in ADAPTIVE_METHODS:  # from the first of the intervals, and never beyond the end
        first = torch.tensor(1 / 3 / (1 / 3 + shift * 2 / 3), dtype=torch.float64)
        solver["options"] = dict(first_step=first, step_t=torch.ones(1, dtype=torch.float64))
    assert_flows(model, sample, steps=3, shift=shift, scale=3.0, **solver)


@pytest.mark.parametrize("shift", [0.01, 7.0])
@pytest.mark.parametrize("method", [*sorted(SINGLE_STEP_METHODS), "dopri5"])
def test_a_straight_flow_lands_on_its_target_along_any_grid(monkeypatch, method, shift):
    model, target = build(), noise(seed=7)
    monkeypatch.setattr(model, "velocities", straight_to(target))
    options = options_with(modality_steps=5, time_shift=shift, odeint_kwargs=dict(method=method))
    [(_, x)] = drawn(model.sample(text(1), **options))
    torch.testing.assert_close(x, target[:2])


REQUESTS = [
    (text(1), dict(modality_steps=1, odeint_kwargs=dict(method="euler"))),
    (None, dict(modality_steps=5, odeint_kwargs=dict(method="euler"), time_shift=3.0)),
    (text(2), dict(modality_steps=3, cfg_scale=1.0, plan=[(IMAGE, (2, 2)), ("text", 3), (VECTOR, ())])),
    (latents(IMAGE, 1, 2), dict(modality_steps=3, modality_cfg_scale=2.0, time_shift=0.5)),
    ([latents(VECTOR), text(3)], dict(modality_steps=2, cfg_scale=2.0, modality_cfg_scale=0.0)),
    (text(0), dict(modality_steps=2, odeint_kwargs=dict(method="rk4"), plan=[("text", 2), (VIDEO, (1, 1, 2))])),
    (text(1), dict(odeint_kwargs=dict(method="dopri5") | TOLERANT)),
    (text(2), dict(odeint_kwargs=dict(method="dopri5") | TOLERANT, time_shift=2.0, modality_steps=4)),
    (text(1), dict(odeint_kwargs=dict(method="bosh3", atol=0.1, rtol=0.1), plan=[(IMAGE, (2, 1))])),
    (text(3), dict(odeint_kwargs=dict(method="explicit_adams"), modality_steps=3)),
    (text(1), dict(odeint_kwargs=dict(method="heun3"), cfg_interval=(0.2, 0.5), cfg_rescale=0.7, modality_steps=2)),
    (text(2), dict(plan=None, fixed_modality_shape=(1, 1), max_length=30)),
    (text(1), dict(init_modality=latents(LINE, 2, seed=4), strength=0.4, time_shift=2.0, modality_steps=3)),
]


@cache
def requested_alone():
    """A model, and what it makes of each of the requests by itself."""
    model = build(seed=9, push=dict(meta=0.8))
    return model, [model.sample(prompt, **options_with(**own)) for prompt, own in REQUESTS]


@pytest.mark.parametrize(("max_batch", "cache_kv"), [(3, True), (64, False)])
def test_requests_of_one_engine_have_their_own_steps_solvers_shapes_and_scales(max_batch, cache_kv):
    model, alone = requested_alone()
    engine = model.create_engine(max_batch=max_batch, cache_kv=cache_kv)
    requests = [engine.submit(prompt, **options_with(**own)) for prompt, own in REQUESTS]
    engine.run()
    for request, expected in zip(requests, alone, strict=True):
        assert_same(request.result(), expected)


def test_requests_that_come_while_others_draw_change_nothing():
    model, alone = requested_alone()
    engine, requests = model.create_engine(max_batch=4), []
    for prompt, own in REQUESTS:
        requests.append(engine.submit(prompt, **options_with(**own)))
        engine.step()
    engine.run()
    for request, expected in zip(requests, alone, strict=True):
        assert_same(request.result(), expected)


@pytest.mark.parametrize("method", STAGES)
def test_the_number_of_evaluations_is_told(method):
    model, counts = build(), (1, 2, 5)
    engine = model.create_engine()
    requests = [
        engine.submit(text(1), **options_with(modality_steps=steps, odeint_kwargs=dict(method=method)))
        for steps in counts
    ]
    engine.run()
    for request, steps in zip(requests, counts, strict=True):
        [done] = [event for event in request.new_events() if isinstance(event, ModalityDone)]
        assert done.num_evaluations == steps * len(STAGES[method])
    assert engine.stats.evaluations == max(counts) * len(STAGES[method])  # each served all that were there


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fixed_adams"])
def test_evaluations_of_other_methods_are_counted_one_by_one(monkeypatch, method):
    model = build()
    evaluated = watch_evaluations(monkeypatch, model)
    options = options_with(odeint_kwargs=dict(method=method) | TOLERANT, plan=[LINE_OF_2, (IMAGE, (1, 2))])
    events = list(model.sample_stream(text(1), **options))
    counts = [event.num_evaluations for event in events if isinstance(event, ModalityDone)]
    assert sum(counts) == len(evaluated)
    starts = [i for i, (_, t) in enumerate(evaluated) if t == 0 and (not i or evaluated[i - 1][1] > 0)]
    assert counts[0] == starts[-1]


# failures


class Poisoned:
    """Velocities of a model that are NaN for images from the middle of the way on."""

    def __init__(self, model):
        self.evaluate = model.velocities
        model.velocities = self

    def __call__(self, hidden, stream, x_t, t):
        made = self.evaluate(hidden, stream, x_t, t)
        late = t[-1] > 0.4
        return {
            kind: velocity * float("nan") if kind == IMAGE and late else velocity for kind, velocity in made.items()
        }


@pytest.mark.parametrize(("method", "cache_kv"), [("bosh3", False), ("dopri5", True), ("scipy_solver", True)])
def test_a_solver_that_fails_ends_its_own_request_alone(method, cache_kv):
    model, adaptive = build(), dict(odeint_kwargs=dict(method=method) | TOLERANT)
    options = options_with(modality_cfg_scale=2.0, max_length=24)
    plan = dict(plan=[LINE_OF_2, "text", (LINE, (1,))])
    wanted = [
        (text(1), options | adaptive),
        ([latents(VECTOR), text(1)], options | adaptive | dict(plan=[(LINE, (1,)), (IMAGE, (1, 2)), "text"])),
        (text(1), options | dict(modality_steps=6)),
        ([latents(VECTOR), text(2)], options | adaptive | plan),
        (text(2), options | plan),
    ]
    alone = [model.sample(prompt, **own) for prompt, own in wanted]
    Poisoned(model)
    engine = model.create_engine(cache_kv=cache_kv)
    requests = [engine.submit(prompt, **own) for prompt, own in wanted]
    engine.run()
    failed = requests.pop(1)
    assert failed.reason is EndReason.ERROR
    assert len(drawn(failed.new_events()[-1].sample)) == 2  # one was given and one drawn before it failed
    with pytest.raises(ValueError, match="velocity of a drawing is not finite"):
        failed.result()
    for request, expected in zip(requests, alone[:1] + alone[2:], strict=True):
        assert request.reason is not EndReason.ERROR
        assert_same(request.result(), expected)
    again = engine.submit(wanted[0][0], **wanted[0][1])  # what the failed one held is free and clean
    engine.run()
    assert_same(again.result(), alone[0])


def test_a_call_raises_the_error_of_its_solver():
    model = build()
    Poisoned(model)
    with pytest.raises(ValueError, match="velocity of a drawing is not finite"):
        model.sample(text(1), **options_with(plan=[(IMAGE, (1, 2))], odeint_kwargs=dict(method="dopri5") | TOLERANT))
    assert_flows(model, model.sample(text(1), **options_with()), scale=3.0)


def test_too_many_steps_end_their_own_request_alone():
    model, short = build(), dict(method="dopri5", atol=1e-9, rtol=1e-9, options=dict(max_num_steps=3))
    alone = model.sample(text(1), **options_with())
    engine = model.create_engine()
    requests = [engine.submit(text(1), **options_with(**own)) for own in (dict(odeint_kwargs=short), {})]
    engine.run()
    assert [request.reason for request in requests] == [EndReason.ERROR, EndReason.PLAN]
    with pytest.raises(AssertionError, match="max_num_steps exceeded"):
        requests[0].result()
    assert_same(requests[1].result(), alone)


def test_an_evaluation_that_fails_leaves_the_others_as_they_are(monkeypatch):
    model = build()
    wanted = [dict(odeint_kwargs=dict(method=method), modality_steps=1) for method in ("euler", "midpoint", "rk4")]
    alone = [model.sample(text(1), **options_with(**own)) for own in wanted]
    evaluate, failing = model.velocities, iter([False, True])  # the second is the first of midpoint

    def velocities(*args):
        if next(failing, False):
            raise RuntimeError("out of memory")
        return evaluate(*args)

    engine = model.create_engine()
    requests = [engine.submit(text(1), **options_with(**own)) for own in wanted]
    monkeypatch.setattr(model, "velocities", velocities)
    for _ in range(2):
        with suppress(RuntimeError):
            engine.run()
    assert engine.is_idle
    for request, expected in zip(requests[::2], alone[::2], strict=True):
        assert_same(request.result(), expected)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_arguments_that_no_solver_takes_are_refused_before_they_harm_others(method):
    engine = build().create_engine()
    with pytest.raises((TypeError, ValueError)):
        engine.submit(text(1), **options_with(odeint_kwargs=dict(method=method, tolerance=1.0)))
    assert engine.is_idle
