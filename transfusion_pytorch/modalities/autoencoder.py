"""One half of a frozen autoencoder: which data it takes, and how it is run on instances of one shape.

g instances.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import lcm
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.modalities.adapters import is_out_of_memory

AT_ONCE = 64  # instances that go through together: memory does not grow with the batch beyond that


class DataLayout(NamedTuple):
    """Which data an encoder takes. Channels come first.

    - `channels`: of the data
    - `factors`: how many positions of the data make one of a latent, along each axis
    - `has_first`: along the first axis, one position comes before all others, and makes a latent by itself (video)
    - `chunk`: along the first axis, so many positions are encoded together, and what fills no chunk is dropped
    """

    channels: int
    factors: tuple[int, ...]
    has_first: bool = False
    chunk: int = 1

    def latent_shape(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes of the latents of data with these axes: `modality_default_shape` of a `Transfusion`."""
        sides = zip(axes, self.factors, self._firsts, strict=True)
        return tuple((side - first) // factor + first for side, factor, first in sides)

    def data_shape(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The inverse of `latent_shape`."""
        sides = zip(axes, self.factors, self._firsts, strict=True)
        return tuple((side - first) * factor + first for side, factor, first in sides)

    def problem_of(self, shape: Sequence[int]) -> str | None:
        """What is wrong with an instance of this shape, if anything."""
        channels, *axes = shape or (0,)
        multiples = (lcm(self.factors[0], self.chunk), *self.factors[1:])
        fits = channels == self.channels and len(axes) == len(self.factors) and min(axes) > 0
        if fits and not any((n - first) % m for n, first, m in zip(axes, self._firsts, multiples, strict=True)):
            return None
        sides = (f"{multiple} k{' + 1' * first}" for multiple, first in zip(multiples, self._firsts, strict=True))
        return (
            f"expected data of shape ({', '.join([str(self.channels), *sides])}) with whole numbers k, channels first, "
            f"got {tuple(shape)}; crop or pad the data"
        )

    @property
    def _firsts(self) -> tuple[int, ...]:
        return (int(self.has_first), *[0] * (len(self.factors) - 1))


def as_input(data: Float[Tensor, "..."], module: nn.Module) -> Float[Tensor, "..."]:
    """The data in the dtype and on the device of a module's parameters; as they are for a module without any."""
    parameter = next((each for each in module.parameters() if each.is_floating_point()), None)
    return data if parameter is None else data.to(parameter.device, parameter.dtype)


def run_half(
    half: nn.Module, data: Float[Tensor, "g ..."], *, batched: bool, name: str, places: Sequence[str] = ()
) -> Float[Tensor, "g ..."]:
    """What an encoder or decoder makes of instances of one shape, all at once or one by one if not `batched`.

    It may return a tensor, or a distribution, which is sampled (see `as_tensor`). Raises `TypeError` where it returns
    something else, and `ValueError` that names the first of `places` where it does not take such data. Its errors stay
    what they are without `places` (the shape is known to be right), and where memory runs out.
    """
    dtypes = (parameter.dtype for parameter in half.parameters() if parameter.is_floating_point())
    data = data.to(next(dtypes, data.dtype))
    parts = [_run(half, part, batched, name, places) for part in data.split(AT_ONCE)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _run(half: nn.Module, data: Tensor, batched: bool, name: str, places: Sequence[str]) -> Tensor:
    try:
        # an instance of its own, since a module may work in place
        made = [half(data.clone())] if batched else [half(instance.clone()) for instance in data]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if not places or is_out_of_memory(error):
            raise
        shape = tuple(data.shape[1:])
        raise ValueError(f"{places[0]}: {name} does not take data of shape {shape}: {error}") from error
    tensors = [as_tensor(each, name) for each in made]
    rows = tensors[0] if batched else torch.stack(tensors)
    if rows.ndim < 2 or len(rows) != len(data):
        raise TypeError(
            f"{name} must return a tensor with a row for each of {len(data)} instances, got shape {tuple(rows.shape)}"
        )
    return rows


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """What modules draw by themselves comes from this generator; torch's own are left as they were."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def as_tensor(made: Any, name: str) -> Tensor:
    """A tensor as it is; of the output of an autoencoder its latents, sampled where they are a distribution.

    Understood are `.latent_dist`, `.latents`, `.latent` and `.sample` (of diffusers' encoders and decoders), and
    anything with a `sample()` method, such as `torch.distributions`.
    """
    for attribute in ("latent_dist", "latents", "latent", "sample"):
        if isinstance(made, Tensor):
            break
        inner = getattr(made, attribute, None)
        made = made if inner is None else inner() if attribute == "sample" and callable(inner) else inner
    if isinstance(made, list) and made and all(isinstance(row, Tensor) for row in made):
        return torch.stack(made)
    if not isinstance(made, Tensor):
        raise TypeError(f"{name} must return a tensor or a distribution of them, got {type(made).__name__}")
    return made
