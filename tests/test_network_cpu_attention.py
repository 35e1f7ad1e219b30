"""Attention over packed runs and its stand-ins: precision, layouts in memory, and what is kept."""

import pytest
import torch
from network_streams import STREAMS, naive_attention, projections, stream

from transfusion_pytorch.network.attend import plan_attention

RAGGED = stream(*STREAMS["ragged"]).layout
each_backend = pytest.mark.parametrize("kind", ["ragged", "dense"])
each_softcap = pytest.mark.parametrize("softcap", [None, 2.0])


def results(inputs, layout=RAGGED, *, grad=None, kind="ragged", softcap=None, naively=False):
    """The output, and the gradients of all leaves among the inputs."""
    if naively:
        out = naive_attention(*inputs, layout.prepare().intervals.dense(), softcap)
    else:
        out = plan_attention(layout, kind=kind).attend(*inputs, softcap=softcap)
    leaves = [leaf for leaf in inputs if leaf.requires_grad]
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) if grad is None else grad)


@each_backend
@each_softcap
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["text", "ragged", "long"])
def test_each_dtype_is_kept_and_as_precise_as_it_can_be(name, dtype, softcap, kind):
    layout = stream(*STREAMS[name]).layout
    inputs = projections(len(layout.end), kv_heads=2, dtype=dtype, requires_grad=True)
    exact_inputs = [leaf.detach().double().requires_grad_() for leaf in inputs]
    grad = torch.randn(inputs[0].shape).to(dtype)
    ours = results(inputs, layout, grad=grad, kind=kind, softcap=softcap)
    exact = results(exact_inputs, layout, grad=grad.double(), softcap=softcap, naively=True)
    assert {part.dtype for part in ours} == {dtype}
    for part, expected in zip(ours, exact, strict=True):
        assert (part.double() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


@each_backend
@each_softcap
@pytest.mark.parametrize("wanted", range(3), ids=["queries", "keys", "values"])
def test_each_gradient_is_the_same_where_no_other_is_wanted(wanted, softcap, kind):
    inputs = projections(len(RAGGED.end), kv_heads=2, requires_grad=True)
    expected = results(inputs, softcap=softcap, naively=True)[1 + wanted]
    alone = [leaf if i == wanted else leaf.detach() for i, leaf in enumerate(inputs)]
    _, gradient = results(alone, kind=kind, softcap=softcap)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


ARRANGEMENTS = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "some of more heads": lambda x: torch.cat((torch.full_like(x, torch.nan), x), dim=1)[:, x.shape[1] :],
    "every other channel": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0],
    "one for all": lambda x: x[:1, :1, :1].expand_as(x),
}


@each_backend
@each_softcap
@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_inputs_may_lie_in_memory_as_they_like(arrange, softcap, kind):
    inputs = [arrange(x).requires_grad_() for x in projections(len(RAGGED.end))]
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    ours = results(inputs, grad=grad, kind=kind, softcap=softcap)
    torch.testing.assert_close(ours, results(inputs, grad=grad, softcap=softcap, naively=True), rtol=0, atol=1e-10)


@each_backend
@each_softcap
@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_gradients_may_lie_in_memory_as_they_like(arrange, softcap, kind):
    inputs = projections(len(RAGGED.end), requires_grad=True)
    grad = arrange(torch.randn(inputs[0].shape, dtype=torch.float64))
    ours = results(inputs, grad=grad, kind=kind, softcap=softcap)
    torch.testing.assert_close(ours, results(inputs, grad=grad, softcap=softcap, naively=True), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_queries_keys_values_outputs_and_sums_are_kept(name, dtype):
    """However many runs and masks there are."""
    layout, saved = stream(*STREAMS[name]).layout, []
    inputs = projections(len(layout.end), dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = plan_attention(layout).attend(*inputs)
    *known, sums = saved
    assert [tensor.data_ptr() for tensor in known] == [tensor.data_ptr() for tensor in (*inputs, out)]
    assert sums.shape == out.shape[:2]
    assert sums.dtype == torch.float32
