"""What every example script does alike: its arguments, device, seed, result folder, progress bar and learning rate."""

import argparse
import math
import random
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from transfusion_pytorch.data.optional import import_optional


def optional(module: str, *, extra: str = "examples") -> ModuleType:
    """Imports a module of an optional dependency, or says which extra installs it (`ImportError`)."""
    return import_optional(module, extra=extra)


def positive_int(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def add_common_arguments(parser: argparse.ArgumentParser, *, steps: int | None) -> None:
    """Adds `--steps` (with this default, None where it depends on the data), `--seed`, `--device` and `--results`."""
    usual = "what suits the data" if steps is None else steps
    parser.add_argument("--steps", type=positive_int, default=steps, help=f"training steps (default: {usual})")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the first of these that is here)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="parent of the run's own, fresh folder")


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best one of this machine. `ValueError` if it is unknown or not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, available in here.items() if available))
    if not here.get(name.partition(":")[0], False):
        available = ", ".join(kind for kind, available in here.items() if available)
        raise ValueError(f"device {name!r} is not available on this machine, which has {available}")
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy (if it is installed) and torch on every device."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ModuleNotFoundError:
        return
    numpy.random.seed(seed % 2**32)


def fresh_folder(root: str | Path, name: str) -> Path:
    """Makes `root/name-20250131-235959`, or the same with `-2`, `-3`, ... if that exists: no run overwrites another."""
    stamped = Path(root) / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, attempt = stamped, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            attempt += 1
            folder = stamped.with_name(f"{stamped.name}-{attempt}")


def progress(steps: int | Iterable, *, description: str = "") -> Any:
    """A tqdm bar over `range(steps)` or over any iterable. Silent where the output is not a terminal."""
    steps = range(steps) if isinstance(steps, int) else steps
    return optional("tqdm").tqdm(steps, desc=description, dynamic_ncols=True, disable=None)


def cosine_schedule(step: int, *, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor of the learning rate, for `LambdaLR`: a linear rise over `warmup` steps, then half a cosine to `floor`.

    With total 5 and warmup 1 the steps 0 to 5 get 0.5, 1, 0.85, 0.5, 0.15, 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
