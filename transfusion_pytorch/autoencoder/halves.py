"""The halves of an autoencoder, as `modality_encoder` and `modality_decoder` of a `Transfusion`.

b instances, c channels of a latent. Channels come first.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.modalities.autoencoder import DataLayout, as_input
from transfusion_pytorch.modalities.statistics import LatentStatistics, RunningStatistics


class LatentHalf(nn.Module):
    """What an encoder and a decoder have in common: the layout and the scale of the latents between them.

    - `dim_latent`, `num_dim`: channels and axes of a latent. `Transfusion` compares them with its own arguments
    - `channel_first_latent`: a latent is `(c, *axes)`
    - `statistics`: mean and standard deviation of the autoencoder's latents. Outside of the halves latents are
      normalised, `(z - mean) / std`; without statistics they are as the autoencoder makes them
    """

    channel_first_latent = True

    def __init__(self, dim_latent: int, num_dim: int):
        super().__init__()
        self.dim_latent, self.num_dim = dim_latent, num_dim
        self.statistics = LatentStatistics(dim_latent)

    def normalize(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """From the autoencoder's scale to that outside."""
        return self.statistics.normalize(latents.movedim(1, -1)).movedim(-1, 1)

    def denormalize(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """The inverse of `normalize`."""
        return self.statistics.denormalize(latents.movedim(1, -1)).movedim(-1, 1)


class EncoderHalf(LatentHalf):
    """Data to normalised latents, in the dtype of the data, whatever that of the weights. Subclasses say what `encode`
    does.

    `layout` is that of the data, by which a model that was saved knows how to read image files.
    """

    def __init__(self, dim_latent: int, layout: DataLayout):
        super().__init__(dim_latent, len(layout.factors))
        self.layout = layout

    def encode(self, data: Float[Tensor, "b ..."]) -> Float[Tensor, "b c ..."]:
        """Latents in the autoencoder's scale."""
        raise NotImplementedError

    def check(self, data: Float[Tensor, "b ..."]) -> None:
        """Raises `ValueError` for data of another layout."""
        if problem := self.layout.problem_of(data.shape[1:]):
            raise ValueError(problem)

    def forward(self, data: Float[Tensor, "b ..."]) -> Float[Tensor, "b c ..."]:
        self.check(data)
        return self.normalize(self.encode(as_input(data, self)).to(data.dtype))


class DecoderHalf(LatentHalf):
    """Normalised latents to data, in the dtype of the latents. Subclasses say what `decode` does."""

    def decode(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b ..."]:
        """Takes latents in the autoencoder's scale."""
        raise NotImplementedError

    def forward(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b ..."]:
        return self.decode(as_input(self.denormalize(latents), self)).to(latents.dtype)


class AutoencoderHalves(NamedTuple):
    """`encoder, decoder = halves`: what `modality_encoder` and `modality_decoder` take."""

    encoder: EncoderHalf
    decoder: DecoderHalf


@torch.no_grad()
def measure_scale(encoder: EncoderHalf, decoder: DecoderHalf, batches: Iterable[Float[Tensor, "_b ..."]]) -> None:
    """Measures mean and standard deviation of each channel of the latents of all `batches`, and keeps them in both
    halves: from then on latents outside have mean 0 and standard deviation 1.

    Raises `TypeError` for one tensor in place of batches, and `ValueError` where there are no batches, for data of
    another layout, and for latents that are not finite.
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"expected batches, got one tensor of shape {tuple(batches.shape)}; give a list: [tensor]")
    running, device = RunningStatistics(encoder.dim_latent), torch.device("cpu")
    for batch in batches:
        encoder.check(batch)
        latents = encoder.encode(as_input(batch, encoder))
        running.add(latents.movedim(1, -1).flatten(0, -2))
        device = latents.device
    if not running.count:
        raise ValueError("there are no latents to measure: the data have no batch")
    for half in (encoder, decoder):
        half.statistics.set(running.mean.to(device, torch.float32), running.std.to(device, torch.float32))
