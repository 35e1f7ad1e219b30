"""`AutoencoderTrainer`: a run that trains a `KLAutoencoder`, from the parts of which `Trainer` is made."""

from collections.abc import Iterator, Sequence
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
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.config import BATCH_SIZE, TrainConfig
from transfusion_pytorch.training.one_process import FOR_A_TRANSFUSION, OneProcessRun
from transfusion_pytorch.training.problems import Problems
from transfusion_pytorch.training.step import StepResult

SCORE_SEED = 20_240_820  # of the posteriors that are sampled in scores, whatever the seed of the training
SCORE_BATCH = 250
SCALE_BATCHES = 8  # of so many of those the scale of latents is measured


class AutoencoderTrainer(OneProcessRun):
    """Trains a `KLAutoencoder` in one process.

    `data` and `validation` are tensors `(n, channels, *axes)` in [-1, 1], or lists or datasets of tensors. Files and
    options are those of `Trainer` (`config.json`, `metrics.csv`, `checkpoints/`), but for the options in
    `FOR_A_TRANSFUSION`. Best is the checkpoint of the highest PSNR. A run that is resumed goes on bit for bit.

        trainer = AutoencoderTrainer(KLAutoencoder(2, channels=1), images, TrainConfig(steps=3000), validation=held_out)
        trainer.fit(resume=True)
        trainer.save_pretrained("autoencoder")

    After the last step the scale of the latents is measured on the data, so that they leave the encoder with mean 0 and
    standard deviation 1.

    Raises `ValueError` for options that have no meaning here, and for several processes.
    """

    what, not_for_it, best = "an autoencoder", FOR_A_TRANSFUSION, ("psnr", True)

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
        self._open(model, config, folder, callbacks)
        self.objective = (AutoencoderObjective() if objective is None else objective).to(self.device)
        self.data, self.validation = data, validation
        size = config.batch_size or BATCH_SIZE
        steps = None if config.epochs is None else steps_in(data, epochs=config.epochs, batch_size=size)
        self.config = config.resolved(steps)
        self.stack = Stack(model.encoder.layout, skips_bad=config.on_bad_sample == "skip")
        loading = dict(num_workers=config.num_workers, pin_memory=self.device.type == "cuda")
        self.loader = training_steps(data, self.stack, batch_size=size, seed=config.seed, **loading)
        self._prepare()

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

    # a step, and what is done beside the steps

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

    def _validated(self) -> tuple[dict[str, float], str]:
        scores = self.score()
        return scores._asdict(), describe(scores)

    def _finish(self) -> None:
        self.measure_scale()


def describe(scores: Scores) -> str:
    """Scores as a line."""
    return (
        f"PSNR {scores.psnr:.2f} dB ({scores.psnr_of_samples:.2f} dB behind samples), SSIM {scores.ssim:.4f}, "
        f"rate {scores.nats:.1f} nats = {scores.bits:.1f} bits for each, {scores.bits_per_latent_number:.2f} bits for "
        "each number of a latent"
    )
