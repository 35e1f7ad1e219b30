"""Inside of `plain_formulas()` the network can be differentiated in every way that PyTorch knows, and is the same."""

from contextlib import suppress

import pytest
import torch
from network_streams import perturb, stream
from torch.func import functional_call, jvp, vmap

from transfusion_pytorch.network.attend import DenseAttention, plan_attention
from transfusion_pytorch.network.shortcuts import forces_plain_formulas, plain_formulas
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.training.cross_entropy import cross_entropy_per_target, summed_cross_entropy

DIM = 8
EVERYTHING = dict(
    kv_heads=1,
    attn_laser=True,
    use_value_residual=True,
    num_residual_streams=2,
    attn_kwargs=dict(softcap_value=5.0),
    ff_kwargs=dict(activation="swiglu"),
    use_checkpoint="selective",
)
OPTIONS = {"default": dict(), "bare": dict(qk_rmsnorm=False, unet_skips=False), "everything": EVERYTHING}
STREAMS = {"mixed": ("ttAAtB", "Ct", "t"), "text": ("ttt", "t"), "spans": ("AA", "BB")}


def make(**options) -> Transformer:
    torch.manual_seed(0)
    return perturb(Transformer(DIM, depth=2, heads=2, dim_head=4, **options)).double()


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def model(request):
    return make(**request.param)


@pytest.fixture(params=STREAMS.values(), ids=STREAMS)
def case(request):
    """Tokens, conditions of spans, and the function of both."""
    made = stream(*request.param)
    x, condition = (torch.randn(size, DIM, dtype=torch.float64) for size in (len(made.span), int(made.span.max()) + 1))
    arguments = made.arguments()

    def run(model, x, condition, parameters=None):
        conditioning = made.conditioning(condition) if len(condition) else None
        if request.param == STREAMS["spans"]:
            conditioning = conditioning._replace(modulation_index=None)
        every = (model, parameters or dict(model.named_parameters()))
        return functional_call(*every, (x,), arguments | dict(conditioning=conditioning)).square().sum()

    return x, condition, run


def test_torch_func_grad_is_the_gradient(model, case):
    x, condition, run = case
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with plain_formulas():
        ours = torch.func.grad(lambda x, c, parameters: run(model, x, c, parameters), argnums=(0, 1, 2))(
            x, condition, parameters
        )
    leaves = x.clone().requires_grad_(), condition.clone().requires_grad_()
    loss = run(model, *leaves)
    theirs = torch.autograd.grad(loss, [*leaves, *model.parameters()], materialize_grads=True)
    torch.testing.assert_close([*ours[:2], *ours[2].values()], list(theirs), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch does itself
def test_forward_mode_is_the_derivative_along_a_direction(model, case):
    x, condition, run = case
    along = torch.randn_like(x), torch.randn_like(condition)
    with plain_formulas():
        value, slope = jvp(lambda *inputs: run(model, *inputs), (x, condition), along)
    leaves = x.clone().requires_grad_(), condition.clone().requires_grad_()
    loss = run(model, *leaves)
    torch.testing.assert_close(value, loss.detach(), rtol=0, atol=1e-9)
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, along, strict=True))
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


def test_gradients_have_gradients(model, case):
    """Those of finite differences, of the gradient along one direction."""
    x, condition, run = case
    along = torch.randn_like(x)
    parameter = model.layers[1].attn.to_qkv.weight

    def slope(x):
        leaf = x.clone().requires_grad_() if not x.requires_grad else x
        with plain_formulas():
            (gradient,) = torch.autograd.grad(run(model, leaf, condition), leaf, create_graph=True)
        return (gradient * along).sum()

    leaf = x.clone().requires_grad_()
    of_x, of_parameter = torch.autograd.grad(slope(leaf), (leaf, parameter))
    step, direction = 1e-6, torch.randn_like(x)
    difference = (slope(x + step * direction) - slope(x - step * direction)) / (2 * step)
    torch.testing.assert_close((of_x * direction).sum(), difference.detach(), rtol=1e-4, atol=1e-4)
    assert of_parameter.abs().sum() > 0


def test_each_sample_may_have_its_own_gradient():
    """As for influence functions and private training."""
    model, made = make(), stream("tAAt")
    x, condition = torch.randn(3, 4, DIM, dtype=torch.float64), torch.randn(3, 1, DIM, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x, condition):
        return functional_call(model, parameters, (x,), made.arguments(condition)).square().sum()

    with plain_formulas():
        together = vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, condition)
        for i in range(3):
            alone = torch.func.grad(loss)(parameters, x[i], condition[i])
            for name, gradient in alone.items():
                torch.testing.assert_close(together[name][i], gradient, rtol=0, atol=1e-9)


def test_cross_entropy_has_second_derivatives():
    x, labels = torch.randn(9, DIM, dtype=torch.float64, requires_grad=True), torch.arange(9) % 5
    to_logits, weights = torch.nn.Linear(DIM, 5, bias=False).double(), torch.rand(9, dtype=torch.float64)
    with plain_formulas():
        for loss in (
            lambda x: summed_cross_entropy(x, to_logits, labels, weights, chunk=1),
            lambda x: cross_entropy_per_target(x, to_logits, labels, chunk=1).sum(),
        ):
            assert torch.autograd.gradgradcheck(loss, (x,))
            assert torch.func.grad(loss)(x.detach()).shape == x.shape


def test_the_switch_is_undone_and_belongs_to_its_caller():
    layout = stream("tt").layout
    with suppress(KeyError), plain_formulas():
        assert isinstance(plan_attention(layout), DenseAttention)
        raise KeyError
    assert not forces_plain_formulas()
    assert not isinstance(plan_attention(layout), DenseAttention)
