"""A run that trains a model other than a `Transfusion`, in one process: `AutoencoderTrainer` and `PolicyTrainer`."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from transfusion_pytorch.data.loader import LoadedStep
from transfusion_pytorch.saving.files import save_json
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.config import TrainConfig
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
FOR_A_TRANSFUSION = (
    *("accumulation", "token_budget", "packs_per_step", "optimizer", "muon_learning_rate", "velocity_consistency"),
    *("checkpointing", "compile", "details_every"),
)


class OneProcessRun(TrainingRun):
    """A subclass calls `_open`, sets `config`, `loader` and `validation`, calls `_prepare`, and has the methods below.

    - `what` is trained, with its article; `not_for_it`: options of a `TrainConfig` without a meaning for it
    - `best`: the figure by which a checkpoint is the best, and whether higher is better
    """

    what: ClassVar[str]
    not_for_it: ClassVar[tuple[str, ...]]
    best: ClassVar[tuple[str, bool]]

    @abstractmethod
    def _take(self, loaded: LoadedStep, problems: Problems) -> tuple[StepResult | None, int]:
        """Trains on a batch. Returns how many samples it has, 0 where all of them were left out."""

    @abstractmethod
    def _validated(self) -> tuple[dict[str, float], str]:
        """The figures of the validation data, and a line that says them."""

    def _finish(self) -> None:
        """What is done after the last step."""

    def _open(self, model: nn.Module, config: TrainConfig, folder: str | Path, callbacks: Sequence[Callback]) -> None:
        defaults = {spec.name: spec.default for spec in fields(TrainConfig)}
        wrong = [name for name in self.not_for_it if getattr(config, name) != defaults[name]]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} cannot be set for {self.what}: leave out what is for a Transfusion")
        self.launch = Launch(device=config.device, precision=config.precision)
        if self.launch.size > 1:
            raise ValueError(f"{self.what} is trained by one process, got {self.launch.size}")
        self.model, self.folder, self.callbacks = model.to(self.device), Path(folder), tuple(callbacks)

    def _prepare(self) -> None:
        """For the first step: the moving average and the optimizers."""
        self.step, self.figures = 0, dict[str, float]()
        self._means, self._validated_at = RunningMeans(), -1
        self.model.train()
        self.ema: Any = None
        if self.config.ema_beta is not None:
            every = dict(update_every=self.config.ema_every, update_after_step=self.config.ema_start)
            self.ema = create_ema(self.model, beta=self.config.ema_beta, **every)
        optimizers = create_optimizers(self.model, self.config)
        self._train_step = OptimizerStep(self.model, optimizers, self.ema, self.launch, self.config)

    def fit(self, *, resume: bool | str | Path = False) -> Fitted:
        """Trains until the last step, or until Ctrl-C or SIGTERM. `resume` and errors are those of `Trainer.fit`."""
        metric, higher_is_better = self.best
        checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep_last=self.config.keep_last,
            keep_best=self.config.keep_best,
            metric=metric,
            higher_is_better=higher_is_better,
        )
        self._resume(checkpoints, resume)
        self._describe()
        self.log = open_log(self.folder, self.config, resumed_step=self.step, is_main=True)
        try:
            progress = ProgressReporter(self._total, initial=self.step, device=self.device)
            with StopSignals() as signals, progress:
                self._call("on_start")
                was_stopped = self._run(checkpoints, progress, signals)
                if not was_stopped:
                    self._finish()
                self._call("on_end")
        finally:
            self.log.close()
        return Fitted(self.step, dict(self.figures), was_stopped)

    # the loop

    def _run(self, checkpoints: Checkpoints, progress: ProgressReporter, signals: StopSignals) -> bool:
        """Steps until the last one. Returns whether a signal ended it before."""
        problems = Problems(self.launch, progress, stops=self.config.on_bad_step == "stop")
        if self._is_last:
            return False
        steps: Any = iter(self.loader)
        with closing(steps):  # and with it the data workers
            for loaded in steps:
                result, size = self._take(loaded, problems)
                self.step += 1
                self._report(result, size, progress)
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

    # what is seen of it

    def _describe(self) -> None:
        save_json(self.folder / "config.json", self.config.as_dict())
        trained, name = sum(parameter.numel() for parameter in self.model.parameters()), self.what.split()[-1]
        self.say(f"{name}: {trained:,} parameters on {self.device}, precision: {self.launch.precision}")
        self.say(f"run: {self.folder}, step {self.step} of {self._total}")

    def _report(self, result: StepResult | None, size: int, progress: ProgressReporter) -> None:
        if result is not None:
            losses = self._add_to_means(result)
            progress.update(losses, samples=size, learning_rate=result.learning_rate)
            self._call("on_step", result.losses)
        self._write_means()

    def _look(self, progress: ProgressReporter) -> None:
        """Validates and samples, where they are due."""
        if self._validates:
            self.figures, line = self._validated()
            self._validated_at = self.step
            self.log.write(self.step, self.figures, prefix="validation/")
            progress.write(f"step {self.step:,}: {line}")
            self._call("on_validation", self.figures)
        self._sample()
        self.log.flush()
