"""Stable Diffusion 3 and 3.5 as an `MMDiT` of two modalities: patches of latents, and text.

b samples, c channels, y and x latents along the axes, s text tokens, t channels of text, p pooled vector.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn

from transfusion_pytorch.mmdit.attention import QKNorm
from transfusion_pytorch.mmdit.model import MMDiT
from transfusion_pytorch.mmdit.sd3_weights import converted, sizes_of, with_norm_weights
from transfusion_pytorch.network.linear import Conv2d, Linear
from transfusion_pytorch.network.norms import sinusoids
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.saving.methods import PretrainedMethods
from transfusion_pytorch.sequence.positions import axial_coordinates

IMAGE, TEXT = 0, 1


@register_component
class SD3MMDiT(PretrainedMethods, nn.Module):
    """The transformer of Stable Diffusion 3 and 3.5 (arXiv 2403.03206): latents are cut into patches, get a position
    from a table, and go through an `MMDiT` beside the text.

    - `channels`, `out_channels`: of latents, before and behind; `patch_size`: latents along a side of a patch
    - `dim_text`, `dim_pooled`: channels of text embeddings, and of the pooled one
    - `table_size`: patches along a side of the table of positions, out of whose middle those of an image are taken
    - the rest: see `MMDiT`
    """

    example_call = "velocity = model(latents, text_embeddings, pooled_embeddings, timestep)"

    def __init__(
        self,
        *,
        depth: int,
        dim_head: int,
        heads: int,
        channels: int,
        out_channels: int,
        patch_size: int,
        dim_text: int,
        dim_pooled: int,
        table_size: int,
        ff_mult: float = 4,
        timestep_embed_dim: int = 256,
        qk_norm: QKNorm = "none",
        dual_attention_layers: tuple[int, ...] | list[int] = (),
        use_checkpoint: bool = False,
    ):
        super().__init__()
        dim = dim_head * heads
        self.patch_size = patch_size
        self.to_patches = Conv2d(channels, dim, patch_size, stride=patch_size)
        self.to_text = Linear(dim_text, dim)
        self.position_table: Tensor
        self.register_buffer("position_table", _sinusoidal_table(table_size, dim))
        self.mmdit = MMDiT(
            depth=depth,
            dim_modalities=(dim, dim),
            dim_outs=(patch_size**2 * out_channels, None),
            dim_cond=dim,
            timestep_embed_dim=timestep_embed_dim,
            dim_pooled=dim_pooled,
            dim_head=dim_head,
            heads=heads,
            qk_norm=qk_norm,
            rope_axes=0,
            attn_bias=True,
            ff_mult=ff_mult,
            activation="gelu_tanh",
            dual_attention_layers=dual_attention_layers,
            dual_attention_modalities=(IMAGE,),
            use_checkpoint=use_checkpoint,
        )

    @classmethod
    def from_weights(
        cls,
        model_or_state_dict: nn.Module | Mapping[str, Tensor],
        *,
        dim_head: int | None = None,
        qk_norm: str | None = None,
    ) -> "SD3MMDiT":
        """A model with copies of the weights of a `diffusers.SD3Transformer2DModel`, or of its `state_dict`.

        A model has a configuration. For a state alone, two options say what is not in it:

        - `dim_head`: channels of a head, if they are not 64 and queries and keys have no norms with weights
        - `qk_norm`: "fp32_layer_norm" if queries and keys are normalised so, which has no weights. Other norms are
          found by their weights

        Raises `ValueError` that lists what is missing or left over, and for a `qk_norm` that SD3 does not have.
        """
        state = model_or_state_dict
        if isinstance(state, nn.Module):
            config = getattr(state, "config", None)
            dim_head = getattr(config, "attention_head_dim", dim_head)
            qk_norm = getattr(config, "qk_norm", qk_norm)
            state = state.state_dict()
        state = with_norm_weights(state, dim_head, qk_norm)
        sizes = sizes_of(state, dim_head)
        with torch.device("meta"):
            model = cls(**sizes)
        model.load_state_dict(converted(state, sizes), assign=True)
        return model

    def gradient_checkpointing_enable(self) -> None:
        self.mmdit.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        self.mmdit.gradient_checkpointing_disable()

    def forward(
        self,
        hidden_states: Shaped[Tensor, "b c y x"],
        encoder_hidden_states: Shaped[Tensor, "b s t"],
        pooled_projections: Shaped[Tensor, "b p"],
        timestep: Any,
        *,
        padding_mask: Tensor | None = None,
    ) -> Shaped[Tensor, "b out y x"]:
        """Velocities of latents, from noisy latents, embeddings of text, a pooled one, and times from 0 to 1000 (1000
        is noise, as in SD3): a number or `(b,)`.

        `padding_mask` `(b, s)` is True for text and False for padding, which nobody attends to.

        Raises `ValueError` that names the input for shapes that do not fit, and the errors of `MMDiT.forward`.
        """
        height, width = self._checked_patches(hidden_states, encoder_hidden_states, pooled_projections)
        patches = rearrange(self.to_patches(hidden_states), "b d y x -> b (y x) d")
        patches = patches + self._positions(height, width).to(patches.dtype)
        tokens, masks = (patches, self.to_text(encoder_hidden_states)), (None, padding_mask)
        velocity, _ = self.mmdit(tokens, timestep, pooled=pooled_projections, padding_masks=masks)
        assert velocity is not None
        size = dict(y=height, x=width, py=self.patch_size, px=self.patch_size)
        return rearrange(velocity, "b (y x) (py px c) -> b c (y py) (x px)", **size)

    def _checked_patches(self, latents: Tensor, text: Tensor, pooled: Tensor) -> tuple[int, int]:
        """Patches along the sides of latents, `(height, width)`."""
        batch, channels, dim_text = len(latents), self.to_patches.in_channels, self.to_text.in_features
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"hidden_states: expected latents (b, {channels}, y, x), got {tuple(latents.shape)}")
        if text.ndim != 3 or len(text) != batch or text.shape[2] != dim_text:
            raise ValueError(
                f"encoder_hidden_states: expected text ({batch}, tokens, {dim_text}), got {tuple(text.shape)}"
            )
        if tuple(pooled.shape) != (batch, self.mmdit.dim_pooled):
            wanted = (batch, self.mmdit.dim_pooled)
            raise ValueError(f"pooled_projections: expected the shape {wanted}, got {tuple(pooled.shape)}")
        height, width = (size // self.patch_size for size in latents.shape[-2:])
        if tuple(latents.shape[-2:]) != (height * self.patch_size, width * self.patch_size):
            raise ValueError(
                f"hidden_states: expected sides that are multiples of {self.patch_size}, got {latents.shape[-2:]}"
            )
        return height, width

    def _positions(self, height: int, width: int) -> Tensor:
        """Of `(height, width)` patches in the middle of the table, `(height * width, d)`."""
        size = len(self.position_table)
        if max(height, width) > size:
            raise ValueError(
                f"hidden_states: at most {size} patches along a side have a position, got {height}, {width}"
            )
        top, left = (size - height) // 2, (size - width) // 2
        return self.position_table[top : top + height, left : left + width].flatten(0, 1)


def _sinusoidal_table(size: int, dim: int) -> Tensor:
    """`(size, size, d)`: sines and cosines of both coordinates."""
    table = sinusoids(axial_coordinates((size, size)), count=-(-dim // 4), highest=1.0, ratio=10_000.0)
    return table[:, :dim].unflatten(0, (size, size)).clone()
