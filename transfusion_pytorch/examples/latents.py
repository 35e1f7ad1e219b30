"""A small autoencoder for scripts that draw in latents: one that `train_vae.py` has saved, or one trained first.

c channels, h height, w width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.autoencoder.objective import AutoencoderObjective
from transfusion_pytorch.autoencoder.trainer import AutoencoderTrainer, describe
from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.launch import Launch

from .data import ImageData

PATCH_SIZES = {28: 2, 8: 1}  # sides of images, in pixels: 7 x 7 latents are left, or 4 x 4
SIZES: dict[str, Any] = dict(widths=(64, 128), num_blocks=(1, 3))
DIM_LATENT = 2
KL_WEIGHT = 3e-3  # what latents leave out need not be learned by whoever draws them
SCORED = 500  # held-out images


def prepare_autoencoder(
    given: Path | None, folder: Path, images: ImageData, *, steps: int, config: TrainConfig
) -> KLAutoencoder | None:
    """The autoencoder that was saved in `given`; without one, that in `folder`, which is trained first if it is not
    there: for 28 pixels 7 x 7 x 2 numbers, in 90 seconds for 800 steps on one core of a Xeon with AMX. None where that
    was stopped. Afterwards it is in `folder` in any case, so that a run goes on with the same one.

    `config` is that of the run: its seed, device and precision. Raises `ValueError` for an autoencoder of other images,
    without one for images of other sides than 28 and 8, and in several processes, which have to be given one.
    """
    shape, saved, launch = tuple(images.train.images.shape[1:]), folder / "model", Launch(device=config.device)
    if launch.from_main(saved.is_dir):
        return _checked(saved, shape)
    if given is not None:
        autoencoder = _checked(given, shape)
        launch.from_main(lambda: autoencoder.save_pretrained(saved))
        return autoencoder
    if launch.size > 1:
        raise ValueError("an autoencoder is trained by one process: run train_vae.py first, and give --autoencoder")
    return _checked(saved, shape) if _train(folder, images, steps=steps, config=config) else None


def _checked(folder: Path, shape: Sequence[int]) -> KLAutoencoder:
    autoencoder: Any = KLAutoencoder.from_pretrained(folder)
    if problem := autoencoder.encoder.layout.problem_of(shape):
        raise ValueError(f"{folder} has no autoencoder of these images: {problem}")
    return autoencoder


def _train(folder: Path, images: ImageData, *, steps: int, config: TrainConfig) -> bool:
    """Whether it came to its end."""
    channels, _, side = images.train.images.shape[1:]
    if side not in PATCH_SIZES:
        raise ValueError(f"images have sides of 28 or 8 pixels, got {side}; give an autoencoder of your own")
    torch.manual_seed(config.seed)
    own = TrainConfig(
        steps=steps,
        batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.01,
        ema_beta=None,
        precision=config.precision,
        device=config.device,
        seed=config.seed,
    )
    trainer = AutoencoderTrainer(
        KLAutoencoder(DIM_LATENT, channels=channels, patch_size=PATCH_SIZES[side], **SIZES),
        images.train.images,
        own,
        objective=AutoencoderObjective(kl_weight=KL_WEIGHT),
        folder=folder,
        validation=images.test.images[:SCORED],
    )
    if trainer.fit(resume=(folder / "checkpoints").is_dir()).was_stopped:
        return False
    trainer.say(f"autoencoder: {describe(trainer.score())}")
    trainer.save_pretrained(folder / "model")
    return True
