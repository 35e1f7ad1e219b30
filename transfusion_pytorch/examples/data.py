"""Real data for the examples, images and text, most of it without a download.

n images, c channels, h height, w width. Pixels are in [-1, 1].
"""

import gzip
import importlib.util
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from .run import optional

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGIT_CLASSES = tuple("0123456789")

# Long modules of Python's standard library that every supported version has as files.
STANDARD_MODULES = (
    "argparse ast bdb calendar configparser dataclasses datetime difflib doctest enum fractions functools heapq "
    "imaplib inspect ipaddress mailbox optparse pdb pickle pickletools random shutil smtplib socketserver statistics "
    "subprocess tarfile tempfile textwrap threading traceback turtle typing uuid"
)


class LabelledImages(NamedTuple):
    """Images and the class of each."""

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]


class ImageData(NamedTuple):
    """A data set of images, with one phrase on where it came from and why."""

    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    name: str
    source: str


class TextData(NamedTuple):
    """Bytes (0 to 255) to train on and to validate on, with one phrase on where they came from and why."""

    train: Int[Tensor, " n"]
    validation: Int[Tensor, " m"]
    source: str


# images


def load_images(name: str, folder: str | Path | None = None) -> ImageData:
    """Loads `digits`, `fashion` or `mnist`; `folder` holds the four idx files of the latter two, gzipped or not.

    Without a folder, where the usual one is missing or a download fails, `digits` takes its place with a warning.
    Raises `ValueError` for another name and for a file that is there but corrupt, and `FileNotFoundError` for a
    `folder` without one of the files.
    """
    if name not in IMAGE_LOADERS:
        raise ValueError(f"unknown images {name!r}, choose one of {', '.join(IMAGE_LOADERS)}")
    try:
        return IMAGE_LOADERS[name](folder)
    except OSError as error:  # of the file system, and of the network: `datasets` raises ConnectionError
        if folder is not None:  # what was asked for is never replaced by something else
            raise
        warnings.warn(f"{name} could not be loaded ({error}); using digits, 8x8, instead", stacklevel=2)
        fallback = load_digits(None)
        return fallback._replace(source=f"{fallback.source}, because {name} could not be loaded")


def load_digits(folder: str | Path | None) -> ImageData:
    if folder is not None:
        raise ValueError(f"digits are read from scikit-learn, not from a folder; leave out {str(folder)!r}")
    digits = optional("sklearn.datasets").load_digits()
    split = optional("sklearn.model_selection").train_test_split
    train, test = split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # the file counts from 0 to 16
    labels = torch.tensor(digits.target, dtype=torch.long)
    return ImageData(
        LabelledImages(images[train], labels[train]),
        LabelledImages(images[test], labels[test]),
        DIGIT_CLASSES,
        name="digits",
        source="1,797 handwritten digits of 8x8 pixels (UCI) that ship inside scikit-learn: no download",
    )


def load_fashion(folder: str | Path | None) -> ImageData:
    folder = Path(FASHION_FOLDER if folder is None else folder)
    train, test = (load_idx_pair(folder, half, len(FASHION_CLASSES)) for half in ("train", "t10k"))
    return ImageData(train, test, FASHION_CLASSES, name="fashion", source=f"Fashion-MNIST from {folder}: no download")


def load_mnist(folder: str | Path | None) -> ImageData:
    if folder is not None:
        train, test = (load_idx_pair(Path(folder), half, len(DIGIT_CLASSES)) for half in ("train", "t10k"))
        return ImageData(train, test, DIGIT_CLASSES, name="mnist", source=f"MNIST from {folder}: no download")
    halves = optional("datasets", extra="hub").load_dataset("ylecun/mnist").with_format("numpy")
    train, test = (
        LabelledImages(to_pixels(torch.tensor(rows["image"])), torch.tensor(rows["label"]))
        for rows in (halves["train"][:], halves["test"][:])
    )
    source = "MNIST, ylecun/mnist of the Hugging Face Hub: no folder was given"
    return ImageData(train, test, DIGIT_CLASSES, name="mnist", source=source)


IMAGE_LOADERS: dict[str, Callable[[str | Path | None], ImageData]] = {
    "digits": load_digits,
    "fashion": load_fashion,
    "mnist": load_mnist,
}


def to_pixels(grey: UInt8[Tensor, "n h w"]) -> Float[Tensor, "n 1 h w"]:
    return grey[:, None].float() / 127.5 - 1


def load_idx_pair(folder: Path, half: str, num_classes: int) -> LabelledImages:
    """Reads the images and labels of one half, `train` or `t10k`."""
    image_file, label_file = (find_idx(folder, f"{half}-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{image_file} and {label_file}: expected shapes (n, h, w) and (n), "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if labels.max() >= num_classes:
        raise ValueError(f"{label_file}: expected labels below {num_classes}, got {labels.max()}")
    return LabelledImages(to_pixels(images), labels.long())


def find_idx(folder: Path, stem: str) -> Path:
    for file in (folder / stem, folder / f"{stem}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"no {stem} or {stem}.gz in {folder}")


def read_idx(file: str | Path) -> UInt8[Tensor, "..."]:
    """Reads a file of unsigned bytes in the idx format: 0 0 8 k, k big-endian sizes, the bytes."""
    data = unpack(Path(file))
    start = 4 + 4 * data[3] if len(data) > 3 else 4
    if data[:3] != b"\0\0\x08" or len(data) < start:
        expected = "00 00 08, the number of axes, and their sizes"
        raise ValueError(f"{file} is corrupt: expected {expected}, got {data[:start].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape) or not math.prod(shape):
        raise ValueError(f"{file} is corrupt: its header says {shape}, but {len(data) - start} bytes follow")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)


# text


def load_text(path: str | Path | None = None, *, minimum: int = 512) -> TextData:
    """The bytes of any file (.gz and .zip are unpacked), or by default the text inside Python's standard library.

    The last tenth is for validation. Raises `ValueError` where that has fewer than `minimum` bytes, and
    `FileNotFoundError` where there is no such file.
    """
    if path is None:
        # Each kind is cut by itself, so that both prose and source are validated on.
        parts = [standard_prose(), standard_source()]
        source = "English prose and Python source out of Python's own standard library: no download"
    elif not (path := Path(path)).is_file():
        found = f"{path} is a folder, not a text file" if path.is_dir() else f"no text file {path}"
        raise FileNotFoundError(f"{found}; leave it out to use the text in Python's standard library")
    else:
        parts, source = [unpack(path)], f"the bytes of {path}, as asked for"
    train = b"".join(part[: len(part) * 9 // 10] for part in parts)
    validation = b"".join(part[len(part) * 9 // 10 :] for part in parts)
    if len(validation) < minimum:
        raise ValueError(f"too little text: its last tenth must have {minimum} bytes, got {len(validation)} ({source})")
    return TextData(to_ids(train), to_ids(validation), source)


def to_ids(text: bytes) -> Int[Tensor, " n"]:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0, dtype=torch.long)


def standard_prose() -> bytes:
    """The language reference as `help()` shows it."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Some topics are excerpts of others: without this the model would be validated on what it was trained on.
    return "\n\n".join(dict.fromkeys(text.split("\n\n"))).encode()


def standard_source() -> bytes:
    """The source of modules of the standard library, found without importing them."""
    specs = [importlib.util.find_spec(name) for name in STANDARD_MODULES.split()]
    files = [Path(spec.origin) for spec in specs if spec and spec.origin and spec.origin.endswith(".py")]
    return b"\n\n".join(file.read_bytes() for file in files)


def unpack(file: Path) -> bytes:
    """The bytes of a file; of its content if it is gzipped, of its largest member if it is a zip archive."""
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                return archive.read(max(archive.infolist(), key=lambda member: member.file_size))
        data = file.read_bytes()
        return gzip.decompress(data) if file.suffix == ".gz" or data[:2] == b"\x1f\x8b" else data
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is corrupt: {error}") from error
