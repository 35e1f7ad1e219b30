"""What each token gathers from the keys it may see: the backends of attention.

n tokens, h query heads, k key/value heads, e channels of a head, g samples of one length t.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from transfusion_pytorch.network.cache import CacheTable, CacheView
from transfusion_pytorch.network.opaque import attend_opaquely
from transfusion_pytorch.network.sdpa import attend_cached, attend_runs
from transfusion_pytorch.sequence.masks import Layout, Run, RunTable


class AttentionPlan(NamedTuple):
    """How one forward pass attends, found once for all layers. One of these:

    - `runs`: SDPA over the runs of the stream
    - `cache`: SDPA over the runs of the stream and what the cache has of their samples
    - `table`: either of them in a compiled graph; `cached` are the tensors of the cache
    - `block_mask`: flex attention over the whole stream
    """

    runs: Sequence[Run] = ()
    cache: CacheView | None = None
    block_mask: BlockMask | None = None
    table: RunTable | None = None
    cached: CacheTable | None = None


def plan_attention(
    layout: Layout, cache: CacheView | None = None, *, flex: bool = False, trains: bool = False, compiled: bool = False
) -> AttentionPlan:
    """The plan for a stream that continues the rows of a `cache`, or stands alone.

    `flex` asks for flex attention. It serves whole streams; steps that continue a cache are a query or a span each
    and go through SDPA. So does what `trains` on a CPU, for which torch has no backward of it; that is said once.
    """
    if cache is not None:
        return AttentionPlan(table=cache.table, cached=cache.tensors) if compiled else AttentionPlan(cache=cache)
    if flex and trains and torch.device(layout.device).type != "cuda":
        _say_flex_fallback()
    elif flex:
        n = len(layout.end)
        mask = create_block_mask(layout.mask_mod(), None, None, n, n, device=str(layout.device))
        return AttentionPlan(block_mask=mask)
    return AttentionPlan(table=layout.table) if compiled else AttentionPlan(layout.runs)


@lru_cache(maxsize=1)
def _say_flex_fallback() -> None:
    warnings.warn(
        "use_flex_attn: torch has no backward of flex attention on this device, so training uses SDPA (same masks)",
        stacklevel=3,
    )


def attend(
    q: Shaped[Tensor, "n h e"],
    k: Shaped[Tensor, "n k e"],
    v: Shaped[Tensor, "n k e"],
    plan: AttentionPlan,
    *,
    layer: int = 0,
    softcap: float | None = None,
) -> Shaped[Tensor, "n h e"]:
    """What each token gathers from the keys it may see, those in the plan's cache included.

    `softcap` bounds the logits at `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118).
    """
    if plan.block_mask is not None:
        return _attend_flex(q, k, v, plan.block_mask, softcap)
    if plan.table is not None:
        return attend_opaquely(q, k, v, plan.table, plan.cached, layer, softcap)
    if plan.cache is not None:
        return attend_cached(q, k, v, plan.cache, layer, softcap)
    return attend_runs(q, k, v, plan.runs, softcap)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, softcap: float | None) -> Tensor:
    heads_first = partial(rearrange, pattern="n h e -> 1 h n e")
    out = _flex_kernel(q.is_cuda)(
        *map(heads_first, (q, k, v)),
        block_mask=block_mask,
        score_mod=None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return rearrange(out, "1 h n e -> n h e")


@lru_cache(maxsize=2)
def _flex_kernel(compiled: bool):
    """The fused kernel on a GPU. On a CPU the eager form: it is there to compare with, and compiles anew for every
    shape.
    """
    return torch.compile(flex_attention, dynamic=True) if compiled else _eager_flex


def _eager_flex(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **options)
