"""Norms, what the condition of a span does to its tokens (scale, shift and gate), and the embedding of times.

n tokens, m spans, t tokens of each of equally long spans, d model, c condition, a axes, f features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import module_of
from transfusion_pytorch.network.cpu.elementwise import GatedAdd, ModulatedNorm
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.lookup import Segments, look_up
from transfusion_pytorch.network.precision import LAYER_NORM_EPS, RMS_NORM_EPS, precise, working_dtype
from transfusion_pytorch.network.shortcuts import uses_cpu_kernels


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


Modulation = TextModulation | SpanModulation | IndexedModulation


class RMSNorm(nn.Module):
    """Root mean square norm whose gain is `1 + weight`, so that weight decay pulls it towards 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... d"]:
        exact = x.to(precise(x.dtype))
        inverse = (exact.square().mean(dim=-1, keepdim=True) + RMS_NORM_EPS).rsqrt()
        return (exact * inverse * (1 + self.weight)).to(x.dtype)


class AdaptiveNorm(nn.Module):
    """Layer norm conditioned per span (DiT, arXiv 2212.09748, adaLN-Zero); text has a learned scale of its own.

    Spans: `norm(x) (1 + scale) + shift`, and the branch's output times `gate`; all three are projected from the
    span's condition and start at zero, so that a new block leaves latents as they are. Text: `norm(x) (1 +
    text_scale)`, and the output times `1 + text_gate`. A norm without a branch behind it has no gate.

    The projection is made once for each span, and its tokens look it up.
    """

    def __init__(self, dim: int, dim_condition: int, *, has_gate: bool = True):
        super().__init__()
        self.dim = dim
        self.text_scale = nn.Parameter(torch.zeros(dim))
        self.text_gate = nn.Parameter(torch.zeros(dim)) if has_gate else None
        self.to_modulation = Linear(dim_condition, (3 if has_gate else 2) * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.text_scale, self.text_gate, self.to_modulation.weight, self.to_modulation.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def modulation(self, conditioning: Conditioning | None) -> Modulation:
        """What this norm, and the gate of the branch behind it, do to the tokens of a batch."""
        gate = None if self.text_gate is None else 1 + self.text_gate
        if conditioning is None:
            return TextModulation(1 + self.text_scale, gate)
        if conditioning.modulations is not None:
            return conditioning.modulations[module_of(self)]
        projected = self.to_modulation(conditioning.spans)
        table = torch.cat((1 + projected[:, : self.dim], projected[:, self.dim :]), dim=-1)
        if conditioning.modulation_index is None:
            scale, shift, *gates = table[:, None].split(self.dim, dim=-1)
            return SpanModulation(scale, shift, gates[0] if gates else None)
        text = [1 + self.text_scale, torch.zeros_like(self.text_scale), *([] if gate is None else [gate])]
        table = torch.cat((torch.cat(text)[None].to(table.dtype), table))
        scale, shift, *gates = table.split(self.dim, dim=-1)
        gates = gates[0] if gates else None
        return IndexedModulation(scale, shift, gates, conditioning.modulation_index, conditioning.segments)

    def forward(self, x: Shaped[Tensor, "n d"], modulation: Modulation) -> Shaped[Tensor, "n d"]:
        return modulation.normed(x)


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
