"""Blocks: joint attention, then a feedforward for each modality.

s tokens of one modality, d its width, c condition; leading batch dimensions are free. Inside of a model a modality that
is None has no tokens in the call: its keys and values are in the context, or it is `pre_only`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from transfusion_pytorch.mmdit.attention import Heads, JointAttention
from transfusion_pytorch.mmdit.checks import (
    check_condition,
    check_numbers,
    check_one_each,
    check_positive,
)
from transfusion_pytorch.mmdit.layers import (
    NORM_EPS,
    Activation,
    FeedForward,
    Modulation,
    with_token_axis,
)
from transfusion_pytorch.mmdit.masks import Mask, MaskFunction, mask_of_call, rows_and_columns
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
    have no output (None). Errors are those of `JointAttention`.
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
        attention_mask: Mask | MaskFunction | None = None,
        *,
        phases: Phases | None = None,
        context: Heads | None = None,
        checks: bool = True,
        returns_heads: bool = False,
    ) -> tuple[Any, ...]:
        """`(*batch, s_i, d_i)` of every modality to the same; mask and phases as in `JointAttention`.

        - `context`: keys and values `(b, m, h, e)` of other tokens, which stand before those of the call; the mask has
          columns for them too
        - `checks`: False in a model, which has checked its inputs: mask and phases are those of `attend`
        - `returns_heads`: returns `(tokens, heads)`, also the queries, keys and values of the call

        Raises `TypeError` or `ValueError` that names the modality or the argument for what does not fit.
        """
        planned: Any = attention_mask, phases
        if checks:
            planned = self.attn.checked(modality_tokens, attention_mask, phases, length_of(context))
        each = zip(self.modalities, modality_tokens, strict=True)
        normed = [None if x is None else part.attn_norm(x) for part, x in each]  # type: ignore[operator]
        joint_mask, all_phases = planned
        outs, own = self.attn.attend(normed, joint_mask, all_phases, context)
        each = zip(self.modalities, modality_tokens, outs, strict=True)
        tokens = tuple(None if x is None else part.finish(x, out) for part, x, out in each)  # type: ignore[operator]
        return (tokens, own) if returns_heads else tokens


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
    Errors are those of `JointAttention`.
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
        check_positive(dim_cond=dim_cond)
        self.attn = JointAttention(dim_modalities, pre_only=pre_only, **attention)
        check_numbers("dual_attention", dual_attention, len(self.attn.dim_modalities))
        self.dim_cond, self.dual_attention = dim_cond, tuple(dual_attention)
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
        attention_mask: Mask | MaskFunction | None = None,
        *,
        phases: Phases | None = None,
        own_masks: Sequence[Mask | MaskFunction | None] | None = None,
        context: Heads | None = None,
        checks: bool = True,
        returns_heads: bool = False,
    ) -> tuple[Any, ...]:
        """`(*batch, s_i, d_i)` of every modality to the same.

        `cond` is `(*batch, c)`, or `(*batch, n, c)` for each of all tokens, or a sequence with one of these for each
        modality. It goes into linear layers as it is: an embedding of a time comes through a SiLU before (`MMDiT` does
        so). `own_masks` are those of the dual attention of each modality, by default cut out of the mask. Everything
        else, and errors, as in `InContextMMDiTBlock`.
        """
        planned: Any = attention_mask, phases, own_masks
        if checks:
            num_context = length_of(context)
            mask, phases = self.attn.checked(modality_tokens, attention_mask, phases, num_context)
            self._check_conditions(cond, modality_tokens)
            planned = mask, phases, self._own_masks(mask, own_masks, modality_tokens, num_context)
        joint_mask, all_phases, masks = planned
        conditions = conditions_of(cond, modality_tokens)
        there = [i for i, x in enumerate(modality_tokens) if x is not None]
        modulations = {i: self.modalities[i].modulations(conditions[i]) for i in there}  # type: ignore[operator]
        normed = [None if x is None else modulations[i][0].normed(x) for i, x in enumerate(modality_tokens)]
        outs, own = self.attn.attend(normed, joint_mask, all_phases, context)
        advanced: list[Tensor | None] = [None] * len(modality_tokens)
        for i in there:
            inputs = modality_tokens[i], outs[i], modulations[i], masks[i], all_phases[i]
            advanced[i] = self.modalities[i].finish(*inputs)  # type: ignore[operator]
        return (tuple(advanced), own) if returns_heads else tuple(advanced)

    def _check_conditions(self, cond: Any, tokens: Any) -> None:
        batch, lengths = tokens[0].shape[:-2], [x.shape[-2] for x in tokens]
        if isinstance(cond, Tensor):
            check_condition("cond", cond, batch, sum(lengths), self.dim_cond)
            return
        check_one_each("cond", cond, len(lengths))
        for i, (part, length) in enumerate(zip(cond, lengths, strict=True)):
            check_condition(f"cond of modality {i}", part, batch, length, self.dim_cond)

    def _own_masks(
        self, mask: Mask | None, given: Sequence[Mask | MaskFunction | None] | None, tokens: Any, num_context: int
    ) -> list[Mask | None]:
        """For each modality the mask of its dual attention, given or cut out of the joint one; None for others."""
        check_one_each("own_masks", given, len(tokens))
        masks: list[Mask | None] = [None] * len(tokens)
        row, column = 0, num_context
        for i, (x, part) in enumerate(zip(tokens, self.attn.modalities, strict=True)):
            length = x.shape[-2]
            if i in self.dual_attention and given is not None:
                masks[i] = mask_of_call(given[i], x, length, length, self.attn.heads, f"own mask of modality {i}")
            elif i in self.dual_attention and mask is not None and not part.is_pre_only:
                masks[i] = rows_and_columns(mask, slice(row, row + length), slice(column, column + length))
            row, column = row + (0 if part.is_pre_only else length), column + length
        return masks


def length_of(context: Heads | None) -> int:
    """How many keys there are before those of the call."""
    return 0 if context is None else context.k.shape[1]


def conditions_of(cond: Tensor | Sequence[Tensor | None], tokens: Tokens) -> list[Tensor | None]:
    """A condition for each modality, with an axis of tokens or a 1 in its place."""
    if not isinstance(cond, Tensor):
        each = zip(cond, tokens, strict=True)
        return [None if part is None or x is None else with_token_axis(part, x) for part, x in each]
    first = next(x for x in tokens if x is not None)
    if cond.ndim < first.ndim:
        return [cond.unsqueeze(-2)] * len(tokens)
    if cond.shape[-2] == 1:
        return [cond] * len(tokens)
    parts = iter(cond.split([x.shape[-2] for x in tokens if x is not None], dim=-2))
    return [None if x is None else next(parts) for x in tokens]
