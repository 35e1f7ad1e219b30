"""How many tokens samples have, found as cheaply as their dataset allows, and remembered."""

from typing import Any

from torch import Tensor

from transfusion_pytorch.data.loading import SampleError, SkipSample, as_sample, file_of, load_sample
from transfusion_pytorch.data.mixture import Mixture
from transfusion_pytorch.data.order import SampleReference, generator_of, generators_kept, sample_seed
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.samples import Condition, Latents, WithCleanCopy


class Lengths:
    """The tokens of samples, markers included. The first of these that a dataset offers is used:

    1. `outline(index, generator)`: the sample with its modalities on the `meta` device, measured by the packer. The
       generator is that of `sample`, so an outline makes the same choices
    2. `num_tokens(index)`: the number itself
    3. the sample, loaded and measured by the packer

    Numbers are remembered by index (unless loaded samples may differ, because of `sample(index, generator)`), and those
    of outlines by their shapes. Raises `ValueError` for a source that cannot be measured without a packer.
    """

    def __init__(self, mixture: Mixture, packer: Packer | None, seed: int):
        self.mixture, self.packer, self.seed = mixture, packer, seed
        self._of_index: dict[tuple[str, int], int] = {}
        self._of_shapes: dict[Any, int] = {}
        for name, dataset in mixture.datasets.items():
            if packer is None and not hasattr(dataset, "num_tokens"):
                raise ValueError(
                    f"source {name!r} has no num_tokens(index), so its samples must be measured; give "
                    "packer=model.packer()"
                )

    def __call__(self, reference: SampleReference) -> int:
        """Raises `SkipSample` for a sample that is left out, `SampleError` where measuring it fails."""
        key = (reference.source, reference.index)
        if key in self._of_index:
            return self._of_index[key]
        dataset = self.mixture.datasets[reference.source]
        try:
            return self._measure(dataset, reference, key)
        except (SkipSample, SampleError):
            raise
        except Exception as error:
            problem = f"could not be measured: {type(error).__name__}: {error}"
            raise SampleError.of(reference, problem, file=file_of(dataset, reference.index)) from error

    def _measure(self, dataset: Any, reference: SampleReference, key: tuple[str, int]) -> int:
        if self.packer is not None and hasattr(dataset, "outline"):
            generator = generator_of(sample_seed(self.seed, reference.position))
            return self._of_outline(self.packer, dataset.outline(reference.index, generator))
        if hasattr(dataset, "num_tokens"):
            self._of_index[key] = length = int(dataset.num_tokens(reference.index))
            return length
        assert self.packer is not None
        with generators_kept():
            length = self.packer.num_tokens(load_sample(self.mixture.datasets, reference, self.seed))
        if not hasattr(dataset, "sample"):
            self._of_index[key] = length
        return length

    def _of_outline(self, packer: Packer, outline: Any) -> int:
        shapes = tuple(_shape_of(part) for part in as_sample(outline).parts)
        if shapes not in self._of_shapes:
            self._of_shapes[shapes] = packer.num_tokens(outline)
        return self._of_shapes[shapes]


def _shape_of(part: Any) -> Any:
    """What the number of tokens of a part depends on."""
    if isinstance(part, Tensor):
        return part.is_floating_point(), part.shape
    if isinstance(part, Condition):
        return _shape_of(part.part)
    if isinstance(part, WithCleanCopy):
        return "twice", _shape_of(part.part)
    if isinstance(part, Latents):
        return "latents", part.type, part.latents.shape
    return part[0], part[1].shape
