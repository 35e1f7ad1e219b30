"""What each token gathers from the keys it may see. One plan for a forward pass serves all layers.

| plan | where |
|---|---|
| `RaggedAttention` | a CPU: sample by sample, no padding |
| `FlexAttention` | CUDA: one kernel over the whole stream |
| `DenseAttention` | any other device, and wherever flex attention or the kernel of CPUs cannot: a mask of `n * n` |
| `CachedAttention` | decoding: what a cache has of the samples is seen as well |

n tokens, h query heads, k key/value heads, e channels of a head, g samples of one length t.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from transfusion_pytorch.network.cache import CacheView
from transfusion_pytorch.network.cpu.attention import PackedAttention
from transfusion_pytorch.network.cpu.products import product_dtype
from transfusion_pytorch.network.precision import precise, without_autocast
from transfusion_pytorch.network.shortcuts import forces_plain_formulas
from transfusion_pytorch.sequence.blocks import BLOCK
from transfusion_pytorch.sequence.masks import Intervals, Layout, Run

Q = Shaped[Tensor, "n h e"]
KV = Shaped[Tensor, "n k e"]


class RaggedAttention(NamedTuple):
    """CPU only: the runs of a stream one after another, as one autograd node."""

    runs: Sequence[Run]

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        """What the queries gather; `layer` is that of the cache, if there is one."""
        if softcap is None:
            k, v = (one_for_each_head(q, part) for part in (k, v))
            return PackedAttention.apply(q, k, v, self.runs)  # type: ignore[return-value]
        lengths = [run.tokens.stop - run.tokens.start for run in self.runs]
        split = (part.split(lengths) for part in (q, k, v))
        outs = [
            attend_run(run, run.batched(q_run), run.batched(k_run), run.batched(v_run), softcap)
            for run, q_run, k_run, v_run in zip(self.runs, *split, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class FlexAttention(NamedTuple):
    """Flex attention over the whole stream. Inside a compiled layer all of its tensors are inputs of the graph."""

    intervals: Intervals

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        heads_first = (rearrange(part, "n h e -> 1 h n e") for part in (q, k, v))
        if not q.is_cuda:  # the code that is generated for CPUs does not know views
            heads_first = (part.contiguous() for part in heads_first)
        out = _flex_kernel(q.is_cuda)(
            *heads_first,
            block_mask=self._block_mask(),
            score_mod=None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return rearrange(out, "1 h n e -> n h e")

    def _block_mask(self) -> BlockMask:
        n, blocks = len(self.intervals.end), self.intervals.blocks
        assert blocks is not None
        tables = [table[None, None] for table in blocks]
        return BlockMask((n, n), *tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=self.intervals.mask_mod())


class DenseAttention(NamedTuple):
    """The definition: every query against every key of the stream, and a mask.

    `differentiable` leaves out fused kernels, which have one derivative.
    """

    mask: Bool[Tensor, "n n"]
    differentiable: bool = False

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        q, k, v = (rearrange(part, "n h e -> 1 h n e") for part in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH) if self.differentiable else nullcontext():
            out = attend_masked(q, k, v, mask=self.mask, softcap=softcap)
        return rearrange(out, "1 h n e -> n h e")


class CachedAttention(NamedTuple):
    """The runs of a stream, each of which continues rows of the cache, where its keys and values are written."""

    cache: CacheView

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        outs = []
        for index, run in enumerate(self.cache.runs):
            q_run, k_run, v_run = (run.batched(part[run.tokens]) for part in (q, k, v))
            outs.append(attend_run(run, q_run, *self.cache.update(layer, index, k_run, v_run), softcap))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


AttentionPlan = RaggedAttention | FlexAttention | DenseAttention | CachedAttention
AttentionKind = Literal["auto", "flex", "dense", "ragged"]


def plan_attention(
    layout: Layout, cache: CacheView | None = None, *, kind: AttentionKind = "auto", trains: bool = False
) -> AttentionPlan:
    """The plan for a stream that continues the rows of a `cache`, or stands alone, on the device of the layout."""
    if cache is not None:
        return CachedAttention(cache)
    kind = choose_attention(kind, torch.device(layout.device).type, trains)
    if kind == "ragged":
        return RaggedAttention(layout.runs)
    intervals = layout.prepare(blocks=kind == "flex").intervals
    assert intervals is not None
    plain = forces_plain_formulas()
    return FlexAttention(intervals) if kind == "flex" else DenseAttention(intervals.dense(), differentiable=plain)


def choose_attention(kind: AttentionKind, device_type: str, trains: bool) -> AttentionKind:
    """Where "auto" leads on a device, and what stands in for what it does not have.

    | device | "auto" | "flex" | "ragged" | inside of `plain_formulas()` |
    |---|---|---|---|---|
    | CPU | ragged | flex in inference, ragged in training (torch has no backward) | ragged | dense |
    | CUDA | flex | flex | dense | dense |
    | others | dense | dense | dense | dense |
    """
    if forces_plain_formulas() or kind == "dense" or device_type not in ("cpu", "cuda"):
        return "dense"
    if device_type == "cuda":
        return "dense" if kind == "ragged" else "flex"
    if kind == "flex" and trains:
        _say_flex_fallback()
    return "flex" if kind == "flex" and not trains else "ragged"


@lru_cache(maxsize=1)
def _say_flex_fallback() -> None:
    warnings.warn(
        "use_flex_attn: torch has no backward of flex attention on this device, so training uses SDPA (same masks)",
        stacklevel=3,
    )


def _flex_kernel(is_cuda: bool) -> Callable[..., Tensor]:
    """A compiled layer takes it in. By itself it is compiled on a GPU only: on a CPU it is there to compare with."""
    return flex_attention if torch.compiler.is_compiling() else _eager_kernel(is_cuda)


@lru_cache(maxsize=2)
def _eager_kernel(is_cuda: bool) -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True) if is_cuda else _uncompiled_flex


def _uncompiled_flex(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **options)


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


def one_for_each_head(q: Tensor, shared: Tensor) -> Tensor:
    """Keys or values that several query heads share, repeated for each of them."""
    groups = q.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared
