"""A second implementation of the layers, for sampling: the formulas of `layer.py` in as few operations as possible.

In a decode step every operation is tiny, and their number decides: some 36 dispatches a layer here, 78 there. So what
layers share is computed for all of them at once, nothing is converted, and views are made once (`cache_views.py`). It
is used only where `has_plain_layers` says so. Sampling without a cache runs `layer.py`, and tests compare the two.

On a CPU, products of few rows may be those of `cpu/reordered.py`, and many rows go through a feedforward in parts.

n tokens, d model, h query heads, k key/value heads, e channels of a head, f frequencies, m spans, i and o features.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import module_of
from transfusion_pytorch.network.attend import CachedAttention, DecodeAttention
from transfusion_pytorch.network.compile import compiled
from transfusion_pytorch.network.cpu.products import emulated
from transfusion_pytorch.network.cpu.reordered import ReorderedWeights, reordered_linear
from transfusion_pytorch.network.layer import ACTIVATIONS, Attention, FeedForward, Layer
from transfusion_pytorch.network.linear import is_plain_linear
from transfusion_pytorch.network.norms import AdaptiveNorm, Conditioning, IndexedModulation, PlainNorm, RMSNorm
from transfusion_pytorch.network.precision import LAYER_NORM_EPS, precise, working_dtype
from transfusion_pytorch.network.shortcuts import forces_plain_formulas, is_untouched
from transfusion_pytorch.sequence.positions import rotate

HIDDEN_AT_ONCE = 4 * 2**20  # bytes of features of a feedforward, where rows go through it in parts
FEWEST_AT_ONCE = 128  # rows of such a part, whose product reads the whole weight
SMALLEST_SCRATCH = 2**20  # bytes of features of a whole stream, from which on it gains by memory of its own


def has_plain_layers(layers: Any) -> bool:
    """Whether all layers are our own, without hooks, adapters, quantised weights, dropout, or the rarer options."""
    return not forces_plain_formulas() and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    if not is_untouched(layer, Layer):
        return False
    attn, ff, norms = layer.attn, layer.ff, (layer.attn_norm, layer.ff_norm)
    linears = list(_linears(layer))
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

    def add_product(self, x: Shaped[Tensor, "... d"], layer: "LinearWeights", inner: Tensor) -> Shaped[Tensor, "... d"]:
        """`x` and what this `layer` makes of the `inner` features of its branch, gated."""
        return self.add_output(x, layer(inner))

    def add_output(self, x: Shaped[Tensor, "... d"], out: Tensor) -> Shaped[Tensor, "... d"]:
        return torch.addcmul(x, out, self._of_tokens(self.gate))

    def _of_tokens(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows.index_select(0, self.index)


class RMSNormOfLayer(NamedTuple):
    """A root mean square norm over the last `num_axes`: one of a language model, or that of queries and keys.

    `x gain / sqrt(mean(x^2) + eps)` is `x (gain sqrt(e)) / hypot(|x|, sqrt(e eps))` of e channels: four operations on a
    CPU, where torch's has nine. `short` are the numbers of that, `gain sqrt(e)` and `sqrt(e eps)`; None elsewhere.
    """

    gain: Tensor
    eps: float
    num_axes: int
    short: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, gain: Tensor, eps: float, *, num_axes: int = 1) -> "RMSNormOfLayer":
        if gain.device.type != "cpu" or gain.dtype not in (torch.float32, torch.float64):
            return cls(gain, eps, num_axes, None)
        root = gain.shape[-num_axes:].numel() ** 0.5
        least = torch.tensor(root * eps**0.5, dtype=gain.dtype, device=gain.device)
        return cls(gain, eps, num_axes, (gain * root, least))

    def normed(self, x: Shaped[Tensor, "..."], *, overwrites: bool = False) -> Shaped[Tensor, "..."]:
        """Of `x`, whose memory may be used if this `overwrites` it."""
        if self.short is not None and x.dtype == self.gain.dtype and not torch.compiler.is_compiling():
            gain, least = self.short
            length = torch.linalg.vector_norm(x, dim=tuple(range(-self.num_axes, 0)), keepdim=True)
            divide = x.div_ if overwrites else x.div
            return divide(torch.hypot(length, least)).mul_(gain)
        shape = x.shape[-self.num_axes :]
        if self.gain.shape == shape:
            return F.rms_norm(x, shape, weight=self.gain, eps=self.eps)
        return F.rms_norm(x, shape, eps=self.eps).mul_(self.gain)

    def add_product(self, x: Shaped[Tensor, "... d"], layer: "LinearWeights", inner: Tensor) -> Shaped[Tensor, "... d"]:
        """`x` and what this `layer` makes of the `inner` features of its branch."""
        return layer.add_to(x, inner)

    def add_output(self, x: Shaped[Tensor, "... d"], out: Tensor) -> Shaped[Tensor, "... d"]:
        return x + out


Norms = Sequence[NormOfLayer] | Sequence[RMSNormOfLayer]  # of all layers: that of attention, that of the feedforward


class LinearWeights(NamedTuple):
    """A linear layer: its weight, that transposed, its bias, and the reordered copy of the weight, if products are made
    with that.
    """

    weight: Shaped[Tensor, "o i"]
    transposed: Shaped[Tensor, "i o"]
    bias: Shaped[Tensor, " o"] | None
    reordered: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, reordered: ReorderedWeights | None, rows: int) -> "LinearWeights":
        return cls(weight, weight.t(), bias, None if reordered is None else reordered.of(weight, rows))

    def __call__(self, x: Shaped[Tensor, "... i"], out: Shaped[Tensor, "n o"] | None = None) -> Shaped[Tensor, "... o"]:
        """Written to `out`, if that is given."""
        if torch.compiler.is_compiling():  # no graph holds an opaque copy
            return F.linear(x, self.weight, self.bias)
        if out is not None:
            rows = x.reshape(-1, x.shape[-1])
            if self.bias is None:
                torch.mm(rows, self.transposed, out=out)
            else:
                torch.addmm(self.bias, rows, self.transposed, out=out)
            return out.view(*x.shape[:-1], -1)
        if self.reordered is not None:
            return reordered_linear(x, self.reordered, self.bias)
        if x.ndim != 2:
            return F.linear(x, self.weight, self.bias)
        # what `F.linear` comes to, without its four operations on the way
        return torch.mm(x, self.transposed) if self.bias is None else torch.addmm(self.bias, x, self.transposed)

    def add_to(self, total: Shaped[Tensor, "... o"], x: Shaped[Tensor, "... i"]) -> Shaped[Tensor, "... o"]:
        """The total of what was there and this layer's output, in one product where that can be."""
        is_plain = self.bias is None and self.reordered is None and not torch.compiler.is_compiling()
        if (
            is_plain and x.ndim == 2 and working_dtype(total) == x.dtype == total.dtype
        ):  # autocast would round the total
            return torch.addmm(total, x, self.transposed)
        return total + self(x)


class LayerWeights(NamedTuple):
    """The linear layers of one layer. A compiled function takes them as tensors and serves all layers; it would be
    compiled for each module anew.
    """

    heads: int
    kv_heads: int
    activation: str
    to_qkv: LinearWeights
    to_gates: LinearWeights | None
    to_out: LinearWeights
    to_hidden: LinearWeights
    from_hidden: LinearWeights
    skip: LinearWeights | None

    @classmethod
    def of(cls, layer: Any, reordered: ReorderedWeights | None, rows: int) -> "LayerWeights":
        linears = _linears(layer)
        weights: list[Any] = [
            None if it is None else LinearWeights.of(it.weight, it.bias, reordered, rows) for it in linears
        ]
        return cls(layer.attn.heads, layer.attn.kv_heads, layer.ff.activation, *weights)


class PreparedLayers(NamedTuple):
    """What depends on the weights only, computed once for a view of the cache.

    - `weights` of every layer
    - `qk_norms`: those of queries and keys together, with gains `(h + k, f, 2)`; None where there are none
    - `modules`: the norms of all layers; `text`: those as text goes through them, None for layers that read none
    - `precise`: the type that queries and keys are normalised and rotated in
    """

    weights: Sequence[LayerWeights]
    qk_norms: Sequence[RMSNormOfLayer] | None
    modules: Sequence[Any]
    text: Norms | None
    precise: torch.dtype

    @classmethod
    def of(cls, layers: Any, reordered: ReorderedWeights | None = None, rows: int = 0) -> "PreparedLayers":
        """With `reordered` weights where these serve products of so many rows."""
        norms = _norms(layers)
        text: Norms | None = None
        if isinstance(norms[0], PlainNorm):
            text = [RMSNormOfLayer.of(norm.weight, norm.eps) for norm in norms]
        elif norms[0].text_scale is not None:
            scales, gates = (torch.stack([getattr(it, name) for it in norms]) for name in ("text_scale", "text_gate"))
            each = zip((1 + scales).unbind(), (1 + gates).unbind(), strict=True)
            text = [NormOfLayer(scale, None, gate) for scale, gate in each]
        weights, attns = [LayerWeights.of(layer, reordered, rows) for layer in layers], [layer.attn for layer in layers]
        dtype = precise(attns[0].to_out.weight.dtype)
        if attns[0].q_norm is None:
            return cls(weights, None, norms, text, dtype)
        both = torch.stack([norm.gain for attn in attns for norm in (attn.q_norm, attn.k_norm)])
        both = both.to(dtype).view(len(attns), 2, 1, -1, 2)
        heads = (both[:, i].expand(-1, count, -1, -1) for i, count in enumerate((attns[0].heads, attns[0].kv_heads)))
        gains = torch.cat(tuple(heads), dim=1).unbind()
        normed = [RMSNormOfLayer.of(gain, attns[0].q_norm.eps, num_axes=2) for gain in gains]
        return cls(weights, normed, norms, text, dtype)

    def norms(self, conditioning: Conditioning | None) -> Norms:
        """Those of a stream of text alone (`conditioning` is None), or of spans alone."""
        if conditioning is None or isinstance(self.modules[0], PlainNorm):
            assert self.text is not None
            return self.text
        return _of_spans(self.modules, conditioning)


class Scratch(NamedTuple):
    """CPU only: where all layers write what is large and soon forgotten.

    Many megabytes come from the system anew whenever they are allocated, and to touch them for the first time can take
    as long as the product that is written there. The features of a feedforward are made for some rows at a time.
    """

    qkv: Shaped[Tensor, "n o"]
    hidden: Shaped[Tensor, "r o"]


def _scratch(layers: Sequence[LayerWeights], x: Shaped[Tensor, "n d"]) -> Scratch | None:
    """For a stream that is large enough to gain by it, and layers of one size."""
    if len(x) < FEWEST_AT_ONCE:
        return None
    [(qkv, features), *others] = {(len(layer.to_qkv.weight), len(layer.to_hidden.weight)) for layer in layers}
    row = features * x.element_size()
    if others or len(x) * row < SMALLEST_SCRATCH:
        return None
    num_parts = ceil(len(x) / max(FEWEST_AT_ONCE, HIDDEN_AT_ONCE // row))
    return Scratch(x.new_empty(len(x), qkv), x.new_empty(ceil(len(x) / num_parts), features))


def run_layers(
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
    norms, scratch = prepared.norms(conditioning), None
    if x.device.type == "cpu" and not is_real:
        scratch = _scratch(prepared.weights, x)
    shape, first = x.shape, norms[0]
    if isinstance(first, NormOfLayer) and first.shift is not None and first.index is None:
        x = x.unflatten(0, (len(first.scale), -1))
    skips: list[Tensor] = []
    for index, layer in enumerate(prepared.weights):
        before_attention, before_ff = norms[2 * index], norms[2 * index + 1]
        skipped = None if layer.skip is None else skips.pop()
        qk_norm = None if prepared.qk_norms is None else prepared.qk_norms[index]
        x, normed, q, k, v = begin(layer, x, skipped, before_attention, qk_norm, prepared.precise, rotation, scratch)
        gathered = plan.attend(q, k, v, layer=index)
        x = finish(layer, x, normed, gathered, before_attention, before_ff, scratch)
        if index < len(prepared.weights) // 2:
            skips.append(x)
    return x.view(shape)


def _begin(
    layer: LayerWeights,
    x: Shaped[Tensor, "... d"],
    skipped: Shaped[Tensor, "... d"] | None,
    norm: NormOfLayer | RMSNormOfLayer,
    qk_norm: RMSNormOfLayer | None,
    dtype: torch.dtype,
    rotation: Tensor,
    scratch: Scratch | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer up to its attention: the residual stream, what attention reads, queries, keys and values."""
    if skipped is not None:
        assert layer.skip is not None
        x = layer.skip.add_to(x, torch.cat((x, skipped), dim=-1))
    normed, n, num_heads = norm.normed(x), len(rotation), layer.heads + 2 * layer.kv_heads
    qkv = layer.to_qkv(normed, None if scratch is None else scratch.qkv).view(n, num_heads, -1)
    # `split_with_sizes` and `view` are one operator each; `split`, `chunk` and `unflatten` are Python around several
    qk, v = qkv.split_with_sizes((layer.heads + layer.kv_heads, layer.kv_heads), 1)
    qk = qk.view(n, num_heads - layer.kv_heads, -1, 2)
    exact = qk if qk.dtype == dtype else qk.to(dtype)
    if qk_norm is not None:
        exact = qk_norm.normed(exact, overwrites=True)
    if torch.compiler.is_compiling():
        exact = rotate(exact.flatten(-2), rotation)
    else:
        torch.view_as_complex(exact).mul_(rotation)
    qk = exact if exact.dtype == normed.dtype else exact.to(normed.dtype)
    q, k = qk.reshape(n, -1, v.shape[-1]).split_with_sizes((layer.heads, layer.kv_heads), 1)
    return x, normed, q, k, v


def _finish(
    layer: LayerWeights,
    x: Shaped[Tensor, "... d"],
    normed: Shaped[Tensor, "... d"],
    gathered: Shaped[Tensor, "n h e"],
    before_attention: NormOfLayer | RMSNormOfLayer,
    before_ff: NormOfLayer | RMSNormOfLayer,
    scratch: Scratch | None,
) -> Shaped[Tensor, "... d"]:
    """The rest of a layer: the residual stream behind it, from what the heads `gathered`."""
    if layer.to_gates is not None:
        gates = layer.to_gates(normed).sigmoid_()
        gathered = gathered * gates.view(*gathered.shape[:-1], 1)
    # how the output of attention lies in memory differs from kernel to kernel
    x = before_attention.add_product(x, layer.to_out, gathered.reshape(*normed.shape[:-1], -1))
    normed = before_ff.normed(x)
    if scratch is None:
        return before_ff.add_product(x, layer.from_hidden, _activated(layer, layer.to_hidden(normed)))
    return before_ff.add_output(x, _feedforward_in_parts(layer, normed, scratch))


def _feedforward_in_parts(layer: LayerWeights, x: Shaped[Tensor, "... d"], scratch: Scratch) -> Shaped[Tensor, "... d"]:
    out, at_once = torch.empty_like(x), len(scratch.hidden)
    rows = zip(x.view(-1, x.shape[-1]).split(at_once), out.view(-1, x.shape[-1]).split(at_once), strict=True)
    for part, target in rows:
        layer.from_hidden(_activated(layer, layer.to_hidden(part, scratch.hidden[: len(part)])), target)
    return out


def _activated(layer: LayerWeights, hidden: Shaped[Tensor, "... two_f"]) -> Shaped[Tensor, "... f"]:
    """`value activation(gate)`, where `hidden = [value gate]`."""
    value, gate = hidden.split_with_sizes([hidden.shape[-1] // 2] * 2, -1)
    return ACTIVATIONS[layer.activation](gate).mul_(value)


def _linears(layer: Any) -> tuple[Any, ...]:
    """Those of a layer, None where it has none, in the order of `LayerWeights`."""
    attn, ff = layer.attn, layer.ff
    return (attn.to_qkv, attn.to_gates, attn.to_out, ff.to_hidden, ff.to_out, layer.skip)


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
