"""What each token gathers from the keys it may see. One plan for a forward pass serves all layers.

| plan | where |
|---|---|
| `RaggedAttention` | a CPU: sample by sample, no padding |
| `FlexAttention` | CUDA: one kernel over the whole stream |
| `DenseAttention` | any other device, and wherever flex attention or the kernel of CPUs cannot: a mask of `n * n` |
| `CachedAttention` | prefill and drawing: what a cache has of the samples is seen as well |
| `DecodeAttention` | a decode step: one new token behind each row of a cache |

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

from transfusion_pytorch.network.cache_views import CacheRun, CacheView, DecodeRun, DecodeView
from transfusion_pytorch.network.cpu.attention import PackedAttention
from transfusion_pytorch.network.cpu.products import product_dtype
from transfusion_pytorch.network.graphs import many_graphs
from transfusion_pytorch.network.grouped_heads import one_for_each_head
from transfusion_pytorch.network.precision import precise, without_autocast
from transfusion_pytorch.network.shortcuts import forces_plain_formulas
from transfusion_pytorch.sequence.blocks import BLOCK
from transfusion_pytorch.sequence.masks import Chunk, Intervals, Layout, Run

# of the forward pass, for heads of 64 in half precision: 2.8 times as fast there as what torch 2.11 chooses
HOPPER_TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}

Q = Shaped[Tensor, "n h e"]
KV = Shaped[Tensor, "n k e"]


class RaggedAttention(NamedTuple):
    """CPU only: the runs of a stream one after another, as one autograd node."""

    runs: Sequence[Run]

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        """What the queries gather; `layer` is that of the cache, if there is one."""
        if softcap is None:
            return PackedAttention.apply(q, k, v, self.runs)  # type: ignore[return-value]
        lengths = [run.tokens.stop - run.tokens.start for run in self.runs]
        split = (part.split(lengths) for part in (q, k, v))
        outs = []
        for run, q_run, k_run, v_run in zip(self.runs, *split, strict=True):
            if run.past is None:
                keys, values = run.batched(k_run), run.batched(v_run)
            else:  # slices, each of which has a gradient as long as the stream
                keys, values = run.keys(k), run.keys(v)
            outs.append(attend_chunks(run.chunks, run.batched(q_run), keys, values, softcap))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class FlexAttention(NamedTuple):
    """Flex attention over the whole stream. Inside a compiled layer all of its tensors are inputs of the graph."""

    intervals: Intervals
    is_hopper: bool = False

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        heads_first = (rearrange(part, "n h e -> 1 h n e") for part in (q, k, v))
        if not q.is_cuda:  # the code that is generated for CPUs does not know views
            heads_first = (part.contiguous() for part in heads_first)
        out = flex_kernel(q.is_cuda)(
            *heads_first,
            block_mask=self._block_mask(),
            score_mod=None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap),
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=HOPPER_TILES if self.is_hopper and q.shape[-1] <= 64 and q.element_size() == 2 else None,
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
        k, v = (one_for_each_head(q, part) for part in (k, v))
        with sdpa_kernel(SDPBackend.MATH) if self.differentiable else nullcontext():
            out = attend_masked(q, k, v, mask=self.mask, softcap=softcap)
        return rearrange(out, "1 h n e -> n h e")


class CachedAttention(NamedTuple):
    """The runs of a stream, each of which continues rows of the cache, where its keys and values are written."""

    cache: CacheView

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        runs = self.cache.runs
        if len(runs) == 1:
            return self._attend(runs[0], q, k, v, layer, softcap)
        outs = [self._attend(run, q[run.tokens], k[run.tokens], v[run.tokens], layer, softcap) for run in runs]
        return torch.cat(outs)

    def _attend(self, run: CacheRun, q: Tensor, k: Tensor, v: Tensor, layer: int, softcap: float | None) -> Tensor:
        keys, values = run.update(layer, k, v)
        return attend_chunks(run.chunks, run.batched(q), keys, values, softcap)


class DecodeAttention(NamedTuple):
    """One query for each row of the cache. All shapes are those of the view, and nothing is copied. `biases` say which
    keys the rows of each run may see.
    """

    cache: DecodeView
    biases: Sequence[Tensor]

    def attend(self, q: Q, k: KV, v: KV, *, layer: int = 0, softcap: float | None = None) -> Q:
        runs = list(zip(self.cache.runs, self.biases, strict=True))
        if len(runs) == 1:
            return self._attend(*runs[0], q, k, v, layer, softcap)
        outs = []
        for run, bias in runs:
            q_run, k_run, v_run = (part[run.tokens] for part in (q, k, v))
            outs.append(self._attend(run, bias, q_run, k_run, v_run, layer, softcap))
        return torch.cat(outs)

    def _attend(
        self, run: DecodeRun, bias: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: int, softcap: float | None
    ) -> Tensor:
        keys, values = run.update(layer, k, v)
        # query heads that share keys become queries of one head: (g, k, h / k, e), and no key is repeated
        queries = q.view(len(q), k.shape[1], -1, q.shape[-1])
        return attend_masked(queries, keys, values, mask=bias, softcap=softcap).reshape(q.shape)


AttentionPlan = RaggedAttention | FlexAttention | DenseAttention | CachedAttention | DecodeAttention
AttentionKind = Literal["auto", "flex", "dense", "ragged"]


def plan_attention(
    layout: Layout, cache: CacheView | DecodeView | None = None, *, kind: AttentionKind = "auto", trains: bool = False
) -> AttentionPlan:
    """The plan for a stream that continues the rows of a `cache`, or stands alone, on the device of the layout."""
    if cache is not None:
        if isinstance(cache, DecodeView):
            return DecodeAttention(cache, [run.bias() for run in cache.runs])
        return CachedAttention(cache)
    kind = choose_attention(kind, torch.device(layout.device).type, trains)
    if kind == "ragged":
        return RaggedAttention(layout.runs)
    intervals = layout.prepare(blocks=kind == "flex").intervals
    assert intervals is not None
    plain = forces_plain_formulas()
    if kind == "flex":
        return FlexAttention(intervals, is_hopper=_is_hopper(torch.device(layout.device)))
    return DenseAttention(intervals.dense(), differentiable=plain)


@lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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


def flex_kernel(is_cuda: bool) -> Callable[..., Tensor]:
    """A compiled layer takes it in. By itself it is compiled on a GPU only: on a CPU it is there to compare with."""
    return flex_attention if torch.compiler.is_compiling() else _eager_kernel(is_cuda)


@lru_cache(maxsize=2)
def _eager_kernel(is_cuda: bool) -> Callable[..., Tensor]:
    # not `dynamic=True`, which makes a symbol of the number in a softcap, and no kernel holds one
    return torch.compile(flex_attention, **many_graphs()) if is_cuda else _uncompiled_flex


def _uncompiled_flex(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **options)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool = False, softcap: float | None = None
) -> Tensor:
    """`(g, h, t, e)` each, with one key head for each query head. `mask` says which keys a query sees, or is added to
    the logits.

    `softcap` bounds the logits at `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118).
    """
    if k.dtype != q.dtype:  # those of a cache in another precision
        k, v = k.to(q.dtype), v.to(q.dtype)
        mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    dtype, kind = q.dtype, q.device.type
    q, k, v = (part.to(product_dtype(dtype, kind)) for part in (q, k, v))
    with without_autocast(kind):
        logits = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        return (logits.softmax(dim=-1, dtype=precise(dtype)).to(v.dtype) @ v).to(dtype)


def attend_chunks(chunks: Sequence[Chunk], q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    """Queries `(g, h, t, e)`, and `(g, k, s, e)` of the keys and values that they may see, to `(n, h, e)`.

    Query heads that share keys become queries of one head, and no key is repeated.
    """
    groups, outs = q.shape[1] // k.shape[1], []
    for queries, num_keys, is_causal, mask in chunks:
        is_whole, length = len(chunks) == 1, queries.stop - queries.start
        part = q if is_whole else q[:, :, queries]
        keys, values = (k, v) if is_whole else (k[:, :, :num_keys], v[:, :, :num_keys])
        if groups > 1:
            if is_causal:
                mask, is_causal = (
                    torch.ones(length, num_keys, dtype=torch.bool, device=q.device).tril()[None, None],
                    False,
                )
            mask = None if mask is None else mask.repeat(1, 1, groups, 1)
            part = rearrange(part, "g (k r) t e -> g k (r t) e", r=groups)
        out = attend_masked(part, keys, values, mask=mask, is_causal=is_causal, softcap=softcap)
        outs.append(rearrange(out, "g k (r t) e -> g (k r) t e", r=groups) if groups > 1 else out)
    whole = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return whole.transpose(1, 2).flatten(0, 1)  # in less time than `rearrange`, which counts when a span is denoised
