"""Joint attention: against its definition, who sees whom, masks, norms, rotary positions, errors."""

import math
from itertools import product

import pytest
import torch
from mmdit_models import awake, influence, refused, tokens
from torch import randn
from torch.nn.attention.flex_attention import create_block_mask

from transfusion_pytorch import plain_formulas
from transfusion_pytorch.mmdit import JointAttention
from transfusion_pytorch.mmdit.masks import evaluated
from transfusion_pytorch.mmdit.positions import joint_phases

DIMS = (12, 8, 16)


def make(count=2, **options):
    return awake(JointAttention(DIMS[:count], **(dict(dim_head=8, heads=2) | options)))


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_hand(attn, inputs, mask=None, positions=None):
    """The definition, sample by sample and head by head, with rotations by complex numbers."""
    heads, e = attn.modalities[0].heads, attn.dim_head
    parts = []
    for i, (x, modality) in enumerate(zip(inputs, attn.modalities, strict=True)):
        qkv = x @ modality.to_qkv.weight.T + (0 if modality.to_qkv.bias is None else modality.to_qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, heads, e)).unbind(-3)
        q, k = (
            part if norm is None else normed(part, norm) for part, norm in ((q, modality.q_norm), (k, modality.k_norm))
        )
        if attn.rope_axes:
            at = torch.arange(x.shape[-2])[:, None].double() if positions is None else positions[i]
            of_axis = e // attn.rope_axes
            frequency = attn.rotary_theta ** -(torch.arange(0, of_axis, 2).double() / of_axis)
            angle = (at[..., None] * frequency).flatten(-2)[..., None, :]
            turn = torch.polar(torch.ones_like(angle), angle)
            q, k = (
                torch.view_as_real(torch.view_as_complex(p.unflatten(-1, (-1, 2))) * turn).flatten(-2) for p in (q, k)
            )
        parts.append((q, k, v))
    q, k, v = (torch.cat(part, dim=-3).movedim(-2, -3) for part in zip(*parts, strict=True))
    logits = q @ k.mT / math.sqrt(e)
    if mask is not None:
        logits = logits.masked_fill(~(mask[:, None] if mask.ndim == 3 else mask), -math.inf)
    out = (logits.softmax(dim=-1) @ v).movedim(-3, -2).flatten(-2)
    pieces = out.split([x.shape[-2] for x in inputs], dim=-2)
    return tuple(
        piece @ m.to_out.weight.T + (0 if m.to_out.bias is None else m.to_out.bias)
        for piece, m in zip(pieces, attn.modalities, strict=True)
    )


def normed(x, norm):
    if isinstance(norm, torch.nn.LayerNorm):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize(
    ("count", "qk_norm", "axes", "bias"),
    [*product((1, 2, 3), ("rms",), (1,), (False,)), *product((2,), ("rms", "layer", "none"), (0, 1), (True,))],
)
def test_attention_is_its_definition_forward_and_backward(count, qk_norm, axes, bias, is_plain):
    attn = make(count, qk_norm=qk_norm, rope_axes=axes, bias=bias)
    inputs = tokens(count, requires_grad=True)
    mask = torch.rand(2, *[sum(x.shape[1] for x in inputs)] * 2) < 0.7
    mask |= torch.eye(mask.shape[-1], dtype=torch.bool)
    if is_plain:
        with plain_formulas():
            ours = attn(inputs, mask)
    else:
        ours = attn(inputs, mask)
    theirs = by_hand(attn, inputs, mask)
    close(ours, theirs)
    leaves = [*inputs, *attn.parameters()]
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in outs), leaves) for outs in (ours, theirs)]
    close(*gradients)


def test_no_option_is_ignored():
    inputs = tokens()
    outs = [make(**options)(inputs) for options in (dict(), dict(bias=True))]
    assert not torch.allclose(outs[0][0], outs[1][0])
    reference = make()
    for options in (dict(qk_norm="none"), dict(rope_axes=0), dict(rotary_theta=10.0)):
        other = make(**options)
        other.load_state_dict(reference.state_dict(), strict=False)
        assert not torch.allclose(other(inputs)[0], reference(inputs)[0], atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_without_a_mask_everybody_sees_everybody(count):
    assert influence(make(count), tokens(count)).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_who_sees_whom_is_what_the_mask_says(count):
    inputs = tokens(count)
    n = sum(x.shape[1] for x in inputs)
    mask = (torch.rand(n, n) < 0.5) | torch.eye(n, dtype=torch.bool)
    assert torch.equal(influence(lambda given: make(count)(given, mask), inputs), mask)


def test_masks_of_samples_are_those_of_samples_alone():
    attn, inputs = make(), tokens()
    mask = (torch.rand(2, 7, 7) < 0.5) | torch.eye(7, dtype=torch.bool)
    together = attn(inputs, mask)
    for i in range(2):
        close(tuple(x[i] for x in together), attn(tuple(x[i] for x in inputs), mask[i]))


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
FUNCTIONS = {
    "one for all heads": (lambda b, h, query, key: query >= key, CAUSAL),
    "by head": (
        lambda b, h, query, key: (query >= key) | (h > 0),
        torch.stack((CAUSAL, torch.ones_like(CAUSAL)))[None],
    ),
}


@pytest.mark.filterwarnings("ignore:use_flex_attn")
@pytest.mark.parametrize("as_block_mask", [False, True])
@pytest.mark.parametrize(("function", "mask"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_the_masks_that_they_make(function, mask, as_block_mask):
    """Also those of a `BlockMask` in training on a CPU, where SDPA stands in for flex attention."""
    attn, inputs = make(), tokens()
    assert evaluated(function, 2, 2, 7, 7, torch.device("cpu")).shape == (
        2,
        mask.shape[-3] if mask.ndim > 2 else 1,
        7,
        7,
    )
    given = create_block_mask(function, None, 2, 7, 7, device="cpu") if as_block_mask else function
    close(attn(inputs, given), by_hand(attn, inputs, mask))


def test_a_token_that_sees_nothing_gets_nothing():
    attn, mask = make(bias=False), torch.ones(7, 7, dtype=torch.bool)
    mask[2] = False
    image, text = attn(tokens(), mask)
    assert torch.equal(image[:, 2], torch.zeros_like(image[:, 2]))
    assert image.isfinite().all()
    assert text.isfinite().all()


def test_the_order_of_tokens_means_nothing_without_rotary_positions():
    attn, (image, text) = make(rope_axes=0), tokens()
    order = torch.randperm(image.shape[1])
    outs, mixed = attn((image, text)), attn((image[:, order], text))
    close(mixed, (outs[0][:, order], outs[1]))
    rotated = make()
    assert not torch.allclose(rotated((image[:, order], text))[1], rotated((image, text))[1], atol=1e-4)


def test_the_order_of_modalities_means_nothing():
    attn, (image, text) = make(), tokens()
    swapped = awake(JointAttention(DIMS[1::-1], dim_head=8, heads=2))
    swapped.modalities[0], swapped.modalities[1] = attn.modalities[1], attn.modalities[0]
    close(swapped((text, image))[::-1], attn((image, text)))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batch_dimensions_are_free(batch):
    attn, inputs = make(), tokens(batch=batch)
    outs = attn(inputs)
    assert [out.shape for out in outs] == [x.shape for x in inputs]
    flat = attn(tuple(x.reshape(-1, *x.shape[-2:]) for x in inputs))
    close(tuple(out.reshape(x.shape) for out, x in zip(flat, inputs, strict=True)), outs)


def test_a_modality_that_is_only_attended_to_has_no_output_and_no_queries():
    full, less = make(), make(pre_only=(1,))
    state = full.state_dict()
    state["modalities.1.to_qkv.weight"] = state["modalities.1.to_qkv.weight"][16:]
    less.load_state_dict({name: state[name] for name in less.state_dict()})
    inputs = tokens()
    mask = (torch.rand(7, 7) < 0.5) | torch.eye(7, dtype=torch.bool)
    image, nothing = less(inputs, mask[:4])
    assert nothing is None
    close(image, full(inputs, mask)[0])
    assert less.modalities[1].q_norm is None


# rotary positions


def test_phases_restart_in_each_modality():
    image, text = joint_phases(None, tokens(), axes=1, dim_head=8)
    close(image.unflatten(0, (2, 4))[:, :3], text.unflatten(0, (2, 3)), atol=0)


@pytest.mark.parametrize("axes", [1, 2])
def test_rotations_keep_norms_and_depend_on_distances_alone(axes):
    attn, shift = make(qk_norm="rms", rope_axes=axes), 5.0
    inputs = tokens()
    positions = [torch.rand(x.shape[1], axes, dtype=torch.float64) * 9 for x in inputs]
    options = dict(axes=axes, dim_head=8)
    here, there = (
        attn(inputs, phases=joint_phases([p + by for p in positions], inputs, **options)) for by in (0.0, shift)
    )
    close(here, there)
    phases = joint_phases(positions, inputs, **options)[0]
    close(phases.square().sum(dim=-1), torch.ones(8, 4, dtype=torch.float64))


def test_axial_positions_are_those_of_the_definition():
    attn, inputs = make(rope_axes=2), tokens()
    grid = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).double()
    line = torch.stack((torch.arange(3), torch.zeros(3)), dim=-1).double()
    phases = joint_phases([(2, 2), None], inputs, axes=2, dim_head=8)
    close(attn(inputs, phases=phases), by_hand(attn, inputs, positions=[grid, line]))
    same = joint_phases([grid, line[:, :1]], inputs, axes=2, dim_head=8)
    close(same, phases)


def test_coordinates_may_differ_between_samples():
    attn, inputs = make(), tokens()
    own = torch.rand(2, 4, 1, dtype=torch.float64) * 5
    together = attn(inputs, phases=joint_phases([own, None], inputs, axes=1, dim_head=8))
    for i in range(2):
        alone = tuple(x[i] for x in inputs)
        close(
            attn(alone, phases=joint_phases([own[i], None], alone, axes=1, dim_head=8)), tuple(x[i] for x in together)
        )


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim_modalities=()), "dim_modalities is empty: there must be at least one modality"),
        (dict(dim_modalities=(4, 0)), "the width of modality 1 must be positive, got 0"),
        (dict(heads=0), "heads must be positive, got 0"),
        (dict(dim_head=0), "dim_head must be positive, got 0"),
        (dict(dim_head=7), "dim_head must be a multiple of 2, so that each of 1 rotary axes"),
        (dict(dim_head=6, rope_axes=2), "dim_head must be a multiple of 4, so that each of 2 rotary axes"),
        (dict(pre_only=(-1,)), "pre_only: expected numbers from 0 to 2, got -1"),
        (dict(pre_only=(3,)), "pre_only: expected numbers from 0 to 2, got 3"),
        (dict(rope_axes=-1), r"rope_axes must be 0 \(no rotary positions\) or the number of axes, got -1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JointAttention(**(dict(dim_modalities=DIMS) | options))


def test_arguments_of_wrong_kinds_are_refused():
    with refused(ValueError, "qk_norm must be one of rms, layer, none, got 'l2'", is_type=True):
        JointAttention(DIMS, qk_norm="l2")
    with refused(TypeError, "dim_modalities must be a tuple with the width of each modality, got 12", is_type=True):
        JointAttention(12)


IMAGE, TEXT = randn(2, 4, 12), randn(2, 3, 8)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IMAGE,), r"modality_tokens: expected 2 modalities of widths \(12, 8\), got 1"),
        ((IMAGE, TEXT, TEXT), "expected 2 modalities .* got 3"),
        ((IMAGE, randn(2, 3, 9)), r"modality 1: expected tokens of shape \(\*batch, tokens, 8\), got \(2, 3, 9\)"),
        ((randn(12), TEXT), r"modality 0: expected tokens of shape \(\*batch, tokens, 12\), got \(12,\)"),
        ((IMAGE, randn(3, 3, 8)), r"modality 1: expected the batch dimensions \(2,\) of modality 0, got \(3,\)"),
        ((IMAGE, randn(2, 0, 8)), r"modality 1: expected at least one token and sample, got \(2, 0, 8\)"),
    ],
)
def test_wrong_tokens_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message):
        make().float()(inputs)


def test_tokens_of_wrong_kinds_are_refused_by_name():
    with pytest.raises(TypeError, match=r"modality 1: expected a floating point tensor .* got torch\.int64"):
        make().float()((IMAGE, torch.zeros(2, 3, 8, dtype=torch.long)))
    with refused(
        TypeError, "modality_tokens must be a tuple with an entry for each modality, got Tensor", is_type=True
    ):
        make().float()(IMAGE)
    with pytest.raises(TypeError, match=r"modality 1: expected tokens of torch\.float32, as the weights are, got .*64"):
        make().float()((IMAGE, TEXT.double()))


@pytest.mark.parametrize("shape", [(7, 6), (6, 6), (3, 7, 7), (1, 1, 7, 7), (7,)])
def test_masks_of_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape \(7, 7\) or \(2, 7, 7\)"):
        make().float()((IMAGE, TEXT), torch.ones(shape, dtype=torch.bool))


def test_masks_of_numbers_are_refused():
    with pytest.raises(TypeError, match="attention_mask must be bool, True where a query may attend to a key, got"):
        make().float()((IMAGE, TEXT), torch.ones(7, 7))
