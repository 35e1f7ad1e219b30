"""Samples of a training step as a `Batch` whose random numbers are settled, made in data workers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from transfusion_pytorch.data.loading import SampleError, Skipped, default_name
from transfusion_pytorch.data.order import SampleReference, seed_of
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.samples import Sample

GOLDEN = 0.6180339887498949  # of all sequences, the multiples of this fill an interval most evenly
SAMPLES_APART = 1_000_003  # between the places of the modalities of one sample


class Packed(NamedTuple):
    """A micro-batch, None if no sample is left, and what was left out."""

    batch: Batch | None
    skipped: list[Skipped]


@dataclass(frozen=True)
class PackSeeded:
    """A collate function of a `StepLoader`: every sample's random numbers depend on the seed and its position alone.

    A sample that cannot be packed is an error that names it, or is left out if `skips_bad`. With `spreads_times`, the
    times of all spans are spread evenly (a golden ratio sequence), which makes a loss over few samples steadier.
    """

    packer: Packer
    seed: int
    skips_bad: bool = False
    spreads_times: bool = False

    def __call__(self, samples: Sequence[Sample], references: Sequence[SampleReference]) -> Packed:
        try:
            return Packed(self._pack(samples, references), [])
        except (ValueError, TypeError) as error:
            found = [self._problem(*pair) for pair in zip(samples, references, strict=True)]
            problems = {i: problem for i, problem in enumerate(found) if problem is not None}
            if not problems:  # they do not fit together: too many for a budget
                raise
            if not self.skips_bad:
                raise next(iter(problems.values())) from error
        kept = [i for i in range(len(samples)) if i not in problems]
        skipped = [Skipped.because(references[i], problem) for i, problem in problems.items()]
        batch = self._pack([samples[i] for i in kept], [references[i] for i in kept]) if kept else None
        return Packed(batch, skipped)

    def _pack(self, samples: Sequence[Sample], references: Sequence[SampleReference]) -> Batch:
        seeds = [seed_of(self.seed, "draws", reference.position) for reference in references]
        batch = self.packer(list(samples), seeds=seeds)
        if self.spreads_times:
            batch = with_spread_times(batch, [reference.position for reference in references])
        return batch

    def _problem(self, sample: Sample, reference: SampleReference) -> SampleError | None:
        try:
            self._pack([sample], [reference])
        except (ValueError, TypeError) as error:
            is_default = sample.name == default_name(reference.source, reference.index)
            return SampleError.of(reference, str(error), file=None if is_default else sample.name)
        return None


def with_spread_times(batch: Batch, positions: Sequence[int]) -> Batch:
    """Evenly spread times that depend on the position of the sample, and on which of its modalities a span is."""
    spans = batch.stream.spans
    assert batch.time_number is not None
    place = torch.tensor(positions, dtype=torch.float64)[spans.sample] + spans.index * SAMPLES_APART
    return replace(batch, time_number=((place + 1) * GOLDEN % 1).to(batch.time_number))


def idle(batch: Batch) -> Batch:
    """The same batch with no weight: for a process that has no samples, but must take part in a step."""
    targets = replace(batch.targets, weight=torch.zeros_like(batch.targets.weight))
    return replace(batch, targets=targets, span_weight=torch.zeros_like(batch.span_weight))
