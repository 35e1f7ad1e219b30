"""`PolicyTrainer`: a run that trains an `ActionPolicy`, from the parts of which `Trainer` is made."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion_pytorch.data.loader import LoadedStep, StepLoader
from transfusion_pytorch.data.loading import SampleError
from transfusion_pytorch.data.mixture import Mixture, as_mixture, is_stream
from transfusion_pytorch.data.order import SampleReference, seed_of
from transfusion_pytorch.data.plan import DataPlan
from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.policy.base import ActionPolicy
from transfusion_pytorch.policy.lerobot import ACTION, ACTION_IS_PAD
from transfusion_pytorch.sequence.samples import Sample
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.config import BATCH_SIZE, TrainConfig
from transfusion_pytorch.training.one_process import FOR_A_TRANSFUSION, OneProcessRun
from transfusion_pytorch.training.problems import Problems
from transfusion_pytorch.training.step import StepResult

NOT_FOR_POLICIES = (*FOR_A_TRANSFUSION, "on_bad_sample")
VALIDATION_SEED = 20_241_031  # of times and noise in validations, whatever the seed of the training


class Demonstrated(NamedTuple):
    """A batch: observations `(b, o, *shape)` by name, actions `(b, k, a)`, and which of them are padding."""

    observation: dict[str, Tensor]
    actions: Tensor
    is_pad: Tensor | None

    def to(self, device: torch.device) -> "Demonstrated":
        observation = {name: value.to(device) for name, value in self.observation.items()}
        is_pad = None if self.is_pad is None else self.is_pad.to(device)
        return Demonstrated(observation, self.actions.to(device), is_pad)


@dataclass(frozen=True)
class StackItems:
    """A collate function of a `StepLoader`: items of one dict of tensors each."""

    names: tuple[str, ...]

    def __call__(self, samples: Sequence[Sample], references: Sequence[SampleReference]) -> Demonstrated:
        items = [self._item(sample, reference) for sample, reference in zip(samples, references, strict=True)]
        stacked = {name: torch.stack([item[name] for item in items]) for name in (*self.names, ACTION)}
        is_pad = None
        if any(ACTION_IS_PAD in item for item in items):  # in a mixture, data without it has no padding
            is_pad = torch.stack([padding_of(item) for item in items])
        return Demonstrated({name: stacked[name] for name in self.names}, stacked[ACTION], is_pad)

    def _item(self, sample: Sample, reference: SampleReference) -> Mapping[str, Tensor]:
        item = sample.parts[0]
        if not isinstance(item, Mapping):
            raise SampleError.of(reference, f"expected a dict of tensors, got {type(item).__name__}")
        if missing := [name for name in (*self.names, ACTION) if name not in item]:
            raise SampleError.of(reference, f"{', '.join(missing)} missing, there are {', '.join(item)}")
        return item


def padding_of(item: Mapping[str, Tensor]) -> Tensor:
    """Which actions of an item are padding, `(k,)`."""
    return item[ACTION_IS_PAD] if ACTION_IS_PAD in item else torch.zeros(len(item[ACTION]), dtype=torch.bool)


class PolicyTrainer(OneProcessRun):
    """Trains a policy in one process.

    - `data`, `validation`: datasets with a length whose items are dicts, as those of LeRobot: observations by name,
      `(o, *shape)`, `action` `(k, a)` and, if chunks are padded, `action_is_pad` `(k,)`
    - `folder`: that of the run, with the files of `Trainer` (`config.json`, `metrics.csv`, `checkpoints/`), in which
      `fit(resume=True)` goes on. Best is the checkpoint of the lowest validation loss
    - `callbacks`: see `Callback`; `on_sample` is called every `sample_every` steps and after the last
    - `config`: all options but those in `NOT_FOR_POLICIES`

    Fit the statistics of the policy before; without, there is a warning.

        trainer = PolicyTrainer(policy, dataset, TrainConfig(steps=5000, batch_size=128), folder="run")
        trainer.fit(resume=True)
        trainer.average.save_pretrained("policy")

    Raises `ValueError` for options that have no meaning here, and for several processes.
    """

    what, not_for_it, best = "a policy", NOT_FOR_POLICIES, ("loss", False)

    def __init__(
        self,
        policy: ActionPolicy,
        data: Any,
        config: TrainConfig,
        *,
        folder: str | Path = "run",
        validation: Any = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not policy.action_statistics.is_fitted:
            warnings.warn(
                "the policy has no statistics of the data: call policy.fit_statistics(observation, actions) first, "
                "unless the data are normalised already",
                stacklevel=2,
            )
        self._open(policy, config, folder, callbacks)
        self.validation = validation
        size = config.batch_size or BATCH_SIZE
        mixture = checked(data)
        steps = None if config.epochs is None else DataPlan(mixture, batch_size=size, epochs=config.epochs).num_steps
        self.config = config.resolved(steps)
        self.stack = StackItems(tuple(policy.observation_spec.shapes))
        plan = DataPlan(mixture, seed=config.seed, batch_size=size)
        pins = self.device.type == "cuda"
        self.loader = StepLoader(plan, self.stack, num_workers=config.num_workers, pin_memory=pins)
        self._prepare()

    def score(self, data: Any = None) -> float:
        """The loss of the average over a dataset, by default the validation data, with times and noise of a fixed
        seed; a mean over samples.
        """
        data = self.validation if data is None else data
        if data is None:
            raise ValueError("there is no validation data: give PolicyTrainer(..., validation=...)")
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        losses = []
        with evaluating(self.average), self.launch.autocast(), torch.no_grad():
            for batch in self.in_order(data):
                losses.append(loss_of(self.average, batch, generator, reduction="none"))
        return float(torch.cat(losses).mean())

    def in_order(self, data: Any) -> Iterator[Demonstrated]:
        """Batches of data in their order, on the device."""
        mixture = checked(data)
        still = Mixture(mixture.datasets, weights=mixture.weights, shuffle=False)
        plan = DataPlan(still, batch_size=self.config.batch_size, epochs=1)
        for step in StepLoader(plan, self.stack):
            yield from (batch.to(self.device) for batch in step.batches if batch is not None)

    # a step

    def _take(self, loaded: LoadedStep, problems: Problems) -> tuple[StepResult | None, int]:
        (batch,) = loaded.batches
        if loaded.skipped:
            problems.report_skipped(loaded.skipped)
        result = None
        if batch is not None:
            result = self._train_step.make(self.step, partial(self._gradients, batch.to(self.device)))
        problems.check(self.step, result, ())
        return result, 0 if batch is None else len(batch.actions)

    def _gradients(self, batch: Demonstrated) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "noise", self.step))
        with self.launch.autocast():
            loss = loss_of(self.model, batch, generator)
        self._train_step.scaler.scale(loss).backward()
        return {"loss": loss.detach()}

    def _validated(self) -> tuple[dict[str, float], str]:
        loss = self.score()
        return {"loss": loss}, f"validation loss {loss:.4f}"


def loss_of(policy: ActionPolicy, batch: Demonstrated, generator: torch.Generator, **options: Any) -> Tensor:
    return policy.loss(batch.observation, batch.actions, action_is_pad=batch.is_pad, generator=generator, **options)


def checked(data: Any) -> Mixture:
    """Raises `TypeError` for data that can only be iterated over."""
    if is_stream(data):
        raise TypeError(f"data are a dataset with a length, or a list of dicts, got {type(data).__name__}")
    return as_mixture(data)
