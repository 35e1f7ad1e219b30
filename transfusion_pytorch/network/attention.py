"""The attention module: what is attended with, and what is made of the outcome.

n tokens, d model, h query heads, k key/value heads, e channels of a head, f frequencies.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.attend import AttentionPlan
from transfusion_pytorch.network.cpu import elementwise as cpu
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import RMSNorm
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
        self.to_qkv = Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.q_norm = RMSNorm(dim_head) if qk_rmsnorm else None
        self.k_norm = RMSNorm(dim_head) if qk_rmsnorm else None
        self.to_gates = Linear(dim, heads) if gate_values else None
        self.to_value_mix = Linear(dim, kv_heads) if value_residual else None
        self.to_out = Linear(heads * dim_head, dim, bias=False)

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
        qkv = rearrange(self.to_qkv(x), "n (h e) -> n h e", e=self.dim_head)
        q, k, v = self._rotated(qkv, phases)
        own_values = v
        if self.to_value_mix is not None and first_values is not None:
            v = torch.lerp(v, first_values, self.to_value_mix(x).sigmoid()[..., None].to(v.dtype))
        if self.laser:
            v = torch.exp(LASER_LIMIT * torch.tanh(v / LASER_LIMIT))
        # autocast on a GPU gives norms and exponentials back in single precision, and kernels want one type
        q, k, v = (part.to(qkv.dtype) for part in (q, k, v))
        out = plan.attend(q, k, v, layer=layer, softcap=self.softcap)
        if self.laser:
            out = out.clamp(min=torch.finfo(out.dtype).tiny).log()
        if self.to_gates is not None:
            out = out * self.to_gates(x).sigmoid()[..., None]
        return self.to_out(rearrange(out, "n h e -> n (h e)")), own_values

    def _rotated(self, qkv: Tensor, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values as they are."""
        norms: tuple[Any, Any] = self.q_norm, self.k_norm
        on_cpu = uses_cpu_kernels(qkv)
        if on_cpu and all(norm and is_untouched(norm, RMSNorm) and is_plain(norm.weight) for norm in norms):
            gains = [norm.weight.expand(h, -1) for norm, h in zip(norms, (self.heads, self.kv_heads), strict=True)]
            return cpu.NormedHeads.apply(qkv, 1 + torch.cat(gains), phases, self.heads)  # type: ignore[return-value]
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = (part if norm is None else norm(part.to(phases.dtype)) for part, norm in zip((q, k), norms, strict=True))
        q, k = (cpu.rotate(part, phases) if on_cpu else rotate(part, phases) for part in (q, k))
        return q.to(qkv.dtype), k.to(qkv.dtype), v
