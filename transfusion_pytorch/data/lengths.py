"""How many tokens samples have, found as cheaply as their dataset allows, and remembered."""

from typing import Any

from transfusion_pytorch.data.loading import SampleError, SkipSample, load_sample, name_of
from transfusion_pytorch.data.mixture import Mixture
from transfusion_pytorch.data.order import SampleReference, generators_kept
from transfusion_pytorch.sequence.packer import Packer


class Lengths:
    """The tokens of samples, markers included. The first of these that a dataset offers is used:

    1. `outline(index)`: the sample with its modalities on the `meta` device, measured by the packer
    2. `num_tokens(index)`: the number itself
    3. the sample, loaded and measured by the packer

    A length is remembered by its index; except where a loaded sample may differ the next time, because its dataset has
    `sample(index, generator)`. Raises `ValueError` for a source that cannot be measured without a packer.
    """

    def __init__(self, mixture: Mixture, packer: Packer | None, seed: int):
        self.mixture, self.packer, self.seed = mixture, packer, seed
        self._known: dict[tuple[str, int], int | str] = {}
        for name, dataset in mixture.datasets.items():
            if packer is None and not hasattr(dataset, "num_tokens"):
                raise ValueError(
                    f"source {name!r} has no num_tokens(index), so its samples must be measured; give "
                    "packer=model.packer()"
                )

    def __call__(self, reference: SampleReference) -> int:
        """Raises `SkipSample` for a sample that is left out, `SampleError` where measuring it fails."""
        key = (reference.source, reference.index)
        if key not in self._known:
            dataset = self.mixture.datasets[reference.source]
            try:
                length: int | str = self._measure(dataset, reference)
            except SkipSample as skipped:
                length = str(skipped)
            except SampleError:
                raise
            except Exception as error:
                where = f"source {reference.source!r}, {name_of(dataset, reference.index)}"
                raise SampleError(f"{where} could not be measured: {type(error).__name__}: {error}") from error
            if not self._is_fixed(dataset):
                return _unless_skipped(length)
            self._known[key] = length
        return _unless_skipped(self._known[key])

    def _measure(self, dataset: Any, reference: SampleReference) -> int:
        if self.packer is not None and hasattr(dataset, "outline"):
            return self.packer.num_tokens(dataset.outline(reference.index))
        if hasattr(dataset, "num_tokens"):
            return int(dataset.num_tokens(reference.index))
        assert self.packer is not None
        with generators_kept():
            return self.packer.num_tokens(load_sample(self.mixture.datasets, reference, self.seed))

    def _is_fixed(self, dataset: Any) -> bool:
        """Whether the length of a sample is always the same."""
        has_outline = self.packer is not None and hasattr(dataset, "outline")
        return has_outline or hasattr(dataset, "num_tokens") or not hasattr(dataset, "sample")


def _unless_skipped(length: int | str) -> int:
    if isinstance(length, str):
        raise SkipSample(length)
    return length
