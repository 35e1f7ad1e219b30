"""CPU only: the flash kernel over the runs of a packed stream, each of which is a plain batch.

n tokens, g samples of a run, h query heads, k key/value heads, s keys, e channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.grouped_heads import one_for_each_head, one_for_each_key
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.masks import Run

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PackedAttention(torch.autograd.Function):
    """All runs of a stream into one output, and into one gradient of each input. Heads of k and v may be shared by
    several of q's.

    Autograd by itself would make a stream of zeros for every slice of a run, and add them all up.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
        out, logsumexp = flash_outputs(q, k, v, runs)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.runs = runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        return *flash_gradients(grad, q, k, v, out, logsumexp, ctx.runs), None


def flash_outputs(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """The output `(n, h, e)`, and what the gradients want to know: the logarithm of each sum of weights, `(n, h)`."""
    q, k, v = map(_with_neighbouring_channels, (q, k, v))
    out = q.new_empty(q.shape)
    logsumexp = q.new_empty(q.shape[:2], dtype=precise(q.dtype))
    for run in runs:
        q_run, out_run, sum_run = (run.batched(part[run.tokens]) for part in (q, out, logsumexp))
        k_run, v_run = (one_for_each_head(q_run, run.keys(part)) for part in (k, v))
        for queries, num_keys, is_causal, mask in run.chunks:
            seen = k_run[:, :, :num_keys], v_run[:, :, :num_keys]
            made = flash(q_run[:, :, queries], *seen, 0.0, is_causal, attn_mask=_bias(mask, q.dtype))
            out_run[:, :, queries], sum_run[:, :, queries] = made
    return out, logsumexp


def flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, runs: Sequence[Run]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; those of keys and values add up over the chunks of a run, in single precision
    at least.

    Made in single precision: in bfloat16 the backward kernel takes as long for 400 tokens, and three times as long for
    128 (torch 2.13, one core with AMX).
    """
    dtype, dtypes = precise(q.dtype), (q.dtype, k.dtype, v.dtype)
    grad, q, k, v, out = (_with_neighbouring_channels(part).to(dtype) for part in (grad, q, k, v, out))
    grads = [torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)]
    for run in runs:
        of_queries = [run.batched(part[run.tokens]) for part in (grad, q, out, logsumexp, grads[0])]
        k_run, v_run, *grads_run = (run.keys(part) for part in (k, v, *grads[1:]))
        of_keys = *(one_for_each_head(of_queries[1], part) for part in (k_run, v_run)), *grads_run
        for queries, num_keys, is_causal, mask in run.chunks:
            grad_out, some_q, some_out, some_sum, grad_q = (part[:, :, queries] for part in of_queries)
            keys, values, grad_k, grad_v = (part[:, :, :num_keys] for part in of_keys)
            made = flash_backward(
                grad_out, some_q, keys, values, some_out, some_sum, 0.0, is_causal, attn_mask=_bias(mask, dtype)
            )
            grad_q[:] = made[0]
            grad_k += one_for_each_key(made[1], grad_k)
            grad_v += one_for_each_key(made[2], grad_v)
        for part, grad_run in zip(grads[1:], grads_run, strict=True):
            run.put_keys(part, grad_run)
    of_q, of_k, of_v = (made.to(own) for made, own in zip(grads, dtypes, strict=True))
    return of_q, of_k, of_v


def _with_neighbouring_channels(part: Tensor) -> Tensor:
    """The kernel takes a stride of 1 between channels for granted."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the logits."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
