"""A convolutional autoencoder with a Gaussian posterior (Kingma and Welling, arXiv 1312.6114), over 1 to 3 axes.

b instances, x channels of the data, c channels of a latent, h hidden channels, r resolutions.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.autoencoder.halves import DecoderHalf, EncoderHalf
from transfusion_pytorch.modalities.autoencoder import DataLayout
from transfusion_pytorch.modalities.unet import ResidualBlock, convolution, group_norm
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.saving.card import ModelCard
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.saving.methods import PretrainedMethods

PosteriorUse = Literal["sample", "mode"]
LOG_VARIANCES = (-30.0, 20.0)  # beyond these the exponential leaves single precision
HALF_SIZE = 2  # a resolution has sides half as long as the one before
# a cube of neighbouring positions as channels, and back
SPACE_TO_DEPTH = {
    1: ("b c (l p)", "b (c p) l"),
    2: ("b c (h p) (w q)", "b (c p q) h w"),
    3: ("b c (f p) (h q) (w r)", "b (c p q r) f h w"),
}


class Posterior(NamedTuple):
    """An independent Gaussian for every number of a latent."""

    mean: Float[Tensor, "b c ..."]
    log_variance: Float[Tensor, "b c ..."]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b c ..."]:
        """Drawn from the generator, or from torch's own."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + (self.log_variance / 2).exp() * noise.to(self.mean.device)

    def divergence(self) -> Float[Tensor, " b"]:
        """The Kullback-Leibler divergence from the standard normal distribution, in nats for each instance: how much
        a latent says, at most, of its instance.
        """
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return terms.flatten(1).sum(dim=1) / 2


class Reconstruction(NamedTuple):
    """What an autoencoder made of a batch."""

    data: Float[Tensor, "b x ..."]
    posterior: Posterior


def space_to_depth(x: Float[Tensor, "b i ..."], side: int) -> Float[Tensor, "b o ..."]:
    """Neighbouring positions become channels: `(b, c, *axes)` to `(b, c side**num_dim, *axes / side)`."""
    space, depth = SPACE_TO_DEPTH[x.ndim - 2]
    return x if side == 1 else rearrange(x, f"{space} -> {depth}", **dict.fromkeys("pqr"[: x.ndim - 2], side))


def depth_to_space(x: Float[Tensor, "b i ..."], side: int) -> Float[Tensor, "b o ..."]:
    """The inverse of `space_to_depth`."""
    space, depth = SPACE_TO_DEPTH[x.ndim - 2]
    return x if side == 1 else rearrange(x, f"{depth} -> {space}", **dict.fromkeys("pqr"[: x.ndim - 2], side))


def levels(widths: Sequence[int], num_blocks: Sequence[int], *, num_dim: int) -> nn.ModuleList:
    """Residual blocks at each resolution."""
    return nn.ModuleList(
        nn.Sequential(*(ResidualBlock(width, width, num_dim=num_dim) for _ in range(count)))
        for width, count in zip(widths, num_blocks, strict=True)
    )


class Upsample(nn.Module):
    """Doubles every axis: channels of a convolution become neighbouring positions (arXiv 1609.05158)."""

    def __init__(self, dim_in: int, dim_out: int, *, num_dim: int):
        super().__init__()
        self.conv = convolution(num_dim, dim_in, dim_out * HALF_SIZE**num_dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "b h ..."]) -> Float[Tensor, "b o ..."]:
        return depth_to_space(self.conv(x), HALF_SIZE)


@register_component
class KLEncoder(EncoderHalf):
    """Data `(b, channels, *axes)` to latents `(b, dim_latent, *axes / factor)`: a `modality_encoder`. The factor is
    `patch_size * 2**(r - 1)`.

    Give it and `KLDecoder` the same arguments.

    - `channels`, `num_dim`: channels and axes of the data
    - `widths`: hidden channels at each resolution, the finest first
    - `num_blocks`: residual blocks at each resolution
    - `patch_size`: so many positions along each axis are joined to channels before the first resolution, which saves
      work where details are simple
    - `posterior`: latents are "sample"s of the posterior, drawn from torch's generator, or its "mode"

    Raises `ValueError` for data of other channels, or whose sides are no multiples of the factor.
    """

    def __init__(
        self,
        dim_latent: int,
        *,
        channels: int = 3,
        num_dim: int = 2,
        widths: Sequence[int] = (32, 64, 128),
        num_blocks: Sequence[int] = (1, 1, 2),
        patch_size: int = 1,
        posterior: PosteriorUse = "sample",
    ):
        check_sizes(dim_latent, channels, widths, num_blocks, patch_size)
        if posterior not in ("sample", "mode"):
            raise ValueError(f'posterior is "sample" or "mode", got {posterior!r}')
        factor = patch_size * HALF_SIZE ** (len(widths) - 1)
        super().__init__(dim_latent, DataLayout(channels, (factor,) * num_dim))
        self.posterior_use, self.patch_size = posterior, patch_size
        self.conv_in = convolution(num_dim, channels * patch_size**num_dim, widths[0], 3, padding=1)
        self.levels = levels(widths, num_blocks, num_dim=num_dim)
        self.downs = nn.ModuleList(
            convolution(num_dim, fine, coarse, HALF_SIZE, stride=HALF_SIZE) for fine, coarse in pairwise(widths)
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = convolution(num_dim, widths[-1], 2 * dim_latent, 3, padding=1)

    def posterior(self, data: Float[Tensor, "b x ..."]) -> Posterior:
        """The distribution of the latents, in the autoencoder's scale and in single precision."""
        self.check(data)
        x = self.levels[0](self.conv_in(space_to_depth(data, self.patch_size)))
        for down, level in zip(self.downs, self.levels[1:], strict=True):
            x = level(down(x))
        moments = self.conv_out(F.silu(self.norm_out(x)))
        mean, log_variance = moments.to(precise(moments.dtype)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCES))

    def encode(self, data: Float[Tensor, "b x ..."]) -> Float[Tensor, "b c ..."]:
        posterior = self.posterior(data)
        return posterior.sample() if self.posterior_use == "sample" else posterior.mean


@register_component
class KLDecoder(DecoderHalf):
    """Latents `(b, dim_latent, *axes)` to data `(b, channels, *axes * factor)`: a `modality_decoder`.

    The arguments are those of `KLEncoder`. What it makes is not clipped.
    """

    def __init__(
        self,
        dim_latent: int,
        *,
        channels: int = 3,
        num_dim: int = 2,
        widths: Sequence[int] = (32, 64, 128),
        num_blocks: Sequence[int] = (1, 1, 2),
        patch_size: int = 1,
    ):
        check_sizes(dim_latent, channels, widths, num_blocks, patch_size)
        super().__init__(dim_latent, num_dim)
        self.patch_size = patch_size
        coarse_first = list(widths)[::-1]
        self.conv_in = convolution(num_dim, dim_latent, coarse_first[0], 3, padding=1)
        self.levels = levels(coarse_first, list(num_blocks)[::-1], num_dim=num_dim)
        self.ups = nn.ModuleList(Upsample(coarse, fine, num_dim=num_dim) for coarse, fine in pairwise(coarse_first))
        self.norm_out = group_norm(coarse_first[-1])
        self.conv_out = convolution(num_dim, coarse_first[-1], channels * patch_size**num_dim, 3, padding=1)

    def decode(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b x ..."]:
        x = self.levels[0](self.conv_in(latents))
        for up, level in zip(self.ups, self.levels[1:], strict=True):
            x = level(up(x))
        return depth_to_space(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


class KLAutoencoder(PretrainedMethods, nn.Module):
    """Both halves, to be trained together: `AutoencoderTrainer`, or a loop of your own around `AutoencoderObjective`.

    A `Transfusion` then takes `autoencoder.encoder` and `autoencoder.decoder`, with `channel_first_latent=True` and the
    same `dim_latent`, and saves them with itself. `save_pretrained` and `from_pretrained` are those of `Transfusion`.
    The arguments are those of `KLEncoder`.
    """

    def __init__(
        self,
        dim_latent: int,
        *,
        channels: int = 3,
        num_dim: int = 2,
        widths: Sequence[int] = (32, 64, 128),
        num_blocks: Sequence[int] = (1, 1, 2),
        patch_size: int = 1,
        posterior: PosteriorUse = "sample",
    ):
        super().__init__()
        sizes = dict(widths=list(widths), num_blocks=list(num_blocks), patch_size=patch_size)
        self.options: dict[str, Any] = dict(channels=channels, num_dim=num_dim, **sizes)
        self.encoder = KLEncoder(dim_latent, **self.options, posterior=posterior)
        self.decoder = KLDecoder(dim_latent, **self.options)

    def forward(self, data: Float[Tensor, "b x ..."], *, generator: torch.Generator | None = None) -> Reconstruction:
        """The data behind a sample of the posterior; in evaluation mode behind its mode."""
        posterior = self.encoder.posterior(data)
        latents = posterior.sample(generator) if self.training else posterior.mean
        return Reconstruction(self.decoder.decode(latents), posterior)

    @property
    def dim_latent(self) -> int:
        return self.encoder.dim_latent

    def latent_shape(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes of the latents of data with these axes: `modality_default_shape` of a `Transfusion`. Raises
        `ValueError` for another number of axes, and for sizes that are no multiples of the factor.
        """
        layout = self.encoder.layout
        if problem := layout.problem_of((layout.channels, *axes)):
            raise ValueError(problem)
        return layout.latent_shape(axes)

    def constructor_arguments(self) -> dict[str, Any]:
        return dict(dim_latent=self.dim_latent, **self.options, posterior=self.encoder.posterior_use)

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> None:
        """Writes weights, configuration and model card into a folder, as `Transfusion.save_pretrained` does."""
        card = ModelCard(title="KL autoencoder") if card is None else card
        card = replace(card, how_to_use=HOW_TO_USE) if card.how_to_use is None else card
        super().save_pretrained(folder, card=card)


HOW_TO_USE = """```python
from transfusion_pytorch import KLAutoencoder, Transfusion

autoencoder = KLAutoencoder.from_pretrained(...)  # this folder or repository
model = Transfusion(
    dim_latent=autoencoder.dim_latent,
    channel_first_latent=True,
    modality_encoder=autoencoder.encoder,
    modality_decoder=autoencoder.decoder,
    ...,
)
```"""


def check_sizes(
    dim_latent: int, channels: int, widths: Sequence[int], num_blocks: Sequence[int], patch_size: int
) -> None:
    """Raises `ValueError` unless an autoencoder can be built so."""
    if not widths or len(widths) != len(num_blocks):
        raise ValueError(
            f"widths and num_blocks have an entry for each resolution, got {list(widths)} and {list(num_blocks)}"
        )
    if min(dim_latent, channels, patch_size, *widths) < 1 or min(num_blocks) < 0:
        raise ValueError(
            "dim_latent, channels, widths and patch_size are at least 1 and num_blocks at least 0, got "
            f"{dim_latent}, {channels}, {list(widths)}, {patch_size} and {list(num_blocks)}"
        )
