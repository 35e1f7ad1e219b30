"""The transformer trunk: packed tokens in, packed tokens out.

n tokens, d model, c condition.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from hyper_connections import get_init_and_expand_reduce_stream_functions
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfusion_pytorch.network.attend import AttentionPlan, plan_attention
from transfusion_pytorch.network.attention import Attention
from transfusion_pytorch.network.cache import CacheView, KVCache
from transfusion_pytorch.network.fused import ACTIVATIONS, gated_activation, gated_linear
from transfusion_pytorch.network.norms import AdaptiveNorm, Conditioning, Modulation
from transfusion_pytorch.network.upcast import Linear, is_untouched, linear
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.positions import rotary_phases

MOST_GRAPHS = 256  # of all models together; torch's own limit of 8 is less than one model has
HIDDEN_MULTIPLE = 16  # products of rows that end where vector registers do are up to a quarter faster
HIDDEN_MATRICES = ("to_qkv.weight", "to_hidden.weight", "to_out.weight")


class FeedForward(nn.Module):
    """A gated feedforward (GLU variants, arXiv 2002.05202) with two thirds of the plain one's width, for equal
    parameters, rounded up to a multiple of 16.
    """

    def __init__(self, dim: int, *, expansion_factor: float = 4, activation: str = "geglu", dropout: float = 0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = dim * expansion_factor * 2 / 3
        if hidden < 1:
            raise ValueError(f"expansion_factor must be positive, and not so small, got {expansion_factor}")
        hidden = HIDDEN_MULTIPLE * ceil(round(hidden / HIDDEN_MULTIPLE, 6))  # 528.0000000000001 is 528
        self.activation = activation
        self.to_hidden = Linear(dim, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.to_out = Linear(hidden, dim)

    def forward(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        hidden = self.to_hidden(x)
        if is_untouched(self.dropout, nn.Dropout) and not (self.dropout.training and self.dropout.p > 0):
            return gated_linear(hidden, self.activation, self.to_out)
        return self.to_out(self.dropout(gated_activation(hidden, self.activation)))


class Layer(nn.Module):
    """Attention and feedforward, each behind an adaptive norm and in front of a gated residual."""

    def __init__(
        self, dim: int, index: int, *, connect, is_plain: bool, skips: bool, dropout: float, attn: Mapping, ff: Mapping
    ):
        super().__init__()
        self.index, self.is_plain = index, is_plain
        self.skip = Linear(2 * dim, dim, bias=False) if skips else None
        self.attn_norm, self.ff_norm = AdaptiveNorm(dim, dim), AdaptiveNorm(dim, dim)
        self.attn, self.ff = Attention(dim, **attn), FeedForward(dim, dropout=dropout, **ff)
        self.attn_residual, self.ff_residual = connect(layer_index=index), connect(layer_index=index)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Shaped[Tensor, "s d"],
        skipped: Shaped[Tensor, "s d"] | None,
        first_values: Shaped[Tensor, "n k e"] | None,
        conditioning: Conditioning | None,
        phases: Float[Tensor, "n f 2"],
        plan: AttentionPlan,
    ) -> tuple[Shaped[Tensor, "s d"], Shaped[Tensor, "n k e"]]:
        if self.skip is not None and skipped is not None:
            x = self._add_skipped(x, skipped)

        branch, add_residual = self.attn_residual(x)
        modulation = self.attn_norm.modulation(conditioning)
        out, values = self.attn(
            self.attn_norm(branch, modulation),
            phases=phases,
            plan=plan,
            first_values=first_values,
            layer=self.index,
        )
        x = self._add(x, add_residual, self.dropout(out), modulation)

        branch, add_residual = self.ff_residual(x)
        modulation = self.ff_norm.modulation(conditioning)
        out = self.ff(self.ff_norm(branch, modulation))
        return self._add(x, add_residual, self.dropout(out), modulation), values

    def _add(self, x: Tensor, add_residual: Callable, out: Tensor, modulation: Modulation) -> Tensor:
        """`add_residual(gate out)`, in one pass over memory where that is a plain sum."""
        return modulation.add_gated(x, out) if self.is_plain else add_residual(modulation.gated(out))

    def _add_skipped(self, x: Tensor, skipped: Tensor) -> Tensor:
        """`x + W [x; skipped]` without copying the two behind each other."""
        assert self.skip is not None
        from_x, from_skipped = self.skip.weight.chunk(2, dim=1)
        return x + linear(x, from_x) + linear(skipped, from_skipped)


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
    - `use_checkpoint`: layers are computed again in the backward pass instead of being remembered
    - `use_flex_attn`: flex attention for whole streams (see `attend`)
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
        use_flex_attn: bool = False,
        qk_rmsnorm: bool = True,
        use_value_residual: bool = False,
        num_residual_streams: int = 1,
        num_residual_fracs: int = 1,
        use_checkpoint: bool = False,
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
        self.use_checkpoint, self.use_flex_attn = use_checkpoint, use_flex_attn
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
                connect=partial(_connect, connect, num_residual_streams, num_residual_fracs),
                is_plain=num_residual_streams == num_residual_fracs == 1,
                skips=unet_skips and index >= (depth + 1) // 2,
                dropout=dropout,
                attn=attn | dict(value_residual=use_value_residual and index > 0),
                ff=ff,
            )
            for index in range(depth)
        )
        self.final_norm = AdaptiveNorm(dim, dim, gated=False)

    def forward(
        self,
        x: Float[Tensor, "n d"],
        *,
        position: Int[Tensor, " n"],
        layout: Layout,
        conditioning: Conditioning | None = None,
        cache: CacheView | None = None,
    ) -> Shaped[Tensor, "n d"]:
        """Runs a packed stream; with a `cache` its samples continue the rows of that.

        `position` are rotary positions, `conditioning` tells spans their time (None for text alone).
        """
        options = None if torch.compiler.is_compiling() else self.compile_options
        trains = self.use_flex_attn and self._trains(x, conditioning)
        plan = plan_attention(layout, cache, flex=self.use_flex_attn, trains=trains, compiled=options is not None)
        phases = rotary_phases(position, self.dim_head, theta=self.rotary_theta, dtype=x.dtype)
        if options is None:
            return self.run_layers(x, phases, plan, conditioning)
        if conditioning is not None and len(conditioning.spans) == 1:
            conditioning = _with_another(conditioning, len(x))
        _mark_sizes(x, phases, plan, conditioning)
        return _compiled(type(self).run_layers, options)(self, x, phases, plan, conditioning)

    def _trains(self, x: Tensor, conditioning: Conditioning | None) -> bool:
        inputs = (x, *self.parameters(), *(() if conditioning is None else (conditioning.spans,)))
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)

    def run_layers(
        self,
        x: Float[Tensor, "n d"],
        phases: Float[Tensor, "n f 2"],
        plan: AttentionPlan,
        conditioning: Conditioning | None,
    ) -> Shaped[Tensor, "n d"]:
        """All that depends on a batch's numbers only, not on how it is laid out: this is what `compile` compiles."""
        x = self.expand_streams(x)
        skips: list[Tensor] = []
        first_values = None
        for index, layer in enumerate(self.layers):
            skipped = skips.pop() if layer.skip is not None else None
            inputs = (x, skipped, first_values, conditioning, phases, plan)
            if self.use_checkpoint and torch.is_grad_enabled():
                x, values = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, values = layer(*inputs)
            first_values = values if first_values is None else first_values
            if index < self.depth // 2:
                skips.append(x)
        return self.final_norm(self.reduce_streams(x), self.final_norm.modulation(conditioning))

    def compile(self, **options: Any) -> None:
        """From now on all layers run as one compiled graph, in training and in decoding.

        A graph serves batches of all sizes. There is one for each way of computing, made when it is first needed: with
        gradients or without, text alone or spans, with a cache or none, one token or many. `options` are those of
        `torch.compile`; by default `fullgraph=True`. Copies and saved models keep them.

        Meant for CPUs so far: on a GPU the gradients of attention would be taken from its definition.

        Raises `ValueError` with `use_flex_attn`, which compiles a kernel of its own, and for modes that replay what a
        GPU did for an earlier batch; `RuntimeError` under `TYPECHECK=1`, whose checks no graph can hold.
        """
        if self.use_flex_attn:
            raise ValueError("use_flex_attn compiles a kernel of its own: use one or the other")
        if options.get("mode") in ("reduce-overhead", "max-autotune"):
            raise ValueError(f"mode {options['mode']!r} replays the work of an earlier batch, whose layout was another")
        if hasattr(type(self).run_layers, "__wrapped__"):
            raise RuntimeError("a compiled graph cannot check types at run time; compile without TYPECHECK=1")
        self.compile_options = dict(fullgraph=True) | options

    def create_cache(self, *, device: torch.device, dtype: torch.dtype, rows: int = 1) -> KVCache:
        """An empty cache, to begin with for so many samples."""
        rows = rows if self.compile_options is None else max(rows, 2)  # a graph would take 1 for a constant
        return KVCache(
            layers=self.depth, kv_heads=self.kv_heads, dim_head=self.dim_head, device=device, dtype=dtype, rows=rows
        )

    def muon_parameters(self) -> list[nn.Parameter]:
        """The hidden matrices of attention and feedforward, for which the Muon optimizer is made."""
        return [parameter for name, parameter in self.named_parameters() if name.endswith(HIDDEN_MATRICES)]


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


def _compiled(run_layers: Callable[..., Tensor], options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """One for all models: bound to none of them, so that a copy does not run the layers of its original."""
    config = torch._dynamo.config
    if config.cache_size_limit < MOST_GRAPHS:  # each thread has its own
        config.cache_size_limit = MOST_GRAPHS
    key = run_layers, repr(sorted(options.items()))
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(run_layers, **options)
    return _COMPILED[key]


_COMPILED: dict[tuple, Callable[..., Tensor]] = {}


def _with_another(conditioning: Conditioning, n: int) -> Conditioning:
    """One span, and a second that no token has: a graph would take the 1 for a constant."""
    spans, row = conditioning
    return Conditioning(torch.cat((spans, spans)), row if row is not None else spans.new_ones(n, dtype=torch.long))


def _mark_sizes(x: Tensor, phases: Tensor, plan: AttentionPlan, conditioning: Conditioning | None) -> None:
    """Says which sizes differ from batch to batch, so that no graph takes the first ones for constants."""
    sizes = [(tensor, 0) for tensor in (x, phases, *(plan.table or ()), *(conditioning or ())) if tensor is not None]
    if plan.cached is not None:
        keys, values, row_of, slot_of = plan.cached
        sizes += [(row_of, 0), (slot_of, 0), *((part, dim) for part in (*keys, *values) for dim in (0, 2))]
    for tensor, dim in sizes:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def _only(name: str, given: Mapping[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    if wrong := [key for key in given or {} if key not in known]:
        raise ValueError(f"{name} takes {', '.join(known)}, got {', '.join(wrong)}; the rest has arguments of its own")
    return dict(given or {})


def _connect(connect: Callable[..., nn.Module], streams: int, fracs: int, *, layer_index: int) -> nn.Module:
    """A residual connection that starts by reading one stream whole, and by keeping all of them.

    With two or more fractions, those of hyper-connections (0.4.11) start by reading the first for each, and with three
    or more they lose some: the columns of `static_alpha`, which are (fraction, input or stream), are filled as
    (inputs, streams).
    """
    connection = connect(layer_index=layer_index)
    if fracs > 1:
        keep = torch.eye(fracs * streams).unflatten(1, (fracs, streams))
        read = keep[:, :, [layer_index % streams]]
        connection.get_parameter("static_alpha").data.copy_(torch.cat((read, keep), dim=-1).flatten(1))
    return connection
