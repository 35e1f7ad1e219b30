"""Batches of samples from any dataset of samples."""

from numbers import Integral
from typing import Any

from torch.utils.data import DataLoader


def collate_fn(samples: list[Any]) -> list[list[Any]]:
    """A batch is a list of samples, each a list of parts; shapes may differ, so nothing is stacked.

    A dataset may give a sample as a tuple of parts as well; a lone tensor, or a modality `(type, tensor)`, is a
    sample of one part.
    """
    return [_as_parts(sample) for sample in samples]


def _as_parts(sample: Any) -> list[Any]:
    is_modality = isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Integral)
    return list(sample) if isinstance(sample, (list, tuple)) and not is_modality else [sample]


def create_dataloader(dataset: Any, *, batch_size: int = 16, shuffle: bool = False, **options: Any) -> DataLoader:
    """Batches that `Transfusion` takes as they are, of a `Dataset` or a list of samples. `options` are those of
    `DataLoader`.
    """
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=collate_fn, **options)
