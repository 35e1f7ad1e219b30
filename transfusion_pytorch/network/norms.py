"""Norms, and the modulation that tells a span its time.

n tokens, m spans, d model, c condition, a axes, f features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.fused import LAYER_NORM_EPS, gated_add, inverse_rms, modulated_norm
from transfusion_pytorch.network.upcast import Linear, precise


class RMSNorm(nn.Module):
    """Root mean square norm whose gain is `1 + weight`, so that weight decay pulls it towards 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... d"]:
        exact = x.to(precise(x.dtype))
        return (exact * inverse_rms(exact) * (1 + self.weight)).to(x.dtype)


class Conditioning(NamedTuple):
    """The condition of every span, and the span of every token counted from 1 (0 is text).

    There is no `row` where there is nothing but spans of one length, one behind the other.
    """

    spans: Float[Tensor, "m c"]
    row: Int[Tensor, " n"] | None


class Modulation(NamedTuple):
    """What an adaptive norm does to each token.

    Tables `(m + 1, d)` in which tokens look up their `row`. Where there is nothing but text they are `(d)`, without a
    shift; where there is nothing but spans of one length `(m, 1, d)`; and there is no row.
    """

    scale: Shaped[Tensor, "..."]
    shift: Shaped[Tensor, "..."] | None
    gate: Shaped[Tensor, "..."] | None
    row: Int[Tensor, " n"] | None = None

    def normed(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        """The layer norm of `x`, scaled and shifted."""
        dim = x.shape[-1:]
        if self.shift is None:
            return F.layer_norm(x, dim, weight=self.scale, eps=LAYER_NORM_EPS)
        if self.row is not None:
            return modulated_norm(x, self.scale, self.shift, self.row)
        normed = F.layer_norm(_stretches(x, self.scale), dim, eps=LAYER_NORM_EPS)
        return torch.addcmul(self.shift, normed, self.scale).view_as(x)

    def add_gated(self, x: Shaped[Tensor, "n d"], out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        """The residual stream `x` and what a branch adds to it."""
        assert self.gate is not None
        if self.row is not None:
            return gated_add(x, out, self.gate, self.row)
        return torch.addcmul(_stretches(x, self.gate), _stretches(out, self.gate), self.gate).view_as(x)

    def gated(self, out: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        assert self.gate is not None
        gate = self.gate if self.row is None else self.gate.index_select(0, self.row)
        return (_stretches(out, gate) * gate).view_as(out)


def _stretches(x: Tensor, modulation: Tensor) -> Tensor:
    """`(n, d)` as `(m, t, d)` where every stretch of t tokens is modulated alike."""
    return x.unflatten(0, (len(modulation), -1)) if modulation.ndim == 3 else x


class AdaptiveNorm(nn.Module):
    """Layer norm conditioned per span (DiT, arXiv 2212.09748, adaLN-Zero); text has a learned scale of its own.

    Spans: `norm(x) (1 + scale) + shift`, and the branch's output times `gate`; all three are projected from the
    span's condition and start at zero, so that a new block leaves latents as they are. Text: `norm(x) (1 +
    text_scale)`, and the output times `1 + text_gate`. A norm without a branch behind it is not `gated`.

    The projection is made once for each span and looked up by its tokens.
    """

    def __init__(self, dim: int, dim_condition: int, *, gated: bool = True):
        super().__init__()
        self.dim = dim
        self.text_scale = nn.Parameter(torch.zeros(dim))
        self.text_gate = nn.Parameter(torch.zeros(dim)) if gated else None
        self.to_modulation = Linear(dim_condition, (3 if gated else 2) * dim)
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def modulation(self, conditioning: Conditioning | None) -> Modulation:
        gate = None if self.text_gate is None else 1 + self.text_gate
        if conditioning is None:
            return Modulation(1 + self.text_scale, None, gate)
        projected = self.to_modulation(conditioning.spans)
        table = torch.cat((1 + projected[:, : self.dim], projected[:, self.dim :]), dim=-1)
        if conditioning.row is None:
            table = table[:, None]
        else:
            text = [1 + self.text_scale, torch.zeros_like(self.text_scale), *([] if gate is None else [gate])]
            table = torch.cat((torch.cat(text)[None].to(table.dtype), table))
        scale, shift, *gates = table.split(self.dim, dim=-1)
        return Modulation(scale, shift, gates[0] if gates else None, conditioning.row)

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
