"""A minute of everything: a sample is a number, a picture of that many bars, and how high they are as a vector.

    python train_toy.py

Text, a 2-dimensional modality and a 0-dimensional one, of different channels and sizes, in one stream. Nothing is
downloaded and no data is read.
"""

import argparse
import time

import torch
from torch import Tensor
from torch.optim import Adam

from transfusion_pytorch import Transfusion, print_modality_sample
from transfusion_pytorch.examples.pictures import save_curves, save_grid
from transfusion_pytorch.examples.run import (
    add_common_arguments,
    fresh_folder,
    pick_device,
    progress,
    seed_everything,
)

PICTURE, VECTOR = 0, 1
MOST_BARS = 4
WIDTHS = (8, 10, 12)


def bars(count: int, height: int, width: int) -> Tensor:
    """A picture (8, width, 1) in -1 and 1: `count` bars of one pixel, every second column, `height` pixels high."""
    picture = torch.full((8, width, 1), -1.0)
    picture[8 - height :, 0 : 2 * count : 2] = 1.0
    return picture


def random_sample() -> list:
    """The number of bars, the picture, and their height as a vector of 4 numbers: `[text, picture, vector]`."""
    count, height = (int(torch.randint(1, most + 1, ())) for most in (MOST_BARS, 8))
    width = WIDTHS[int(torch.randint(len(WIDTHS), ()))]
    return [
        torch.tensor([count]),
        (PICTURE, bars(count, height, width)),
        (VECTOR, torch.full((4,), height / 4 - 1.125)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    add_common_arguments(parser, steps=600)
    args = parser.parse_args()

    print("data: pictures of bars, made as they are needed: no download")
    device = pick_device(args.device)
    seed_everything(args.seed)
    folder = fresh_folder(args.results, "toy")
    model = Transfusion(
        num_text_tokens=MOST_BARS + 1,
        dim_latent=(1, 4),
        modality_default_shape=((8, 8), ()),
        transformer=dict(dim=64, depth=3, heads=4, dim_head=16),
    ).to(device)
    optimizer = Adam(model.parameters(), lr=2e-3)

    started, curves = time.monotonic(), {"text": [], "flow of pictures": [], "flow of vectors": []}
    for _ in (bar := progress(args.steps, description="training")):
        loss, parts = model([random_sample() for _ in range(args.batch_size)], return_breakdown=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for curve, value in zip(curves.values(), (parts.text, *parts.flow), strict=True):
            curve.append(value.item())
        bar.set_postfix(text=f"{curves['text'][-1]:.3f}", flow=f"{parts.flow.sum():.3f}")
    save_curves(folder / "losses.png", curves)
    for name, curve in curves.items():
        tenth = max(len(curve) // 10, 1)
        first, last = sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth
        print(f"{name}: {first:.3f} over the first tenth of the steps, {last:.3f} over the last")

    asked = torch.arange(1, MOST_BARS + 1).repeat(2)
    samples = model.sample_many(list(asked), max_length=256)
    print("a sample, part by part:")
    print_modality_sample(samples[0])
    pictures = [next((x for kind, x in filter(is_modality, sample) if kind == PICTURE), None) for sample in samples]
    drawn = [
        (picture, f"{count} bars")
        for picture, count in zip(pictures, asked.tolist(), strict=True)
        if picture is not None
    ]
    if drawn:
        widest = max(picture.shape[1] for picture, _ in drawn)
        padded = torch.full((len(drawn), 1, max(picture.shape[0] for picture, _ in drawn), widest), -1.0)
        for image, (picture, _) in zip(padded, drawn, strict=True):
            image[0, : picture.shape[0], : picture.shape[1]] = picture[..., 0]
        save_grid(folder / "samples.png", padded, [name for _, name in drawn], columns=MOST_BARS)
    print(f"results in {folder} after {time.monotonic() - started:.0f} s")


def is_modality(part) -> bool:
    return isinstance(part, tuple)


if __name__ == "__main__":
    main()
