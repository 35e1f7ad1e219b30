"""Scaled dot-product attention of plain batches, on any device.

n tokens, h query heads, k key/value heads, e channels of a head, g samples of one length t.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from transfusion_pytorch.network.cpu.products import product_dtype
from transfusion_pytorch.network.precision import precise, without_autocast
from transfusion_pytorch.sequence.masks import Run


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool = False, softcap: float | None = None
) -> Tensor:
    """`(g, h, t, e)` each. `mask` says which keys a query sees.

    `softcap` bounds the logits at `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118).
    """
    k, v = (one_for_each_head(q, part.to(q.dtype)) for part in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    dtype, kind = q.dtype, q.device.type
    q, k, v = (part.to(product_dtype(dtype, kind)) for part in (q, k, v))
    with without_autocast(kind):
        logits = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
        logits = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
        return (logits.softmax(dim=-1, dtype=precise(dtype)).to(v.dtype) @ v).to(dtype)


def attend_run(run: Run, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    """`(g, h, t, e)` each, the keys and values of a cache included, to `(n, h, e)`."""
    outs = [
        attend_masked(q[:, :, queries], k[:, :, :keys], v[:, :, :keys], mask=mask, is_causal=is_causal, softcap=softcap)
        for queries, keys, is_causal, mask in run.chunks
    ]
    return rearrange(torch.cat(outs, dim=2) if len(outs) > 1 else outs[0], "g h t e -> (g t) h e")


def batched(part: Tensor, run: Run) -> Tensor:
    """The tokens of a run, one sample behind the other, as `(g, h, t, ...)`."""
    return part.unflatten(0, (run.rows.stop - run.rows.start, -1)).transpose(1, 2)


def one_for_each_head(q: Tensor, shared: Tensor) -> Tensor:
    """Keys or values that several query heads share, repeated for each of them."""
    groups = q.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared
