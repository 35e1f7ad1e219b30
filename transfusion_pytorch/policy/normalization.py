"""Statistics of vectors that travel with a model: actions and states have units, networks want numbers around 1.

d channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

LEAST_STD = 1e-4  # of a channel, in its own unit: one that hardly moves is not blown up


class Normalization(nn.Module):
    """`(x - mean) / std` for each channel, with buffers that are saved with the model. Before `fit` it changes nothing.

    >>> normalization = Normalization(2)
    >>> normalization.fit(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    >>> normalization.normalize(torch.tensor([2.0, 30.0]))
    tensor([1., 1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "... d"]) -> None:
        """Takes the statistics of these values. Raises `ValueError` if there are none, or if one is not finite."""
        flat = values.reshape(-1, values.shape[-1]).double()
        if not len(flat):
            raise ValueError("there are no values to take statistics of")
        if not flat.isfinite().all():
            raise ValueError("values to take statistics of contain NaN or infinity")
        self.mean.copy_(flat.mean(dim=0))
        self.std.copy_(flat.std(dim=0, correction=0).clamp(min=LEAST_STD))

    def normalize(self, values: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return (values.to(self.mean.dtype) - self.mean) / self.std

    def denormalize(self, values: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The inverse of `normalize`."""
        return values * self.std + self.mean
