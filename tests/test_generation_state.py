"""Sampling leaves no trace in the model, and gives the same wherever it is called from."""

import copy
from itertools import chain, repeat

import pytest
import torch
from generation_models import (
    LINE,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    options_over,
    shapes_of,
    text,
)
from torch import nn

options_with = options_over(max_length=20)


CALLS = {
    "sample": lambda model: model.sample(text(1), **options_with()),
    "sample_one": lambda model: model.sample_one(text(1), **options_with()),
    "sample_many": lambda model: model.sample_many([None, latents(LINE, 2)], **options_with()),
    "generate_text_only": lambda model: [model.generate_text_only(torch.tensor([[1, 2]]), 9, temperature=0.0)],
    "generate_modality_only": lambda model: [
        model.generate_modality_only(2, modality_type=1, fixed_modality_shape=(3,), init_modality_noise=noise())
    ],
}


def flags(model) -> list[bool]:
    return [module.training for module in model.modules()]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def mixed_modes(model):
    """Some parts train, others do not."""
    model.train()
    model.transformer.layers[0].eval()
    model.modalities[1].eval()
    return model


def assert_same_call(one, other) -> None:
    samples = zip(*((got if isinstance(got[0], list) else [got]) for got in (one, other)), strict=True)
    for sample, expected in samples:
        for part, wanted in zip(sample, expected, strict=True):
            part, wanted = (x[1] if isinstance(x, tuple) else x for x in (part, wanted))
            torch.testing.assert_close(part, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CALLS)
def test_sampling_leaves_modes_gradients_and_weights_alone(name):
    model = mixed_modes(build(transformer=dict(dropout=0.5)))
    before, modes = weights(model), flags(model)
    assert len(set(modes)) == 2
    outcome = CALLS[name](model)
    assert flags(model) == modes
    assert torch.is_grad_enabled()
    assert_untouched(model, before)
    assert_same_call(outcome, CALLS[name](model.eval()))  # dropout was off


@pytest.mark.parametrize("name", CALLS)
def test_failure_leaves_modes_gradients_and_weights_alone(name):
    model = mixed_modes(build(push=dict(eos=-9.0)))
    before, modes, expected = weights(model), flags(model), CALLS[name](model)
    countdown = chain([1, 1], repeat(0))
    failing = model.transformer.register_forward_pre_hook(lambda *_: 1 / next(countdown) and None)
    with pytest.raises(ZeroDivisionError):
        CALLS[name](model)
    failing.remove()
    assert flags(model) == modes
    assert torch.is_grad_enabled()
    assert_untouched(model, before)
    assert_same_call(CALLS[name](model), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", CALLS)
def test_sampling_is_the_same_in_any_gradient_mode(name, mode):
    model = build()
    expected = CALLS[name](model)
    with mode():
        outcome = CALLS[name](model)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert_same_call(outcome, expected)


def test_what_is_sampled_needs_no_gradient():
    prompt = latents(LINE, 2)[1].requires_grad_()
    for decoder in (None, nn.Linear(3, 3)):
        model = build(modality_decoder=(None, decoder, None, None))
        sample = model.sample((LINE, prompt), **options_with(force_modality_at_start=(LINE, (2,))))
        assert not any(x.requires_grad for _, x in drawn(sample))


@pytest.mark.parametrize("name", CALLS)
def test_sampling_runs_under_autocast(name):
    model = build().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = CALLS[name](model)
    for sample in outcome if isinstance(outcome[0], list) else [outcome]:
        for part in sample:
            part = part[1] if isinstance(part, tuple) else part
            assert part.isfinite().all()
            assert part.dtype in (torch.float32, torch.float64, torch.long)


def test_autocast_and_single_precision_draw_nearly_the_same():
    model = build().float()
    options = options_with(force_modality_at_start=(LINE, (3,)), modality_steps=1, odeint_kwargs=dict(method="euler"))
    exact = drawn(model.sample(text(1), **options))[0][1]
    torch.testing.assert_close(exact, drawn(build().sample(text(1), **options))[0][1].float(), atol=1e-3, rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = drawn(model.sample(text(1), **options))[0][1]
    assert (rough - exact).abs().max() < 0.1 * (exact - noise()[:3].float()).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampling_runs_in_the_dtype_of_the_model(dtype):
    sample = build(push=dict(meta=2.0)).to(dtype).sample(text(1), **options_with(max_length=30))
    assert drawn(sample)
    assert all(x.dtype == dtype and x.isfinite().all() for _, x in drawn(sample))


@pytest.mark.parametrize("name", CALLS)
def test_average_of_a_model_samples_as_the_model_does(name):
    model = build()
    ema = model.create_ema(beta=0.5)
    expected = CALLS[name](model)
    assert_same_call(CALLS[name](ema), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    assert_same_call(CALLS[name](ema), expected)  # it has weights of its own


def test_copies_sample_the_same():
    model = build()
    other = build(seed=5)
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), other):
        assert_same(twin.sample(text(1), **options_with()), model.sample(text(1), **options_with()), tolerance=0)


def test_same_seed_gives_the_same_sample():
    model = build()
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(model.sample(text(1), max_length=30, modality_steps=1, max_modality_tokens=4))
    assert_same(samples[0], samples[1], tolerance=0)
    assert shapes_of(samples[0]) != shapes_of(samples[2])


def test_engine_remembers_nothing_between_calls():
    model = build()
    given = options_with(force_modality_at_start=(LINE, (3,)))
    engine = model.create_engine()
    [first], [longer], [again] = (engine.sample_many([text(*ids)], **given) for ids in ((1,), (2, 3), (1,)))
    assert_same(first, again, tolerance=0)
    assert not torch.equal(drawn(first)[0][1], drawn(longer)[0][1])
