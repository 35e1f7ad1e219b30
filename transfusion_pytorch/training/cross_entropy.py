"""Cross-entropy over a large vocabulary, without all of its logits in memory at once.

n targets, d model, v vocabulary.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from transfusion_pytorch.network.cpu.products import product_dtype
from transfusion_pytorch.network.graphs import many_graphs
from transfusion_pytorch.network.linear import is_plain_linear
from transfusion_pytorch.network.precision import precise, without_autocast, working_dtype
from transfusion_pytorch.network.shortcuts import forces_plain_formulas, is_untouched
from transfusion_pytorch.network.vocabulary_layers import TextLogits, TiedLogits

FEWEST_ROWS = 16  # of a chunk


def logits_at_once(device_type: str) -> int:
    """32 MiB in single precision on a CPU, which are still many rows for a matrix product; 512 MiB elsewhere."""
    return 2**23 if device_type == "cpu" else 2**27


def summed_cross_entropy(
    x: Shaped[Tensor, "n d"],
    to_logits: nn.Module,
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
    *,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """The cross-entropy of `to_logits(x)`, times `weights`, summed over the labels, in single precision at least.

    Exact. A linear layer that would make more than `chunk` logits makes them in parts. Each part's gradients are taken
    as soon as its logits are there (those of a sum need nothing that comes later), so that no logits are kept and none
    are made twice. Nothing is read from the device. Inside of `plain_formulas()` all logits are made at once.
    """
    rows = _rows_at_once(x, to_logits, chunk)
    if rows < len(labels) and (table := _table_of(to_logits)) is not None:
        return ChunkedCrossEntropy.apply(x, *table, labels, weights, rows, torch.is_grad_enabled())  # type: ignore[return-value]
    losses = cross_entropy_per_target(x, to_logits, labels, chunk=chunk)
    return losses.sum() if weights is None else (losses * weights).sum()


def cross_entropy_per_target(
    x: Shaped[Tensor, "n d"], to_logits: nn.Module, labels: Int[Tensor, " n"], *, chunk: int | None = None
) -> Float[Tensor, " n"]:
    """The cross-entropy of each label. Where there would be more than `chunk` logits, they are made in parts, and again
    in the backward pass.
    """
    rows = _rows_at_once(x, to_logits, chunk)
    if rows >= len(labels):
        return _losses(to_logits, x, labels)
    parts = zip(x.split(rows), labels.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_losses(to_logits, *part) for part in parts])
    return torch.cat([checkpoint(_losses, to_logits, *part, use_reentrant=False) for part in parts])


def _table_of(to_logits: nn.Module) -> tuple[Tensor, int] | None:
    """The rows that all logits are products with, and how many of the first are frozen; None where a module is called
    for them.
    """
    if is_plain_linear(to_logits) and to_logits.bias is None:
        return to_logits.weight, 0
    tables: Any = to_logits.tables if is_untouched(to_logits, TextLogits, TiedLogits) else None
    if tables is None:
        return None
    return torch.cat(tables), 0 if tables[0].requires_grad else len(tables[0])


def _losses(to_logits: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    logits = to_logits(x)
    return F.cross_entropy(logits.to(precise(logits.dtype)), labels, reduction="none")


def _rows_at_once(x: Tensor, to_logits: nn.Module, chunk: int | None) -> int:
    """How many targets have their logits made together: all if they are few, or the vocabulary is not known."""
    vocabulary = getattr(to_logits, "out_features", None)
    if not isinstance(vocabulary, int) or forces_plain_formulas():
        return len(x)
    chunk = logits_at_once(x.device.type) if chunk is None else chunk
    return len(x) if len(x) * vocabulary <= chunk else max(chunk // vocabulary, FEWEST_ROWS)


def _softmax(
    logits: Tensor, target: Tensor, scale: Tensor | None, dtype: torch.dtype, wants_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed cross-entropy of `logits` `(n, v)` for `target` `(n, 1)`, times `scale` `(n, 1)`, computed in `dtype`,
    and what it changes by with the logits, in their type.
    """
    kind, logits = logits.dtype, logits.to(dtype)
    highest, wanted = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
    powers = logits.sub_(highest).exp_()
    sums = powers.sum(dim=-1, keepdim=True)
    losses = highest + sums.log() - wanted
    scale = None if scale is None else scale.to(dtype)
    total = (losses if scale is None else losses * scale).sum()
    if not wants_slope:
        return total, None
    if torch.compiler.is_compiling():  # where nothing is written in place, and a comparison costs nothing
        slope = powers / sums - (torch.arange(logits.shape[1], device=logits.device) == target).to(dtype)
    else:
        slope = powers.div_(sums).scatter_add_(1, target, powers.new_full(target.shape, -1))  # one a row
    return total, (slope if scale is None else slope.mul_(scale)).to(kind)


@lru_cache(maxsize=1)
def _compiled_softmax() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """For GPUs, where what it reads and writes is all that it costs: two passes instead of twelve."""
    return torch.compile(_softmax, **many_graphs())


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum, whose gradients are there before they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        frozen: int,  # rows of the weight whose gradients nobody wants
        labels: Tensor,
        weights: Tensor | None,
        rows: int,
        wants_gradients: bool,  # what an input needs is true under `no_grad` as well
    ) -> Tensor:
        kind = x.device.type
        dtype = product_dtype(working_dtype(x), kind)
        wants_x, wants_weight = (wants_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x, dtype=precise(x.dtype)) if wants_x else None
        grad_weight = torch.zeros_like(weight, dtype=precise(weight.dtype)) if wants_weight else None
        total = torch.zeros((), dtype=precise(dtype), device=x.device)
        softmax = _compiled_softmax() if kind == "cuda" else _softmax
        with without_autocast(kind):
            table = weight.to(dtype)
            # on a CPU products of many rows and few columns are a third faster than the other way round
            room = x.new_empty((len(table), rows) if kind == "cpu" else (rows, len(table)), dtype=dtype)
            room = room.t() if kind == "cpu" else room
            for start in range(0, len(labels), rows):
                part, target = x[start : start + rows].to(dtype), labels[start : start + rows, None]
                logits = torch.mm(part, table.t(), out=room[: len(part)])
                scale = None if weights is None else weights[start : start + rows, None]
                added, slope = softmax(logits, target, scale, total.dtype, wants_x or wants_weight)
                total += added
                if slope is None:
                    continue
                if grad_x is not None:
                    grad_x[start : start + rows] = slope @ table
                if grad_weight is not None:
                    if grad_weight.dtype == dtype:
                        grad_weight[frozen:].addmm_(slope[:, frozen:].t(), part)
                    else:  # the product in low precision, its sum not
                        grad_weight[frozen:] += slope[:, frozen:].t() @ part
        ctx.grads, ctx.dtypes = (grad_x, grad_weight), (x.dtype, weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
        return *grads, None, None, None, None, None
