"""Scaled dot-product attention over the runs of a packed stream, each of which is a plain batch.

n tokens, h query heads, k key/value heads, e channels of a head, g samples of one length t.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.cache import CacheView
from transfusion_pytorch.network.upcast import precise, product_dtype
from transfusion_pytorch.sequence.masks import QUERY_CHUNK, Chunk, Run

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PackedAttention(torch.autograd.Function):
    """The flash kernel of CPUs over all runs of a stream, into one output, and into one gradient of each input.

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


def attend_runs(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], softcap: float | None) -> Tensor:
    if uses_flash(q, softcap):
        k, v = (one_for_each_head(q, part) for part in (k, v))
        return PackedAttention.apply(q, k, v, runs)  # type: ignore[return-value]
    lengths = [run.tokens.stop - run.tokens.start for run in runs]
    split = (part.split(lengths) for part in (q, k, v))
    outs = [
        attend_run(run, batched(q_run, run), batched(k_run, run), batched(v_run, run), softcap)
        for run, q_run, k_run, v_run in zip(runs, *split, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def uses_flash(q: Tensor, softcap: float | None) -> bool:
    """Whether this is where SDPA would take the flash kernel of CPUs, which can then be called by its name."""
    return q.device.type == "cpu" and softcap is None


def flash_outputs(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """The output `(n, h, e)`, and what the gradients want to know: the logarithm of each sum of weights, `(n, h)`."""
    q, k, v = map(_with_neighbouring_channels, (q, k, v))
    out = q.new_empty(q.shape)
    logsumexp = empty_sums(q)
    for run in runs:
        q_run, k_run, v_run, out_run, sum_run = (batched(part[run.tokens], run) for part in (q, k, v, out, logsumexp))
        for queries, num_keys, is_causal, mask in run.chunks:
            seen = k_run[:, :, :num_keys], v_run[:, :, :num_keys]
            made = flash(q_run[:, :, queries], *seen, 0.0, is_causal, attn_mask=_bias(mask, q.dtype))
            out_run[:, :, queries], sum_run[:, :, queries] = made
    return out, logsumexp


def empty_sums(q: Tensor) -> Tensor:
    """Room for one number for each query of each head, `(n, h)`."""
    return q.new_empty(q.shape[:2], dtype=precise(q.dtype))


def flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, runs: Sequence[Run]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; those of keys and values add up over the chunks of a run."""
    grad, q, k, v, out = map(_with_neighbouring_channels, (grad, q, k, v, out))
    dtype = product_dtype(q.dtype, q.device.type)
    grads = _empty_gradients(q, k, v)
    for run in runs:
        grad_run, q_run, out_run, k_run, v_run = (
            batched(part[run.tokens].to(dtype), run) for part in (grad, q, out, k, v)
        )
        sum_run, *grads_run = (batched(part[run.tokens], run) for part in (logsumexp, *grads))
        of_queries = grad_run, q_run, out_run, sum_run, grads_run[0]
        of_keys = k_run, v_run, *grads_run[1:]
        for queries, num_keys, is_causal, mask in run.chunks:
            grad_out, some_q, some_out, some_sum, grad_q = (part[:, :, queries] for part in of_queries)
            keys, values, grad_k, grad_v = (part[:, :, :num_keys] for part in of_keys)
            made = flash_backward(
                grad_out, some_q, keys, values, some_out, some_sum, 0.0, is_causal, attn_mask=_bias(mask, dtype)
            )
            grad_q[:] = made[0]
            grad_k += made[1]
            grad_v += made[2]
    return grads[0], grads[1].to(k.dtype), grads[2].to(v.dtype)


def dense_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the definition, for any device and with softcap. Keys and values have a head for each of q's."""
    grads = _empty_gradients(q, k, v)
    scale = q.shape[-1] ** -0.5
    for run in runs:
        grad_run, q_run, k_run, v_run, *grads_run = (batched(part[run.tokens], run) for part in (grad, q, k, v, *grads))
        for chunk in _short(run.chunks, q.device):
            seen = slice(0, chunk.num_keys)
            grad_out, some_q, keys, values = (
                part.to(precise(q.dtype))
                for part in (
                    grad_run[:, :, chunk.queries],
                    q_run[:, :, chunk.queries],
                    k_run[:, :, seen],
                    v_run[:, :, seen],
                )
            )
            logits = _logits(some_q, keys, softcap)
            weights = _masked(logits, chunk).softmax(dim=-1)
            slope = weights * (grad_out @ values.mT)
            slope -= weights * slope.sum(dim=-1, keepdim=True)
            if softcap is not None:
                slope *= 1 - (logits / softcap).square()
            grads_run[0][:, :, chunk.queries] = slope @ keys * scale
            grads_run[1][:, :, seen] += slope.mT @ some_q * scale
            grads_run[2][:, :, seen] += weights.mT @ grad_out
    return grads[0], grads[1].to(k.dtype), grads[2].to(v.dtype)


def _short(chunks: Sequence[Chunk], device: torch.device) -> Iterator[Chunk]:
    """Chunks of at most `QUERY_CHUNK` queries, with their masks: all weights of a long row would be too many."""
    for queries, num_keys, is_causal, mask in chunks:
        for start in range(queries.start, queries.stop, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, queries.stop)
            if is_causal:
                last = torch.arange(start, stop, device=device)
                yield Chunk(slice(start, stop), stop, False, torch.arange(stop, device=device) <= last[:, None])
            else:
                part = None if mask is None else mask[:, :, start - queries.start : stop - queries.start]
                yield Chunk(slice(start, stop), num_keys, False, part)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """For q, k and v; what adds up does so in single precision at least."""
    return [q.new_empty(q.shape), *(part.new_zeros(part.shape, dtype=precise(q.dtype)) for part in (k, v))]


def _with_neighbouring_channels(part: Tensor) -> Tensor:
    """The kernel takes a stride of 1 between channels for granted."""
    return part if part.stride(-1) == 1 else part.contiguous()


def batched(part: Tensor, run: Run) -> Tensor:
    """The tokens of a run, one sample behind the other, as `(g, h, t, ...)`."""
    return part.unflatten(0, (run.rows.stop - run.rows.start, -1)).transpose(1, 2)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the logits."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def attend_run(run: Run, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    """`(g, h, t, e)` each, the keys and values of a cache included, to `(n, h, e)`."""
    outs = [
        _attend_dense(q[:, :, chunk.queries], k[:, :, : chunk.num_keys], v[:, :, : chunk.num_keys], chunk, softcap)
        for chunk in run.chunks
    ]
    return rearrange(torch.cat(outs, dim=2) if len(outs) > 1 else outs[0], "g h t e -> (g t) h e")


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, softcap: float | None) -> Tensor:
    k, v = (one_for_each_head(q, part.to(q.dtype)) for part in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chunk.mask, is_causal=chunk.is_causal)
    dtype, kind = q.dtype, q.device.type
    q, k, v = (part.to(product_dtype(dtype, kind)) for part in (q, k, v))
    with torch.autocast(kind, enabled=False):
        weights = _masked(_logits(q, k, softcap), chunk).softmax(dim=-1, dtype=precise(dtype))
        return (weights.to(v.dtype) @ v).to(dtype)


def _logits(q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _masked(logits: Tensor, chunk: Chunk) -> Tensor:
    mask = chunk.mask
    if chunk.is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))


def one_for_each_head(q: Tensor, shared: Tensor) -> Tensor:
    """Keys or values that several query heads share, repeated for each of them."""
    groups = q.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared


def attend_cached(q: Tensor, k: Tensor, v: Tensor, cache: CacheView, layer: int, softcap: float | None) -> Tensor:
    outs = []
    for index, run in enumerate(cache.runs):
        q_run, k_run, v_run = (batched(part[run.tokens], run) for part in (q, k, v))
        outs.append(attend_run(run, q_run, *cache.update(layer, index, k_run, v_run), softcap))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
