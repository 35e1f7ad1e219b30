"""Linear layers and convolutions in low precision, on processors that can store it but not multiply it.

Without AVX-512 or better, torch multiplies bfloat16 one element at a time, or nearly so: 5 times slower than single
precision on the way forward, and 60 times on the way back (docs/performance.md). Here such a product is made in single
precision and its outcome rounded, so that autocast still halves the memory of activations and costs a few casts.

i and o features.
"""

import platform
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


def working_dtype(x: Tensor) -> torch.dtype:
    """What a product with `x` gives back: autocast's type, or its own."""
    kind = x.device.type
    rounds = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(kind) if rounds else x.dtype


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What products of this type are best made in."""
    return torch.float32 if emulated(dtype, device_type) else dtype


class Linear(nn.Linear):
    """As `torch.nn.Linear`, in whose place it can be loaded and replaced."""

    def forward(self, x: Shaped[Tensor, "... i"]) -> Shaped[Tensor, "... o"]:
        return linear(x, self.weight, self.bias)


def linear(
    x: Shaped[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Shaped[Tensor, "... o"]:
    """`x weight^T + bias`."""
    dtype = working_dtype(x)
    if not emulated(dtype, x.device.type):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():  # compilers keep what is small and cast again by themselves
        return upcast_linear(x.to(dtype), weight, bias)
    if weight.dtype == dtype and x.shape[:-1].numel() < FEW_ROWS:
        return F.linear(x, weight, bias)
    return UpcastLinear.apply(x.to(dtype), weight, bias)  # type: ignore[return-value]


def upcast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class UpcastLinear(torch.autograd.Function):
    """In single precision, from and to a lower one; keeps the low one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return upcast_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(grad, x, weight, ctx.bias_dtype, ctx.needs_input_grad)


def linear_gradients(
    grad: Tensor, x: Tensor | None, weight: Tensor, bias_dtype: torch.dtype | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias which are wanted; `x` may be missing where that of the weight is not."""
    dtype = product_dtype(grad.dtype, grad.device.type)
    rows = torch.atleast_2d(grad).flatten(0, -2).to(dtype)
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        grad_x = (rows @ weight.to(dtype)).to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
    if wanted[1]:
        grad_weight = (rows.t() @ torch.atleast_2d(x).flatten(0, -2).to(dtype)).to(weight.dtype)
    if wanted[2]:
        grad_bias = rows.sum(dim=0, dtype=torch.promote_types(dtype, torch.float32)).to(bias_dtype)
    return grad_x, grad_weight, grad_bias


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether its weight and bias are all there is to a layer: no subclass, and nobody waits for its call."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    watched = "forward" in vars(module) or any(getattr(module, name) for name in hooks)
    return type(module) in (nn.Linear, Linear) and not watched


class Convolution(nn.Module):
    """Mixed into a convolution. Beside weights of single precision, as under autocast; keeps what it reads in that."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        if self.weight.dtype == dtype or not emulated(dtype, x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(dtype).to(self.weight.dtype)).to(dtype)


class Conv1d(Convolution, nn.Conv1d): ...


class Conv2d(Convolution, nn.Conv2d): ...


class Conv3d(Convolution, nn.Conv3d): ...
