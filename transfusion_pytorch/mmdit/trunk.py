"""What `MMDiT` and `InContextMMDiT` share: from tokens of several modalities through the blocks.

s tokens of one modality, d its width, r registers; leading batch dimensions are one, b, between the checks and the
outputs.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from transfusion_pytorch.mmdit.attention import Heads
from transfusion_pytorch.mmdit.checks import (
    check_is_sequence,
    check_modalities,
    check_one_each,
    check_positive,
    check_tokens,
    per_modality,
)
from transfusion_pytorch.mmdit.masks import (
    Layout,
    Mask,
    MaskFunction,
    MaskPlan,
    can_use_flex,
    check_mask,
    check_padding,
    joint_padding,
    of_samples,
    plan_masks,
)
from transfusion_pytorch.mmdit.positions import Positions, joint_phases
from transfusion_pytorch.network.shortcuts import forces_plain_formulas
from transfusion_pytorch.saving.methods import PretrainedMethods

Backend = Literal["sdpa", "flex"]
REGISTER_STD = 0.02


class Context(NamedTuple):
    """Keys and values of a model's first modalities, which later calls attend to without computing them again.

    b samples (batch dimensions as one), m tokens of these modalities with their registers, h heads, e channels.
    """

    layers: tuple[Heads, ...]  # of every block, k and v (b, m, h, e) each, without queries
    lengths: tuple[int, ...]  # of each of the first modalities, without registers
    registers: tuple[int, ...]  # of each of the first modalities
    padding: Bool[Tensor, "b m"] | None  # which keys are tokens, registers included; None if all are
    batch: torch.Size  # the batch dimensions of the caller


class JointStream(NamedTuple):
    """One call after its checks. Lists have an entry for every modality of the model, None for one without tokens."""

    tokens: list[Tensor | None]  # (b, r + s, d), registers first
    phases: tuple[Tensor | None, ...]
    masks: MaskPlan
    layout: Layout
    padding: Bool[Tensor, "b m"] | None
    batch: torch.Size  # the batch dimensions of the caller
    context: Context | None


class JointTransformer(PretrainedMethods, nn.Module):
    """Blocks over the tokens of several modalities; subclasses add conditions and last layers."""

    blocks: nn.ModuleList
    finals: nn.ModuleList

    def __init__(
        self,
        *,
        depth: int,
        dim_modalities: Sequence[int],
        dim_outs: int | Sequence[int | None],
        dim_head: int,
        heads: int,
        rope_axes: int,
        rotary_theta: float,
        num_registers: int | Sequence[int],
        attention: Backend,
        use_checkpoint: bool,
        dual_modalities: Sequence[int] = (),
    ):
        super().__init__()
        self.dim_modalities = check_modalities(dim_modalities)
        count = len(self.dim_modalities)
        check_positive(depth=depth)
        self.dim_outs: tuple[int | None, ...] = per_modality("dim_outs", dim_outs, count)
        for dim in self.dim_outs:
            check_positive(dim_outs=dim)
        if all(dim is None for dim in self.dim_outs):
            raise ValueError("dim_outs: at least one modality must have an output, all are None")
        self.attention = attention
        self.use_checkpoint, self.heads = use_checkpoint, heads
        self.rope: dict[str, Any] = dict(axes=rope_axes, dim_head=dim_head, theta=rotary_theta)
        self.dual_modalities = tuple(dual_modalities)
        self.num_registers: tuple[int, ...] = per_modality("num_registers", num_registers, count)
        if min(self.num_registers) < 0:
            raise ValueError(f"num_registers must not be negative, got {self.num_registers}")
        sizes = enumerate(zip(self.num_registers, self.dim_modalities, strict=True))
        self.registers = nn.ParameterDict(  # by the number of their modality
            {str(i): nn.Parameter(torch.randn(r, dim) * REGISTER_STD) for i, (r, dim) in sizes if r}
        )

    @property
    def attention(self) -> Backend:
        """What attends, "sdpa" or "flex". Setting it to anything else raises `ValueError`."""
        return self._attention

    @attention.setter
    def attention(self, attention: Backend) -> None:
        if attention not in get_args(Backend):
            raise ValueError(f"attention must be 'sdpa' or 'flex', got {attention!r}")
        self._attention: Backend = attention

    @property
    def _pre_only(self) -> tuple[int, ...]:
        """The modalities without output, of which the last block computes keys and values alone."""
        return tuple(i for i, dim in enumerate(self.dim_outs) if dim is None)

    def gradient_checkpointing_enable(self) -> None:
        """From now on blocks are computed again in the backward pass, instead of being remembered."""
        self.use_checkpoint = True

    def gradient_checkpointing_disable(self) -> None:
        self.use_checkpoint = False

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as a new model does."""
        for register in self.registers.values():
            nn.init.normal_(register, std=REGISTER_STD)
        modules = [module for module in self.modules() if module is not self and hasattr(module, "reset_parameters")]
        for module in reversed(modules):  # a layer that starts at zero is zeroed after those in it are drawn
            module.reset_parameters()  # type: ignore[operator]

    def _begin(
        self,
        modality_tokens: Sequence[Tensor],
        attention_mask: Mask | MaskFunction | None,
        padding_masks: Sequence[Tensor | None] | None,
        positions: Positions | None,
        *,
        context: Context | None = None,
        is_context: bool = False,
    ) -> JointStream:
        """Checks the inputs and lays them out: all modalities, those behind a `context`, or the first ones, which
        become one.
        """
        check_is_sequence("modality_tokens", modality_tokens)
        first, count = (0 if context is None else len(context.lengths)), len(self.dim_modalities)
        last = first + len(modality_tokens) if is_context else count
        if is_context and not 0 < last < count:
            raise ValueError(f"modality_tokens: a context has the first 1 to {count - 1} modalities, got {last}")
        dims = self.dim_modalities[first:last]
        lengths = check_tokens(modality_tokens, dims, first)
        before, behind = [None] * first, [None] * (count - last)
        batch, device = modality_tokens[0].shape[:-2], modality_tokens[0].device
        if context is not None and context.batch != batch:
            raise ValueError(f"context: expected the batch dimensions {tuple(batch)}, got {tuple(context.batch)}")
        check_padding(padding_masks, modality_tokens, first)
        check_one_each("positions", positions, len(modality_tokens))
        registers = tuple(each if first <= i < last else 0 for i, each in enumerate(self.num_registers))
        layout = Layout(
            batch=batch.numel(),
            heads=self.heads,
            lengths=(*[0] * first, *lengths, *[0] * (count - last)),
            registers=registers,
            context_lengths=() if context is None else context.lengths,
            context_registers=() if context is None else context.registers,
            has_output=tuple(dim is not None for dim in self.dim_outs),
            device=device,
        )
        check_mask(attention_mask, batch, layout.num_queries, layout.num_keys, layout.heads)
        masks = None if padding_masks is None else [*before, *padding_masks, *behind]
        padding = joint_padding(masks, layout, None if context is None else context.padding)
        all_positions = None if positions is None else [*before, *positions, *behind]
        if padding_masks is not None:  # nobody attends to padding, but 0 times a NaN in its values would be NaN
            modality_tokens = [without_padding(*each) for each in zip(modality_tokens, padding_masks, strict=True)]
        tokens = [*before, *modality_tokens, *behind]
        return JointStream(
            tokens=[None if x is None else self._with_registers(i, x) for i, x in enumerate(tokens)],
            phases=joint_phases(all_positions, tokens, registers=registers, **self.rope),
            masks=self._plan(attention_mask, padding, layout, batch),
            layout=layout,
            padding=padding,
            batch=batch,
            context=context,
        )

    def _with_registers(self, modality: int, x: Tensor) -> Tensor:
        """`(*batch, s, d)` to `(b, r + s, d)`."""
        x = x.reshape(-1, *x.shape[-2:])
        if not self.num_registers[modality]:
            return x
        return torch.cat((self.registers[str(modality)].to(x.dtype).expand(len(x), -1, -1), x), dim=1)

    def _plan(
        self,
        mask: Mask | MaskFunction | None,
        padding: Tensor | None,
        layout: Layout,
        batch: torch.Size,
    ) -> MaskPlan:
        use_flex = self.attention == "flex" or isinstance(mask, BlockMask)
        use_flex = use_flex and can_use_flex(layout.device)
        if isinstance(mask, BlockMask) and not use_flex:
            mask = mask.mask_mod
        if isinstance(mask, Tensor):
            mask = of_samples(mask, batch)
        return plan_masks(mask, padding, layout, use_flex=use_flex, dual=self.dual_modalities)

    def _through_blocks(self, stream: JointStream, *conditions: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The tokens behind the last block, registers included; None for modalities without output."""
        tokens: Sequence[Tensor | None] = stream.tokens
        for index, block in enumerate(self.blocks):
            context = None if stream.context is None else stream.context.layers[index]
            options = self._block_options(stream, bool(conditions)) | dict(context=context)
            tokens = self._call(block, tokens, *conditions, self._mask_of(stream, index), **options)
        return tokens

    def _call(self, block: nn.Module, *inputs: Any, **options: Any) -> Any:
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return block(*inputs, **options)
        if not torch.compiler.is_compiling() and forces_plain_formulas():
            return block(*inputs, **options)
        return checkpoint(block, *inputs, use_reentrant=False, **options)

    def _mask_of(self, stream: JointStream, index: int) -> Mask | None:
        return stream.masks.last if index == len(self.blocks) - 1 else stream.masks.every

    def _block_options(self, stream: JointStream, is_conditioned: bool) -> dict[str, Any]:
        options: dict[str, Any] = dict(phases=stream.phases, checks=False)
        return options | dict(own_masks=stream.masks.own) if is_conditioned else options

    def _remember(self, stream: JointStream, *conditions: Sequence[Tensor | None]) -> Context:
        """The keys and values of a stream of the first modalities, in every block."""
        tokens: Sequence[Tensor | None] = stream.tokens
        layers = []
        options = self._block_options(stream, bool(conditions)) | dict(returns_heads=True)
        for index, block in enumerate(self.blocks):
            tokens, heads = self._call(block, tokens, *conditions, self._mask_of(stream, index), **options)
            layers.append(heads._replace(q=None))
        count = sum(length > 0 for length in stream.layout.lengths)
        registers = stream.layout.registers[:count]
        return Context(tuple(layers), stream.layout.lengths[:count], registers, stream.padding, stream.batch)

    def _finish(
        self, stream: JointStream, tokens: Sequence[Tensor | None], *conditions: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The outputs of the modalities of a call, without registers, with the batch dimensions of the caller."""
        outs: list[Tensor | None] = []
        for i, x in enumerate(tokens):
            if not stream.layout.lengths[i]:
                continue
            if x is None:
                outs.append(None)
                continue
            out = self.finals[i](x, *(each[i] for each in conditions))
            out = out[:, stream.layout.registers[i] :]
            outs.append(out.reshape(*stream.batch, *out.shape[1:]))
        return tuple(outs)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens `(*batch, s, d)` with zeros where the mask `(*batch, s)` has padding."""
    return x if mask is None else x.masked_fill(~mask.to(x.device)[..., None], 0.0)
