"""Norms, and the embedding of times.

n tokens, m spans, d model, c condition, a axes, f features.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.modulation import (
    Conditioning,
    IndexedModulation,
    Modulation,
    SpanModulation,
    TextModulation,
)
from transfusion_pytorch.network.precision import RMS_NORM_EPS, precise


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
