"""Batches of samples from any dataset of samples."""

from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from transfusion_pytorch.sequence.samples import Sample, is_typed


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


def create_dataloader(dataset: Any, *, batch_size: int = 16, shuffle: bool = False, **options: Any) -> DataLoader:
    """Batches that `Transfusion` takes as they are, of a `Dataset` or a list of samples. `options` are those of
    `DataLoader`.
    """
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=collate_fn, **options)
