"""Several datasets as one endless stream of samples, mixed by weights, in closed form."""

from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction
from math import isfinite, lcm
from typing import Any

from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.data.order import SampleReference, shuffled


class Mixture:
    """Datasets with names, and how often each is drawn from.

    `datasets` have `__len__` and `__getitem__(index)`; see `docs/data.md` for what else they may have. `weights` are
    relative; by default each dataset weighs as much as it has samples. Weights are met exactly: of the first `n`
    samples, a source has its share of `n` to within one sample for each source.

    Every source has epochs of its own: it is passed through completely, shuffled anew (unless `shuffle` is False), and
    passed through again. Raises `ValueError` for a dataset without samples, and for weights that are not positive
    numbers or name other sources.
    """

    def __init__(
        self, datasets: Mapping[str, Any], *, weights: Mapping[str, float] | None = None, shuffle: bool = True
    ):
        if not datasets:
            raise ValueError("a mixture has at least one dataset, got none")
        self.datasets = dict(datasets)
        self.sizes = {name: _size_of(name, dataset) for name, dataset in self.datasets.items()}
        self.weights = _weights(self.sizes, weights)
        self.shuffle = shuffle
        self._orders: dict[str, dict[tuple[int, int], Int[Tensor, " n"]]] = {name: {} for name in self.datasets}

    def reference(self, position: int, *, seed: int) -> SampleReference:
        """The sample at a position of the endless stream."""
        rest, remaining = position, sum(self.weights.values())
        for name, weight in self.weights.items():
            before, after = _share(rest, weight, remaining), _share(rest + 1, weight, remaining)
            if after > before:
                epoch, place = divmod(before, self.sizes[name])
                return SampleReference(position, name, self._index(name, seed, epoch, place), epoch)
            rest, remaining = rest - before, remaining - weight
        raise AssertionError("the last source takes what the others leave")

    def counts(self, position: int) -> dict[str, int]:
        """How many of the first `position` samples each source has.

        The first source takes its share, rounded; the next takes its share of what is left, and so on.
        """
        counts, rest, remaining = {}, position, sum(self.weights.values())
        for name, weight in self.weights.items():
            counts[name] = _share(rest, weight, remaining)
            rest, remaining = rest - counts[name], remaining - weight
        return counts

    def length(self, epochs: int) -> int:
        """How many samples it takes until every source has been passed through so often."""
        return max(self._length_for(name, epochs * size) for name, size in self.sizes.items())

    def _length_for(self, name: str, count: int) -> int:
        enough = (count + len(self.sizes)) * sum(self.weights.values()) // self.weights[name] + len(self.sizes)
        return bisect_left(range(enough), count, key=lambda position: self.counts(position)[name])

    def _index(self, name: str, seed: int, epoch: int, place: int) -> int:
        if not self.shuffle:
            return place
        orders = self._orders[name]
        if (seed, epoch) not in orders:
            for old in list(orders)[:-1]:  # a window may reach into the next epoch, so two are kept
                del orders[old]
            orders[seed, epoch] = shuffled(self.sizes[name], seed, "order", name, epoch)
        return int(orders[seed, epoch][place])


def as_mixture(data: Any) -> Mixture:
    """A lone dataset is a mixture of one, named "data"."""
    return data if isinstance(data, Mixture) else Mixture({"data": data})


def is_stream(data: Any) -> bool:
    """Whether data have no index: they can only be iterated over."""
    return not isinstance(data, Mixture) and hasattr(data, "__iter__") and not hasattr(data, "__len__")


def _share(count: int, weight: int, total: int) -> int:
    """The part of `count` samples that a weight has of a total, rounded. Exact: whole numbers of any size."""
    return (2 * count * weight + total) // (2 * total) if weight < total else count


def _size_of(name: str, dataset: Any) -> int:
    try:
        size = len(dataset)
    except TypeError as error:
        raise TypeError(
            f"source {name!r}: a {type(dataset).__name__} has no length; a dataset that can only be iterated over goes "
            "into a StreamLoader"
        ) from error
    if not size:
        raise ValueError(f"source {name!r} has no samples")
    return size


def _weights(sizes: Mapping[str, int], given: Mapping[str, float] | None) -> dict[str, int]:
    """As whole numbers, so that shares are exact."""
    if given is None:
        return dict(sizes)
    if set(given) != set(sizes):
        raise ValueError(f"weights are for the sources {sorted(sizes)}, got {sorted(given)}")
    for name, weight in given.items():
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of source {name!r} is a positive number, got {weight}; leave a source out")
    fractions = {name: Fraction(given[name]).limit_denominator(1_000_000) for name in sizes}
    for name, fraction in fractions.items():
        if not fraction:
            raise ValueError(f"the weight of source {name!r} is too small: {given[name]}; use larger numbers for all")
    denominator = lcm(*(fraction.denominator for fraction in fractions.values()))
    return {name: int(fraction * denominator) for name, fraction in fractions.items()}
