"""Blocks: joint attention, then a feedforward for each modality.

s tokens of one modality, d its width, c condition; leading batch dimensions are free. Inside of a model a modality that
is None has no tokens in the call: its keys and values are in the context, or it is `pre_only`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from transfusion_pytorch.mmdit.attention import Heads, JointAttention
from transfusion_pytorch.mmdit.checks import check_tokens
from transfusion_pytorch.mmdit.layers import (
    NORM_EPS,
    Activation,
    FeedForward,
    Modulation,
    with_token_axis,
)
from transfusion_pytorch.mmdit.masks import Mask, check_mask, rows_and_columns
from transfusion_pytorch.mmdit.positions import joint_phases
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import RMSNorm

Tokens = Sequence[Tensor | None]
Phases = Sequence[Tensor | None]


class InContextModality(nn.Module):
    """What a block has for one modality, beside its way into attention."""

    def __init__(self, dim: int, *, is_pre_only: bool, **feedforward: Any):
        super().__init__()
        self.attn_norm = RMSNorm(dim)
        self.ff_norm = None if is_pre_only else RMSNorm(dim)
        self.ff = None if is_pre_only else FeedForward(dim, **feedforward)

    def finish(self, x: Tensor, out: Tensor | None) -> Tensor | None:
        """The tokens behind the block, from those before it and the output of attention."""
        if out is None or self.ff is None or self.ff_norm is None:
            return None
        x = x + out
        return x + self.ff(self.ff_norm(x))


class InContextMMDiTBlock(nn.Module):
    """A block without conditions: RMS norms, and plain residuals. What tokens are to know comes as tokens.

    `dim_modalities` are the widths; `attention` are options of `JointAttention`, where modalities that are `pre_only`
    have no output (None).
    """

    def __init__(
        self,
        dim_modalities: Sequence[int],
        *,
        ff_mult: float = 4,
        activation: Activation = "swiglu",
        pre_only: Sequence[int] = (),
        **attention: Any,
    ):
        super().__init__()
        self.attn = JointAttention(dim_modalities, pre_only=pre_only, **attention)
        self.modalities = nn.ModuleList(
            InContextModality(dim, is_pre_only=i in pre_only, ff_mult=ff_mult, activation=activation)
            for i, dim in enumerate(self.attn.dim_modalities)
        )

    def forward(
        self,
        modality_tokens: Tokens,
        attention_mask: Mask | None = None,
        *,
        phases: Phases | None = None,
        context: Heads | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(*batch, s_i, d_i)` of every modality to the same; mask and phases as in `JointAttention`."""
        phases = phases_of_call(self.attn, modality_tokens, attention_mask, phases)
        return self.advance(modality_tokens, attention_mask, phases=phases, context=context)[0]

    def advance(
        self, tokens: Tokens, mask: Mask | None, *, phases: Phases, context: Heads | None = None
    ) -> tuple[tuple[Tensor | None, ...], Heads]:
        """As `forward`, without checks. Also returns what the modalities brought into attention."""
        each = zip(self.modalities, tokens, strict=True)
        normed = [None if x is None else part.attn_norm(x) for part, x in each]  # type: ignore[operator]
        outs, own = self.attn.attend(normed, mask, phases, context)
        each = zip(self.modalities, tokens, outs, strict=True)
        return tuple(None if x is None else part.finish(x, out) for part, x, out in each), own  # type: ignore[operator]


class AdaptiveModality(nn.Module):
    """What a block with conditions has for one modality, beside its way into attention.

    With `dual_attention` (options of `JointAttention`) its tokens also attend among themselves by a second attention,
    with a modulation of its own (SD3.5). One product makes the modulations of all branches from the condition, as that
    of `AdaptiveLayerNorm` does for one: shift, scale and gate of the joint attention, of the feedforward, and of the
    dual attention. Products of so few rows are bound by memory, and fewer ones take less time.
    """

    def __init__(
        self,
        dim: int,
        dim_cond: int,
        *,
        is_pre_only: bool,
        eps: float,
        dual_attention: dict[str, Any] | None,
        **feedforward: Any,
    ):
        super().__init__()
        self.eps = eps
        self.num_chunks = 2 if is_pre_only else 6 if dual_attention is None else 9
        self.to_modulation = Linear(dim_cond, self.num_chunks * dim)
        self.ff = None if is_pre_only else FeedForward(dim, **feedforward)
        self.dual_attn = None if dual_attention is None else JointAttention((dim,), **dual_attention)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def modulations(self, cond: Tensor) -> list[Modulation]:
        """Those of the joint attention, of the feedforward and of the dual attention, as far as there are any."""
        chunks = self.to_modulation(cond).chunk(self.num_chunks, dim=-1)
        branches = [chunks[i : i + 3] for i in range(0, len(chunks), 3)]
        return [Modulation(1 + scale, shift, gate[0] if gate else None, self.eps) for shift, scale, *gate in branches]

    def finish(
        self, x: Tensor, out: Tensor | None, modulations: Sequence[Modulation], mask: Mask | None, phases: Tensor | None
    ) -> Tensor | None:
        """The tokens behind the block, from those before it and the output of the joint attention."""
        if out is None or self.ff is None:
            return None
        attended = modulations[0].add_gated(x, out)
        if self.dual_attn is not None:
            (out,), _ = self.dual_attn.attend((modulations[2].normed(x),), mask, (phases,))
            assert out is not None
            attended = modulations[2].add_gated(attended, out)
        return modulations[1].add_gated(attended, self.ff(modulations[1].normed(attended)))


class MMDiTBlock(nn.Module):
    """A block whose norms and gates depend on a condition, which leaves its tokens as they are before it is trained.

    `dim_modalities` are the widths, `dim_cond` is that of the condition; `attention` are options of `JointAttention`,
    where modalities that are `pre_only` have no output (None). Those in `dual_attention` also attend among themselves.
    """

    def __init__(
        self,
        dim_modalities: Sequence[int],
        *,
        dim_cond: int = 1024,
        ff_mult: float = 4,
        activation: Activation = "swiglu",
        norm_eps: float = NORM_EPS,
        pre_only: Sequence[int] = (),
        dual_attention: Sequence[int] = (),
        **attention: Any,
    ):
        super().__init__()
        self.attn = JointAttention(dim_modalities, pre_only=pre_only, **attention)
        self.dual_attention = tuple(dual_attention)
        self.modalities = nn.ModuleList(
            AdaptiveModality(
                dim,
                dim_cond,
                is_pre_only=i in pre_only,
                eps=norm_eps,
                dual_attention=attention if i in dual_attention and i not in pre_only else None,
                ff_mult=ff_mult,
                activation=activation,
            )
            for i, dim in enumerate(self.attn.dim_modalities)
        )

    def forward(
        self,
        modality_tokens: Tokens,
        cond: Tensor | Sequence[Tensor | None],
        attention_mask: Mask | None = None,
        *,
        phases: Phases | None = None,
        own_masks: Sequence[Mask | None] | None = None,
        context: Heads | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(*batch, s_i, d_i)` of every modality to the same.

        `cond` is `(*batch, c)`, or `(*batch, n, c)` for each of all tokens, or a sequence with one of these for each
        modality. Mask and phases as in `JointAttention`; `own_masks` are those of the dual attention of each modality,
        by default cut out of the mask.
        """
        if own_masks is None:
            own_masks = own_masks_of(attention_mask, modality_tokens, self.dual_attention)
        phases = phases_of_call(self.attn, modality_tokens, attention_mask, phases)
        conditions = conditions_of(cond, modality_tokens)
        return self.advance(
            modality_tokens, conditions, attention_mask, phases=phases, own_masks=own_masks, context=context
        )[0]

    def advance(
        self,
        tokens: Tokens,
        conditions: Sequence[Tensor | None],
        mask: Mask | None,
        *,
        phases: Phases,
        own_masks: Sequence[Mask | None],
        context: Heads | None = None,
    ) -> tuple[tuple[Tensor | None, ...], Heads]:
        """As `forward`, without checks, and with a condition of each modality that has an axis of tokens, or a 1 in its
        place. Also returns what the modalities brought into attention.
        """
        there = [i for i, x in enumerate(tokens) if x is not None]
        modulations = {i: self.modalities[i].modulations(conditions[i]) for i in there}  # type: ignore[operator]
        normed = [None if x is None else modulations[i][0].normed(x) for i, x in enumerate(tokens)]
        outs, own = self.attn.attend(normed, mask, phases, context)
        advanced: list[Tensor | None] = [None] * len(tokens)
        for i in there:
            inputs = tokens[i], outs[i], modulations[i], own_masks[i], phases[i]
            advanced[i] = self.modalities[i].finish(*inputs)  # type: ignore[operator]
        return tuple(advanced), own


def phases_of_call(attn: JointAttention, tokens: Tokens, mask: Mask | None, phases: Phases | None) -> Phases:
    """The phases of a block's tokens. A call without any is not from a model, which has checked its inputs: raises what
    is wrong with tokens and mask.
    """
    if phases is not None:
        return phases
    lengths = check_tokens(tokens, attn.dim_modalities)  # type: ignore[arg-type]
    queries = sum(n for n, part in zip(lengths, attn.modalities, strict=True) if not part.is_pre_only)
    check_mask(mask, tokens[0].shape[:-2], queries, sum(lengths))  # type: ignore[union-attr]
    return joint_phases(None, tokens, axes=attn.rope_axes, dim_head=attn.dim_head, theta=attn.rotary_theta)


def conditions_of(cond: Tensor | Sequence[Tensor | None], tokens: Tokens) -> list[Tensor | None]:
    """A condition for each modality, with an axis of tokens or a 1 in its place."""
    if not isinstance(cond, Tensor):
        each = zip(cond, tokens, strict=True)
        return [None if part is None or x is None else with_token_axis(part, x) for part, x in each]
    first = next(x for x in tokens if x is not None)
    if cond.ndim < first.ndim:
        return [cond.unsqueeze(-2)] * len(tokens)
    parts = iter(cond.split([x.shape[-2] for x in tokens if x is not None], dim=-2))
    return [None if x is None else next(parts) for x in tokens]


def own_masks_of(mask: Mask | None, tokens: Tokens, modalities: Sequence[int]) -> list[Mask | None]:
    """The part of a joint mask, whose rows and columns are these tokens, that is about one modality alone, for these
    modalities; None for others.
    """
    masks: list[Mask | None] = [None] * len(tokens)
    start = 0
    for i, x in enumerate(tokens):
        stop = start + (0 if x is None else x.shape[-2])
        if mask is not None and i in modalities:
            masks[i] = rows_and_columns(mask, slice(start, stop), slice(start, stop))
        start = stop
    return masks
