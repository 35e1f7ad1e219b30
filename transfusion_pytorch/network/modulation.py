"""What the condition of a span does to its tokens: scale and shift of a norm, and the gate of a branch.

n tokens, m spans, t tokens of each of equally long spans, d model, c condition.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.network.cpu.elementwise import GatedAdd, ModulatedNorm
from transfusion_pytorch.network.lookup import Segments, look_up
from transfusion_pytorch.network.precision import LAYER_NORM_EPS
from transfusion_pytorch.network.shortcuts import uses_cpu_kernels


class Conditioning(NamedTuple):
    """The condition of every span, and which tokens it is for.

    | batch | conditioning | modulation |
    |---|---|---|
    | text alone | None | `TextModulation`: one for all tokens |
    | spans of one length and no text (drawing) | `modulation_index` is None | `SpanModulation`: one a span |
    | anything else | `modulation_index`: 0 = text, i + 1 = span i | `IndexedModulation`: looked up by each token |
    """

    spans: Float[Tensor, "m c"]
    modulation_index: Int[Tensor, " n"] | None
    segments: Segments | None = None

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
        """The layer norm of `x`, scaled and shifted."""
        return F.layer_norm(x, x.shape[-1:], weight=self.scale, eps=LAYER_NORM_EPS)

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
        return torch.addcmul(self.shift, normed, self.scale).view_as(x)

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
            return ModulatedNorm.apply(x, self.scale, self.shift, self.index)  # type: ignore[return-value]
        normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self._of_tokens(self.shift), normed, self._of_tokens(self.scale))

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
