"""Cross-entropy over a large vocabulary, without all of its logits in memory at once.

n targets, d model, v vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.upcast import is_plain_linear, precise, product_dtype, working_dtype

CHUNK = 2**23  # logits at a time: 32 MiB in single precision, and still many rows for a matrix product


def summed_cross_entropy(
    x: Shaped[Tensor, "n d"], to_logits: nn.Module, labels: Int[Tensor, " n"], weights=None, *, chunk: int = CHUNK
) -> Float[Tensor, ""]:
    """The cross-entropy of `to_logits(x)`, summed over the labels, in single precision at least.

    Exact. A linear layer that would make more than `chunk` logits makes them in parts. Each part's gradients are taken
    as soon as its logits are there (those of a sum need nothing that comes later), so that no logits are kept and none
    are made twice.
    """
    if is_plain_linear(to_logits) and to_logits.bias is None and len(labels) * to_logits.out_features > chunk:
        rows = min(max(chunk // to_logits.out_features, 16), len(labels))
        return ChunkedCrossEntropy.apply(x, to_logits.weight, labels, rows)  # type: ignore[return-value]
    logits = to_logits(x)
    errors = F.cross_entropy(logits.to(precise(logits.dtype)), labels, reduction="none")
    return (errors * weights).sum() if weights is not None else errors.sum()


def cross_entropy_per_target(x, to_logits, labels):
    logits = to_logits(x)
    return F.cross_entropy(logits.to(precise(logits.dtype)), labels, reduction="none")


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum, whose gradients are there before they are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
        kind = x.device.type
        dtype = product_dtype(working_dtype(x), kind)
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        grad_x = torch.empty_like(x, dtype=precise(x.dtype)) if wants_x else None
        grad_weight = torch.zeros_like(weight, dtype=precise(weight.dtype)) if wants_weight else None
        total = torch.zeros((), dtype=precise(dtype), device=x.device)
        with torch.autocast(kind, enabled=False):
            table = weight.to(dtype)
            # on a CPU products of many rows and few columns are a third faster than the other way round
            room = x.new_empty((len(table), rows) if kind == "cpu" else (rows, len(table)), dtype=dtype)
            room = room.t() if kind == "cpu" else room
            for start in range(0, len(labels), rows):
                part, target = x[start : start + rows].to(dtype), labels[start : start + rows, None]
                logits = torch.mm(part, table.t(), out=room[: len(part)]).to(total.dtype)
                highest, wanted = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
                sums = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
                total += (highest + sums.log() - wanted).sum()
                if grad_x is None and grad_weight is None:
                    continue
                slope = logits.div_(sums).scatter_add_(1, target, logits.new_full(target.shape, -1)).to(dtype)
                if grad_x is not None:
                    grad_x[start : start + rows] = slope @ table
                if grad_weight is not None:
                    if grad_weight.dtype == dtype:
                        grad_weight.addmm_(slope.t(), part)
                    else:  # the product in low precision, its sum not
                        grad_weight += slope.t() @ part
        ctx.grads, ctx.dtypes = (grad_x, grad_weight), (x.dtype, weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slopes = ctx.grads
        if slopes is None:
            raise RuntimeError("the gradients of this loss have been taken; retain_graph=True to take them again")
        if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined] - asked for again?
            slopes = [None if slope is None else slope.clone() for slope in slopes]
        else:
            ctx.grads = None  # given away and scaled in place: a copy for a large vocabulary is hundreds of MiB
        grads = [
            None if slope is None else slope.mul_(grad).to(dtype)
            for slope, dtype in zip(slopes, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None
