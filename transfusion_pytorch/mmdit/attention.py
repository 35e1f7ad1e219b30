"""Attention over the tokens of all modalities, each of which has its own projections and norms.

s tokens of one modality, n queries and m keys of all, d the width of a modality, h heads, e channels of a head,
f frequencies; b samples, which may be several batch dimensions outside.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from transfusion_pytorch.mmdit.checks import check_modalities, check_tokens
from transfusion_pytorch.mmdit.masks import Mask, check_mask
from transfusion_pytorch.mmdit.positions import check_rope, joint_phases
from transfusion_pytorch.network.attend import attend_masked
from transfusion_pytorch.network.cpu import elementwise as cpu
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import RMSNorm
from transfusion_pytorch.network.shortcuts import forces_plain_formulas, is_plain, is_untouched, uses_cpu_kernels
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
        self.to_qkv = Linear(dim, (2 if is_pre_only else 3) * heads * dim_head, bias=bias)
        self.q_norm = None if is_pre_only else _qk_norm(qk_norm, dim_head)
        self.k_norm = _qk_norm(qk_norm, dim_head)
        self.to_out = None if is_pre_only else Linear(heads * dim_head, dim, bias=bias)

    def forward(self, x: Shaped[Tensor, "*batch s d"], phases: Float[Tensor, "rows f 2"] | None) -> Heads:
        """Queries and keys are normalised, then rotated by the phases of each token of the batch, if there are any."""
        projected = self.to_qkv(x)
        qkv = projected.view(-1, projected.shape[-1] // self.dim_head, self.dim_head)
        q, k, v = self._normed_and_rotated(qkv, phases)
        sizes = (-1, x.shape[-2], self.heads, self.dim_head)
        return Heads(None if self.is_pre_only else q.reshape(sizes), k.reshape(sizes), v.reshape(sizes))

    def _normed_and_rotated(self, qkv: Tensor, phases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`(rows, heads, e)` each; of the queries no heads if there are none."""
        queries = 0 if self.is_pre_only else self.heads
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        on_cpu = uses_cpu_kernels(qkv)
        is_rms = norms and all(is_untouched(norm, RMSNorm) and is_plain(norm.weight) for norm in norms)  # type: ignore
        if on_cpu and is_rms and self.dim_head % 2 == 0:
            phases = _no_rotation(qkv) if phases is None else phases
            gain = 1 + torch.cat([norm.weight.expand(self.heads, -1) for norm in norms])  # type: ignore[operator]
            return cpu.NormedHeads.apply(qkv, gain, phases, queries)  # type: ignore[return-value]
        q, k, v = qkv.split((queries, self.heads, self.heads), dim=1)
        q, k = (part if norm is None else norm(part) for part, norm in ((q, self.q_norm), (k, self.k_norm)))
        if phases is not None:
            q, k = ((cpu.rotate if on_cpu else rotate)(part, phases) for part in (q, k))
        return q.to(v.dtype), k.to(v.dtype), v


class JointAttention(nn.Module):
    """Attention over the tokens of all modalities, each with its own width, projections and norms (SD3, arXiv
    2403.03206).

    - `qk_norm`: queries and keys of each head are normalised, `"rms"` (with a learned gain), `"layer"` or `"none"`
    - `rope_axes`: 1 rotates queries and keys by their place in their modality, which starts at 0 in each; more are for
      coordinates of as many axes; 0 for none
    - `bias`: whether the projections have one
    - `pre_only`: modalities that are attended to, and get no output themselves
    """

    def __init__(
        self,
        dim_modalities: Sequence[int],
        *,
        dim_head: int = 64,
        heads: int = 8,
        qk_norm: QKNorm = "rms",
        rope_axes: int = 1,
        rotary_theta: float = 10_000.0,
        bias: bool = False,
        pre_only: Sequence[int] = (),
    ):
        super().__init__()
        self.dim_modalities = check_modalities(dim_modalities)
        for name, value in (("heads", heads), ("dim_head", dim_head)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if qk_norm not in get_args(QKNorm):
            raise ValueError(f"qk_norm must be one of {', '.join(get_args(QKNorm))}, got {qk_norm!r}")
        check_rope(rope_axes, dim_head)
        self.dim_head, self.rope_axes, self.rotary_theta = dim_head, rope_axes, rotary_theta
        options = dict(dim_head=dim_head, heads=heads, qk_norm=qk_norm, bias=bias)
        self.modalities = nn.ModuleList(
            ModalityHeads(dim, is_pre_only=i in pre_only, **options)  # type: ignore[arg-type]
            for i, dim in enumerate(self.dim_modalities)
        )

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        attention_mask: Mask | None = None,
        *,
        phases: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(*batch, s_i, d_i)` of every modality, to outputs of the same shapes; None for one that is `pre_only`.

        `attention_mask` is True where a query (row) may see a key (column), over the tokens of all modalities in their
        order, `(n, n)` or `(*batch, n, n)`; rows of `pre_only` modalities are left out. Or the `BlockMask` of flex
        attention. `phases` are those of `joint_phases`, by default of tokens that are counted from 0 in each modality.
        """
        lengths = check_tokens(modality_tokens, self.dim_modalities)
        queries = sum(s for s, part in zip(lengths, self.modalities, strict=True) if not part.is_pre_only)
        batch = modality_tokens[0].shape[:-2]
        check_mask(attention_mask, batch, queries, sum(lengths))
        if phases is None:
            options = dict(axes=self.rope_axes, dim_head=self.dim_head, theta=self.rotary_theta)
            phases = joint_phases(None, modality_tokens, **options)  # type: ignore[arg-type]
        return self.attend(modality_tokens, attention_mask, phases)[0]

    def attend(
        self,
        tokens: Sequence[Tensor | None],
        mask: Mask | None,
        phases: Sequence[Tensor | None],
        context: Heads | None = None,
    ) -> tuple[tuple[Tensor | None, ...], Heads]:
        """As `forward`, without checks, for those modalities that are not None. What a `context` has of keys and values
        stands before them. Also returns what the modalities brought into attention.
        """
        parts = [
            None if x is None else part(x, at) for part, x, at in zip(self.modalities, tokens, phases, strict=True)
        ]
        own = _joined([part for part in parts if part is not None])
        if own.q is None:
            return (None,) * len(tokens), own
        k, v = (
            (own.k, own.v)
            if context is None
            else (torch.cat((old.to(new.dtype), new), dim=1) for old, new in ((context.k, own.k), (context.v, own.v)))
        )
        out = gather(own.q, k, v, mask).flatten(2)
        lengths = [part.q.shape[1] for part in parts if part is not None and part.q is not None]
        pieces = iter(out.split(lengths, dim=1))
        return tuple(
            None if part is None or part.q is None else modality.to_out(next(pieces)).view(x.shape)  # type: ignore
            for part, modality, x in zip(parts, self.modalities, tokens, strict=True)
        ), own


def gather(
    q: Shaped[Tensor, "b n h e"], k: Shaped[Tensor, "b m h e"], v: Shaped[Tensor, "b m h e"], mask: Mask | None
) -> Shaped[Tensor, "b n h e"]:
    """What the queries gather from the values: by flex attention if the mask is made for that, and else by SDPA."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if isinstance(mask, BlockMask):
        if not q.is_cuda:  # the code that is generated for CPUs does not know views
            q, k, v = (part.contiguous() for part in (q, k, v))
        return _flex_kernel(q.is_cuda)(q, k, v, block_mask=mask).transpose(1, 2)
    if mask is not None and mask.ndim > 2:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    is_plain_formula = not torch.compiler.is_compiling() and forces_plain_formulas()
    with sdpa_kernel(SDPBackend.MATH) if is_plain_formula else nullcontext():
        return attend_masked(q, k, v, mask=mask).transpose(1, 2)


def _flex_kernel(is_cuda: bool) -> Callable[..., Tensor]:
    """Compiled on a GPU, and inside of a compiled model. By itself on a CPU it is there to compare with."""
    return flex_attention if torch.compiler.is_compiling() else _eager_kernel(is_cuda)


@lru_cache(maxsize=2)
def _eager_kernel(is_cuda: bool) -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True) if is_cuda else _uncompiled_flex


def _uncompiled_flex(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **options)


def _joined(parts: Sequence[Heads]) -> Heads:
    """All modalities as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    queries = [part.q for part in parts if part.q is not None]
    q = None if not queries else torch.cat(queries, dim=1) if len(queries) > 1 else queries[0]
    return Heads(q, torch.cat([part.k for part in parts], dim=1), torch.cat([part.v for part in parts], dim=1))


def _qk_norm(kind: QKNorm, dim_head: int) -> nn.Module | None:
    if kind == "none":
        return None
    return RMSNorm(dim_head) if kind == "rms" else nn.LayerNorm(dim_head, eps=QK_NORM_EPS)


def _no_rotation(qkv: Tensor) -> Tensor:
    """Phases of angle 0, in the type that norms are made in."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    one = torch.tensor((1.0, 0.0), device=qkv.device, dtype=dtype)
    return one.expand(len(qkv), qkv.shape[-1] // 2, 2)
