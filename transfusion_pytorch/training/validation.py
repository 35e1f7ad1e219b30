"""Held-out losses at fixed times and fixed noise, so that they can be compared from step to step and run to run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.data.loader import StepLoader
from transfusion_pytorch.data.mixture import Mixture, as_mixture, is_stream
from transfusion_pytorch.data.plan import DataPlan
from transfusion_pytorch.evaluating import evaluating, gathered
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.training.collate import PackSeeded
from transfusion_pytorch.training.launch import Launch

SEED = 20_240_820  # of the noise, whatever the seed of the training


class Validation:
    """All samples of `data` in batches of `batch_size`, split over the processes.

    The random numbers of a sample depend on where it stands in the data alone, and times are spread evenly: losses are
    equal for any number of processes, up to rounding, and any `batch_size`.
    """

    def __init__(self, data: Any, packer: Packer, launch: Launch, *, batch_size: int, skips_bad: bool = False) -> None:
        if is_stream(data):
            raise TypeError(f"validation data are a list or a dataset with a length, got {type(data).__name__}")
        mixture = as_mixture(data)
        self.mixture = Mixture(mixture.datasets, weights=mixture.weights, shuffle=False)
        self.pack = PackSeeded(packer, SEED, skips_bad=skips_bad, spreads_times=True)
        self.launch, self.batch_size = launch, batch_size

    def __call__(self, model: Any) -> dict[str, float]:
        """`loss` (weighted as in training), `text`, `flow_0`, ... of what occurs. All processes must take part."""
        sums = torch.zeros(2, 1 + model.num_modalities, dtype=torch.float64)
        with gathered(model), evaluating(model):
            for batch in self._batches():
                batch = batch.to(self.launch.device)
                with self.launch.autocast():
                    _, parts = model(batch, return_breakdown=True)
                counts = kinds_of(batch.count_targets())
                sums += torch.stack((_as_row(parts.text, parts.flow) * counts, counts)).cpu()
        total, count = self.launch.sum(sums.float() if self.launch.device.type == "mps" else sums).cpu()
        if not count.any():
            raise ValueError("validation data have nothing to predict: every sample was left out, or is a condition")
        means = total / count.clamp(min=1e-30)
        weights = torch.tensor([model.loss_weights.text, *model.loss_weights.flow], dtype=torch.float64)
        names = ["text", *(f"flow_{kind}" for kind in range(model.num_modalities))]
        by_kind = {name: mean for name, mean, here in zip(names, means.tolist(), count, strict=True) if here}
        return {"loss": float((weights * means).sum()), **by_kind}

    def _batches(self) -> Iterator[Batch]:
        launch = self.launch
        plan = DataPlan(self.mixture, batch_size=self.batch_size * launch.size, epochs=1)
        for step in StepLoader(plan, self.pack, rank=launch.rank, num_processes=launch.size):
            yield from (packed.batch for packed in step.batches if packed is not None and packed.batch is not None)


def kinds_of(counts: TargetCounts) -> Tensor:
    """The targets of text and of each modality, in one row."""
    return _as_row(counts.text, counts.latents)


def _as_row(text: Tensor, modalities: Tensor) -> Tensor:
    return torch.cat((text[None].double(), modalities.double()))
