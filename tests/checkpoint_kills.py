"""Kills a process that saves checkpoints, again and again, and looks at what is left.

    python tests/checkpoint_kills.py FOLDER KILLS SEED

Prints JSON: how many kills fell into a save, and the last step. Processes are forked, which saves the import of torch.
"""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from transfusion_pytorch.training.checkpoint import Checkpoints

BEGUN, SAVED = b"b", b"s"


def advance(x: torch.Tensor, step: int) -> torch.Tensor:
    return torch.cos(1.1 * x + step)


def expected(step: int) -> torch.Tensor:
    x = torch.zeros(5000)
    for number in range(1, step + 1):
        x = advance(x, number)
    return x


def train(folder: Path, pipe: int) -> None:
    """Goes on from the latest checkpoint for ever, and saves every step."""
    checkpoints = Checkpoints(folder)
    try:
        loaded = checkpoints.load("latest")
        step, x = loaded.step, loaded.parts["model"]["x"]
    except FileNotFoundError:
        step, x = 0, torch.zeros(5000)
    while True:
        step += 1
        x = advance(x, step)
        os.write(pipe, BEGUN)
        checkpoints.save(step, {"model": {"x": x}, "data": {"position": step}}, figures={"loss": math.sin(step)})
        os.write(pipe, SAVED)
        time.sleep(0.002)


def kill_once(folder: Path, rng: random.Random, *, in_save: bool) -> bytes:
    """Starts the training and kills it. Returns the events that it reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            train(folder, writing)
        finally:
            os._exit(1)
    os.close(writing)
    events = b""
    if in_save:
        for _ in range(rng.randint(1, 8)):
            while (event := os.read(reading, 1)) not in (BEGUN, b""):
                events += event
            events += event
    time.sleep(rng.uniform(0, 0.01 if in_save else 0.1))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the training ended by itself"
    while event := os.read(reading, 1000):
        events += event
    os.close(reading)
    return events


def check(folder: Path, newest: int) -> int:
    """Everything is whole, and the latest is at least the newest that was reported as saved. Returns its step."""
    checkpoints = Checkpoints(folder, is_main=False)
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    assert len(visible) == len(checkpoints.infos()), f"{visible} are not all whole"
    if not visible:
        assert newest == 0
        return 0
    for path in visible:
        loaded = checkpoints.load(path)
        assert torch.equal(loaded.parts["model"]["x"], expected(loaded.step)), path
        assert loaded.parts["data"] == {"position": loaded.step}
    latest = checkpoints.load("latest").step
    assert latest in (newest, newest + 1), f"step {newest} was saved, the latest is {latest}"
    return latest


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng, step, hits = random.Random(seed), 0, 0
    for number in range(kills):
        events = kill_once(folder, rng, in_save=number % 2 == 0)
        hits += events.count(BEGUN) > events.count(SAVED)
        step = check(folder, step + events.count(SAVED))
    Checkpoints(folder).save(step + 1, {"data": {}})  # removes what the last kill left
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    print(json.dumps({"hits": hits, "step": step, "left": left, "kept": len(list(folder.iterdir()))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
