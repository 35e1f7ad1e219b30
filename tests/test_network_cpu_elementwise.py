"""Gradients written by hand against finite differences, and against what autograd makes of the plain formulas."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from transfusion_pytorch.network.cpu import elementwise, products
from transfusion_pytorch.network.layer import Attention, FeedForward
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import IndexedModulation, RMSModulation
from transfusion_pytorch.network.shortcuts import plain_formulas
from transfusion_pytorch.sequence.positions import rotary_phases

ROW = torch.tensor([2, 0, 2, 4, 0, 2, 4])  # in no order; there are rows 1 and 3 that no token has
N, D, ROWS = len(ROW), 6, 5
POSITION = torch.tensor([0, 1, 2, 2, 2, 3, 90])


def modulated_norm(x, scale, shift, index):
    return IndexedModulation(scale, shift, None, index).normed(x)


def gated_add(x, out, gate, index):
    return IndexedModulation(gate, gate, gate, index).add_gated(x, out)


def gated_activation(hidden, activation):
    return FeedForward(D, activation=activation)._activate(hidden)


def modulate(x, scale, shift):
    return modulated_norm(x, scale, shift, ROW)


def add(x, out, gate):
    return gated_add(x, out, gate, ROW)


def norm_four_heads(qkv, of_queries, of_keys):
    attn = Attention(D, heads=4, kv_heads=(qkv.shape[1] - 4) // 2, dim_head=D)
    attn.q_norm._parameters["weight"], attn.k_norm._parameters["weight"] = of_queries, of_keys
    return attn._rotated(qkv, rotary_phases(POSITION, D, dtype=qkv.dtype))


def rotate_four_heads(qkv):
    attn = Attention(D, heads=4, kv_heads=(qkv.shape[1] - 4) // 2, dim_head=D, qk_rmsnorm=False)
    return attn._rotated(qkv, rotary_phases(POSITION, D, dtype=qkv.dtype))


def gained_norm(x, gain):
    return RMSModulation(gain, 1e-5).normed(x)


def gated_linear(hidden, activation, layer):
    """A feedforward without its first layer."""
    ff = FeedForward(D, activation=activation)
    ff.to_out = layer
    return ff._contract(hidden)


def activated_layer(hidden, weight, bias=None):
    layer = Linear(D, 3)
    layer._parameters.update(weight=weight, bias=bias)  # which gradients reach, whatever they are
    return gated_linear(hidden, "swiglu", layer)


# each function of its inputs, and their sizes
CASES = {
    "geglu": (lambda hidden: gated_activation(hidden, "geglu"), [(N, 2 * D)]),
    "swiglu": (lambda hidden: gated_activation(hidden, "swiglu"), [(N, 2 * D)]),
    "activated layer": (activated_layer, [(N, 2 * D), (3, D)]),
    "modulated norm": (modulate, [(N, D), (ROWS, D), (ROWS, D)]),
    "gained norm": (gained_norm, [(N, D), (D,)]),
    "gated add": (add, [(N, D), (N, D), (ROWS, D)]),
    "heads": (norm_four_heads, [(N, 12, D), (D,), (D,)]),
    "grouped heads": (norm_four_heads, [(N, 8, D), (D,), (D,)]),
    "rotated heads": (rotate_four_heads, [(N, 12, D)]),
    "rotated grouped heads": (rotate_four_heads, [(N, 8, D)]),
}
each_case = pytest.mark.parametrize(("function", "sizes"), CASES.values(), ids=CASES)


def draw(sizes, dtypes=torch.float64):
    """Leaves of these sizes, of one dtype or of one each."""
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes] * len(sizes)
    return [torch.randn(size).to(dtype).requires_grad_() for size, dtype in zip(sizes, dtypes, strict=True)]


def outputs(function, inputs) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return out if isinstance(out, tuple) else (out,)


def draw_gradients(outs) -> list[Tensor]:
    """The same for all that compute the same."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]


def results(function, inputs, grads=None) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of all leaves among the inputs, where `grads` are those of the outputs."""
    outs = outputs(function, inputs)
    leaves = [leaf for leaf in inputs if leaf.requires_grad]
    gradients = torch.autograd.grad(outs, leaves, draw_gradients(outs) if grads is None else grads)
    return [out.detach() for out in outs], list(gradients)


PATHS = {"by hand": nullcontext, "plain": plain_formulas}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@each_case
def test_gradients_are_those_of_finite_differences(function, sizes):
    assert torch.autograd.gradcheck(function, draw(sizes))


@each_case
def test_by_hand_is_the_plain_formula_forward_and_backward(function, sizes):
    inputs = draw(sizes)
    ours = results(function, inputs)
    with plain_formulas():
        theirs = results(function, inputs)
        steps = outputs(function, inputs)[0].grad_fn.name()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert outputs(function, inputs)[0].grad_fn.name() != steps, "compared with itself"


@each_case
def test_each_gradient_is_the_same_where_no_other_is_wanted(function, sizes):
    inputs = draw(sizes)
    _, expected = results(function, inputs)
    for i, gradient in enumerate(expected):
        others_frozen = [leaf if leaf is inputs[i] else leaf.detach() for leaf in inputs]
        _, (alone,) = results(function, others_frozen)
        assert torch.equal(alone, gradient)


@each_path
@pytest.mark.parametrize("name", ["modulated norm", "gated add"])
def test_rows_that_no_token_has_learn_nothing(name, path):
    function, sizes = CASES[name]
    with path():
        _, gradients = results(function, draw(sizes))
    for gradient, size in zip(gradients, sizes, strict=True):
        if size[0] == ROWS:
            assert gradient.any(dim=1).tolist() == [True, False, True, False, True]


# precision


def assert_close_at_its_precision(ours: Tensor, exact: Tensor):
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(ours.dtype).eps


def check_precision(function, inputs, path):
    """Against double precision, which gets the same rounded inputs and gradients. Returns the dtypes of the outputs."""
    with path():
        outs, gradients = results(function, inputs)
    grads = [grad.double() for grad in draw_gradients(outs)]
    exact_outs, exact_gradients = results(function, [leaf.detach().double().requires_grad_() for leaf in inputs], grads)
    for ours, theirs in zip((*outs, *gradients), (*exact_outs, *exact_gradients), strict=True):
        assert_close_at_its_precision(ours, theirs)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in inputs]
    return {out.dtype for out in outs}


@each_path
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_is_kept_and_as_precise_as_it_can_be(function, sizes, dtype, path):
    assert check_precision(function, draw(sizes, dtype), path) == {dtype}


AUTOCAST = {
    "geglu": ([torch.bfloat16], torch.bfloat16),
    "modulated norm": ([torch.float32, torch.bfloat16, torch.bfloat16], torch.float32),
    "gained norm": ([torch.float32, torch.float32], torch.float32),
    "gated add": ([torch.float32, torch.bfloat16, torch.bfloat16], torch.float32),
    "grouped heads": ([torch.bfloat16, torch.float32, torch.float32], torch.bfloat16),
}


@each_path
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", AUTOCAST)
def test_residuals_stay_in_single_precision_beside_what_autocast_rounds(name, autocast, path):
    (function, sizes), (dtypes, expected) = CASES[name], AUTOCAST[name]
    if autocast and name in ("modulated norm", "gained norm"):  # what a product is made of is rounded, once
        expected = torch.bfloat16

    def function_under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and inputs[0].dtype != torch.float64):
            return function(*inputs)

    assert check_precision(function_under_autocast, draw(sizes, dtypes), path) == {expected}


@each_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_row_add_up_in_single_precision_at_least(dtype, path):
    """4,096 ones: added one by one, halves would stay at 2,048, and bfloat16 at 256."""
    n = 4096
    row, ones = torch.zeros(n, dtype=torch.long), torch.ones(n, 2, dtype=dtype)
    x = torch.tensor([-1.0, 1.0], dtype=dtype).expand(n, 2)
    scale, shift, gate = (torch.zeros(1, 2, dtype=dtype, requires_grad=True) for _ in range(3))
    with path():
        outs = modulated_norm(x, scale, shift, row), gated_add(ones, ones, gate, row)
    gradients = torch.autograd.grad(outs, (scale, shift, gate), (ones, ones))
    expected = ([-n, n], [n, n], [n, n])
    assert [gradient[0].tolist() for gradient in gradients] == list(expected)


# memory


def spaced(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


def columns_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def part_of_more(x: Tensor) -> Tensor:
    return torch.cat((torch.full_like(x, torch.nan), x), dim=1)[:, x.shape[1] :]


@each_case
@pytest.mark.parametrize("arrange", [spaced, columns_first, part_of_more])
def test_inputs_may_lie_in_memory_as_they_like(function, sizes, arrange):
    inputs = draw(sizes)
    arranged = [(arrange if leaf.ndim > 1 else spaced)(leaf.detach()).requires_grad_() for leaf in inputs]
    assert not any(leaf.is_contiguous() for leaf in arranged)
    torch.testing.assert_close(results(function, arranged), results(function, inputs), rtol=0, atol=1e-12)


@each_case
@pytest.mark.parametrize("arrange", [spaced, columns_first, part_of_more, lambda x: x[:1, :1].expand_as(x)])
def test_gradients_may_lie_in_memory_as_they_like(function, sizes, arrange):
    inputs = draw(sizes)
    arranged = [arrange(torch.randn_like(out)) for out in outputs(function, inputs)]
    assert not any(grad.is_contiguous() for grad in arranged)
    expected = results(function, inputs, [grad.contiguous() for grad in arranged])
    torch.testing.assert_close(results(function, inputs, arranged), expected, rtol=0, atol=1e-12)


def kept(function, inputs) -> list[Tensor]:
    """What is kept for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function(*inputs)
    return saved


@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_a_gated_activation_keeps_its_input_only(activation):
    hidden = torch.randn(N, 2 * D, requires_grad=True)
    saved = kept(lambda hidden: gated_activation(hidden, activation), [hidden])
    assert [tensor.data_ptr() for tensor in saved] == [hidden.data_ptr()]
    assert sum(tensor.nbytes for tensor in saved) == hidden.nbytes


@pytest.mark.parametrize(
    ("name", "expected"), [("modulated norm", 0), ("gated add", 1), ("heads", 0), ("grouped heads", 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_an_output_is_kept_but_one_of_the_inputs(name, expected, dtype):
    function, sizes = CASES[name]
    inputs = draw(sizes, dtype)
    size = min(out.numel() for out in outputs(function, inputs))
    large = [tensor.data_ptr() for tensor in kept(function, inputs) if tensor.numel() >= size]
    assert large == [inputs[expected].data_ptr()]


def test_values_are_not_copied():
    qkv, *gains = draw(CASES["grouped heads"][1])
    v = norm_four_heads(qkv, *gains)[2]
    assert v.data_ptr() == qkv[:, 6:].data_ptr()
    assert v.stride() == qkv.stride()


# a layer behind an activation


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_forward(layer):
    layer.forward = lambda x: Linear.forward(layer, x)


NOTICED = {
    "subclass": lambda layer: setattr(layer, "__class__", Doubled),
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward hook before": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "parametrized": lambda layer: register_parametrization(layer, "weight", nn.Identity()),
    "another forward": replace_forward,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", [None, *NOTICED.values()], ids=["plain", *NOTICED])
def test_a_layer_is_called_where_somebody_would_notice(change, bias):
    layer, hidden = Linear(D, 3, bias=bias).double(), draw([(N, 2 * D)])[0]
    if change is not None:
        change(layer)
    out, expected = gated_linear(hidden, "geglu", layer), layer(gated_activation(hidden, "geglu"))
    assert (out.grad_fn.name() == "GatedLinearBackward") == (change is None)
    leaves, grad = [hidden, *layer.parameters()], torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(made, leaves, grad) for made in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [True, False])
def test_a_layer_behind_an_activation_under_autocast(dtype, emulated, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", [dtype] if emulated else [])
    layer, hidden = Linear(D, 3), draw([(N, 2 * D)], dtype)[0]
    leaves = [hidden, *layer.parameters()]
    with torch.autocast("cpu", dtype):
        made = gated_linear(hidden, "geglu", layer), layer(gated_activation(hidden, "geglu"))
    assert {out.dtype for out in made} == {dtype}
    grad = torch.randn_like(made[0])
    ours, theirs = ((out, *torch.autograd.grad(out, leaves, grad)) for out in made)
    assert [part.dtype for part in ours] == [dtype, dtype, torch.float32, torch.float32]
    for part, expected in zip(ours, theirs, strict=True):
        assert (part - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


def test_a_layer_behind_an_activation_keeps_what_went_into_the_activation():
    layer, hidden = Linear(D, 3), draw([(N, 2 * D)], torch.float32)[0]
    saved = kept(lambda hidden: gated_linear(hidden, "geglu", layer), [hidden])
    assert {part.data_ptr() for part in saved} == {hidden.data_ptr(), layer.weight.data_ptr()}


def test_blocks_of_rows_are_the_whole(monkeypatch):
    function, sizes = CASES["activated layer"]
    inputs = draw(sizes)
    expected = results(function, inputs)
    monkeypatch.setattr(elementwise, "BLOCK", 2 * D * 3)  # three rows, three rows, and one
    torch.testing.assert_close(results(function, inputs), expected, rtol=0, atol=1e-12)
    monkeypatch.setattr(elementwise, "BLOCK", 1)
    torch.testing.assert_close(results(function, inputs), expected, rtol=0, atol=1e-12)
