"""Samples out of datasets, with errors that say which one it was; and plain batches of them."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from transfusion_pytorch.data.order import SampleReference, generator_of, sample_seed, seed_generators
from transfusion_pytorch.sequence.samples import Sample, is_typed

GRACE = 30  # seconds


class SkipSample(Exception):
    """Raised by a dataset for a sample that should be left out, with the reason: a broken file."""


class SampleError(RuntimeError):
    """A sample that could not be loaded or measured. Its message names the source, the index and the file.

    `reason` is the same without source and index, for whoever names these too (`Skipped`).
    """

    def __init__(self, message: str, *, reason: str | None = None):
        super().__init__(message)
        self.reason = message if reason is None else reason

    @classmethod
    def of(cls, reference: SampleReference, problem: str, *, file: str | None = None) -> "SampleError":
        """`source 'web', index 3 (a.png): problem`; `file` is what the dataset says of the sample."""
        named = f" ({file})" if file else ""
        message = f"source {reference.source!r}, index {reference.index}{named}: {problem}"
        return cls(message, reason=f"{file}: {problem}" if file else problem)


class Skipped(NamedTuple):
    """A sample that was left out, and why: `reason` does not repeat its source and index."""

    reference: SampleReference
    reason: str

    @classmethod
    def because(cls, reference: SampleReference, error: SkipSample | SampleError) -> "Skipped":
        return cls(reference, error.reason if isinstance(error, SampleError) else str(error))


def leave_signals(worker: int) -> None:
    """A data worker's start: Ctrl-C and SIGTERM often go to the whole group of processes, and are for the training one,
    which still needs its workers to end the step. It ends them itself; if not, SIGTERM does after half a minute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def load_sample(datasets: Mapping[str, Any], reference: SampleReference, seed: int) -> Sample:
    """Loads a sample, with its source and a name unless the dataset gives its own.

    Its random numbers depend on `(seed, position)` alone. `dataset.sample(index, generator)` is called with a generator
    of its own where there is such a method, `dataset[index]` otherwise; the global generators of Python, numpy and
    torch are seeded for both, so call it within `generators_kept`. Raises `SkipSample`, and `SampleError` for anything
    else that goes wrong.
    """
    dataset, index = datasets[reference.source], reference.index
    own = sample_seed(seed, reference.position)
    try:
        seed_generators(own)
        loaded = dataset.sample(index, generator_of(own)) if hasattr(dataset, "sample") else dataset[index]
    except SkipSample:
        raise
    except Exception as error:
        problem = f"could not be loaded: {type(error).__name__}: {error}"
        raise SampleError.of(reference, problem, file=file_of(dataset, index)) from error
    return as_sample(loaded, name=default_name(reference.source, index), source=reference.source)


def default_name(source: str, index: int) -> str:
    """Of a sample that has none of its own: `web[3]`."""
    return f"{source}[{index}]"


def as_sample(loaded: Any, *, name: str | None = None, source: str | None = None) -> Sample:
    """What a dataset gave, with this name and source unless it has its own."""
    sample = loaded if isinstance(loaded, Sample) else Sample(loaded)
    return replace(
        sample,
        parts=_as_parts(sample.parts),
        name=name if sample.name is None else sample.name,
        source=source if sample.source is None else sample.source,
    )


def name_of(dataset: Any, index: int) -> str:
    """For errors: the index, and what the dataset says of it (its file)."""
    file = file_of(dataset, index)
    return f"index {index}" + (f" ({file})" if file else "")


def file_of(dataset: Any, index: int) -> str | None:
    """What a dataset says of a sample, such as its file."""
    return dataset.describe(index) if hasattr(dataset, "describe") else None


def collate_fn(samples: list[Any]) -> list[list[Any] | Sample]:
    """A batch is a list of samples, each a list of parts; shapes may differ, so nothing is stacked.

    A dataset may give a sample as a tuple of parts as well; a lone tensor, or a modality `(type, tensor)`, is a
    sample of one part. A `Sample` keeps its name, source and weight. To pack in data workers, use
    `Transfusion.packer()` instead.
    """
    return [
        replace(sample, parts=_as_parts(sample.parts)) if isinstance(sample, Sample) else _as_parts(sample)
        for sample in samples
    ]


def _as_parts(sample: Any) -> list[Any]:
    return list(sample) if isinstance(sample, (list, tuple)) and not is_typed(sample) else [sample]


def create_dataloader(
    dataset: Any,
    batch_size: int | None = 16,
    shuffle: bool | None = False,
    *,
    batch_sampler: Any = None,
    collate_fn: Callable[[list[Any]], Any] = collate_fn,
    **options: Any,
) -> DataLoader:
    """Batches that `Transfusion` takes as they are, of a `Dataset` or a list of samples.

    A `collate_fn` of your own, such as `model.packer()`, replaces the one that makes lists of samples. A
    `batch_sampler` chooses the samples of each batch in place of `batch_size` and `shuffle`. `options` are those of
    `DataLoader`.
    """
    batching = (
        dict(batch_size=batch_size, shuffle=shuffle) if batch_sampler is None else dict(batch_sampler=batch_sampler)
    )
    return DataLoader(dataset, collate_fn=collate_fn, **batching, **options)
