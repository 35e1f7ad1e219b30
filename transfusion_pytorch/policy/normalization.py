"""Statistics of vectors that travel with a model: actions and states have units, networks want numbers around 1.

d channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.precision import precise

LEAST_STD = 1e-4  # of a channel, in its own unit: one that hardly moves is not blown up


class Normalization(nn.Module):
    """`(x - mean) / std` for each channel, with buffers that are saved with the model. Before `fit` it changes nothing.

    The buffers stay in single precision at least, also in a model in bfloat16: a mean of 300 pixels would be rounded by
    up to 1.

    >>> normalization = Normalization(2)
    >>> normalization.fit(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    >>> normalization.normalize(torch.tensor([2.0, 30.0]))
    tensor([1., 1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        dtype = precise(torch.get_default_dtype())
        self.register_buffer("mean", torch.zeros(dim, dtype=dtype))
        self.register_buffer("std", torch.ones(dim, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `bfloat16` and their like call for each tensor."""

        def kept_precise(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            dtype = precise(made.dtype)
            return made if made.dtype == dtype else tensor.to(made.device, dtype)

        return super()._apply(kept_precise, recurse)

    @property
    def is_fitted(self) -> bool:
        return bool(self.mean.any()) or not bool((self.std == 1).all())

    @torch.no_grad()
    def fit(self, values: Shaped[Tensor, "... d"], *, name: str = "values") -> None:
        """Takes the statistics of these values. Raises `ValueError` that begins with the `name` if there are none, if
        one is not finite, or if there are more or fewer channels.
        """
        if values.ndim < 1 or values.shape[-1] != len(self.mean):
            raise ValueError(f"{name}: expected {len(self.mean)} channels, got the shape {tuple(values.shape)}")
        flat = values.reshape(-1, values.shape[-1]).double()
        if not len(flat):
            raise ValueError(f"{name}: there are no values to take statistics of")
        if not flat.isfinite().all():
            raise ValueError(f"{name}: values to take statistics of contain NaN or infinity")
        self.mean.copy_(flat.mean(dim=0))
        self.std.copy_(flat.std(dim=0, correction=0).clamp(min=LEAST_STD))

    def normalize(self, values: Shaped[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """In the precision of the statistics, or of the values if that is higher."""
        return (values - self.mean) / self.std

    def denormalize(self, values: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The inverse of `normalize`."""
        return values * self.std + self.mean
