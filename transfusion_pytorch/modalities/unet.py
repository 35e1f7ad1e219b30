"""The halves of a U-Net, around the transformer: one brings latents down to fewer tokens, the other back up.

The Transfusion paper (arXiv 2408.11039, section 3.2) finds them better than linear patches, most of all in small
models.

g spans of one shape, c channels of a latent, h hidden channels, d model.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.linear import Conv1d, Conv2d, Conv3d, Linear
from transfusion_pytorch.saving.components import register_component

CONVOLUTIONS = {1: Conv1d, 2: Conv2d, 3: Conv3d}


def convolution(num_dim: int, *args, **options) -> nn.Module:
    """A convolution over 1, 2 or 3 axes."""
    if num_dim not in CONVOLUTIONS:
        raise ValueError(f"convolutions need 1, 2 or 3 axes, got {num_dim}")
    return CONVOLUTIONS[num_dim](*args, **options)


def group_norm(dim: int) -> nn.GroupNorm:
    """In up to 8 groups of at least 4 channels: a single latent must not be all there is in a group."""
    most = max(1, min(8, dim // 4))
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if dim % groups == 0), dim)


def start_at_zero(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the second starts at zero. A condition, if there is one, scales and shifts
    the input of the second.
    """

    def __init__(self, dim_in: int, dim_out: int, *, num_dim: int, dim_condition: int | None = None):
        super().__init__()
        self.norm_in = group_norm(dim_in)
        self.conv_in = convolution(num_dim, dim_in, dim_out, 3, padding=1)
        self.norm_out = group_norm(dim_out)
        self.to_modulation = None if dim_condition is None else Linear(dim_condition, 2 * dim_out)
        self.conv_out = convolution(num_dim, dim_out, dim_out, 3, padding=1)
        self.shortcut = convolution(num_dim, dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start_at_zero(self.conv_out, *([] if self.to_modulation is None else [self.to_modulation]))

    def forward(
        self, x: Shaped[Tensor, "g i ..."], condition: Shaped[Tensor, "g d"] | None = None
    ) -> Shaped[Tensor, "g o ..."]:
        hidden = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.to_modulation is not None:
            modulation = self.to_modulation(condition)
            scale, shift = modulation.reshape(*modulation.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        return self.shortcut(x) + self.conv_out(F.silu(hidden))


def check_sizes(dim_latent: int, dim: int, dim_hidden: int, num_downsamples: int) -> None:
    for name, value in (("dim_latent", dim_latent), ("dim", dim), ("dim_hidden", dim_hidden)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if num_downsamples < 0:
        raise ValueError(f"num_downsamples must not be negative, got {num_downsamples}")


@register_component
class UNetDown(nn.Module):
    """From latents `(g, dim_latent, *axes)` to tokens `(g, dim, *axes / 2**num_downsamples)`, rounded up.

    Give it and `UNetUp` the same arguments:

    - `dim_latent`: channels of a latent
    - `dim`: the transformer's; of a language model, `language_model_dim(name)`
    - `dim_hidden`: hidden channels at the size of the latents, twice as many after each downsample
    - `num_dim`: axes of the latents, 1 to 3
    - `num_downsamples`: how often every axis is halved; 0 for none

    Raises `ValueError` for sizes below 1, a negative `num_downsamples`, and another number of axes.
    """

    def __init__(self, dim_latent: int, dim: int, *, dim_hidden: int = 64, num_dim: int = 2, num_downsamples: int = 1):
        super().__init__()
        check_sizes(dim_latent, dim, dim_hidden, num_downsamples)
        self.dim_latent, self.dim = dim_latent, dim
        widths = [dim_hidden * 2**level for level in range(num_downsamples)]
        block = dict(dim_condition=dim, num_dim=num_dim)
        self.conv_in = convolution(num_dim, dim_latent, dim_hidden, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, width, **block) for width in widths)
        self.downs = nn.ModuleList(convolution(num_dim, width, 2 * width, 3, stride=2, padding=1) for width in widths)
        self.last_block = ResidualBlock(dim_hidden * 2**num_downsamples, dim, **block)

    def forward(
        self, x: Shaped[Tensor, "g c ..."], condition: Shaped[Tensor, "g d"]
    ) -> tuple[Shaped[Tensor, "g d ..."], list[Tensor]]:
        """The tokens, and what `UNetUp` needs to see again."""
        x = self.conv_in(x)
        skips = []
        for block, down in zip(self.blocks, self.downs, strict=True):
            x = block(x, condition)
            skips.append(x)
            x = down(x)
        return self.last_block(x, condition), skips


@register_component
class UNetUp(nn.Module):
    """From tokens `(g, dim, *token axes)` back to latents `(g, dim_latent, *axes)`, reading what `UNetDown` kept; the
    output starts at zero. Arguments and errors are those of `UNetDown`.
    """

    def __init__(self, dim_latent: int, dim: int, *, dim_hidden: int = 64, num_dim: int = 2, num_downsamples: int = 1):
        super().__init__()
        check_sizes(dim_latent, dim, dim_hidden, num_downsamples)
        self.dim_latent, self.dim = dim_latent, dim
        widths = [dim_hidden * 2**level for level in reversed(range(num_downsamples))]
        block = dict(dim_condition=dim, num_dim=num_dim)
        self.first_block = ResidualBlock(dim, dim_hidden * 2**num_downsamples, **block)
        self.ups = nn.ModuleList(convolution(num_dim, 2 * width, width, 3, padding=1) for width in widths)
        self.blocks = nn.ModuleList(ResidualBlock(2 * width, width, **block) for width in widths)
        self.conv_out = convolution(num_dim, dim_hidden, dim_latent, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start_at_zero(self.conv_out)

    def forward(
        self, x: Shaped[Tensor, "g d ..."], condition: Shaped[Tensor, "g d"], skips: Sequence[Tensor]
    ) -> Shaped[Tensor, "g c ..."]:
        x = self.first_block(x, condition)
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips), strict=True):
            # to the size of what was kept, so that odd sizes come back as they were
            x = up(F.interpolate(x, size=skip.shape[2:], mode="nearest"))
            x = block(torch.cat((x, skip), dim=1), condition)
        return self.conv_out(F.silu(x))
