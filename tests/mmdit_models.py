"""Small multimodal transformers that are past their zero initialisation, and who sees whom in them."""

import pytest
import torch
from checks import TYPECHECK
from torch import Tensor, nn, randn

from transfusion_pytorch import InContextMMDiT, MMDiT

DIMS = (12, 8, 16)  # widths of three modalities
OUTS = (3, 5, 4)
LENGTHS = (4, 3, 5)
SIZES = dict(dim_head=8, heads=2, ff_mult=2)


def awake(module: nn.Module, std: float = 0.3) -> nn.Module:
    """With all parameters drawn, also those that start at zero, in double precision."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double()


def mmdit(count: int = 2, *, depth: int = 2, **options) -> MMDiT:
    defaults = dict(dim_modalities=DIMS[:count], dim_outs=OUTS[:count], dim_cond=16, timestep_embed_dim=8) | SIZES
    return awake(MMDiT(depth=depth, **(defaults | options)))


def in_context(count: int = 2, *, depth: int = 2, **options) -> InContextMMDiT:
    defaults = dict(dim_modalities=DIMS[:count], dim_outs=OUTS[:count]) | SIZES
    return awake(InContextMMDiT(depth=depth, **(defaults | options)))


def tokens(
    count: int = 2, *, batch=(2,), lengths=LENGTHS, dims=DIMS, requires_grad: bool = False
) -> tuple[Tensor, ...]:
    return tuple(
        randn(*batch, length, dim, dtype=torch.float64, requires_grad=requires_grad)
        for length, dim in zip(lengths[:count], dims[:count], strict=True)
    )


def influence(call, inputs: tuple[Tensor, ...]) -> Tensor:
    """Which tokens (columns) each token of the outputs (rows) depends on, by gradients; for all samples together.

    `call` maps the inputs `(b, s_i, d_i)` to outputs, of which some may be None.
    """
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    rows = []
    for out in call(inputs):
        for position in range(0 if out is None else out.shape[-2]):
            grads = torch.autograd.grad(
                out[..., position, :].square().sum(), inputs, retain_graph=True, allow_unused=True
            )
            touched = [
                torch.zeros(x.shape[-2], dtype=torch.bool)
                if grad is None
                else grad.ne(0).any(dim=-1).flatten(0, -2).any(0)
                for x, grad in zip(inputs, grads, strict=True)
            ]
            rows.append(torch.cat(touched))
    return torch.stack(rows)


def reachable(mask: Tensor, depth: int) -> Tensor:
    """What tokens see through several blocks: their own residual stream, and what the mask lets them attend to."""
    step = mask | torch.eye(len(mask), dtype=torch.bool)
    reach = step
    for _ in range(depth - 1):
        reach = (reach.float() @ step.float()) > 0
    return reach


def refused(kind: type[Exception], message: str, *, is_type: bool = False):
    """This error with this message, or where it is about a type that of the checker, which is faster."""
    return pytest.raises(TypeError) if TYPECHECK and is_type else pytest.raises(kind, match=message)
