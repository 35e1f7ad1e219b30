"""One layer of the trunk: attention and feedforward, each behind an adaptive norm and in front of a gated residual.

n tokens, d model, f frequencies, k key/value heads, e channels of a head, r = n times the number of residual streams.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.attend import AttentionPlan
from transfusion_pytorch.network.attention import Attention
from transfusion_pytorch.network.cpu.elementwise import GatedActivation, GatedLinear
from transfusion_pytorch.network.cpu.products import linear
from transfusion_pytorch.network.linear import Linear, is_plain_linear
from transfusion_pytorch.network.modulation import Conditioning, Modulation
from transfusion_pytorch.network.norms import AdaptiveNorm
from transfusion_pytorch.network.shortcuts import is_untouched, uses_cpu_kernels

ACTIVATIONS = {"geglu": F.gelu, "swiglu": F.silu}
HIDDEN_MULTIPLE = 16  # products of rows that end where vector registers do are up to a quarter faster


class FeedForward(nn.Module):
    """A gated feedforward (GLU variants, arXiv 2002.05202) with two thirds of the plain one's width, for equal
    parameters, rounded up to a multiple of 16.
    """

    def __init__(self, dim: int, *, expansion_factor: float = 4, activation: str = "geglu", dropout: float = 0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = dim * expansion_factor * 2 / 3
        if hidden < 1:
            raise ValueError(f"expansion_factor must be positive, and not so small, got {expansion_factor}")
        hidden = HIDDEN_MULTIPLE * ceil(round(hidden / HIDDEN_MULTIPLE, 6))  # 528.0000000000001 is 528
        self.activation = activation
        self.to_hidden = Linear(dim, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.to_out = Linear(hidden, dim)

    def forward(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        return self._contract(self.to_hidden(x))

    def _contract(self, hidden: Shaped[Tensor, "n two_f"]) -> Shaped[Tensor, "n d"]:
        if uses_cpu_kernels(hidden) and self._has_no_dropout() and is_plain_linear(self.to_out):
            return GatedLinear.apply(hidden, self.to_out.weight, self.to_out.bias, self.activation)  # type: ignore[return-value]
        return self.to_out(self.dropout(self._activate(hidden)))

    def _activate(self, hidden: Tensor) -> Tensor:
        """`value activation(gate)`, where `hidden = [value gate]`."""
        if uses_cpu_kernels(hidden):
            return GatedActivation.apply(hidden, self.activation)  # type: ignore[return-value]
        value, gate = hidden.chunk(2, dim=-1)
        return value * ACTIVATIONS[self.activation](gate)

    def _has_no_dropout(self) -> bool:
        return is_untouched(self.dropout, nn.Dropout) and not (self.dropout.training and self.dropout.p > 0)


class Layer(nn.Module):
    """Attention and feedforward.

    `connect(layer_index=...)` makes a residual connection: from the residual streams to the input of a branch, and a
    function that merges the output of the branch into them. A layer that `has_skip` also reads what an earlier one
    wrote; one that `keeps_values` hands them on for the value residual.
    """

    def __init__(
        self,
        dim: int,
        index: int,
        *,
        connect: Callable[..., nn.Module],
        has_one_stream: bool,
        has_skip: bool,
        keeps_values: bool,
        dropout: float,
        attn: Mapping[str, Any],
        ff: Mapping[str, Any],
    ):
        super().__init__()
        self.index, self.connect = index, connect
        self.has_one_stream, self.keeps_values = has_one_stream, keeps_values
        self.skip = Linear(2 * dim, dim, bias=False) if has_skip else None
        self.attn_norm, self.ff_norm = AdaptiveNorm(dim, dim), AdaptiveNorm(dim, dim)
        self.attn, self.ff = Attention(dim, **attn), FeedForward(dim, dropout=dropout, **ff)
        self.attn_connection, self.ff_connection = connect(layer_index=index), connect(layer_index=index)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Those of the residual connections, which cannot do it themselves; all others can."""
        with torch.device("cpu"):
            fresh = self.connect(layer_index=self.index).state_dict()
        for connection in (self.attn_connection, self.ff_connection):
            connection.load_state_dict(fresh)

    def forward(
        self,
        x: Shaped[Tensor, "r d"],
        skipped: Shaped[Tensor, "r d"] | None,
        first_values: Shaped[Tensor, "n k e"] | None,
        conditioning: Conditioning | None,
        phases: Float[Tensor, "n f 2"],
        plan: AttentionPlan,
    ) -> tuple[Shaped[Tensor, "r d"], Shaped[Tensor, "n k e"] | None]:
        """The residual streams behind this layer, and its values if it keeps them."""
        if skipped is not None:
            x = self._add_skipped(x, skipped)

        branch_input, merge = self.attn_connection(x)
        modulation = self.attn_norm.modulation(conditioning)
        out, values = self.attn(
            self.attn_norm(branch_input, modulation),
            phases=phases,
            plan=plan,
            first_values=first_values,
            layer=self.index,
        )
        x = self._merge(x, merge, self.dropout(out), modulation)

        branch_input, merge = self.ff_connection(x)
        modulation = self.ff_norm.modulation(conditioning)
        out = self.ff(self.ff_norm(branch_input, modulation))
        x = self._merge(x, merge, self.dropout(out), modulation)
        return x, values if self.keeps_values else None

    def _merge(self, x: Tensor, merge: Callable[[Tensor], Tensor], out: Tensor, modulation: Modulation) -> Tensor:
        """`merge(gate out)`, in one pass over memory where that is a plain sum."""
        return modulation.add_gated(x, out) if self.has_one_stream else merge(modulation.gated(out))

    def _add_skipped(self, x: Tensor, skipped: Tensor) -> Tensor:
        """`x + W [x; skipped]`, on a CPU without copying the two behind each other."""
        assert self.skip is not None
        if uses_cpu_kernels(x) and is_plain_linear(self.skip):
            from_x, from_skipped = self.skip.weight.chunk(2, dim=1)
            return x + linear(x, from_x) + linear(skipped, from_skipped)
        return x + self.skip(torch.cat((x, skipped), dim=-1))


def residual_connection(connect: Callable[..., nn.Module], streams: int, fracs: int, *, layer_index: int) -> nn.Module:
    """A residual connection that starts by reading one stream whole, and by keeping all of them.

    With two or more fractions, those of hyper-connections (0.4.11) start by reading the first for each, and with three
    or more they lose some: the columns of `static_alpha`, which are (fraction, input or stream), are filled as
    (inputs, streams).
    """
    connection = connect(layer_index=layer_index)
    if fracs > 1:
        keep = torch.eye(fracs * streams).unflatten(1, (fracs, streams))
        read = keep[:, :, [layer_index % streams]]
        connection.get_parameter("static_alpha").data.copy_(torch.cat((read, keep), dim=-1).flatten(1))
    return connection
