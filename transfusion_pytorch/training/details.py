"""The losses of a training step in detail: by modality, source and quarter of the times."""

from collections.abc import Sequence
from typing import Any

from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.metrics import LossTable, means_of


def losses_in_detail(
    model: Any, batches: Sequence[Batch], launch: Launch, *, idle: Batch | None = None
) -> dict[str, float]:
    """Those of the samples of all processes, in evaluation mode, by the names of `LossTable`; for the main process, and
    empty for the others. All must ask, with equally many micro-batches. `idle` is computed like them and not counted.
    """
    table = LossTable(model.num_modalities)
    with evaluating(model), launch.autocast():
        for batch in batches:
            losses = model(batch.to(launch.device), reduction="span")
            if batch is not idle:
                table.add(losses, batch)
    return means_of(*launch.gather(table.read_sums()))
