"""What training runs share, whatever they train: steps, checkpoints, a log, callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transfusion_pytorch.display.terminal import print_text
from transfusion_pytorch.training.callbacks import Callback, sampled
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.metrics import RunningMeans
from transfusion_pytorch.training.resuming import changed_options, find_checkpoint, set_randomness
from transfusion_pytorch.training.step import OptimizerStep, StepResult


class Fitted(NamedTuple):
    """How a run ended.

    - `step`: steps that were done, of all
    - `figures`: the last validation losses, or the last training losses without validation data
    - `was_stopped`: by a signal, before the last step
    """

    step: int
    figures: dict[str, float]
    was_stopped: bool


class TrainingRun:
    """The base of all trainers, which set these attributes.

    - `step`: how many are done; `figures`: those that a checkpoint is judged by, `_validated_at` the step they are of
    - `loader`: the data, and where in them the run stands; `_train_step`: makes a step, and has what it changes
    """

    launch: Launch
    model: Any
    ema: Any
    config: TrainConfig
    folder: Path
    callbacks: Sequence[Callback]
    validation: Any
    loader: Any
    log: Any
    step: int
    figures: dict[str, float]
    _means: RunningMeans
    _validated_at: int
    _train_step: OptimizerStep

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.launch.is_main

    @property
    def average(self) -> Any:
        """The model that is sampled from and validated: the moving average, or what is trained if there is none."""
        return self.model if self.ema is None else self.ema.ema_model

    @property
    def device(self) -> torch.device:
        return self.launch.device

    def say(self, message: str) -> None:
        """Prints on the main process."""
        if self.is_main:
            print_text(message, flush=True)

    # where it stands

    @property
    def _total(self) -> int:
        assert self.config.steps is not None
        return self.config.steps

    @property
    def _is_last(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self._total

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    # resuming and saving

    def _resume(self, checkpoints: Checkpoints, resume: bool | str | Path) -> None:
        loaded = find_checkpoint(checkpoints, self.folder, resume, self.launch)
        if loaded is not None:
            self._train_step.load_parts(loaded)
            self.loader.load_state(loaded.parts["data"])
            run = loaded.parts["run"]
            self.step, self.figures = loaded.step, dict(run["figures"])
            self._means.load_state(run["means"])
            if changed := changed_options(run["config"], self.config.as_dict()):
                self.say(f"resumed with other options: {changed}")
            checkpoints.discard_after(loaded.step)
        set_randomness(loaded, self.launch, seed=self.config.seed, step=self.step)

    def _parts(self, data_state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds."""
        run = {"config": self.config.as_dict(), "figures": self.figures, "means": self._means.state()}
        return self._train_step.parts() | {"data": data_state, "run": run}

    @property
    def _own_figures(self) -> dict[str, float]:
        """Those of the weights as they are: the best checkpoint is chosen by its own."""
        return self.figures if self._validated_at == self.step else {}

    # what is seen of it

    def _add_to_means(self, result: StepResult) -> dict[str, Any]:
        """Counts a step that was made. Returns the losses that the progress shows."""
        if not result.is_made:
            return {}
        own = {"gradient_norm": result.gradient_norm, "learning_rate": result.learning_rate}
        self._means.add({**result.losses, **own})
        return result.losses

    def _write_means(self) -> None:
        """To the log, every few steps. Without validation data they are the figures of the run."""
        if self._is_due(self.config.log_every) or self._is_last:
            means = self._means.read()
            self.log.write(self.step, means)
            self.figures = self.figures if self.validation is not None else means

    def _sample(self) -> None:
        """What callbacks have to show, where it is due."""
        if self._is_due(self.config.sample_every) or self._is_last:
            figures, images = sampled(self.callbacks, self)
            self.log.write(self.step, figures, prefix="samples/")
            self.log.track(self.step, {f"samples/{name}": image for name, image in images.items()})

    @property
    def _validates(self) -> bool:
        """Whether a validation is due."""
        return self.validation is not None and (self._is_due(self.config.validate_every) or self._is_last)

    def _call(self, name: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, *details)
