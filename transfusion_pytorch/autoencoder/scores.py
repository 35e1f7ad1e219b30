"""How good reconstructions are, and what their latents cost.

b instances, x channels of the data, a one axis of it. Data are in [-1, 1].
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.evaluating import evaluating

SSIM_SIDE, SSIM_SIGMA, SSIM_CONSTANTS = 11, 1.5, (0.01**2, 0.03**2)  # of Wang et al.


class Scores(NamedTuple):
    """The scores of an autoencoder on held-out data.

    - `psnr`: `-10 log10` of the mean squared error over all numbers of all data in [0, 1], in dB, behind the mode of
      the posterior
    - `psnr_of_samples`: the same behind a sample of it
    - `ssim`: mean structural similarity, behind the mode
    - `nats`: divergence of the posterior, mean over the instances
    - `bits`: the same in bits
    - `bits_per_latent_number`: shared out among the numbers of a latent
    """

    psnr: float
    psnr_of_samples: float
    ssim: float
    nats: float
    bits: float
    bits_per_latent_number: float


@torch.no_grad()
def score(
    model: KLAutoencoder, batches: Iterable[Float[Tensor, "_b x ..."]], *, generator: torch.Generator | None = None
) -> Scores:
    """Scores reconstructions, clipped to the range of the data. Posteriors are sampled from the generator.

    Raises `ValueError` where there are no batches.
    """
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with evaluating(model):
        for data in batches:
            posterior = model.encoder.posterior(data)
            made = model.decoder.decode(posterior.mean).float().clamp(-1, 1)
            sampled = model.decoder.decode(posterior.sample(generator)).float().clamp(-1, 1)
            errors = [(each - data).square().sum() / 4 for each in (made, sampled)]  # in [0, 1], half the range
            sums += torch.stack([*errors, ssim(made, data).sum(), posterior.divergence().sum()]).cpu()
            counts += torch.tensor([data.numel(), len(data), posterior.mean.numel()])
    numbers, instances, latent_numbers = counts.tolist()
    if not instances:
        raise ValueError("there is nothing to score: the data have no batch")
    error, error_of_samples, similarity, nats = sums.tolist()
    return Scores(
        psnr=psnr(error / numbers),
        psnr_of_samples=psnr(error_of_samples / numbers),
        ssim=similarity / instances,
        nats=nats / instances,
        bits=nats / instances / math.log(2),
        bits_per_latent_number=nats / latent_numbers / math.log(2),
    )


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB, of an error in [0, 1]."""
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)


def ssim(one: Float[Tensor, "b x ..."], other: Float[Tensor, "b x ..."]) -> Float[Tensor, " b"]:
    """Structural similarity (Wang et al., 2004) of data in [-1, 1], mean over channels and windows: 1 for equal ones.

    Windows are Gaussian, 11 positions wide along every axis and inside of the data; narrower where those have less.
    """
    one, other = ((each.double() + 1) / 2 for each in (one, other))
    mean_1, mean_2 = blurred(one), blurred(other)
    variance_1, variance_2 = blurred(one.square()) - mean_1.square(), blurred(other.square()) - mean_2.square()
    covariance = blurred(one * other) - mean_1 * mean_2
    c1, c2 = SSIM_CONSTANTS
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1.square() + mean_2.square() + c1)
    structure = (2 * covariance + c2) / (variance_1 + variance_2 + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def blurred(data: Float[Tensor, "b x ..."]) -> Float[Tensor, "b x ..."]:
    """Means under a Gaussian window, axis by axis: products with a matrix that has the window in each column."""
    for axis in range(2, data.ndim):
        windows = gaussian_windows(data.shape[axis]).to(data)
        data = (data.movedim(axis, -1) @ windows).movedim(-1, axis)
    return data


def gaussian_windows(length: int) -> Float[Tensor, "positions windows"]:
    """Every place of the window along an axis of this length; each column sums to 1."""
    side = min(SSIM_SIDE, length)
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    window, places = weights / weights.sum(), length - side + 1
    return torch.stack([F.pad(window, (place, places - 1 - place)) for place in range(places)], dim=1)
