"""From the tokens of each modality to queries, keys and values of all.

s tokens of one modality, n queries and m keys of all, d the width of a modality, h heads, qkv heads of queries, keys
and values together, e channels of a head, f frequencies; b samples, rows = b s.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.cpu import elementwise as cpu
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import RMSNorm
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.network.shortcuts import is_plain, is_untouched, uses_cpu_kernels
from transfusion_pytorch.sequence.positions import rotate

QKNorm = Literal["rms", "layer", "none"]
QK_NORM_EPS = 1e-6


class Heads(NamedTuple):
    """What one modality, or all of them together, bring into attention. `q` is None for what is only attended to."""

    q: Shaped[Tensor, "b n h e"] | None
    k: Shaped[Tensor, "b m h e"]
    v: Shaped[Tensor, "b m h e"]


class ModalityHeads(nn.Module):
    """The way of one modality into attention and out of it. With `is_pre_only` there is no way out, and no queries."""

    def __init__(
        self, dim: int, *, dim_head: int, heads: int, qk_norm: QKNorm, bias: bool = False, is_pre_only: bool = False
    ):
        super().__init__()
        self.heads, self.dim_head, self.is_pre_only = heads, dim_head, is_pre_only
        self.to_qkv = Linear(dim, (self.num_queries + 2 * heads) * dim_head, bias=bias)
        self.q_norm = None if is_pre_only else _qk_norm(qk_norm, dim_head)
        self.k_norm = _qk_norm(qk_norm, dim_head)
        self.to_out = None if is_pre_only else Linear(heads * dim_head, dim, bias=bias)

    @property
    def num_queries(self) -> int:
        """Heads of queries."""
        return 0 if self.is_pre_only else self.heads

    def forward(self, x: Shaped[Tensor, "*batch s d"], phases: Float[Tensor, "rows f 2"] | None) -> Heads:
        """Queries and keys are normalised, then rotated by the phases of each token of the batch, if there are any."""
        qkv = self.to_qkv(x).view(-1, self.num_queries + 2 * self.heads, self.dim_head)
        q, k, v = self._normed_and_rotated(qkv, phases)
        sizes = (-1, x.shape[-2], self.heads, self.dim_head)
        return Heads(None if self.is_pre_only else q.reshape(sizes), k.reshape(sizes), v.reshape(sizes))

    def _normed_and_rotated(
        self, qkv: Shaped[Tensor, "rows qkv e"], phases: Float[Tensor, "rows f 2"] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(rows, h, e)` each; no heads of queries if there is no way out."""
        on_cpu = uses_cpu_kernels(qkv)
        if on_cpu and self.dim_head % 2 == 0 and (gains := self._gains()) is not None:
            phases = _no_rotation(qkv) if phases is None else phases
            return cpu.NormedHeads.apply(qkv, gains, phases, self.num_queries)  # type: ignore[return-value]
        q, k, v = qkv.split((self.num_queries, self.heads, self.heads), dim=1)
        q, k = (part if norm is None else norm(part) for part, norm in ((q, self.q_norm), (k, self.k_norm)))
        if phases is not None:
            q, k = ((cpu.rotate if on_cpu else rotate)(part, phases) for part in (q, k))
        return q.to(v.dtype), k.to(v.dtype), v

    def _gains(self) -> Shaped[Tensor, "g e"] | None:
        """What root mean square norms multiply the heads of queries and keys by; None if there are other norms."""
        norms = [self.k_norm] if self.is_pre_only else [self.q_norm, self.k_norm]
        weights = [norm.weight for norm in norms if isinstance(norm, RMSNorm) and is_untouched(norm, RMSNorm)]
        if len(weights) < len(norms) or not all(map(is_plain, weights)):
            return None
        return 1 + torch.cat([weight.expand(self.heads, -1) for weight in weights])


def joined_heads(parts: Sequence[Heads]) -> Heads:
    """Those of all modalities as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    queries = [part.q for part in parts if part.q is not None]
    q = torch.cat(queries, dim=1) if queries else None
    return Heads(q, torch.cat([part.k for part in parts], dim=1), torch.cat([part.v for part in parts], dim=1))


def _qk_norm(kind: QKNorm, dim_head: int) -> nn.Module | None:
    if kind == "none":
        return None
    return RMSNorm(dim_head) if kind == "rms" else nn.LayerNorm(dim_head, eps=QK_NORM_EPS)


def _no_rotation(qkv: Tensor) -> Float[Tensor, "rows f 2"]:
    """Phases of angle 0, in the type that norms are made in."""
    one = torch.tensor((1.0, 0.0), device=qkv.device, dtype=precise(qkv.dtype))
    return one.expand(len(qkv), qkv.shape[-1] // 2, 2)
