"""What an autoencoder is trained on: reconstruction, divergence of the posterior, and a perceptual term.

b instances, x channels of the data, f channels of a feature map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.network.precision import precise

FEATURE_EPS = 1e-8  # below the length of any feature vector that matters


class AutoencoderLosses(NamedTuple):
    """The losses of a batch: `total` is `reconstruction + kl_weight * kl + perceptual_weight * perceptual`.

    - `reconstruction`: mean squared error of a number of the data
    - `kl`: divergence of the posterior from the standard normal, in nats for each number of the data
    - `perceptual`: see `perceptual_distance`; 0 without a feature network
    """

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    perceptual: Float[Tensor, ""]


class AutoencoderObjective(nn.Module):
    """The loss of a `KLAutoencoder`.

    - `kl_weight`: with a Gaussian decoder of variance `v` the evidence lower bound is reached at `2 v`; smaller values
      give better reconstructions and more nats
    - `features`: a network whose feature maps, of the data and of the reconstruction, are compared: it takes what the
      autoencoder takes, and gives a tensor `(b, f, *axes)` or several. It is frozen, and not saved
    - `perceptual_weight`: of that term

    Raises `ValueError` for negative weights.
    """

    def __init__(
        self, *, kl_weight: float = 1e-4, features: nn.Module | None = None, perceptual_weight: float | None = None
    ):
        super().__init__()
        if features is None and perceptual_weight is not None:
            raise ValueError("a perceptual_weight needs a network to compare features: give features=...")
        self.kl_weight, self.features = kl_weight, features
        self.perceptual_weight = 1.0 if perceptual_weight is None else perceptual_weight
        if min(self.kl_weight, self.perceptual_weight) < 0:
            raise ValueError(f"weights are not negative, got {self.kl_weight} and {self.perceptual_weight}")
        if features is not None:
            features.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "AutoencoderObjective":
        """The feature network stays in evaluation mode."""
        super().train(mode)
        if self.features is not None:
            self.features.eval()
        return self

    def forward(
        self, model: KLAutoencoder, data: Float[Tensor, "b x ..."], *, generator: torch.Generator | None = None
    ) -> AutoencoderLosses:
        """The losses of a batch. The posterior is sampled from the generator."""
        made = model(data, generator=generator)
        accumulated = precise(made.data.dtype)  # under autocast the decoder gives less than single precision
        reconstruction = F.mse_loss(made.data.to(accumulated), data.to(accumulated))
        kl = made.posterior.divergence().sum() / data.numel()
        perceptual = reconstruction.new_zeros(())
        if self.features is not None:
            with torch.no_grad():
                expected = feature_maps(self.features, data)
            perceptual = perceptual_distance(feature_maps(self.features, made.data.to(data.dtype)), expected)
        total = reconstruction + self.kl_weight * kl + self.perceptual_weight * perceptual
        return AutoencoderLosses(total, reconstruction, kl, perceptual)


def feature_maps(network: nn.Module, data: Float[Tensor, "b x ..."]) -> list[Tensor]:
    """Raises `TypeError` for a network that gives something else than tensors `(b, f, ...)`."""
    made = network(data)
    maps = list(made) if isinstance(made, Sequence) else [made]
    if not maps or not all(isinstance(each, Tensor) and each.ndim > 1 for each in maps):
        kinds = ", ".join(type(each).__name__ for each in maps) or "nothing"
        raise TypeError(f"a feature network gives a tensor (b, f, ...) or a list of them, got {kinds}")
    return maps


def perceptual_distance(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The squared distance of feature vectors of unit length, mean over positions, instances and maps. This is LPIPS
    (Zhang et al., arXiv 1801.03924, section 3) without its learned weights: from 0 to 4.
    """
    distances = [
        (unit_features(made) - unit_features(target)).square().sum(dim=1).mean()
        for made, target in zip(maps, expected, strict=True)
    ]
    return torch.stack(distances).mean()


def unit_features(maps: Float[Tensor, "b f ..."]) -> Float[Tensor, "b f ..."]:
    return F.normalize(maps.to(precise(maps.dtype)), dim=1, eps=FEATURE_EPS)
