"""Layers whose products are made in single precision where a processor has none of the lower ones."""

import platform

import pytest
import torch
import torch.nn.functional as F
from network_streams import STREAMS, projections, stream
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_pytorch.network.attend import plan_attention
from transfusion_pytorch.network.cpu import products
from transfusion_pytorch.network.cpu.products import FEW_ROWS, emulated, types_without_products
from transfusion_pytorch.network.layer import FeedForward
from transfusion_pytorch.network.linear import Conv1d, Conv2d, Conv3d, Linear
from transfusion_pytorch.network.shortcuts import plain_formulas

LOW = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", LOW)
each_bias = pytest.mark.parametrize("bias", [True, False])


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def processor(request, monkeypatch):
    """With or without products of low precision, whichever this one has."""
    monkeypatch.setattr(products, "EMULATED", LOW if request.param else ())
    return request.param


def results(function, x, parameters, grad, autocast=None):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = function(x)
    return out.detach(), *torch.autograd.grad(out, [x, *parameters], grad.to(out.dtype))


def assert_as_precise_as(dtype, ours, exact):
    for part, expected in zip(ours, exact, strict=True):
        assert (part.double() - expected.double()).norm() <= 4 * torch.finfo(dtype).eps * expected.double().norm()


@each_dtype
@each_bias
@pytest.mark.parametrize("rows", [(FEW_ROWS,), (FEW_ROWS - 1,), (2, 3, 7), (), (0,)], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_a_linear_layer_is_as_precise_as_its_type(rows, bias, dtype, autocast, processor):
    layer, x = Linear(24, 40, bias=bias), torch.randn(*rows, 24, requires_grad=True)
    grad = torch.randn(*rows, 40).to(dtype)
    exact = results(layer, x, layer.parameters(), grad.float())
    if not autocast:
        layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    ours = results(layer, x, layer.parameters(), grad, dtype if autocast else None)
    stored = torch.float32 if autocast else dtype
    assert [part.dtype for part in ours] == [dtype] + [stored] * (len(ours) - 1)
    assert_as_precise_as(dtype, ours, exact)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class WatchProducts(TorchDispatchMode):
    """Notes the types of all that is multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            self.seen.extend(part.dtype for part in args)
        return function(*args, **(kwargs or {}))


def behind_activation(layer):
    """A feedforward without its first layer."""
    ff = FeedForward(layer.in_features)
    ff.to_out = layer
    return ff._contract


@each_dtype
@pytest.mark.parametrize("backward_under_autocast", [False, True])
@pytest.mark.parametrize("name", ["layer", "behind an activation"])
def test_products_are_of_single_precision_only_where_the_low_one_is_emulated(
    name, backward_under_autocast, dtype, processor
):
    layer, x = Linear(8, 8), torch.randn(FEW_ROWS, 8, requires_grad=True)
    function = {
        "layer": layer,
        "behind an activation": lambda x: behind_activation(layer)(torch.cat((x, x), dim=1)),
    }[name]
    with WatchProducts() as watch:
        with torch.autocast("cpu", dtype):
            loss = function(x).sum()
        with torch.autocast("cpu", dtype, enabled=backward_under_autocast):
            loss.backward()
    assert len(watch.seen) == 3 + 2 * 2
    assert set(watch.seen) == {torch.float32 if processor else dtype}


@each_dtype
def test_plain_formulas_leave_products_to_torch(dtype, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", LOW)
    layer, x = Linear(8, 8), torch.randn(FEW_ROWS, 8, requires_grad=True)
    with WatchProducts() as watch, plain_formulas(), torch.autocast("cpu", dtype):
        layer(x)
    assert set(watch.seen) == {dtype}


def test_other_types_and_autocast_of_double_are_left_alone(processor):
    layer, x = Linear(8, 8).double(), torch.randn(FEW_ROWS, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@each_dtype
@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_low_precision_is_kept_and_only_for_a_weight_that_learns(frozen, dtype, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", LOW)
    layer, x, kept = Linear(32, 32), torch.randn(64, 32, requires_grad=True), []
    layer.weight.requires_grad_(not frozen)
    pack = lambda part: kept.append(part) or part  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part), torch.autocast("cpu", dtype):
        layer(x)
    kept = [part for part in kept if part.data_ptr() != layer.weight.data_ptr()]
    assert [(part.dtype, part.shape) for part in kept] == ([] if frozen else [(dtype, x.shape)])


@each_dtype
@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_each_gradient_is_the_same_where_no_other_is_wanted(wanted, dtype, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", LOW)
    layer, x = Linear(8, 8), torch.randn(FEW_ROWS, 8, requires_grad=True)
    leaves = [x, layer.weight, layer.bias]
    gradients = []
    for only in (False, True):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(not only or i == wanted)
        with torch.autocast("cpu", dtype):
            out = layer(x)
        gradients.append(torch.autograd.grad(out.float().square().sum(), leaves[wanted])[0])
    assert torch.equal(*gradients)


@each_dtype
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_convolution_under_autocast(axes, dtype, processor):
    layer = (Conv1d, Conv2d, Conv3d)[axes - 1](4, 8, 3, stride=2, padding=1)
    x, grad = torch.randn(2, 4, *[6] * axes, requires_grad=True), torch.randn(2, 8, *[3] * axes).to(dtype)
    exact = results(layer, x, layer.parameters(), grad.float())
    ours = results(layer, x, layer.parameters(), grad, dtype)
    assert [part.dtype for part in ours] == [dtype] + [torch.float32] * 3
    assert_as_precise_as(dtype, ours, exact)


@each_dtype
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_as_precise_as_its_type(dtype, softcap, processor):
    layout = stream(*STREAMS["ragged"]).layout
    inputs = projections(len(layout.end), kv_heads=4, dtype=dtype, requires_grad=True)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs]
    grad = torch.randn(inputs[0].shape).to(dtype)
    plan = plan_attention(layout)
    ours, exact = (
        results(lambda q, parts=parts: plan.attend(q, *parts[1:], softcap=softcap), parts[0], parts[1:], grad)
        for parts in (inputs, wide)
    )
    assert {part.dtype for part in ours} == {dtype}
    assert_as_precise_as(dtype, ours, exact)


def test_layers_are_those_of_torch_in_states_and_types():
    for ours, theirs in ((Linear(3, 5), nn.Linear(3, 5)), (Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3))):
        assert isinstance(ours, type(theirs))
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 4, 4) if theirs.weight.ndim == 4 else torch.randn(2, 3)
        assert torch.equal(ours(x), theirs(x))


@each_dtype
def test_other_types_and_devices_are_never_emulated(dtype, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", LOW)
    assert emulated(dtype, "cpu")
    assert not emulated(dtype, "cuda")
    assert not emulated(torch.float32, "cpu")
    assert types_without_products() <= set(LOW)


@pytest.mark.parametrize(
    ("machine", "library", "supported", "expected"),
    [
        ("x86_64", True, True, set()),
        ("AMD64", True, False, set(LOW)),
        ("x86_64", False, True, set(LOW)),
        ("arm64", False, False, set()),
    ],
)
def test_processors_are_asked_and_those_of_other_makes_left_to_torch(
    machine, library, supported, expected, monkeypatch
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported)
    assert types_without_products() == expected


def test_layers_run_on_meta_tensors():
    """Which know no autocast."""
    layer = Linear(3, 5, device="meta")
    assert layer(torch.empty(20, 3, device="meta")).shape == (20, 5)
    assert behind_activation(layer)(torch.empty(20, 6, device="meta")).shape == (20, 5)
