"""Learns to draw and to caption small images in one model, and has an independent judge score the drawings.

python train_mnist.py                     # 8x8 handwritten digits that ship with scikit-learn, both tasks
python train_mnist.py --dataset fashion   # 28x28 Fashion-MNIST (Debian package dataset-fashion-mnist)
python train_mnist.py --dataset mnist     # from a folder of idx files (--data) or a download
"""

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from transfusion_pytorch import Transfusion
from transfusion_pytorch.data.images import patchify, unpatchify
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.data import IMAGE_LOADERS, LabelledImages, load_images
from transfusion_pytorch.examples.judge import recognised, train_judge
from transfusion_pytorch.examples.pairs import TASKS, LabelImagePairs, endless
from transfusion_pytorch.examples.pictures import save_curves, save_grid


class Recipe(NamedTuple):
    """What suits a data set, on two CPU cores."""

    steps: int
    patch: int
    dim: int
    depth: int
    heads: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-3
    flow_loss_weight: float = 5.0  # as in the Transfusion paper


RECIPES = {
    "digits": Recipe(steps=2000, patch=2, dim=64, depth=4, flow_loss_weight=2.0),
    "mnist": Recipe(steps=4000, patch=4, dim=96, depth=5, batch_size=32),
    "fashion": Recipe(steps=4000, patch=4, dim=96, depth=5, batch_size=32),
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


def draw(model, labels: Tensor, *, shape: tuple[int, ...], patch: int, cfg_scale: float, steps: int) -> Tensor:
    """An image (c, h, w) for each label, blank where there is none of `shape` (h / p, w / p, c p p).

    The model itself writes that an image comes, and how large it is.
    """
    length = shape[0] * shape[1] + 32  # of the image, and more than enough for what stands around it
    samples = model.sample_many(list(labels), max_length=length, cfg_scale=cfg_scale, modality_steps=steps)
    first = [next((part[1] for part in sample if isinstance(part, tuple)), torch.empty(0)) for sample in samples]
    latents = [image.cpu() if image.shape == shape else torch.zeros(shape) for image in first]
    return unpatchify(torch.stack(latents), patch)


def caption(model, images: Tensor, *, patch: int) -> Tensor:
    """The word that the model writes after each image, -1 where it writes none."""
    latents = patchify(images, patch)
    length = latents[0, ..., 0].numel() + 16
    samples = model.sample_many(list(latents), max_length=length, text_temperature=0.0)
    return torch.stack([sample[2][1] if len(sample[2]) > 1 else torch.tensor(-1) for sample in samples]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=tuple(IMAGE_LOADERS), default="digits")
    parser.add_argument("--data", help="folder of idx files, for mnist and fashion")
    parser.add_argument("--task", choices=tuple(TASKS), default="both")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="guidance of the drawings (default: %(default)s)")
    parser.add_argument("--modality-steps", type=int, default=16, help="solver intervals (default: %(default)s)")
    parser.add_argument("--sample-every", type=int, default=500, help="training steps between grids (0: none)")
    parser.add_argument("--draw-per-class", type=int, default=20, help="drawings scored at the end, for each class")
    run.add_common_arguments(parser, steps=None)
    args = parser.parse_args()

    data = load_images(args.dataset, args.data)
    print(f"data: {data.source}")
    recipe = RECIPES[data.name]
    steps, batch_size = args.steps or recipe.steps, args.batch_size or recipe.batch_size
    device, tasks = run.pick_device(args.device), TASKS[args.task]
    run.seed_everything(args.seed)
    shape = tuple(patchify(data.train.images[0], recipe.patch).shape)
    folder = run.fresh_folder(args.results, f"{data.name}-{args.task}")
    how = dict(shape=shape, patch=recipe.patch, cfg_scale=args.cfg_scale, steps=args.modality_steps)

    model = build_model(shape, len(data.class_names), recipe).to(device)
    ema = model.create_ema(beta=0.99, update_every=10, update_after_step=min(100, steps // 4))
    optimizer = AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.05)
    schedule = LambdaLR(optimizer, lambda step: run.cosine_schedule(step, total=steps, warmup=min(100, steps // 10)))
    dataset = LabelImagePairs(data.train, tasks, patch=recipe.patch, seed=args.seed)
    batches = model.create_dataloader(
        dataset, batch_size=batch_size, shuffle=True, drop_last=len(dataset) >= batch_size
    )
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps on {device}, to {folder}")

    started, curves = time.monotonic(), {"text": [], "flow": []}
    labels_shown = torch.arange(len(data.class_names)).repeat(2)
    for step, batch in zip(bar := run.progress(steps, description="training"), endless(dataset, batches), strict=False):
        loss, parts = model(batch, return_breakdown=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update()
        curves["text"].append(parts.text.item())
        curves["flow"].append(parts.flow.item())
        bar.set_postfix(text=f"{curves['text'][-1]:.3f}", flow=f"{curves['flow'][-1]:.3f}")
        if "draw" in tasks and args.sample_every and (step + 1) % args.sample_every == 0:
            names = [data.class_names[label] for label in labels_shown]
            save_grid(folder / f"step-{step + 1:05}.png", draw(ema, labels_shown, **how), names)
    print(f"trained for {time.monotonic() - started:.0f} s")
    save_curves(folder / "losses.png", curves)
    torch.save(ema.ema_model.state_dict(), folder / "model.pt")

    if "draw" in tasks:
        judge, judge_accuracy = train_judge(data, seed=args.seed, device=device)
        labels = torch.arange(len(data.class_names)).repeat(args.draw_per_class)
        images = torch.cat([draw(ema, part, **how) for part in labels.split(100)])
        seen = recognised(judge, images)
        names = [data.class_names[label] for label in labels]
        save_grid(folder / "drawings.png", images[:100], names[:100], correct=(seen == labels)[:100])
        print(f"judge: recognises {judge_accuracy:.1%} of {len(data.test.labels)} real held-out images")
        print(f"drawing: {(seen == labels).float().mean():.1%} of {len(labels)} recognised as what was asked for")
    if "caption" in tasks:
        held_out = LabelledImages(*(part[:2000] for part in data.test))
        written = torch.cat([caption(ema, part, patch=recipe.patch) for part in held_out.images.split(100)])
        right = (written == held_out.labels).float().mean()
        print(f"captioning: {right:.1%} of {len(written)} held-out images named correctly")
    print(f"results in {folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
