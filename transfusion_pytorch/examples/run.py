"""What every example script does alike: its arguments, seed, result folder and progress bar."""

import argparse
import csv
import random
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.training.config import TrainConfig, add_arguments
from transfusion_pytorch.training.launch import Launch


def optional(module: str, *, extra: str = "examples") -> ModuleType:
    """Imports a module of an optional dependency, or says which extra installs it (`ImportError`)."""
    return import_optional(module, extra=extra)


def positive_int(text: str, least: int = 1) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {number}")
    return number


def natural(text: str) -> int:
    """An argument that must be a whole number of at least 0."""
    return positive_int(text, 0)


def fraction(text: str) -> float:
    """An argument from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {number}")
    return number


def existing_path(text: str) -> Path:
    """An argument that must be a file or a folder that is there. An empty one is a variable of the shell that was not
    set, and not the present folder.
    """
    path = Path(text)
    if not text or not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {text!r}")
    return path


def add_common_arguments(parser: argparse.ArgumentParser, defaults: TrainConfig, *, skip: Sequence[str] = ()) -> None:
    """Adds every option of a `TrainConfig` but those to `skip`, with these defaults, `--results` and `--resume`."""
    parser.add_argument("--results", type=Path, default=Path("results"), help="parent of the run's own, fresh folder")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="PATH",
        help="go on with the latest run of this script, or with the run or checkpoint at PATH",
    )
    add_arguments(parser, defaults, skip=skip)


class Run(NamedTuple):
    """Where a run is written, and what `Trainer.fit` is to resume."""

    folder: Path
    resume: bool | Path


def open_run(arguments: argparse.Namespace, name: str, *, device: str | None = None) -> Run:
    """A fresh folder `results/name-<time>`, or that of the run to go on with. All processes get the same.

    Raises `FileNotFoundError` where there is no such run, and `OSError` where `results` cannot be written.
    """
    return Launch(device=device).from_main(lambda: _open_run(arguments.results, name, arguments.resume))


def _open_run(results: Path, name: str, resume: str | None) -> Run:
    if resume is None:
        try:
            return Run(fresh_folder(results, name), False)
        except OSError as error:
            raise OSError(f"results cannot be written to {results}: {error.strerror}") from error
    if resume != "latest":
        path = Path(resume)
        if (path / "checkpoints").is_dir():
            return Run(path, True)
        if (path / "state.json").is_file():
            return Run(path.parents[1], path)
        raise FileNotFoundError(f"{path} is neither the folder of a run nor one of its checkpoints")
    runs = [folder for folder in results.glob(f"{name}-*") if any((folder / "checkpoints").glob("step-*"))]
    if not runs:
        raise FileNotFoundError(f"there is no run {name}-* with a checkpoint in {results} to go on with")
    return Run(max(runs, key=lambda folder: folder.stat().st_mtime), True)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of a run's `metrics.csv`, each as pairs of a step and a number."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append((step, float(value)))
    return columns


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
