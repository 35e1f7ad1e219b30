"""Attention over the tokens of all modalities, each of which has its own projections and norms.

s tokens of one modality, n queries and m keys of all, d the width of a modality, h heads, e channels of a head,
f frequencies; b samples, which may be several batch dimensions outside.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from transfusion_pytorch.mmdit.checks import (
    check_dtype,
    check_modalities,
    check_numbers,
    check_positive,
    check_tokens,
)
from transfusion_pytorch.mmdit.heads import Heads, ModalityHeads, QKNorm, joined_heads
from transfusion_pytorch.mmdit.masks import Mask, MaskFunction, mask_of_call
from transfusion_pytorch.mmdit.positions import check_rope, joint_phases
from transfusion_pytorch.network.attend import attend_masked, flex_kernel
from transfusion_pytorch.network.shortcuts import forces_plain_formulas


class JointAttention(nn.Module):
    """Attention over the tokens of all modalities, each with its own width, projections and norms (SD3, arXiv
    2403.03206).

    - `dim_modalities`: the width of the tokens of each modality
    - `dim_head`, `heads`: channels of a head, and heads; they need not multiply to a width
    - `qk_norm`: queries and keys of each head are normalised, `"rms"` (with a learned gain), `"layer"` or `"none"`
    - `rope_axes`: 1 rotates queries and keys by their place in their modality, which starts at 0 in each; more are for
      coordinates of as many axes; 0 for none
    - `rotary_theta`: the slowest pair of channels of an axis turns by almost 1 / theta radians for each position
    - `bias`: whether the projections have one
    - `pre_only`: numbers of modalities that are attended to, and get no output themselves

    Raises `TypeError` or `ValueError` that names the argument.
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
        check_positive(heads=heads, dim_head=dim_head)
        check_numbers("pre_only", pre_only, len(self.dim_modalities))
        if qk_norm not in get_args(QKNorm):
            raise ValueError(f"qk_norm must be one of {', '.join(get_args(QKNorm))}, got {qk_norm!r}")
        check_rope(rope_axes, dim_head)
        self.dim_head, self.heads, self.rope_axes, self.rotary_theta = dim_head, heads, rope_axes, rotary_theta
        options = dict(dim_head=dim_head, heads=heads, qk_norm=qk_norm, bias=bias)
        self.modalities = nn.ModuleList(
            ModalityHeads(dim, is_pre_only=i in pre_only, **options)  # type: ignore[arg-type]
            for i, dim in enumerate(self.dim_modalities)
        )

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        attention_mask: Mask | MaskFunction | None = None,
        *,
        phases: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(*batch, s_i, d_i)` of every modality, to outputs of the same shapes; None for one that is `pre_only`.

        `attention_mask` is True where a query (row) may see a key (column), over the tokens of all modalities in their
        order, `(n, n)` or `(*batch, n, n)`; rows of `pre_only` modalities are left out. Or a function of `(b, h, query,
        key)`, or the `BlockMask` of flex attention. `phases` are those of `joint_phases`, by default of tokens that are
        counted from 0 in each modality.

        Raises `TypeError` or `ValueError` that names the modality or the argument for what does not fit.
        """
        return self.attend(modality_tokens, *self.checked(modality_tokens, attention_mask, phases))[0]

    def checked(
        self,
        tokens: Sequence[Any],
        mask: Mask | MaskFunction | None,
        phases: Sequence[Tensor | None] | None,
        num_context: int = 0,
    ) -> tuple[Mask | None, Sequence[Tensor | None]]:
        """Mask and phases as `attend` takes them. Raises what is wrong with tokens and mask, as `forward` does."""
        lengths = check_tokens(tokens, self.dim_modalities)
        queries = sum(s for s, part in zip(lengths, self.modalities, strict=True) if not part.is_pre_only)
        mask = mask_of_call(mask, tokens[0], queries, num_context + sum(lengths), self.heads)
        if phases is None:
            phases = joint_phases(None, tokens, axes=self.rope_axes, dim_head=self.dim_head, theta=self.rotary_theta)
        return mask, phases

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
        each = enumerate(zip(self.modalities, tokens, strict=True))
        there = [(i, modality, x) for i, (modality, x) in each if x is not None]
        for i, modality, x in there:
            check_dtype(i, x, modality.to_qkv)  # type: ignore[arg-type]
        own = joined_heads([modality(x, phases[i]) for i, modality, x in there])
        outs: list[Tensor | None] = [None] * len(tokens)
        if own.q is None:
            return tuple(outs), own
        k, v = own.k, own.v
        if context is not None:
            k, v = (torch.cat((old.to(k.dtype), new), dim=1) for old, new in ((context.k, k), (context.v, v)))
        out = gather(own.q, k, v, mask).flatten(2)
        asking = [(i, modality, x) for i, modality, x in there if not modality.is_pre_only]
        pieces = out.split([x.shape[-2] for _, _, x in asking], dim=1)
        for (i, modality, x), piece in zip(asking, pieces, strict=True):
            outs[i] = modality.to_out(piece).view(x.shape)  # type: ignore[operator]
        return tuple(outs), own


def gather(
    q: Shaped[Tensor, "b n h e"], k: Shaped[Tensor, "b m h e"], v: Shaped[Tensor, "b m h e"], mask: Mask | None
) -> Shaped[Tensor, "b n h e"]:
    """What the queries gather from the values: by flex attention if the mask is made for that, and else by SDPA."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if isinstance(mask, BlockMask):
        if not q.is_cuda:  # the code that is generated for CPUs does not know views
            q, k, v = (part.contiguous() for part in (q, k, v))
        return flex_kernel(q.is_cuda)(q, k, v, block_mask=mask).transpose(1, 2)
    is_plain_formula = not torch.compiler.is_compiling() and forces_plain_formulas()
    with sdpa_kernel(SDPBackend.MATH) if is_plain_formula else nullcontext():
        return attend_masked(q, k, v, mask=mask).transpose(1, 2)
