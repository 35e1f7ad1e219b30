"""A second implementation of the layers, for sampling: the formulas of `layer.py` in as few operations as possible.

In a decode step every operation is tiny, and their number decides: some 33 dispatches a layer here, 78 there. So what
layers share is computed for all of them at once, nothing is converted, and views are made once (`cache_views.py`). It
is used only where `has_plain_layers` says so. Sampling without a cache runs `layer.py`, and tests compare the two.

n tokens, d model, h query heads, k key/value heads, e channels of a head, f frequencies, m spans.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import module_of
from transfusion_pytorch.network.attend import CachedAttention, DecodeAttention
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


class Modulations(NamedTuple):
    """Scale, shift and gate of every norm, in the order of the layers. Text has no shift.

    Spans have a row each, `(m, 1, d)`, or the tokens look them up by their `index` `(n)` in `(m, d)`.
    """

    scale: Sequence[Tensor]
    shift: Sequence[Tensor] | None
    gate: Sequence[Tensor]
    index: Tensor | None = None

    def normed(self, x: Shaped[Tensor, "... d"], i: int) -> Shaped[Tensor, "... d"]:
        if self.shift is None:
            return F.layer_norm(x, x.shape[-1:], weight=self.scale[i], eps=LAYER_NORM_EPS)
        normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self._of_tokens(self.shift[i]), normed, self._of_tokens(self.scale[i]))

    def add_gated(self, x: Shaped[Tensor, "... d"], out: Tensor, i: int) -> Shaped[Tensor, "... d"]:
        return torch.addcmul(x, out, self._of_tokens(self.gate[i]))

    def _of_tokens(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows.index_select(0, self.index)


class RMSGains(NamedTuple):
    """The gains of every norm of a language model, in the order of the layers, and their epsilon."""

    gain: Sequence[Tensor]
    eps: float

    def normed(self, x: Shaped[Tensor, "... d"], i: int) -> Shaped[Tensor, "... d"]:
        return F.rms_norm(x, x.shape[-1:], weight=self.gain[i], eps=self.eps)

    def add_gated(self, x: Shaped[Tensor, "... d"], out: Tensor, i: int) -> Shaped[Tensor, "... d"]:
        return x + out


class PreparedLayers(NamedTuple):
    """What depends on the weights only, computed once for a view of the cache.

    - `gains` of queries and keys for every layer, None where they are not normalised, and the epsilon of those norms
    - `text`: the modulations of text, None for layers that read none
    - `precise`: the type that queries and keys are normalised and rotated in
    """

    gains: Sequence[Shaped[Tensor, "h_k f 2"]] | None
    eps: float
    text: Modulations | RMSGains | None
    precise: torch.dtype

    @classmethod
    def of(cls, layers: Any) -> "PreparedLayers":
        norms = _norms(layers)
        text: Modulations | RMSGains | None = None
        if isinstance(norms[0], PlainNorm):
            text = RMSGains([norm.weight for norm in norms], norms[0].eps)
        elif norms[0].text_scale is not None:
            scales, gates = (torch.stack([getattr(it, name) for it in norms]) for name in ("text_scale", "text_gate"))
            text = Modulations((1 + scales).unbind(), None, (1 + gates).unbind())
        attns = [layer.attn for layer in layers]
        dtype = precise(attns[0].to_out.weight.dtype)
        if attns[0].q_norm is None:
            return cls(None, RMS_NORM_EPS, text, dtype)
        both = torch.stack([norm.gain for attn in attns for norm in (attn.q_norm, attn.k_norm)])
        both = both.to(dtype).view(len(attns), 2, 1, -1, 2)
        heads = (both[:, i].expand(-1, count, -1, -1) for i, count in enumerate((attns[0].heads, attns[0].kv_heads)))
        return cls(torch.cat(tuple(heads), dim=1).unbind(), attns[0].q_norm.eps, text, dtype)

    def modulations(self, norms: Sequence[Any], conditioning: Conditioning | None) -> Modulations | RMSGains:
        """Those of a stream of text alone (`conditioning` is None), or of spans alone."""
        if conditioning is None or isinstance(self.text, RMSGains):
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
) -> Shaped[Tensor, "n d"]:
    """All layers over a stream of text alone (`conditioning` is None) or of spans alone. `phases` are those of the
    rotary positions.
    """
    # generated code does without complex numbers, and eager code is shorter with them
    rotation = phases if torch.compiler.is_compiling() else torch.view_as_complex(phases)[:, None]
    modulations = prepared.modulations(_norms(layers), conditioning)
    shape = x.shape
    if isinstance(modulations, Modulations) and modulations.shift is not None and modulations.index is None:
        x = x.unflatten(0, (len(modulations.scale[0]), -1))
    skips: list[Tensor] = []
    for index, layer in enumerate(layers):
        if layer.skip is not None:
            x = x + F.linear(torch.cat((x, skips.pop()), dim=-1), layer.skip.weight)
        out = _attend(layer.attn, modulations.normed(x, 2 * index), prepared, rotation, plan, index)
        x = modulations.add_gated(x, out, 2 * index)
        out = _feed_forward(layer.ff, modulations.normed(x, 2 * index + 1))
        x = modulations.add_gated(x, out, 2 * index + 1)
        if index < len(layers) // 2:
            skips.append(x)
    return x.view(shape)


def _attend(
    attn: Attention,
    x: Shaped[Tensor, "... d"],
    prepared: PreparedLayers,
    rotation: Tensor,
    plan: CachedAttention | DecodeAttention,
    index: int,
) -> Shaped[Tensor, "... d"]:
    n, e = len(rotation), attn.dim_head
    qkv = F.linear(x, attn.to_qkv.weight, attn.to_qkv.bias).view(n, -1, e)
    qk, v = qkv.split((attn.heads + attn.kv_heads, attn.kv_heads), dim=1)
    qk = qk.unflatten(-1, (-1, 2))
    exact = qk if qk.dtype == prepared.precise else qk.to(prepared.precise)
    if prepared.gains is not None:
        exact = F.rms_norm(exact, (e // 2, 2), eps=prepared.eps).mul_(prepared.gains[index])
    if torch.compiler.is_compiling():
        exact = rotate(exact.flatten(-2), rotation)
    else:
        torch.view_as_complex(exact).mul_(rotation)
    qk = exact if exact.dtype == x.dtype else exact.to(x.dtype)
    q, k = qk.reshape(n, -1, e).split((attn.heads, attn.kv_heads), dim=1)
    out = plan.attend(q, k, v, layer=index)
    if attn.to_gates is not None:
        out = out * F.linear(x, attn.to_gates.weight, attn.to_gates.bias).sigmoid_().view(n, -1, 1)
    # how the output of attention lies in memory differs from kernel to kernel
    return F.linear(out.reshape(*x.shape[:-1], -1), attn.to_out.weight, attn.to_out.bias)


def _feed_forward(ff: FeedForward, x: Tensor) -> Tensor:
    value, gate = F.linear(x, ff.to_hidden.weight, ff.to_hidden.bias).chunk(2, dim=-1)
    return F.linear(ACTIVATIONS[ff.activation](gate).mul_(value), ff.to_out.weight, ff.to_out.bias)


def _norms(layers: Any) -> list[Any]:
    return [norm for layer in layers for norm in (layer.attn_norm, layer.ff_norm)]


def _of_spans(norms: Sequence[Any], conditioning: Conditioning) -> Modulations:
    if conditioning.modulations is not None:
        made = [conditioning.modulations[module_of(norm)] for norm in norms]
        scale, shift, gate = ([each[part] for each in made] for part in range(3))
        return Modulations(scale, shift, gate, made[0].index if isinstance(made[0], IndexedModulation) else None)
    every = torch.stack([F.linear(conditioning.spans, it.to_modulation.weight, it.to_modulation.bias) for it in norms])
    scale, shift, gate = every.chunk(3, dim=-1)
    index = conditioning.modulation_index
    if index is None:
        scale, shift, gate = (part[:, :, None] for part in (scale, shift, gate))
    return Modulations((1 + scale).unbind(), shift.unbind(), gate.unbind(), None if index is None else index - 1)
