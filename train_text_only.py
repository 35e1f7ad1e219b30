"""Learns to write the bytes of any text: next-token prediction alone, on the same model that draws.

python train_text_only.py                  # prose and source out of Python's standard library
python train_text_only.py --data enwik8.gz
"""

import argparse
import math
import time

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from transfusion_pytorch import Transfusion
from transfusion_pytorch.examples.data import load_text
from transfusion_pytorch.examples.pictures import save_curves
from transfusion_pytorch.examples.run import (
    add_common_arguments,
    cosine_schedule,
    fresh_folder,
    pick_device,
    progress,
    seed_everything,
)


def random_windows(text: Tensor, count: int, length: int) -> Tensor:
    """`count` windows (count, length) from anywhere in the text."""
    start = torch.randint(len(text) - length + 1, (count, 1))
    return text[start + torch.arange(length)]


@torch.no_grad()
def bits_per_byte(model: Transfusion, text: Tensor, length: int, most: int = 64) -> float:
    """Mean cross-entropy in bits over windows spread evenly over the text."""
    model.eval()
    starts = torch.linspace(0, len(text) - length, min(most, len(text) // length)).long()
    windows = text[starts[:, None] + torch.arange(length)]
    losses = [model(part).item() for part in windows.split(8)]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="any file; .gz and .zip are unpacked")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="bytes in a window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--validate-every", type=int, default=200, help="in steps (default: %(default)s)")
    parser.add_argument("--prompt", default="The ", help="what the sample at the end starts with")
    parser.add_argument("--write", type=int, default=400, help="bytes to write at the end (default: %(default)s)")
    add_common_arguments(parser, steps=1000)
    args = parser.parse_args()

    text = load_text(args.data, minimum=args.length)
    print(f"data: {text.source}, {len(text.train):,} bytes to train on")
    device = pick_device(args.device)
    seed_everything(args.seed)
    folder = fresh_folder(args.results, "text")
    model = Transfusion(
        num_text_tokens=256,
        transformer=dict(dim=args.dim, depth=args.depth, dim_head=48, heads=max(args.dim // 48, 1), unet_skips=False),
    ).to(device)
    optimizer = AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = LambdaLR(
        optimizer, lambda step: cosine_schedule(step, total=args.steps, warmup=min(50, args.steps // 10), floor=0.05)
    )
    print(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps on {device}, to {folder}"
    )

    started, curves = time.monotonic(), {"training": [], "validation": []}
    for step in (bar := progress(args.steps, description="training")):
        loss = model(random_windows(text.train, args.batch_size, args.length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curves["training"].append((step + 1, loss.item() / math.log(2)))
        if (step + 1) % args.validate_every == 0:
            curves["validation"].append((step + 1, bits_per_byte(model, text.validation, args.length)))
            bar.set_postfix(validation=f"{curves['validation'][-1][1]:.3f}")
    print(f"trained for {time.monotonic() - started:.0f} s")

    save_curves(folder / "losses.png", curves, y_label="bits per byte")
    torch.save(model.state_dict(), folder / "model.pt")
    prompt = torch.tensor([list(args.prompt.encode())])
    written = model.generate_text_only(prompt, prompt.shape[1] + args.write, temperature=0.8)[0]
    (folder / "sample.txt").write_bytes(args.prompt.encode() + bytes(written.tolist()))
    print(args.prompt + bytes(written.tolist()).decode(errors="replace"))
    print(f"validation: {bits_per_byte(model, text.validation, args.length):.3f} bits per byte")
    print(f"results in {folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
