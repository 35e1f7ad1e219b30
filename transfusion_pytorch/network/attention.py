"""Attention over a packed stream: the backends, and the module around them.

n tokens, d model, h query heads, k key/value heads, e channels of a head, g samples of one length t.
"""

import warnings
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Shaped
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from transfusion_pytorch.network.cache import CacheView
from transfusion_pytorch.network.norms import RMSNorm, rms_normalize
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.positions import rotate

LASER_LIMIT = 10.0  # values are squashed to +-10 before the exponential, which float16 still holds


def attend(
    q: Shaped[Tensor, "n h e"],
    k: Shaped[Tensor, "n k e"],
    v: Shaped[Tensor, "n k e"],
    layout: Layout,
    *,
    cache: CacheView | None = None,
    layer: int = 0,
    softcap: float | None = None,
    flex: bool = False,
) -> Shaped[Tensor, "n h e"]:
    """What each token gathers from the keys it may see, its row of the `cache` included.

    `flex` asks for flex attention. It serves whole streams; steps that continue a cache are a query or a span each
    and go through SDPA. `softcap` bounds the logits at `softcap * tanh(logits / softcap)` (Gemma 2, arXiv
    2408.00118).
    """
    if cache is None and flex and flex_is_possible(q, k, v):
        return _attend_flex(q, k, v, layout, softcap)
    outs = []
    for index, run in enumerate(layout.runs if cache is None else cache.runs):
        split = partial(rearrange, pattern="(g t) h e -> g h t e", g=run.samples.stop - run.samples.start)
        q_run, k_run, v_run = (split(part[run.tokens]) for part in (q, k, v))
        if cache is not None:
            k_run, v_run = cache.update(layer, index, k_run, v_run)
        for chunk in run.chunks:
            keys, values = k_run[:, :, : chunk.num_keys], v_run[:, :, : chunk.num_keys]
            out = _attend_dense(q_run[:, :, chunk.queries], keys, values, chunk.mask, chunk.is_causal, softcap)
            outs.append((out, len(run.chunks)))
    return _join(outs)


def _join(outs: list[tuple[Tensor, int]]) -> Tensor:
    """Chunks of one run follow each other along t, runs along n."""
    packed, i = [], 0
    while i < len(outs):
        chunks = outs[i][1]
        run = [out for out, _ in outs[i : i + chunks]]
        packed.append(rearrange(torch.cat(run, dim=2) if chunks > 1 else run[0], "g h t e -> (g t) h e"))
        i += chunks
    return torch.cat(packed) if len(packed) > 1 else packed[0]


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, softcap: float | None
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=is_causal)
    logits = q @ k.to(q.dtype).mT * q.shape[-1] ** -0.5
    logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1) @ v.to(q.dtype)


def flex_is_possible(*inputs: Tensor) -> bool:
    """On a CPU torch has no backward for flex attention: training falls back to SDPA, and says so once."""
    if inputs[0].is_cuda or not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return True
    _say_flex_fallback()
    return False


@lru_cache(maxsize=1)
def _say_flex_fallback() -> None:
    warnings.warn(
        "use_flex_attn: torch has no backward of flex attention on this device, so training uses SDPA (same masks)",
        stacklevel=3,
    )


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, softcap: float | None) -> Tensor:
    heads_first = partial(rearrange, pattern="n h e -> 1 h n e")
    out = _flex_kernel(q.is_cuda)(
        *map(heads_first, (q, k, v)),
        block_mask=_block_mask(layout),
        score_mod=None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return rearrange(out, "1 h n e -> n h e")


def _block_mask(layout: Layout):
    """Made once for a layout, and kept on it for the other layers."""
    if "block_mask" not in layout.__dict__:
        n = len(layout.end)
        layout.__dict__["block_mask"] = create_block_mask(
            layout.mask_mod(), None, None, n, n, device=str(layout.device)
        )
    return layout.__dict__["block_mask"]


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


class Attention(nn.Module):
    """Multi-head attention with rotary positions, grouped key/value heads, and options.

    - `qk_rmsnorm`: queries and keys are normalised before they are turned (arXiv 2302.05442)
    - `gate_values`: each head's output is scaled by a sigmoid of the token (arXiv 2505.06708)
    - `value_residual`: values are mixed with those of the first layer (arXiv 2410.17897)
    - `laser`: values attend as exponentials, and the logarithm is taken after (arXiv 2411.03493)
    - `softcap_value`: bounds the attention logits
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        qk_rmsnorm: bool = True,
        gate_values: bool = True,
        value_residual: bool = False,
        laser: bool = False,
        softcap_value: float | None = None,
        use_flex_attn: bool = False,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if dim_head % 2:
            raise ValueError(f"dim_head must be even for rotary positions, got {dim_head}")
        if softcap_value is not None and softcap_value <= 0:
            raise ValueError(f"softcap_value must be positive, got {softcap_value}")
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.laser, self.softcap, self.use_flex_attn = laser, softcap_value, use_flex_attn
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.q_norm = RMSNorm(dim_head) if qk_rmsnorm else None
        self.k_norm = RMSNorm(dim_head) if qk_rmsnorm else None
        self.to_gates = nn.Linear(dim, heads) if gate_values else None
        self.to_value_mix = nn.Linear(dim, kv_heads) if value_residual else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        x: Shaped[Tensor, "n d"],
        *,
        phases: Complex[Tensor, "n f"],
        layout: Layout,
        first_values: Float[Tensor, "n k e"] | None = None,
        cache: CacheView | None = None,
        layer: int = 0,
    ) -> tuple[Shaped[Tensor, "n d"], Shaped[Tensor, "n k e"]]:
        """The output, and the values of this layer for the value residual of later ones."""
        qkv = rearrange(self.to_qkv(x), "n (h e) -> n h e", e=self.dim_head)
        q_and_k, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        own_values = v
        if self.q_norm is not None and self.k_norm is not None:
            gain = torch.cat((self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)))
            q_and_k = rms_normalize(q_and_k) * (1 + gain).to(q_and_k.dtype)
        q, k = rotate(q_and_k, phases).split((self.heads, self.kv_heads), dim=1)
        if self.to_value_mix is not None and first_values is not None:
            v = torch.lerp(v, first_values, self.to_value_mix(x).sigmoid()[..., None].to(v.dtype))
        if self.laser:
            v = torch.exp(LASER_LIMIT * torch.tanh(v / LASER_LIMIT))
        # autocast on a GPU gives norms and exponentials back in single precision, and kernels want one type
        q, k, v = (part.to(qkv.dtype) for part in (q, k, v))
        out = attend(q, k, v, layout, cache=cache, layer=layer, softcap=self.softcap, flex=self.use_flex_attn)
        if self.laser:
            out = out.clamp(min=torch.finfo(out.dtype).tiny).log()
        if self.to_gates is not None:
            out = out * self.to_gates(x).sigmoid()[..., None]
        return self.to_out(rearrange(out, "n h e -> n (h e)")), own_values
