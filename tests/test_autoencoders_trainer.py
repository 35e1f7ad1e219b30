"""Runs that train an autoencoder: what they write, where they go on, and what they refuse."""

import math

import pytest
import torch
from PIL import Image

from transfusion_pytorch import (
    AutoencoderObjective,
    AutoencoderTrainer,
    Callback,
    ImageFiles,
    ImageReader,
    KLAutoencoder,
    SampleError,
    SkipSample,
    TrainConfig,
    TrainingError,
)
from transfusion_pytorch.examples.run import read_metrics

CONFIG = dict(steps=6, batch_size=4, learning_rate=1e-2, ema_beta=None, log_every=2, device="cpu", warmup=0)


def model():
    torch.manual_seed(0)
    return KLAutoencoder(2, channels=1, widths=(8, 16), num_blocks=(0, 1))


def images(count=32, size=8):
    """Discs of random places and sizes."""
    generator = torch.Generator().manual_seed(3)
    x, y, radius = torch.rand(3, count, 1, 1, 1, generator=generator)
    grid = torch.linspace(0, 1, size)
    distance = ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()
    return ((0.2 + 0.5 * radius - distance) * 8).clamp(-1, 1)


def trainer(folder, *, data=None, validates=True, objective=None, callbacks=(), **changes):
    config = TrainConfig(**(CONFIG | changes))
    data = images() if data is None else data
    options = dict(objective=objective, folder=folder, validation=images(8) if validates else None, callbacks=callbacks)
    return AutoencoderTrainer(model(), data, config, **options)


def test_it_learns_to_reconstruct(tmp_path):
    run = trainer(tmp_path, steps=150)
    before = run.score()
    fitted = run.fit()
    assert fitted.step == 150
    assert not fitted.was_stopped
    assert fitted.figures["psnr"] > before.psnr + 6
    assert run.score()._asdict() == fitted.figures
    losses = read_metrics(tmp_path)
    assert losses["loss"][-1][1] < losses["loss"][0][1] / 4
    assert losses["validation/psnr"][-1] == (150, fitted.figures["psnr"])
    for step, loss in losses["loss"]:
        kl, reconstruction = dict(losses["kl"])[step], dict(losses["reconstruction"])[step]
        assert loss == pytest.approx(reconstruction + 1e-4 * kl, rel=1e-4)


@pytest.mark.parametrize("ema_beta", [None, 0.9])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, ema_beta):
    """From a checkpoint between the last ones, with data workers or without."""
    whole = trainer(tmp_path / "whole", ema_beta=ema_beta, save_every=1)
    whole.fit()
    resumed = trainer(tmp_path / "resumed", ema_beta=ema_beta, save_every=2, steps=6)
    resumed.fit(resume=tmp_path / "whole/checkpoints/step-00000005")
    assert resumed.step == 6
    again = trainer(tmp_path / "whole", ema_beta=ema_beta)
    again.fit(resume=True)  # nothing is left to do
    for other in (resumed, again):
        for name, tensor in whole.average.state_dict().items():
            assert torch.equal(tensor, other.average.state_dict()[name]), name
    assert (whole.average is whole.model) == (ema_beta is None)


def test_the_scale_of_latents_is_measured_and_saved(tmp_path):
    run = trainer(tmp_path)
    run.fit()
    run.save_pretrained(tmp_path / "model")
    loaded = KLAutoencoder.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        latents = loaded.encoder(images())
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=0.2)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(2), rtol=0, atol=0.2)


def test_epochs_are_passes_through_the_data(tmp_path):
    assert trainer(tmp_path, steps=None, epochs=2).config.steps == 16


def test_features_are_compared_where_there_are_any(tmp_path):
    features = torch.nn.Conv2d(1, 4, 3)
    run = trainer(tmp_path, objective=AutoencoderObjective(features=features), steps=2, validates=False)
    fitted = run.fit()
    assert fitted.figures["perceptual"] > 0
    with pytest.raises(ValueError, match="there is no validation data"):
        run.score()


class Seen(Callback):
    def __init__(self):
        self.calls = []

    def on_sample(self, trainer):
        self.calls.append(("sample", trainer.step, trainer.average.training))
        return {"figure": 2.5}

    def on_validation(self, trainer, figures):
        self.calls.append(("validation", trainer.step, math.isfinite(figures["psnr"])))

    def on_save(self, trainer, path):
        self.calls.append(("save", trainer.step, path.is_dir()))


def test_callbacks_see_the_run(tmp_path):
    seen = Seen()
    trainer(tmp_path, callbacks=[seen], validate_every=4, sample_every=3, save_every=0).fit()
    assert seen.calls == [
        ("sample", 3, False),
        ("validation", 4, True),
        ("validation", 6, True),
        ("sample", 6, False),
        ("save", 6, True),
    ]
    assert read_metrics(tmp_path)["samples/figure"] == [(3, 2.5), (6, 2.5)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(batch_size=None, token_budget=100), "token_budget cannot be set for an autoencoder"),
        (dict(optimizer="muon", accumulation=2), "accumulation, optimizer cannot be set"),
        (dict(details_every=5), "details_every cannot be set"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **changes)


class Broken:
    """Data of which one cannot be read, and one is not finite."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            raise SkipSample("a broken file")
        return images(8)[index] * (math.nan if index == 5 else 1)

    def describe(self, index):
        return f"{index}.png"


def test_bad_samples_are_named_or_left_out(tmp_path, capsys):
    with pytest.raises(SampleError, match=r"source 'data', index 5: it has NaN or infinity"):
        trainer(tmp_path / "stop", data=Broken()).fit()
    trainer(tmp_path / "skip", data=Broken(), on_bad_sample="skip").fit()
    told = capsys.readouterr().err
    assert "left out: data[2]: a broken file" in told
    assert "left out: data[5]: it has NaN or infinity" in told


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([[torch.zeros(1, 8, 8), torch.zeros(2)]], "expected one floating point tensor, got 2 parts"),
        ([torch.zeros(1, 8, 8, dtype=torch.long)], "expected one floating point tensor, got 1 parts"),
        ([torch.zeros(3, 8, 8)], r"expected data of shape \(1, 2 k, 2 k\)"),
        ([torch.zeros(1, 8, 8), torch.zeros(1, 8, 6)], "as the others of its batch"),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, data, problem):
    with pytest.raises(SampleError, match=problem):
        trainer(tmp_path, data=data).fit()


def test_data_without_a_length_are_refused(tmp_path):
    with pytest.raises(TypeError, match="a tensor, a list or a dataset with a length, got generator"):
        trainer(tmp_path, data=(image for image in images()))


def test_a_step_that_is_not_finite_stops_the_run_if_asked_to(tmp_path):
    run = trainer(tmp_path, on_bad_step="stop")
    with torch.no_grad():
        run.model.decoder.conv_out.bias.fill_(math.inf)
    with pytest.raises(TrainingError, match="step 0: the gradient is not finite"):
        run.fit()


# images of a folder


def test_images_of_a_folder_are_read_with_channels_first(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, colour in (("b.png", (255, 0, 0)), ("inner/a.jpg", (0, 0, 0)), ("c.png", (255, 255, 255))):
        Image.new("RGB", (6, 4), colour).save(tmp_path / name)
    (tmp_path / "d.png").write_bytes(b"no image")
    files = ImageFiles(tmp_path, images=4)
    assert files.names == ["b.png", "c.png", "d.png", "inner/a.jpg"]
    assert torch.equal(files[0], torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 4, 4))
    assert files.describe(3) == str(tmp_path / "inner/a.jpg")
    with pytest.raises(SkipSample):
        files[2]
    grey = ImageFiles(tmp_path, images=ImageReader(2, "L", channels_first=True))
    assert torch.equal(grey[1], torch.ones(1, 2, 2))


def test_images_that_are_held_out_are_not_trained_on(tmp_path):
    for i in range(6):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    files = ImageFiles(tmp_path, images=4)
    train, held_out = files.hold_out(2, seed=1)
    assert sorted(train.names + held_out.names) == files.names
    assert (len(train), len(held_out), len(files)) == (4, 2, 6)
    assert files.hold_out(2, seed=1)[1].names == held_out.names
    assert any(files.hold_out(2, seed=seed)[1].names != held_out.names for seed in range(2, 6))
    with pytest.raises(ValueError, match="6 images cannot be held out of 6"):
        files.hold_out(6)
