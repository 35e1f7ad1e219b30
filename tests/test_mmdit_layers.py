"""The parts of a block that belong to one modality, against their formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmdit_models import awake, refused
from torch import nn, randn

from transfusion_pytorch import plain_formulas
from transfusion_pytorch.mmdit import (
    AdaptiveLayerNorm,
    FeedForward,
    ModulatedFinalLayer,
    SimpleFinalLayer,
    TimestepEmbedding,
)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# feedforward


def test_swiglu_is_its_formula_and_has_no_biases():
    ff, x = awake(FeedForward(6, ff_mult=3)), randn(2, 5, 6).double()
    into, gate = ff.to_hidden.weight.chunk(2)
    close(ff(x), (x @ into.T * F.silu(x @ gate.T)) @ ff.to_out.weight.T)
    assert into.shape == (18, 6)
    assert {name for name, _ in ff.named_parameters()} == {"to_hidden.weight", "to_out.weight"}


def test_gelu_is_its_formula_with_biases():
    for activation, cumulative in (
        ("gelu", lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ):
        ff, x = awake(FeedForward(6, ff_mult=2, activation=activation)), randn(5, 6).double()
        inner = x @ ff.to_hidden.weight.T + ff.to_hidden.bias
        close(ff(x), (inner * cumulative(inner)) @ ff.to_out.weight.T + ff.to_out.bias)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh"])
def test_the_kernels_of_cpus_are_the_plain_formulas(activation):
    ff, x = awake(FeedForward(6, activation=activation)), randn(2, 3, 6).double().requires_grad_()
    parameters = [x, *ff.parameters()]
    fast = ff(x)
    with plain_formulas():
        plain = ff(x)
    close(fast, plain)
    weight = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad(fast, parameters, weight), torch.autograd.grad(plain, parameters, weight), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_a_feedforward_takes_any_batch_dimensions(shape):
    ff, x = awake(FeedForward(6)), randn(*shape).double()
    close(ff(x).reshape(-1, 6), ff(x.reshape(-1, 6)))


def test_wrong_feedforwards_are_refused():
    with refused(ValueError, "activation must be one of swiglu, gelu, gelu_tanh, got 'relu'", is_type=True):
        FeedForward(6, activation="relu")
    with refused(ValueError, r"dim \* ff_mult must be at least 1, got 6 \* 0.01"):
        FeedForward(6, ff_mult=0.01)


# adaptive norm


def test_an_adaptive_norm_starts_as_a_plain_one():
    norm, x = AdaptiveLayerNorm(6, 4), randn(2, 5, 6)
    close(norm(x, randn(2, 4)), F.layer_norm(x, (6,), eps=1e-6), atol=0)


def test_scale_and_shift_are_those_of_the_condition():
    norm, x, cond = awake(AdaptiveLayerNorm(6, 4)), randn(2, 5, 6).double(), randn(2, 4).double()
    shift, scale = (cond @ norm.to_modulation.weight.T + norm.to_modulation.bias)[:, None].chunk(2, dim=-1)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    close(norm(x, cond), normed * (1 + scale) + shift)
    of_tokens = cond[:, None].expand(-1, 5, -1)
    close(norm(x, of_tokens), norm(x, cond))


def test_a_gate_starts_shut_and_multiplies():
    norm, x, out = AdaptiveLayerNorm(6, 4, has_gate=True), randn(2, 5, 6), randn(2, 5, 6)
    assert torch.equal(norm.modulation(randn(2, 1, 4)).add_gated(x, out), x)
    awake(norm).float()
    cond = randn(2, 1, 4)
    gate = norm.to_modulation(cond)[..., 12:]
    close(norm.modulation(cond).add_gated(x, out), x + gate * out, atol=1e-6)


def test_adaptive_norms_have_no_parameters_but_the_projection():
    assert {name for name, _ in AdaptiveLayerNorm(6, 4).named_parameters()} == {
        "to_modulation.weight",
        "to_modulation.bias",
    }


# last layers


@pytest.mark.parametrize("dim_out", [1, 7])
def test_last_layers_start_at_zero_and_learn(dim_out):
    x, cond = randn(2, 5, 6), randn(2, 4)
    for layer, inputs in (
        (ModulatedFinalLayer(6, dim_out, 4), (x, cond)),
        (SimpleFinalLayer(6, dim_out), (x,)),
    ):
        out = layer(*inputs)
        assert out.shape == (2, 5, dim_out)
        assert torch.equal(out, torch.zeros_like(out))
        out.sum().backward()
        assert layer.to_out.weight.grad.any()


def test_last_layers_are_a_norm_and_a_product():
    x, cond = randn(2, 5, 6).double(), randn(2, 4).double()
    modulated, simple = awake(ModulatedFinalLayer(6, 3, 4)), awake(SimpleFinalLayer(6, 3))
    close(modulated(x, cond), modulated.norm(x, cond) @ modulated.to_out.weight.T + modulated.to_out.bias)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + simple.norm.weight)
    close(simple(x), rms @ simple.to_out.weight.T + simple.to_out.bias)


def test_reset_parameters_zeroes_what_starts_at_zero():
    layer = awake(ModulatedFinalLayer(6, 3, 4)).float()
    for module in (layer.norm, layer):
        module.reset_parameters()
    out = layer(randn(5, 6), randn(4))
    assert torch.equal(out, torch.zeros_like(out))


# times


def test_a_time_is_embedded_by_sines_and_cosines():
    embed, t = awake(TimestepEmbedding(5, timestep_embed_dim=6)), torch.tensor([0.0, 0.3, 1.0]).double()
    angle = t[:, None] * 10_000.0 ** -(torch.arange(3).double() / 3)
    first, _, last = embed.layers
    inner = F.silu(torch.cat((angle.sin(), angle.cos()), dim=-1) @ first.weight.T + first.bias)
    close(embed(t), inner @ last.weight.T + last.bias)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_times_have_any_shape(shape):
    embed, t = awake(TimestepEmbedding(5, timestep_embed_dim=4)), torch.rand(shape).double()
    assert embed(t).shape == (*shape, 5)
    close(embed(t).reshape(-1, 5), embed(t.reshape(-1)))


def test_the_scale_multiplies_times():
    embed = awake(TimestepEmbedding(5, timestep_embed_dim=4, timestep_scale=1000))
    plain = awake(TimestepEmbedding(5, timestep_embed_dim=4))
    plain.load_state_dict(embed.state_dict())
    t = torch.rand(3).double()
    close(embed(t), plain(1000 * t))
    assert not torch.allclose(embed(t), plain(t), atol=1e-3)


def test_near_times_stay_apart_in_bfloat16():
    embed = TimestepEmbedding(5, timestep_embed_dim=8, timestep_scale=1000).bfloat16()
    seen = []
    embed.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    embed(torch.tensor([0.9000, 0.9005]))
    assert seen[0].dtype == torch.bfloat16
    assert not torch.equal(*seen[0])


def test_odd_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"timestep_embed_dim must be even \(sines and cosines\), got 5"):
        TimestepEmbedding(4, timestep_embed_dim=5)


@pytest.mark.parametrize("layer", [FeedForward(6), AdaptiveLayerNorm(6, 4), TimestepEmbedding(6)])
def test_layers_can_be_copied(layer):
    twin = copy.deepcopy(layer)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(layer.parameters(), twin.parameters(), strict=True))
    assert isinstance(twin, nn.Module)
