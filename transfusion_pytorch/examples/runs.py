"""The folders of runs: a fresh one, or one to go on with."""

from pathlib import Path
from typing import Any

from .run import fresh_folder


def open_run(results: Path, name: str, *, resume: Any) -> tuple[Path, bool | Path]:
    """The folder of a run, and what `Trainer.fit(resume=)` takes.

    `resume` is None for a fresh folder `results/name-...`, True for the latest of those, or the folder of a run or of
    one of its checkpoints. Raises `FileNotFoundError` where there is none, and `OSError` where `results` cannot be
    written.
    """
    if resume is None:
        try:
            return fresh_folder(results, name), False
        except OSError as error:
            raise OSError(f"results cannot be written to {results}: {error.strerror}") from error
    if resume is True:
        runs = [folder for folder in Path(results).glob(f"{name}-*") if (folder / "checkpoints").is_dir()]
        if not runs:
            raise FileNotFoundError(f"there is no run {name}-... with checkpoints in {results} to resume")
        return max(runs, key=lambda folder: folder.stat().st_mtime), True
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        return path, True
    if path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    raise FileNotFoundError(f"{path} is no run with checkpoints, and none of its checkpoints")
