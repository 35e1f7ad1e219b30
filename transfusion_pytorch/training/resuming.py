"""Where a run goes on: the checkpoint that all processes agree on, and what is other than it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transfusion_pytorch.data.order import seed_of
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.checkpoint_files import LoadedCheckpoint
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.random_states import set_random_states


def find_checkpoint(
    checkpoints: Checkpoints, folder: Path, resume: bool | str | Path, launch: Launch
) -> LoadedCheckpoint | None:
    """The checkpoint to go on from, the same for all processes; None for a run that starts.

    Raises `FileExistsError` for a start in a folder that has checkpoints, `FileNotFoundError` for a path without one,
    and `ValueError` where the processes do not see the same folder.
    """
    if resume is False:
        if checkpoints.infos():
            raise FileExistsError(f"{folder} has checkpoints of a run: resume it, or give another folder to start anew")
        return None
    which: Any = "latest" if resume is True else resume
    if Path(which).resolve() in (folder.resolve(), checkpoints.folder.resolve()):
        which = "latest"
    try:
        loaded = checkpoints.load(which)
    except FileNotFoundError:
        if resume is not True:
            raise
        loaded = None
    steps = launch.all(None if loaded is None else loaded.step)
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes must share {folder}, but find checkpoints of different steps: {steps}, by rank"
        )
    return loaded


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that are other ones than those of a checkpoint; empty where there are none."""
    changed = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)


def set_randomness(loaded: LoadedCheckpoint | None, launch: Launch, *, seed: int, step: int) -> None:
    """What is random beside samples, times and noise: dropout. Every process has its own, that of the checkpoint if it
    was saved by as many processes.
    """
    own = None if loaded is None else loaded.of_rank(launch.rank, launch.size)
    if own is None:
        torch.manual_seed(seed_of(seed, "process", launch.rank, step))
    else:
        set_random_states(own)
