"""Reordered weights: the same products as with the weights themselves, used when they serve, and never when they are
old. And what else sampling does on a CPU: scratch memory, short norms.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from transfusion_pytorch import Transfusion
from transfusion_pytorch.network import inference
from transfusion_pytorch.network.cpu import reordered
from transfusion_pytorch.network.cpu.products import linear
from transfusion_pytorch.network.cpu.reordered import ReorderedWeights, reordered_linear, types_of_processor
from transfusion_pytorch.network.inference import RMSNormOfLayer

needs_library = pytest.mark.skipif(not types_of_processor(), reason="this processor has no such products")
TEXT = dict(max_length=300, plan=[("text", 200)], text_temperature=0.0)


@pytest.fixture
def at_once(monkeypatch):
    """Weights are reordered early, however small they are."""
    monkeypatch.setattr(reordered, "SMALLEST", 0)
    monkeypatch.setattr(reordered, "STEPS_BEFORE", 3)


def ready(rows: int = 8, dtype: torch.dtype = torch.float32) -> ReorderedWeights:
    weights = ReorderedWeights()
    for _ in range(reordered.STEPS_BEFORE):
        weights.note_step(rows, dtype)
    return weights


def make_model(**transformer) -> Transfusion:
    """With parameters that nothing is zero for, except the logits of markers: it writes text for long."""
    torch.manual_seed(0)
    sizes = dict(dim=64, depth=3, heads=4, kv_heads=2, dim_head=16, attn_kwargs=dict(qkv_bias=True, out_bias=True))
    model = Transfusion(
        num_text_tokens=50, dim_latent=4, modality_default_shape=(4,), transformer=sizes | transformer
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.to_logits.weight[50:] = 0
    return model


def prompts(count: int = 8) -> list[torch.Tensor]:
    """So long that a new view of the cache is soon needed, which is when copies come into use."""
    return list(torch.randint(0, 50, (count, 58), generator=torch.Generator().manual_seed(2)))


@needs_library
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (2, 4), (17,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_with_a_reordered_weight_is_the_product(at_once, dtype, shape, has_bias):
    if dtype not in types_of_processor():
        pytest.skip("no bfloat16")
    weight, bias = nn.Parameter(torch.randn(96, 48).to(dtype)), torch.randn(96).to(dtype) if has_bias else None
    x = torch.randn(*shape, 48).to(dtype)
    with torch.inference_mode():
        made = reordered_linear(x, ready(dtype=dtype).of(weight, x.shape[:-1].numel()), bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(made.double(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)
    assert made.dtype == dtype


@needs_library
def test_linear_layers_use_copies_only_where_they_serve(at_once):
    weight, x, weights = nn.Parameter(torch.randn(64, 64)), torch.randn(8, 64), ready()
    with torch.inference_mode():
        linear(x, weight)
        assert not weights._copies  # not in use
        with weights.used():
            for few_or_many in (2, 500):
                linear(torch.randn(few_or_many, 64), weight)
            linear(x.double(), weight.double())
            linear(x, weight[:32])  # a tensor that is new at each call
            assert not weights._copies
            made = linear(x, weight)
    assert list(weights._copies) == [weight]
    torch.testing.assert_close(made, F.linear(x, weight))


@needs_library
def test_copies_are_made_late_and_within_bounds(monkeypatch):
    weight, small = (nn.Parameter(torch.randn(size)) for size in ((512, 1024), (16, 16)))
    assert ReorderedWeights().of(weight, 8) is None  # no step yet
    assert ready(rows=1).of(weight, 8) is None  # only steps that do not gain by it
    weights = ready()
    assert weights.of(small, 8) is None
    assert weights.of(weight, 8) is weights.of(weight, 16) is not None
    monkeypatch.setattr(reordered, "LARGEST", 3 * weight.nbytes // 2)
    assert weights.of(nn.Parameter(torch.randn(512, 1024)), 8) is None
    assert weights.of(weight, 8) is not None
    for _ in range(reordered.STEPS_BEFORE - 1):
        weights.note_step(1, torch.float32)
    assert weights._copies
    weights.note_step(1, torch.float32)
    assert not weights._copies  # as many steps that do not gain


@needs_library
def test_copies_follow_their_weight(at_once):
    weight, x, weights = nn.Parameter(torch.randn(64, 64)), torch.randn(8, 64), ready()
    old = weights.of(weight, 8)
    with torch.no_grad():
        weight.mul_(2)
    assert weights.of(weight, 8) is not old
    weight.data = torch.randn(64, 64)
    torch.testing.assert_close(reordered_linear(x, weights.of(weight, 8), None), F.linear(x, weight).detach())


@needs_library
def test_copies_serve_as_soon_as_there_were_enough_steps(at_once, monkeypatch):
    model, first = make_model(), []
    engine = model.create_engine()
    for prompt in prompts():
        engine.submit(prompt, **TEXT)
    made = lambda *args: first.append(engine.stats.steps) or reordered_linear(*args)  # noqa: E731
    monkeypatch.setattr(inference, "reordered_linear", made)
    for _ in range(10):
        engine.step()
    assert first[0] == reordered.STEPS_BEFORE + 1


@needs_library
def test_without_memory_for_a_copy_the_weight_serves(at_once, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no memory")

    model, asked = make_model(), prompts()
    expected = model.sample_many(asked, **TEXT)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fails)
    for sample, other in zip(model.sample_many(asked, **TEXT), expected, strict=True):
        assert torch.equal(sample[0], other[0])


@needs_library
def test_texts_are_the_same_with_reordered_weights(at_once, monkeypatch):
    model, calls = make_model(), []
    monkeypatch.setattr(inference, "reordered_linear", lambda *args: calls.append(args) or reordered_linear(*args))
    prompt = torch.randint(0, 50, (8, 5))
    made = model.generate_text_only(prompt, 200, temperature=0.0)
    assert len(calls) > 1000
    monkeypatch.setattr(reordered, "STEPS_BEFORE", 10**9)
    calls.clear()
    assert torch.equal(made, model.generate_text_only(prompt, 200, temperature=0.0))
    assert not calls


@needs_library
@pytest.mark.parametrize("secretly", [False, True])
def test_changed_weights_are_reordered_again(at_once, secretly):
    """What an engine writes behind the change is what the changed model writes behind the same ids."""
    model = make_model()
    engine = model.create_engine()
    requests = [engine.submit(prompt, **TEXT) for prompt in prompts()]
    for _ in range(20):
        engine.step()
    assert len(engine.scheduler.runner.reordered._copies) > 10
    written = [
        torch.tensor([it for it in request._request.branch.items if isinstance(it, int)]) for request in requests
    ]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            change = 0.3 * torch.randn(parameter.shape, generator=generator)
            (parameter.data if secretly else parameter).add_(change)
    if secretly:
        engine.weights_changed()
    engine.run()
    for request, ids in zip(requests, written, strict=True):
        [made] = request.result()
        plan = [("text", 200 - (len(ids) - 59))]
        [expected] = model.sample(ids[1:], **TEXT | dict(plan=plan))  # sos comes by itself
        assert torch.equal(made, expected)


@needs_library
def test_an_idle_engine_keeps_no_copies(at_once):
    """Weights may change unnoticed then."""
    model = make_model()
    engine = model.create_engine()
    for prompt in prompts():
        engine.submit(prompt, **TEXT)
    engine.run()
    for parameter in model.parameters():
        parameter.data.mul_(-0.7)
    requests = [engine.submit(prompt, **TEXT) for prompt in prompts()]
    engine.run()
    for request, sample in zip(requests, model.sample_many(prompts(), **TEXT), strict=True):
        assert torch.equal(request.result()[0], sample[0])


@needs_library
def test_weights_that_are_made_at_each_call_are_not_kept(at_once):
    model = make_model()
    parametrizations.weight_norm(model.transformer.layers[0].attn.to_out)
    engine = model.create_engine()
    for prompt in prompts():
        engine.submit(prompt, **TEXT)
    for _ in range(60):
        engine.step()
    assert 0 < len(engine.scheduler.runner.reordered._copies) <= len(list(model.parameters()))


@pytest.mark.parametrize("num_axes", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_rms_norm_is_the_norm(dtype, scale, num_axes):
    x, gain = scale * torch.randn(5, 3, 4, 2).to(dtype), torch.randn((2,) if num_axes == 1 else (3, 4, 2)).to(dtype)
    with torch.device("meta"):  # what is made beside the gain is where that is
        norm = RMSNormOfLayer.of(gain, 1e-6, num_axes=num_axes)
    axes = tuple(range(-num_axes, 0))
    exact = x.double()
    expected = (exact / (exact.square().mean(dim=axes, keepdim=True) + 1e-6).sqrt() * gain).to(dtype)
    assert norm.short is not None
    torch.testing.assert_close(norm.normed(x), expected)
    torch.testing.assert_close(norm._replace(short=None).normed(x), expected)
    torch.testing.assert_close(norm.normed(x.clone(), overwrites=True), expected)


@pytest.mark.parametrize("options", [{}, dict(kv_heads=None, attn_kwargs={}, unet_skips=False)])
def test_samples_with_scratch_memory_are_the_samples_without(monkeypatch, options):
    """Two drawings of different shapes at once, and a prompt long enough to be read in parts."""
    model, used = make_model(**options), []
    make = inference._scratch

    def noted(*arguments):
        used.append(scratch := make(*arguments))
        return scratch

    monkeypatch.setattr(inference, "_scratch", noted)
    asked = [torch.arange(40).repeat(2), [(0, torch.randn(4, 4)), torch.arange(30)]]
    plans = dict(plan=[(0, (40,)), ("text", 5), (0, (13,))], max_length=400, cfg_scale=3.0, modality_steps=4)

    def samples():
        return model.sample_many(asked, **plans, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(inference, "SMALLEST_SCRATCH", 10**12)
    whole = samples()
    assert not any(used)
    monkeypatch.setattr(inference, "HIDDEN_AT_ONCE", 4000)
    monkeypatch.setattr(inference, "FEWEST_AT_ONCE", 3)
    monkeypatch.setattr(inference, "SMALLEST_SCRATCH", 0)
    used.clear()
    parts = samples()
    assert sum(scratch is not None for scratch in used) > 8
    for sample, other in zip(parts, whole, strict=True):
        for part, part_of_other in zip(sample, other, strict=True):
            if isinstance(part, tuple):
                torch.testing.assert_close(part[1], part_of_other[1], atol=1e-4, rtol=1e-4)
            else:
                assert torch.equal(part, part_of_other)
