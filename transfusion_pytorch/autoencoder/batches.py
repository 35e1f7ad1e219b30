"""Batches of plain data for an autoencoder: stacked, and checked before anything is computed.

b instances, x channels of the data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.data.loader import StepLoader
from transfusion_pytorch.data.loading import SampleError, Skipped, default_name
from transfusion_pytorch.data.mixture import Mixture, as_mixture, is_stream
from transfusion_pytorch.data.order import SampleReference
from transfusion_pytorch.data.plan import DataPlan
from transfusion_pytorch.modalities.autoencoder import DataLayout
from transfusion_pytorch.sequence.samples import Sample


class Stacked(NamedTuple):
    """A batch, None if no sample is left, and what was left out."""

    data: Float[Tensor, "b x ..."] | None
    skipped: list[Skipped]


@dataclass(frozen=True)
class Stack:
    """A collate function of a `StepLoader`: samples of one floating point tensor each, all of one shape.

    A sample that is something else is a `SampleError` that names it, or is left out if `skips_bad`.
    """

    layout: DataLayout
    skips_bad: bool = False

    def __call__(self, samples: Sequence[Sample], references: Sequence[SampleReference]) -> Stacked:
        kept: list[Tensor] = []
        skipped: list[Skipped] = []
        for sample, reference in zip(samples, references, strict=True):
            problem = self._problem_of(sample.parts, kept)
            if problem is None:
                kept.append(sample.parts[0])
                continue
            is_default = sample.name == default_name(reference.source, reference.index)
            error = SampleError.of(reference, problem, file=None if is_default else sample.name)
            if not self.skips_bad:
                raise error
            skipped.append(Skipped.because(reference, error))
        return Stacked(torch.stack(kept) if kept else None, skipped)

    def _problem_of(self, parts: Sequence[Any], kept: Sequence[Tensor]) -> str | None:
        if len(parts) != 1 or not isinstance(parts[0], Tensor) or not parts[0].is_floating_point():
            kinds = ", ".join(type(part).__name__ for part in parts)
            return f"expected one floating point tensor, got {len(parts)} parts ({kinds})"
        (data,) = parts
        if problem := self.layout.problem_of(data.shape):
            return problem
        if kept and kept[0].shape != data.shape:
            return f"expected shape {tuple(kept[0].shape)} as the others of its batch, got {tuple(data.shape)}"
        return None if data.isfinite().all() else "it has NaN or infinity"


def training_steps(data: Any, stack: Stack, *, batch_size: int, seed: int, **loading: Any) -> StepLoader:
    """Endless steps of shuffled samples, each a `Stacked`. `loading` are options of `StepLoader`."""
    plan = DataPlan(checked(data), seed=seed, batch_size=batch_size)
    return StepLoader(plan, stack, skips_errors=stack.skips_bad, **loading)


def steps_in(data: Any, *, epochs: int, batch_size: int) -> int:
    """How many steps it takes to pass through all data so often."""
    return DataPlan(checked(data), batch_size=batch_size, epochs=epochs).num_steps or 0


def in_order(data: Any, stack: Stack, *, batch_size: int, device: torch.device) -> Iterator[Float[Tensor, "b x ..."]]:
    """All data once, in their order, on a device."""
    mixture = checked(data)
    still = Mixture(mixture.datasets, weights=mixture.weights, shuffle=False)
    for step in StepLoader(DataPlan(still, batch_size=batch_size, epochs=1), stack, skips_errors=stack.skips_bad):
        yield from (each.data.to(device) for each in step.batches if each is not None and each.data is not None)


def checked(data: Any) -> Mixture:
    """Raises `TypeError` for data that can only be iterated over."""
    if is_stream(data):
        raise TypeError(f"data are a tensor, a list or a dataset with a length, got {type(data).__name__}")
    return as_mixture(data)
