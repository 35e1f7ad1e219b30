"""`python -m transfusion_pytorch sample`: what it writes for a saved model, and what it says to mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from transfusion_pytorch import Transfusion, train_bpe
from transfusion_pytorch.__main__ import main
from transfusion_pytorch.commands.errors import one_line, run_command
from transfusion_pytorch.commands.pictures import PictureModel, save_picture
from transfusion_pytorch.data import BucketedSize, FixedSize, ImageReader, NativeSize
from transfusion_pytorch.data.loader import StepLoader
from transfusion_pytorch.data.loading import SampleError
from transfusion_pytorch.data.plan import DataPlan
from transfusion_pytorch.display.lines import CONTROL_CHARACTERS, without_controls
from transfusion_pytorch.modalities.patches import PatchDecoder, PatchEncoder

TRUNK = dict(dim=16, depth=1, heads=1, dim_head=16)


def tiny(channels: int = 3, patch: int = 2, *, sizing=None, num_text_tokens: int = 256, **options) -> Transfusion:
    encoder = PatchEncoder(patch, channels=channels, sizing=sizing)
    defaults = dict(
        dim_latent=encoder.dim_latent,
        modality_encoder=encoder,
        modality_decoder=PatchDecoder(patch),
        modality_default_shape=(2, 3),
        fallback_to_default_shape_if_invalid=True,
    )
    return Transfusion(num_text_tokens=num_text_tokens, transformer=TRUNK, **(defaults | options))


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def picture_file(path: Path, size=(9, 5)) -> Path:
    Image.new("RGB", size, (255, 0, 0)).save(path)
    return path


def sample(*arguments: object) -> None:
    main(["sample", *map(str, arguments), "--steps", "2"])


def error_of(capsys, *arguments: object) -> str:
    """The one line that a mistake gets, with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        sample(*arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# patches as an autoencoder


@pytest.mark.parametrize(("channels", "patch"), [(1, 1), (3, 2), (3, 4)])
def test_patches_come_back_as_they_were_through_a_saved_model(tmp_path, channels, patch):
    model = tiny(channels, patch, sizing=BucketedSize(64, patch))
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    images = torch.rand(2, 8, 12, channels) * 2 - 1
    io = loaded.modalities[0]
    assert (
        io.encoder(images).shape
        == (2, 8 // patch, 12 // patch, channels * patch**2)
        == (
            2,
            8 // patch,
            12 // patch,
            io.encoder.dim_latent,
        )
    )
    assert torch.equal(io.decoder(io.encoder(images)), images)
    assert io.encoder.sizing == BucketedSize(64, patch)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"expected images \(h, w, 3\), got \(4, 4, 1\)"):
        tiny()([[torch.zeros(4, 4, 1)]])
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        PatchEncoder(0)


# what a model says of its images


def test_images_are_read_as_the_model_saw_them():
    assert PictureModel(tiny()).reader == ImageReader(FixedSize(4, 6), mode="RGB")
    assert PictureModel(tiny(1, sizing=BucketedSize(64, 2))).reader == ImageReader(BucketedSize(64, 2), mode="L")
    plain = tiny(modality_encoder=None, modality_decoder=None, dim_latent=3)
    assert PictureModel(plain).reader == ImageReader(FixedSize(2, 3), mode="RGB")
    first = tiny(modality_encoder=None, modality_decoder=None, dim_latent=1, channel_first_latent=True)
    assert PictureModel(first).reader == ImageReader(FixedSize(2, 3), mode="L", channels_first=True)


def test_channels_first_come_out_last():
    model = tiny(modality_encoder=None, modality_decoder=None, dim_latent=3, channel_first_latent=True).eval()
    (drawn,) = PictureModel(model).draw(["a"], modality_steps=2, fixed_modality_shape=(2, 5))
    assert drawn.shape == (2, 5, 3)


def test_captions_begin_as_asked_and_are_text_alone(tmp_path):
    pictures = PictureModel(tiny().eval(), longest_text=5)
    image = pictures.read(picture_file(tmp_path / "a.png"))
    assert torch.equal(image, torch.tensor([1.0, -1.0, -1.0]).expand(4, 6, 3))
    (text,) = pictures.describe([image], beginning="a red")
    assert text.startswith("a red")
    assert len(text) > len("a red")


def test_pictures_are_written_to_the_last_level(tmp_path):
    picture = torch.arange(256).reshape(16, 16, 1) / 127.5 - 1
    save_picture(tmp_path / "a.png", picture)
    assert torch.allclose(ImageReader(16, mode="L")((tmp_path / "a.png").read_bytes()), picture, atol=1e-6)


# the command


def test_what_a_model_writes_does_not_command_the_terminal(saved, tmp_path, capsys):
    sample(saved, "--num", 8, "--out", tmp_path / "out")
    printed, kept = capsys.readouterr().out, (tmp_path / "out" / "samples.txt").read_text()
    assert CONTROL_CHARACTERS.search(kept)
    assert not CONTROL_CHARACTERS.search(printed)
    assert without_controls("a\x1b[2Jb\tc\nd") == "a\ufffd[2Jb\tc\nd"


def test_every_prompt_is_drawn_and_the_seed_decides(saved, tmp_path, capsys):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample(saved, "a cat", "a dog", "--num", 2, "--out", tmp_path / out, "--seed", seed)
    lines = (tmp_path / "a/samples.txt").read_text().splitlines()
    assert lines == ["001.png: a cat", "002.png: a cat", "003.png: a dog", "004.png: a dog"]
    assert capsys.readouterr().out.splitlines()[:5] == [*lines, f"written to {tmp_path / 'a'}"]
    drawn = {out: [(tmp_path / out / f"{i:03}.png").read_bytes() for i in range(1, 5)] for out in "abc"}
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert len(set(drawn["a"])) == 4


def test_images_are_captioned(saved, tmp_path, capsys):
    files = [picture_file(tmp_path / name) for name in ("a.png", "b.jpg")]
    sample(saved, "a red", "--image", *files, "--out", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{file}: a red") for file, line in zip(files, lines, strict=False)] == [True, True]
    assert not list((tmp_path / "out").glob("*.png"))


def test_without_a_prompt_the_model_does_as_it_likes(saved, tmp_path):
    sample(saved, "--num", 3, "--out", tmp_path / "out")
    assert (tmp_path / "out/samples.txt").is_file()


def test_a_tokenizer_travels_with_the_model(tmp_path, capsys):
    text = train_bpe(["a red apple"] * 3, 260)
    tiny(num_text_tokens=text.num_tokens).save_pretrained(tmp_path / "model", tokenizer=text.tokenizer)
    sample(tmp_path / "model", "a red apple", "--out", tmp_path / "out")
    assert (tmp_path / "out/001.png").is_file()
    assert PictureModel(Transfusion.from_pretrained(tmp_path / "model")).text.num_tokens == text.num_tokens


@pytest.mark.parametrize(
    "order", [("a cat", "--num", 2), ("--num", 2, "a cat"), ("--out", "{out}", "a cat", "--num", 2)]
)
def test_prompts_stand_anywhere(saved, tmp_path, order):
    out = tmp_path / "out"
    sample(saved, *(str(each).format(out=out) for each in order), "--out", out)
    assert (out / "samples.txt").read_text().splitlines() == ["001.png: a cat", "002.png: a cat"]


def test_options_that_there_are_not(saved, capsys):
    with pytest.raises(SystemExit):
        sample(saved, "--numb", 2, "a cat")
    assert "unrecognized arguments: --numb 2 a cat" in capsys.readouterr().err


def test_pictures_of_prompts_have_room_however_large_they_are():
    model = PictureModel(tiny(sizing=NativeSize(2, 4, 400)).eval(), longest_text=4, most_latents=6)
    assert len(model.describe([torch.zeros(2, 200, 3)], modality_steps=1)) == 1
    plain = tiny(modality_encoder=None, modality_decoder=None, dim_latent=3, channel_first_latent=True).eval()
    assert len(PictureModel(plain, longest_text=4).describe([torch.zeros(3, 9, 20)])) == 1


def test_nothing_asked_is_nothing_made():
    model = PictureModel(tiny())
    assert model.draw([]) == model.describe([]) == []


# mistakes


def test_no_such_model(tmp_path, capsys):
    assert error_of(capsys, tmp_path / "nothing", "a cat").startswith("error: there is no folder")


def test_not_an_image(saved, tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("not an image")
    line = error_of(capsys, saved, "--image", file, "--out", tmp_path)
    assert line.startswith(f"error: {file} is not a whole image")
    assert error_of(capsys, saved, "--image", tmp_path / "x.png", "--out", tmp_path) == (
        f"error: {tmp_path / 'x.png'}: No such file or directory"
    )


def test_model_without_images(tmp_path, capsys):
    Transfusion(num_text_tokens=256, dim_latent=5, modality_default_shape=(4,), transformer=TRUNK).save_pretrained(
        tmp_path / "model"
    )
    expected = "error: the model has no images: those have two axes, and a PatchEncoder or 1 or 3 channels; it has "
    for arguments in (["a cat"], ["--image", picture_file(tmp_path / "a.png")]):
        line = error_of(capsys, tmp_path / "model", *arguments, "--out", tmp_path)
        assert line == f"{expected}5 channels, 1 axes"


def test_model_whose_text_nobody_can_read(tmp_path, capsys):
    tiny(num_text_tokens=10).save_pretrained(tmp_path / "model")
    line = error_of(capsys, tmp_path / "model", "a cat", "--out", tmp_path)
    assert line.startswith("error: the model has 10 text tokens and no tokenizer")


def test_options_that_make_no_sense(saved, tmp_path, capsys):
    assert error_of(capsys, saved, "a", " ", "--out", tmp_path).startswith("error: prompt 2 is empty")
    assert error_of(capsys, saved, "a", "--num", 0) == "error: --num is at least 1, got 0"
    assert error_of(capsys, saved, "a", "b", "--image", "x.png").startswith("error: one PROMPT can begin the captions")
    assert "text_temperature" in error_of(capsys, saved, "a", "--temperature", -1, "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert error_of(capsys, saved, "a", "--out", tmp_path / "file") == f"error: {tmp_path / 'file'}: File exists"


# errors of commands in general


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [ValueError("a\n  b"), OSError("a b"), ImportError("a b"), SampleError("a b")])
def test_what_users_can_mend_is_one_line(error, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run_command(lambda: fail(error))
    assert capsys.readouterr().err == "error: a b\n"
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_command(lambda: fail(error))


class Broken:
    """A data set whose errors have messages of several lines."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError("of another\nNote: kind")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_worker_says_what_it_says_elsewhere(workers):
    loader = StepLoader(DataPlan(Broken(), batch_size=1), lambda samples, _: samples, num_workers=workers)
    said = ""
    try:
        next(iter(loader))
    except SampleError as error:
        error.__traceback__ = None  # so that the worker ends at once
        said = one_line(error)
    assert said.startswith("source 'data', index ")
    assert said.endswith("could not be loaded: ValueError: of another Note: kind")


def test_faults_of_our_own_keep_their_traceback():
    with pytest.raises(AssertionError):
        run_command(lambda: fail(AssertionError("a")))


def test_an_error_without_words_has_its_type():
    assert one_line(ValueError()) == "ValueError"


def test_the_module_is_a_command():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-m", "transfusion_pytorch", "sample", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "--image" in shown.stdout
