"""Masks of every kind: padding, functions, flex attention, registers, and the context of an inference."""

import pytest
import torch
from mmdit_models import in_context, influence, mmdit, reachable, refused, tokens
from torch.nn.attention.flex_attention import create_block_mask

from transfusion_pytorch import plain_formulas
from transfusion_pytorch.mmdit import imitation_mask
from transfusion_pytorch.mmdit import masks as of_masks
from transfusion_pytorch.mmdit.masks import Layout, plan_masks, with_registers
from transfusion_pytorch.network import attend

T = torch.tensor([0.2, 0.7]).double()
KINDS = {"adaptive": (mmdit, (T,)), "in context": (in_context, ())}
both = pytest.mark.parametrize(("make", "time"), KINDS.values(), ids=KINDS)
REGISTERS = (2, 1)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def causal(b, h, query, key):
    return query >= key


def by_head(b, h, query, key):
    return (query >= key) | (h > 0)


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


# padding


@both
@pytest.mark.parametrize("registers", [0, REGISTERS])
def test_padding_changes_nothing_for_tokens(make, time, registers):
    model, inputs = make(num_registers=registers), tokens()
    padded = tuple(torch.cat((x, torch.full((2, 2, x.shape[-1]), torch.nan).double()), dim=1) for x in inputs)
    masks = [torch.tensor([[True] * x.shape[1] + [False] * 2] * 2) for x in inputs]
    expected = model(inputs, *time)
    close(tuple(out[:, :-2] for out in model(padded, *time, padding_masks=masks)), expected)
    one = model((padded[0], inputs[1]), *time, padding_masks=(masks[0], None))
    close((one[0][:, :-2], one[1]), expected)


@both
def test_padding_may_differ_between_samples(make, time):
    model, (image, text) = make(), tokens()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    together = model((image, text), *time, padding_masks=(None, mask))
    short = model((image[:1], text[:1, :2]), *(t[:1] for t in time))
    close((together[0][:1], together[1][:1, :2]), short)
    whole = model((image[1:], text[1:]), *(t[1:] for t in time))
    close(tuple(out[1:] for out in together), whole)


@both
def test_padding_and_a_mask_are_both_kept(make, time):
    model, inputs = make(depth=2), tokens()
    mask = (torch.rand(7, 7) < 0.4) | torch.eye(7, dtype=torch.bool)
    padding = [torch.tensor([True, False, True, True]), torch.tensor([True, True, False])]
    seen = influence(
        lambda given: model(given, *time, mask, padding_masks=[each.expand(2, -1) for each in padding]), inputs
    )
    is_token = torch.cat(padding)  # padding comes in as zeros, and does not even see itself
    assert torch.equal(seen, reachable(mask & is_token, 2) & is_token)


@both
def test_samples_that_are_all_padding_are_finite(make, time):
    model = make()
    nothing = [torch.zeros(x.shape[:2], dtype=torch.bool) for x in tokens()]
    outs = model(tokens(), *time, padding_masks=nothing)
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize(
    ("masks", "kind", "message"),
    [
        ((None,), ValueError, "padding_masks: expected one entry for each of 2 modalities in the call, got 1"),
        (
            (None, torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            r"padding mask of modality 1: .* \(2, 3\), got \(2, 4\)",
        ),
        ((torch.ones(2, 4), None), TypeError, "padding mask of modality 0 must be bool, True for tokens"),
        (([[True] * 4] * 2, None), TypeError, "padding mask of modality 0 must be bool, True for tokens, got list"),
        (torch.ones(2, 4), TypeError, "padding_masks must be a tuple with an entry for each modality, got Tensor"),
    ],
)
def test_wrong_padding_is_refused_by_name(masks, kind, message):
    with refused(kind, message, is_type=kind is TypeError):
        in_context()(tokens(), padding_masks=masks)


# functions, flex attention


@both
def test_a_function_is_the_mask_that_it_makes(make, time):
    model, inputs = make(), tokens()
    expected = model(inputs, *time, CAUSAL)
    close(model(inputs, *time, causal), expected)
    with plain_formulas():
        close(model(inputs, *time, causal), expected)


def test_a_function_may_differ_between_samples():
    model, inputs = in_context(), tokens()
    limits = torch.tensor([3, 7])
    mask = torch.arange(7)[None, None, :] < limits[:, None, None]
    outs = model(inputs, lambda b, h, query, key: key < limits[b])
    close(outs, model(inputs, mask.expand(2, 7, 7)))


@both
@pytest.mark.parametrize("registers", [0, REGISTERS])
@pytest.mark.parametrize("kind", ["none", "mask", "masks", "function", "padding", "all"])
@torch.no_grad()
def test_flex_attention_is_sdpa(make, time, registers, kind, monkeypatch):
    model = make(num_registers=registers, dim_head=16, dim_outs=(3, None)).float()
    inputs = tuple(x.float() for x in tokens())
    mask = (torch.rand(2, 7, 7) < 0.5) | torch.eye(7, dtype=torch.bool)
    padding = [torch.tensor([[True, False, True, True]] * 2), torch.tensor([[True] * 3, [True, False, False]])]
    given, options = {
        "none": ((), {}),
        "mask": ((mask[0],), {}),
        "masks": ((mask,), {}),
        "function": ((by_head,), {}),
        "padding": ((), dict(padding_masks=padding)),
        "all": ((by_head,), dict(padding_masks=padding)),
    }[kind]
    expected = model(inputs, *time, *given, **options)[0]
    made, real = [], of_masks.create_block_mask
    monkeypatch.setattr(of_masks, "create_block_mask", lambda *args, **more: made.append(1) or real(*args, **more))
    model.attention = "flex"
    close(model(inputs, *time, *given, **options)[0], expected, atol=1e-5)
    assert len(made) == (0 if kind == "none" else 2)  # the last block has fewer queries


@pytest.mark.parametrize(("function", "heads"), [(causal, 1), (by_head, 2)])
def test_block_tables_are_made_for_each_head_only_where_heads_differ(function, heads):
    """A table of the first head alone would hide from the second the blocks that the first does not see."""
    plan = plan_masks(function, None, layout((256,), (0,))._replace(has_output=(True,)), use_flex=True)
    assert plan.every.shape == (2, heads, 256, 256)
    assert (plan.every.to_dense().sum(dim=(2, 3))[0] == torch.tensor([3, 4][:heads])).all()


@torch.no_grad()
def test_a_block_mask_is_taken_as_it_is():
    model, inputs = in_context(dim_head=16).float(), tuple(x.float() for x in tokens())
    block_mask = create_block_mask(causal, None, None, 7, 7, device="cpu")
    close(model(inputs, block_mask), model(inputs, CAUSAL), atol=1e-5)
    dual = mmdit(dim_head=16, dual_attention_layers=(0,)).float()
    close(dual(inputs, 0.3, block_mask), dual(inputs, 0.3, CAUSAL), atol=1e-5)
    with pytest.raises(ValueError, match=r"attention_mask: expected a BlockMask of \(7, 7\), got \(8, 8\)"):
        model(inputs, create_block_mask(causal, None, None, 8, 8, device="cpu"))
    with pytest.raises(ValueError, match="a BlockMask covers all tokens, and knows neither registers nor padding"):
        in_context(num_registers=1).float()(inputs, block_mask)
    with pytest.raises(ValueError, match="a BlockMask of 1 or 2 samples and 1 or 2 heads, got 1 and 3"):
        model(inputs, create_block_mask(causal, None, 3, 7, 7, device="cpu"))


def test_flex_trains_through_sdpa_on_a_cpu_and_says_so_once():
    attend._say_flex_fallback.cache_clear()
    model, inputs = in_context(attention="flex"), tokens()
    with pytest.warns(UserWarning, match="torch has no backward of flex attention on this device") as said:
        outs = model(inputs, CAUSAL)
    assert len(said) == 1
    same = model(inputs, create_block_mask(causal, None, None, 7, 7, device="cpu"))
    model.attention = "sdpa"
    expected = model(inputs, CAUSAL)
    close(outs, expected)
    close(same, expected)


# registers


def layout(lengths=(2, 3), registers=REGISTERS):
    return Layout(2, 2, lengths, registers, (), (), (True, True), torch.device("cpu"))


def test_registers_are_seen_with_their_modality_and_see_what_all_of_it_sees():
    mask = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
        ]
    ).bool()
    # r r t t r t t t: 2 registers and 2 tokens, 1 register and 3 tokens
    assert with_registers(mask, layout()).int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


@both
def test_registers_carry_nothing_past_a_mask(make, time):
    model, mask = make(num_registers=REGISTERS, depth=3), torch.rand(7, 7) < 0.2
    seen = influence(lambda given: model(given, *time, mask), tokens())
    assert not (seen & ~reachable(mask, 3)).any()


@both
def test_registers_without_a_mask_are_those_of_a_mask_of_ones(make, time):
    model, inputs = make(num_registers=REGISTERS), tokens()
    close(model(inputs, *time), model(inputs, *time, torch.ones(7, 7, dtype=torch.bool)))


@both
def test_registers_change_the_output_and_not_its_shape(make, time):
    model, inputs = make(num_registers=REGISTERS), tokens()
    before = model(inputs, *time)
    assert [out.shape[:2] for out in before] == [x.shape[:2] for x in inputs]
    model.registers["1"].data.normal_()
    assert not torch.allclose(model(inputs, *time)[0], before[0], atol=1e-4)


def test_registers_do_not_move_positions():
    model, inputs = in_context(num_registers=(3, 0)), tokens()
    seen = []
    model.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["phases"]), with_kwargs=True
    )
    model(inputs)
    image, text = (phases.unflatten(0, (2, -1)) for phases in seen[0])
    close(image[:, 3:6], text, atol=0)
    close(image[:, :3], text[:, :1].expand(-1, 3, -1, -1), atol=0)


def test_registers_have_the_time_of_the_first_token():
    model, inputs = mmdit(num_registers=REGISTERS), tokens()
    close(model(inputs, torch.full((2, 7), 0.3, dtype=torch.float64)), model(inputs, 0.3))


# context


@both
@pytest.mark.parametrize("registers", [0, (2, 1, 1)])
@pytest.mark.parametrize("first", [1, 2])
def test_a_context_is_exact_where_observations_see_only_themselves(make, time, registers, first):
    model, inputs = make(3, num_registers=registers, dim_outs=(3, None, 4), depth=3), tokens(3)
    observed = sum(x.shape[1] for x in inputs[:first])
    mask = imitation_mask(observed, 12 - observed)
    fixed = (1.0,) if time else ()
    whole = torch.cat((torch.ones(2, observed), T[:, None].expand(-1, 12 - observed)), dim=1).double()
    expected = model(inputs, *([whole] if time else []), mask)
    context = model.encode_context(inputs[:first], *fixed)
    outs = model(inputs[first:], *time, mask[observed:], context=context)
    assert [out is None for out in outs] == [out is None for out in expected[first:]]
    close(outs[-1], expected[-1])
    assert not torch.allclose(outs[-1], model(inputs, *([whole] if time else []))[-1], atol=1e-4)


@both
def test_a_context_keeps_its_padding_and_masks(make, time):
    model, inputs = make(), tokens()
    fixed = (0.9,) if time else ()
    padding = torch.tensor([[True, True, False, True], [True, True, True, True]])
    mask = imitation_mask(4, 3)
    mask[1, 0] = False
    whole = torch.cat((torch.full((2, 4), 0.9), T[:, None].expand(-1, 3)), dim=1).double()
    expected = model(inputs, *([whole] if time else []), mask, padding_masks=(padding, None))[1]
    context = model.encode_context(inputs[:1], *fixed, mask[:4, :4], padding_masks=(padding,))
    (out,) = model(inputs[1:], *time, mask[4:], context=context)
    close(out, expected, atol=1e-7)
    (same,) = model(inputs[1:], *time, lambda b, h, query, key: key <= query + 4, context=context)
    close(same, out)


def test_a_context_has_positions_of_its_own():
    model, inputs = in_context(rope_axes=2), tokens()
    positions = ((2, 2), torch.rand(3, 2).double())
    mask = imitation_mask(4, 3)
    expected = model(inputs, mask, positions=positions)[1]
    context = model.encode_context(inputs[:1], positions=positions[:1])
    close(model(inputs[1:], mask[4:], positions=positions[1:], context=context)[0], expected)


def test_the_rest_is_all_that_is_computed():
    model, inputs = in_context(), tokens()
    context = model.encode_context(inputs[:1])
    calls = []
    for block in model.blocks:
        block.attn.modalities[0].register_forward_hook(lambda *args: calls.append(0))
        block.attn.modalities[1].register_forward_hook(lambda *args: calls.append(1))
    model(inputs[1:], context=context)
    assert calls == [1, 1]


@both
def test_a_context_is_checkpointed_and_reaches_hooks(make, time):
    model, inputs, calls = make(), tokens(), []
    model.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    gradients = []
    for _ in range(2):
        loss = model(inputs[1:], *time, context=model.encode_context(inputs[:1], *time))[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        model.gradient_checkpointing_enable()
    assert len(calls) == 2 + 4  # encoded and attended to; then each again in the backward pass
    close(*([grad for grad in each if grad is not None] for each in gradients), atol=0)


@torch.no_grad()
def test_flex_attention_sees_a_context_as_sdpa_does():
    model = in_context(dim_head=16, num_registers=REGISTERS).float()
    inputs = tuple(x.float() for x in tokens())
    context = model.encode_context(inputs[:1])
    mask = imitation_mask(4, 3)[4:]
    expected = model(inputs[1:], mask, context=context)
    model.attention = "flex"
    close(model(inputs[1:], mask, context=context), expected, atol=1e-5)


def test_wrong_contexts_are_refused():
    model, (image, text) = in_context(), tokens()
    context = model.encode_context((image,))
    with pytest.raises(ValueError, match=r"modality_tokens: expected 1 modalities of widths \(8,\), got 2"):
        model((image, text), context=context)
    with pytest.raises(ValueError, match=r"modality 1: expected .* \(\*batch, tokens, 8\), got \(2, 4, 12\)"):
        model((image,), context=context)
    with refused(TypeError, "modality_tokens must be a tuple with an entry for each modality", is_type=True):
        model.encode_context(image)
    both_positions = (None, torch.rand(3, 1).double())
    with pytest.raises(ValueError, match="positions: expected one entry for each of 1 modalities in the call, got 2"):
        model((text,), context=context, positions=both_positions)
    for wrong in ((), (image, text)):
        with pytest.raises(ValueError, match=f"a context has the first 1 to 1 modalities, got {len(wrong)}"):
            model.encode_context(wrong)
    with pytest.raises(ValueError, match=r"context: expected the batch dimensions \(1,\), got \(2,\)"):
        model((text[:1],), context=context)
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape \(3, 7\) or \(2, 3, 7\)"):
        model((text,), torch.ones(3, 3, dtype=torch.bool), context=context)
