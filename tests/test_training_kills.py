"""Runs that are killed at random moments, and go on as if nothing had happened."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_training_trainer import CONFIG, Callback, assert_equal_states, fresh_model, rows, samples, trainer, weights

from transfusion_pytorch.saving.files import PARTIAL

KILLS = int(os.environ.get("KILLS", "20"))  # KILLS=100 for the figure in docs/training.md


class Tells(Callback):
    """Says through a pipe that training has begun."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_start(self, trainer):
        os.write(self.pipe, b"!")


def make(folder, steps: int, callbacks=()):
    config = replace(CONFIG, steps=steps, save_every=3, validate_every=10, details_every=0)
    return trainer(
        folder, config, model=fresh_model(trunk=dict(dropout=0.1)), validation=samples(5), callbacks=callbacks
    )


def start(folder, steps: int) -> int:
    """Trains in a process of its own, and returns its number once it has begun."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            make(folder, steps, [Tells(writes)]).fit(resume=True)
        finally:
            os._exit(0)
    os.close(writes)
    os.read(reads, 1)
    os.close(reads)
    return child


def wait_for_a_save(folder: Path, chance: random.Random) -> bool:
    """Until a checkpoint is being written, or half a second has passed."""
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        if any((folder / "checkpoints").glob(f".step-*{PARTIAL}*")):
            time.sleep(0.004 * chance.random())
            return any((folder / "checkpoints").glob(f".step-*{PARTIAL}*"))
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(tmp_path):
    steps, chance, in_saves = 12 * KILLS, random.Random(0), 0
    whole = make(tmp_path / "whole", steps)
    whole.fit()
    folder = tmp_path / "killed"
    for kill in range(KILLS):
        child = start(folder, steps)
        if kill % 2:
            in_saves += wait_for_a_save(folder, chance)
        else:
            time.sleep(0.3 * chance.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert rows(folder)
    again = make(folder, steps)
    again.fit(resume=True)
    assert_equal_states(weights(again.model), weights(whole.model))
    assert_equal_states(weights(again.average), weights(whole.average))
    assert rows(folder) == rows(tmp_path / "whole")
    print(f"{KILLS} kills, {in_saves} of them while a checkpoint was written; {steps} steps equal to the bit")
    assert in_saves >= KILLS // 8
