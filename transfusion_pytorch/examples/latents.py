"""A small autoencoder for scripts that draw in latents: one that `train_vae.py` has saved, or one that is trained first.

c channels, h height, w width.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.autoencoder.objective import AutoencoderObjective
from transfusion_pytorch.autoencoder.trainer import AutoencoderTrainer, describe
from transfusion_pytorch.training.config import TrainConfig

from .data import ImageData

SIDES = {28: 7, 8: 2}  # pixels of an image: those of a patch, so that 4 x 4 latents are left
DIM_LATENT = 8
KL_WEIGHT = 1e-2  # high: what the latents leave out need not be learnt by whoever draws them
SCORED = 500  # held-out images


def prepare_autoencoder(
    given: Path | None, folder: Path, images: ImageData, *, steps: int, seed: int, say: Any = print
) -> KLAutoencoder:
    """The autoencoder of the folder `given`; without one, that in `folder`, which is trained first if it is not there:
    4 x 4 latents of 8 numbers, 75 seconds on one core of a Xeon for 800 steps.

    Raises `ValueError` for images of other sides than 28 and 8, and for an autoencoder of other images.
    """
    shape = tuple(images.train.images.shape[1:])
    if given is not None:
        model: Any = KLAutoencoder.from_pretrained(given)
        if problem := model.encoder.layout.problem_of(shape):
            raise ValueError(f"{given} is no autoencoder of these images: {problem}")
        return model
    saved = folder / "model"
    if saved.is_dir():
        return KLAutoencoder.from_pretrained(saved)
    if shape[-1] not in SIDES:
        raise ValueError(f"images have sides of 28 or 8 pixels, got {shape}; give an autoencoder of your own")
    torch.manual_seed(seed)
    model = KLAutoencoder(DIM_LATENT, channels=shape[0], widths=(128,), num_blocks=(4,), patch_size=SIDES[shape[-1]])
    config = TrainConfig(
        steps=steps, batch_size=64, learning_rate=2e-3, weight_decay=0.01, ema_beta=None, precision="bf16", seed=seed
    )
    held_out = Subset(images.test.images, range(min(SCORED, len(images.test.images))))
    trainer = AutoencoderTrainer(
        model,
        images.train.images,
        config,
        objective=AutoencoderObjective(kl_weight=KL_WEIGHT),
        folder=folder,
        validation=held_out,
    )
    trainer.fit()
    say(f"autoencoder: {describe(trainer.score(held_out))}")
    trainer.save_pretrained(saved)
    return KLAutoencoder.from_pretrained(saved)
