"""`python -m transfusion_pytorch sample MODEL "a red ..."`: a saved model draws, captions, or does as it likes."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from transfusion_pytorch.commands.pictures import Picture, PictureModel, save_picture
from transfusion_pytorch.display.lines import without_controls
from transfusion_pytorch.display.terminal import print_text
from transfusion_pytorch.transfusion import Transfusion

EPILOG = """examples:
  python -m transfusion_pytorch sample MODEL "a red apple" "a green apple" --num 4
  python -m transfusion_pytorch sample MODEL --image apple.png
  python -m transfusion_pytorch sample MODEL --num 8       # captions and pictures of the model's own
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="folder that save_pretrained wrote, or the id of a model on the Hugging Face hub")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="captions to draw")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="images to caption; a PROMPT begins them"
    )
    parser.add_argument("--num", type=int, default=1, help="samples for each prompt or image (default: %(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=None, help="guidance of drawings (default: the model's, 3)")
    parser.add_argument("--steps", type=int, default=16, help="solver intervals of a drawing (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, help="of text (default: 0 for one caption of an image, 1 for everything else)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder of the pictures (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the first of these that is here)")
    _take_prompts_anywhere(parser)


def _take_prompts_anywhere(parser: argparse.ArgumentParser) -> None:
    """Lets prompts stand behind options too: argparse takes a `*` where the first positional argument is, and
    `parse_intermixed_args` is not for subcommands.
    """
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = parse(args, namespace)
        if any(text.startswith("-") for text in rest):
            return found, rest  # which is an error
        found.prompts = [*found.prompts, *rest]
        return found, []

    vars(parser)["parse_known_args"] = parse_known_args


def run(arguments: argparse.Namespace) -> None:
    """Writes pictures and `samples.txt`, and prints what is in it. Raises what `run_command` makes one line of."""
    if arguments.num < 1:
        raise ValueError(f"--num is at least 1, got {arguments.num}")
    if len(arguments.prompts) > 1 and arguments.image:
        raise ValueError(f"one PROMPT can begin the captions of images, got {len(arguments.prompts)}")
    if empty := [number for number, prompt in enumerate(arguments.prompts, 1) if not prompt.strip()]:
        raise ValueError(f"prompt {empty[0]} is empty; without any, the model writes and draws as it likes")
    device = best_device() if arguments.device is None else arguments.device
    model = PictureModel(Transfusion.from_pretrained(arguments.model, device=device))
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, text, picture in samples(model, arguments):
        if picture is not None:
            save_picture(arguments.out / name, picture)
            text = f"{name}: {text}"
        lines.append(text)
        print_text(without_controls(text), flush=True)
    (arguments.out / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print_text(f"written to {arguments.out}")


def samples(model: PictureModel, arguments: argparse.Namespace) -> Iterator[tuple[str, str, Picture | None]]:
    """The name of a picture, its text, and the picture if there is one to be written."""
    generator = torch.Generator().manual_seed(arguments.seed)
    common = dict(modality_steps=arguments.steps, cfg_scale=arguments.cfg_scale, generator=generator)
    if arguments.image:
        yield from captions(model, arguments, common)
        return
    common["text_temperature"] = 1.0 if arguments.temperature is None else arguments.temperature
    if not arguments.prompts:
        for number, invented in enumerate(model.invent(arguments.num, **common), 1):
            first = invented.pictures[0] if invented.pictures else None
            yield f"{number:03}.png", invented.text, first
        return
    prompts = repeated(arguments.prompts, arguments.num)
    for number, (prompt, picture) in enumerate(zip(prompts, model.draw(prompts, **common), strict=True), 1):
        yield f"{number:03}.png", prompt if picture is not None else f"{prompt}: the model wrote no size", picture


def captions(model: PictureModel, arguments: argparse.Namespace, options: dict) -> Iterator[tuple[str, str, None]]:
    usual = 0.0 if arguments.num == 1 else 1.0
    options["text_temperature"] = usual if arguments.temperature is None else arguments.temperature
    beginning = arguments.prompts[0] if arguments.prompts else ""
    pictures = [model.read(file) for file in arguments.image]
    written = model.describe(repeated(pictures, arguments.num), beginning=beginning, **options)
    for file, text in zip(repeated(arguments.image, arguments.num), written, strict=True):
        yield "", f"{file}: {text}", None


def repeated(values: Sequence, count: int) -> list:
    """[a, b] twice: [a, a, b, b]."""
    return [value for value in values for _ in range(count)]


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
