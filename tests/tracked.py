"""What trackers have kept of a run, read back from their files."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Logged(NamedTuple):
    """One call of a tracker's `log`."""

    run: str
    step: int
    values: dict[str, Any]


def tensorboard_events(folder: Path) -> Any:
    """An accumulator of all events, whose `Scalars` and `Images` are lists."""
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def trackio_run(statement: str, folder: Path) -> tuple[list[Logged], list[dict[str, Any]]]:
    """What a Python statement logs, and the configurations of its runs. Nothing is sent.

    It is run in `folder`, in a process of its own: trackio reads its folder from the environment when it is imported.
    Pictures are in `folder / "trackio" / "media"`.
    """
    pytest.importorskip("accelerate")
    pytest.importorskip("trackio")
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); {statement}"
    environment = dict(os.environ, TRACKIO_DIR=str(folder / "trackio"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    (database,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = connection.execute("select config from configs").fetchall()
    connection.close()
    return [Logged(run, step, json.loads(values)) for run, step, values in rows], [json.loads(it) for (it,) in configs]
