"""The transformer trunk: packed tokens in, packed tokens out.

n tokens, d model, c condition.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from hyper_connections import get_init_and_expand_reduce_stream_functions
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.attend import (
    AttentionKind,
    AttentionPlan,
    CachedAttention,
    DecodeAttention,
    RaggedAttention,
    plan_attention,
)
from transfusion_pytorch.network.cache import CacheRow, KVCache
from transfusion_pytorch.network.cache_views import KEYS_AT_ONCE, CacheView, DecodeView
from transfusion_pytorch.network.compile import Checkpointing, layer_caller
from transfusion_pytorch.network.inference import PreparedLayers, has_plain_layers, run_layers
from transfusion_pytorch.network.layer import Layer, residual_connection
from transfusion_pytorch.network.norms import AdaptiveNorm, Conditioning
from transfusion_pytorch.network.shortcuts import forces_plain_formulas
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.positions import rotary_phases


@register_component
class Transformer(nn.Module):
    """The trunk that text and latents share.

    - `dim`, `depth`, `heads`, `dim_head`: as ever; `kv_heads` fewer than `heads` share keys and values (arXiv
      2305.13245)
    - `ff_expansion_factor`, `ff_kwargs` (`activation`: `"geglu"` or `"swiglu"`), `attn_kwargs` (`gate_values`,
      `softcap_value`)
    - `dropout`: of what every branch adds, and inside the feedforward
    - `attn_laser`, `qk_rmsnorm`, `use_value_residual`: see `Attention`; values are mixed with the first layer's
    - `unet_skips`: the second half of the layers also reads what the first half wrote, innermost first (U-ViT, arXiv
      2209.12152)
    - `num_residual_streams`, `num_residual_fracs`: hyper-connections (arXiv 2409.19606) and frac-connections (arXiv
      2503.14125)
    - `use_checkpoint`: layers are computed again in the backward pass instead of being remembered; `"selective"` keeps
      matrix products and the outputs of attention, and computes only the cheap rest again
    - `use_flex_attn`: None chooses attention by the device (flex attention on CUDA), True asks for flex attention
      everywhere, False for none. The attribute `attention` ("auto", "flex", "dense" or "ragged") can be changed later;
      see `choose_attention`
    - `rotary_theta`: base of the rotary frequencies
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        ff_expansion_factor: float = 4,
        attn_kwargs: Mapping[str, Any] | None = None,
        ff_kwargs: Mapping[str, Any] | None = None,
        attn_laser: bool = False,
        unet_skips: bool = True,
        use_flex_attn: bool | None = None,
        qk_rmsnorm: bool = True,
        use_value_residual: bool = False,
        num_residual_streams: int = 1,
        num_residual_fracs: int = 1,
        use_checkpoint: Checkpointing = False,
        rotary_theta: float = 10_000.0,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("depth", depth), ("heads", heads), ("dim_head", dim_head)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if num_residual_streams < 1 or num_residual_fracs < 1 or dim % num_residual_fracs:
            raise ValueError(
                "num_residual_streams and num_residual_fracs must be positive, and dim a multiple of the latter, "
                f"got {dim}, {num_residual_streams} and {num_residual_fracs}"
            )
        self.dim, self.depth, self.dim_head, self.rotary_theta = dim, depth, dim_head, rotary_theta
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.attention: AttentionKind = "auto" if use_flex_attn is None else "flex" if use_flex_attn else "ragged"
        self.gradient_checkpointing_enable(use_checkpoint)
        self.compile_options: dict[str, Any] | None = None
        connect, self.expand_streams, self.reduce_streams = get_init_and_expand_reduce_stream_functions(
            num_residual_streams, num_fracs=num_residual_fracs, dim=dim
        )
        attn = dict(dim_head=dim_head, heads=heads, kv_heads=kv_heads, qk_rmsnorm=qk_rmsnorm)
        attn |= dict(laser=attn_laser) | _only("attn_kwargs", attn_kwargs, ("gate_values", "softcap_value"))
        ff = dict(expansion_factor=ff_expansion_factor) | _only("ff_kwargs", ff_kwargs, ("activation",))
        self.layers = nn.ModuleList(
            Layer(
                dim,
                index,
                connect=partial(residual_connection, connect, num_residual_streams, num_residual_fracs),
                has_one_stream=num_residual_streams == num_residual_fracs == 1,
                has_skip=unet_skips and index >= (depth + 1) // 2,
                keeps_values=use_value_residual and index == 0,
                dropout=dropout,
                attn=attn | dict(value_residual=use_value_residual and index > 0),
                ff=ff,
            )
            for index in range(depth)
        )
        self.final_norm = AdaptiveNorm(dim, dim, has_gate=False)

    def forward(
        self,
        x: Float[Tensor, "n d"],
        *,
        position: Int[Tensor, " n"],
        layout: Layout,
        conditioning: Conditioning | None = None,
        cache: CacheView | DecodeView | None = None,
    ) -> Shaped[Tensor, "n d"]:
        """Runs a packed stream; with a `cache` its samples continue the rows of that.

        `position` are rotary positions, `conditioning` is that of the spans (None for text alone). Nothing is read from
        the device that computes.
        """
        if cache is not None and not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            # A decode step is hundreds of tiny operations: without counting versions and views each takes less time.
            with torch.inference_mode():
                return self._run(x, position, layout, conditioning, cache)
        return self._run(x, position, layout, conditioning, cache)

    def _run(
        self,
        x: Float[Tensor, "n d"],
        position: Int[Tensor, " n"],
        layout: Layout,
        conditioning: Conditioning | None,
        cache: CacheView | DecodeView | None,
    ) -> Shaped[Tensor, "n d"]:
        trains = self.attention == "flex" and self._trains(x, conditioning)
        plan = plan_attention(layout.to(x.device), cache, kind=self.attention, trains=trains)
        if cache is not None and cache.prepared is not None:
            if isinstance(cache, DecodeView):
                phases = cache.rotation()
            else:
                phases = cache.phases = self._phases(position) if cache.phases is None else cache.phases
            prepared, attention = cache.prepared, cast(CachedAttention | DecodeAttention, plan)
            x = run_layers(self.layers, x, prepared=prepared, conditioning=conditioning, phases=phases, plan=attention)
            return self.final_norm(x, self.final_norm.modulation(conditioning))
        phases = self._phases(position, x.dtype)
        call_layer = layer_caller(plan, self.use_checkpoint, self.compile_options)
        if conditioning is not None and self._adds_up_by_segments(plan):
            conditioning = conditioning.with_segments()

        x = self.expand_streams(x)
        skips: list[Tensor] = []
        first_values = None
        for index, layer in enumerate(self.layers):
            skipped = None if layer.skip is None else skips.pop()
            x, values = call_layer(layer, x, skipped, first_values, conditioning, phases, plan)
            first_values = values if first_values is None else first_values
            if index < self.depth // 2:
                skips.append(x)
        return self.final_norm(self.reduce_streams(x), self.final_norm.modulation(conditioning))

    def _adds_up_by_segments(self, plan: AttentionPlan) -> bool:
        """Whether gradients of looked-up tables are wanted in the form for a GPU."""
        return torch.is_grad_enabled() and not forces_plain_formulas() and not isinstance(plan, RaggedAttention)

    def _trains(self, x: Tensor, conditioning: Conditioning | None) -> bool:
        inputs = (x, *self.parameters(), *(() if conditioning is None else (conditioning.spans,)))
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)

    def compile(self, **options: Any) -> None:
        """From now on layers run compiled, with flex or dense attention inside: one graph for each kind of layer.

        Graphs are made when they are first needed, and serve all batches of one number of tokens and of spans: pad
        batches to a budget. `options` are those of `torch.compile`; by default `fullgraph=True`. Copies and pickled
        models keep them. Steps of decoding are not compiled. Raises `RuntimeError` under `TYPECHECK=1`, whose checks no
        graph can hold.

        On a CPU attention goes sample by sample and cannot be compiled; what lies between gained 0 to 9%. Layers stay
        as they are there, and a warning says so, unless `attention` is "flex" or "dense".
        """
        if hasattr(Layer.forward, "__wrapped__"):
            raise RuntimeError("a compiled graph cannot check types at run time; compile without TYPECHECK=1")
        self.compile_options = dict(fullgraph=True) | options
        if self.final_norm.text_scale.device.type == "cpu" and self.attention in ("auto", "ragged"):
            warnings.warn(
                "compile() changes nothing on a CPU, where attention goes sample by sample; to compile there as well, "
                "set `transformer.attention` to 'dense', or to 'flex' for inference",
                stacklevel=2,
            )

    def gradient_checkpointing_enable(self, mode: Checkpointing = True) -> None:
        """See `use_checkpoint`."""
        if mode not in (True, False, "selective"):
            raise ValueError(f"use_checkpoint must be True, False or 'selective', got {mode!r}")
        self.use_checkpoint: Checkpointing = mode

    def gradient_checkpointing_disable(self) -> None:
        self.use_checkpoint = False

    def cache_view(
        self, cache: KVCache, rows: Sequence[CacheRow], layout: Layout, *, has_text: bool, has_spans: bool
    ) -> CacheView:
        """For forward passes over a stream whose samples continue these rows."""
        return CacheView(cache, rows, layout, prepared=None if has_text and has_spans else self._prepared())

    def decode_view(
        self, cache: KVCache, rows: Sequence[CacheRow], positions: Sequence[int], *, is_fixed: bool = False
    ) -> DecodeView:
        """For decode steps of these rows, which stand at the front of their blocks (`KVCache.gather`). `positions` are
        the rotary positions of their next tokens. See `DecodeView` for `is_fixed`.
        """
        most = max(positions) + max(KEYS_AT_ONCE, *(row.block.capacity for row in rows))
        if cache.phases is None or len(cache.phases) < most:
            cache.phases = self._phases(torch.arange(1 << (most - 1).bit_length(), device=cache.device))
        return DecodeView(cache, rows, positions, cache.phases, prepared=self._prepared(), is_fixed=is_fixed)

    def _phases(self, position: Int[Tensor, " n"], dtype: torch.dtype | None = None) -> Float[Tensor, "n f 2"]:
        dtype = self.final_norm.text_scale.dtype if dtype is None else dtype
        return rotary_phases(position, self.dim_head, theta=self.rotary_theta, dtype=dtype)

    def _prepared(self) -> PreparedLayers | None:
        """For the shorter way through the layers, where that is possible (`inference.py`)."""
        kind = self.final_norm.text_scale.device.type
        is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
        return None if is_cast or not has_plain_layers(self.layers) else PreparedLayers.of(self.layers)

    def create_cache(self, *, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache."""
        return KVCache(layers=self.depth, kv_heads=self.kv_heads, dim_head=self.dim_head, device=device, dtype=dtype)


def as_trunk(transformer: Any) -> Any:
    """A `Transformer` of these arguments, or a module that is called as one."""
    if isinstance(transformer, Mapping):
        return Transformer(**transformer)
    if not isinstance(transformer, nn.Module) or not isinstance(getattr(transformer, "dim", None), int):
        raise TypeError(
            "transformer must be a dict of Transformer arguments, or a module that has its width as `dim`, "
            f"got {type(transformer).__name__}"
        )
    return transformer


def _only(name: str, given: Mapping[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    if wrong := [key for key in given or {} if key not in known]:
        raise ValueError(f"{name} takes {', '.join(known)}, got {', '.join(wrong)}; the rest has arguments of its own")
    return dict(given or {})
