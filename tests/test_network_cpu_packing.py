"""Packed weights: the same products as with the weights themselves, used when they serve, and never when they are old.

n rows, i and o features.
"""

import pytest
import torch
import torch.nn.functional as F

from transfusion_pytorch import Transfusion
from transfusion_pytorch.network import inference
from transfusion_pytorch.network.cpu import packing
from transfusion_pytorch.network.cpu.packing import PackedWeights, can_pack, packed_linear
from transfusion_pytorch.network.cpu.products import linear
from transfusion_pytorch.network.inference import RMSGain

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(1024, 1024)), reason="this processor has no packed products"
)


@pytest.fixture
def packs_all(monkeypatch):
    """Packs at once, however small a weight is."""
    monkeypatch.setattr(packing, "SMALLEST", 0)
    monkeypatch.setattr(packing, "STEPS_BEFORE_PACKING", 3)


def ready(rows: int = 8, dtype: torch.dtype = torch.float32) -> PackedWeights:
    packed = PackedWeights()
    for _ in range(packing.STEPS_BEFORE_PACKING):
        packed.count_step(rows, dtype)
    return packed


@needs_packing
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (2, 4), (17,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_product_is_the_product(packs_all, dtype, shape, has_bias):
    if not can_pack(weight := torch.randn(96, 48).to(dtype)):
        pytest.skip("no bfloat16")
    bias = torch.randn(96).to(dtype) if has_bias else None
    x = torch.randn(*shape, 48).to(dtype)
    with torch.inference_mode():
        made = packed_linear(x, ready(dtype=dtype).of(weight, x.shape[:-1].numel()), bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(made.double(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)
    assert made.dtype == dtype


@needs_packing
def test_linear_layers_use_packed_weights_only_where_they_serve(packs_all):
    weight, x, packed = torch.randn(64, 64), torch.randn(8, 64), ready()
    with torch.inference_mode():
        linear(x, weight)
        assert not packed._packed  # not in use
        with packed.used():
            linear(x[:2], weight)
            linear(torch.randn(500, 64), weight)
            linear(x.double(), weight.double())
            assert not packed._packed  # too few rows, too many, no such product
            made = linear(x, weight)
    assert len(packed._packed) == 1
    torch.testing.assert_close(made, F.linear(x, weight))


@needs_packing
def test_weights_are_packed_late_and_within_bounds(monkeypatch):
    weight, small = torch.randn(512, 1024), torch.randn(16, 16)
    assert PackedWeights().of(weight, 8) is None  # no step yet
    assert ready(rows=1).of(weight, 8) is None  # only steps that do not gain by it
    packed = ready()
    assert packed.of(small, 8) is None
    assert packed.of(weight, 8) is packed.of(weight, 16) is not None
    monkeypatch.setattr(packing, "LARGEST", 3 * weight.nbytes // 2)
    assert packed.of(torch.randn(512, 1024), 8) is None
    assert packed.of(weight, 8) is not None
    packed.clear()
    assert packed.of(weight, 8) is None


def make_model() -> Transfusion:
    torch.manual_seed(0)
    transformer = dict(dim=64, depth=3, heads=4, dim_head=16, attn_kwargs=dict(qkv_bias=True))
    return Transfusion(num_text_tokens=50, dim_latent=4, modality_default_shape=(4,), transformer=transformer).eval()


@needs_packing
def test_texts_are_the_same_with_packed_weights(packs_all, monkeypatch):
    model, calls = make_model(), []
    monkeypatch.setattr(inference, "packed_linear", lambda *args: calls.append(args) or packed_linear(*args))
    prompt = torch.randint(0, 50, (8, 5))
    made = model.generate_text_only(prompt, 200, temperature=0.0)
    assert len(calls) > 100
    monkeypatch.setattr(packing, "STEPS_BEFORE_PACKING", 10**9)
    calls.clear()
    assert torch.equal(made, model.generate_text_only(prompt, 200, temperature=0.0))
    assert not calls


@needs_packing
@pytest.mark.parametrize("secretly", [False, True])
def test_changed_weights_are_packed_again(packs_all, secretly):
    """What an engine writes behind the change is what the changed model writes behind the same ids."""
    model = make_model()
    engine = model.create_engine()
    options = dict(max_length=300, plan=[("text", 200)], text_temperature=0.0)
    requests = [engine.submit(torch.randint(0, 50, (4,)), **options) for _ in range(8)]
    for _ in range(100):
        engine.step()
    assert engine.scheduler.runner.packed.of(model.transformer.layers[0].attn.to_qkv.weight, 8) is not None
    written = [torch.tensor(request._request.ids) for request in requests]
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
        rest = options | dict(plan=[("text", 205 - len(ids))])
        [expected] = model.sample(ids[1:], **rest)  # sos comes by itself
        assert torch.equal(made, expected)


@pytest.mark.parametrize("num_axes", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e6])
def test_short_rms_norm_is_the_norm(num_axes, scale):
    x, gain = scale * torch.randn(5, 3, 4, 2).double(), torch.randn((2,) if num_axes == 1 else (3, 4, 2)).double()
    norm = RMSGain.of(gain, 1e-6, num_axes=num_axes)
    axes = tuple(range(-num_axes, 0))
    expected = x / (x.square().mean(dim=axes, keepdim=True) + 1e-6).sqrt() * gain
    assert norm.short is not None
    torch.testing.assert_close(norm.normed(x), expected)
    torch.testing.assert_close(norm._replace(short=None).normed(x), expected)
    torch.testing.assert_close(norm.normed(x.clone(), overwrites=True), expected)


def test_feedforward_in_parts_is_the_feedforward(monkeypatch):
    model = make_model()
    prompt = [torch.randint(0, 50, (7,)), (0, torch.randn(4, 4))]
    options = dict(modality_steps=4, plan=[(0, (40,)), ("text", 5)], max_length=200, cfg_scale=3.0)
    whole = model.sample(prompt, **options, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(inference, "HIDDEN_AT_ONCE", 4000)
    parts = model.sample(prompt, **options, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts[3][1], whole[3][1])
