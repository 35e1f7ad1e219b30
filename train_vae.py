"""Learns an autoencoder of images: to few numbers and back, for `Transfusion` to draw in.

python train_vae.py                          # Fashion-MNIST where it is installed, 8x8 digits otherwise
python train_vae.py --data FOLDER --size 64  # a folder of images
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from transfusion_pytorch import (
    AutoencoderObjective,
    AutoencoderTrainer,
    Callback,
    ImageFiles,
    ImageReader,
    KLAutoencoder,
    ModelCard,
    TrainConfig,
)
from transfusion_pytorch.autoencoder.trainer import describe
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.data import FASHION_FOLDER, IMAGE_LOADERS, ImageData, load_images
from transfusion_pytorch.examples.judge import FeatureMaps, train_judge
from transfusion_pytorch.examples.pictures import load_picture, save_curves, save_grid
from transfusion_pytorch.training.config import config_from_arguments
from transfusion_pytorch.training.one_process import FOR_A_TRANSFUSION

DEFAULTS = TrainConfig(
    steps=2400, batch_size=32, learning_rate=2e-3, weight_decay=0.01, ema_beta=None, precision="bf16",
)  # fmt: skip
SHOWN = 16  # images in the pictures
SCORED = 500  # held-out images that are scored while it trains; all are at the end


class Images(NamedTuple):
    """Images of one shape `(c, h, w)` to train on and held-out ones; one phrase on where they came from and why.

    `labelled` are the same with their classes, if they have any.
    """

    train: Any
    held_out: Any
    shape: tuple[int, ...]
    name: str
    source: str
    labelled: ImageData | None = None


def load(args: argparse.Namespace, seed: int) -> Images:
    if args.data is not None and args.dataset is None:
        mode = "L" if args.grey else "RGB"
        files = ImageFiles(args.data, images=ImageReader(args.size, mode, channels_first=True))
        source = f"{len(files)} images of {args.data}, as asked for"
        return Images(*files.hold_out(args.held_out, seed=seed), (len(mode), args.size, args.size), "images", source)
    name = args.dataset or ("fashion" if Path(FASHION_FOLDER).is_dir() else "digits")
    data = load_images(name, args.data)
    return Images(data.train.images, data.test.images, tuple(data.test.images.shape[1:]), data.name, data.source, data)


def objective_of(args: argparse.Namespace, images: Images, config: TrainConfig) -> AutoencoderObjective:
    """With a perceptual term, its feature network is a classifier of these images, which is trained first. Raises
    `ValueError` where they have no classes.
    """
    if args.perceptual_weight < 0:
        raise ValueError(f"--perceptual-weight is not negative, got {args.perceptual_weight}")
    if not args.perceptual_weight:
        return AutoencoderObjective(kl_weight=args.kl_weight)
    if images.labelled is None:
        raise ValueError(
            "--perceptual-weight trains a classifier to compare by, and images of a folder have no classes: leave it "
            "out, or give a network of your own to AutoencoderObjective(features=...)"
        )
    features = FeatureMaps(train_judge(images.labelled, seed=config.seed).judge)
    return AutoencoderObjective(kl_weight=args.kl_weight, features=features, perceptual_weight=args.perceptual_weight)


class Pictures(Callback):
    """Held-out images and, below each, its reconstruction."""

    def on_sample(self, trainer):
        images = next(trainer.in_order(trainer.validation, batch_size=SHOWN))
        rows = torch.cat((images, trainer.average(images).data))
        path = save_grid(trainer.folder / f"step-{trainer.step:05}.png", rows, columns=len(images))
        return {"reconstructions": load_picture(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=run.existing_path, help="folder of images; with --dataset, of its idx files")
    parser.add_argument("--dataset", choices=tuple(IMAGE_LOADERS), help="instead of a folder of images")
    parser.add_argument("--size", type=run.positive_int, default=64, help="side of images of a folder, in pixels")
    parser.add_argument("--grey", action="store_true", help="images of a folder in one channel")
    parser.add_argument("--held-out", type=run.positive_int, default=100, help="images of a folder that are held out")
    parser.add_argument(
        "--dim-latent", type=run.positive_int, default=2, help="channels of a latent (default: %(default)s)"
    )
    parser.add_argument(
        "--widths",
        type=run.positive_int,
        nargs="+",
        default=[64, 128],
        help="hidden channels at each resolution (default: 64 128)",
    )
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[1, 3], help="residual blocks at each resolution (default: 1 3)"
    )
    parser.add_argument(
        "--patch-size",
        type=run.positive_int,
        default=2,
        help="side of the patches of pixels that are joined to channels at the start (default: %(default)s)",
    )
    parser.add_argument("--kl-weight", type=float, default=1e-4, help="of nats for each pixel (default: %(default)s)")
    parser.add_argument(
        "--perceptual-weight", type=float, default=0.0, help="of the distance of feature maps (default: %(default)s)"
    )
    run.add_common_arguments(parser, DEFAULTS, skip=FOR_A_TRANSFUSION)
    args = parser.parse_args()

    config = config_from_arguments(args, DEFAULTS)
    images = load(args, config.seed)
    run.seed_everything(config.seed)
    channels, *sides = images.shape
    sizes = dict(widths=args.widths, num_blocks=args.blocks, patch_size=args.patch_size)
    model = KLAutoencoder(args.dim_latent, channels=channels, **sizes)
    objective = objective_of(args, images, config)
    place = run.open_run(args, f"vae-{images.name}", device=config.device)
    trainer = AutoencoderTrainer(
        model,
        images.train,
        config,
        objective=objective,
        folder=place.folder,
        validation=Subset(images.held_out, range(min(SCORED, len(images.held_out)))),
        callbacks=[Pictures()],
    )
    trainer.say(f"data: {images.source}")
    latent = (*model.latent_shape(sides), args.dim_latent)
    trainer.say(f"images of {' x '.join(map(str, sides))} x {channels} to latents of {' x '.join(map(str, latent))}")
    started = time.monotonic()
    if trainer.fit(resume=place.resume).was_stopped:
        return
    trainer.say(f"trained for {time.monotonic() - started:.0f} s")

    scores = trainer.score(images.held_out)
    card = ModelCard(title="KL autoencoder", training_data=images.source, steps=trainer.step, figures=scores._asdict())
    trainer.save_pretrained(place.folder / "model", card=card)
    curves = run.read_metrics(place.folder)
    save_curves(place.folder / "losses.png", {name: curves[name] for name in ("reconstruction", "kl")}, log=True)
    trainer.say(f"held out, {len(images.held_out)} images: {describe(scores)}")
    trainer.say(f"results in {place.folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run_command(main)
