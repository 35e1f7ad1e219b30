"""Elementwise work of a layer with gradients written by hand.

Between two matrix products a step of training is bound by memory. Autograd would keep every intermediate and write
every gradient of a slice into zeros of its own; these keep little but their inputs, take what they need from them once
more, and write each gradient where it belongs. Compilers find that by themselves, so compiled graphs take the plain
formulas.

n tokens, m rows of a table, d model, f features or frequencies, h query heads, k key/value heads, e channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.upcast import is_plain_linear, linear_gradients, precise, product, working_dtype
from transfusion_pytorch.sequence.positions import rotate

ACTIVATIONS = {"geglu": (F.gelu, torch.ops.aten.gelu_backward), "swiglu": (F.silu, torch.ops.aten.silu_backward)}
BLOCK = 2**20  # numbers
LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6


def gated_activation(hidden: Shaped[Tensor, "n two_f"], activation: str) -> Shaped[Tensor, "n f"]:
    """`value activate(gate)`, where `hidden = [value gate]` (GLU variants, arXiv 2002.05202)."""
    if not torch.compiler.is_compiling():
        return GatedActivation.apply(hidden, activation)  # type: ignore[return-value]
    value, gate = hidden.chunk(2, dim=-1)
    return value * ACTIVATIONS[activation][0](gate)


class GatedActivation(torch.autograd.Function):
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


def gated_linear(hidden: Shaped[Tensor, "n two_f"], activation: str, layer: nn.Linear) -> Shaped[Tensor, "n d"]:
    """`layer(gated_activation(hidden))`, of which the layer's input is not kept but made again, which is cheap."""
    if torch.compiler.is_compiling() or hidden.is_meta or not is_plain_linear(layer):
        return layer(gated_activation(hidden, activation))
    return GatedLinear.apply(hidden, layer.weight, layer.bias, activation)  # type: ignore[return-value]


class GatedLinear(torch.autograd.Function):
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
    rows = BLOCK // parts[0].shape[-1] if parts[0].device.type == "cpu" else len(parts[0])
    return zip(*(part.split(max(rows, 1)) for part in parts), strict=True)


def modulated_norm(
    x: Shaped[Tensor, "n d"], scale: Shaped[Tensor, "m d"], shift: Shaped[Tensor, "m d"], row: Int[Tensor, " n"]
) -> Shaped[Tensor, "n d"]:
    """`norm(x) scale[row] + shift[row]`, with a layer norm."""
    if not torch.compiler.is_compiling():
        return ModulatedNorm.apply(x, scale, shift, row)  # type: ignore[return-value]
    normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(_look_up(shift, row), normed, _look_up(scale, row))


class ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, row: Tensor) -> Tensor:
        normed, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
        ctx.save_for_backward(x, mean, inverse, scale, row)
        ctx.shift_dtype = shift.dtype
        return torch.addcmul(shift.index_select(0, row), normed, scale.index_select(0, row))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, scale, row = ctx.saved_tensors
        normed = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)[0]
        grad_scale, grad_shift = (sum_rows(part, row, len(scale)) for part in (normed.mul_(grad), grad))
        grad_normed = scale.index_select(0, row).to(grad.dtype).mul_(grad)
        grad_x, *_ = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(x.dtype), x, x.shape[-1:], mean, inverse, None, None, [True, False, False]
        )
        return grad_x, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype), None


def gated_add(
    x: Shaped[Tensor, "n d"], out: Shaped[Tensor, "n d"], gate: Shaped[Tensor, "m d"], row: Int[Tensor, " n"]
) -> Shaped[Tensor, "n d"]:
    """`x + out gate[row]`."""
    if not torch.compiler.is_compiling():
        return GatedAdd.apply(x, out, gate, row)  # type: ignore[return-value]
    return torch.addcmul(x, out, _look_up(gate, row))


class GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, gate: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(out, gate, row)
        ctx.x_dtype = x.dtype
        return torch.addcmul(x, out, gate.index_select(0, row))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, gate, row = ctx.saved_tensors
        grad_out = gate.index_select(0, row).to(grad.dtype).mul_(grad).to(out.dtype)
        grad_gate = sum_rows(out * grad, row, len(gate)).to(gate.dtype)
        return grad.to(ctx.x_dtype), grad_out, grad_gate, None


def normed_heads(
    qkv: Shaped[Tensor, "n heads e"], gain: Shaped[Tensor, "h_and_k e"], phases: Float[Tensor, "n f 2"], heads: int
) -> tuple[Shaped[Tensor, "n h e"], Shaped[Tensor, "n k e"], Shaped[Tensor, "n k e"]]:
    """Queries and keys divided by their root mean square, times `gain`, and turned; values as they are."""
    if not torch.compiler.is_compiling():
        return NormedHeads.apply(qkv, gain, phases, heads)  # type: ignore[return-value]
    q_and_k, v = qkv.split((len(gain), qkv.shape[1] - len(gain)), dim=1)
    q_and_k = q_and_k.to(phases.dtype)
    turned = rotate(q_and_k * inverse_rms(q_and_k) * gain, phases).to(qkv.dtype)
    return turned[:, :heads], turned[:, heads:], v


def inverse_rms(x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... 1"]:
    return (x.square().mean(dim=-1, keepdim=True) + RMS_NORM_EPS).rsqrt()


class NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gain: Tensor, phases: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        x = qkv[:, : len(gain)].to(phases.dtype)
        inverse = inverse_rms(x)
        turned = (x * inverse).mul_(gain)
        as_complex(turned).mul_(torch.view_as_complex(phases)[:, None])
        ctx.save_for_backward(qkv, gain, phases, inverse)
        ctx.heads = heads
        turned = turned.to(qkv.dtype)
        return turned[:, :heads], turned[:, heads:], qkv[:, len(gain) :]

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
        return grad, grad_gain.to(gain.dtype), None, None


def as_complex(x: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, in place."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class LookUp(torch.autograd.Function):
    """`table[row]` for compiled graphs, which would add gradients up one number at a time, and lock each."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.count = len(table)
        return table.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row,) = ctx.saved_tensors
        return _sum_rows(grad, row, ctx.count).to(grad.dtype), None


def _look_up(table: Tensor, row: Tensor) -> Tensor:
    return LookUp.apply(table, row)  # type: ignore[return-value]


def sum_rows(values: Tensor, row: Tensor, count: int) -> Tensor:
    """What the tokens of each row add up to, `(m, d)`, in single precision at least."""
    sums = values.new_zeros((count, values.shape[-1]), dtype=precise(values.dtype))
    return sums.index_add_(0, row, values.to(sums.dtype))


@torch.library.custom_op("transfusion_pytorch::sum_rows", mutates_args=())
def _sum_rows(values: Tensor, row: Tensor, count: int) -> Tensor:
    return sum_rows(values, row, count)


@_sum_rows.register_fake
def _(values, row, count):
    return values.new_empty((count, values.shape[-1]), dtype=precise(values.dtype))
