"""Figures of a run, added up on the device and read when somebody looks at them.

b samples, m spans.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.training.losses import SpanLosses

QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")  # of the times


class Sum(NamedTuple):
    """What was added up, and how much of it."""

    total: float
    count: float


def means_of(*tables: Mapping[str, Sum]) -> dict[str, float]:
    """Means over one or several tables of sums, such as those of all processes; what has no count is left out."""
    sums: dict[str, Sum] = {}
    for table in tables:
        for name, (total, count) in table.items():
            before = sums.get(name, Sum(0.0, 0.0))
            sums[name] = Sum(before.total + total, before.count + count)
    return {name: total / count for name, (total, count) in sums.items() if count}


class RunningMeans:
    """Means of scalars since they were last read. The device is waited for in `read` alone.

    >>> means.add({"loss": loss, "text": breakdown.text})
    >>> means.read()
    {"loss": 2.31, "text": 1.12}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, values: Mapping[str, Tensor | float], *, count: Tensor | float = 1) -> None:
        """Adds one value for each name, with the weight `count`. A name may be missing, and come later."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().to(precise(value.dtype))
            total, counts = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * count, counts + count)

    def state(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint."""
        return {name: tuple(map(float, pair)) for name, pair in self._sums.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: (total, count) for name, (total, count) in state.items()}

    def read(self) -> dict[str, float]:
        """The mean of each name that has a count, in the order in which they came; starts again."""
        sums, self._sums = self._sums, {}
        numbers = _to_host([number for pair in sums.values() for number in pair])
        return means_of({name: Sum(*pair) for name, *pair in zip(sums, numbers[::2], numbers[1::2], strict=True)})


class LossTable:
    """Losses by modality, by quarter of the times, and by the source of the samples. The device is waited for in
    `read_sums` alone.

    | name | what |
    |---|---|
    | `flow_0` | the flow loss of modality 0 |
    | `flow_0/t_0.25-0.50` | that of its spans at these times |
    | `flow_0/source_web` | that of its spans in samples of this source |
    | `text`, `text/source_web` | the text loss |

    >>> table.add(model(batch, reduction="span"), batch)  # in evaluation mode
    >>> means_of(table.read_sums())
    """

    def __init__(self, num_modalities: int) -> None:
        self.num_modalities = num_modalities
        self._sources: dict[str | None, int] = {}
        self._flow = Cells((num_modalities, len(QUARTERS)))
        self._text = Cells(())

    def add(self, losses: SpanLosses, batch: Batch) -> None:
        """The losses of a batch, as `model(batch, reduction="span")` gives them in evaluation mode."""
        self.add_spans(losses)
        self.add_text(losses, batch)

    def add_spans(self, losses: SpanLosses) -> None:
        """Flow losses: every span that is noised counts once. Those at t = 1 (conditions) have no loss."""
        source = self._rows_of(losses.sources, losses.flow.device)[losses.sample]
        quarter = (losses.time * len(QUARTERS)).long().clamp(0, len(QUARTERS) - 1)
        cell = (source * self.num_modalities + losses.modality) * len(QUARTERS) + quarter
        self._flow.add(cell, losses.flow.detach(), (losses.time < 1).to(losses.flow.dtype), len(self._sources))

    def add_text(self, losses: SpanLosses, batch: Batch) -> None:
        """Text losses: every target counts once."""
        targets, text = batch.targets, losses.text.detach()
        counts = (targets.weight > 0).to(text.dtype)
        counts = counts.new_zeros(len(batch)).index_add(0, targets.sample, counts)
        source = self._rows_of(losses.sources, text.device)
        counts = counts.to(text.device, non_blocking=True)
        self._text.add(source, text * counts, counts, len(self._sources))

    def read_sums(self) -> dict[str, Sum]:
        """For `means_of`, with those of other processes if there are any; starts again."""
        sums = {}
        for name, (totals, counts) in (("text", self._text.read()), *self._read_flow()):
            sums[name] = _sum(totals, counts)
            if totals.ndim == 2:
                by_quarter = zip(QUARTERS, totals.unbind(1), counts.unbind(1), strict=True)
                sums |= {f"{name}/t_{quarter}": _sum(*parts) for quarter, *parts in by_quarter}
            by_source = zip(self._sources, totals, counts, strict=False)  # a table may have seen fewer sources
            sums |= {f"{name}/source_{source}": _sum(*parts) for source, *parts in by_source if source is not None}
        self._sources = {}
        return sums

    def _read_flow(self) -> list[tuple[str, "Table"]]:
        """For each modality, sums by source and quarter."""
        totals, counts = self._flow.read()
        return [(f"flow_{kind}", Table(totals[:, kind], counts[:, kind])) for kind in range(self.num_modalities)]

    def _rows_of(self, sources: Sequence[str | None], device: torch.device) -> Int[Tensor, " b"]:
        """The row of the table for each sample; a new source gets a new row."""
        rows = [self._sources.setdefault(source, len(self._sources)) for source in sources]
        return torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)


class Table(NamedTuple):
    """Sums: a row for each source."""

    total: Float[Tensor, "rows *cells"]
    count: Float[Tensor, "rows *cells"]


class Cells:
    """A table of sums with a row for each source, which grows. `shape` is that of a row."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.size = shape, math.prod(shape)
        self.sums: Float[Tensor, "2 cells"] | None = None

    def add(self, cell: Int[Tensor, " m"], values: Float[Tensor, " m"], counts: Float[Tensor, " m"], rows: int) -> None:
        """Adds `values`, already times their `counts`, to flat cells of a table of that many rows."""
        added = torch.stack((torch.where(counts > 0, values, 0), counts)).to(precise(values.dtype))
        sums = added.new_zeros(2, 0) if self.sums is None else self.sums
        sums = F.pad(sums, (0, rows * self.size - sums.shape[1]))
        self.sums = sums.index_add(1, cell, added)

    def read(self) -> Table:
        """On the CPU; starts again."""
        sums, self.sums = self.sums, None
        sums = torch.zeros(2, 0) if sums is None else sums.cpu()
        total, count = sums.view(2, sums.shape[1] // self.size, *self.shape)
        return Table(total, count)


def _sum(totals: Tensor, counts: Tensor) -> Sum:
    return Sum(totals.sum().item(), counts.sum().item())


def describe_bad_batch(batch: Batch) -> str:
    """Names the samples whose latents or raw data have NaN or infinity, or says that there are none.

    Waits for the device of the batch: for the message of an error.
    """
    spans, found = batch.stream.spans, []
    for kind, data in batch.data.items():
        placement = batch.stream.placements[kind]
        parts = [(span, instance) for raw in data.raw for span, instance in zip(raw.order, raw.data, strict=True)]
        if data.latents is not None:
            sizes = [placement.sizes[span] for span in data.order]
            parts += zip(data.order, data.latents.split(sizes), strict=True)
        for span, part in parts:
            if not part.isfinite().all():
                what = "NaN" if part.isnan().any() else "infinity"
                sample = int(spans.sample[placement.spans[span]])
                found.append((sample, f"{_name(batch, sample)} has {what} in modality {kind}"))
    if found:
        return "; ".join(phrase for _, phrase in sorted(found))
    names = ", ".join(_name(batch, sample) for sample in range(len(batch)))
    return f"the data of its samples are finite ({names})"


def _name(batch: Batch, sample: int) -> str:
    """`sample 3 'cat.png' of 'web'`"""
    name, source = batch.names[sample], batch.sources[sample]
    return f"sample {sample}" + (f" '{name}'" if name else "") + (f" of '{source}'" if source else "")


def _to_host(numbers: Sequence[Tensor | float]) -> list[float]:
    """One transfer for all that lie on one device."""
    values = [number if isinstance(number, float) else 0.0 for number in numbers]
    by_device: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        if isinstance(number, Tensor):
            by_device.setdefault(number.device, []).append(index)
        else:
            values[index] = float(number)
    for indices in by_device.values():
        stacked = torch.stack([torch.as_tensor(numbers[index]).reshape(()) for index in indices])
        for index, value in zip(indices, stacked.tolist(), strict=True):
            values[index] = value
    return values
