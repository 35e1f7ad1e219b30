"""Attention as operators that a compiled graph calls without looking inside.

Runs are slices of the batch at hand. A graph that saw them would hold for batches of the same lengths only, so they
come as tensors (`RunTable`) and are read when the operator runs.

n tokens, h query heads, k key/value heads, e channels of a head.
"""

from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.network.cache import CacheTable
from transfusion_pytorch.network.sdpa import (
    attend_run,
    attend_runs,
    batched,
    dense_gradients,
    empty_sums,
    flash_gradients,
    flash_outputs,
    one_for_each_head,
    uses_flash,
)
from transfusion_pytorch.sequence.masks import RunTable


def attend_opaquely(
    q: Tensor, k: Tensor, v: Tensor, table: RunTable, cached: CacheTable | None, layer: int, softcap: float | None
) -> Tensor:
    if cached is None:
        k, v = (one_for_each_head(q, part) for part in (k, v))
        return _attend(q, k, v, table.numbers, table.bits, softcap)[0]
    places = cached.keys[layer], cached.values[layer], cached.row_of, cached.slot_of
    return _attend_cached(q, k, v, *places, table.numbers, table.bits, softcap)


@torch.library.custom_op("transfusion_pytorch::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, bits: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The output, and the sums that the gradients of the flash kernel want (empty for other kernels)."""
    runs = RunTable(numbers, bits).runs()
    if uses_flash(q, softcap):
        return flash_outputs(q, k, v, runs)
    return attend_runs(q, k, v, runs, softcap).contiguous(), _no_sums(q)


@_attend.register_fake
def _(q, k, v, numbers, bits, softcap):
    return q.new_empty(q.shape), empty_sums(q) if uses_flash(q, softcap) else _no_sums(q)


@torch.library.custom_op("transfusion_pytorch::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    numbers: Tensor,
    bits: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    runs = RunTable(numbers, bits).runs()
    if uses_flash(q, softcap):
        return flash_gradients(grad, q, k, v, out, sums, runs)
    return dense_gradients(grad, q, k, v, runs, softcap)


@_attend_backward.register_fake
def _(grad, q, k, v, out, sums, numbers, bits, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, numbers, bits, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, numbers, bits)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.softcap), None, None, None


_attend.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("transfusion_pytorch::attend_cached", mutates_args=("keys", "values"))
def _attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    row_of: Tensor,
    slot_of: Tensor,
    numbers: Tensor,
    bits: Tensor,
    softcap: float | None,
) -> Tensor:
    keys[row_of, :, slot_of] = k.to(keys.dtype)
    values[row_of, :, slot_of] = v.to(values.dtype)
    outs = [
        attend_run(run, batched(q[run.tokens], run), keys[run.rows], values[run.rows], softcap)
        for run in RunTable(numbers, bits).runs()
    ]
    return torch.cat(outs)


@_attend_cached.register_fake
def _(q, k, v, keys, values, row_of, slot_of, numbers, bits, softcap):
    return q.new_empty(q.shape)


def _no_sums(q: Tensor) -> Tensor:
    return q.new_empty(0)
