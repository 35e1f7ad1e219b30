"""The checkpoints of a run: `checkpoints/step-00001000/`, `checkpoints/step-00002000/`, ...

`checkpoint_files.py` says what is in one of them.
"""

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from transfusion_pytorch.saving.files import PARTIAL, whole_folder
from transfusion_pytorch.training.checkpoint_files import (
    PART_NAME,
    LoadedCheckpoint,
    load_checkpoint,
    open_checkpoint,
    step_of,
    write_checkpoint,
)


class CheckpointInfo(NamedTuple):
    """A checkpoint in a listing."""

    step: int
    path: Path
    figures: dict[str, float]


class Checkpoints:
    """The checkpoints in one folder: `save`, `load`, and the removal of old ones.

    The last `keep_last` are kept, and the `keep_best` of those with the lowest figure `metric` (the highest with
    `higher_is_better`). An old one is removed only after a new one is on the disk, so there must be room for one more.
    `identity` is any JSON that tells one run from another, such as the model's configuration: a checkpoint with
    another identity is refused.

    A process killed at any moment leaves whole checkpoints only. What it was writing or removing is deleted by the
    first `save` of the next run: one run at a time may save in a folder, others may read. Where several processes
    train, all of them may call everything, and those without `is_main` change nothing on the disk.

    Raises `OSError` where the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str = "loss",
        higher_is_better: bool = False,
        identity: Any = None,
        is_main: bool = True,
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be at least 1 and keep_best at least 0, got {keep_last} and {keep_best}")
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self.metric, self.higher_is_better = metric, higher_is_better
        self.identity, self.is_main = identity, is_main
        self._is_clean = False
        if is_main:
            _make_writable(self.folder)

    def path_of(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        *,
        figures: Mapping[str, float] | None = None,
        per_rank: Sequence[Any] = (),
    ) -> Path:
        """Writes a checkpoint and removes old ones. Returns its folder.

        `parts` are states as `flatten_state` takes them, sharded ones gathered. `per_rank` has one for each process:
        the main process writes them all, so gather them first (they are small).

        Raises `FileExistsError` if there is one of this step (see `discard_after`), `TypeError` for what cannot be
        saved, and `OSError` where the disk is full or fails; the checkpoints before it stay as they are.
        """
        path = self.path_of(step)
        if not self.is_main:
            return path
        if path.exists():
            raise FileExistsError(f"{path} exists already; discard_after({step - 1}) removes it and all later ones")
        if wrong := [name for name in parts if not PART_NAME.fullmatch(name)]:
            raise ValueError(f"names of parts are lower case words and not 'state', got {wrong}")
        self._remove_leftovers()
        try:
            with whole_folder(path) as folder:
                write_checkpoint(folder, step, parts, figures=figures or {}, identity=self.identity, per_rank=per_rank)
        except OSError as error:
            raise self._failure(step, error) from error
        self._remove_old()
        return path

    def load(self, which: str | int | Path = "latest") -> LoadedCheckpoint:
        """Opens `"latest"`, `"best"`, the one of a step, or one anywhere by its path.

        Raises `FileNotFoundError` where there is none, and `ValueError` where it is cut off, altered, of another format
        or of another run, with the path of the one before it.
        """
        if which == "latest":
            steps = self._steps()
            path = self.path_of(steps[-1]) if steps else None
        elif which == "best":
            best = self.best()
            path = best.path if best else None
        else:
            path = self.path_of(which) if isinstance(which, int) else Path(which)
        if path is None:
            what = "no checkpoint" if which == "latest" else f"no checkpoint with a figure '{self.metric}'"
            raise FileNotFoundError(f"there is {what} in {self.folder}")
        return load_checkpoint(path, identity=self.identity)

    def infos(self) -> list[CheckpointInfo]:
        """All checkpoints of the folder that are whole, by step."""
        found = []
        for step in self._steps():
            try:
                loaded = open_checkpoint(self.path_of(step))
            except (ValueError, OSError):
                continue
            found.append(CheckpointInfo(step, loaded.path, loaded.figures))
        return found

    def latest(self) -> CheckpointInfo | None:
        """The newest that is whole. `load("latest")` complains about a newer one that is not."""
        return next(reversed(self.infos()), None)

    def best(self) -> CheckpointInfo | None:
        return next(iter(self._ranking(self.infos())), None)

    def discard_after(self, step: int) -> None:
        """Removes all checkpoints of later steps: before a run goes on from one that is not its latest."""
        for later in reversed(self._steps()):
            if later > step and self.is_main:
                _remove(self.path_of(later))

    def _steps(self) -> list[int]:
        steps = (step_of(path) for path in self.folder.glob("step-*"))
        return sorted(step for step in steps if step is not None)

    def _ranking(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those with the metric, the best first. NaN compares with nothing and is left out."""
        rated = [info for info in infos if math.isfinite(info.figures.get(self.metric, math.nan))]
        return sorted(rated, key=lambda info: info.figures[self.metric], reverse=self.higher_is_better)

    def _remove_leftovers(self) -> None:
        """Once: deletes what killed processes were writing or removing."""
        if not self._is_clean:
            for left in self.folder.glob(f".step-*{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
            self._is_clean = True

    def _remove_old(self) -> None:
        infos = self.infos()
        kept = {info.step for info in [*infos[-self.keep_last :], *self._ranking(infos)[: self.keep_best]]}
        for info in infos:
            if info.step not in kept:
                try:
                    _remove(info.path)
                except OSError as error:
                    warnings.warn(f"the old checkpoint {info.path} could not be removed: {error}", stacklevel=3)

    def _failure(self, step: int, error: OSError) -> OSError:
        latest = self.latest()
        before = f"the latest before it is untouched: {latest.path}" if latest else "there is none before it"
        free = shutil.disk_usage(self.folder).free / 2**30
        return OSError(
            error.errno,
            f"the checkpoint of step {step} could not be saved in {self.folder} ({free:.2f} GiB free): "
            f"{error.strerror or error}; {before}",
        )


def _make_writable(folder: Path) -> None:
    """Makes the folder and finds out whether it can be written.

    The probe is named like an unfinished checkpoint: if the process is killed here, the next `save` removes it.
    """
    probe = folder / f".step-probe{PARTIAL}{uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OSError(error.errno, f"checkpoints cannot be written to {folder}: {error.strerror}") from error


def _remove(path: Path) -> None:
    """Takes the name away first, so that no checkpoint is ever half removed."""
    removed = path.with_name(f".{path.name}{PARTIAL}{uuid4().hex[:8]}")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
