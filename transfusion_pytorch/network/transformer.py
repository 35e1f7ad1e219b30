"""The transformer trunk: packed tokens in, packed tokens out.

n tokens, d model, c condition.
"""

import warnings
from collections import Counter
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
from transfusion_pytorch.network.cpu.reordered import ReorderedWeights
from transfusion_pytorch.network.experts import (
    TEXT,
    RoutedAttention,
    Routing,
    readers_of,
    untied_layer,
    untied_parts,
)
from transfusion_pytorch.network.inference import PreparedLayers, has_plain_layers, run_layers
from transfusion_pytorch.network.layer import Layer, residual_connection
from transfusion_pytorch.network.norms import (
    AdaptiveNorm,
    AdaptivePlainNorm,
    Conditioning,
    NormKind,
    Reads,
    make_norm,
)
from transfusion_pytorch.network.precision import RMS_NORM_EPS
from transfusion_pytorch.network.shortcuts import forces_plain_formulas
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.positions import rotary_phases


@register_component
class Transformer(nn.Module):
    """The trunk that text and latents share.

    - `dim`, `depth`, `heads`, `dim_head`: as ever; `kv_heads` fewer than `heads` share keys and values (arXiv
      2305.13245)
    - `ff_expansion_factor`, `ff_kwargs` (`activation`: `"geglu"` or `"swiglu"`; `dim_hidden`, `bias`), `attn_kwargs`
      (`gate_values`, `softcap_value`, `qkv_bias`, `out_bias`)
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
    - `rotary_theta`: base of the rotary frequencies; or `rotary_frequencies`, radians per position of each pair of
      channels, and `rotary_amplitude` of both sines and cosines
    - `norm`: `"adaptive"` (layer norm that a span's condition scales and shifts, adaLN-Zero), `"rms"` (that of language
      models, which knows no condition), or `"adaptive_rms"` (the same, scaled and shifted by the condition from where
      it stands); `norm_eps` of the last two
    - `untied`: text and modalities have weights of their own (mixture of transformers, arXiv 2411.04996), True for all
      or some of `"attention"`, `"feedforward"` and `"norms"`. There are `num_experts`: the first is that of text,
      modality i has expert i + 1, or the last one. With 2, all modalities share theirs.
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
        rotary_frequencies: Sequence[float] | None = None,
        rotary_amplitude: float = 1.0,
        norm: NormKind = "adaptive",
        norm_eps: float = RMS_NORM_EPS,
        untied: bool | Sequence[str] = False,
        num_experts: int = 2,
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
        if rotary_frequencies is not None and len(rotary_frequencies) != dim_head // 2:
            raise ValueError(
                f"rotary_frequencies are {dim_head // 2}, one for each pair of channels of a head, got "
                f"{len(rotary_frequencies)}"
            )
        self.dim, self.depth, self.dim_head = dim, depth, dim_head
        self.rotary = Rotary(dim_head, rotary_theta, rotary_frequencies, rotary_amplitude)
        self.untied, self.num_experts = untied_parts(untied), num_experts
        if self.untied and num_experts < 2:
            raise ValueError(f"untied weights need num_experts of at least 2, got {num_experts}")
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.attention: AttentionKind = "auto" if use_flex_attn is None else "flex" if use_flex_attn else "ragged"
        self.gradient_checkpointing_enable(use_checkpoint)
        self.compile_options: dict[str, Any] | None = None
        connect, self.expand_streams, self.reduce_streams = get_init_and_expand_reduce_stream_functions(
            num_residual_streams, num_fracs=num_residual_fracs, dim=dim
        )
        attn = dict(dim_head=dim_head, heads=heads, kv_heads=kv_heads, qk_rmsnorm=qk_rmsnorm)
        attn |= dict(qk_norm=None if norm == "adaptive" else dict(eps=norm_eps, unit_offset=False))
        known = ("gate_values", "softcap_value", "qkv_bias", "out_bias")
        attn |= dict(laser=attn_laser) | _only("attn_kwargs", attn_kwargs, known)
        ff = dict(expansion_factor=ff_expansion_factor)
        ff |= _only("ff_kwargs", ff_kwargs, ("activation", "dim_hidden", "bias"))
        has_one_stream = num_residual_streams == num_residual_fracs == 1
        options: dict[str, Any] = dict(has_one_stream=has_one_stream, dropout=dropout, ff=ff)
        options |= dict(connect=partial(residual_connection, connect, num_residual_streams, num_residual_fracs))

        def make_layer(index: int, reads: Reads) -> Layer:
            return Layer(
                dim,
                index,
                make_norm=partial(make_norm, norm, dim, eps=norm_eps, reads=reads),
                has_skip=unet_skips and index >= (depth + 1) // 2,
                keeps_values=use_value_residual and index == 0,
                attn=attn | dict(value_residual=use_value_residual and index > 0),
                **options,
            )

        readers = readers_of(self.untied, num_experts)
        self.layers = nn.ModuleList(
            untied_layer([make_layer(index, reads) for reads in readers], self.untied)
            if self.untied
            else make_layer(index, "both")
            for index in range(depth)
        )
        last_norm = partial(make_norm, norm, dim, eps=norm_eps, has_gate=False)
        is_shared = "norms" not in self.untied
        self.final_norm = last_norm() if is_shared else nn.ModuleList(last_norm(reads=reads) for reads in readers)

    def forward(
        self,
        x: Float[Tensor, "n d"],
        *,
        position: Int[Tensor, " n"],
        layout: Layout,
        conditioning: Conditioning | None = None,
        routing: Routing | None = None,
        cache: CacheView | DecodeView | None = None,
        hidden_states: dict[int, Any] | None = None,
    ) -> Shaped[Tensor, "n d"]:
        """Runs a packed stream; with a `cache` its samples continue the rows of that.

        `position` are rotary positions, `conditioning` is that of the spans (None for text alone). `routing` says which
        expert reads which token, where weights are untied; without it all is text. Nothing is read from the device that
        computes. `hidden_states` is filled with the outputs `(n, d)` of the layers that are its keys, without a cache.
        """
        if cache is not None and not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            # A decode step is hundreds of tiny operations: without counting versions and views each takes less time.
            with torch.inference_mode():
                return self._run(x, position, layout, conditioning, routing, cache)
        return self._run(x, position, layout, conditioning, routing, cache, hidden_states)

    def _run(
        self,
        x: Float[Tensor, "n d"],
        position: Int[Tensor, " n"],
        layout: Layout,
        conditioning: Conditioning | None,
        routing: Routing | None,
        cache: CacheView | DecodeView | None,
        states: dict[int, Any] | None = None,
    ) -> Shaped[Tensor, "n d"]:
        trains = self.attention == "flex" and self._trains(x, conditioning)
        plan = plan_attention(layout.to(x.device), cache, kind=self.attention, trains=trains)
        expert = TEXT if routing is None else routing.only
        if routing is not None and expert == TEXT:
            conditioning = None  # of padding alone
        if expert is not None and cache is not None and (prepared := self._prepared_in(cache, expert)) is not None:
            if isinstance(cache, DecodeView):
                phases = cache.rotation()
            else:
                phases = cache.phases = self._phases(position) if cache.phases is None else cache.phases
            attention = cast(CachedAttention | DecodeAttention, plan)
            x = run_layers(
                x,
                prepared=prepared,
                conditioning=conditioning,
                phases=phases,
                plan=attention,
                compile_options=self.compile_options if self._compiles else None,
            )
            return self._normed(x, expert, conditioning)
        phases = self._phases(position, x.dtype)
        if conditioning is not None and self._adds_up_by_segments(plan):
            conditioning = conditioning.with_segments()
        if expert is not None:
            x = self._through(self.expand_streams(x), conditioning, phases, plan, states, expert=expert)
            return self._normed(self.reduce_streams(x), expert, conditioning)
        assert routing is not None
        assert conditioning is not None
        return self._through_experts(x, conditioning, routing, phases, plan, states)

    def _through(
        self, x: Any, conditioning: Any, phases: Any, plan: Any, states: Any, *, expert: int | None = None
    ) -> Any:
        """The residual streams behind all layers. Without the `expert` that reads all, everything comes in parts."""
        chosen = (expert,) if self.untied else ()
        call_layer = layer_caller(plan, self.use_checkpoint, self.compile_options)
        skips: list[Any] = []
        first_values = None
        for index, layer in enumerate(self.layers):
            skipped = None if layer.skip is None else skips.pop()
            x, values = call_layer(layer, x, skipped, first_values, conditioning, phases, plan, *chosen)
            first_values = values if first_values is None else first_values
            if states is not None and index in states:
                states[index] = self._joined(x, plan)
            if index < self.depth // 2:
                skips.append(x)
        return x

    def _joined(self, x: Any, plan: AttentionPlan | RoutedAttention) -> Tensor:
        """One vector for each token of the stream, from its residual streams."""
        if not isinstance(plan, RoutedAttention):
            return self.reduce_streams(x)
        return plan.routing.join([self.reduce_streams(x[i]) for i in plan.routing.taken])

    def _through_experts(
        self, x: Tensor, conditioning: Conditioning, routing: Routing, phases: Tensor, plan: AttentionPlan, states: Any
    ) -> Tensor:
        parts = tuple(self.expand_streams(part) for part in routing.split(x))
        conditionings, routed = routing.conditionings(conditioning), RoutedAttention(plan, routing)
        made = self._through(parts, conditionings, routing.split(phases), routed, states)
        parts = tuple(self.reduce_streams(part) for part in made)
        if "norms" not in self.untied:
            return self._normed(routing.join([parts[i] for i in routing.taken]), TEXT, conditioning)
        return routing.join([self._normed(parts[i], i, conditionings[i]) for i in routing.taken])

    def layers_of(self, expert: int) -> Any:
        """The layers that read the tokens of one expert."""
        return [layer.experts[expert] for layer in self.layers] if self.untied else self.layers  # type: ignore[union-attr]

    def expert_parameters(self) -> list[list[nn.Parameter]]:
        """The parameters that each expert has for itself alone."""
        norms = self.final_norm if isinstance(self.final_norm, nn.ModuleList) else [None] * self.num_experts
        parts = [nn.ModuleList([*self.layers_of(i), *([] if norm is None else [norm])]) for i, norm in enumerate(norms)]
        every = [list(part.parameters()) for part in parts]
        count = Counter(parameter for own in every for parameter in own)
        return [[parameter for parameter in own if count[parameter] == 1] for own in every]

    def _normed(self, x: Tensor, expert: int, conditioning: Conditioning | None) -> Tensor:
        """Through the last norm."""
        norm: Any = self.final_norm[expert] if isinstance(self.final_norm, nn.ModuleList) else self.final_norm
        return norm(x, norm.modulation(conditioning))

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
        models keep them. In steps of sampling attention stays outside: two graphs serve all layers. Raises
        `RuntimeError` under `TYPECHECK=1`, whose checks no graph can hold.

        On a CPU attention goes sample by sample and cannot be compiled; what lies between gained 0 to 9%. Layers stay
        as they are there, and a warning says so, unless `attention` is "flex" or "dense".
        """
        if hasattr(Layer.forward, "__wrapped__"):
            raise RuntimeError("a compiled graph cannot check types at run time; compile without TYPECHECK=1")
        self.compile_options = dict(fullgraph=True) | options
        if not self._may_compile:
            warnings.warn(
                "compile() changes nothing on a CPU, where attention goes sample by sample; to compile there as well, "
                "set `transformer.attention` to 'dense', or to 'flex' for inference",
                stacklevel=2,
            )

    @property
    def _compiles(self) -> bool:
        return self.compile_options is not None and self._may_compile

    @property
    def _may_compile(self) -> bool:
        return self._device.type != "cpu" or self.attention in ("flex", "dense")

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
        return CacheView(cache, rows, layout, prepared=None if has_text and has_spans else {})

    def decode_view(
        self,
        cache: KVCache,
        rows: Sequence[CacheRow],
        positions: Sequence[int],
        *,
        is_fixed: bool = False,
        reordered: ReorderedWeights | None = None,
    ) -> DecodeView:
        """For decode steps of these rows, which stand at the front of their blocks (`KVCache.gather`). `positions` are
        the rotary positions of their next tokens. See `DecodeView` for `is_fixed`; products are made with `reordered`
        weights where these serve.
        """
        most = max(positions) + max(KEYS_AT_ONCE, *(row.block.capacity for row in rows))
        if cache.phases is None or len(cache.phases) < most:
            cache.phases = self._phases(torch.arange(1 << (most - 1).bit_length(), device=cache.device))
        prepared = self._prepared(TEXT, None if self._compiles else reordered, len(rows))
        return DecodeView(
            cache,
            rows,
            positions,
            cache.phases,
            prepared=None if prepared is None else {TEXT: prepared},
            is_fixed=is_fixed,
        )

    def _phases(self, position: Int[Tensor, " n"], dtype: torch.dtype | None = None) -> Float[Tensor, "n f 2"]:
        return self.rotary.phases(position, self._dtype if dtype is None else dtype)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        """That of its norms, which stay as they are where linear layers are quantised."""
        norm: Any = self.final_norm[TEXT] if isinstance(self.final_norm, nn.ModuleList) else self.final_norm
        return next(norm.parameters()).dtype

    def _prepared(self, expert: int, reordered: ReorderedWeights | None = None, rows: int = 0) -> PreparedLayers | None:
        """For the shorter way through the layers, where that is possible (`inference.py`)."""
        kind, layers = self._device.type, self.layers_of(expert)
        is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
        return None if is_cast or not has_plain_layers(layers) else PreparedLayers.of(layers, reordered, rows)

    def _prepared_in(self, cache: CacheView | DecodeView, expert: int) -> PreparedLayers | None:
        """What a view keeps of the layers of this expert; None where a pass goes the ordinary way."""
        if cache.prepared is None:
            return None
        if expert not in cache.prepared:
            cache.prepared[expert] = self._prepared(expert)
        return cache.prepared[expert]

    def create_cache(self, *, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache."""
        return KVCache(layers=self.depth, kv_heads=self.kv_heads, dim_head=self.dim_head, device=device, dtype=dtype)


def as_trunk(transformer: Any, *, num_modalities: int = 1) -> Any:
    """A `Transformer` of these arguments, or a module that is called as one. Untied weights are those of text and of
    each modality, unless `num_experts` says otherwise.
    """
    if isinstance(transformer, Mapping):
        return Transformer(**{"num_experts": num_modalities + 1, **transformer})
    if not isinstance(transformer, nn.Module) or not isinstance(getattr(transformer, "dim", None), int):
        raise TypeError(
            "transformer must be a dict of Transformer arguments, or a module that has its width as `dim`, "
            f"got {type(transformer).__name__}"
        )
    return transformer


class Rotary:
    """Rotary phases of a model: frequencies by their base, or given one by one.

    Given ones are uploaded once to each device, and are no buffer, which would be rounded with the parameters.
    """

    def __init__(self, dim_head: int, theta: float, frequencies: Sequence[float] | None, amplitude: float):
        self.dim_head, self.theta, self.amplitude = dim_head, theta, amplitude
        self.frequencies = None if frequencies is None else tuple(map(float, frequencies))
        self._on_device: dict[torch.device, Tensor] = {}

    def phases(self, position: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n f 2"]:
        device, frequencies = position.device, None
        if self.frequencies is not None:
            if device not in self._on_device:
                self._on_device[device] = torch.tensor(self.frequencies, dtype=torch.float64, device="cpu").to(device)
            frequencies = self._on_device[device]
        phases = rotary_phases(position, self.dim_head, theta=self.theta, frequencies=frequencies, dtype=dtype)
        return phases if self.amplitude == 1 else phases * self.amplitude


def check_trunk(transformer: nn.Module, num_modalities: int, time_conditioning: str) -> None:
    """Raises `ValueError` where a `Transformer` does not fit its model."""
    if not isinstance(transformer, Transformer):
        return
    if transformer.untied and transformer.num_experts > num_modalities + 1:
        raise ValueError(
            f"the transformer has num_experts={transformer.num_experts}, but text and modalities of dim_latent are "
            f"{num_modalities + 1}: the others would never read a token"
        )
    has_conditions = any(isinstance(module, AdaptiveNorm | AdaptivePlainNorm) for module in transformer.modules())
    if time_conditioning == "norms" and not has_conditions:
        raise ValueError(
            "a transformer with norm='rms' does not tell spans their time: choose time_conditioning='added', 'token' "
            "or 'output', or norm='adaptive_rms'"
        )


def _only(name: str, given: Mapping[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    if wrong := [key for key in given or {} if key not in known]:
        raise ValueError(f"{name} takes {', '.join(known)}, got {', '.join(wrong)}; the rest has arguments of its own")
    return dict(given or {})
