"""What a run sends to trackers, through the trainer: numbers, and the pictures that callbacks return."""

import io
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image
from test_training_trainer import CONFIG, rows, trainer

from transfusion_pytorch import Callback

pytest.importorskip("accelerate")

CONFIG = replace(CONFIG, steps=4, sample_every=2, save_every=0, details_every=0, project="shapes")


def grid_of(step: int) -> numpy.ndarray:
    return (numpy.arange(4 * 6 * 3) + step).astype(numpy.uint8).reshape(4, 6, 3)


class Draws(Callback):
    def on_sample(self, trainer):
        return {"grid": torch.from_numpy(grid_of(trainer.step)), "share": trainer.step / 4}


def train(folder, tracker: str) -> None:
    trainer(folder, replace(CONFIG, tracker=tracker), callbacks=[Draws()]).fit()


def assert_is(picture, step: int) -> None:
    assert numpy.array_equal(numpy.array(picture)[..., :3], grid_of(step))


def test_tensorboard_gets_what_callbacks_draw(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "shapes" / "run"))
    events.Reload()
    pictures = events.Images("samples/grid")
    assert [picture.step for picture in pictures] == [2, 4]
    for picture in pictures:
        assert_is(Image.open(io.BytesIO(picture.encoded_image_string)), picture.step)
    assert [(event.step, event.value) for event in events.Scalars("samples/share")] == [(2, 0.5), (4, 1.0)]
    losses = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("loss")]
    assert losses == [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path / "run")]


def test_trackio_gets_what_callbacks_draw(tmp_path):
    """In a process of its own: it reads its folder from the environment when it is imported. Nothing is sent."""
    pytest.importorskip("trackio")
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); from pathlib import Path; "
    code += "import test_training_trainer_trackers as tests; tests.train(Path('run'), 'trackio')"
    environment = dict(os.environ, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").glob("shapes*.db")
    with sqlite3.connect(database) as connection:
        logged = connection.execute("select step, metrics from metrics order by id").fetchall()
    connection.close()
    logged = [(step, json.loads(metrics)) for step, metrics in logged]
    pictures = [(step, metrics["samples/grid"]["file_path"]) for step, metrics in logged if "samples/grid" in metrics]
    assert [step for step, _ in pictures] == [2, 4]
    for step, path in pictures:
        assert_is(Image.open(tmp_path / "trackio" / "media" / path), step)
    assert [(step, metrics["samples/share"]) for step, metrics in logged if "samples/share" in metrics] == [
        (2, 0.5),
        (4, 1.0),
    ]
    losses = [(step, metrics["loss"]) for step, metrics in logged if "loss" in metrics]
    assert losses == [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path / "run")]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            torch.zeros(2, 2, 3),
            ValueError,
            r"'it': an image is \(height, width, 3\) of uint8, got .* of float32",
        ),
        ("red", TypeError, "Gives.on_sample returned str as 'it': expected a number, or an image"),
        (Image.new("RGB", (2, 2)), TypeError, "Gives.on_sample returned Image as 'it': expected a number, or an image"),
    ],
)
def test_what_a_callback_may_not_return_is_refused_with_or_without_a_tracker(tmp_path, value, error, message):
    class Gives(Callback):
        def on_sample(self, trainer):
            return {"it": value}

    with pytest.raises(error, match=message):
        trainer(tmp_path, CONFIG, callbacks=[Gives()]).fit()
