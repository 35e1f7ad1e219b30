"""CPU only: elementwise work of a layer with gradients written by hand.

Between two matrix products a step of training is bound by memory. Autograd would keep every intermediate and write
every gradient of a slice into zeros of its own; these keep little but their inputs, take what they need from them once
more, and write each gradient where it belongs. They have no second derivatives. The plain formulas stand where these
are called: in `layer.py` and `norms.py`.

n tokens, m rows of a table, d model, f features, h query heads, k key/value heads, e channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.cpu.products import linear_gradients, product
from transfusion_pytorch.network.precision import LAYER_NORM_EPS, RMS_NORM_EPS, precise, working_dtype

ACTIVATIONS = {"geglu": (F.gelu, torch.ops.aten.gelu_backward), "swiglu": (F.silu, torch.ops.aten.silu_backward)}
BLOCK = 2**17  # numbers that are worked on at a time, so that they stay in a core's cache


class GatedActivation(torch.autograd.Function):
    """`value activate(gate)`, where `hidden = [value gate]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.activation = activation
        return gated(hidden, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        return gated_gradients(grad, hidden, ctx.activation), None


class GatedLinear(torch.autograd.Function):
    """A linear layer behind a gated activation, whose input is not kept but made again, which is cheap."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.activation, ctx.bias_dtype = activation, None if bias is None else bias.dtype
        return product(gated(hidden, activation).to(working_dtype(hidden)), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        wants_hidden, *wanted = ctx.needs_input_grad[:3]
        x = gated(hidden, ctx.activation) if wanted[0] else None
        grad_x, grad_weight, grad_bias = linear_gradients(grad, x, weight, ctx.bias_dtype, (wants_hidden, *wanted))
        del x
        grad_hidden = None if grad_x is None else gated_gradients(grad_x.to(hidden.dtype), hidden, ctx.activation)
        return grad_hidden, grad_weight, grad_bias, None


def gated(hidden: Tensor, activation: str) -> Tensor:
    activate, _ = ACTIVATIONS[activation]
    out = hidden.new_empty(len(hidden), hidden.shape[1] // 2)
    for part, out_part in blocks(hidden, out):
        value, gate = part.chunk(2, dim=-1)
        torch.mul(activate(gate.contiguous()), value, out=out_part)
    return out


def gated_gradients(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    activate, differentiate = ACTIVATIONS[activation]
    grad_hidden = torch.empty_like(hidden)
    for part, grad_part, into in blocks(hidden, grad, grad_hidden):
        value, gate = part.chunk(2, dim=-1)
        gate = gate.contiguous()  # activations of half rows take twice as long
        grad_value, grad_gate = into.chunk(2, dim=-1)
        torch.mul(grad_part, activate(gate), out=grad_value)
        grad_gate.copy_(differentiate(grad_part * value, gate))
    return grad_hidden


def blocks(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of each at a time that they stay in a processor's cache, and what is made of them is small."""
    rows = max(BLOCK // max(parts[0].shape[1:].numel(), 1), 1)
    return zip(*(part.split(rows) for part in parts), strict=True)


class ModulatedNorm(torch.autograd.Function):
    """`norm(x) scale[index] + shift[index]`, with a layer norm, in the type that the product behind it takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        out, moments = x.new_empty(x.shape, dtype=dtype), []
        for part, rows, into in blocks(x, index, out):
            normed, *of_part = torch.native_layer_norm(part, part.shape[-1:], None, None, LAYER_NORM_EPS)
            moments.append(of_part)
            into.copy_(torch.addcmul(shift.index_select(0, rows), normed, scale.index_select(0, rows)))
        mean, inverse = map(torch.cat, zip(*moments, strict=True))
        ctx.save_for_backward(x, mean, inverse, scale, index)
        ctx.shift_dtype = shift.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, scale, index = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_scale, grad_shift = (scale.new_zeros(scale.shape, dtype=precise(grad.dtype)) for _ in range(2))
        for part, g, m, i, rows, into in blocks(x, grad, mean, inverse, index, grad_x):
            g = g.to(grad_scale.dtype)
            normed = torch.native_layer_norm(part, part.shape[-1:], None, None, LAYER_NORM_EPS)[0]
            grad_scale.index_add_(0, rows, normed.to(g.dtype).mul_(g))
            grad_shift.index_add_(0, rows, g)
            grad_normed = scale.index_select(0, rows).to(g.dtype).mul_(g).to(x.dtype)
            made, *_ = torch.ops.aten.native_layer_norm_backward(
                grad_normed, part, part.shape[-1:], m, i, None, None, [True, False, False]
            )
            into.copy_(made)
        return grad_x, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype), None, None


class GatedAdd(torch.autograd.Function):
    """`x + out gate[index]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, gate: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(out, gate, index)
        ctx.x_dtype = x.dtype
        dtype = torch.promote_types(x.dtype, torch.promote_types(out.dtype, gate.dtype))
        total = x.new_empty(x.shape, dtype=dtype)
        for part, branch, rows, into in blocks(x, out, index, total):
            torch.addcmul(part.to(dtype), branch.to(dtype), gate.index_select(0, rows).to(dtype), out=into)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, gate, index = ctx.saved_tensors
        grad_out = torch.empty_like(out)
        grad_gate = gate.new_zeros(gate.shape, dtype=precise(grad.dtype))
        for branch, g, rows, into in blocks(out, grad, index, grad_out):
            into.copy_(gate.index_select(0, rows).to(g.dtype).mul_(g))
            grad_gate.index_add_(0, rows, (branch * g).to(grad_gate.dtype))
        return grad.to(ctx.x_dtype), grad_out, grad_gate.to(gate.dtype), None


class NormedHeads(torch.autograd.Function):
    """Queries and keys divided by their root mean square, times a gain, and rotated; values as they are. One complex
    product rotates several times faster than moving halves of the channels around.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gain: Tensor, phases: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        both = qkv[:, : len(gain)]
        inverse = phases.new_empty((*both.shape[:2], 1))
        rotated = torch.empty_like(both, memory_format=torch.contiguous_format)
        for part, turns, i, into in blocks(both, phases, inverse, rotated):
            x = part.to(phases.dtype)
            torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + RMS_NORM_EPS, out=i)
            x = (x * i).mul_(gain)
            as_complex(x).mul_(torch.view_as_complex(turns)[:, None])
            into.copy_(x)
        ctx.save_for_backward(qkv, gain, phases, inverse)
        return rotated[:, :heads], rotated[:, heads:], qkv[:, len(gain) :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gain, phases, inverse = ctx.saved_tensors
        both = len(gain)
        grad = qkv.new_empty(qkv.shape)
        grad[:, both:] = grads[2]
        grad_gain = torch.zeros_like(gain, dtype=phases.dtype)
        for part, turns, i, into, of_q, of_k in blocks(qkv[:, :both], phases, inverse, grad[:, :both], *grads[:2]):
            x, back = part.to(phases.dtype), torch.view_as_complex(turns)[:, None].conj_physical()
            g = torch.cat((of_q, of_k), dim=1).to(phases.dtype)
            as_complex(g).mul_(back)
            product = g * x
            grad_gain += (product * i).sum(dim=0)
            along_x = product.mul_(gain).mean(dim=-1, keepdim=True) * i.pow(3)
            into.copy_(g.mul_(i).mul_(gain).addcmul_(x, along_x, value=-1))
        return grad, grad_gain.to(gain.dtype), None, None


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    rotated = as_complex(x.to(phases.dtype)) * torch.view_as_complex(phases)[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def as_complex(x: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, in place."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
