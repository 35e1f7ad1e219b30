"""One layer of the trunk: attention and feedforward, each behind a norm and in front of a residual connection.

n tokens, d model, h query heads, k key/value heads, e channels of a head, f frequencies, r = n times the number of
residual streams.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.attend import AttentionPlan
from transfusion_pytorch.network.cpu import elementwise as cpu
from transfusion_pytorch.network.cpu.products import linear
from transfusion_pytorch.network.linear import Linear, is_plain_linear
from transfusion_pytorch.network.norms import Conditioning, Modulation, RMSNorm
from transfusion_pytorch.network.shortcuts import is_plain, is_untouched, uses_cpu_kernels
from transfusion_pytorch.sequence.positions import rotate

LASER_LIMIT = 10.0  # values are squashed to +-10 before the exponential, which float16 still holds


class Attention(nn.Module):
    """Multi-head attention with rotary positions, grouped key/value heads, and options.

    - `qk_rmsnorm`: queries and keys are normalised before they are rotated (arXiv 2302.05442)
    - `gate_values`: each head's output is scaled by a sigmoid of the token (arXiv 2505.06708)
    - `value_residual`: values are mixed with those of the first layer (arXiv 2410.17897)
    - `laser`: values attend as exponentials, and the logarithm is taken after (arXiv 2411.03493)
    - `softcap_value`: bounds the attention logits
    - `qkv_bias`, `out_bias`: the linear layers have biases; `qk_norm`: options of the `RMSNorm` of queries and keys
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        qk_rmsnorm: bool = True,
        gate_values: bool = True,
        value_residual: bool = False,
        laser: bool = False,
        softcap_value: float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if dim_head % 2:
            raise ValueError(f"dim_head must be even for rotary positions, got {dim_head}")
        if softcap_value is not None and softcap_value <= 0:
            raise ValueError(f"softcap_value must be positive, got {softcap_value}")
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.laser, self.softcap = laser, softcap_value
        self.to_qkv = Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=qkv_bias)
        self.q_norm = RMSNorm(dim_head, **(qk_norm or {})) if qk_rmsnorm else None
        self.k_norm = RMSNorm(dim_head, **(qk_norm or {})) if qk_rmsnorm else None
        self.to_gates = Linear(dim, heads) if gate_values else None
        self.to_value_mix = Linear(dim, kv_heads) if value_residual else None
        self.to_out = Linear(heads * dim_head, dim, bias=out_bias)

    def forward(
        self,
        x: Shaped[Tensor, "n d"],
        *,
        phases: Float[Tensor, "n f 2"],
        plan: AttentionPlan,
        first_values: Float[Tensor, "n k e"] | None = None,
        layer: int = 0,
    ) -> tuple[Shaped[Tensor, "n d"], Shaped[Tensor, "n k e"]]:
        """The output, and the values of this layer for the value residual of later ones."""
        q, k, v, own_values = self.project(x, phases=phases, first_values=first_values)
        return self.combine(plan.attend(q, k, v, layer=layer, softcap=self.softcap), x), own_values

    def project(
        self,
        x: Shaped[Tensor, "n d"],
        *,
        phases: Float[Tensor, "n f 2"],
        first_values: Float[Tensor, "n k e"] | None = None,
    ) -> tuple[Shaped[Tensor, "n h e"], Shaped[Tensor, "n k e"], Shaped[Tensor, "n k e"], Shaped[Tensor, "n k e"]]:
        """Queries, keys and values as they attend, and the values of this layer itself."""
        qkv = rearrange(self.to_qkv(x), "n (h e) -> n h e", e=self.dim_head)
        q, k, v = self._rotated(qkv, phases)
        own_values = v
        if self.to_value_mix is not None and first_values is not None:
            v = torch.lerp(v, first_values, self.to_value_mix(x).sigmoid()[..., None].to(v.dtype))
        if self.laser:
            v = torch.exp(LASER_LIMIT * torch.tanh(v / LASER_LIMIT))
        # autocast on a GPU gives norms and exponentials back in single precision, and kernels want one type
        return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype), own_values

    def combine(self, out: Shaped[Tensor, "n h e"], x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        """What the heads gathered for the tokens `x`, as one vector a token."""
        if self.laser:
            out = out.clamp(min=torch.finfo(out.dtype).tiny).log()
        if self.to_gates is not None:
            out = out * self.to_gates(x).sigmoid()[..., None]
        return self.to_out(rearrange(out, "n h e -> n (h e)"))

    def _rotated(self, qkv: Tensor, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values as they are."""
        norms: tuple[Any, Any] = self.q_norm, self.k_norm
        on_cpu = uses_cpu_kernels(qkv)
        if on_cpu and all(norm and is_untouched(norm, RMSNorm) and is_plain(norm.weight) for norm in norms):
            gains = [norm.gain.expand(h, -1) for norm, h in zip(norms, (self.heads, self.kv_heads), strict=True)]
            return cpu.NormedHeads.apply(qkv, torch.cat(gains), phases, self.heads, norms[0].eps)  # type: ignore[return-value]
        if on_cpu and norms == (None, None):
            return cpu.RotatedHeads.apply(qkv, phases, self.heads, self.kv_heads)  # type: ignore[return-value]
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = (part if norm is None else norm(part.to(phases.dtype)) for part, norm in zip((q, k), norms, strict=True))
        q, k = (cpu.rotate(part, phases) if on_cpu else rotate(part, phases) for part in (q, k))
        return q.to(qkv.dtype), k.to(qkv.dtype), v


ACTIVATIONS = {"geglu": F.gelu, "swiglu": F.silu}
HIDDEN_MULTIPLE = 16  # products of rows that end where vector registers do are up to a quarter faster


class FeedForward(nn.Module):
    """A gated feedforward (GLU variants, arXiv 2002.05202) with two thirds of the plain one's width, for equal
    parameters, rounded up to a multiple of 16; or with `dim_hidden`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expansion_factor: float = 4,
        dim_hidden: int | None = None,
        activation: str = "geglu",
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if dim_hidden is None:
            hidden = dim * expansion_factor * 2 / 3
            if hidden < 1:
                raise ValueError(f"expansion_factor must be positive, and not so small, got {expansion_factor}")
            dim_hidden = HIDDEN_MULTIPLE * ceil(round(hidden / HIDDEN_MULTIPLE, 6))  # 528.0000000000001 is 528
        self.activation = activation
        self.to_hidden = Linear(dim, 2 * dim_hidden, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.to_out = Linear(dim_hidden, dim, bias=bias)

    def forward(self, x: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n d"]:
        return self._contract(self.to_hidden(x))

    def _contract(self, hidden: Shaped[Tensor, "n two_f"]) -> Shaped[Tensor, "n d"]:
        if uses_cpu_kernels(hidden) and self._has_no_dropout() and is_plain_linear(self.to_out):
            return cpu.GatedLinear.apply(hidden, self.to_out.weight, self.to_out.bias, self.activation)  # type: ignore[return-value]
        return self.to_out(self.dropout(self._activate(hidden)))

    def _activate(self, hidden: Tensor) -> Tensor:
        """`value activation(gate)`, where `hidden = [value gate]`."""
        if uses_cpu_kernels(hidden):
            return cpu.GatedActivation.apply(hidden, self.activation)  # type: ignore[return-value]
        value, gate = hidden.chunk(2, dim=-1)
        return value * ACTIVATIONS[self.activation](gate)

    def _has_no_dropout(self) -> bool:
        return is_untouched(self.dropout, nn.Dropout) and not (self.dropout.training and self.dropout.p > 0)


class Begun(NamedTuple):
    """A layer up to its attention.

    - `x`: the residual streams; `merge` and `modulation`: how the output of attention goes into them
    - `normed`: what attention reads; `q`, `k`, `v`: what of it attends; `own_values`: the values of this layer
    """

    x: Shaped[Tensor, "r d"]
    merge: Callable[[Tensor], Tensor]
    modulation: Modulation
    normed: Shaped[Tensor, "n d"]
    q: Shaped[Tensor, "n h e"]
    k: Shaped[Tensor, "n k e"]
    v: Shaped[Tensor, "n k e"]
    own_values: Shaped[Tensor, "n k e"]


class Layer(nn.Module):
    """Attention and feedforward, each behind a norm of `make_norm()`.

    `connect(layer_index=...)` makes a residual connection: from the residual streams to the input of a branch, and a
    function that merges the output of the branch into them. A layer that `has_skip` also reads what an earlier one
    wrote; one that `keeps_values` hands them on for the value residual.
    """

    def __init__(
        self,
        dim: int,
        index: int,
        *,
        make_norm: Callable[[], Any],
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
        self.attn_norm, self.ff_norm = make_norm(), make_norm()
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
        x, merge, modulation, normed = self._enter(x, skipped, conditioning)
        out, values = self.attn(normed, phases=phases, plan=plan, first_values=first_values, layer=self.index)
        return self._leave(x, merge, modulation, out, conditioning), values if self.keeps_values else None

    def begin(
        self,
        x: Shaped[Tensor, "r d"],
        skipped: Shaped[Tensor, "r d"] | None,
        first_values: Shaped[Tensor, "n k e"] | None,
        conditioning: Conditioning | None,
        phases: Float[Tensor, "n f 2"],
    ) -> Begun:
        """The first part of `forward`, for layers that share one attention."""
        x, merge, modulation, normed = self._enter(x, skipped, conditioning)
        heads = self.attn.project(normed, phases=phases, first_values=first_values)
        return Begun(x, merge, modulation, normed, *heads)

    def end(
        self, begun: Begun, gathered: Shaped[Tensor, "n h e"], conditioning: Conditioning | None
    ) -> Shaped[Tensor, "r d"]:
        """The rest of `forward`, behind attention."""
        out = self.attn.combine(gathered, begun.normed)
        return self._leave(begun.x, begun.merge, begun.modulation, out, conditioning)

    def _enter(
        self, x: Tensor, skipped: Tensor | None, conditioning: Conditioning | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], Modulation, Tensor]:
        if skipped is not None:
            x = self._add_skipped(x, skipped)
        branch_input, merge = self.attn_connection(x)
        modulation = self.attn_norm.modulation(conditioning)
        return x, merge, modulation, self.attn_norm(branch_input, modulation)

    def _leave(
        self,
        x: Tensor,
        merge: Callable[[Tensor], Tensor],
        modulation: Modulation,
        out: Tensor,
        conditioning: Conditioning | None,
    ) -> Tensor:
        x = self._merge(x, merge, self.dropout(out), modulation)
        branch_input, merge = self.ff_connection(x)
        modulation = self.ff_norm.modulation(conditioning)
        out = self.ff(self.ff_norm(branch_input, modulation))
        return self._merge(x, merge, self.dropout(out), modulation)

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
