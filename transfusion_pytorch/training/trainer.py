"""`Trainer`: a training run from data to a model that can be kept."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from transfusion_pytorch.data.loader import LoadedStep, StepLoader
from transfusion_pytorch.saving.adapters import inner_model, is_adapted, save_adapter
from transfusion_pytorch.saving.files import save_json
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.training.agreement import StepAgreement
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.collate import PackSeeded
from transfusion_pytorch.training.config import BATCH_SIZE, TrainConfig
from transfusion_pytorch.training.details import losses_in_detail
from transfusion_pytorch.training.flops import FlopCounter, peak_flops
from transfusion_pytorch.training.launch import Launch, shard, whole_model_state
from transfusion_pytorch.training.metrics import RunningMeans
from transfusion_pytorch.training.optimizers import create_optimizers
from transfusion_pytorch.training.problems import Problems, TrainingError
from transfusion_pytorch.training.random_states import random_states
from transfusion_pytorch.training.reporting import ProgressReporter
from transfusion_pytorch.training.run import Fitted, TrainingRun
from transfusion_pytorch.training.run_log import describe_run, open_log
from transfusion_pytorch.training.sources import open_data
from transfusion_pytorch.training.step import StepResult, TrainStep
from transfusion_pytorch.training.stopping import StopSignals
from transfusion_pytorch.training.validation import Validation

__all__ = ["Fitted", "Trainer", "TrainingError"]


class Trainer(TrainingRun):
    """Trains a `Transfusion` on one process or many.

    `data` is a dataset of samples, a list of them, or a `Mixture`; `validation` is one of these. Everything is written
    to `folder`: `config.json`, `metrics.csv` and `checkpoints/`. Start it by itself, or on several processes with
    `accelerate launch`: a step sees the same samples either way, with the same times and noise.

    `callbacks` see the run and add to it (`Callback`). The model is moved to its device and trained in place;
    `average` is its EMA, if there is one. `packer` replaces `model.packer()`, for its options. Data that can only be
    iterated over are read as a stream (`StreamLoader`), whose items `prepare(item, generator)` makes samples of.

    A run of `Trainer` goes like this:

        trainer = Trainer(model, samples, TrainConfig(steps=10_000), validation=held_out)
        trainer.fit(resume=True)
        trainer.save_pretrained("model")

    Raises `ImportError` without accelerate (the extra `train`), and `ValueError` for options that do not fit.
    """

    _train_step: TrainStep

    def __init__(
        self,
        model: Any,
        data: Any,
        config: TrainConfig,
        *,
        folder: str | Path = "run",
        validation: Any = None,
        callbacks: Sequence[Callback] = (),
        packer: Any = None,
        prepare: Callable[..., Any] | None = None,
    ) -> None:
        self.launch = Launch(device=config.device, precision=config.precision)
        self.model, self.folder, self.callbacks = model.to(self.launch.device), Path(folder), tuple(callbacks)
        budget = config.token_budget if config.compile or self.launch.device.type == "cuda" else None
        packer = model.packer() if packer is None else packer
        if budget is not None and packer.token_budget is None:
            packer = replace(packer, token_budget=budget)
        self.pack = PackSeeded(packer, config.seed, skips_bad=config.on_bad_sample == "skip")
        self.loader, self.config = open_data(data, config, self.pack, self.launch, prepare)
        self.validation = self._validation(validation, packer)
        self.step, self.figures = 0, dict[str, float]()
        self._prepare_model()
        self._agree = StepAgreement(model, packer, self.launch)
        self._means, self._validated_at = RunningMeans(), -1

    def fit(self, *, resume: bool | str | Path = False) -> Fitted:
        """Trains until the last step, or until Ctrl-C or SIGTERM, after which it can be resumed.

        `resume=True` goes on from the latest checkpoint of the folder, if there is one; a path goes on from that
        checkpoint, and later ones are removed. Otherwise the run starts, in a folder without checkpoints. Options that
        do not change the order of the samples may be other ones than before, and hold from then on.

        Raises `TrainingError` where `on_bad_step` is "stop", `SampleError` for a sample that cannot be loaded,
        `FileExistsError` for a folder that holds another run, and whatever `Checkpoints` raises.
        """
        checkpoints = self._checkpoints()
        self._resume(checkpoints, resume)
        self._describe()
        self.log = open_log(self.folder, self.config, resumed_step=self.step, is_main=self.is_main)
        try:
            with StopSignals() as signals, self._progress() as progress:
                self._call("on_start")
                was_stopped = self._run(checkpoints, progress, signals)
                self._call("on_end")
        finally:
            self.log.close()
        return Fitted(self.step, dict(self.figures), was_stopped)

    @property
    def fill(self) -> float | None:
        """The mean share of the token budget that samples have filled so far; None where they are not packed."""
        return self.loader.plan.fill if isinstance(self.loader, StepLoader) else None

    def validate(self) -> dict[str, float]:
        """Losses of the validation data with the average, at fixed times and noise. All processes must take part."""
        if self.validation is None:
            raise ValueError("there is no validation data: give Trainer(..., validation=...)")
        return self.validation(self.average)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Saves the average (`Transfusion.save_pretrained` has the options). All processes must take part.

        Of a `PeftModel`, its adapter is saved, with the numbers of the average: `PeftModel.from_pretrained` loads it.
        Raises `TypeError` for options then, since the model that it adapts has its card and tokenizer.
        """
        if is_adapted(self.model):
            average = inner_model(self.average)
            state = whole_model_state(average) if self.is_main or self.launch.shards else {}
            save_adapter(self.model, folder, state, is_main=self.is_main, **options)
        elif self.is_main or self.launch.shards:
            self.average.save_pretrained(folder, **options)
        self.launch.wait()

    # preparing

    def _validation(self, data: Any, packer: Any) -> Validation | None:
        if data is None:
            return None
        size, skips = min(self.config.batch_size or BATCH_SIZE, 64), self.pack.skips_bad
        plain = replace(packer, token_budget=None, span_budget=None)
        return Validation(data, plain, self.launch, batch_size=size, skips_bad=skips)

    def _prepare_model(self) -> None:
        config = self.config
        self.launch.synchronise(self.model)
        self.model.train()
        if config.checkpointing != "none":
            self.model.gradient_checkpointing_enable(True if config.checkpointing == "full" else config.checkpointing)
        self.ema: Any = None
        if config.ema_beta is not None:
            every = dict(update_every=config.ema_every, update_after_step=config.ema_start)
            self.ema = self.model.create_ema(beta=config.ema_beta, **every)
        if config.compile:
            inner_model(self.model).compile()
        if self.launch.shards and config.optimizer == "muon":
            raise ValueError("Muon needs whole matrices, and FSDP splits them: use adamw, or DDP")
        call = self.launch.wrap(self.model)
        if self.ema is not None and self.launch.shards:
            shard(self.ema.ema_model)
        optimizers = create_optimizers(self.model, config)
        self._train_step = TrainStep(self.model, call, optimizers, self.ema, self.launch, config)
        # counted where it is compared with something
        self._flops = FlopCounter(inner_model(self.model)) if peak_flops(self.launch.device) else None

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self.folder / "checkpoints",
            keep_last=self.config.keep_last,
            keep_best=self.config.keep_best,
            is_main=self.is_main,
        )

    def _progress(self) -> ProgressReporter:
        launch = self.launch
        return ProgressReporter(
            self._total, initial=self.step, device=launch.device, processes=launch.size, is_main=launch.is_main
        )

    def _describe(self) -> None:
        """Says what is about to happen, and writes it down."""
        if self.is_main:
            save_json(self.folder / "config.json", self.config.as_dict())
        for line in describe_run(self.model, self.config, self.launch):
            self.say(line)
        self.say(f"run: {self.folder}, step {self.step} of {self._total}")

    def _save(self, checkpoints: Checkpoints, data_state: dict[str, Any]) -> None:
        parts, per_rank = self._parts(data_state), self.launch.gather(random_states())
        path = checkpoints.save(self.step, parts, figures=self._own_figures, per_rank=per_rank)
        self.launch.wait()
        self._call("on_save", path)

    # the loop

    def _run(self, checkpoints: Checkpoints, progress: ProgressReporter, signals: StopSignals) -> bool:
        """Steps until the last one. Returns whether a signal ended it before."""
        problems = Problems(self.launch, progress, stops=self.config.on_bad_step == "stop")
        with closing(self._steps()) as steps:  # and with it the data workers
            for loaded in steps:
                batches, skipped, agreement = self._agree(loaded, is_stopped=signals.received is not None)
                if agreement.has_skipped:
                    problems.report_skipped(skipped)
                result = self._train_step(batches, self.step, agreement) if batches else None
                problems.check(self.step, result, batches)
                self.step += 1
                self._report(result, batches, progress)
                self._look(batches, progress)
                # several processes have asked each other before the step
                stops = signals.received is not None if self.launch.size == 1 else agreement.is_stopped
                if self._is_due(self.config.save_every) or self._is_last or stops:
                    self._save(checkpoints, loaded.state)
                if stops and not self._is_last:
                    reason = signals.received or "a signal to another process"
                    progress.write(f"stopped by {reason}: step {self.step} is saved, and resume goes on from it")
                    return True
        return False

    def _steps(self) -> Generator[LoadedStep, None, None]:
        if self._is_last:
            return
        for loaded in self.loader:
            yield loaded
            if self._is_last:
                return

    # what is seen of it

    def _report(self, result: StepResult | None, batches: Sequence[Batch], progress: ProgressReporter) -> None:
        """To the progress, to callbacks, and every few steps to the log."""
        if result is not None:
            size = self.launch.size
            progress.update(
                self._add_to_means(result),
                tokens=size * sum(batch.num_tokens for batch in batches),
                samples=size * sum(len(batch) for batch in batches),
                flops=0.0 if self._flops is None else size * sum(self._flops(batch).total for batch in batches),
                learning_rate=result.learning_rate,
            )
            self._call("on_step", result.losses)
        self._write_means()

    def _look(self, batches: Sequence[Batch], progress: ProgressReporter) -> None:
        """Details, validation and samples, where they are due."""
        if batches and self._is_due(self.config.details_every):
            losses = losses_in_detail(self.model, batches, self.launch, idle=self._agree.idle)
            self.log.write(self.step, losses, prefix="details/")
        if self._validates:
            figures = self.validate()
            self.figures, self._validated_at = figures, self.step
            self.log.write(self.step, figures, prefix="validation/")
            told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            progress.write(f"step {self.step:,}: validation {told}")
            self._call("on_validation", figures)
        self._sample()
        self.log.flush()
