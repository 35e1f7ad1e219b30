"""What the example scripts share: data that arrives whole or says why not, a judge worth believing, true pictures."""

import argparse
import gzip
import random
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

from transfusion_pytorch.data.images import patchify, unpatchify
from transfusion_pytorch.examples import data as data_module
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.data import load_images, load_text, read_idx
from transfusion_pytorch.examples.judge import Judge, accuracy, augment, frechet_distance, recognised, train_judge
from transfusion_pytorch.examples.pairs import LabelImagePairs
from transfusion_pytorch.examples.pictures import COLOURS, points, save_curves, save_grid, smooth
from transfusion_pytorch.training.config import TrainConfig, config_from_arguments

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def idx_bytes(values: torch.Tensor) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.numpy().tobytes()


def plant_idx(folder, *, suffix="", **replaced):
    """Writes the four files of 6 and 4 images; `replaced` has other contents for `train_images` and so on."""
    wrap = gzip.compress if suffix else bytes
    images, labels = torch.randint(256, (10, 5, 7), dtype=torch.uint8), torch.arange(10, dtype=torch.uint8)
    for half, part in (("train", slice(0, 6)), ("t10k", slice(6, 10))):
        for kind, axes, values in (("images", 3, images[part]), ("labels", 1, labels[part])):
            content = replaced.get(f"{half}_{kind}", idx_bytes(values))
            (folder / f"{half}-{kind}-idx{axes}-ubyte{suffix}").write_bytes(wrap(content))
    return images, labels


class Download:
    """What `datasets` answers, in as far as it is used: `download.with_format("numpy")["train"][:]["image"]`."""

    def __init__(self, images):
        self.rows = {"image": images, "label": numpy.arange(len(images))}

    def with_format(self, kind):
        assert kind == "numpy"
        return self

    def __getitem__(self, key):
        return self.rows if key == slice(None) else self


def plant_datasets(monkeypatch, load_dataset):
    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def rows_of(images):
    return {tuple(image.flatten().tolist()) for image in images}


# images


def test_digits_are_split_the_same_way_every_time():
    first, second = load_images("digits"), load_images("digits")
    assert all(a.equal(b) for a, b in zip(first.train + first.test, second.train + second.test, strict=True))
    assert first.train.images.shape == (1437, 1, 8, 8)
    assert first.test.images.shape == (360, 1, 8, 8)
    assert first.train.images.aminmax() == (-1, 1)
    assert first.name == "digits"
    assert first.class_names == tuple("0123456789")


def test_digits_are_split_without_overlap_and_in_proportion():
    train, test = load_images("digits")[:2]
    assert not rows_of(train.images) & rows_of(test.images)
    everything = torch.cat([train.labels, test.labels]).bincount()
    assert ((test.labels.bincount() - 0.2 * everything).abs() <= 1).all()


def test_digits_keep_every_image_with_its_label():
    from sklearn.datasets import load_digits

    digits, loaded = load_digits(), load_images("digits")
    known = {
        tuple(image.flatten().tolist()): label
        for image, label in zip(digits.images / 8 - 1, digits.target, strict=True)
    }
    for half in (loaded.train, loaded.test):
        assert all(known[tuple(image.flatten().tolist())] == label for image, label in zip(*half, strict=True))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["fashion", "mnist"])
def test_idx_folder_is_read(tmp_path, name, suffix):
    images, labels = plant_idx(tmp_path, suffix=suffix)
    loaded = load_images(name, tmp_path)
    read = torch.cat([loaded.train.images, loaded.test.images])
    assert torch.equal(((read[:, 0] + 1) * 127.5).round().to(torch.uint8), images)
    assert torch.equal(torch.cat([loaded.train.labels, loaded.test.labels]), labels.long())
    assert len(loaded.class_names) == 10
    assert loaded.name == name
    assert str(tmp_path) in loaded.source


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 1, 3, 4)])
def test_idx_round_trip(tmp_path, shape):
    values = torch.randint(256, shape, dtype=torch.uint8)
    (tmp_path / "x").write_bytes(idx_bytes(values))
    assert read_idx(tmp_path / "x").equal(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 00 00 08, the number of axes, and their sizes, got nothing"),
        (b"<html>", "got 3c 68 74 6d"),
        (b"\0\0\x0d\1" + bytes(8), "got 00 00 0d 01 00"),
        (b"\0\0\x08\3\0\0", "got 00 00 08 03 00 00$"),
        (idx_bytes(torch.ones(2, 3, dtype=torch.uint8))[:-1], r"its header says \(2, 3\), but 5 bytes follow"),
        (idx_bytes(torch.ones(2, 3, dtype=torch.uint8)) + b"x", r"its header says \(2, 3\), but 7 bytes follow"),
        (idx_bytes(torch.ones(0, dtype=torch.uint8)), r"its header says \(0,\), but 0 bytes follow"),
        (gzip.compress(b"cut short" * 9, mtime=0)[:-9], "corrupt: Compressed file ended"),
    ],
)
def test_corrupt_idx_is_refused(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "x")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_labels": torch.arange(5, dtype=torch.uint8)}, r"got \(6, 5, 7\) and \(5,\)"),
        ({"t10k_images": torch.ones(4, 5, dtype=torch.uint8)}, r"got \(4, 5\) and \(4,\)"),
        ({"t10k_labels": torch.full((4,), 10, dtype=torch.uint8)}, "expected labels below 10, got 10"),
    ],
)
def test_idx_files_that_do_not_belong_together_are_refused(tmp_path, replaced, message):
    plant_idx(tmp_path, **{name: idx_bytes(values) for name, values in replaced.items()})
    with pytest.raises(ValueError, match=message):
        load_images("fashion", tmp_path)


def test_a_missing_file_of_the_usual_folder_falls_back_with_one_warning(tmp_path, monkeypatch):
    plant_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    monkeypatch.setattr(data_module, "FASHION_FOLDER", str(tmp_path))
    with pytest.warns(UserWarning, match="fashion could not be loaded .*no t10k-labels-idx1-ubyte") as caught:
        loaded = load_images("fashion")
    assert len(caught) == 1
    assert loaded.name == "digits"
    assert "because fashion could not be loaded" in loaded.source


@pytest.mark.parametrize("name", ["fashion", "mnist"])
def test_a_folder_that_was_asked_for_is_never_replaced(tmp_path, name):
    plant_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="no t10k-labels-idx1-ubyte"):
        load_images(name, tmp_path)


def test_download_is_read(monkeypatch):
    grey = numpy.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=numpy.uint8)
    plant_datasets(monkeypatch, lambda name: Download(grey))
    loaded = load_images("mnist")
    assert torch.equal(((loaded.train.images[:, 0] + 1) * 127.5).round().to(torch.uint8), torch.tensor(grey))
    assert loaded.test.labels.tolist() == [0, 1, 2, 3]
    assert loaded.name == "mnist"


def test_failed_download_falls_back_with_one_warning(monkeypatch):
    def load_dataset(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    plant_datasets(monkeypatch, load_dataset)
    with pytest.warns(UserWarning, match="mnist could not be loaded .*Couldn't reach 'ylecun/mnist'") as caught:
        assert load_images("mnist").name == "digits"
    assert len(caught) == 1


def test_wrong_name_and_needless_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown images 'cifar', choose one of digits, fashion, mnist"):
        load_images("cifar")
    with pytest.raises(ValueError, match="digits are read from scikit-learn, not from a folder"):
        load_images("digits", tmp_path)


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("datasets", "hub", lambda folder: load_images("mnist")),
        ("sklearn.datasets", "examples", lambda folder: load_images("digits")),
        ("matplotlib.figure", "examples", lambda folder: save_curves(folder / "x.png", {})),
        ("PIL.Image", "examples", lambda folder: save_grid(folder / "x.png", torch.zeros(1, 1, 8, 8))),
        ("tqdm", "examples", lambda folder: run.progress(3)),
    ],
)
def test_missing_dependency_names_the_extra(monkeypatch, tmp_path, module, extra, call):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.split(".")[0]
    with pytest.raises(ImportError, match=rf'need {package} here.*pip install "transfusion-pytorch\[{extra}\]"'):
        call(tmp_path)


@pytest.mark.parametrize(("shape", "size"), [((2, 1, 8, 8), 2), ((2, 3, 12, 8), 4), ((3, 6, 9), 3), ((1, 1, 7, 5), 1)])
def test_patches_round_trip(shape, size):
    images = torch.randn(shape)
    latents = patchify(images, size)
    *batch, channels, height, width = shape
    assert latents.shape == (*batch, height // size, width // size, channels * size**2)
    assert torch.equal(unpatchify(latents, size), images)


def test_a_patch_is_a_square_of_the_image():
    images = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    assert torch.equal(patchify(images, 2)[0, 1, 2], images[0, :, 2:4, 4:6].flatten())


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patches of 3x3 do not divide images of 8x9"):
        patchify(torch.zeros(1, 1, 8, 9), 3)
    with pytest.raises(ValueError, match="latents of 6 channels do not hold whole patches of 2x2"):
        unpatchify(torch.zeros(1, 4, 4, 6), 2)


# text


@pytest.mark.parametrize("kind", ["txt", "gz", "zip"])
def test_text_file_is_cut_into_its_bytes(tmp_path, kind):
    content, file = bytes(range(256)) * 40, tmp_path / f"text.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("licence", "short")
            archive.writestr("text", content)
    else:
        file.write_bytes(gzip.compress(content) if kind == "gz" else content)
    text = load_text(file)
    assert bytes(torch.cat([text.train, text.validation]).tolist()) == content
    assert len(text.validation) == len(content) // 10
    assert text.train.dtype == torch.long
    assert str(file) in text.source


def test_default_text_is_prose_and_source_in_both_halves():
    first, second = load_text(), load_text()
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    assert 1_000_000 < len(first.train) < 5_000_000
    for part in (data_module.standard_prose(), data_module.standard_source()):
        assert part[:1000] in bytes(first.train.tolist())
        assert part[-1000:] in bytes(first.validation.tolist())


def test_default_prose_is_not_validated_on_what_was_trained_on():
    paragraphs = data_module.standard_prose().split(b"\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_unusable_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text file .*absent.txt; leave it out"):
        load_text(tmp_path / "absent.txt")
    (tmp_path / "short.txt").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"its last tenth must have 512 bytes, got 100 .*short.txt"):
        load_text(tmp_path / "short.txt")
    assert len(load_text(tmp_path / "short.txt", minimum=100).validation) == 100
    for name in ("false.gz", "false.zip"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(ValueError, match=f"{name} is corrupt"):
            load_text(tmp_path / name)


# the judge


def test_judge_learns_and_leaves_the_random_state_alone():
    data = load_images("digits")
    before = torch.random.get_rng_state()
    judge, score = train_judge(data, steps=60)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert score > 0.9
    assert score == accuracy(judge, *data.test)
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_judge_depends_on_its_seed_alone():
    digits = load_images("digits")
    weights = []
    for seed, disturbance in ((1, 2), (1, 3), (2, 2)):
        torch.manual_seed(disturbance)
        judge = train_judge(digits, seed=seed, steps=3).judge
        weights.append(torch.cat([parameter.flatten() for parameter in judge.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 24)])
def test_judge_takes_other_images(shape):
    judge = Judge(shape=shape, num_classes=7)
    images = torch.randn(5, *shape)
    assert judge(images).shape == (5, 7)
    assert recognised(judge, images.bfloat16()).shape == (5,)
    with pytest.raises(ValueError, match=re.escape(f"reads images of shape {shape}, got (2, 9, 9)")):
        judge(torch.zeros(1, 2, 9, 9))


def test_accuracy_counts_what_is_recognised():
    judge = Judge(shape=(1, 8, 8), num_classes=10)
    images = torch.randn(8, 1, 8, 8)
    seen = recognised(judge, images)
    assert accuracy(judge, images, seen) == 1
    assert accuracy(judge, images, torch.cat([seen[:6], seen[6:] + 1])) == 0.75
    assert torch.equal(recognised(judge, 5 * images), recognised(judge, (5 * images).clamp(-1, 1)))
    with pytest.raises(ValueError, match="accuracy on no images is undefined"):
        accuracy(judge, images[:0], seen[:0])


class Pixels(Judge):
    """Its features are the pixels."""

    def features(self, images):
        return images.flatten(1)


def test_frechet_distance_of_normal_distributions():
    """Of the same images 0, of moved ones the square of the way, of others that of the difference of their spreads."""
    judge = Pixels(shape=(1, 2, 2), num_classes=3)
    images = 0.1 * torch.randn(400, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    images[..., 0] += 0.7 * images[..., 1]
    images = (images - images.mean(dim=0)).float()
    variances = torch.linalg.eigvalsh(images.flatten(1).T.cov())
    way = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 2, 2)
    assert frechet_distance(judge, images, images) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(judge, images, images + way) == pytest.approx(0.14, rel=1e-3)
    wider = ((1.5 - 1) ** 2 * variances.sum()).item()
    assert frechet_distance(judge, images, 1.5 * images) == pytest.approx(wider, rel=1e-3)
    assert frechet_distance(judge, 1.5 * images, images) == pytest.approx(wider, rel=1e-3)
    turned = images.flip(-1) * torch.tensor([2.0, 1.0])  # another covariance, which does not commute with the first
    assert frechet_distance(judge, images, turned) == pytest.approx(distance_of_spreads(images, turned), rel=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(judge, images[:1], images)


def distance_of_spreads(images, others) -> float:
    """Of two sets with mean 0, by the eigenvalues of the product of their covariances."""
    one, other = (each.flatten(1).T.cov().double() for each in (images, others))
    root = torch.linalg.eigvals(one @ other).real.clamp(min=0).sqrt().sum()
    return (one.trace() + other.trace() - 2 * root).item()


def test_augmentation_moves_images_only_a_little():
    images = load_images("digits").test.images[:200]
    moved = augment(images, torch.Generator().manual_seed(0))
    change = (moved - images).pow(2).mean().sqrt()
    assert 0.05 < change < 0.5 * images.std()
    assert (moved.mean() - images.mean()).abs() < 0.05


@pytest.mark.slow
def test_judge_of_digits_can_be_believed():
    assert train_judge(load_images("digits")).test_accuracy >= 0.98


@pytest.mark.slow
def test_judge_of_fashion_can_be_believed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fashion = load_images("fashion")
    if fashion.name != "fashion":
        pytest.skip("Fashion-MNIST is not installed")
    assert train_judge(fashion).test_accuracy >= 0.89


# pictures


def test_grid_shows_every_pixel_enlarged(tmp_path):
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    file = save_grid(tmp_path / "new" / "grid.png", images, columns=3)
    with Image.open(file) as opened:
        shown = torch.tensor(numpy.asarray(opened))
    assert shown.shape == (2 * (64 + 8) + 8, 3 * (64 + 8) + 8, 3)
    expected = ((images + 1) * 127.5).round().to(torch.uint8)
    for index, image in enumerate(expected):
        top, left = 8 + 72 * (index // 3), 8 + 72 * (index % 3)
        cell = shown[top : top + 64, left : left + 64]
        assert torch.equal(cell, image[0].repeat_interleave(8, 0).repeat_interleave(8, 1)[..., None].expand(-1, -1, 3))
    assert (shown[80:, 152:] == 255).all()


@pytest.mark.parametrize(("size", "scale"), [(8, 8), (28, 3), (64, 1), (100, 1)])
def test_grid_enlarges_by_whole_numbers(tmp_path, size, scale):
    file = save_grid(tmp_path / "grid.png", torch.zeros(2, 3, size, size), ["cat", "dog"])
    with Image.open(file) as opened:
        assert opened.size == (2 * (size * scale + 8) + 8, size * scale + 20 + 16)


def test_grid_writes_wrong_labels_in_red(tmp_path):
    labels, correct = torch.tensor([3, 7]), torch.tensor([True, False])
    file = save_grid(tmp_path / "grid.png", -torch.ones(2, 1, 8, 8), labels, correct=correct)
    with Image.open(file) as opened:
        shown = numpy.asarray(opened).astype(int)
    redness = shown[8:28, ..., 0] - shown[8:28, ..., 1]
    assert (shown[8:28, :80] < 128).any()
    assert redness[:, :80].max() < 10
    assert redness[:, 80:].max() > 100


def test_long_labels_stay_in_their_column(tmp_path):
    file = save_grid(tmp_path / "grid.png", torch.ones(2, 1, 8, 8), ["a very long label\nthat never fits", "\n"])
    with Image.open(file) as opened:
        shown = numpy.asarray(opened)
    assert (shown[8:28, 8:72] < 128).any()
    assert (shown[:, 76:] == 255).all()


def test_impossible_grids_are_refused(tmp_path):
    images, file = torch.zeros(2, 1, 8, 8), tmp_path / "grid.png"
    with pytest.raises(ValueError, match=r"\(n, 1 or 3, h, w\) with n > 0, got \(0, 1, 8, 8\)"):
        save_grid(file, images[:0])
    with pytest.raises(ValueError, match=r"got \(2, 2, 8, 8\)"):
        save_grid(file, images.expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="one of labels for each of 2 images, got 1"):
        save_grid(file, images, ["one"])
    with pytest.raises(ValueError, match="expected at least 1 column, got 0"):
        save_grid(file, images, columns=0)
    assert not file.exists()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"empty": []},
        {"one": [0.5]},
        {"long": [1 / step for step in range(1, 200)], "pairs": [(50, 0.3), (100, 0.2)], "empty": []},
        {"diverged": [1.0, float("nan"), float("inf")] * 30},
    ],
)
def test_curves_are_drawn(tmp_path, curves, log):
    file = save_curves(tmp_path / "new" / "curves.png", curves, title="a run", log=log)
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        assert opened.size == (960, 540)
    shown = [bool(points(series)[1]) for series in curves.values()]
    assert [len(inked(file, colour)) > 20 for colour in COLOURS] == shown + [False] * (len(COLOURS) - len(shown))


def inked(file: Path, colour: str) -> numpy.ndarray:
    """Row and column of every pixel of exactly this colour."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    with Image.open(file) as opened:
        return numpy.argwhere((numpy.asarray(opened.convert("RGB")) == wanted).all(axis=-1))


@pytest.mark.parametrize(("log", "height"), [(False, 0.909), (True, 0.5)])
def test_a_curve_goes_where_its_numbers_do(tmp_path, log, height):
    """From 1 down to 1/100: half-way it is at 1/10, 91% of the way down, or 50% on a scale of powers."""
    series = [(step, 10 ** (-step / 15)) for step in range(31)]
    rows, columns = inked(save_curves(tmp_path / "curve.png", {"falls": series}, log=log), COLOURS[0]).T
    left, right = columns.min(), columns.max()
    lowest = numpy.array([rows[columns == column].max() for column in range(left, right + 1) if column in columns])
    assert (numpy.diff(lowest) > -5).all()  # what a marker stands out
    middle = rows[abs(columns - (left + right) / 2) < 3].mean()
    assert (middle - rows.min()) / (rows.max() - rows.min()) == pytest.approx(height, abs=0.04)


def test_curves_have_their_own_positions():
    assert points([5, 4.5]) == ([1, 2], [5, 4.5])
    assert points([(10, 5), (20, 4)]) == ([10, 20], [5, 4])
    assert points([1, float("nan"), 3]) == ([1, 3], [1, 3])


def test_smoothing_keeps_straight_lines_and_length():
    assert smooth([3, 0, 3, 6], radius=1) == [3, 2, 3, 6]
    assert smooth([], radius=3) == []
    assert smooth([2.0] * 50, radius=8) == [2.0] * 50
    line = [float(i) for i in range(50)]
    assert smooth(line, radius=8)[2:-2] == line[2:-2]


# the run


def test_folders_are_never_reused(tmp_path):
    folders = [run.fresh_folder(tmp_path / "results", "toy") for _ in range(4)]
    assert len(set(folders)) == 4
    assert all(folder.is_dir() and re.match(r"toy-\d{8}-\d{6}(-\d)?$", folder.name) for folder in folders)


def test_common_arguments():
    parser = argparse.ArgumentParser()
    run.add_common_arguments(parser, TrainConfig(steps=500))
    empty = parser.parse_args([])
    assert config_from_arguments(empty, TrainConfig(steps=500)) == TrainConfig(steps=500)
    assert (empty.results, empty.resume) == (Path("results"), None)
    given = parser.parse_args(["--steps", "3", "--results", "there", "--resume"])
    assert (given.steps, given.results, given.resume) == (3, Path("there"), "latest")


@pytest.mark.parametrize("steps", ["1.5", "many"])
def test_steps_are_a_whole_number(steps, capsys):
    parser = argparse.ArgumentParser()
    run.add_common_arguments(parser, TrainConfig(steps=500))
    with pytest.raises(SystemExit):
        parser.parse_args([f"--steps={steps}"])
    assert "argument --steps: expected a whole number or none" in capsys.readouterr().err


def test_a_run_is_found_again(tmp_path):
    def opened(resume=None):
        return run.open_run(argparse.Namespace(results=tmp_path, resume=resume), "toy", device="cpu")

    with pytest.raises(FileNotFoundError, match=r"no run toy-\* with a checkpoint"):
        opened("latest")
    first, second = opened(), opened()
    assert first.folder != second.folder
    assert first.resume is False
    checkpoint = first.folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    assert opened("latest") == (first.folder, True)  # the later one has none
    assert opened(str(first.folder)) == (first.folder, True)
    assert opened(str(checkpoint)) == (first.folder, checkpoint)
    with pytest.raises(FileNotFoundError, match="neither the folder of a run nor one of its checkpoints"):
        opened(str(tmp_path))


def test_metrics_are_read_by_column(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,validation/loss\n1,0.5,\n2,0.25,1.5\n")
    assert run.read_metrics(tmp_path) == {"loss": [(1, 0.5), (2, 0.25)], "validation/loss": [(2, 1.5)]}


def test_seed_repeats_everything():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    run.seed_everything(5)
    first = draw()
    run.seed_everything(5)
    assert draw() == first
    run.seed_everything(6)
    assert not set(draw()) & set(first)


def test_progress_passes_everything_on():
    assert list(run.progress(3)) == [0, 1, 2]
    assert list(run.progress(["a", "b"], description="letters")) == ["a", "b"]


def test_pairs_are_drawn_or_named_and_only_named_ones_are_moved():
    data = load_images("digits").train

    def sample(task, seed):
        return LabelImagePairs(data, (task,), patch=2).sample(5, torch.Generator().manual_seed(seed))

    label, image = sample("draw", 0)
    named, again = sample("caption", 0)
    assert label == again == data.labels[5]
    assert torch.equal(image, patchify(data.images[5], 2))
    assert 0 < (named - image).abs().mean() < 0.5
    assert torch.equal(sample("caption", 0)[0], named)
    assert not torch.equal(sample("caption", 1)[0], named)
