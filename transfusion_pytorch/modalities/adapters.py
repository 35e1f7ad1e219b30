"""The two ways between latents and tokens: linear projections, or a pair of modules such as the halves of a U-Net.

k latents of one type, flat over its spans; t their tokens; c channels, d model, m spans, g spans of one shape.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.modalities.unet import UNetDown, UNetUp
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import sinusoids

Shape = tuple[int, ...]


class ShapeGroup(NamedTuple):
    """The spans of one shape: which of the flat latents and tokens are theirs, and which rows of the condition."""

    shape: Shape
    spans: list[int]
    latents: list[slice]
    tokens: list[slice]


class LinearAdapter(nn.Module):
    """A linear layer each way; what comes out starts at zero, like everything that latents learn."""

    def __init__(self, dim_latent: int, dim: int):
        super().__init__()
        self.to_model = Linear(dim_latent, dim)
        self.to_latent = Linear(dim, dim_latent)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.to_latent.weight)
        nn.init.zeros_(self.to_latent.bias)

    def token_shape(self, shape: Shape) -> Shape:
        """Every latent is a token."""
        return shape

    def embed(
        self, latents: Float[Tensor, "k c"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"]
    ) -> tuple[Shaped[Tensor, "t d"], Any]:
        return self.to_model(latents), None

    def read(
        self, tokens: Shaped[Tensor, "t d"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"], memory: Any
    ) -> Shaped[Tensor, "k c"]:
        return self.to_latent(tokens)


class PairAdapter(nn.Module):
    """A module each way, called on batches of equal shape.

    `down` takes `(g, c, *axes)` to `(g, d, *token axes)` and `up` takes that back, or both with the channels last if
    not `channel_first`. `UNetDown` and `UNetUp` also get each span's condition, and are joined by their skips.
    """

    def __init__(self, down: nn.Module, up: nn.Module, *, dim_latent: int, dim: int, channel_first: bool):
        super().__init__()
        if isinstance(down, UNetDown) != isinstance(up, UNetUp):
            raise ValueError("UNetDown and UNetUp go together: what one remembers the other needs")
        for half in (down, up):
            if isinstance(half, UNetDown | UNetUp) and (half.dim_latent, half.dim) != (dim_latent, dim):
                raise ValueError(
                    f"{type(half).__name__} was built with dim_latent={half.dim_latent} and dim={half.dim}, and here "
                    f"latents have dim_latent={dim_latent} channels and the transformer has dim={dim}: build it with "
                    "these"
                )
        self.down, self.up = down, up
        self.dim_latent, self.dim = dim_latent, dim
        self.is_unet = isinstance(down, UNetDown)
        self.channel_first = channel_first or self.is_unet
        self._token_shapes: dict[Shape, Shape] = {}

    def token_shape(self, shape: Shape) -> Shape:
        """The axial shape after `down`, found by a dry run. Raises `ValueError` where `up` does not come back to
        `shape`.
        """
        if shape not in self._token_shapes:
            self._token_shapes[shape] = self._dry_run(shape)
        return self._token_shapes[shape]

    def embed(
        self, latents: Float[Tensor, "k c"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"]
    ) -> tuple[Shaped[Tensor, "t d"], Any]:
        pieces: dict[int, Tensor] = {}
        memory = []
        for group in self._groups(shapes):
            x, kept = self._down(self._batch(latents, group.latents, group.shape), _rows(condition, group.spans))
            memory.append(kept)
            pieces |= zip(group.spans, self._flat(x, self.dim), strict=True)
        return torch.cat([pieces[span] for span in range(len(shapes))]), memory

    def read(
        self, tokens: Shaped[Tensor, "t d"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"], memory: Any
    ) -> Shaped[Tensor, "k c"]:
        pieces: dict[int, Tensor] = {}
        for group, kept in zip(self._groups(shapes), memory, strict=True):
            x = self._batch(tokens, group.tokens, self.token_shape(group.shape))
            x = self._up(x, _rows(condition, group.spans), kept)
            pieces |= zip(group.spans, self._flat(x, self.dim_latent), strict=True)
        return torch.cat([pieces[span] for span in range(len(shapes))])

    def _batch(self, flat: Tensor, parts: list[slice], shape: Shape) -> Tensor:
        """Spans of one shape, as `down` and `up` want them."""
        return self._channels(torch.stack([flat[part].reshape(*shape, -1) for part in parts]))

    def _flat(self, x: Tensor, channels: int) -> Sequence[Tensor]:
        """The inverse: `(k, channels)` for every span."""
        return self._channels_last(x).reshape(len(x), -1, channels).unbind()

    def _down(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
        return self.down(x, condition) if self.is_unet else (self.down(x), None)

    def _up(self, x: Tensor, condition: Tensor, kept: Any) -> Tensor:
        return self.up(x, condition, kept) if self.is_unet else self.up(x)

    def _channels(self, x: Tensor) -> Tensor:
        return rearrange(x, "g ... c -> g c ...") if self.channel_first else x

    def _channels_last(self, x: Tensor) -> Tensor:
        return rearrange(x, "g c ... -> g ... c") if self.channel_first else x

    def _groups(self, shapes: Sequence[Shape]) -> list[ShapeGroup]:
        latents, tokens = _slices(map(prod, shapes)), _slices(prod(self.token_shape(shape)) for shape in shapes)
        order = sorted(range(len(shapes)), key=lambda span: shapes[span])
        groups = []
        for shape, spans in groupby(order, key=lambda span: shapes[span]):
            rows = list(spans)
            groups.append(ShapeGroup(shape, rows, [latents[i] for i in rows], [tokens[i] for i in rows]))
        return groups

    @torch.no_grad()
    def _dry_run(self, shape: Shape) -> Shape:
        parameter = next(self.parameters(), torch.empty(0))
        blank = parameter.new_zeros((1, *shape, self.dim_latent))
        condition = parameter.new_zeros((1, self.dim))
        modes = {module: module.training for module in self.modules()}
        self.eval()  # a dry run must leave no trace in running statistics
        try:
            x, kept = self._down(self._channels(blank), condition)
            token_shape = tuple(self._channels_last(x).shape[1:-1])
            back = self._channels_last(self._up(x, condition, kept))
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            message = f"the modules around the transformer do not take latents of shape {shape}: {error}"
            raise ValueError(message) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if self._channels_last(x).shape[-1] != self.dim or back.shape != blank.shape:
            before, between, after = (tuple(y.shape[1:]) for y in (blank, self._channels_last(x), back))
            raise ValueError(
                f"the modules around the transformer must lead from {self.dim_latent} to {self.dim} channels and back: "
                f"{before} became {between} and {after} (channels last)"
            )
        return token_shape


def is_out_of_memory(error: BaseException) -> bool:
    """On any device; for a CPU torch has no type of its own."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def _rows(condition: Tensor, spans: Sequence[int]) -> Tensor:
    """As views: a list for an index would be uploaded, for which a GPU is waited for."""
    return torch.stack([condition[span] for span in spans])


def _slices(sizes: Iterable[int]) -> list[slice]:
    slices, start = [], 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices


class AxialPositions(nn.Module):
    """A continuous embedding of coordinates: sines and cosines of every axis, mixed by a small network.

    It knows no largest size: any coordinate has its features, so any shape has its positions. The highest frequency is
    a quarter turn a step: at half a turn, `sin(pi k)` would be zero at every integer.
    """

    def __init__(self, dim: int, num_axes: int, *, num_frequencies: int = 16):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.layers = nn.Sequential(Linear(2 * num_frequencies * num_axes, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, coordinates: Float[Tensor, "n a"]) -> Shaped[Tensor, "n d"]:
        features = sinusoids(coordinates, count=self.num_frequencies, highest=torch.pi / 2, ratio=512.0)
        return self.layers(features.to(next(self.parameters()).dtype))
