"""A folder of images with captions."""

import csv
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from transfusion_pytorch.data.images import SUFFIXES, ImageReader
from transfusion_pytorch.data.pairs import ImageCaptionPairs, clean_captions, stamp_of
from transfusion_pytorch.data.text import TextCodec

TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "file", "image", "path")
TEXT_COLUMNS = ("text", "caption", "texts", "captions")

Where = Literal["table", "beside", "folder"]


class CaptionedImages(ImageCaptionPairs):
    """The images of a folder and of all folders in it, with their captions, in the order of their names.

    `captions` says where those are; by default the first of these that is there:

    - "table": `captions.jsonl`, `metadata.jsonl` or `metadata.csv` in the folder, with a column `file_name` and a
      column `text` or `caption` (Hugging Face's imagefolder). Several rows of an image, or a list, are several captions
    - "beside": `name.txt` beside `name.png`; each line is a caption
    - "folder": the name of the image's folder is its class, and its caption

    Images without caption are left out, and captions without image too, both with a warning that says which. Raises
    `ValueError` where there is nothing left. For the other options, see `ImageCaptionPairs`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        images: ImageReader | int,
        text: TextCodec | None = None,
        captions: Where | None = None,
        prob_describe: float = 0.0,
        modality_type: int = 0,
    ):
        super().__init__(images=images, text=text, prob_describe=prob_describe, modality_type=modality_type)
        self.folder = Path(folder)
        if captions is not None and captions not in FINDERS:
            raise ValueError(f"captions is one of {', '.join(map(repr, FINDERS))}, or None, got {captions!r}")
        found = find_images(self.folder)
        where = _where(self.folder, found) if captions is None else captions
        found_captions = FINDERS[where](self.folder, found)
        self.entries = [(name, tuple(found_captions[name])) for name in found if found_captions.get(name)]
        _report_unmatched(self.folder, found, found_captions)

    def __len__(self) -> int:
        return len(self.entries)

    def read_image(self, index: int) -> bytes:
        return (self.folder / self.entries[index][0]).read_bytes()

    def captions(self, index: int) -> Sequence[str]:
        return self.entries[index][1]

    def describe(self, index: int) -> str:
        return str(self.folder / self.entries[index][0])

    def data_key(self) -> Any:
        """Names, sizes and times of change."""
        return [[name, *stamp_of(self.folder / name)] for name, _ in self.entries]


def find_images(folder: Path) -> list[str]:
    """The names of all images below a folder, sorted, with `/` between folders. Links to folders are followed, hidden
    files left out.

    Raises `FileNotFoundError` where there is no such folder, and `ValueError` where it has no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names = _files_in(folder, SUFFIXES)
    if not names:
        if tars := sorted(file.name for file in folder.glob("*.tar")):
            raise ValueError(f"no images in {folder}, but tars: give those, such as {folder / tars[0]}")
        others = sorted(file.name for file in folder.iterdir())[:3]
        inside = f"found {', '.join(others)}" if others else "it is empty"
        raise ValueError(f"no images in {folder}: looked for {', '.join(SUFFIXES)}, in its subfolders too; {inside}")
    return names


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The names of files with these suffixes, in either case."""
    files = (file for file in _walk(folder, ()) if file.suffix.lower() in suffixes)
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """All files, except through a link that leads back to one of the folders `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, real))
        elif entry.is_file():
            yield Path(entry.path)


def _where(folder: Path, images: Sequence[str]) -> Where:
    if any((folder / table).is_file() for table in TABLES):
        return "table"
    stems = {_stem(name) for name in images}
    if any(_stem(name) in stems for name in _files_in(folder, (".txt",))):
        return "beside"
    if all("/" in name for name in images):
        return "folder"
    raise ValueError(
        f"no captions for the {len(images)} images in {folder}: looked for {', '.join(TABLES)}; for a text file beside "
        f"each image, such as {Path(images[0]).with_suffix('.txt')}; and for a subfolder for each class"
    )


def _from_table(folder: Path, images: Sequence[str]) -> dict[str, list[str]]:
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise ValueError(f"no table of captions in {folder}: looked for {', '.join(TABLES)}")
    captions: dict[str, list[str]] = defaultdict(list)
    for line, row in _rows(table):
        if row.get(None):  # type: ignore[call-overload]  # where csv puts what has no column
            raise ValueError(f"{table}, line {line} has more cells than columns: quote captions that have commas")
        columns = [next((name for name in names if row.get(name)), None) for names in (FILE_COLUMNS, TEXT_COLUMNS)]
        if columns[0] is None or (columns[1] is None and not set(TEXT_COLUMNS) & set(row)):
            raise ValueError(
                f"{table}, line {line}: expected one of the columns {', '.join(FILE_COLUMNS)} and one of "
                f"{', '.join(TEXT_COLUMNS)}, got {', '.join(map(str, row))}"
            )
        texts = row[columns[1]] if columns[1] is not None else []
        name = Path(str(row[columns[0]])).as_posix()
        captions[name] += clean_captions(texts, f"{table}, line {line}")
    return dict(captions)


def _rows(table: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Lines and what they say, by column."""
    try:
        yield from _decoded_rows(table)
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: {error}") from error


def _decoded_rows(table: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:  # with or without a byte order mark
        if table.suffix == ".csv":
            reader = csv.DictReader(file)
            yield from ((reader.line_num, row) for row in reader)
            return
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{table}, line {line} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {line}: expected a JSON object, got {text.strip():.80}")
            yield line, row


def _from_beside(folder: Path, images: Sequence[str]) -> dict[str, list[str]]:
    """Of text files without image too, under their own names, so that they are reported."""
    texts = {_stem(name): name for name in _files_in(folder, (".txt",))}
    found = {name: _lines(folder / texts[_stem(name)]) for name in images if _stem(name) in texts}
    stems = {_stem(name) for name in images}
    return found | {name: [] for stem, name in texts.items() if stem not in stems}


def _stem(name: str) -> str:
    """A name without its suffix, but with its folders."""
    return PurePosixPath(name).with_suffix("").as_posix()


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _from_folders(folder: Path, images: Sequence[str]) -> dict[str, list[str]]:
    return {name: [Path(name).parent.name.replace("_", " ")] for name in images if "/" in name}


FINDERS = {"table": _from_table, "beside": _from_beside, "folder": _from_folders}


def _report_unmatched(folder: Path, images: Sequence[str], captions: Mapping[str, Sequence[str]]) -> None:
    """Warns of images and captions that are left out, and raises `ValueError` where nothing is left."""
    bare = [name for name in images if not captions.get(name)]
    known = set(images)
    lost = [name for name in captions if name not in known]
    if len(bare) == len(images):
        names = f"captions for {first_of(lost)}" if lost else "no captions"
        raise ValueError(f"no image in {folder} has a caption: found the images {first_of(images)}, and {names}")
    if bare:
        warnings.warn(
            f"{len(bare)} of {len(images)} images in {folder} have no caption: {first_of(bare)}", stacklevel=3
        )
    if lost:
        warnings.warn(f"{len(lost)} captions in {folder} have no image: {first_of(lost)}", stacklevel=3)


def first_of(names: Sequence[str]) -> str:
    """A few names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
