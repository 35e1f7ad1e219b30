"""Drawing from what is there already: from an image, around what a mask keeps, between two noises, behind a prompt."""

import warnings
from itertools import pairwise

import pytest
import torch
from generation_models import (
    CHANNELS,
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
    noise_of,
    options_over,
    shapes_of,
    text,
    velocity_behind,
    watch_evaluations,
)
from torch import nn

from transfusion_pytorch import DrawingProgress, UNetDown, UNetUp, slerp
from transfusion_pytorch.flow.solver import ADAPTIVE_METHODS, SINGLE_STEP_METHODS
from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.sequence.samples import Modality

SHAPES = {VECTOR: (), LINE: (3,), IMAGE: (2, 3), VIDEO: (2, 1, 2)}
INIT = {modality: latents(modality, *shape, seed=4) for modality, shape in SHAPES.items()}
TOLERANT = dict(atol=1.0, rtol=1.0)  # the flow of a model that learnt nothing is rough


options_with = options_over(max_length=22, max_modality_tokens=3)


def mask_of(modality: int, seed: int = 3) -> torch.Tensor:
    """Of every modality about half is drawn anew; at least one place is, and at least one is kept if there are two."""
    mask = torch.rand(SHAPES[modality], generator=torch.Generator().manual_seed(seed)) < 0.5
    if mask.ndim:
        mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def flow_of(modality, **options):
    return dict(init=INIT[modality][1], scale=3.0) | options


def stepping(method: str, first_step: float) -> dict:
    """An adaptive method tries an interval at first, and never goes beyond the end."""
    first, last = torch.tensor(first_step, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return dict(options=dict(first_step=first, step_t=last)) if method in ADAPTIVE_METHODS else {}


# strength


@pytest.mark.parametrize("strength", [0.25, 0.6])
@pytest.mark.parametrize("modality", SHAPES)
def test_a_drawing_begins_on_the_way_from_noise_to_what_there_is(monkeypatch, modality, strength):
    model = build(seed=1)
    evaluated = watch_evaluations(monkeypatch, model)
    sample = model.sample(text(1), **options_with(init_modality=INIT[modality], strength=strength, modality_steps=3))
    assert shapes_of(drawn(sample))[0] == (modality, (*SHAPES[modality], CHANNELS[modality]))
    assert evaluated[0][1] == pytest.approx(1 - strength)
    assert len(evaluated) >= 6
    assert_flows(model, sample, steps=3, strength=strength, **flow_of(modality))


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_the_rest_of_the_way_is_solved_step_for_step(method):
    model, solver = build(seed=2), dict(method=method)
    options = options_with(init_modality=INIT[IMAGE], strength=0.7, time_shift=2.0, modality_steps=3, max_length=14)
    sample = model.sample(text(1), **options, odeint_kwargs=solver)
    assert_flows(model, sample, steps=3, strength=0.7, shift=2.0, **flow_of(IMAGE), **solver)


@pytest.mark.parametrize("method", ["dopri5", "fixed_adams"])
def test_the_rest_of_the_way_is_solved_by_the_other_methods(method):
    model, solver = build(seed=2), dict(method=method) | TOLERANT
    options = options_with(init_modality=INIT[IMAGE], strength=0.7, modality_steps=3, max_length=14)
    sample = model.sample(text(1), **options, odeint_kwargs=solver)
    assert_flows(model, sample, steps=3, strength=0.7, **flow_of(IMAGE), **solver | stepping(method, 0.7 / 3))


def test_little_strength_changes_little_and_none_is_the_limit():
    model, (_, init) = build(seed=2), INIT[IMAGE]
    away = []
    for strength in (1e-6, 1e-4, 1e-2):
        made = drawn(model.sample(text(1), **options_with(init_modality=INIT[IMAGE], strength=strength)))[0][1]
        away.append(float((made - init).norm()))
    for (near, far), (low, high) in zip(pairwise(away), pairwise((1e-6, 1e-4, 1e-2)), strict=True):
        assert far / near == pytest.approx(high / low, rel=0.2)  # in proportion


def test_at_full_strength_nothing_is_left_of_what_there_was():
    model = build()
    plain = model.sample(text(1), **options_with(force_modality_at_start=(IMAGE, SHAPES[IMAGE])))
    for seed in (4, 5):
        init = latents(IMAGE, *SHAPES[IMAGE], seed=seed)
        assert_same(model.sample(text(1), **options_with(init_modality=init)), plain)
        weaker = model.sample(text(1), **options_with(init_modality=init, strength=0.9))
        assert not torch.allclose(drawn(weaker)[0][1], drawn(plain)[0][1])


def test_what_a_drawing_begins_with_is_no_context_for_it():
    """The start is all that there is of it: neither a lane nor a token more is read."""
    model = build()
    engines = model.create_engine(), model.create_engine()
    options = options_with(max_length=14)
    engines[0].sample_many([text(1)], init_modality=INIT[LINE], strength=0.5, **options | dict(plan=[LINE]))
    engines[1].sample_many([text(1)], **options | dict(plan=[(LINE, SHAPES[LINE])]))
    assert engines[0].stats == engines[1].stats


# masks


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("modality", SHAPES)
def test_what_a_mask_keeps_is_kept_to_the_bit_and_the_rest_is_drawn_around_it(modality, strength):
    model, mask, init = build(seed=1), mask_of(modality), INIT[modality]
    options = options_with(init_modality=init, modality_mask=mask, strength=strength, modality_steps=3)
    sample = model.sample(text(1), **options)
    assert torch.equal(drawn(sample)[0][1][~mask], init[1][~mask])
    assert not torch.isclose(drawn(sample)[0][1][mask], init[1][mask]).any()
    assert_flows(model, sample, steps=3, strength=strength, anew=mask, **flow_of(modality))


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_what_is_kept_takes_its_straight_way_under_every_solver(method):
    model, mask, solver = build(seed=3), mask_of(VIDEO), dict(method=method)
    options = options_with(init_modality=INIT[VIDEO], modality_mask=mask, time_shift=0.5, max_length=18)
    sample = model.sample(text(1), odeint_kwargs=solver, **options)
    assert torch.equal(drawn(sample)[0][1][~mask], INIT[VIDEO][1][~mask])
    assert_flows(model, sample, shift=0.5, anew=mask, **flow_of(VIDEO), **solver)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "explicit_adams"])
def test_what_is_kept_takes_its_straight_way_under_the_other_solvers(method):
    model, mask, solver = build(seed=3), mask_of(IMAGE), dict(method=method) | TOLERANT
    options = options_with(init_modality=INIT[IMAGE], modality_mask=mask, max_length=14, modality_steps=4)
    sample = model.sample(text(1), odeint_kwargs=solver, **options)
    assert torch.equal(drawn(sample)[0][1][~mask], INIT[IMAGE][1][~mask])
    assert_flows(model, sample, steps=4, anew=mask, **flow_of(IMAGE), **solver | stepping(method, 1 / 4))


def test_progress_shows_what_is_kept_on_its_way_and_where_it_lands():
    model, mask, (_, init) = build(), mask_of(IMAGE), INIT[IMAGE]
    options = options_with(plan=[IMAGE], init_modality=INIT[IMAGE], modality_mask=mask, strength=0.75, modality_steps=3)
    events = [event for event in model.sample_stream(text(1), **options) if isinstance(event, DrawingProgress)]
    assert [event.time for event in events] == pytest.approx([0.5, 0.75, 1.0])
    start = noise()[:6, :1].view(2, 3, 1)
    for event in events:
        on_its_way = (1 - event.time) * start + event.time * init
        torch.testing.assert_close(event.latents[~mask], on_its_way[~mask], atol=1e-9, rtol=0)
        torch.testing.assert_close(event.estimate[~mask], init[~mask], atol=1e-9, rtol=0)
        assert not torch.isclose(event.latents[mask], on_its_way[mask]).any()


@pytest.mark.parametrize("guidance", [dict(), dict(rescale=0.6), dict(interval=(0.3, 0.7))])
def test_masks_go_with_guidance_by_text_and_by_modalities(guidance):
    model, mask, prompt = build(seed=4), mask_of(IMAGE), [latents(LINE, 2), text(1, 2)]
    sample = model.sample(
        prompt,
        **options_with(
            init_modality=INIT[IMAGE],
            modality_mask=mask,
            strength=0.8,
            cfg_scale=4.0,
            modality_cfg_scale=2.0,
            max_length=26,
            **{f"cfg_{name}": value for name, value in guidance.items()},
        ),
    )
    assert torch.equal(drawn(sample)[1][1][~mask], INIT[IMAGE][1][~mask])
    flow = flow_of(IMAGE, scale=4.0, modality_scale=2.0, strength=0.8, anew=mask) | guidance
    assert_flows(model, sample, 1, **flow)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("modality", SHAPES)
def test_masks_of_one_kind_keep_all_or_nothing(modality, strength):
    model = build()
    whole = torch.ones(SHAPES[modality], dtype=torch.bool)
    options = options_with(init_modality=INIT[modality], strength=strength, max_length=14)
    kept = model.sample(text(1), modality_mask=~whole, **options)
    assert torch.equal(drawn(kept)[0][1], INIT[modality][1])
    assert_same(model.sample(text(1), modality_mask=whole, **options), model.sample(text(1), **options), tolerance=0)


def test_what_lies_under_the_mask_matters_as_far_as_its_strength_says():
    model, mask = build(), mask_of(IMAGE)
    other = IMAGE, torch.where(mask[..., None], INIT[IMAGE][1] + 1, INIT[IMAGE][1])
    for strength, is_same in ((1.0, True), (0.5, False)):
        options = options_with(modality_mask=mask, strength=strength, max_length=14)
        one, two = (drawn(model.sample(text(1), init_modality=init, **options))[0][1] for init in (INIT[IMAGE], other))
        assert torch.allclose(one, two) == is_same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_latents_stay_as_they_are_in_low_precision(dtype):
    model, mask, init = build().to(dtype), mask_of(VIDEO), INIT[VIDEO][1].to(dtype)
    made = drawn(model.sample(text(1), **options_with(init_modality=(VIDEO, init), modality_mask=mask)))[0][1]
    assert made.dtype == dtype
    assert torch.equal(made[~mask], init[~mask])
    assert not torch.equal(made[mask], init[mask])


def test_what_is_given_is_neither_changed_nor_shared():
    model, mask, (_, init) = build(), mask_of(IMAGE), INIT[IMAGE]
    before = init.clone(), mask.clone()
    made = drawn(model.sample(None, **options_with(init_modality=(IMAGE, init), modality_mask=~mask & mask)))[0][1]
    made += 1
    assert torch.equal(init, before[0])
    assert torch.equal(mask, before[1])


# as users have it


def test_channels_may_come_first_and_the_mask_has_none():
    last, first = build(seed=1), build(seed=1, channel_first_latent=True)
    mask, options = mask_of(IMAGE), options_with(strength=0.5, max_length=14)
    init = INIT[IMAGE][1].movedim(-1, 0)
    made = first.sample(text(1), init_modality=(IMAGE, init), modality_mask=mask, **options)
    expected = last.sample(text(1), init_modality=INIT[IMAGE], modality_mask=mask, **options)
    got = drawn(made)[0][1]
    torch.testing.assert_close(got, drawn(expected)[0][1].movedim(-1, 0), atol=1e-9, rtol=0)
    assert torch.equal(got[:, ~mask], init[:, ~mask])


class Halved(nn.Module):
    """Latents of 3 channels for data of twice as many and half as many places: every second of them is forgotten."""

    def forward(self, x):
        return x[:, ::2, :3] * 2


class Doubled(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], dim=-1).repeat_interleave(2, dim=1) / 2


def test_kept_latents_are_the_encoding_of_what_is_given():
    coded = dict(dim_latent=3, modality_num_dim=1, modality_encoder=Halved(), modality_decoder=Doubled())
    model, plain = build(seed=2, **coded), build(seed=2, dim_latent=3, modality_num_dim=1)
    raw = torch.randn(6, 6, dtype=torch.float64)
    encoded, mask = Halved()(raw[None])[0], torch.tensor([True, False, True])
    options = options_with(modality_mask=mask, strength=0.5, max_length=14)
    expected = plain.sample(text(1), init_modality=encoded, **options)
    assert_flows(plain, expected, init=encoded, strength=0.5, anew=mask, scale=3.0)
    kept = model.sample(text(1), init_modality=raw, return_unprocessed_modalities=True, **options)
    assert_same(kept, expected)
    assert torch.equal(drawn(kept)[0][1][~mask], encoded[~mask])
    shown = model.sample(text(1), init_modality=raw, **options)
    assert torch.equal(drawn(shown)[0][1], Doubled()(drawn(kept)[0][1][None])[0])
    with pytest.raises(ValueError, match=r"modality_mask must have the axial shape of the latents, \(3,\), got \(6,\)"):
        model.sample(text(1), init_modality=raw, **options | dict(modality_mask=torch.ones(6).bool()))


def test_latents_are_kept_where_several_of_them_are_a_token():
    sizes = dict(dim_hidden=4, num_dim=2)
    unet = (UNetDown(1, 8, **sizes), UNetUp(1, 8, **sizes))
    model = build(dim_latent=1, modality_num_dim=2, pre_post_transformer_enc_dec=unet)
    init, mask = INIT[IMAGE][1], mask_of(IMAGE)
    options = options_with(init_modality=init, modality_mask=mask, strength=0.8, max_length=14)
    sample = model.sample(text(1), **options)
    assert torch.equal(drawn(sample)[0][1][~mask], init[~mask])
    assert_flows(model, sample, init=init, strength=0.8, anew=mask, scale=3.0)


# where it stands in its sample


@pytest.mark.parametrize(
    "where",
    [
        dict(),
        dict(force_modality_at_start=IMAGE),
        dict(force_modality_at_start=(IMAGE, (2, 3))),
        dict(fixed_modality_shape=(2, 3)),
        dict(plan=[IMAGE, "text"]),
        dict(plan=[(IMAGE, [2, 3]), ("text", 3)]),
    ],
)
@pytest.mark.parametrize("prompt", [text(1, 2), [latents(IMAGE, 1, 2), text(0)]])
def test_it_comes_right_behind_the_prompt(prompt, where):
    model = build(seed=5)
    options = options_with(init_modality=INIT[IMAGE], strength=0.5, cfg_scale=2.0, max_length=27)
    sample = model.sample(prompt, **options | where)
    given = isinstance(prompt, list)
    assert shapes_of(drawn(sample))[given] == (IMAGE, (2, 3, 1))
    before = sample[2 * given].tolist()
    opening = model.vocabulary.opening(IMAGE, (2, 3)).tolist()
    assert before[-len(opening) :] == opening
    assert len(before) - len(opening) == [3, 2][given]  # a sos or eom, and the text
    assert_flows(model, sample, given, init=INIT[IMAGE][1], strength=0.5, scale=2.0)


def test_what_is_drawn_later_begins_with_noise():
    model, mask = build(seed=6), mask_of(IMAGE)
    plan = [IMAGE, ("text", 2), (IMAGE, (2, 3)), (LINE, (2,))]
    options = options_with(init_modality=INIT[IMAGE], modality_mask=mask, strength=0.5, plan=plan, max_length=60)
    sample = model.sample([latents(IMAGE, 2, 3), text(1)], modality_cfg_scale=2.0, **options)
    assert [kind for kind, _ in drawn(sample)] == [IMAGE, IMAGE, IMAGE, LINE]
    first, second = (part for _, part in drawn(sample)[1:3])
    assert torch.equal(first[~mask], INIT[IMAGE][1][~mask])
    assert not torch.isclose(second, INIT[IMAGE][1]).any()
    assert_flows(model, sample, 1, init=INIT[IMAGE][1], strength=0.5, anew=mask, scale=3.0, modality_scale=2.0)


def test_the_default_shape_of_what_comes_later_stays_its_own():
    model = build(modality_default_shape=((), (1,), (1, 2), (1, 1, 1)))
    options = options_with(init_modality=INIT[IMAGE], strength=0.5, max_length=60)
    sample = model.sample(None, **options | dict(plan=[IMAGE, ("text", 2), IMAGE]))
    assert shapes_of(drawn(sample)) == [(IMAGE, (2, 3, 1)), (IMAGE, (1, 2, 1))]


@pytest.mark.parametrize("cache_kv", [True, False])
def test_many_prompts_begin_with_the_same_each_alone(cache_kv):
    model, mask = build(seed=7), mask_of(IMAGE)
    prompts = [None, text(1), [latents(LINE, 2), text(2)], latents(IMAGE, 2, 1), text(1)]
    options = options_with(
        init_modality=INIT[IMAGE], modality_mask=mask, strength=0.7, modality_cfg_scale=2.0, cache_kv=cache_kv
    )
    batch = model.sample_many(prompts, **options)
    for sample, prompt, given in zip(batch, prompts, (0, 0, 1, 1, 0), strict=True):
        assert_same(sample, model.sample(prompt, **options))
        assert_flows(model, sample, given, strength=0.7, anew=mask, **flow_of(IMAGE, modality_scale=2.0))


def test_an_image_with_a_text_is_edited_by_three_row_guidance(monkeypatch):
    model, picture = build(seed=8), latents(IMAGE, 2, 3, seed=9)
    evaluated = watch_evaluations(monkeypatch, model)
    options = options_with(cfg_scale=5.0, modality_cfg_scale=1.5, plan=[(IMAGE, (2, 3))], max_length=40)
    sample = model.sample([picture, text(1, 2, 3)], **options)
    assert [rows for rows, _ in evaluated] == [3] * 4
    assert torch.equal(drawn(sample)[0][1], picture[1])
    assert_flows(model, sample, 1, scale=5.0, modality_scale=1.5)
    # begun with the picture itself, and only a part of it drawn anew
    mask = mask_of(IMAGE)
    again = model.sample([picture, text(1, 2, 3)], init_modality=picture, modality_mask=mask, strength=0.8, **options)
    assert torch.equal(drawn(again)[1][1][~mask], picture[1][~mask])
    assert_flows(model, again, 1, scale=5.0, modality_scale=1.5, init=picture[1], anew=mask, strength=0.8)


# what does not go together

WRONG = {
    "strength alone": (dict(strength=0.5), ValueError, "strength says what to keep .* there is none"),
    "mask alone": (dict(modality_mask=mask_of(IMAGE)), ValueError, "modality_mask says what to keep .* there is none"),
    "no strength": (dict(init_modality=INIT[IMAGE], strength=0.0), ValueError, "strength must be above 0"),
    "too strong": (dict(init_modality=INIT[IMAGE], strength=1.1), ValueError, "strength must be above 0 and at most 1"),
    "NaN strength": (dict(init_modality=INIT[IMAGE], strength=float("nan")), ValueError, "strength must be finite"),
    "forced type": (
        dict(init_modality=INIT[IMAGE], force_modality_at_start=(LINE, (2,))),
        ValueError,
        r"init_modality comes right behind the prompt, as \(2, \(2, 3\)\), but \(1, \(2,\)\) is asked for",
    ),
    "forced shape": (
        dict(init_modality=INIT[IMAGE], force_modality_at_start=(IMAGE, (2, 2))),
        ValueError,
        r"as \(2, \(2, 3\)\), but \(2, \(2, 2\)\) is asked for",
    ),
    "plan of another": (
        dict(init_modality=INIT[IMAGE], plan=[(VECTOR, ()), (IMAGE, (2, 3))]),
        ValueError,
        r"as \(2, \(2, 3\)\), but \(0, \(\)\) is asked for there",
    ),
    "plan of text": (
        dict(init_modality=INIT[IMAGE], plan=["text", (IMAGE, (2, 3))]),
        ValueError,
        "right behind the prompt",
    ),
    "fixed shape": (
        dict(init_modality=INIT[IMAGE], fixed_modality_shape=(2, 2)),
        ValueError,
        r"init_modality: the shape \(2, 3\) is asked for, and fixed_modality_shape is \(2, 2\)",
    ),
    "transposed mask": (
        dict(init_modality=INIT[IMAGE], modality_mask=mask_of(IMAGE).T),
        ValueError,
        r"axial shape of the latents, \(2, 3\), got \(3, 2\)",
    ),
    "mask with channels": (
        dict(init_modality=INIT[IMAGE], modality_mask=mask_of(IMAGE)[..., None]),
        ValueError,
        r"axial shape of the latents, \(2, 3\), got \(2, 3, 1\)",
    ),
    "mask of numbers": (
        dict(init_modality=INIT[IMAGE], modality_mask=mask_of(IMAGE).float()),
        TypeError,
        "modality_mask must be a bool tensor, .* got torch.float32",
    ),
    "mask of a list": (
        dict(init_modality=INIT[IMAGE], modality_mask=mask_of(IMAGE).tolist()),
        TypeError,
        "modality_mask must be a bool tensor, .* got list",
    ),
    "NaN": (dict(init_modality=(IMAGE, INIT[IMAGE][1] * float("nan"))), ValueError, "init_modality.* contains NaN"),
    "infinity": (dict(init_modality=(IMAGE, INIT[IMAGE][1] / 0)), ValueError, "init_modality.* contains NaN or inf"),
    "text": (dict(init_modality=text(1, 2)), TypeError, "init_modality must be floating point, .* not text"),
    "typed text": (dict(init_modality=(IMAGE, text(1, 2))), TypeError, "init_modality: modality 2 must be floating"),
    "no tensor": (dict(init_modality=[1.0, 2.0]), TypeError, "init_modality: expected"),
    "unknown type": (dict(init_modality=(4, INIT[IMAGE][1])), ValueError, "init_modality: unknown modality type 4"),
    "channels": (dict(init_modality=(IMAGE, torch.randn(2, 3, 2))), ValueError, "init_modality.*channels"),
    "axes": (dict(init_modality=(IMAGE, torch.randn(2, 1))), ValueError, "init_modality"),
    "little noise": (
        dict(init_modality=INIT[IMAGE], init_modality_noise=noise(5)),
        ValueError,
        "init_modality_noise needs 6 rows and 1 channels",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_go_together_is_refused(wrong):
    options, error, message = WRONG[wrong]
    model = build()
    with pytest.raises(error, match=message):
        model.sample(text(1), **options_with(**options))
    engine = model.create_engine()
    with pytest.raises(error, match=message):
        engine.submit(text(1), **options_with(**options))
    assert engine.is_idle


@pytest.mark.parametrize("opened", [(), (IMAGE, (2, 3)), (LINE, (4,)), (IMAGE, ())])
@pytest.mark.parametrize("max_length", [1, 12, 40])
def test_it_is_drawn_whatever_the_prompt_opens_and_however_short_it_is_to_be(opened, max_length):
    """It stands where the prompt ends, in place of an opening there, and beyond `max_length`."""
    model = build()
    ids = model.vocabulary.opening(*opened).tolist() if opened else []
    options = options_with(init_modality=INIT[IMAGE], strength=0.5, max_modality_tokens=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if max_length == 1 else "error", message="prompt 0 has")
        made = model.sample(text(1, *ids), **options | dict(max_length=max_length))
    assert_same(made[:2], model.sample(text(1), **options)[:2])
    assert_flows(model, made[:3], scale=3.0, init=INIT[IMAGE][1], strength=0.5)
    if max_length < 20:
        assert shapes_of(made) == [[4, 1, *model.vocabulary.opening(IMAGE, (2, 3)).tolist()], (IMAGE, (2, 3, 1)), [13]]
        assert made.reason is EndReason.LENGTH


# a modality alone


@pytest.mark.parametrize("modality", SHAPES)
def test_a_modality_alone_is_drawn_from_what_there_is(modality):
    model, mask, (_, init) = build(seed=1), mask_of(modality), INIT[modality]
    options = dict(modality_type=modality, modality_steps=3, init_modality=init, init_modality_noise=noise())
    for strength, anew in ((0.6, None), (1.0, mask), (0.6, mask)):
        made = model.generate_modality_only(2, strength=strength, modality_mask=anew, time_shift=1.5, **options)
        assert made.shape == (2, *init.shape)
        for instance in made:
            expected = flow_alone(model, modality, steps=3, shift=1.5, strength=strength, anew=anew)
            torch.testing.assert_close(instance, expected, atol=1e-9, rtol=0)
            if anew is not None:
                assert torch.equal(instance[~anew], init[~anew])


def flow_alone(model, modality, *, steps, shift, strength, anew):
    """Midpoint by hand on the flow of an instance that is a whole sample by itself."""
    init = INIT[modality][1]
    start = noise()[: init[..., 0].numel(), : init.shape[-1]].reshape(init.shape)
    stays = torch.zeros(SHAPES[modality]).bool() if anew is None else ~anew

    def velocity(t, x):
        x = torch.where(stays[..., None], (1 - t) * start + t * init, x)
        with torch.no_grad():
            return velocity_behind(model, [], Modality(modality, x), t).view_as(x)

    grid = [1 - strength + strength * u / (u + shift * (1 - u)) for u in (i / steps for i in range(steps + 1))]
    x = (1 - grid[0]) * start + grid[0] * init
    for low, high in pairwise(grid):
        half = x + (high - low) / 2 * velocity(low, x)
        x = x + (high - low) * velocity((low + high) / 2, half)
    return torch.where(stays[..., None], init, x)


def test_a_modality_alone_refuses_what_does_not_go_together():
    model, image = build(), INIT[IMAGE][1]
    for error, message, options in (
        (ValueError, "strength says what to keep", dict(strength=0.5)),
        (ValueError, "modality_mask says what to keep", dict(modality_mask=mask_of(IMAGE))),
        (ValueError, r"axial shape of the latents, \(2, 3\)", dict(init_modality=image, modality_mask=mask_of(LINE))),
        (ValueError, "fixed_modality_shape is", dict(init_modality=image, fixed_modality_shape=(1, 1))),
        (TypeError, "must be floating point", dict(init_modality=text(1, 2))),
    ):
        with pytest.raises(error, match=message):
            model.generate_modality_only(modality_type=IMAGE, **options)


def test_a_modality_alone_hangs_on_its_generator():
    model, options = build(), dict(modality_type=IMAGE, modality_steps=2, fixed_modality_shape=(2, 3))

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    two = model.generate_modality_only(2, generator=seeded(1, 2), **options)
    other = model.generate_modality_only(2, generator=seeded(2, 1), **options)
    torch.testing.assert_close(two, other.flip(0), atol=1e-9, rtol=0)
    assert not torch.allclose(two[0], two[1])
    one = [model.generate_modality_only(3, generator=seeded(5)[0], **options) for _ in range(2)]
    assert torch.equal(*one)
    assert not torch.allclose(one[0][0], one[0][1])
    kept = dict(init_modality=INIT[IMAGE][1], modality_mask=mask_of(IMAGE), strength=0.5)
    edits = model.generate_modality_only(2, generator=seeded(1, 2), **options, **kept)
    assert torch.equal(edits[0][~mask_of(IMAGE)], edits[1][~mask_of(IMAGE)])
    assert not torch.isclose(edits[0][mask_of(IMAGE)], edits[1][mask_of(IMAGE)]).any()


# variations


def test_noise_between_two_noises_changes_a_drawing_continuously():
    model, options = build(), options_with(plan=[(IMAGE, (2, 3))], modality_steps=2)
    one, other = noise(6, 1, seed=1), noise(6, 1, seed=2)

    def at(weight):
        return drawn(model.sample(text(1), **options | dict(init_modality_noise=slerp(one, other, weight))))[0][1]

    for weight, ends in ((0.0, one), (1.0, other)):
        expected = drawn(model.sample(text(1), **options | dict(init_modality_noise=ends)))[0][1]
        torch.testing.assert_close(at(weight), expected, atol=1e-9, rtol=0)
    middle = at(0.5)
    near, nearer = (float((at(0.5 + step) - middle).norm()) for step in (1e-4, 1e-5))
    assert 0 < near < 1e-2 * float((at(1.0) - at(0.0)).norm())
    assert near / nearer == pytest.approx(10, rel=0.05)


def test_the_same_generator_is_the_same_drawing_from_the_same_noise():
    model, options = build(), options_with(plan=[(IMAGE, (2, 3)), ("text", 2), (LINE, (2,))], max_length=60)
    options |= dict(init_modality_noise=None, text_temperature=1.0)
    one, two, other = (
        model.sample(text(1), generator=torch.Generator().manual_seed(seed), **options) for seed in (3, 3, 4)
    )
    assert_same(one, two, tolerance=0)
    assert not torch.allclose(drawn(one)[0][1], drawn(other)[0][1])
    start = noise_of(torch.Generator().manual_seed(3), 6, 1)
    assert_flows(model, one[:3], scale=3.0, start=start)
    edits = dict(init_modality=INIT[IMAGE], strength=0.5)
    edited = model.sample(text(1), generator=torch.Generator().manual_seed(3), **options, **edits)
    assert_flows(model, edited[:3], scale=3.0, start=start, init=INIT[IMAGE][1], strength=0.5)


def from_generator(draw):
    return draw(text(1), generator=torch.Generator().manual_seed(3), **options_with(init_modality_noise=None))


def test_a_stream_draws_from_its_generator_as_a_call_does():
    model = build(push=dict(meta=2.0))
    called = from_generator(model.sample)
    assert drawn(called)
    assert_same(list(from_generator(model.sample_stream))[-1].sample, called)


def test_a_request_draws_from_its_generator_as_a_call_does():
    model = build(push=dict(meta=2.0))
    engine = model.create_engine()
    request = from_generator(engine.submit)
    engine.run()
    assert_same(request.result(), from_generator(model.sample))
