"""The parts of a block that belong to one modality: feedforward, adaptive norm, embedding of times, last layer.

s tokens of one modality, t tokens or 1, d its width, c condition, o output; leading batch dimensions are free.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.cpu.elementwise import GatedLinear
from transfusion_pytorch.network.linear import Linear, is_plain_linear
from transfusion_pytorch.network.norms import RMSNorm, sinusoids
from transfusion_pytorch.network.precision import working_dtype
from transfusion_pytorch.network.shortcuts import uses_cpu_kernels

Activation = Literal["swiglu", "gelu", "gelu_tanh"]
NORM_EPS = 1e-6  # that of DiT and SD3


class FeedForward(nn.Module):
    """Two layers per token, `dim * ff_mult` wide between them.

    | activation | formula | biases |
    |---|---|---|
    | `"swiglu"` | `out(in(x) * silu(gate(x)))` (GLU variants, arXiv 2002.05202) | none |
    | `"gelu"` | `out(gelu(in(x)))` | both layers |
    | `"gelu_tanh"` | the same with the approximation by a tanh (SD3) | both layers |

    The two inner layers of SwiGLU are one product: the first half of `to_hidden` is `in`, the second is `gate`.
    """

    def __init__(self, dim: int, *, ff_mult: float = 4, activation: Activation = "swiglu"):
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
        hidden = int(dim * ff_mult)
        if hidden < 1:
            raise ValueError(f"dim * ff_mult must be at least 1, got {dim} * {ff_mult}")
        self.is_gated, self.approximate = activation == "swiglu", "tanh" if activation == "gelu_tanh" else "none"
        self.to_hidden = Linear(dim, 2 * hidden if self.is_gated else hidden, bias=not self.is_gated)
        self.to_out = Linear(hidden, dim, bias=not self.is_gated)

    def forward(self, x: Shaped[Tensor, "*batch s d"]) -> Shaped[Tensor, "*batch s d"]:
        """Each token by itself; the batch dimensions are free."""
        hidden = self.to_hidden(x)
        if not self.is_gated:
            return self.to_out(F.gelu(hidden, approximate=self.approximate))
        if uses_cpu_kernels(hidden) and is_plain_linear(self.to_out):
            out = GatedLinear.apply(hidden.flatten(0, -2), self.to_out.weight, self.to_out.bias, "swiglu")
            return out.view(x.shape)  # type: ignore[attr-defined]
        value, gate = hidden.chunk(2, dim=-1)
        return self.to_out(value * F.silu(gate))


class Modulation(NamedTuple):
    """What the condition does to the tokens of one modality around one branch. Of each token, or one for all."""

    scale: Shaped[Tensor, "*batch t d"]  # 1 is neutral
    shift: Shaped[Tensor, "*batch t d"]
    gate: Shaped[Tensor, "*batch t d"] | None
    eps: float

    def normed(self, x: Shaped[Tensor, "*batch s d"]) -> Shaped[Tensor, "*batch s d"]:
        """The layer norm of `x`, scaled and shifted, in the type that the products behind it take."""
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.shift, normed, self.scale).to(working_dtype(x))

    def add_gated(self, x: Shaped[Tensor, "*batch s d"], out: Shaped[Tensor, "*batch s d"]) -> Tensor:
        """The residual stream `x` and the gated output of the branch."""
        assert self.gate is not None
        return torch.addcmul(x, out, self.gate)


class AdaptiveLayerNorm(nn.Module):
    """`norm(x) (1 + scale) + shift`, with a layer norm without parameters and a projection of the condition that starts
    at zero (DiT, arXiv 2212.09748, adaLN-Zero).

    With `has_gate` the projection also makes the gate of the branch behind the norm, which starts at zero as well: see
    `modulation`.
    """

    def __init__(self, dim: int, dim_cond: int, *, has_gate: bool = False, eps: float = NORM_EPS):
        super().__init__()
        self.has_gate, self.eps = has_gate, eps
        self.to_modulation = Linear(dim_cond, (3 if has_gate else 2) * dim)  # shift, scale, gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def modulation(self, cond: Shaped[Tensor, "*rows c"]) -> Modulation:
        """Of a condition that has an axis of tokens, or a 1 in its place."""
        shift, scale, *gates = self.to_modulation(cond).chunk(3 if self.has_gate else 2, dim=-1)
        return Modulation(1 + scale, shift, gates[0] if gates else None, self.eps)

    def forward(self, x: Shaped[Tensor, "*batch s d"], cond: Shaped[Tensor, "*rows c"]) -> Shaped[Tensor, "*batch s d"]:
        """`cond` is `(*batch, c)`, one for all tokens of a sample, or `(*batch, s, c)`. It goes into a linear layer as
        it is: an embedding of a time comes through a SiLU before, as in DiT (`MMDiT` does so).
        """
        return self.modulation(with_token_axis(cond, x)).normed(x)


def with_token_axis(cond: Tensor, x: Tensor) -> Tensor:
    """A condition `(*batch, c)` as `(*batch, 1, c)`; one of each token `(*batch, s, c)` as it is."""
    return cond if cond.ndim == x.ndim else cond.unsqueeze(-2)


class TimestepEmbedding(nn.Module):
    """A number, such as a time, as a vector: sines and cosines of it, then two layers with a SiLU between.

    The angles are the number times `timestep_scale` times frequencies from 1 down to 1 / 10,000 (arXiv 2006.11239 after
    1706.03762). Those frequencies are made for times up to 1,000: take `timestep_scale=1000` to tell times in [0, 1]
    apart as well as SD3 does.
    """

    def __init__(self, dim: int, *, timestep_embed_dim: int = 256, timestep_scale: float = 1.0):
        super().__init__()
        if timestep_embed_dim < 2 or timestep_embed_dim % 2:
            raise ValueError(f"timestep_embed_dim must be even (sines and cosines), got {timestep_embed_dim}")
        self.timestep_embed_dim, self.timestep_scale = timestep_embed_dim, timestep_scale
        self.layers = nn.Sequential(Linear(timestep_embed_dim, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, timestep: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        """One vector for each number, in the type of the weights; angles are made in single precision at least."""
        angles = timestep.reshape(-1, 1) * self.timestep_scale
        features = sinusoids(angles, count=self.timestep_embed_dim // 2, highest=1.0, ratio=10_000.0)
        embedded = self.layers(features.to(next(self.parameters()).dtype))
        return embedded.view(*timestep.shape, embedded.shape[-1])


class ModulatedFinalLayer(nn.Module):
    """An adaptive norm and a linear layer that starts at zero, as everything here does: the first output is 0."""

    def __init__(self, dim: int, dim_out: int, dim_cond: int, *, eps: float = NORM_EPS):
        super().__init__()
        self.norm = AdaptiveLayerNorm(dim, dim_cond, eps=eps)
        self.to_out = Linear(dim, dim_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _zero(self.to_out)

    def forward(self, x: Shaped[Tensor, "*batch s d"], cond: Shaped[Tensor, "*rows c"]) -> Shaped[Tensor, "*batch s o"]:
        """`cond` as in `AdaptiveLayerNorm`."""
        return self.to_out(self.norm(x, cond))


class SimpleFinalLayer(nn.Module):
    """A root mean square norm and a linear layer that starts at zero."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_out = Linear(dim, dim_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _zero(self.to_out)

    def forward(self, x: Shaped[Tensor, "*batch s d"]) -> Shaped[Tensor, "*batch s o"]:
        """The outputs of each token; zero before training."""
        return self.to_out(self.norm(x))


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
