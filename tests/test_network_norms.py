"""Norms by their formulas; who hears of which condition; and times as conditions."""

import copy

import torch
from network_streams import perturb, stream

from transfusion_pytorch.network.norms import AdaptiveNorm, RMSNorm, TimeEmbedding

DIM = 12
MADE = stream("ttAAtBB", "CCt", "t")


def inputs():
    """Tokens, and a condition for every span."""
    sizes = (len(MADE.span), DIM), (3, DIM)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def test_rms_norm_has_a_gain_of_one_plus_its_weight():
    norm, x = perturb(RMSNorm(DIM)).double(), 3 * inputs()[0]
    by_hand = x / x.square().mean(dim=-1, keepdim=True).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(norm(x), by_hand, rtol=1e-5, atol=0)
    assert torch.equal(RMSNorm(DIM).weight, torch.zeros(DIM))


def adaptive(*, has_gate=True) -> AdaptiveNorm:
    return perturb(AdaptiveNorm(DIM, DIM, has_gate=has_gate)).double()


def test_adaptive_norm_is_its_formula():
    norm, (x, condition) = adaptive(), inputs()
    modulation = norm.modulation(MADE.conditioning(condition))
    out, gates = norm(x, modulation), modulation.gated(torch.ones_like(x))
    normed = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True, correction=0) + 1e-5).sqrt()
    scale, shift, gate = (condition @ norm.to_modulation.weight.T + norm.to_modulation.bias).chunk(3, dim=-1)
    for slot, span in enumerate(MADE.span.tolist()):
        if span < 0:
            expected, expected_gate = normed[slot] * (1 + norm.text_scale), 1 + norm.text_gate
        else:
            expected, expected_gate = normed[slot] * (1 + scale[span]) + shift[span], gate[span]
        torch.testing.assert_close(out[slot], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(gates[slot], expected_gate, rtol=0, atol=1e-10)


def test_text_has_one_norm_whether_spans_are_about_or_not():
    norm, (x, condition) = adaptive(), inputs()
    with_spans, without = norm.modulation(MADE.conditioning(condition)), norm.modulation(None)
    torch.testing.assert_close(norm(x, with_spans)[MADE.is_text], norm(x, without)[MADE.is_text], rtol=0, atol=0)
    gates = [modulation.gated(torch.ones_like(x))[MADE.is_text] for modulation in (with_spans, without)]
    assert torch.equal(*gates)


def test_a_norm_without_a_branch_has_no_gate():
    norm = adaptive(has_gate=False)
    assert norm.modulation(None).gate is None
    assert norm.text_gate is None
    assert norm.to_modulation.out_features == 2 * DIM


def test_a_slot_hears_of_no_condition_but_its_spans():
    norm, (x, condition) = adaptive(), inputs()
    modulation = norm.modulation(MADE.conditioning(condition))
    for part in (norm(x, modulation), modulation.gated(torch.ones_like(x))):
        for slot, span in enumerate(MADE.span.tolist()):
            (gradient,) = torch.autograd.grad(part[slot].sum(), condition, retain_graph=True)
            assert (gradient.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == ([span] if span >= 0 else [])


def test_times_close_to_each_other_look_different():
    t = torch.linspace(0, 1, 513)
    embedded = TimeEmbedding(DIM)(t)
    apart = torch.cdist(embedded, embedded) + torch.eye(len(t))
    assert apart.min() > 1e-3


def test_time_is_not_rounded_with_the_parameters():
    """A time of 0.9 turns the fastest frequency by 900 radians, where bfloat16 counts in steps of 4."""
    embed, t = TimeEmbedding(32), torch.linspace(0, 1, 64).bfloat16()
    exact = embed(t.float())
    rounded = copy.deepcopy(embed).bfloat16()(t)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.02)
