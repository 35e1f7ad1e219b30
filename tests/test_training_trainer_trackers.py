"""What a run sends to trackers, through the trainer: numbers, and the pictures that callbacks return."""

import io
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image
from test_training_trainer import CONFIG, rows, trainer
from tracked import tensorboard_events, trackio_run

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
    train(tmp_path / "run", "tensorboard")
    events = tensorboard_events(tmp_path / "run" / "shapes" / "run")
    pictures = events.Images("samples/grid")
    assert [picture.step for picture in pictures] == [2, 4]
    for picture in pictures:
        assert_is(Image.open(io.BytesIO(picture.encoded_image_string)), picture.step)
    assert [(event.step, event.value) for event in events.Scalars("samples/share")] == [(2, 0.5), (4, 1.0)]
    losses = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("loss")]
    assert losses == [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path / "run")]


def test_trackio_gets_what_callbacks_draw(tmp_path):
    statement = "from pathlib import Path; import test_training_trainer_trackers as tests; "
    logged, _ = trackio_run(statement + "tests.train(Path('run'), 'trackio')", tmp_path)
    pictures = [(it.step, it.values["samples/grid"]["file_path"]) for it in logged if "samples/grid" in it.values]
    assert [step for step, _ in pictures] == [2, 4]
    for step, path in pictures:
        assert_is(Image.open(tmp_path / "trackio" / "media" / path), step)
    shares = [(it.step, it.values["samples/share"]) for it in logged if "samples/share" in it.values]
    assert shares == [(2, 0.5), (4, 1.0)]
    losses = [(it.step, it.values["loss"]) for it in logged if "loss" in it.values]
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
