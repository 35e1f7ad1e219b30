"""A second implementation of the layers, for sampling: the formulas of `layer.py` in as few operations as possible.

In a decode step every operation is tiny, and their number decides: some 33 dispatches a layer here, 78 there. So what
layers share is computed for all of them at once, nothing is converted, and views are made once (`cache_views.py`). It
is used only where `has_plain_layers` says so. Sampling without a cache runs `layer.py`, and tests compare the two.

n tokens, d model, h query heads, k key/value heads, e channels of a head, f frequencies, m spans.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import module_of
from transfusion_pytorch.network.attend import CachedAttention, DecodeAttention
from transfusion_pytorch.network.compile import compiled
from transfusion_pytorch.network.cpu.products import emulated
from transfusion_pytorch.network.layer import ACTIVATIONS, Attention, FeedForward, Layer
from transfusion_pytorch.network.linear import is_plain_linear
from transfusion_pytorch.network.norms import AdaptiveNorm, Conditioning, IndexedModulation, PlainNorm, RMSNorm
from transfusion_pytorch.network.precision import LAYER_NORM_EPS, RMS_NORM_EPS, precise
from transfusion_pytorch.network.shortcuts import forces_plain_formulas, is_untouched
from transfusion_pytorch.sequence.positions import rotate


def has_plain_layers(layers: Any) -> bool:
    """Whether all layers are our own, without hooks, adapters, quantised weights, dropout, or the rarer options."""
    return not forces_plain_formulas() and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    if not is_untouched(layer, Layer):
        return False
    attn, ff, norms = layer.attn, layer.ff, (layer.attn_norm, layer.ff_norm)
    linears = [attn.to_qkv, attn.to_out, ff.to_hidden, ff.to_out, attn.to_gates, layer.skip]
    linears += [getattr(norm, "to_modulation", None) for norm in norms]
    dropouts = (layer.dropout, ff.dropout)
    return (
        is_untouched(attn, Attention)
        and is_untouched(ff, FeedForward)
        and (all(is_untouched(it, AdaptiveNorm) for it in norms) or all(is_untouched(it, PlainNorm) for it in norms))
        and all(is_untouched(norm, RMSNorm) for norm in (attn.q_norm, attn.k_norm) if norm is not None)
        and all(is_plain_linear(linear) for linear in linears if linear is not None)
        and all(is_untouched(it, nn.Dropout) and not (it.training and it.p) for it in dropouts)
        and layer.has_one_stream
        and attn.to_value_mix is None
        and not layer.keeps_values
        and not attn.laser
        and attn.softcap is None
        and not emulated(attn.to_qkv.weight.dtype, attn.to_qkv.weight.device.type)
    )


class NormOfLayer(NamedTuple):
    """Scale, shift and gate of one norm. Text has no shift.

    Spans have a row each, `(m, 1, d)`, or the tokens look them up by their `index` `(n)` in `(m, d)`.
    """

    scale: Tensor
    shift: Tensor | None
    gate: Tensor
    index: Tensor | None = None

    def normed(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... d"]:
        if self.shift is None:
            return F.layer_norm(x, x.shape[-1:], weight=self.scale, eps=LAYER_NORM_EPS)
        normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self._of_tokens(self.shift), normed, self._of_tokens(self.scale))

    def add_gated(self, x: Shaped[Tensor, "... d"], out: Tensor) -> Shaped[Tensor, "... d"]:
        return torch.addcmul(x, out, self._of_tokens(self.gate))

    def _of_tokens(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows.index_select(0, self.index)


class RMSNormOfLayer(NamedTuple):
    """The gain of one norm of a language model, and its epsilon."""

    gain: Tensor
    eps: float

    def normed(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... d"]:
        return F.rms_norm(x, x.shape[-1:], weight=self.gain, eps=self.eps)

    def add_gated(self, x: Shaped[Tensor, "... d"], out: Tensor) -> Shaped[Tensor, "... d"]:
        return x + out


Norms = Sequence[NormOfLayer] | Sequence[RMSNormOfLayer]  # of all layers: that of attention, that of the feedforward


class LayerWeights(NamedTuple):
    """The linear layers of one layer, as `(weight, bias)`. A compiled function takes them as tensors and serves all
    layers; it would be compiled for each module anew.
    """

    heads: int
    kv_heads: int
    activation: str
    to_qkv: tuple[Tensor, Tensor | None]
    to_gates: tuple[Tensor, Tensor | None] | None
    to_out: tuple[Tensor, Tensor | None]
    to_hidden: tuple[Tensor, Tensor | None]
    from_hidden: tuple[Tensor, Tensor | None]
    skip: tuple[Tensor, Tensor | None] | None

    @classmethod
    def of(cls, layer: Any) -> "LayerWeights":
        attn, ff = layer.attn, layer.ff
        linears = (attn.to_qkv, attn.to_gates, attn.to_out, ff.to_hidden, ff.to_out, layer.skip)
        weights: list[Any] = [None if it is None else (it.weight, it.bias) for it in linears]
        return cls(attn.heads, attn.kv_heads, ff.activation, *weights)


class PreparedLayers(NamedTuple):
    """What depends on the weights only, computed once for a view of the cache.

    - `weights` of every layer
    - `gains` of queries and keys for every layer, None where they are not normalised, and the epsilon of those norms
    - `text`: the norms as text goes through them, None for layers that read none
    - `precise`: the type that queries and keys are normalised and rotated in
    """

    weights: Sequence[LayerWeights]
    gains: Sequence[Shaped[Tensor, "h_k f 2"]] | None
    eps: float
    text: Norms | None
    precise: torch.dtype

    @classmethod
    def of(cls, layers: Any) -> "PreparedLayers":
        norms = _norms(layers)
        text: Norms | None = None
        if isinstance(norms[0], PlainNorm):
            text = [RMSNormOfLayer(norm.weight, norm.eps) for norm in norms]
        elif norms[0].text_scale is not None:
            scales, gates = (torch.stack([getattr(it, name) for it in norms]) for name in ("text_scale", "text_gate"))
            each = zip((1 + scales).unbind(), (1 + gates).unbind(), strict=True)
            text = [NormOfLayer(scale, None, gate) for scale, gate in each]
        weights, attns = [LayerWeights.of(layer) for layer in layers], [layer.attn for layer in layers]
        dtype = precise(attns[0].to_out.weight.dtype)
        if attns[0].q_norm is None:
            return cls(weights, None, RMS_NORM_EPS, text, dtype)
        both = torch.stack([norm.gain for attn in attns for norm in (attn.q_norm, attn.k_norm)])
        both = both.to(dtype).view(len(attns), 2, 1, -1, 2)
        heads = (both[:, i].expand(-1, count, -1, -1) for i, count in enumerate((attns[0].heads, attns[0].kv_heads)))
        return cls(weights, torch.cat(tuple(heads), dim=1).unbind(), attns[0].q_norm.eps, text, dtype)

    def norms(self, norms: Sequence[Any], conditioning: Conditioning | None) -> Norms:
        """Those of a stream of text alone (`conditioning` is None), or of spans alone."""
        if conditioning is None or isinstance(norms[0], PlainNorm):
            assert self.text is not None
            return self.text
        return _of_spans(norms, conditioning)


def run_layers(
    layers: Any,
    x: Shaped[Tensor, "n d"],
    *,
    prepared: PreparedLayers,
    conditioning: Conditioning | None,
    phases: Float[Tensor, "n f 2"],
    plan: CachedAttention | DecodeAttention,
    compile_options: Mapping[str, Any] | None = None,
) -> Shaped[Tensor, "n d"]:
    """All layers over a stream of text alone (`conditioning` is None) or of spans alone. `phases` are those of the
    rotary positions.

    With `compile_options` what lies before and behind attention is compiled: two graphs for all layers. Attention stays
    out of them, because where it reads and writes differs from layer to layer.
    """
    begin: Callable[..., Any] = _begin
    finish: Callable[..., Any] = _finish
    if compile_options is not None:
        begin, finish = compiled(begin, compile_options), compiled(finish, compile_options)
    # generated code does without complex numbers, and eager code is shorter with them
    is_real = compile_options is not None or torch.compiler.is_compiling()
    rotation = phases if is_real else torch.view_as_complex(phases)[:, None]
    norms = prepared.norms(_norms(layers), conditioning)
    shape, first = x.shape, norms[0]
    if isinstance(first, NormOfLayer) and first.shift is not None and first.index is None:
        x = x.unflatten(0, (len(first.scale), -1))
    skips: list[Tensor] = []
    for index, layer in enumerate(prepared.weights):
        before_attention, before_ff = norms[2 * index], norms[2 * index + 1]
        skipped = None if layer.skip is None else skips.pop()
        gains = None if prepared.gains is None else prepared.gains[index]
        how = (gains, prepared.eps, prepared.precise, rotation)
        x, normed, q, k, v = begin(layer, x, skipped, before_attention, *how)
        gathered = plan.attend(q, k, v, layer=index)
        x = finish(layer, x, normed, gathered, before_attention, before_ff)
        if index < len(layers) // 2:
            skips.append(x)
    return x.view(shape)


def _begin(
    layer: LayerWeights,
    x: Shaped[Tensor, "... d"],
    skipped: Shaped[Tensor, "... d"] | None,
    norm: NormOfLayer | RMSNormOfLayer,
    gains: Shaped[Tensor, "h_k f 2"] | None,
    eps: float,
    dtype: torch.dtype,
    rotation: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer up to its attention: the residual stream, what attention reads, queries, keys and values."""
    if skipped is not None:
        assert layer.skip is not None
        x = x + F.linear(torch.cat((x, skipped), dim=-1), *layer.skip)
    normed, n, num_heads = norm.normed(x), len(rotation), layer.heads + 2 * layer.kv_heads
    qkv = F.linear(normed, *layer.to_qkv).view(n, num_heads, -1)
    qk, v = qkv.split((layer.heads + layer.kv_heads, layer.kv_heads), dim=1)
    qk = qk.unflatten(-1, (-1, 2))
    exact = qk if qk.dtype == dtype else qk.to(dtype)
    if gains is not None:
        exact = F.rms_norm(exact, exact.shape[-2:], eps=eps).mul_(gains)
    if torch.compiler.is_compiling():
        exact = rotate(exact.flatten(-2), rotation)
    else:
        torch.view_as_complex(exact).mul_(rotation)
    qk = exact if exact.dtype == normed.dtype else exact.to(normed.dtype)
    q, k = qk.reshape(n, -1, v.shape[-1]).split((layer.heads, layer.kv_heads), dim=1)
    return x, normed, q, k, v


def _finish(
    layer: LayerWeights,
    x: Shaped[Tensor, "... d"],
    normed: Shaped[Tensor, "... d"],
    gathered: Shaped[Tensor, "n h e"],
    before_attention: NormOfLayer | RMSNormOfLayer,
    before_ff: NormOfLayer | RMSNormOfLayer,
) -> Shaped[Tensor, "... d"]:
    """The rest of a layer: the residual stream behind it, from what the heads `gathered`."""
    if layer.to_gates is not None:
        gates = F.linear(normed, *layer.to_gates).sigmoid_()
        gathered = gathered * gates.view(*gathered.shape[:-1], 1)
    # how the output of attention lies in memory differs from kernel to kernel
    out = F.linear(gathered.reshape(*normed.shape[:-1], -1), *layer.to_out)
    x = before_attention.add_gated(x, out)
    value, gate = F.linear(before_ff.normed(x), *layer.to_hidden).chunk(2, dim=-1)
    out = F.linear(ACTIVATIONS[layer.activation](gate).mul_(value), *layer.from_hidden)
    return before_ff.add_gated(x, out)


def _norms(layers: Any) -> list[Any]:
    return [norm for layer in layers for norm in (layer.attn_norm, layer.ff_norm)]


def _of_spans(norms: Sequence[Any], conditioning: Conditioning) -> Sequence[NormOfLayer]:
    if conditioning.modulations is not None:
        made = [conditioning.modulations[module_of(norm)] for norm in norms]
        index = made[0].index if isinstance(made[0], IndexedModulation) else None
        return [NormOfLayer(it.scale, it.shift, it.gate, index) for it in made]
    every = torch.stack([F.linear(conditioning.spans, it.to_modulation.weight, it.to_modulation.bias) for it in norms])
    scale, shift, gate = every.chunk(3, dim=-1)
    index = conditioning.modulation_index
    if index is None:
        scale, shift, gate = (part[:, :, None] for part in (scale, shift, gate))
    index = None if index is None else index - 1
    parts = zip((1 + scale).unbind(), shift.unbind(), gate.unbind(), strict=True)
    return [NormOfLayer(*each, index) for each in parts]
