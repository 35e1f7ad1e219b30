"""`Trainer`: a training run from data to a model that can be kept."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transfusion_pytorch.data.loader import LoadedStep, StepLoader
from transfusion_pytorch.data.order import seed_of
from transfusion_pytorch.display.terminal import print_text
from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.saving.files import save_json
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.checkpoint_files import LoadedCheckpoint
from transfusion_pytorch.training.collate import Packed, PackSeeded
from transfusion_pytorch.training.config import BATCH_SIZE, TrainConfig
from transfusion_pytorch.training.flops import FlopCounter, peak_flops
from transfusion_pytorch.training.launch import Launch, shard
from transfusion_pytorch.training.metrics import LossTable, RunningMeans, describe_bad_batch, means_of
from transfusion_pytorch.training.metrics_file import MetricsFile
from transfusion_pytorch.training.optimizers import create_optimizers
from transfusion_pytorch.training.random_states import random_states, set_random_states
from transfusion_pytorch.training.reporting import ProgressReporter
from transfusion_pytorch.training.run_log import RunLog, describe_run
from transfusion_pytorch.training.sources import idle_batch, open_data
from transfusion_pytorch.training.step import StepResult, TrainStep
from transfusion_pytorch.training.stopping import StopSignals
from transfusion_pytorch.training.trackers import Tracker, create_tracker
from transfusion_pytorch.training.validation import Validation

REPEATED = 10  # problems of samples are told so often, then counted
MOST_LEFT_OUT = 50  # steps in a row, after which a run is not worth going on with


class TrainingError(RuntimeError):
    """A run that stops because a step came out wrong, with the names of the samples in it."""


class Fitted(NamedTuple):
    """How a run ended.

    - `step`: steps that were done, of all
    - `figures`: the last validation losses, or the last training losses without validation data
    - `was_stopped`: by a signal, before the last step
    """

    step: int
    figures: dict[str, float]
    was_stopped: bool


class Trainer:
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
        self.validation: Validation | None = None
        if validation is not None:
            size, skips = min(self.config.batch_size or BATCH_SIZE, 64), self.pack.skips_bad
            plain = replace(packer, token_budget=None, span_budget=None)
            self.validation = Validation(validation, plain, self.launch, batch_size=size, skips_bad=skips)
        self.step, self.figures = 0, dict[str, float]()
        self._prepare_model()
        self._problems: dict[str, int] = {}
        self._left_out = 0  # steps in a row
        self._means, self._validated_at = RunningMeans(), -1

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
        metrics = MetricsFile(self.folder / "metrics.csv", resumed_step=self.step) if self.is_main else None
        tracker = self._tracker()
        self.log = RunLog(metrics, tracker)
        progress = ProgressReporter(
            self._total,
            initial=self.step,
            device=self.launch.device,
            processes=self.launch.size,
            is_main=self.is_main,
        )
        try:
            with StopSignals() as signals, progress:
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
        """Saves the average (`Transfusion.save_pretrained` has the options). All processes must take part."""
        if self.is_main or self.launch.shards:
            self.average.save_pretrained(folder, **options)
        self.launch.wait()

    # preparing

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
            self.model.compile()
        if self.launch.shards and config.optimizer == "muon":
            raise ValueError("Muon needs whole matrices, and FSDP splits them: use adamw, or DDP")
        call = self.launch.wrap(self.model)
        if self.ema is not None and self.launch.shards:
            shard(self.ema.ema_model)
        optimizers = create_optimizers(self.model, config)
        self._train_step = TrainStep(self.model, call, optimizers, self.ema, self.launch, config)
        # counted where it is compared with something
        self._flops = FlopCounter(self.model) if peak_flops(self.launch.device) else None
        self._stand_in: Batch | None = None

    @property
    def _total(self) -> int:
        assert self.config.steps is not None
        return self.config.steps

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self.folder / "checkpoints",
            keep_last=self.config.keep_last,
            keep_best=self.config.keep_best,
            is_main=self.is_main,
        )

    def _tracker(self) -> Tracker | None:
        if self.config.tracker == "none" or not self.is_main:
            return None
        name, config = self.folder.resolve().name, self.config.as_dict()
        return create_tracker(
            self.config.tracker, project=self.config.project, run=name, folder=self.folder, config=config
        )

    def _describe(self) -> None:
        """Says what is about to happen, and writes it down."""
        if self.is_main:
            save_json(self.folder / "config.json", self.config.as_dict())
        for line in describe_run(self.model, self.config, self.launch):
            self.say(line)
        self.say(f"run: {self.folder}, step {self.step} of {self._total}")

    # resuming and saving

    def _resume(self, checkpoints: Checkpoints, resume: bool | str | Path) -> None:
        if resume is False:
            if checkpoints.infos():
                raise FileExistsError(
                    f"{self.folder} has checkpoints of a run: resume it, or give another folder to start anew"
                )
            self._seed()
            return
        loaded = self._found(checkpoints, resume)
        if loaded is None:
            self._seed()
            return
        self._train_step.load_parts(loaded)
        self.loader.load_state(loaded.parts["data"])
        run = loaded.parts["run"]
        self.step, self.figures = loaded.step, dict(run["figures"])
        self._means.load_state(run["means"])
        self._say_changes(run["config"])
        own = loaded.of_rank(self.launch.rank, self.launch.size)
        if own is None:  # the number of processes is another one
            self._seed()
        else:
            set_random_states(own)
        checkpoints.discard_after(loaded.step)

    def _found(self, checkpoints: Checkpoints, resume: bool | str | Path) -> LoadedCheckpoint | None:
        """The checkpoint to go on from, the same for all processes; None where there is none yet."""
        which: Any = "latest" if resume is True else resume
        if Path(which).resolve() in (self.folder.resolve(), checkpoints.folder.resolve()):
            which = "latest"
        try:
            loaded = checkpoints.load(which)
        except FileNotFoundError:
            if resume is not True:
                raise
            loaded = None
        steps = self.launch.all(None if loaded is None else loaded.step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes must share {self.folder}, but find checkpoints of different steps: {steps}, by rank"
            )
        return loaded

    def _say_changes(self, before: Mapping[str, Any]) -> None:
        """Which options are other ones than those of the checkpoint. They hold from here on."""
        now = self.config.as_dict()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            told = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
            self.say(f"resumed with other options: {told}")

    def _seed(self) -> None:
        """What is random beside samples, times and noise: dropout. Every process has its own."""
        torch.manual_seed(seed_of(self.config.seed, "process", self.launch.rank, self.step))

    def _save(self, checkpoints: Checkpoints, data_state: dict[str, Any]) -> None:
        run = {"config": self.config.as_dict(), "figures": self.figures, "means": self._means.state()}
        parts = self._train_step.parts() | {"data": data_state, "run": run}
        per_rank = self.launch.gather(random_states())
        own = self.figures if self._validated_at == self.step else {}  # the best is chosen by its own weights
        path = checkpoints.save(self.step, parts, figures=own, per_rank=per_rank)
        self.launch.wait()
        self._call("on_save", path)

    # the loop

    def _run(self, checkpoints: Checkpoints, progress: ProgressReporter, signals: StopSignals) -> bool:
        """Steps until the last one. Returns whether a signal ended it before."""
        with closing(self._steps()) as steps:  # and with it the data workers
            return self._run_steps(steps, checkpoints, progress, signals)

    def _run_steps(
        self, steps: Iterator[LoadedStep], checkpoints: Checkpoints, progress: ProgressReporter, signals: StopSignals
    ) -> bool:
        for loaded in steps:
            batches = self._batches_of(loaded, progress)
            result = self._train_step(batches, self.step) if batches else None
            self._check(result, batches, progress)
            self.step += 1
            if result is not None:
                self._report(result, batches, progress)
            is_last = self.step == self._total
            stops = self.launch.any(signals.received is not None)
            if self._is_due(self.config.log_every) or is_last:
                means = self._means.read()
                self.log.write(self.step, means)
                self.figures = self.figures if self.validation else means
            self._look(batches, is_last, progress)
            self.log.flush()
            if self._is_due(self.config.save_every) or is_last or stops:
                self._save(checkpoints, loaded.state)
            if stops and not is_last:
                reason = signals.received or "a signal to another process"
                progress.write(f"stopped by {reason}: step {self.step} is saved, and resume goes on from it")
                return True
        return False

    def _steps(self) -> Generator[LoadedStep, None, None]:
        if self.step >= self._total:
            return
        for loaded in self.loader:
            yield loaded
            if self.step >= self._total:
                return

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    def _batches_of(self, loaded: LoadedStep, progress: ProgressReporter) -> list[Batch]:
        """The micro-batches of this process, empty if no process has a sample. Reports what was left out."""
        packs = [packed if packed is not None else Packed(None, []) for packed in loaded.batches]
        skipped = [*loaded.skipped, *(entry for packed in packs for entry in packed.skipped)]
        if self.launch.any(bool(skipped)):
            for reference, reason in (entry for entries in self.launch.gather(skipped) for entry in entries):
                self._tell("left out", f"{reference.source}[{reference.index}]: {reason}", progress)
        batches = [packed.batch for packed in packs if packed.batch is not None]
        missing = len(packs) - len(batches)
        if self.launch.size == 1:
            return batches
        if not self.launch.any(bool(batches)):
            return []
        return batches + [self._idle_batch() for _ in range(missing)]

    def _idle_batch(self) -> Batch:
        if self._stand_in is None:
            self._stand_in = idle_batch(self.model, self.pack.packer)
        return self._stand_in

    def _check(self, result: StepResult | None, batches: Sequence[Batch], progress: ProgressReporter) -> None:
        """Reports a step that was not made, or stops the run."""
        if result is not None and result.is_made:
            self._left_out = 0
            return
        self._left_out += 1
        message = f"step {self.step}: float16 overflowed"
        if result is None:
            message = f"step {self.step}: every sample of it was left out"
        elif result.problem is not None:
            found = self.launch.gather([describe_bad_batch(batch) for batch in batches])
            samples = "; ".join(text for texts in found for text in texts)
            losses = ", ".join(f"{name} {value.item():.4g}" for name, value in result.losses.items())
            message = f"step {self.step}: {result.problem}; losses: {losses}; {samples}"
            if self.config.on_bad_step == "stop":
                raise TrainingError(f"{message}; set on_bad_step='skip' to leave such steps out")
        if self._left_out >= MOST_LEFT_OUT:
            raise TrainingError(f"{message}; {self._left_out} steps in a row were left out, nothing is trained now")
        if result is None or not result.overflowed:
            self._tell("step left out", message, progress)

    def _tell(self, kind: str, message: str, progress: ProgressReporter) -> None:
        times = self._problems[kind] = self._problems.get(kind, 0) + 1
        if times <= REPEATED:
            progress.write(f"{kind}: {message}")
        if times == REPEATED:
            progress.write(f"{kind}: more of these are counted, and no longer told")

    def _report(self, result: StepResult, batches: Sequence[Batch], progress: ProgressReporter) -> None:
        if result.is_made:
            own = {"gradient_norm": result.gradient_norm, "learning_rate": result.learning_rate}
            self._means.add({**result.losses, **own})
        size = self.launch.size
        progress.update(
            result.losses if result.is_made else {},
            tokens=size * sum(batch.num_tokens for batch in batches),
            samples=size * sum(len(batch) for batch in batches),
            flops=0.0 if self._flops is None else size * sum(self._flops(batch).total for batch in batches),
            learning_rate=result.learning_rate,
        )
        self._call("on_step", result.losses)

    def _look(self, batches: Sequence[Batch], is_last: bool, progress: ProgressReporter) -> None:
        """Details, validation and samples, where they are due."""
        if batches and self._is_due(self.config.details_every):
            self.log.write(self.step, self._details(batches), prefix="details/")
        if self.validation is not None and (self._is_due(self.config.validate_every) or is_last):
            figures = self.validate()
            self.figures, self._validated_at = figures, self.step
            self.log.write(self.step, figures, prefix="validation/")
            told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            progress.write(f"step {self.step:,}: validation {told}")
            self._call("on_validation", figures)
        if self._is_due(self.config.sample_every) or is_last:
            for callback in self.callbacks:
                with evaluating(self.average):
                    seen = callback.on_sample(self)
                images = {name: value for name, value in (seen or {}).items() if getattr(value, "ndim", 0)}
                numbers = {name: float(value) for name, value in (seen or {}).items() if name not in images}
                self.log.write(self.step, numbers, prefix="samples/")
                self.log.track(self.step, {f"samples/{name}": image for name, image in images.items()})

    def _details(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Losses by modality, source and quarter of the times, of this step's samples, for the main process."""
        table = LossTable(self.model.num_modalities)
        with evaluating(self.model), self.launch.autocast():
            for batch in batches:
                is_idle, batch = batch is self._stand_in, batch.to(self.launch.device)
                spans, rows = (self.model(batch, reduction=reduction) for reduction in ("span", "none"))
                if not is_idle:
                    table.add_spans(spans)
                    table.add_text(rows, batch)
        return means_of(*self.launch.gather(table.read_sums()))

    def _call(self, name: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, *details)
