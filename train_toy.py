"""A minute of everything: a sample is a number, a picture of that many bars, and how high they are as a vector.

    python train_toy.py

Text, a 2-dimensional modality and a 0-dimensional one, of different channels and sizes, in one stream. Nothing is
downloaded and no data is read.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfusion_pytorch import Callback, TrainConfig, Trainer, Transfusion, print_modality_sample
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.pictures import load_picture, save_curves, save_grid
from transfusion_pytorch.training.config import config_from_arguments

PICTURE, VECTOR = 0, 1
MOST_BARS = 4
WIDTHS = (8, 10, 12)
NAMES = {"text": "text", "flow_0": "flow of pictures", "flow_1": "flow of vectors"}
DEFAULTS = TrainConfig(
    steps=600, learning_rate=2e-3, beta2=0.999, weight_decay=0.0, schedule="constant", warmup=0, cooldown=0.0,
    ema_beta=None, details_every=0, sample_every=0,
)  # fmt: skip


def bars(count: int, height: int, width: int) -> Tensor:
    """A picture (8, width, 1) in -1 and 1: `count` bars of one pixel, every second column, `height` pixels high."""
    picture = torch.full((8, width, 1), -1.0)
    picture[8 - height :, 0 : 2 * count : 2] = 1.0
    return picture


class Bars(Dataset):
    """The number of bars, the picture, and their height as a vector of 4 numbers: `[text, picture, vector]`."""

    def __len__(self) -> int:
        return 1_000_000  # made when they are asked for

    def sample(self, index: int, generator: torch.Generator) -> list:
        count, height, width = (
            int(torch.randint(most, (), generator=generator)) for most in (MOST_BARS, 8, len(WIDTHS))
        )
        return [
            torch.tensor([count + 1]),
            (PICTURE, bars(count + 1, height + 1, WIDTHS[width])),
            (VECTOR, torch.full((4,), (height + 1) / 4 - 1.125)),
        ]


def build_model() -> Transfusion:
    return Transfusion(
        num_text_tokens=MOST_BARS + 1,
        dim_latent=(1, 4),
        modality_default_shape=((8, 8), ()),
        transformer=dict(dim=64, depth=3, heads=4, dim_head=16),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_common_arguments(parser, DEFAULTS)
    args = parser.parse_args()
    config = config_from_arguments(args, DEFAULTS)
    place = run.open_run(args, "toy", device=config.device)
    run.seed_everything(config.seed)
    drawings = Drawings()
    trainer = Trainer(build_model(), Bars(), config, folder=place.folder, callbacks=[drawings])
    trainer.say("data: pictures of bars, made as they are needed: no download")
    started = time.monotonic()
    if trainer.fit(resume=place.resume).was_stopped:
        return

    trainer.save_pretrained(place.folder / "model")
    if not trainer.is_main:
        return
    report_losses(place.folder)
    if drawings.samples:
        trainer.say("a sample, part by part:")
        print_modality_sample(drawings.samples[0])
    trainer.say(f"results in {place.folder} after {time.monotonic() - started:.0f} s")


class Drawings(Callback):
    """Every number of bars twice, after the last step: a picture in the run's folder and for the tracker."""

    def __init__(self):
        self.samples = []

    def on_sample(self, trainer):
        asked = torch.arange(1, MOST_BARS + 1).repeat(2)
        self.samples = trainer.average.sample_many(list(asked), max_length=256)
        file = save_pictures(trainer.folder / "samples.png", self.samples, asked.tolist()) if trainer.is_main else None
        return {} if file is None else {"drawings": load_picture(file)}


def report_losses(folder) -> None:
    """A picture of the curves, and how far each fell."""
    metrics = run.read_metrics(folder)
    curves = {name: metrics[column] for column, name in NAMES.items()}
    save_curves(folder / "losses.png", curves)
    for name, curve in curves.items():
        values = [value for _, value in curve]
        tenth = max(len(values) // 10, 1)
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        print(f"{name}: {first:.3f} over the first tenth of the steps, {last:.3f} over the last")


def save_pictures(path: Path, samples: list, asked: list[int]) -> Path | None:
    """The first picture of each sample that has one, on a common size. Returns the file, if there is any."""
    pictures = [next((part[1] for part in filter(is_picture, sample)), None) for sample in samples]
    drawn = [(picture, f"{count} bars") for picture, count in zip(pictures, asked, strict=True) if picture is not None]
    if not drawn:
        return None
    height, width = (max(picture.shape[axis] for picture, _ in drawn) for axis in (0, 1))
    padded = torch.full((len(drawn), 1, height, width), -1.0)
    for image, (picture, _) in zip(padded, drawn, strict=True):
        image[0, : picture.shape[0], : picture.shape[1]] = picture[..., 0]
    return save_grid(path, padded, [name for _, name in drawn], columns=MOST_BARS)


def is_picture(part) -> bool:
    return isinstance(part, tuple) and part[0] == PICTURE


if __name__ == "__main__":
    run_command(main)
