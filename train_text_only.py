"""Learns to write the bytes of any text: next-token prediction alone, on the same model that draws.

python train_text_only.py                  # prose and source out of Python's standard library
python train_text_only.py --data enwik8.gz
"""

import argparse
import math
import time

import torch

from transfusion_pytorch import ModelCard, TrainConfig, Trainer, Transfusion
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.data.text import TextWindows
from transfusion_pytorch.display.lines import without_controls
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.data import load_text
from transfusion_pytorch.examples.pictures import save_curves
from transfusion_pytorch.training.config import config_from_arguments

DEFAULTS = TrainConfig(
    steps=1000, batch_size=4, learning_rate=3e-3, beta2=0.95, weight_decay=0.1, warmup=50, final_factor=0.05,
    ema_beta=None, validate_every=200, sample_every=0,
)  # fmt: skip
VALIDATION_WINDOWS = 64
START_OF_LINE = b"\n"  # what the sample goes on from where there is no prompt: windows of a text have no first byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=run.existing_path, help="any file; .gz and .zip are unpacked")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="bytes in a window (default: %(default)s)")
    parser.add_argument("--prompt", default="The ", help="what the sample at the end starts with, or nothing: ''")
    parser.add_argument("--write", type=int, default=400, help="bytes to write at the end (default: %(default)s)")
    run.add_common_arguments(parser, DEFAULTS)
    args = parser.parse_args()

    text = load_text(args.data, minimum=args.length)
    config = config_from_arguments(args, DEFAULTS)
    place = run.open_run(args, "text", device=config.device)
    run.seed_everything(config.seed)
    model = Transfusion(
        num_text_tokens=256,
        transformer=dict(dim=args.dim, depth=args.depth, dim_head=48, heads=max(args.dim // 48, 1), unet_skips=False),
    )
    held_out = TextWindows([text.validation], args.length)
    evenly = range(0, len(held_out), max(len(held_out) // VALIDATION_WINDOWS, 1))
    trainer = Trainer(
        model,
        TextWindows([text.train], args.length, moves=True),
        config,
        folder=place.folder,
        validation=torch.utils.data.Subset(held_out, evenly),
        packer=model.packer(adds_markers=False),  # windows out of a text neither begin nor end
    )
    trainer.say(f"data: {text.source}, {len(text.train):,} bytes to train on")
    started = time.monotonic()
    fitted = trainer.fit(resume=place.resume)
    if fitted.was_stopped:
        return
    trainer.say(f"trained for {time.monotonic() - started:.0f} s")

    prompt = torch.tensor([list(args.prompt.encode() or START_OF_LINE)])
    written = trainer.average.generate_text_only(prompt, prompt.shape[1] + args.write, temperature=0.8)[0]
    bits = fitted.figures["text"] / math.log(2)
    card = ModelCard(training_data=text.source, steps=trainer.step, figures={"bits per byte": bits})
    trainer.save_pretrained(place.folder / "model", card=card)
    if trainer.is_main:
        metrics = run.read_metrics(place.folder)
        names = {"training": metrics["text"], "validation": metrics["validation/text"]}
        curves = {name: [(step, value / math.log(2)) for step, value in curve] for name, curve in names.items()}
        save_curves(place.folder / "losses.png", curves, y_label="bits per byte")
        (place.folder / "sample.txt").write_bytes(args.prompt.encode() + bytes(written.tolist()))
        trainer.say(args.prompt + without_controls(bytes(written.tolist()).decode(errors="replace")))
    trainer.say(f"validation: {bits:.3f} bits per byte")
    trainer.say(f"results in {place.folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run_command(main)
