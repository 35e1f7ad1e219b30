"""A small autoencoder for scripts that draw in latents: one that `train_vae.py` has saved, or one that is trained first.

c channels, h height, w width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.autoencoder.objective import AutoencoderObjective
from transfusion_pytorch.autoencoder.trainer import AutoencoderTrainer, describe
from transfusion_pytorch.training.config import TrainConfig

from .data import ImageData

PATCH_SIZES = {28: 2, 8: 1}  # sides of images, in pixels: 7 x 7 latents are left, or 4 x 4
SIZES: dict[str, Any] = dict(widths=(64, 128), num_blocks=(1, 3))
DIM_LATENT = 2
KL_WEIGHT = 3e-3  # what latents leave out need not be learnt by whoever draws them
SCORED = 500  # held-out images


def prepare_autoencoder(
    given: Path | None,
    folder: Path,
    images: ImageData,
    *,
    steps: int,
    seed: int,
    device: torch.device | str | None = None,
    say: Callable[[str], None] = print,
) -> KLAutoencoder:
    """The autoencoder that was saved in `given`; without one, that in `folder`, which is trained first if it is not
    there: for 28 pixels 7 x 7 x 2 numbers, in 90 seconds for 800 steps on one core of a Xeon with AMX.

    Raises `ValueError` for an autoencoder of other images, and without one for images of other sides than 28 and 8.
    """
    shape = tuple(images.train.images.shape[1:])
    saved = given or folder / "model"
    if not saved.is_dir():
        _train(folder, images, steps=steps, seed=seed, device=device, say=say)
    autoencoder: Any = KLAutoencoder.from_pretrained(saved)
    if problem := autoencoder.encoder.layout.problem_of(shape):
        raise ValueError(f"{saved} has no autoencoder of these images: {problem}")
    return autoencoder


def _train(folder: Path, images: ImageData, *, steps: int, seed: int, device: Any, say: Callable[[str], None]) -> None:
    channels, _, side = images.train.images.shape[1:]
    if side not in PATCH_SIZES:
        raise ValueError(f"images have sides of 28 or 8 pixels, got {side}; give an autoencoder of your own")
    torch.manual_seed(seed)
    held_out = Subset(images.test.images, range(min(SCORED, len(images.test.images))))
    trainer = AutoencoderTrainer(
        KLAutoencoder(DIM_LATENT, channels=channels, patch_size=PATCH_SIZES[side], **SIZES),
        images.train.images,
        TrainConfig(
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            weight_decay=0.01,
            ema_beta=None,
            precision="bf16",
            device=None if device is None else str(device),
            seed=seed,
            save_every=0,
        ),
        objective=AutoencoderObjective(kl_weight=KL_WEIGHT),
        folder=folder,
        validation=held_out,
    )
    trainer.fit()
    say(f"autoencoder: {describe(trainer.score(held_out))}")
    trainer.save_pretrained(folder / "model")
