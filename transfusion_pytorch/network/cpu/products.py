"""CPU only: products in low precision on processors that can store it but not multiply it.

Without AVX-512 or better, torch multiplies bfloat16 one element at a time, or nearly so: 5 times slower than single
precision on the way forward, and up to 75 times on the way back (docs/performance.md). Here such a product is made in
single precision and its outcome rounded, so that autocast still halves the memory of activations and costs a few casts.
Left to torch are products of few rows, and convolutions whose weights themselves are of low precision.

i and o features.
"""

import platform
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.cpu.reordered import reordered_in_use, reordered_linear
from transfusion_pytorch.network.precision import precise, working_dtype

FEW_ROWS = 16  # of which even an emulated product is faster than reading all weights twice


def types_without_products() -> frozenset[torch.dtype]:
    """The types that this processor cannot multiply itself; only of x86 is that known, others are left to torch."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    has_library = torch.backends.mkldnn.is_available()
    return frozenset(
        dtype for dtype, ask in supported.items() if not (has_library and getattr(torch.ops.mkldnn, ask)())
    )


EMULATED = types_without_products()


def emulated(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of this type would be made without instructions for it."""
    return device_type == "cpu" and dtype in EMULATED


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What products of this type are best made in."""
    return torch.float32 if emulated(dtype, device_type) else dtype


def linear(
    x: Shaped[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Shaped[Tensor, "... o"]:
    """`x weight^T + bias`."""
    dtype = working_dtype(x)
    if dtype == x.dtype and (copy := reordered_in_use(x, weight)) is not None:
        return reordered_linear(x, copy, bias)
    if not emulated(dtype, "cpu") or (weight.dtype == dtype and x.shape[:-1].numel() < FEW_ROWS):
        return F.linear(x, weight, bias)
    return UpcastLinear.apply(x.to(dtype), weight, bias)  # type: ignore[return-value]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` in the type of x, made in the type that is best for that.

    Autocast is left out: it would keep the casts of hand-written functions, which have no gradients, for others.
    """
    dtype = product_dtype(x.dtype, x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


class UpcastLinear(torch.autograd.Function):
    """In single precision, from and to a lower one; keeps the low one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(grad, x, weight, ctx.bias_dtype, ctx.needs_input_grad)


def linear_gradients(
    grad: Tensor, x: Tensor | None, weight: Tensor, bias_dtype: torch.dtype | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias which are wanted; `x` may be missing where that of the weight is not."""
    kind = grad.device.type
    dtype = product_dtype(grad.dtype, kind)
    rows = torch.atleast_2d(grad).flatten(0, -2).to(dtype)
    grad_x = grad_weight = grad_bias = None
    with torch.autocast(kind, enabled=False):
        if wanted[0]:
            grad_x = (rows @ weight.to(dtype)).to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
        if wanted[1] and x is not None:
            grad_weight = (rows.t() @ torch.atleast_2d(x).flatten(0, -2).to(dtype)).to(weight.dtype)
        if wanted[2]:
            grad_bias = rows.sum(dim=0, dtype=precise(dtype)).to(bias_dtype)
    return grad_x, grad_weight, grad_bias
