"""Inside of `plain_formulas()`, `model(batch)` has derivatives of any order, forward mode and per-sample gradients."""

import pytest
import torch
from tiny import awake, ragged_batch, tiny
from torch.func import functional_call, grad, jacrev, jvp

from transfusion_pytorch import plain_formulas

EXACT = dict(rtol=1e-9, atol=1e-11)


@pytest.fixture
def loss():
    """A loss as a function of the parameters, the parameters, and everything else that it needs."""
    model = awake(tiny())
    batch = model.packer()(ragged_batch(), times=0.5)
    noise = {kind: torch.randn(data.latents.shape).double() for kind, data in batch.data.items()}

    def of(parameters, **options):
        return functional_call(model, parameters, (batch,), dict(noise=noise, **options))

    return of, dict(model.named_parameters())


def test_functional_gradients_are_those_of_backward(loss):
    of, parameters = loss
    with plain_formulas():
        gradients = grad(of)(parameters)
    expected = torch.autograd.grad(of(parameters), list(parameters.values()), materialize_grads=True)
    for made, other in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(made, other, **EXACT)


# torch compiles its own formulas of forward mode with what it deprecates
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_is_the_directional_derivative(loss):
    of, parameters = loss
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    with plain_formulas():
        value, derivative = jvp(of, (parameters,), (direction,))
        gradients = grad(of)(parameters)
    torch.testing.assert_close(value, of(parameters), **EXACT)
    along = sum((gradients[name] * direction[name]).sum() for name in parameters)
    torch.testing.assert_close(derivative, along, **EXACT)


def test_a_gradient_has_a_gradient(loss):
    """The product of the Hessian with a direction, against differences of gradients."""
    of, parameters = loss
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    with plain_formulas():
        gradients = torch.autograd.grad(of(parameters), list(parameters.values()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
        products = torch.autograd.grad(along, list(parameters.values()))
        ahead, behind = (
            grad(of)({name: (p + step * direction[name]).detach() for name, p in parameters.items()})
            for step in (1e-6, -1e-6)
        )
    for name, product in zip(parameters, products, strict=True):
        difference = (ahead[name] - behind[name]) / 2e-6
        torch.testing.assert_close(product, difference, rtol=1e-4, atol=1e-5 * float(1 + product.abs().max()))


def test_gradients_of_every_sample(loss):
    of, parameters = loss
    with plain_formulas():
        rows = jacrev(lambda values: of(values, reduction="none").total)(parameters)
    for sample in range(4):
        total = of(parameters, reduction="none").total[sample]
        expected = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
        for made, other in zip(rows.values(), expected, strict=True):
            torch.testing.assert_close(made[sample], other, **EXACT)
