"""Attention as compiled graphs call it: runs as tensors, and operators that read them."""

import pytest
import torch
from network_streams import STREAMS, assert_same_runs, projections, stream

from transfusion_pytorch.network.attend import attend, plan_attention
from transfusion_pytorch.network.cache import KVCache

operators = torch.ops.transfusion_pytorch
each_stream = pytest.mark.parametrize("samples", STREAMS.values(), ids=STREAMS)
each_softcap = pytest.mark.parametrize("softcap", [None, 3.0])
each_head = pytest.mark.parametrize("kv_heads", [4, 2])


@each_stream
def test_runs_come_back_from_their_tensors(samples):
    layout = stream(*samples).layout
    table = plan_attention(layout, compiled=True).table
    assert_same_runs(table.runs(), layout.runs)
    assert table.numbers.device.type == "cpu", "or reading them would wait for a device"


@each_head
@each_softcap
@each_stream
def test_operators_are_eager_attention_forward_and_backward(samples, softcap, kv_heads):
    layout = stream(*samples).layout
    inputs = projections(len(layout.end), kv_heads=kv_heads, requires_grad=True)
    outs = [attend(*inputs, plan_attention(layout, compiled=flag), softcap=softcap) for flag in (True, False)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    weight = torch.randn_like(outs[0])
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in outs]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# what torch asks of an operator: nothing changed or shared that it does not declare, shapes and strides foretold


def check(operator, *args):
    assert set(torch.library.opcheck(operator, args).values()) == {"SUCCESS"}


def heads_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@each_softcap
@pytest.mark.parametrize("arrange", [torch.clone, heads_first])
def test_attend_and_its_backward_are_proper_operators(arrange, softcap):
    layout = stream(*STREAMS["ragged"]).layout
    table = plan_attention(layout, compiled=True).table
    inputs = [arrange(x) for x in projections(len(layout.end))]
    check(operators.attend.default, *(x.requires_grad_() for x in inputs), *table, softcap)
    inputs = [x.detach() for x in inputs]
    made = operators.attend(*inputs, *table, softcap)
    check(operators.attend_backward.default, torch.randn_like(made[0]), *inputs, *made, *table, softcap)


@each_softcap
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0], [4, 0, 3]])
def test_attend_cached_is_a_proper_operator(rows, dtype, softcap):
    cpu = torch.device("cpu")
    cache = KVCache(layers=1, rows=5, kv_heads=2, dim_head=6, device=cpu, dtype=dtype, slots=12)
    cache.commit(rows, [2, 0, 1])
    layout = stream("ttAAA", "tAA", "tBBB", start=[2, 0, 1]).layout
    plan = plan_attention(layout, cache.view(rows, layout), compiled=True)
    places = plan.cached.keys[0], plan.cached.values[0], plan.cached.row_of, plan.cached.slot_of
    check(operators.attend_cached.default, *projections(len(layout.end), kv_heads=2), *places, *plan.table, softcap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sum_rows_is_a_proper_operator(dtype):
    check(operators.sum_rows.default, torch.randn(5, 3).to(dtype), torch.tensor([2, 0, 2, 1, 0]), 4)
