"""Solvers and guidance: what is drawn is the solution of the flow, step for step."""

from itertools import pairwise
from math import prod

import pytest
import torch
from generation_models import (
    IMAGE,
    LINE,
    VECTOR,
    assert_drawn,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    options_over,
    shapes_of,
    slots_of,
    straight_to,
    text,
)

from transfusion_pytorch import Transfusion
from transfusion_pytorch.flow.solver import ADAPTIVE_METHODS, OTHER_METHODS, SINGLE_STEP_METHODS
from transfusion_pytorch.generation import denoiser
from transfusion_pytorch.generation.batch_state import Branch
from transfusion_pytorch.sequence.prompts import without_text
from transfusion_pytorch.sequence.samples import Text

EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
TOLERANT = dict(atol=1.0, rtol=1.0)  # the flow of a model that learnt nothing is rough
WITHIN = dict(first_step=torch.tensor(0.5, dtype=torch.float64), step_t=torch.ones(1, dtype=torch.float64))


options_with = options_over(max_length=30)


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_joint_steps_solve_each_flow_alone(method):
    model, solver = build(seed=6, push=dict(meta=1.2, eos=-9.0)), dict(method=method)
    prompts = [None, text(1, 2), latents(IMAGE, 2, 1)]  # they start to draw at different times
    samples = model.sample_many(prompts, **options_with(modality_steps=3, cfg_scale=2.0, odeint_kwargs=solver))
    for sample, given in zip(samples, (0, 0, 1), strict=True):
        assert len(drawn(sample)) > given
        assert_drawn(model, sample, given, steps=3, scale=2.0, **solver)


@pytest.mark.parametrize("method", sorted(OTHER_METHODS - {"scipy_solver"}))
def test_other_solvers_solve_each_flow_alone(method):
    model, solver = build(seed=7), dict(method=method) | TOLERANT
    solver |= dict(options=WITHIN) if method in ADAPTIVE_METHODS else {}
    options = options_with(modality_steps=2, odeint_kwargs=solver, force_modality_at_start=(LINE, (2,)), max_length=9)
    for sample in model.sample_many([text(1), None], **options):
        assert_drawn(model, sample, steps=2, scale=3.0, **solver)


def test_solvers_that_choose_their_steps_do_not_mix_samples():
    model = build(seed=8)
    options = options_with(odeint_kwargs=dict(method="dopri5") | TOLERANT, force_modality_at_start=(IMAGE, (1, 2)))
    prompts = [text(1), None, latents(LINE, 2)]
    for sample, prompt in zip(model.sample_many(prompts, **options), prompts, strict=True):
        assert_same(sample, model.sample(prompt, **options), tolerance=1e-9)


def test_refined_grids_are_solved_whole():
    model = build()
    solver = dict(method="euler", options=dict(step_size=0.25))
    sample = model.sample(**options_with(odeint_kwargs=solver, modality_steps=2, force_modality_at_start=(LINE, (2,))))
    assert_drawn(model, sample, steps=4, scale=3.0, method="euler")


@pytest.mark.parametrize("method", ["rk4", None])
def test_solver_of_the_model_serves_where_none_is_given(method):
    model = build(odeint_kwargs=None if method is None else dict(method=method))
    sample = model.sample(text(1), **options_with(force_modality_at_start=(LINE, (2,)), modality_steps=3))
    assert_drawn(model, sample, steps=3, scale=3.0, method=method or "midpoint")


def rows_evaluated(monkeypatch, model) -> list[int]:
    """For every evaluation of the flow from now on: how many sequences it runs."""
    rows, evaluate = [], model.velocities
    monkeypatch.setattr(
        model,
        "velocities",
        lambda hidden, stream, *args: rows.append(len(stream.lengths)) or evaluate(hidden, stream, *args),
    )
    return rows


@pytest.mark.parametrize("method", EVALUATIONS)
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_are_intervals(monkeypatch, method, steps):
    model = build()
    rows = rows_evaluated(monkeypatch, model)
    model.sample(
        **options_with(
            modality_steps=steps, odeint_kwargs=dict(method=method), force_modality_at_start=(LINE, (2,)), max_length=7
        )
    )
    assert rows == [1] * EVALUATIONS[method] * steps
    rows.clear()
    model.generate_modality_only(
        3, modality_type=VECTOR, modality_steps=steps, odeint_kwargs=dict(method=method), fixed_modality_shape=()
    )
    assert rows == [3] * EVALUATIONS[method] * steps


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_new_model_returns_its_noise(method):
    torch.manual_seed(0)
    model = Transfusion(
        num_text_tokens=4, transformer=dict(dim=8, depth=2, dim_head=4, heads=2), dim_latent=3, modality_num_dim=1
    )
    sample = model.sample(
        text(1), **options_with(force_modality_at_start=(0, (4,)), odeint_kwargs=dict(method=method), max_length=20)
    )
    got, expected = drawn(sample)[0][1], noise().float()[:4]
    if method == "dopri5":  # which interpolates at the end
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4", "dopri5"])
def test_straight_flow_lands_on_its_target(monkeypatch, method, steps):
    model, target = build(seed=9, push=dict(meta=1.0, eos=-9.0)), noise(seed=7)
    monkeypatch.setattr(model, "velocities", straight_to(target))
    options = options_with(modality_steps=steps, odeint_kwargs=dict(method=method), cfg_scale=4.0)
    modalities = drawn(model.sample(text(1), **options))
    assert len(modalities) > 1
    for _, x in modalities:
        torch.testing.assert_close(
            x.flatten(0, -2) if x.ndim > 1 else x[None], target[: x[..., 0].numel(), : x.shape[-1]]
        )


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 3.0])
def test_guidance_walks_away_from_the_flow_without_text(monkeypatch, scale):
    model = build()
    towards, without = noise(seed=8)[:2], noise(seed=9)[:2]

    def velocities(hidden, stream, x_t, t):
        nulled = [model.vocabulary.null in tokens for tokens in stream.token.split(stream.lengths)]
        return {LINE: torch.cat([without if null else towards for null in nulled])}

    monkeypatch.setattr(model, "velocities", velocities)
    options = options_with(cfg_scale=scale, cache_kv=False, force_modality_at_start=(LINE, (2,)), max_length=8)
    [(_, x)] = drawn(model.sample(text(1), **options))
    torch.testing.assert_close(x, noise()[:2] + without + scale * (towards - without))


def test_guidance_takes_away_text_and_nothing_else():
    model = build()
    pieces = [Text(text(4, 0, 3, 6, 16, 8)), latents(LINE, 1), Text(text(12, 2, 5))]
    nulled, kept, after = without_text([pieces[0], Text(pieces[2].ids), pieces[2]], model.vocabulary)
    null = model.vocabulary.null
    assert nulled.ids.tolist() == [4, null, null, 6, 16, 8]
    assert kept.ids.tolist() == after.ids.tolist() == [12, null, 5]


@pytest.mark.parametrize(
    ("prompt", "scale", "rows"),
    [
        (text(1), 1.0, 1),
        (text(1), 3.0, 2),
        (None, 3.0, 1),
        (latents(VECTOR), 3.0, 1),
        ([latents(VECTOR), text(0)], 0.0, 2),
    ],
)
def test_guidance_costs_a_row_only_where_there_is_text(monkeypatch, prompt, scale, rows):
    model = build()
    evaluated = rows_evaluated(monkeypatch, model)
    model.sample(prompt, **options_with(cfg_scale=scale, force_modality_at_start=(LINE, (2,)), max_length=13))
    assert set(evaluated[:4]) == {rows}


def test_guided_and_unguided_rows_stand_in_one_batch(monkeypatch):
    model = build()
    evaluated = rows_evaluated(monkeypatch, model)
    options = options_with(cfg_scale=3.0, force_modality_at_start=(LINE, (2,)), max_length=8)
    samples = model.sample_many([text(1), None, text(2)], **options)
    assert set(evaluated) == {5}
    for sample in samples:
        assert_drawn(model, sample, scale=3.0)


def tokens_read(monkeypatch) -> list[tuple[Branch, int]]:
    """For everything that is read and kept from now on: the branch, and how many tokens."""
    read, mark_read = [], Branch.mark_read

    def spy(self, num_items, length):
        read.append((self, length))
        mark_read(self, num_items, length)

    monkeypatch.setattr(Branch, "mark_read", spy)
    return read


def test_history_without_text_is_read_once_and_only_to_draw(monkeypatch):
    read, model = tokens_read(monkeypatch), build(seed=9, push=dict(meta=1.0, eos=-9.0))
    sample = model.sample(text(1), **options_with(cfg_scale=3.0, max_length=40))
    before = [len(slots_of(model, sample[:i])) for i, part in enumerate(sample) if isinstance(part, tuple)]
    assert len(before) > 1
    [conditional, without_text] = dict.fromkeys(branch for branch, _ in read)
    assert [tokens for branch, tokens in read if branch is without_text] == [
        end - start for start, end in pairwise([0, *before])
    ]
    kept = sum(tokens for branch, tokens in read if branch is conditional)
    assert before[-1] <= kept < len(slots_of(model, sample))


def test_nothing_is_read_twice_without_guidance(monkeypatch):
    read, model = tokens_read(monkeypatch), build(seed=9, push=dict(meta=1.0, eos=-9.0))
    model.sample(text(1), **options_with(cfg_scale=1.0, max_length=40))
    assert len({branch for branch, _ in read}) == 1
    assert sum(tokens for _, tokens in read) <= 40


@pytest.mark.parametrize(("prob_uncond", "scale"), [(0.1, 3.0), (0.0, 1.0)])
def test_guidance_is_on_by_default_where_the_model_was_trained_for_it(prob_uncond, scale):
    model, options = build(prob_uncond=prob_uncond), options_with(force_modality_at_start=(IMAGE, (2, 2)))
    default, asked, other = (
        model.sample(text(1), **options | guidance) for guidance in ({}, dict(cfg_scale=scale), dict(cfg_scale=2.0))
    )
    assert_same(default, asked, tolerance=0)
    assert shapes_of(default)[1] == shapes_of(other)[1]
    assert not torch.allclose(default[1][1], other[1][1])


def test_what_the_noise_does_not_serve_is_not_opened():
    """Neither a type of more channels, nor a shape of more latents, whatever the model would like to write."""
    model, opened = build(seed=9, push=dict(meta=1.0, eos=-9.0)), set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        asked = dict(text_temperature=1.0, generator=generator, init_modality_noise=noise()[:3, :2])
        sample = model.sample(text(1), **options_with(max_length=60, **asked))
        opened |= {(part[0], tuple(part[1].shape[:-1])) for part in sample if isinstance(part, tuple)}
    assert len(opened) > 2
    for modality, shape in opened:
        assert model.modalities[modality].spec.dim_latent <= 2
        assert prod(shape) <= 3


@pytest.mark.parametrize(
    "options", [dict(fixed_modality_shape=(2, 2)), dict(allowed_modalities=[LINE]), dict(plan=[(LINE, (1,))])]
)
def test_noise_that_is_too_small_for_what_is_asked_is_refused_at_once(options):
    with pytest.raises(ValueError, match="init_modality_noise needs"):
        build().create_engine().submit(text(1), **options, init_modality_noise=noise()[:3, :2])


def test_the_same_noise_serves_every_modality_as_far_as_it_is_needed():
    model = build(seed=9, push=dict(meta=1.0, eos=-9.0))
    generous, exact = (
        model.sample(**options_with(init_modality_noise=given, max_length=40, cfg_scale=1.0))
        for given in (noise(64, 3), noise(64, 3)[:6])
    )
    assert_same(generous, exact, tolerance=0)
    assert_drawn(model, generous)


def test_noise_is_drawn_anew_for_every_modality():
    model, flow = build(), dict(force_modality_at_start=(LINE, (2,)), init_modality_noise=None)
    samples = model.sample_many([None, None], **options_with(**flow))
    assert not torch.allclose(drawn(samples[0])[0][1], drawn(samples[1])[0][1])
    twice = drawn(model.sample(**options_with(plan=[(LINE, (2,)), (LINE, (2,))], init_modality_noise=None)))
    assert not torch.allclose(twice[0][1], twice[1][1])


# how much at once


@pytest.mark.parametrize(
    ("most", "rows"), [(1, [1, 1, 1]), (3, [1, 1, 1]), (4, [2, 1]), (5, [2, 1]), (6, [3]), (99, [3])]
)
def test_latents_of_one_forward_pass_are_bounded(monkeypatch, most, rows):
    model = build()
    evaluated = rows_evaluated(monkeypatch, model)
    options = options_with(force_modality_at_start=(LINE, (2,)), max_length=7, odeint_kwargs=dict(method="euler"))
    engine = model.create_engine(max_denoising_tokens=most)
    samples = engine.sample_many([None] * 3, **options | dict(modality_steps=2))
    assert evaluated == rows * 2
    for sample in samples:
        assert_drawn(model, sample, method="euler")


def test_unconditional_branches_count_in_that_bound(monkeypatch):
    model = build()
    evaluated = rows_evaluated(monkeypatch, model)
    options = options_with(force_modality_at_start=(LINE, (2,)), max_length=8, cfg_scale=2.0, modality_steps=1)
    model.create_engine(max_denoising_tokens=8).sample_many([text(1)] * 3, **options)
    assert evaluated == [4, 4, 2, 2]


@pytest.mark.parametrize("method", ["midpoint", "dopri5", "explicit_adams"])
def test_latents_that_are_not_finite_end_their_request(method):
    """Instead of a picture of NaN; those beside it are drawn."""
    model, huge = build(seed=3), 1e300 * torch.ones(8, 3, dtype=torch.float64)
    options = options_with(plan=[(LINE, (2,))], odeint_kwargs=dict(method=method) | TOLERANT, cfg_scale=1.0)
    engine = model.create_engine()
    requests = [
        engine.submit(text(1), **options | (dict(init_modality_noise=huge) if i == 1 else {})) for i in range(3)
    ]
    engine.run()
    with pytest.raises(ValueError, match="not finite"):
        requests[1].result()
    for request in (requests[0], requests[2]):
        assert_same(request.result(), model.sample(text(1), **options))


# times that are known ahead


def times_embedded(model) -> list[int]:
    """For every call of the time embedding from now on: how many times it embeds."""
    counts: list[int] = []
    model.time_embedding.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    return counts


@pytest.mark.parametrize(
    ("steps", "method", "expected"),
    [
        ([5, 5], "midpoint", [10]),
        ([4], "euler", [4]),
        ([2, 4], "euler", [4]),  # half of the times are shared
        ([2, 3], "euler", [4]),
        ([100], "midpoint", [64, 64, 64, 8]),
    ],
)
def test_times_are_embedded_together(steps, method, expected):
    model = build()
    engine, counts = model.create_engine(), times_embedded(model)
    for i, count in enumerate(steps):
        options = dict(plan=[(LINE, (2,))], modality_steps=count, odeint_kwargs=dict(method=method))
        engine.submit(text(i), **options_with(**options))
    engine.run()
    assert counts == expected


@pytest.mark.parametrize("most", [1, 3, 64])
@pytest.mark.parametrize(
    "shapes", [[(LINE, (2,)), (LINE, (2,))], [(LINE, (2,)), (LINE, (3,))], [(IMAGE, (1, 2)), (LINE, (2,))]]
)
def test_modulations_made_ahead_are_those_of_each_time(monkeypatch, most, shapes):
    """Beside others at other times, of equal and of other lengths; looked up again where only some are kept."""
    monkeypatch.setattr(denoiser, "TIMES_AT_ONCE", most)
    model = build(seed=4)
    steps = [dict(modality_steps=4), dict(modality_steps=3, time_shift=2.0, cfg_scale=2.0), dict(modality_steps=4)]
    asked = [options_with(plan=[shapes[i % 2]], max_length=9) | own for i, own in enumerate(steps)]
    engine = model.create_engine()
    requests = []
    for i, options in enumerate(asked):
        requests.append(engine.submit(text(i), **options))
        engine.step()
    engine.run()
    for i, (request, options) in enumerate(zip(requests, asked, strict=True)):
        assert_same(request.result(), model.sample(text(i), cache_kv=False, **options))


def test_a_stream_without_history_serves_all_evaluations(monkeypatch):
    """Modalities alone read nothing from the cache, so nothing makes their stream void."""
    model, packed = build(), []
    pack = model.pack_stream
    monkeypatch.setattr(model, "pack_stream", lambda *args: packed.append(1) or pack(*args))
    model.generate_modality_only(2, LINE, (3,), modality_steps=4)
    assert len(packed) == 1


def test_a_solver_that_chooses_its_times_computes_them_one_by_one():
    model = build()
    counts = times_embedded(model)
    sample = model.sample(
        text(1), **options_with(plan=[(LINE, (2,))], odeint_kwargs=dict(method="dopri5"), cfg_scale=2.0)
    )
    assert set(counts) == {2}
    assert len(counts) > 6
    assert len(drawn(sample)) == 1
