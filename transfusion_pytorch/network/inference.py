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
from transfusion_pytorch.network.norms import AdaptiveNorm, Conditioning, IndexedModulation, RMSNorm
from transfusion_pytorch.network.precision import LAYER_NORM_EPS, RMS_NORM_EPS
from transfusion_pytorch.network.shortcuts import forces_plain_formulas, is_untouched
from transfusion_pytorch.sequence.positions import rotate


def has_plain_layers(layers: Any) -> bool:
    """Whether all layers are our own, without hooks, adapters, quantised weights, dropout, or the rarer options."""
    return not forces_plain_formulas() and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    if not is_untouched(layer, Layer):
        return False
    attn, ff = layer.attn, layer.ff
    linears = [attn.to_qkv, attn.to_out, ff.to_hidden, ff.to_out, layer.attn_norm.to_modulation]
    linears += [layer.ff_norm.to_modulation, *([] if layer.skip is None else [layer.skip])]
    dropouts = (layer.dropout, ff.dropout)
    return (
        is_untouched(attn, Attention)
        and is_untouched(ff, FeedForward)
        and all(is_untouched(norm, AdaptiveNorm) for norm in (layer.attn_norm, layer.ff_norm))
        and all(is_untouched(norm, RMSNorm) for norm in (attn.q_norm, attn.k_norm) if norm is not None)
        and None not in (attn.q_norm, attn.k_norm, attn.to_gates)
        and all(is_plain_linear(linear) for linear in (*linears, attn.to_gates))
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


class PreparedLayers(NamedTuple):
    """What depends on the weights only, computed once for a view of the cache.

    - `gains` of queries and keys for every layer; `text`: the modulations of text
    """

    gains: Sequence[Shaped[Tensor, "h_k f 2"]]
    text: Modulations

    @classmethod
    def of(cls, layers: Any) -> "PreparedLayers":
        scales = torch.stack([norm.text_scale for norm in _norms(layers)])
        gates = torch.stack([norm.text_gate for norm in _norms(layers)])  # type: ignore[misc]
        attns = [layer.attn for layer in layers]
        both = torch.stack([norm.weight for attn in attns for norm in (attn.q_norm, attn.k_norm)])  # type: ignore[union-attr]
        both = (
            (1 + both).to(torch.float64 if both.dtype == torch.float64 else torch.float32).view(len(attns), 2, 1, -1, 2)
        )
        heads = (both[:, i].expand(-1, count, -1, -1) for i, count in enumerate((attns[0].heads, attns[0].kv_heads)))
        return cls(
            torch.cat(tuple(heads), dim=1).unbind(), Modulations((1 + scales).unbind(), None, (1 + gates).unbind())
        )


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
    modulations = prepared.text if conditioning is None else _of_spans(_norms(layers), conditioning)
    shape = x.shape
    if modulations.shift is not None and modulations.index is None:
        x = x.unflatten(0, (len(modulations.scale[0]), -1))
    skips: list[Tensor] = []
    for index, layer in enumerate(layers):
        if layer.skip is not None:
            x = x + F.linear(torch.cat((x, skips.pop()), dim=-1), layer.skip.weight)
        out = _attend(layer.attn, modulations.normed(x, 2 * index), prepared.gains[index], rotation, plan, index)
        x = modulations.add_gated(x, out, 2 * index)
        out = _feed_forward(layer.ff, modulations.normed(x, 2 * index + 1))
        x = modulations.add_gated(x, out, 2 * index + 1)
        if index < len(layers) // 2:
            skips.append(x)
    return x.view(shape)


def _attend(
    attn: Attention,
    x: Shaped[Tensor, "... d"],
    gain: Tensor,
    rotation: Tensor,
    plan: CachedAttention | DecodeAttention,
    index: int,
) -> Shaped[Tensor, "... d"]:
    n, e = len(rotation), attn.dim_head
    qk, v = F.linear(x, attn.to_qkv.weight).view(n, -1, e).split((attn.heads + attn.kv_heads, attn.kv_heads), dim=1)
    qk = qk.unflatten(-1, (-1, 2))
    exact = F.rms_norm(qk if qk.dtype == gain.dtype else qk.to(gain.dtype), (e // 2, 2), eps=RMS_NORM_EPS).mul_(gain)
    if torch.compiler.is_compiling():
        exact = rotate(exact.flatten(-2), rotation)
    else:
        torch.view_as_complex(exact).mul_(rotation)
    qk = exact if exact.dtype == x.dtype else exact.to(x.dtype)
    q, k = qk.view(n, -1, e).split((attn.heads, attn.kv_heads), dim=1)
    out = plan.attend(q, k, v, layer=index)
    gates = F.linear(x, attn.to_gates.weight, attn.to_gates.bias).sigmoid_()  # type: ignore[union-attr]
    # how the output of attention lies in memory differs from kernel to kernel
    return F.linear((out * gates.view(n, -1, 1)).reshape(*x.shape[:-1], -1), attn.to_out.weight)


def _feed_forward(ff: FeedForward, x: Tensor) -> Tensor:
    value, gate = F.linear(x, ff.to_hidden.weight, ff.to_hidden.bias).chunk(2, dim=-1)
    return F.linear(ACTIVATIONS[ff.activation](gate).mul_(value), ff.to_out.weight, ff.to_out.bias)


def _norms(layers: Any) -> list[AdaptiveNorm]:
    return [norm for layer in layers for norm in (layer.attn_norm, layer.ff_norm)]


def _of_spans(norms: Sequence[AdaptiveNorm], conditioning: Conditioning) -> Modulations:
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
