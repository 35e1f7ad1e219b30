"""Learns to draw and to caption small images in one model, and has an independent judge score the drawings.

python train_mnist.py                     # 8x8 handwritten digits that ship with scikit-learn, both tasks
python train_mnist.py --dataset fashion   # 28x28 Fashion-MNIST (Debian package dataset-fashion-mnist)
python train_mnist.py --dataset mnist     # from a folder of idx files (--data) or a download
accelerate launch train_mnist.py          # on every GPU
"""

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion_pytorch import Callback, ModelCard, TrainConfig, Trainer, Transfusion
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.data.images import patchify, unpatchify
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.data import IMAGE_LOADERS, LabelledImages, load_images
from transfusion_pytorch.examples.judge import recognised, train_judge
from transfusion_pytorch.examples.pairs import TASKS, LabelImagePairs
from transfusion_pytorch.examples.pictures import load_picture, save_curves, save_grid
from transfusion_pytorch.training.config import config_from_arguments


class Recipe(NamedTuple):
    """What suits a data set, on two CPU cores."""

    config: TrainConfig
    patch: int
    dim: int
    depth: int
    heads: int = 4
    flow_loss_weight: float = 5.0  # as in the Transfusion paper


LARGER = Recipe(TrainConfig(steps=4000, batch_size=32, learning_rate=2e-3), patch=4, dim=96, depth=5)
RECIPES = {
    "digits": Recipe(
        TrainConfig(steps=2000, batch_size=64, learning_rate=2e-3), patch=2, dim=64, depth=4, flow_loss_weight=2.0
    ),
    "mnist": LARGER,
    "fashion": LARGER,
}


def build_model(shape: tuple[int, ...], num_classes: int, recipe: Recipe) -> Transfusion:
    *axes, channels = shape
    return Transfusion(
        num_text_tokens=num_classes,  # one word for each class
        dim_latent=channels,
        modality_default_shape=tuple(axes),
        flow_loss_weight=recipe.flow_loss_weight,
        transformer=dict(dim=recipe.dim, depth=recipe.depth, heads=recipe.heads, dim_head=recipe.dim // recipe.heads),
    )


class Artist(NamedTuple):
    """How images are drawn and named: `shape` is that of one in patches, (h / p, w / p, c p p)."""

    shape: tuple[int, ...]
    patch: int
    cfg_scale: float
    steps: int

    def draw(self, model, labels: Tensor) -> Tensor:
        """An image (c, h, w) for each label, blank where there is none of the right shape.

        The model itself writes that an image comes, and how large it is.
        """
        length = self.shape[0] * self.shape[1] + 32  # of the image, and more than enough for what stands around it
        options = dict(max_length=length, cfg_scale=self.cfg_scale, modality_steps=self.steps)
        samples = model.sample_many(list(labels), **options)
        first = [next((part[1] for part in sample if isinstance(part, tuple)), torch.empty(0)) for sample in samples]
        latents = [image.cpu() if image.shape == self.shape else torch.zeros(self.shape) for image in first]
        return unpatchify(torch.stack(latents), self.patch)

    def caption(self, model, images: Tensor) -> Tensor:
        """The word that the model writes after each image, -1 where it writes none."""
        latents = patchify(images, self.patch)
        length = latents[0, ..., 0].numel() + 16
        samples = model.sample_many(list(latents), max_length=length, text_temperature=0.0)
        return torch.stack([sample[2][1] if len(sample[2]) > 1 else torch.tensor(-1) for sample in samples]).cpu()


class Grids(Callback):
    """Every class twice, as a picture in the run's folder and for the tracker."""

    def __init__(self, artist: Artist, class_names: list[str]):
        self.artist, self.class_names = artist, class_names

    def on_sample(self, trainer):
        labels = torch.arange(len(self.class_names)).repeat(2)
        images = self.artist.draw(trainer.average, labels)
        if not trainer.is_main:
            return {}
        names = [self.class_names[label] for label in labels]
        return {"drawings": load_picture(save_grid(trainer.folder / f"step-{trainer.step:05}.png", images, names))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=tuple(IMAGE_LOADERS), default="digits")
    parser.add_argument("--data", type=run.existing_path, help="folder of idx files, for mnist and fashion")
    parser.add_argument("--task", choices=tuple(TASKS), default="both")
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="guidance of the drawings (default: %(default)s)")
    parser.add_argument("--modality-steps", type=int, default=16, help="solver intervals (default: %(default)s)")
    parser.add_argument("--draw-per-class", type=int, default=20, help="drawings scored at the end, for each class")
    run.add_common_arguments(parser, RECIPES["digits"].config)
    args = parser.parse_args()

    data = load_images(args.dataset, args.data)
    recipe, tasks = RECIPES[data.name], TASKS[args.task]
    config = config_from_arguments(args, recipe.config)
    place = run.open_run(args, f"{data.name}-{args.task}", device=config.device)
    run.seed_everything(config.seed)
    shape = tuple(patchify(data.train.images[0], recipe.patch).shape)
    artist = Artist(shape, recipe.patch, args.cfg_scale, args.modality_steps)
    trainer = Trainer(
        build_model(shape, len(data.class_names), recipe),
        LabelImagePairs(data.train, tasks, patch=recipe.patch),
        config,
        folder=place.folder,
        callbacks=[Grids(artist, data.class_names)] if "draw" in tasks else [],
    )
    started = time.monotonic()
    trainer.say(f"data: {data.source}")
    if trainer.fit(resume=place.resume).was_stopped:
        return
    trainer.say(f"trained for {time.monotonic() - started:.0f} s")

    figures = {}
    if "draw" in tasks:
        judge, accuracy = train_judge(data, seed=config.seed, device=trainer.device)
        labels = torch.arange(len(data.class_names)).repeat(args.draw_per_class)
        images = torch.cat([artist.draw(trainer.average, part) for part in labels.split(100)])
        seen = recognised(judge, images)
        figures["drawn as asked"] = (seen == labels).float().mean().item()
        if trainer.is_main:
            names = [data.class_names[label] for label in labels[:100]]
            save_grid(place.folder / "drawings.png", images[:100], names, correct=(seen == labels)[:100])
        trainer.say(f"judge: recognises {accuracy:.1%} of {len(data.test.labels)} real held-out images")
        trainer.say(f"drawing: {figures['drawn as asked']:.1%} of {len(labels)} recognised as what was asked for")
    if "caption" in tasks:
        held_out = LabelledImages(*(part[:2000] for part in data.test))
        written = torch.cat([artist.caption(trainer.average, part) for part in held_out.images.split(100)])
        figures["named correctly"] = (written == held_out.labels).float().mean().item()
        trainer.say(f"captioning: {figures['named correctly']:.1%} of {len(written)} held-out images named correctly")
    card = ModelCard(training_data=data.source, steps=trainer.step, figures=figures)
    trainer.save_pretrained(place.folder / "model", card=card)
    if trainer.is_main:
        curves = run.read_metrics(place.folder)
        save_curves(place.folder / "losses.png", {name: curves[name] for name in ("text", "flow_0") if name in curves})
    trainer.say(f"results in {place.folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run_command(main)
