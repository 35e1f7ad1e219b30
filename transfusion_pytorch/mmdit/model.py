"""Multimodal diffusion transformers: tokens of several modalities, each with weights of its own, in one attention.

s tokens of one modality, n tokens of all, d the width of a modality, c condition, p pooled vector; leading batch
dimensions are free.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_pytorch.mmdit.attention import QKNorm
from transfusion_pytorch.mmdit.blocks import InContextMMDiTBlock, MMDiTBlock
from transfusion_pytorch.mmdit.checks import check_numbers, check_positive, check_times
from transfusion_pytorch.mmdit.layers import (
    NORM_EPS,
    Activation,
    ModulatedFinalLayer,
    SimpleFinalLayer,
    TimestepEmbedding,
)
from transfusion_pytorch.mmdit.masks import Mask, MaskFunction
from transfusion_pytorch.mmdit.positions import Positions
from transfusion_pytorch.mmdit.trunk import Backend, Context, JointStream, JointTransformer
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.saving.components import register_component

if TYPE_CHECKING:
    from transfusion_pytorch.mmdit.sd3 import SD3MMDiT

Times = float | Real | Tensor | Sequence[float | Real | Tensor] | None


@register_component
class MMDiT(JointTransformer):
    """A multimodal diffusion transformer (SD3, arXiv 2403.03206) of any number of modalities.

    Every modality has its own width, projections, norms and feedforward; all tokens share one attention. Norms and
    gates depend on the time (adaLN-Zero), and start so that every block leaves its tokens as they are and the output
    is exactly 0.

    - `dim_modalities`: the width of each modality; `dim_outs`: channels of its output, one for all or one each. None is
      for a modality without output, which the last block only attends to
    - `dim_cond`: width of the condition; `timestep_embed_dim`: sines and cosines of a time. A tuple is for several
      conditioning variables, such as t and r of mean flow (arXiv 2505.13447), whose embeddings are summed
    - `timestep_scale`: what times are multiplied by before that; 1000 for times in [0, 1] as SD3 sees them
    - `dim_pooled`: width of a vector that joins the condition, such as a pooled text embedding
    - `dim_head`, `heads`, `qk_norm`, `rope_axes`, `rotary_theta`, `attn_bias`: see `JointAttention`
    - `ff_mult`, `activation`: see `FeedForward`; `norm_eps`: of the adaptive norms
    - `num_registers`: learned tokens before those of each modality, one number for all or one each. Who sees a token of
      a modality sees its registers, and they see what all tokens of their modality see
    - `dual_attention_layers`: blocks in which the `dual_attention_modalities` also attend among themselves (SD3.5)
    - `attention`: "sdpa" or "flex"; can be changed later. Flex attention trains on a GPU only; on a CPU it is there for
      inference, and SDPA trains in its place
    - `use_checkpoint`: blocks are computed again in the backward pass instead of being remembered

    Raises `TypeError` or `ValueError` that names the argument.
    """

    example_call = "outputs = model(modality_tokens, timestep)  # a tensor for each modality"

    def __init__(
        self,
        *,
        depth: int,
        dim_modalities: Sequence[int],
        dim_outs: int | Sequence[int | None],
        dim_cond: int = 1024,
        timestep_embed_dim: int | Sequence[int] = 256,
        timestep_scale: float = 1.0,
        dim_pooled: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        qk_norm: QKNorm = "rms",
        rope_axes: int = 1,
        rotary_theta: float = 10_000.0,
        attn_bias: bool = False,
        ff_mult: float = 4,
        activation: Activation = "swiglu",
        norm_eps: float = NORM_EPS,
        num_registers: int | Sequence[int] = 0,
        dual_attention_layers: Sequence[int] = (),
        dual_attention_modalities: Sequence[int] = (0,),
        attention: Backend = "sdpa",
        use_checkpoint: bool = False,
    ):
        super().__init__(
            depth=depth,
            dim_modalities=dim_modalities,
            dim_outs=dim_outs,
            dim_head=dim_head,
            heads=heads,
            rope_axes=rope_axes,
            rotary_theta=rotary_theta,
            num_registers=num_registers,
            attention=attention,
            use_checkpoint=use_checkpoint,
            dual_modalities=dual_attention_modalities if dual_attention_layers else (),
        )
        check_positive(dim_cond=dim_cond, dim_pooled=dim_pooled)
        check_numbers("dual_attention_layers", dual_attention_layers, depth)
        check_numbers("dual_attention_modalities", dual_attention_modalities, len(self.dim_modalities))
        embed_dims = (timestep_embed_dim,) if isinstance(timestep_embed_dim, int) else tuple(timestep_embed_dim)
        if not embed_dims:
            raise ValueError("timestep_embed_dim is empty: there must be at least one conditioning variable")
        self.embed_times = nn.ModuleList(
            TimestepEmbedding(dim_cond, timestep_embed_dim=dim, timestep_scale=timestep_scale) for dim in embed_dims
        )
        self.dim_pooled = dim_pooled
        self.embed_pooled = (
            None
            if dim_pooled is None
            else nn.Sequential(Linear(dim_pooled, dim_cond), nn.SiLU(), Linear(dim_cond, dim_cond))
        )
        self.blocks = nn.ModuleList(
            MMDiTBlock(
                self.dim_modalities,
                dim_cond=dim_cond,
                ff_mult=ff_mult,
                activation=activation,
                norm_eps=norm_eps,
                pre_only=self._pre_only if index == depth - 1 else (),
                dual_attention=self.dual_modalities if index in dual_attention_layers else (),
                dim_head=dim_head,
                heads=heads,
                qk_norm=qk_norm,
                rope_axes=rope_axes,
                rotary_theta=rotary_theta,
                bias=attn_bias,
            )
            for index in range(depth)
        )
        self.finals = nn.ModuleList(
            nn.Identity() if out is None else ModulatedFinalLayer(dim, out, dim_cond, eps=norm_eps)
            for dim, out in zip(self.dim_modalities, self.dim_outs, strict=True)
        )

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        timestep: Times = None,
        attention_mask: Mask | MaskFunction | None = None,
        *,
        pooled: Tensor | None = None,
        padding_masks: Sequence[Tensor | None] | None = None,
        positions: Positions | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(*batch, s_i, d_i)` of every modality to `(*batch, s_i, dim_outs_i)`; None for one without output.

        - `timestep`: a number, `(*batch,)`, or `(*batch, n)` for every token of all modalities in their order
          (diffusion forcing, arXiv 2407.01392); a tuple of them if there are several conditioning variables. Registers
          have the time of the first token of their modality
        - `attention_mask`: True where a query (row) may attend to a key (column), `(n, n)` or `(*batch, n, n)`, over
          the tokens of all modalities in their order. Or a function of `(b, h, query, key)`, or a `BlockMask`, as flex
          attention has them
        - `pooled`: `(*batch, p)`, wanted if there is a `dim_pooled`
        - `padding_masks`: for each modality `(*batch, s_i)`, True for tokens and False for padding, which nobody
          attends to; None where there is none. What comes out at padding means nothing
        - `positions`: see `joint_phases`
        - `context`: the first modalities, by `encode_context`; all arguments are about the others then, and masks
          have all keys: `(n, m)`

        Raises `TypeError` or `ValueError` that names the input for whatever does not fit.
        """
        stream = self._begin(modality_tokens, attention_mask, padding_masks, positions, context=context)
        conditions = self._conditions(timestep, pooled, stream)
        return self._finish(stream, self._through_blocks(stream, conditions), conditions)

    def encode_context(
        self,
        modality_tokens: Sequence[Tensor],
        timestep: Times = None,
        attention_mask: Mask | MaskFunction | None = None,
        *,
        pooled: Tensor | None = None,
        padding_masks: Sequence[Tensor | None] | None = None,
        positions: Positions | None = None,
    ) -> Context:
        """Keys and values of the first modalities, for calls that compute the others alone: observations of a policy.

        Arguments are those of `forward`, about these modalities. Equal to one call with all modalities in which none of
        these attends to the others, and has this `timestep`.

        Raises `TypeError` or `ValueError` as `forward` does, and for all modalities at once: one at least must be left.
        """
        stream = self._begin(modality_tokens, attention_mask, padding_masks, positions, is_context=True)
        return self._remember(stream, self._conditions(timestep, pooled, stream))

    @classmethod
    def from_sd3(cls, model_or_state_dict: nn.Module | Mapping[str, Tensor], **options: Any) -> "SD3MMDiT":
        """A model with the weights of a `diffusers.SD3Transformer2DModel` (SD3, SD3.5), or of its `state_dict`.

        Called as that is: see `SD3MMDiT`, whose `from_weights` has the `options`.
        """
        from transfusion_pytorch.mmdit.sd3 import SD3MMDiT

        return SD3MMDiT.from_weights(model_or_state_dict, **options)

    def _conditions(self, timestep: Times, pooled: Tensor | None, stream: JointStream) -> list[Tensor | None]:
        """What modulates each modality: `(b, r + s, c)`, with a 1 for samples or tokens that have the same."""
        layout = stream.layout
        like = next(x for x in stream.tokens if x is not None)
        times = check_times(timestep, stream.batch, layout.num_queries, len(self.embed_times), like)
        embedded = [embed(time) for embed, time in zip(self.embed_times, times, strict=True)]
        if self.embed_pooled is not None:
            embedded.append(self.embed_pooled(self._checked_pooled(pooled, stream, like)))
        elif pooled is not None:
            raise ValueError("pooled: this model was built without dim_pooled; leave it out")
        # (c,), (b, c) or (b, n, c) as (1, 1, c), (b, 1, c) or (b, n, c)
        aligned = [part if part.ndim == 3 else part.reshape(-1, 1, part.shape[-1]) for part in embedded]
        cond = F.silu(reduce(torch.add, aligned))
        if all(part.ndim < 3 for part in embedded):
            return [None if x is None else cond for x in stream.tokens]
        parts = cond.split(layout.lengths, dim=1)
        return [
            None if x is None else _with_first(part, count)
            for x, part, count in zip(stream.tokens, parts, layout.registers, strict=True)
        ]

    def _checked_pooled(self, pooled: Tensor | None, stream: JointStream, like: Tensor) -> Tensor:
        shape = (*stream.batch, self.dim_pooled)
        if pooled is not None and not isinstance(pooled, Tensor):
            raise TypeError(f"pooled must be a tensor of shape {shape}, got {type(pooled).__name__}")
        if pooled is None or tuple(pooled.shape) != shape:
            got = "nothing" if pooled is None else tuple(pooled.shape)
            raise ValueError(f"pooled: expected a vector for each sample, of shape {shape}, got {got}")
        return pooled.reshape(-1, pooled.shape[-1]).to(like.dtype)


def _with_first(cond: Tensor, count: int) -> Tensor:
    """Conditions of tokens, with as many copies of the first before them."""
    return cond if not count else torch.cat((cond[:, :1].expand(-1, count, -1), cond), dim=1)


@register_component
class InContextMMDiT(JointTransformer):
    """A multimodal transformer without conditions: what tokens are to know, the time included, comes as tokens.

    Root mean square norms and plain residuals; the last layers start at zero, so that the first output is exactly 0.
    Nothing in it depends on the time but the time tokens that the caller puts before the tokens to denoise, so that
    observations can be encoded once for all solver steps: see `encode_context`.

    Arguments are those of `MMDiT`.
    """

    example_call = "outputs = model(modality_tokens)  # a tensor for each modality"

    def __init__(
        self,
        *,
        depth: int,
        dim_modalities: Sequence[int],
        dim_outs: int | Sequence[int | None],
        dim_head: int = 64,
        heads: int = 8,
        qk_norm: QKNorm = "rms",
        rope_axes: int = 1,
        rotary_theta: float = 10_000.0,
        attn_bias: bool = False,
        ff_mult: float = 4,
        activation: Activation = "swiglu",
        num_registers: int | Sequence[int] = 0,
        attention: Backend = "sdpa",
        use_checkpoint: bool = False,
    ):
        super().__init__(
            depth=depth,
            dim_modalities=dim_modalities,
            dim_outs=dim_outs,
            dim_head=dim_head,
            heads=heads,
            rope_axes=rope_axes,
            rotary_theta=rotary_theta,
            num_registers=num_registers,
            attention=attention,
            use_checkpoint=use_checkpoint,
        )
        self.blocks = nn.ModuleList(
            InContextMMDiTBlock(
                self.dim_modalities,
                ff_mult=ff_mult,
                activation=activation,
                pre_only=self._pre_only if index == depth - 1 else (),
                dim_head=dim_head,
                heads=heads,
                qk_norm=qk_norm,
                rope_axes=rope_axes,
                rotary_theta=rotary_theta,
                bias=attn_bias,
            )
            for index in range(depth)
        )
        self.finals = nn.ModuleList(
            nn.Identity() if out is None else SimpleFinalLayer(dim, out)
            for dim, out in zip(self.dim_modalities, self.dim_outs, strict=True)
        )

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        attention_mask: Mask | MaskFunction | None = None,
        *,
        padding_masks: Sequence[Tensor | None] | None = None,
        positions: Positions | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor | None, ...]:
        """`(*batch, s_i, d_i)` of every modality to `(*batch, s_i, dim_outs_i)`; None for one without output.

        Arguments and errors are those of `MMDiT.forward`.
        """
        stream = self._begin(modality_tokens, attention_mask, padding_masks, positions, context=context)
        return self._finish(stream, self._through_blocks(stream))

    def encode_context(
        self,
        modality_tokens: Sequence[Tensor],
        attention_mask: Mask | MaskFunction | None = None,
        *,
        padding_masks: Sequence[Tensor | None] | None = None,
        positions: Positions | None = None,
    ) -> Context:
        """Keys and values of the first modalities, for calls that compute the others alone.

        Arguments and errors are those of `MMDiT.encode_context`.
        """
        stream = self._begin(modality_tokens, attention_mask, padding_masks, positions, is_context=True)
        return self._remember(stream)
