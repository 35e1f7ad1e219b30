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
BLOCK = 2**20  # numbers that are worked on at a time, so that they stay in the processor's cache


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
    rows = max(BLOCK // parts[0].shape[-1], 1)
    return zip(*(part.split(rows) for part in parts), strict=True)


class ModulatedNorm(torch.autograd.Function):
    """`norm(x) scale[index] + shift[index]`, with a layer norm, in the type that the products behind it take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        normed, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
        ctx.save_for_backward(x, mean, inverse, scale, index)
        ctx.shift_dtype = shift.dtype
        return torch.addcmul(shift.index_select(0, index), normed, scale.index_select(0, index)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, scale, index = ctx.saved_tensors
        grad = grad.to(precise(grad.dtype))
        normed = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)[0]
        grad_scale, grad_shift = (sum_by_index(part, index, len(scale)) for part in (normed.mul_(grad), grad))
        grad_normed = scale.index_select(0, index).to(grad.dtype).mul_(grad)
        grad_x, *_ = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(x.dtype), x, x.shape[-1:], mean, inverse, None, None, [True, False, False]
        )
        return grad_x, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype), None, None


class GainedNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) gain`, in the type that the products behind it take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, inverse = x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=precise(x.dtype))
        for part, inverse_part, out_part in blocks(x, inverse, out):
            exact = part.to(inverse.dtype)
            squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
            torch.rsqrt(squares.div_(x.shape[-1]).add_(eps), out=inverse_part)
            out_part.copy_((exact * inverse_part).mul_(gain))
        ctx.save_for_backward(x, gain, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_gain = gain.new_zeros(gain.shape, dtype=inverse.dtype) if ctx.needs_input_grad[1] else None
        for part, inverse_part, grad_part, into in blocks(x, inverse, grad, grad_x):
            normed, grad_part = part.to(inverse.dtype) * inverse_part, grad_part.to(inverse.dtype)
            if grad_gain is not None:
                grad_gain += (normed * grad_part).sum(dim=0)
            grad_normed = grad_part * gain
            along = torch.linalg.vecdot(normed, grad_normed)[:, None] / -x.shape[-1]
            into.copy_(grad_normed.addcmul_(normed, along).mul_(inverse_part))
        return grad_x, None if grad_gain is None else grad_gain.to(gain.dtype), None, None


class GatedAdd(torch.autograd.Function):
    """`x + out gate[index]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, gate: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(out, gate, index)
        ctx.x_dtype = x.dtype
        return torch.addcmul(x, out, gate.index_select(0, index))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, gate, index = ctx.saved_tensors
        grad_out = gate.index_select(0, index).to(grad.dtype).mul_(grad).to(out.dtype)
        grad_gate = sum_by_index(out * grad, index, len(gate)).to(gate.dtype)
        return grad.to(ctx.x_dtype), grad_out, grad_gate, None


class NormedHeads(torch.autograd.Function):
    """Queries and keys divided by their root mean square, times a gain, and rotated; values as they are. One complex
    product rotates several times faster than
    moving halves of the channels around."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain: Tensor, phases: Tensor, heads: int, eps: float = RMS_NORM_EPS
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = qkv[:, : len(gain)].to(phases.dtype)
        inverse = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        rotated = (x * inverse).mul_(gain)
        as_complex(rotated).mul_(torch.view_as_complex(phases)[:, None])
        ctx.save_for_backward(qkv, gain, phases, inverse)
        ctx.heads = heads
        rotated = rotated.to(qkv.dtype)
        return rotated[:, :heads], rotated[:, heads:], qkv[:, len(gain) :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gain, phases, inverse = ctx.saved_tensors
        both, heads = len(gain), ctx.heads
        grad = qkv.new_empty(qkv.shape)
        grad[:, both:] = grads[2]
        x = qkv[:, :both].to(phases.dtype)
        grad_x = grad[:, :both] if grad.dtype == phases.dtype else torch.empty_like(x)
        back = torch.view_as_complex(phases)[:, None].conj_physical()
        for part, into in ((grads[0], grad_x[:, :heads]), (grads[1], grad_x[:, heads:])):
            torch.mul(as_complex(part.to(phases.dtype).contiguous()), back, out=as_complex(into))
        product = grad_x * x
        grad_gain = (product * inverse).sum(dim=0)
        along_x = product.mul_(gain).mean(dim=-1, keepdim=True) * inverse.pow(3)
        grad_x.mul_(inverse).mul_(gain).addcmul_(x, along_x, value=-1)
        if grad_x.dtype != grad.dtype:
            grad[:, :both] = grad_x
        return grad, grad_gain.to(gain.dtype), None, None, None


class RotatedHeads(torch.autograd.Function):
    """Queries and keys rotated; values as they are. One gradient for all of them, and nothing kept but the phases."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, phases: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        both = heads + kv_heads
        rotated = qkv[:, :both].to(phases.dtype, copy=True, memory_format=torch.contiguous_format)
        as_complex(rotated).mul_(torch.view_as_complex(phases)[:, None])
        ctx.save_for_backward(phases)
        ctx.shape, ctx.dtype = qkv.shape, qkv.dtype
        rotated = rotated.to(qkv.dtype)
        return rotated[:, :heads], rotated[:, heads:], qkv[:, both:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (phases,) = ctx.saved_tensors
        grad = grads[0].new_empty(ctx.shape, dtype=ctx.dtype)
        into = grad.split([part.shape[1] for part in grads], dim=1)
        back = torch.view_as_complex(phases)[:, None].conj_physical()
        for part, into_part in zip(grads[:2], into[:2], strict=True):
            turned = as_complex(part.to(phases.dtype).contiguous()) * back
            into_part.copy_(torch.view_as_real(turned).flatten(-2))
        into[2].copy_(grads[2])
        return grad, None, None, None


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    rotated = as_complex(x.to(phases.dtype)) * torch.view_as_complex(phases)[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def as_complex(x: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, in place."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def sum_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """What the tokens of each row add up to, `(m, d)`, in single precision at least."""
    sums = values.new_zeros((count, values.shape[-1]), dtype=precise(values.dtype))
    return sums.index_add_(0, index, values.to(sums.dtype))
