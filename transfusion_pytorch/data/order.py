"""The order of samples, and the random numbers of each, as functions of a seed and of where a sample stands.

Nothing here has a state: processes, data workers and resumed runs compute the same.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class SampleReference(NamedTuple):
    """Which sample, before it is loaded.

    - `position`: where it stands in the endless stream of samples; unique, so it seeds the sample's random numbers
    - `source`: the name of its dataset
    - `index`: its index there
    - `epoch`: how often the dataset was passed through before
    """

    position: int
    source: str
    index: int
    epoch: int


def seed_of(seed: int, *keys: int | str) -> int:
    """A seed (63 bits) of its own for every seed and keys: equal ones give equal seeds, others unrelated ones."""
    digest = blake2b(repr((int(seed), *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(seed: int, *keys: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, *keys))


def sample_seed(seed: int, position: int) -> int:
    """The seed of everything random about the sample at a position of the stream."""
    return seed_of(seed, "sample", position)


def shuffled(size: int, seed: int, *keys: int | str) -> Int[Tensor, " size"]:
    """The numbers below `size` in a random order. int32 where they fit: four bytes for each sample of a dataset."""
    dtype = torch.int32 if size < 2**31 else torch.int64
    return torch.randperm(size, generator=generator_of(seed, *keys), dtype=dtype)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the global generators of Python, numpy and torch's CPU back to where they were."""
    numpy = sys.modules.get("numpy")  # whoever draws from numpy has imported it
    python_state, torch_state = random.getstate(), torch.random.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.random.set_rng_state(torch_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def seed_generators(seed: int) -> None:
    """Seeds these global generators. Within `generators_kept`, augmentations that draw from them depend on the seed
    alone, whichever process runs them; keeping takes ten times as long as seeding, so it is done once for a batch.
    """
    random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
