"""Norms, what the condition of a span does to its tokens (scale, shift and gate), and the embedding of times.

n tokens, m spans, t tokens of each of equally long spans, d model, c condition, a axes, f features.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import module_of
from transfusion_pytorch.network.cpu.elementwise import GainedNorm, GatedAdd, ModulatedNorm
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.lookup import Segments, look_up
from transfusion_pytorch.network.precision import LAYER_NORM_EPS, RMS_NORM_EPS, precise, working_dtype
from transfusion_pytorch.network.shortcuts import uses_cpu_kernels

Reads = Literal["text", "spans", "both"]


class Conditioning(NamedTuple):
    """The condition of every span, and which tokens it is for.

    | batch | conditioning | modulation |
    |---|---|---|
    | text alone | None | `TextModulation`: one for all tokens |
    | spans of one length and no text (drawing) | `modulation_index` is None | `SpanModulation`: one a span |
    | anything else | `modulation_index`: 0 = text, i + 1 = span i | `IndexedModulation`: looked up by each token |

    `modulations` of each norm, where they were made before (`conditions.py`).
    """

    spans: Float[Tensor, "m c"]
    modulation_index: Int[Tensor, " n"] | None
    segments: Segments | None = None
    modulations: Mapping[Any, Any] | None = None

    def with_segments(self) -> "Conditioning":
        """For devices and compiled graphs where many tokens of one index cannot be added up one by one."""
        if self.modulation_index is None or self.segments is not None:
            return self
        return self._replace(segments=Segments.of(self.modulation_index, len(self.spans) + 1))

    def looked_up(self, table: Shaped[Tensor, "m f"]) -> Shaped[Tensor, "r f"]:
        """The row of each token, zero for text; where spans are equally long and alone, the table as it is."""
        if self.modulation_index is None:
            return table
        return look_up(F.pad(table, (0, 0, 1, 0)), self.modulation_index, self.segments)


class TextModulation(NamedTuple):
    """One scale and one gate for all tokens, which are text."""

    scale: Shaped[Tensor, " d"]
    gate: Shaped[Tensor, " d"] | None

    def normed(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        """The layer norm of `x`, scaled and shifted, rounded once to what the products behind it take."""
        return F.layer_norm(x, x.shape[-1:], weight=self.scale, eps=LAYER_NORM_EPS).to(working_dtype(x))

    def gated(self, out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        """The output of a branch, times its gate."""
        assert self.gate is not None
        return out * self.gate

    def add_gated(self, x: Shaped[Tensor, "n d"], out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        """The residual stream `x` and the gated output of a branch."""
        assert self.gate is not None
        return torch.addcmul(x, out, self.gate)


class SpanModulation(NamedTuple):
    """One for every span; the spans are equally long and follow each other, with no text between."""

    scale: Shaped[Tensor, "m 1 d"]
    shift: Shaped[Tensor, "m 1 d"]
    gate: Shaped[Tensor, "m 1 d"] | None

    def normed(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        normed = F.layer_norm(self._by_span(x), x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self.shift, normed, self.scale).view_as(x).to(working_dtype(x))

    def gated(self, out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        assert self.gate is not None
        return (self._by_span(out) * self.gate).view_as(out)

    def add_gated(self, x: Shaped[Tensor, "n d"], out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        assert self.gate is not None
        return torch.addcmul(self._by_span(x), self._by_span(out), self.gate).view_as(x)

    def _by_span(self, x: Tensor) -> Tensor:
        """`(n, d)` as `(m, t, d)`."""
        return x.unflatten(0, (len(self.scale), -1))


class IndexedModulation(NamedTuple):
    """Tables in which every token looks up the row of its `index`: 0 for text, i + 1 for span i."""

    scale: Shaped[Tensor, "m_plus_1 d"]
    shift: Shaped[Tensor, "m_plus_1 d"]
    gate: Shaped[Tensor, "m_plus_1 d"] | None
    index: Int[Tensor, " n"]
    segments: Segments | None = None

    def normed(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        if uses_cpu_kernels(x):
            return ModulatedNorm.apply(x, self.scale, self.shift, self.index, working_dtype(x))  # type: ignore[return-value]
        normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self._of_tokens(self.shift), normed, self._of_tokens(self.scale)).to(working_dtype(x))

    def gated(self, out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        return out * self._of_tokens(self.gate)

    def add_gated(self, x: Shaped[Tensor, "n d"], out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        if uses_cpu_kernels(x):
            return GatedAdd.apply(x, out, self.gate, self.index)  # type: ignore[return-value]
        return torch.addcmul(x, out, self._of_tokens(self.gate))

    def _of_tokens(self, table: Tensor | None) -> Tensor:
        assert table is not None
        return look_up(table, self.index, self.segments)


class RMSModulation(NamedTuple):
    """RMS norm with a `gain` for all tokens. `scale`, `shift` and `gate` come on top, where spans have any: 1, 0 and 1
    leave it alone. There is a row of them for each of r spans of one length, or for each token.
    """

    gain: Shaped[Tensor, " d"]
    eps: float
    scale: Shaped[Tensor, "r 1 d"] | None = None
    shift: Shaped[Tensor, "r 1 d"] | None = None
    gate: Shaped[Tensor, "r 1 d"] | None = None

    def normed(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        normed: Any
        if uses_cpu_kernels(x) and torch.is_grad_enabled():
            normed = GainedNorm.apply(x, self.gain, self.eps, working_dtype(x) if self.scale is None else x.dtype)
        else:
            normed = F.rms_norm(x, x.shape[-1:], weight=self.gain, eps=self.eps)
        if self.scale is not None and self.shift is not None:
            normed = torch.addcmul(self.shift, self._by_row(normed), self.scale).view_as(x)
        return normed.to(working_dtype(x))

    def gated(self, out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        return out if self.gate is None else (self._by_row(out) * self.gate).view_as(out)

    def add_gated(self, x: Shaped[Tensor, "n d"], out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        return x + out if self.gate is None else torch.addcmul(self._by_row(x), self._by_row(out), self.gate).view_as(x)

    def _by_row(self, x: Tensor) -> Tensor:
        """`(n, d)` as `(r, n / r, d)`."""
        assert self.scale is not None
        rows = len(self.scale)
        return x.reshape(rows, len(x) // max(rows, 1), x.shape[-1])  # which may be none at all


Modulation = TextModulation | SpanModulation | IndexedModulation | RMSModulation


class RMSNorm(nn.Module):
    """Root mean square norm.

    Its gain is `1 + weight`, so that weight decay pulls it towards 1, or the `weight` itself if not `unit_offset`, as
    in most language models.
    """

    def __init__(self, dim: int, *, eps: float = RMS_NORM_EPS, unit_offset: bool = True):
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.full((dim,), self._start))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self._start)

    @property
    def _start(self) -> float:
        return 0.0 if self.unit_offset else 1.0

    @property
    def gain(self) -> Shaped[Tensor, " d"]:
        return 1 + self.weight if self.unit_offset else self.weight

    def forward(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... d"]:
        exact = x.to(precise(x.dtype))
        inverse = (exact.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return (exact * inverse * self.gain).to(x.dtype)


class AdaptiveNorm(nn.Module):
    """Layer norm conditioned per span (DiT, arXiv 2212.09748, adaLN-Zero); text has a learned scale of its own.

    Spans: `norm(x) (1 + scale) + shift`, and the branch's output times `gate`; all three are projected from the
    span's condition and start at zero, so that a new block leaves latents as they are. Text: `norm(x) (1 +
    text_scale)`, and the output times `1 + text_gate`. A norm without a branch behind it has no gate.

    The projection is made once for each span, and its tokens look it up.

    `reads` says whose norm it is: that of "text", of "spans", or of "both". Of one alone it has what that needs only.
    """

    def __init__(self, dim: int, dim_condition: int, *, has_gate: bool = True, reads: Reads = "both"):
        super().__init__()
        self.dim, self.reads, self.has_gate = dim, reads, has_gate
        has_text = reads != "spans"
        self.text_scale = nn.Parameter(torch.zeros(dim)) if has_text else None
        self.text_gate = nn.Parameter(torch.zeros(dim)) if has_text and has_gate else None
        self.to_modulation = Linear(dim_condition, (3 if has_gate else 2) * dim) if reads != "text" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def modulation(self, conditioning: Conditioning | None) -> Modulation:
        """What this norm, and the gate of the branch behind it, do to the tokens of a batch."""
        gate = None if self.text_gate is None else 1 + self.text_gate
        if conditioning is None:
            assert self.text_scale is not None
            return TextModulation(1 + self.text_scale, gate)
        if conditioning.modulations is not None:
            return conditioning.modulations[module_of(self)]
        assert self.to_modulation is not None
        projected = self.to_modulation(conditioning.spans)
        table = torch.cat((1 + projected[:, : self.dim], projected[:, self.dim :]), dim=-1)
        if conditioning.modulation_index is None:
            scale, shift, *gates = table[:, None].split(self.dim, dim=-1)
            return SpanModulation(scale, shift, gates[0] if gates else None)
        if self.text_scale is None:
            text = [torch.zeros_like(table[0])]  # a row that nobody looks up
        else:
            text = [1 + self.text_scale, torch.zeros_like(self.text_scale), *([] if gate is None else [gate])]
        table = torch.cat((torch.cat(text)[None].to(table.dtype), table))
        scale, shift, *gates = table.split(self.dim, dim=-1)
        gates = gates[0] if gates else None
        return IndexedModulation(scale, shift, gates, conditioning.modulation_index, conditioning.segments)

    def forward(self, x: Shaped[Tensor, "n d"], modulation: Modulation) -> Shaped[Tensor, "n d"]:
        return modulation.normed(x)


class PlainNorm(RMSNorm):
    """RMS norm in the place of an adaptive one, as language models have it: the same for text and spans."""

    def __init__(self, dim: int, *, eps: float = RMS_NORM_EPS):
        super().__init__(dim, eps=eps, unit_offset=False)

    def modulation(self, conditioning: Conditioning | None) -> Modulation:
        return RMSModulation(self.weight, self.eps)

    def forward(self, x: Shaped[Tensor, "n d"], modulation: Modulation) -> Shaped[Tensor, "n d"]:
        return modulation.normed(x)


class AdaptivePlainNorm(PlainNorm):
    """RMS norm that the condition of a span scales and shifts, and whose gate it moves.

    It starts as the plain norm, gate 1: for a language model's layer, or a copy of one, that learns to read latents.
    """

    def __init__(self, dim: int, dim_condition: int, *, eps: float = RMS_NORM_EPS, has_gate: bool = True):
        super().__init__(dim, eps=eps)
        self.to_modulation = Linear(dim_condition, (3 if has_gate else 2) * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def modulation(self, conditioning: Conditioning | None) -> Modulation:
        if conditioning is None:
            return super().modulation(conditioning)
        offsets = conditioning.looked_up(self.to_modulation(conditioning.spans))[:, None]
        scale, shift, *gates = offsets.split(len(self.weight), dim=-1)
        return RMSModulation(self.weight, self.eps, 1 + scale, shift, 1 + gates[0] if gates else None)


NormKind = Literal["adaptive", "rms", "adaptive_rms"]


def make_norm(kind: NormKind, dim: int, *, eps: float, reads: Reads = "both", has_gate: bool = True) -> nn.Module:
    """A norm of a trunk, for the tokens that it `reads`. Raises `ValueError` for an unknown kind."""
    if kind == "adaptive":
        return AdaptiveNorm(dim, dim, has_gate=has_gate, reads=reads)
    if kind == "rms" or (kind == "adaptive_rms" and reads == "text"):
        return PlainNorm(dim, eps=eps)
    if kind != "adaptive_rms":
        raise ValueError(f"norm must be 'adaptive', 'rms' or 'adaptive_rms', got {kind!r}")
    return AdaptivePlainNorm(dim, dim, eps=eps, has_gate=has_gate)


def sinusoids(x: Float[Tensor, "n a"], *, count: int, highest: float, ratio: float) -> Float[Tensor, "n f"]:
    """Sines and cosines of every column at `count` frequencies, from `highest` down to `highest / ratio`.

    In single precision at least, and from no buffer that would be rounded with the parameters: bfloat16 tells 900
    radians from 904, and nothing between.
    """
    x = x.to(precise(x.dtype))
    exponent = torch.arange(count, device=x.device, dtype=x.dtype) / count
    angle = rearrange(x[..., None] * (highest * ratio**-exponent), "n a f -> n (a f)")
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class TimeEmbedding(nn.Module):
    """A time in [0, 1] as a condition: sines and cosines of it, then two layers.

    The frequencies are those of diffusion models, where times run to 1,000 (arXiv 2006.11239 after 1706.03762).
    """

    def __init__(self, dim: int, *, num_frequencies: int = 64, max_time: float = 1000.0):
        super().__init__()
        self.num_frequencies, self.max_time = num_frequencies, max_time
        self.layers = nn.Sequential(Linear(2 * num_frequencies, dim), nn.SiLU(), Linear(dim, dim), nn.SiLU())

    def forward(self, t: Float[Tensor, " m"]) -> Float[Tensor, "m c"]:
        features = sinusoids(t[:, None], count=self.num_frequencies, highest=self.max_time, ratio=10_000.0)
        return self.layers(features.to(next(self.parameters()).dtype))
