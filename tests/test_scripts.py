"""The scripts at the root, run as a user runs them. What they must reach is what the README says they do."""

import importlib.util
import re
import signal
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from transfusion_pytorch import AutoencoderTrainer, KLAutoencoder, TrainConfig, Transfusion
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.display.lines import CONTROL_CHARACTERS
from transfusion_pytorch.examples.data import LabelledImages, load_images
from transfusion_pytorch.examples.language_models import default_language_model, write_random
from transfusion_pytorch.examples.latents import prepare_autoencoder
from transfusion_pytorch.examples.pictures import load_picture

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", script, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


def pictures_with_captions(folder: Path, count: int = 24) -> Path:
    """One colour each, of three sizes, with its name beside it."""
    folder.mkdir()
    for i in range(count):
        size = ((8, 8), (16, 8), (6, 12))[i % 3]
        Image.new("RGB", size, (255 * (i % 2), 10 * i, 255 * (i % 3 // 2))).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"colour number {i}")
    return folder


def percentage(pattern: str, output: str) -> float:
    return float(re.search(pattern, output).group(1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_common_options(monkeypatch, capsys, script):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help", script=script)
    output = capsys.readouterr().out
    assert all(option in output for option in ("--steps", "--seed", "--device", "--results"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_read_from_the_device_every_few_steps_only(script):
    module = load(script)
    recipes = getattr(module, "RECIPES", {}).values()
    configs = [value for recipe in recipes for value in recipe if isinstance(value, TrainConfig)]
    configs += [module.DEFAULTS] if hasattr(module, "DEFAULTS") else []
    assert configs
    assert min(config.log_every for config in configs) >= 10


@pytest.mark.slow
def test_toy_lowers_every_loss(tmp_path):
    output = run("train_toy.py", "--steps", 150, "--results", tmp_path)
    falls = re.findall(r": ([\d.]+) over the first tenth of the steps, ([\d.]+) over the last", output)
    assert len(falls) == 3
    assert all(float(last) < 0.7 * float(first) for first, last in falls)
    assert len(list(tmp_path.glob("toy-*/losses.png"))) == 1


@pytest.mark.slow
def test_text_learns_something(tmp_path):
    output = run("train_text_only.py", "--steps", 60, "--results", tmp_path, "--write", 20)
    assert percentage(r"validation: ([\d.]+) bits per byte", output) < 5


@pytest.mark.slow
def test_digits_are_drawn_as_asked_and_named_correctly(tmp_path):
    output = run("train_mnist.py", "--results", tmp_path)
    assert percentage(r"judge: recognises ([\d.]+)%", output) >= 98
    assert percentage(r"drawing: ([\d.]+)%", output) >= 98
    assert percentage(r"captioning: ([\d.]+)%", output) >= 95
    assert len(list(tmp_path.glob("digits-both-*/drawings.png"))) == 1


CAPTIONED, VAE = "train_captioned_images.py", "train_vae.py"
SHORT = ("--size", 8, "--dim", 32, "--depth", 1, "--modality-steps", 2)


@pytest.mark.slow
def test_a_folder_becomes_a_model_that_can_be_used_and_gone_on_with(tmp_path):
    folder = pictures_with_captions(tmp_path / "pictures")
    options = ("--data", folder, "--sizes", "native", "--token-budget", 200, "--bpe", 300, *SHORT)
    output = run(CAPTIONED, *options, "--steps", 3, "--prompt", "colour number 7", "--results", tmp_path / "results")
    (made,) = (tmp_path / "results").iterdir()
    assert percentage(r"the token budget of 200 was filled to ([\d.]+)%", output) > 50
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= {
        file.name for file in (made / "model").iterdir()
    }
    assert len(list(made.glob("step-*.png"))) == 3
    command = output.splitlines()[-1]
    assert command == f'python -m transfusion_pytorch sample {made / "model"} "colour number 7"'

    drawing = [sys.executable, *command.split()[1:5], "colour number 7", "--out", str(tmp_path / "out"), "--steps", "2"]
    assert subprocess.run(drawing, cwd=ROOT).returncode == 0
    with Image.open(tmp_path / "out/001.png") as drawn:
        assert drawn.mode == "RGB"

    # another number of steps, so that there is something left to do
    resumed = run(CAPTIONED, *options, "--steps", 4, "--results", tmp_path / "results", "--resume")
    assert f"run: {made}, step 3 of 4" in resumed
    assert len(list((tmp_path / "results").iterdir())) == 1


def load(script: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch, *arguments: object, script: str = CAPTIONED) -> None:
    """Runs a script in this process, which saves the seconds of a start."""
    module = load(script)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    run_command(module.main)


def error_of(monkeypatch, capsys, script: str, *arguments: object) -> str:
    """The last line of what a script says to a mistake."""
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, *arguments, script=script)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("prompt", ["", "né€ "])
def test_text_goes_on_from_any_prompt_on_any_terminal(tmp_path, monkeypatch, prompt):
    (tmp_path / "text").write_text("a line of text\n" * 400)
    sizes = ("--dim", 48, "--depth", 1, "--length", 16, "--steps", 1, "--write", 5)
    screen = TextIOWrapper(BytesIO(), encoding="ascii")
    with redirect_stdout(screen):
        options = ("--data", tmp_path / "text", "--results", tmp_path / "results", "--prompt", prompt)
        call(monkeypatch, *options, *sizes, script="train_text_only.py")
    (written,) = (file.read_bytes() for file in tmp_path.glob("results/text-*/sample.txt"))
    assert written.startswith(prompt.encode())
    assert len(written) == len(prompt.encode()) + 5
    screen.flush()
    assert prompt.replace("é", "?").replace("€", "?").encode() in screen.buffer.getvalue()


@pytest.mark.parametrize("options", [("--unet", "--sizes", "bucketed"), ("--grey", "--patch", 4, "--held-out", 0)])
def test_images_of_every_kind_can_be_learned(tmp_path, monkeypatch, capsys, options):
    folder = pictures_with_captions(tmp_path / "pictures", count=6)
    call(monkeypatch, "--data", folder, *options, *SHORT, "--steps", 1, "--results", tmp_path / "results")
    assert "of training images are theirs" in capsys.readouterr().out


def test_the_model_is_saved_before_it_is_scored(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise ValueError("no score")

    folder = pictures_with_captions(tmp_path / "pictures", count=6)
    monkeypatch.setattr("transfusion_pytorch.examples.captions.score_remembered", fails)
    with pytest.raises(SystemExit):
        call(monkeypatch, "--data", folder, *SHORT, "--steps", 1, "--results", tmp_path / "results")
    assert len(list((tmp_path / "results").glob("*/model/model.safetensors"))) == 1


def test_very_wide_images_can_be_described(tmp_path, monkeypatch, capsys):
    folder = pictures_with_captions(tmp_path / "pictures", count=6)
    Image.new("RGB", (2000, 2)).save(folder / "06.png")
    (folder / "06.txt").write_text("wide")
    options = ("--sizes", "native", "--size", 16, "--dim", 32, "--depth", 1, "--modality-steps", 2, "--held-out", 0)
    call(monkeypatch, "--data", folder, *options, "--steps", 1, "--results", tmp_path / "results")
    assert "of training images are theirs" in capsys.readouterr().out


def test_images_without_captions_can_be_learned(tmp_path, monkeypatch, capsys):
    folder = pictures_with_captions(tmp_path / "pictures", count=4)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in folder.glob("*.png"):
            tar.add(file, file.name)
    call(monkeypatch, "--data", tmp_path / "a.tar", *SHORT, "--steps", 1, "--results", tmp_path / "results")
    assert capsys.readouterr().out.endswith("model\n")
    assert len(list((tmp_path / "results").glob("*/model/model.safetensors"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "{tmp}/empty"), "error: no images in"),
        (("--data", "{tmp}/lost"), "error: no image in"),
        (("--data", "{tmp}/good", "--held-out", 1), "error: 3 images cannot be held out of 3"),
        (("--data", "{tmp}/good", "--size", 9, "--patch", 2), "error: patches of 2 pixels do not divide images of 9"),
        (("--results", "{tmp}/file"), "error: results cannot be written to"),
        (("--tracker", "other"), "error: argument --tracker: expected 'none' or 'trackio'"),
        (("--resume",), "error: there is no run images-digits-* with a checkpoint in"),
        (("--resume", "{tmp}/good"), "error: {tmp}/good is neither the folder of a run nor one of its checkpoints"),
        (("--size", 0), "error: argument --size: expected at least 1, got 0"),
        (("--dim", -4), "error: argument --dim: expected at least 1, got -4"),
        (("--prompt", " "), "error: a --prompt is empty"),
        (("--config", "{tmp}/none.yaml"), "error: {tmp}/none.yaml: No such file or directory"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "empty").mkdir()
    lost = pictures_with_captions(tmp_path / "lost", count=1)
    (lost / "captions.jsonl").write_text('{"file_name": "other.png", "text": "a"}')
    (tmp_path / "file").write_text("")
    pictures_with_captions(tmp_path / "good", count=3)
    given = [str(option).format(tmp=tmp_path) for option in options]
    told = error_of(monkeypatch, capsys, CAPTIONED, "--steps", 1, "--results", tmp_path / "results", *given)
    assert message.format(tmp=tmp_path) in told


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            CAPTIONED,
            ("--data", "{tmp}/one", "{tmp}/two"),
            "error: --data takes one folder, or tars; got {tmp}/one, {tmp}/two",
        ),
        (CAPTIONED, ("--data", "{tmp}/a.tar", "{tmp}/two"), "error: --data takes one folder, or tars; got {tmp}/a.tar"),
        (CAPTIONED, ("--data", "{tmp}/none"), "error: argument --data: there is no file or folder '{tmp}/none'"),
        (CAPTIONED, ("--data", "{tmp}/one", "{tmp}/none"), "there is no file or folder '{tmp}/none'"),
        (CAPTIONED, ("--data", ""), "error: argument --data: there is no file or folder ''"),
        (CAPTIONED, ("--data", "{tmp}/one/00.png"), "error: {tmp}/one/00.png is no uncompressed tar"),
        (CAPTIONED, ("--data", "{tmp}/one", "--dataset", "fashion"), "error: give --data or --dataset, not both"),
        ("train_mnist.py", ("--data", "{tmp}/none"), "error: argument --data: there is no file or folder '{tmp}/none'"),
        ("train_mnist.py", ("--data", "{tmp}/one"), "error: digits are read from scikit-learn, not from a folder"),
        ("train_mnist.py", ("--dataset", "mnist", "--data", "{tmp}/one"), "error: no train-images-idx3-ubyte"),
        ("train_mnist.py", ("--dataset", "fashion", "--data", "{tmp}/one"), "error: no train-images-idx3-ubyte"),
        ("train_mnist.py", ("--dataset", "fashion", "--data", ""), "there is no file or folder ''"),
        ("train_mnist.py", ("--data", "{tmp}/one", "{tmp}/two"), "error: unrecognized arguments: {tmp}/two"),
        ("train_text_only.py", ("--data", "{tmp}/none"), "there is no file or folder '{tmp}/none'"),
        ("train_text_only.py", ("--data", ""), "there is no file or folder ''"),
        ("train_text_only.py", ("--data", "{tmp}/one"), "error: {tmp}/one is a folder, not a text file"),
        ("train_text_only.py", ("--data", "{tmp}/empty"), "error: too little text"),
        (VAE, ("--data", "{tmp}/none"), "there is no file or folder '{tmp}/none'"),
        (VAE, ("--data", "{tmp}/empty"), "error: no folder {tmp}/empty"),
        (VAE, ("--data", "{tmp}/one"), "error: 100 images cannot be held out of 2: hold out fewer"),
        (VAE, ("--dataset", "digits", "--data", "{tmp}/one"), "error: digits are read from scikit-learn"),
        (VAE, ("--dataset", "digits", "--widths", 8), "error: widths and num_blocks have an entry for each"),
        (VAE, ("--data", "{tmp}/one", "--held-out", 1, "--perceptual-weight", 1), "images of a folder have no classes"),
        (VAE, ("--dataset", "digits", "--perceptual-weight", -1), "--perceptual-weight is not negative, got -1.0"),
        ("train_toy.py", ("--data", "{tmp}/one"), "error: unrecognized arguments: --data {tmp}/one"),
    ],
)
def test_data_that_are_not_there_are_an_error_and_never_other_data(
    tmp_path, monkeypatch, capsys, script, options, message
):
    for name in ("one", "two"):
        pictures_with_captions(tmp_path / name, count=2)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "one" / "00.png", "00.png")
    (tmp_path / "empty").write_bytes(b"")
    given = [str(option).format(tmp=tmp_path) for option in options]
    told = error_of(monkeypatch, capsys, script, "--steps", 1, "--results", tmp_path / "results", *given)
    assert message.format(tmp=tmp_path) in told
    assert not (tmp_path / "results").exists()


def test_what_an_untrained_model_writes_does_not_command_the_terminal(tmp_path, monkeypatch, capsys):
    options = ("--dim", 48, "--depth", 1, "--length", 16, "--write", 300, "--steps", 1, "--results", tmp_path)
    call(monkeypatch, *options, script="train_text_only.py")
    output = capsys.readouterr().out
    assert "\ufffd" in output
    assert not CONTROL_CHARACTERS.search(output)
    assert CONTROL_CHARACTERS.search(next(tmp_path.glob("*/sample.txt")).read_text(errors="replace"))


def test_a_tracker_gets_what_captions_draw(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = pictures_with_captions(tmp_path / "pictures", count=6)
    options = ("--data", folder, *SHORT, "--steps", 2, "--sample-every", 1, "--tracker", "tensorboard")
    call(monkeypatch, *options, "--results", tmp_path / "results")
    (made,) = (tmp_path / "results").iterdir()
    events = EventAccumulator(str(made / "transfusion" / made.name))
    events.Reload()
    sent = events.Images("samples/drawings")
    assert [picture.step for picture in sent] == [1, 2]
    with Image.open(made / "step-000002.png") as file, Image.open(BytesIO(sent[1].encoded_image_string)) as last:
        assert last.tobytes() == file.convert("RGB").tobytes()


def run_at(folder: Path, model: object = None) -> SimpleNamespace:
    """As much of a trainer as a callback of the scripts asks for."""
    return SimpleNamespace(average=model, is_main=True, folder=folder, step=3)


def test_every_class_is_drawn_for_the_tracker(tmp_path):
    script = load("train_mnist.py")
    artist = SimpleNamespace(draw=lambda model, labels: torch.zeros(len(labels), 1, 8, 8))
    drawn = script.Grids(artist, ["zero", "one"]).on_sample(run_at(tmp_path))["drawings"]
    assert torch.equal(drawn, load_picture(tmp_path / "step-00003.png"))


def test_bars_are_drawn_for_the_tracker(tmp_path):
    script = load("train_toy.py")
    drawn = [torch.tensor([0]), (script.PICTURE, torch.ones(8, 8, 1))]
    callback = script.Drawings()
    images = callback.on_sample(run_at(tmp_path, SimpleNamespace(sample_many=lambda asked, **options: [drawn] * 8)))
    assert torch.equal(images["drawings"], load_picture(tmp_path / "samples.png"))
    nothing = SimpleNamespace(sample_many=lambda asked, **options: [[torch.tensor([0])]] * 8)
    assert callback.on_sample(run_at(tmp_path, nothing)) == {}


SEE = ("train_understanding.py", ("--score", 2), r"name: [\d.]+% of 2 held-out images answered rightly")
DRAW = (
    "train_generation.py",
    ("--draw-per-class", 1, "--modality-steps", 2, "--autoencoder-steps", 2),
    r"drawing: [\d.]+% of 10 recognised",
)


@pytest.mark.parametrize(
    ("script", "options", "said", "kind"),
    [
        (*SEE, "experts"),
        (*SEE, "lora"),
        (*SEE, "everything"),
        (*DRAW, "experts"),
        pytest.param(*DRAW, "lora", marks=pytest.mark.slow),
        pytest.param(*DRAW, "everything", marks=pytest.mark.slow),
    ],
)
def test_a_language_model_learns_to_see_and_to_draw(tmp_path, monkeypatch, capsys, script, options, said, kind):
    pytest.importorskip("transformers")
    pytest.importorskip("peft" if kind == "lora" else "transformers")
    monkeypatch.setenv("TRANSFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transfusion_pytorch.examples.language_models._gguf_file", lambda: None)
    for name in ("LEAST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(f"transfusion_pytorch.examples.judge.{name}", 2)
    results = tmp_path / "results"
    call(monkeypatch, *options, "--train", kind, "--steps", 2, "--batch-size", 2, "--results", results, script=script)
    output = capsys.readouterr().out
    assert "a tiny Llama of random weights" in output
    assert re.search(said, output)
    assert ("logits the same to the bit" in output) == (kind != "everything")
    (made,) = results.iterdir()
    assert len(list(made.glob("step-*.png"))) == 2
    assert (made / "model" / ("adapter_config.json" if kind == "lora" else "config.json")).is_file()


@pytest.mark.parametrize("script", ["train_understanding.py", "train_generation.py"])
def test_a_language_model_that_cannot_be_had_is_told_first(tmp_path, monkeypatch, capsys, script):
    """Above all before an autoencoder is trained for it."""
    pytest.importorskip("transformers")
    results, nowhere = tmp_path / "results", tmp_path / "models" / "nowhere"
    arguments = ("--model", nowhere, "--steps", 2, "--results", results)
    assert f"there is no folder {nowhere} with a language" in error_of(monkeypatch, capsys, script, *arguments)
    write_random(nowhere)
    (nowhere / "chat_template.jinja").unlink()
    assert "no tokenizer with a chat template" in error_of(monkeypatch, capsys, script, *arguments)
    assert not results.exists()


def test_files_in_gguf_need_their_package(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = tmp_path / "package" / "tiny.gguf"
    monkeypatch.setattr("transfusion_pytorch.examples.language_models._gguf_file", lambda: file)
    with pytest.raises(ImportError, match=r'you need gguf here, .* "transfusion-pytorch\[pretrained\]"'):
        default_language_model(tmp_path)
    with pytest.raises(ImportError, match="you need gguf here"):
        Transfusion.from_pretrained_lm(tmp_path, dim_latent=4, gguf_file="tiny.gguf")


def test_drawings_are_latents_of_one_autoencoder(tmp_path):
    """It is trained once and kept with the run; one of other images is refused."""
    images = load_images("digits")
    options = dict(steps=2, config=TrainConfig(steps=1))
    made = prepare_autoencoder(None, tmp_path / "own", images, **options)
    assert made.latent_shape((8, 8)) == (4, 4)
    metrics = (tmp_path / "own" / "metrics.csv").read_text()
    for again in (
        prepare_autoencoder(None, tmp_path / "own", images, **options),
        prepare_autoencoder(tmp_path / "own" / "model", tmp_path / "other", images, **options),
        prepare_autoencoder(None, tmp_path / "other", images, **options),
    ):
        assert all(map(torch.equal, again.state_dict().values(), made.state_dict().values()))
    assert (tmp_path / "own" / "metrics.csv").read_text() == metrics
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["model"]
    KLAutoencoder(2, channels=3, widths=(4,), num_blocks=(0,)).save_pretrained(tmp_path / "coloured")
    with pytest.raises(ValueError, match="coloured has no autoencoder of these images: expected data of shape \\(3, "):
        prepare_autoencoder(tmp_path / "coloured", tmp_path / "third", images, **options)
    larger = images._replace(train=LabelledImages(torch.zeros(2, 1, 16, 16), torch.zeros(2)))
    with pytest.raises(ValueError, match="sides of 28 or 8 pixels, got 16; give an autoencoder of your own"):
        prepare_autoencoder(None, tmp_path / "third", larger, **options)


def test_an_autoencoder_that_was_stopped_goes_on(tmp_path, monkeypatch):
    images, options = load_images("digits"), dict(steps=4, config=TrainConfig(steps=1))
    whole = prepare_autoencoder(None, tmp_path / "whole", images, **options)
    take = AutoencoderTrainer._take

    def stopped(trainer, *args):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return take(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTrainer, "_take", stopped)
        assert prepare_autoencoder(None, tmp_path / "stopped", images, **options) is None
    assert not (tmp_path / "stopped" / "model").exists()
    resumed = prepare_autoencoder(None, tmp_path / "stopped", images, **options)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


NARROW = ("--widths", 4, 8, "--blocks", 0, 1, "--patch-size", 1, "--precision", "fp32")


def test_an_autoencoder_can_learn_what_a_classifier_sees(tmp_path, monkeypatch):
    for name in ("LEAST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(f"transfusion_pytorch.examples.judge.{name}", 2)
    options = ("--dataset", "digits", *NARROW, "--steps", 2, "--results", tmp_path)
    call(monkeypatch, *options, "--perceptual-weight", 0.1, script=VAE)
    (made,) = tmp_path.iterdir()
    header, *rows = (made / "metrics.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[header.split(",").index("perceptual")]) > 0


def test_a_folder_becomes_an_autoencoder_that_can_be_used_and_gone_on_with(tmp_path, monkeypatch, capsys):
    folder = pictures_with_captions(tmp_path / "pictures", count=8)
    options = ("--data", folder, "--size", 8, "--held-out", 3, *NARROW, "--results", tmp_path / "results")
    call(monkeypatch, *options, "--steps", 2, script=VAE)
    output = capsys.readouterr().out
    assert "8 images of" in output
    assert "images of 8 x 8 x 3 to latents of 4 x 4 x 2" in output
    assert re.search(r"held out, 3 images: PSNR [\d.]+ dB \([\d.]+ dB behind samples\), SSIM -?[\d.]+, rate", output)
    (made,) = (tmp_path / "results").iterdir()
    assert {"model", "losses.png", "step-00001.png", "step-00002.png", "metrics.csv"} <= {
        file.name for file in made.iterdir()
    }
    with Image.open(made / "step-00002.png") as picture:
        rows, columns = 2, 3  # images above their reconstructions, each of 64 pixels after it was enlarged
        assert picture.size == (columns * (64 + 8) + 8, rows * (64 + 8) + 8)

    autoencoder = KLAutoencoder.from_pretrained(made / "model")
    model = Transfusion(
        num_text_tokens=0,
        dim_latent=2,
        channel_first_latent=True,
        modality_default_shape=(4, 4),
        modality_encoder=autoencoder.encoder,
        modality_decoder=autoencoder.decoder,
        transformer=dict(dim=16, depth=1),
    )
    assert model.generate_modality_only(batch_size=1, modality_type=0, modality_steps=1).shape == (1, 3, 8, 8)

    call(monkeypatch, *options, "--steps", 3, "--resume", script=VAE)
    assert f"run: {made}, step 2 of 3" in capsys.readouterr().out
    assert len(list((tmp_path / "results").iterdir())) == 1


@pytest.mark.slow
def test_digits_are_reconstructed(tmp_path):
    sizes = ("--widths", 64, "--blocks", 3)  # in patches of 2 x 2 pixels: 4 x 4 x 2 numbers
    output = run(VAE, "--dataset", "digits", *sizes, "--steps", 600, "--results", tmp_path)
    assert percentage(r"held out, 360 images: PSNR ([\d.]+) dB", output) > 26


@pytest.mark.slow
def test_digits_are_drawn_from_captions_and_captioned(tmp_path):
    output = run(CAPTIONED, "--results", tmp_path)
    assert percentage(r"drawings: ([\d.]+)%", output) >= 95
    assert percentage(r"captions: ([\d.]+)%", output) >= 90
