"""`PolicyTrainer`: a run that trains an `ActionPolicy`, from the parts of which `Trainer` is made."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
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
from transfusion_pytorch.saving.files import save_json
from transfusion_pytorch.sequence.samples import Sample
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.config import BATCH_SIZE, TrainConfig
from transfusion_pytorch.training.ema import create_ema
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.metrics import RunningMeans
from transfusion_pytorch.training.optimizers import create_optimizers
from transfusion_pytorch.training.problems import Problems
from transfusion_pytorch.training.reporting import ProgressReporter
from transfusion_pytorch.training.run import Fitted, TrainingRun
from transfusion_pytorch.training.run_log import open_log
from transfusion_pytorch.training.step import OptimizerStep, StepResult
from transfusion_pytorch.training.stopping import StopSignals

# options of a `TrainConfig` that are about texts, tokens and several processes
NOT_FOR_POLICIES = (
    *("accumulation", "token_budget", "packs_per_step", "optimizer", "muon_learning_rate", "velocity_consistency"),
    *("checkpointing", "compile", "details_every", "on_bad_sample"),
)
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
        is_pad = torch.stack([item[ACTION_IS_PAD] for item in items]) if ACTION_IS_PAD in items[0] else None
        return Demonstrated({name: stacked[name] for name in self.names}, stacked[ACTION], is_pad)

    def _item(self, sample: Sample, reference: SampleReference) -> Mapping[str, Tensor]:
        item = sample.parts[0]
        if not isinstance(item, Mapping):
            raise SampleError.of(reference, f"expected a dict of tensors, got {type(item).__name__}")
        if missing := [name for name in (*self.names, ACTION) if name not in item]:
            raise SampleError.of(reference, f"{', '.join(missing)} missing, there are {', '.join(item)}")
        return item


class PolicyTrainer(TrainingRun):
    """Trains a policy in one process.

    `data` and `validation` are datasets with a length whose items are dicts, as those of LeRobot: observations `(o,
    *shape)` by name, `action` `(k, a)` and, if chunks are padded, `action_is_pad` `(k,)`. Fit the statistics of the
    policy before. Files and options are those of `Trainer` (`config.json`, `metrics.csv`, `checkpoints/`), but for the
    options in `NOT_FOR_POLICIES`. Best is the checkpoint of the lowest validation loss.

        trainer = PolicyTrainer(policy, dataset, TrainConfig(steps=5000, batch_size=128), folder="run")
        trainer.fit(resume=True)
        trainer.average.save_pretrained("policy")

    Raises `ValueError` for options that have no meaning here, and for several processes.
    """

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
        check_options(config)
        self.launch = Launch(device=config.device, precision=config.precision)
        if self.launch.size > 1:
            raise ValueError(f"a policy is trained by one process, got {self.launch.size}")
        self.model, self.folder, self.callbacks = policy.to(self.device), Path(folder), tuple(callbacks)
        self.validation = validation
        size = config.batch_size or BATCH_SIZE
        mixture = checked(data)
        steps = None if config.epochs is None else DataPlan(mixture, batch_size=size, epochs=config.epochs).num_steps
        self.config = config.resolved(steps)
        self.stack = StackItems(tuple(policy.observation_spec.shapes))
        plan = DataPlan(mixture, seed=config.seed, batch_size=size)
        pins = self.device.type == "cuda"
        self.loader = StepLoader(plan, self.stack, num_workers=config.num_workers, pin_memory=pins)
        self.step, self.figures = 0, dict[str, float]()
        self._means, self._validated_at = RunningMeans(), -1
        self.model.train()
        self.ema: Any = None
        if config.ema_beta is not None:
            every = dict(update_every=self.config.ema_every, update_after_step=self.config.ema_start)
            self.ema = create_ema(self.model, beta=config.ema_beta, **every)
        optimizers = create_optimizers(self.model, self.config)
        self._train_step = OptimizerStep(self.model, optimizers, self.ema, self.launch, self.config)

    def fit(self, *, resume: bool | str | Path = False) -> Fitted:
        """Trains until the last step, or until Ctrl-C or SIGTERM. `resume` and errors are those of `Trainer.fit`."""
        checkpoints = Checkpoints(
            self.folder / "checkpoints", keep_last=self.config.keep_last, keep_best=self.config.keep_best, metric="loss"
        )
        self._resume(checkpoints, resume)
        save_json(self.folder / "config.json", self.config.as_dict())
        trained = sum(parameter.numel() for parameter in self.model.parameters())
        self.say(f"policy: {trained:,} parameters on {self.device}, precision: {self.launch.precision}")
        self.say(f"run: {self.folder}, step {self.step} of {self._total}")
        self.log = open_log(self.folder, self.config, resumed_step=self.step, is_main=True)
        try:
            progress = ProgressReporter(self._total, initial=self.step, device=self.device)
            with StopSignals() as signals, progress:
                self._call("on_start")
                was_stopped = self._run(checkpoints, progress, signals)
                self._call("on_end")
        finally:
            self.log.close()
        return Fitted(self.step, dict(self.figures), was_stopped)

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

    # the loop

    def _run(self, checkpoints: Checkpoints, progress: ProgressReporter, signals: StopSignals) -> bool:
        """Steps until the last one. Returns whether a signal ended it before."""
        problems = Problems(self.launch, progress, stops=self.config.on_bad_step == "stop")
        if self._is_last:
            return False
        steps: Any = iter(self.loader)
        with closing(steps):  # and with it the data workers
            for loaded in steps:
                self._take(loaded, problems, progress)
                self._look(progress)
                if self._is_due(self.config.save_every) or self._is_last or signals.received:
                    parts = self._parts(loaded.state)
                    self._call("on_save", checkpoints.save(self.step, parts, figures=self._own_figures))
                if self._is_last:
                    return False
                if signals.received:
                    progress.write(f"stopped by {signals.received}: step {self.step} is saved")
                    return True
        return False

    def _take(self, loaded: LoadedStep, problems: Problems, progress: ProgressReporter) -> None:
        """Trains on a batch."""
        (batch,) = loaded.batches
        if loaded.skipped:
            problems.report_skipped(loaded.skipped)
        result: StepResult | None = None
        if batch is not None:
            result = self._train_step.make(self.step, partial(self._gradients, batch.to(self.device)))
        problems.check(self.step, result, ())
        self.step += 1
        if result is not None and batch is not None:
            losses = self._add_to_means(result)
            progress.update(losses, samples=len(batch.actions), learning_rate=result.learning_rate)
            self._call("on_step", result.losses)
        self._write_means()

    def _gradients(self, batch: Demonstrated) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "noise", self.step))
        with self.launch.autocast():
            loss = loss_of(self.model, batch, generator)
        self._train_step.scaler.scale(loss).backward()
        return {"loss": loss.detach()}

    def _look(self, progress: ProgressReporter) -> None:
        """Validates and samples, where they are due."""
        if self._validates:
            self.figures, self._validated_at = {"loss": self.score()}, self.step
            self.log.write(self.step, self.figures, prefix="validation/")
            progress.write(f"step {self.step:,}: validation loss {self.figures['loss']:.4f}")
            self._call("on_validation", self.figures)
        self._sample()
        self.log.flush()


def loss_of(policy: ActionPolicy, batch: Demonstrated, generator: torch.Generator, **options: Any) -> Tensor:
    return policy.loss(batch.observation, batch.actions, action_is_pad=batch.is_pad, generator=generator, **options)


def check_options(config: TrainConfig) -> None:
    """Raises `ValueError` for options that are set and have no meaning for a policy."""
    defaults = {spec.name: spec.default for spec in fields(TrainConfig)}
    wrong = [name for name in NOT_FOR_POLICIES if getattr(config, name) != defaults[name]]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be set for a policy: leave out what is for a Transfusion")


def checked(data: Any) -> Mixture:
    """Raises `TypeError` for data that can only be iterated over."""
    if is_stream(data):
        raise TypeError(f"data are a dataset with a length, or a list of dicts, got {type(data).__name__}")
    return as_mixture(data)
