"""`AutoencoderTrainer`: a run that trains a `KLAutoencoder`, from the parts of which `Trainer` is made."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.autoencoder.batches import Stack, Stacked, in_order, steps_in, training_steps
from transfusion_pytorch.autoencoder.halves import measure_scale
from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.autoencoder.objective import AutoencoderObjective
from transfusion_pytorch.autoencoder.scores import Scores, score
from transfusion_pytorch.data.loader import LoadedStep
from transfusion_pytorch.data.order import seed_of
from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.modalities.autoencoder import drawing_from
from transfusion_pytorch.saving.files import save_json
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
NOT_FOR_AUTOENCODERS = (
    *("accumulation", "token_budget", "packs_per_step", "optimizer", "muon_learning_rate", "velocity_consistency"),
    *("checkpointing", "compile", "details_every"),
)
SCORE_SEED = 20_240_820  # of the posteriors that are sampled in scores, whatever the seed of the training
SCORE_BATCH = 250
SCALE_BATCHES = 8  # of so many of those the scale of latents is measured


class AutoencoderTrainer(TrainingRun):
    """Trains a `KLAutoencoder` in one process.

    `data` and `validation` are tensors `(n, channels, *axes)` in [-1, 1], or lists or datasets of tensors. Files and
    options are those of `Trainer` (`config.json`, `metrics.csv`, `checkpoints/`), but for the options in
    `NOT_FOR_AUTOENCODERS`. Best is the checkpoint of the highest PSNR. A run that is resumed goes on bit for bit.

        trainer = AutoencoderTrainer(KLAutoencoder(2, channels=1), images, TrainConfig(steps=3000), validation=held_out)
        trainer.fit(resume=True)
        trainer.save_pretrained("autoencoder")

    After the last step the scale of the latents is measured on the data, so that they leave the encoder with mean 0 and
    standard deviation 1.

    Raises `ValueError` for options that have no meaning here, and for several processes.
    """

    def __init__(
        self,
        model: KLAutoencoder,
        data: Any,
        config: TrainConfig,
        *,
        objective: AutoencoderObjective | None = None,
        folder: str | Path = "run",
        validation: Any = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_options(config)
        self.launch = Launch(device=config.device, precision=config.precision)
        if self.launch.size > 1:
            raise ValueError(f"an autoencoder is trained by one process, got {self.launch.size}")
        self.model, self.folder, self.callbacks = model.to(self.device), Path(folder), tuple(callbacks)
        self.objective = (AutoencoderObjective() if objective is None else objective).to(self.device)
        self.data, self.validation = data, validation
        size = config.batch_size or BATCH_SIZE
        steps = None if config.epochs is None else steps_in(data, epochs=config.epochs, batch_size=size)
        self.config = config.resolved(steps)
        self.stack = Stack(model.encoder.layout, skips_bad=config.on_bad_sample == "skip")
        loading = dict(num_workers=config.num_workers, pin_memory=self.device.type == "cuda")
        self.loader = training_steps(data, self.stack, batch_size=size, seed=config.seed, **loading)
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
            self.folder / "checkpoints",
            keep_last=self.config.keep_last,
            keep_best=self.config.keep_best,
            metric="psnr",
            higher_is_better=True,
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
                    self.measure_scale()
                self._call("on_end")
        finally:
            self.log.close()
        return Fitted(self.step, dict(self.figures), was_stopped)

    def score(self, data: Any = None) -> Scores:
        """Scores of the average, by default on the validation data. Posteriors are sampled with a fixed seed."""
        data = self.validation if data is None else data
        if data is None:
            raise ValueError("there is no validation data: give AutoencoderTrainer(..., validation=...)")
        generator = torch.Generator().manual_seed(SCORE_SEED)
        with self.launch.autocast():
            return score(self.average, self.in_order(data), generator=generator)

    def measure_scale(self) -> None:
        """Measures the latents of the first data, and keeps the scale in the halves of the average."""
        batches = islice(self.in_order(self.data), SCALE_BATCHES)
        seeded = drawing_from(torch.Generator().manual_seed(SCORE_SEED))
        with evaluating(self.average), self.launch.autocast(), seeded:
            measure_scale(self.average.encoder, self.average.decoder, batches)

    def in_order(self, data: Any, *, batch_size: int = SCORE_BATCH) -> Iterator[Tensor]:
        """Batches of data in their order, on the device."""
        return in_order(data, self.stack, batch_size=batch_size, device=self.device)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Saves the average (`KLAutoencoder.save_pretrained` has the options)."""
        self.average.save_pretrained(folder, **options)

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
                    self._save(checkpoints, loaded.state)
                if self._is_last:
                    return False
                if signals.received:
                    progress.write(f"stopped by {signals.received}: step {self.step} is saved")
                    return True
        return False

    def _take(self, loaded: LoadedStep, problems: Problems) -> tuple[StepResult | None, int]:
        """Trains on a batch, and returns how many instances it has; 0 where all of them were left out."""
        (stacked,) = loaded.batches
        stacked = Stacked(None, []) if stacked is None else stacked
        if skipped := [*loaded.skipped, *stacked.skipped]:
            problems.report_skipped(skipped)
        result = None
        if stacked.data is not None:
            result = self._train_step.make(self.step, partial(self._gradients, stacked.data.to(self.device)))
        problems.check(self.step, result, ())
        return result, 0 if stacked.data is None else len(stacked.data)

    def _gradients(self, data: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "posterior", self.step))
        with self.launch.autocast():
            losses = self.objective(self.model, data, generator=generator)
        self._train_step.scaler.scale(losses.total).backward()
        named = {"loss": losses.total, "reconstruction": losses.reconstruction, "kl": losses.kl}
        named |= {} if self.objective.features is None else {"perceptual": losses.perceptual}
        return {name: loss.detach() for name, loss in named.items()}

    # what is seen of it

    def _describe(self) -> None:
        save_json(self.folder / "config.json", self.config.as_dict())
        trained = sum(parameter.numel() for parameter in self.model.parameters())
        self.say(f"autoencoder: {trained:,} parameters on {self.device}, precision: {self.launch.precision}")
        self.say(f"run: {self.folder}, step {self.step} of {self._total}")

    def _report(self, result: StepResult | None, size: int, progress: ProgressReporter) -> None:
        if result is not None:
            losses = self._add_to_means(result)
            progress.update(losses, samples=size, learning_rate=result.learning_rate)
            self._call("on_step", result.losses)
        self._write_means()

    def _look(self, progress: ProgressReporter) -> None:
        """Scores and samples, where they are due."""
        if self._validates:
            self.figures, self._validated_at = self.score()._asdict(), self.step
            self.log.write(self.step, self.figures, prefix="validation/")
            progress.write(f"step {self.step:,}: {describe(Scores(**self.figures))}")
            self._call("on_validation", self.figures)
        self._sample()
        self.log.flush()

    def _save(self, checkpoints: Checkpoints, data_state: dict[str, Any]) -> None:
        self._call("on_save", checkpoints.save(self.step, self._parts(data_state), figures=self._own_figures))


def check_options(config: TrainConfig) -> None:
    """Raises `ValueError` for options that are set and have no meaning for an autoencoder."""
    defaults = {spec.name: spec.default for spec in fields(TrainConfig)}
    wrong = [name for name in NOT_FOR_AUTOENCODERS if getattr(config, name) != defaults[name]]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be set for an autoencoder: leave out what is for a Transfusion")


def describe(scores: Scores) -> str:
    """Scores as a line."""
    return (
        f"PSNR {scores.psnr:.2f} dB ({scores.psnr_of_samples:.2f} dB behind samples), SSIM {scores.ssim:.4f}, "
        f"rate {scores.nats:.1f} nats = {scores.bits:.1f} bits for each, {scores.bits_per_latent_number:.2f} bits for "
        "each number of a latent"
    )
