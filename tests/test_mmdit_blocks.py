"""Blocks: what they do before they are trained, against their formulas, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from mmdit_models import awake, influence, tokens
from torch import randn
from torch.nn.attention.flex_attention import create_block_mask

from transfusion_pytorch.mmdit import InContextMMDiTBlock, MMDiTBlock

DIMS = (12, 8, 16)
SIZES = dict(dim_head=8, heads=2, ff_mult=2)


def adaptive(count=2, **options):
    return MMDiTBlock(DIMS[:count], dim_cond=6, **(SIZES | options)).double()


def in_context(count=2, **options):
    return InContextMMDiTBlock(DIMS[:count], **(SIZES | options)).double()


def condition(*shape):
    return randn(*shape, 6, dtype=torch.float64)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def modulated(x, cond, part, branch):
    """The normed tokens and the gate of a branch: 0 joint attention, 1 feedforward, 2 dual attention."""
    chunks = (cond @ part.to_modulation.weight.T + part.to_modulation.bias)[:, None].split(x.shape[-1], dim=-1)
    shift, scale, gate = chunks[3 * branch : 3 * branch + 3]
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, gate


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dual", [(), (0,)])
def test_an_adaptive_block_starts_as_the_identity(count, dual):
    inputs = tokens(count)
    outs = adaptive(count, dual_attention=dual)(inputs, condition(2))
    assert all(torch.equal(out, x) for out, x in zip(outs, inputs, strict=True))


def test_an_adaptive_block_is_its_formula():
    block, inputs, cond = awake(adaptive()), tokens(), condition(2)
    first = [modulated(x, cond, part, 0) for x, part in zip(inputs, block.modalities, strict=True)]
    attended = block.attn([normed for normed, _ in first])
    expected = []
    for x, out, (_, gate), part in zip(inputs, attended, first, block.modalities, strict=True):
        x = x + gate * out
        normed, gate = modulated(x, cond, part, 1)
        expected.append(x + gate * part.ff(normed))
    close(block(inputs, cond), tuple(expected))


def test_dual_attention_is_a_second_branch_of_the_same_tokens():
    block, inputs, cond = awake(adaptive(dual_attention=(1,))), tokens(), condition(2)
    first = [modulated(x, cond, part, 0) for x, part in zip(inputs, block.modalities, strict=True)]
    attended = block.attn([normed for normed, _ in first])
    part = block.modalities[1]
    normed, gate = modulated(inputs[1], cond, part, 2)
    x = inputs[1] + first[1][1] * attended[1] + gate * part.dual_attn([normed])[0]
    normed, gate = modulated(x, cond, part, 1)
    close(block(inputs, cond)[1], x + gate * part.ff(normed))
    assert block.modalities[0].dual_attn is None


def test_dual_attention_keeps_to_the_mask():
    block, inputs, cond = awake(adaptive(dual_attention=(0, 1))), tokens(), condition(2)
    mask = (torch.rand(7, 7) < 0.4) | torch.eye(7, dtype=torch.bool)
    assert torch.equal(influence(lambda given: block(given, cond, mask), inputs), mask)


def test_dual_attention_keeps_to_a_mask_without_the_rows_of_a_modality_without_output():
    block, inputs, cond = awake(adaptive(pre_only=(0,), dual_attention=(1,))), tokens(), condition(2)
    mask = (torch.rand(3, 7) < 0.4) | torch.eye(7, dtype=torch.bool)[4:]
    assert torch.equal(influence(lambda given: block(given, cond, mask), inputs), mask)


@pytest.mark.filterwarnings("ignore:use_flex_attn")
@pytest.mark.parametrize("make", [adaptive, in_context])
def test_masks_of_a_block_may_be_functions_or_block_masks(make):
    block, inputs = awake(make(**(dict(dual_attention=(0,)) if make is adaptive else {}))), tokens()
    cond = (condition(2),) if make is adaptive else ()
    expected = block(inputs, *cond, torch.ones(7, 7, dtype=torch.bool).tril())
    close(block(inputs, *cond, causal), expected)
    close(block(inputs, *cond, create_block_mask(causal, None, None, 7, 7, device="cpu")), expected)


def causal(b, h, query, key):
    return query >= key


def test_a_block_in_context_is_its_formula():
    block, inputs = awake(in_context()), tokens()
    attended = block.attn([part.attn_norm(x) for x, part in zip(inputs, block.modalities, strict=True)])
    expected = []
    for x, out, part in zip(inputs, attended, block.modalities, strict=True):
        x = x + out
        rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + part.ff_norm.weight)
        expected.append(x + part.ff(rms))
    close(block(inputs), tuple(expected))


def test_conditions_change_the_output():
    block, inputs = awake(adaptive()), tokens()
    assert not torch.allclose(block(inputs, condition(2))[0], block(inputs, condition(2))[0], atol=1e-3)


def test_conditions_of_tokens_samples_and_modalities_agree():
    block, inputs, cond = awake(adaptive()), tokens(), condition(2)
    expected = block(inputs, cond)
    close(block(inputs, cond[:, None].expand(-1, 7, -1)), expected)
    close(block(inputs, [cond, cond[:, None].expand(-1, 3, -1)]), expected)
    shared = block(inputs, cond[0])
    close(shared, block(inputs, cond[:1].expand(2, -1)))


def test_a_token_has_its_own_condition():
    block, inputs = awake(adaptive()), tokens()
    of_tokens = condition(2, 7).requires_grad_()
    out = block(inputs, of_tokens, torch.eye(7, dtype=torch.bool))
    out[0][:, 1].sum().backward()
    assert of_tokens.grad.ne(0).any(dim=-1).any(dim=0).tolist() == [False, True, *[False] * 5]


def test_gates_learn_first():
    block, inputs, cond = adaptive(), tokens(), condition(2)
    sum((out * randn(out.shape)).sum() for out in block(inputs, cond)).backward()
    for part in block.modalities:
        learns = [chunk.any().item() for chunk in part.to_modulation.weight.grad.chunk(6)]
        assert learns == [False, False, True] * 2  # shift, scale, gate
        assert not part.ff.to_out.weight.grad.any()
    awake(block)
    block.zero_grad()
    sum(out.square().sum() for out in block(inputs, cond)).backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_parameter_of_a_block_in_context_learns(count):
    block = in_context(count)
    sum(out.square().sum() for out in block(tokens(count))).backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


def test_each_modality_has_its_own_weights():
    block, inputs, cond = awake(adaptive()), tokens(), condition(2)
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool()
    image = block(inputs, cond, mask)[0]
    for name, parameter in block.named_parameters():
        if "modalities.1" in name:
            torch.nn.init.normal_(parameter)
    close(block(inputs, cond, mask)[0], image, atol=0)


@pytest.mark.parametrize("make", [adaptive, in_context])
def test_a_modality_without_output_is_attended_to(make):
    block, inputs = awake(make(pre_only=(1,))), tokens()
    cond = (condition(2),) if make is adaptive else ()
    image, nothing = block(inputs, *cond)
    assert nothing is None
    assert block.modalities[1].ff is None
    assert influence(lambda given: block(given, *cond), inputs).all()
    assert image.shape == inputs[0].shape


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batch_dimensions_are_free(batch):
    inputs = tokens(batch=batch)
    for outs in (awake(adaptive())(inputs, condition(*batch)), awake(in_context())(inputs)):
        assert [out.shape for out in outs] == [x.shape for x in inputs]


@pytest.mark.parametrize("make", [adaptive, in_context])
def test_wrong_inputs_are_refused_by_name(make):
    block, (image, text) = make(), tokens()
    cond = (condition(2),) if make is adaptive else ()
    with pytest.raises(ValueError, match=r"expected 2 modalities .* got 1"):
        block((image,), *cond)
    with pytest.raises(ValueError, match=r"modality 1: expected tokens of shape \(\*batch, tokens, 8\)"):
        block((image, image), *cond)
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape \(7, 7\) or \(2, 7, 7\)"):
        block((image, text), *cond, torch.ones(7, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("cond", "kind", "message"),
    [
        (randn(2, 5), ValueError, r"cond: expected the shape \(2, 6\) or \(2, 7, 6\), got \(2, 5\)"),
        (randn(3, 6), ValueError, r"cond: expected the shape .* got \(3, 6\)"),
        (randn(2, 4, 6), ValueError, r"cond: expected the shape .* got \(2, 4, 6\)"),
        ([randn(2, 6)], ValueError, "cond: expected one entry for each of 2 modalities in the call, got 1"),
        ([randn(2, 6), randn(2, 4, 6)], ValueError, r"cond of modality 1: expected the shape \(2, 6\) or \(2, 3, 6\)"),
        (
            [randn(2, 6), None],
            TypeError,
            "cond of modality 1: expected a floating point tensor of 6 channels, got None",
        ),
    ],
)
def test_wrong_conditions_are_refused_by_name(cond, kind, message):
    with pytest.raises(kind, match=message):
        adaptive()(tokens(), cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dual_attention=(5,)), "dual_attention: expected numbers from 0 to 1, got 5"),
        (dict(pre_only=(-1,)), "pre_only: expected numbers from 0 to 1, got -1"),
        (dict(dim_cond=0), "dim_cond must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MMDiTBlock(DIMS[:2], **(SIZES | options))
