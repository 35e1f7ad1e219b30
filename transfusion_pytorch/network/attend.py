"""What each token gathers from the keys it may see. One plan for a forward pass serves all layers.

| plan | where |
|---|---|
| `RaggedAttention` | a CPU: sample by sample, no padding |
| `FlexAttention` | CUDA: one kernel over the whole stream |
| `DenseAttention` | any other device, and wherever flex attention or the kernel of CPUs cannot: a mask of `n * n` |
| `CachedAttention` | decoding: what a cache has of the samples is seen as well |

n tokens, h query heads, k key/value heads, e channels of a head.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from transfusion_pytorch.network.cache import CacheView
from transfusion_pytorch.network.cpu.attention import PackedAttention
from transfusion_pytorch.network.sdpa import attend_masked, attend_run, batched, one_for_each_head
from transfusion_pytorch.network.shortcuts import forces_plain_formulas
from transfusion_pytorch.sequence.blocks import BLOCK
from transfusion_pytorch.sequence.masks import Intervals, Layout, Run

Heads = Shaped[Tensor, "n h e"]
SharedHeads = Shaped[Tensor, "n k e"]


class RaggedAttention(NamedTuple):
    """CPU only: the runs of a stream one after another, as one autograd node."""

    runs: Sequence[Run]

    def attend(
        self, q: Heads, k: SharedHeads, v: SharedHeads, *, layer: int = 0, softcap: float | None = None
    ) -> Heads:
        """What the queries gather; `layer` is that of the cache, if there is one."""
        if softcap is None:
            k, v = (one_for_each_head(q, part) for part in (k, v))
            return PackedAttention.apply(q, k, v, self.runs)  # type: ignore[return-value]
        lengths = [run.tokens.stop - run.tokens.start for run in self.runs]
        split = (part.split(lengths) for part in (q, k, v))
        outs = [
            attend_run(run, *(batched(part, run) for part in parts), softcap)
            for run, *parts in zip(self.runs, *split, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class FlexAttention(NamedTuple):
    """Flex attention over the whole stream. Inside a compiled layer all of its tensors are inputs of the graph."""

    intervals: Intervals

    def attend(
        self, q: Heads, k: SharedHeads, v: SharedHeads, *, layer: int = 0, softcap: float | None = None
    ) -> Heads:
        heads_first = (rearrange(part, "n h e -> 1 h n e") for part in (q, k, v))
        if q.device.type == "cpu":  # whose generated code does not know views
            heads_first = (part.contiguous() for part in heads_first)
        out = _flex_kernel(q.device.type)(
            *heads_first,
            block_mask=self._block_mask(),
            score_mod=None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return rearrange(out, "1 h n e -> n h e")

    def _block_mask(self) -> BlockMask:
        n, blocks = len(self.intervals.end), self.intervals.blocks
        assert blocks is not None
        tables = {name: table[None, None] for name, table in zip(blocks._fields, blocks, strict=True)}
        return BlockMask(seq_lengths=(n, n), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=self.intervals.mask_mod(), **tables)


class DenseAttention(NamedTuple):
    """The definition: every query against every key of the stream, and a mask.

    `differentiable` leaves out fused kernels, which have one derivative.
    """

    mask: Bool[Tensor, "n n"]
    differentiable: bool = False

    def attend(
        self, q: Heads, k: SharedHeads, v: SharedHeads, *, layer: int = 0, softcap: float | None = None
    ) -> Heads:
        q, k, v = (rearrange(part, "n h e -> 1 h n e") for part in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH) if self.differentiable else nullcontext():
            out = attend_masked(q, k, v, mask=self.mask, softcap=softcap)
        return rearrange(out, "1 h n e -> n h e")


class CachedAttention(NamedTuple):
    """The runs of a stream, each of which continues rows of the cache, where its keys and values are written."""

    cache: CacheView

    def attend(
        self, q: Heads, k: SharedHeads, v: SharedHeads, *, layer: int = 0, softcap: float | None = None
    ) -> Heads:
        outs = []
        for index, run in enumerate(self.cache.runs):
            q_run, k_run, v_run = (batched(part[run.tokens], run) for part in (q, k, v))
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
    kind = choose_attention(kind, torch.device(layout.device).type, trains=lambda: trains)
    if kind == "ragged":
        return RaggedAttention(layout.runs)
    intervals = layout.prepare(blocks=kind == "flex").intervals
    assert intervals is not None
    if kind == "flex":
        return FlexAttention(intervals)
    return DenseAttention(intervals.dense(), differentiable=forces_plain_formulas())


def choose_attention(kind: AttentionKind, device_type: str, *, trains: Callable[[], bool]) -> AttentionKind:
    """Where "auto" leads on a device, and what stands in for what it does not have.

    | device | "auto" | "flex" | "ragged" | inside of `plain_formulas()` |
    |---|---|---|---|---|
    | CPU | ragged | flex in inference, ragged in training (torch has no backward) | ragged | dense |
    | CUDA | flex | flex | dense | dense |
    | others | dense | dense | dense | dense |
    """
    if forces_plain_formulas() or kind == "dense":
        return "dense"
    if device_type == "cuda":
        return "dense" if kind == "ragged" else "flex"
    if device_type != "cpu":
        return "dense"
    if kind == "flex" and trains():
        _say_flex_fallback()
    return "flex" if kind == "flex" and not trains() else "ragged"


@lru_cache(maxsize=1)
def _say_flex_fallback() -> None:
    warnings.warn(
        "use_flex_attn: torch has no backward of flex attention on this device, so training uses SDPA (same masks)",
        stacklevel=3,
    )


@lru_cache(maxsize=1)
def _compiled_kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def _flex_kernel(device_type: str) -> Callable[..., Tensor]:
    """A compiled layer takes it in; by itself it is compiled on a GPU. On a CPU the eager form is there to compare
    with, and would be compiled anew for every shape.
    """
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled_kernel() if device_type == "cuda" else _eager_flex


def _eager_flex(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **options)
