"""Observations: what they must look like, and how they become numbers around 1.

b samples, o observation steps, d channels of a vector; c channels, h and w sides of an image.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf

import torch
from torch import Tensor, nn

from transfusion_pytorch.policy.normalization import Normalization

Observation = Mapping[str, Tensor]
IMAGE_RANGE = (-0.5, 1.5)  # of floats: resizing overshoots [0, 1] by less, and 0 to 255 or -1 to 1 do not fit
LEAST_SIDE = 16  # of an image, of which the encoder makes a token for each 16 x 16 pixels


class ObservationSpec(nn.Module):
    """The observations of a policy, by name: vectors `(d,)`, or images `(c, h, w)` of bytes or of floats in [0, 1].

    Vectors are normalised by statistics of the data, images to [-1, 1].
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, steps: int):
        super().__init__()
        if not shapes:
            raise ValueError("observations is empty: a policy needs at least one, such as dict(state=(5,))")
        if steps < 1:
            raise ValueError(f"observation_steps must be positive, got {steps}")
        for name, shape in shapes.items():
            if len(shape) not in (1, 3) or min(shape) < 1:
                raise ValueError(
                    f"observation {name!r}: expected the shape of a vector, (d,), or of an image, (c, h, w), got "
                    f"{tuple(shape)}"
                )
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.steps = steps
        # by number, because names of modules have no dots, and names of observations may
        self.statistics = nn.ModuleList(
            Normalization(shape[0]) if len(shape) == 1 else nn.Identity() for shape in self.shapes.values()
        )

    def fit(self, observation: Observation) -> None:
        """Takes the statistics of all vectors, `(..., d)` each; images may be left out. Raises `ValueError` or
        `TypeError` that names the observation.
        """
        for name, statistics in zip(self.shapes, self.statistics, strict=True):
            if isinstance(statistics, Normalization):
                statistics.fit(named(observation, name), name=f"observation {name!r}")

    def check_values(self, observation: Observation, *, waits: bool) -> None:
        """Raises `ValueError` that names the observation for NaN and infinity, and for images of floats that are not in
        [0, 1]. Looks at what is on other devices than the CPU only if it `waits` for them.
        """
        for name, shape in self.shapes.items():
            value = observation[name]
            if not value.is_floating_point() or not value.numel() or not (waits or value.device.type == "cpu"):
                continue
            low, high = map(float, value.detach().aminmax())
            if not (-inf < low and high < inf):
                raise ValueError(f"observation {name!r} contains NaN or infinity")
            if len(shape) == 3 and not (IMAGE_RANGE[0] <= low and high <= IMAGE_RANGE[1]):
                raise ValueError(
                    f"observation {name!r} is an image of floats in [0, 1], got {low:g} to {high:g}; divide it by 255, "
                    "or give bytes"
                )

    def batch_size(self, observation: Observation) -> int:
        """Checks an observation. Raises `ValueError` or `TypeError` that names what does not fit."""
        sizes = {}
        for name, shape in self.shapes.items():
            value = named(observation, name)
            wanted = (self.steps, *shape)
            if value.ndim != len(wanted) + 1 or tuple(value.shape[1:]) != wanted:
                raise ValueError(
                    f"observation {name!r}: expected the shape (b, {', '.join(map(str, wanted))}), a batch of "
                    f"{self.steps} observation steps, got {tuple(value.shape)}"
                )
            if len(shape) == 3 and value.dtype != torch.uint8 and not value.is_floating_point():
                raise TypeError(f"observation {name!r} is an image of bytes or floats in [0, 1], got {value.dtype}")
            sizes[name] = len(value)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"observations have different batch sizes: {sizes}")
        return next(iter(sizes.values()))

    def normalized(self, observation: Observation, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those that the policy has, as numbers around 1 on its device."""
        values = {}
        for name, statistics in zip(self.shapes, self.statistics, strict=True):
            value = observation[name].to(device)
            if isinstance(statistics, Normalization):
                values[name] = statistics.normalize(value).to(dtype)
            else:
                value = value.to(dtype) / 255 if value.dtype == torch.uint8 else value.to(dtype)
                values[name] = value * 2 - 1
        return values


def named(observation: Observation, name: str) -> Tensor:
    """Raises `ValueError` for an observation that is missing, and `TypeError` for what is no tensor."""
    if name not in observation:
        raise ValueError(f"observation {name!r} is missing, there are {', '.join(observation) or 'none'}")
    value = observation[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"observation {name!r} must be a tensor, got {type(value).__name__}")
    return value


class ObservationEncoder(nn.Module):
    """Observations as tokens: one for a vector, one for each 16 x 16 pixels of an image.

    The tokens of the first observation step come first; in each the observations have the order of their names in the
    `shapes`.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dim: int):
        super().__init__()
        for name, shape in shapes.items():
            if len(shape) == 3 and (min(shape[1:]) < LEAST_SIDE or dim < 4):
                raise ValueError(
                    f"observation {name!r}: images need sides of at least {LEAST_SIDE} pixels and dim of at least 4, "
                    f"got sides {tuple(shape[1:])} and dim {dim}"
                )
        self.encoders = nn.ModuleList(
            VectorEncoder(shape[0], dim) if len(shape) == 1 else ImageEncoder(shape[0], dim)
            for shape in shapes.values()
        )
        self.names = tuple(shapes)

    def forward(self, values: Mapping[str, Tensor]) -> Tensor:
        """`(b, o, ...)` each to `(b, n, dim)`."""
        tokens = []
        for name, encode in zip(self.names, self.encoders, strict=True):
            value = values[name]
            encoded = encode(value.flatten(0, 1))
            tokens.append(encoded.view(*value.shape[:2], *encoded.shape[1:]))
        return torch.cat(tokens, dim=2).flatten(1, 2)


class VectorEncoder(nn.Module):
    """`(n, d)` to one token `(n, 1, dim)`."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim_in, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, None]


class ImageEncoder(nn.Module):
    """`(n, c, h, w)` to tokens `(n, h/16 * w/16, dim)`, both rounded down; where they are is learned from the padding
    of the convolutions and from the rotary positions.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        widths = (channels, dim // 4, dim // 2, dim // 2, dim)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            conv = nn.Conv2d(width_in, width_out, 4, stride=2, padding=1)
            layers += [conv, nn.GroupNorm(1, width_out), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).transpose(1, 2)
