"""Tar files of images with captions, as WebDataset has them: read in any order, never unpacked."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from transfusion_pytorch.data.captioned import TEXT_COLUMNS
from transfusion_pytorch.data.images import SUFFIXES, ImageReader
from transfusion_pytorch.data.pairs import ImageCaptionPairs, stamp_of
from transfusion_pytorch.data.text import TextCodec
from transfusion_pytorch.saving.files import load_json, save_json

Members = dict[str, list[int]]  # by suffix: where the file's bytes start in the tar, and how many there are
CAPTION_SUFFIXES = (".txt", ".json", ".cls")


class WebDatasetTars(ImageCaptionPairs):
    """Samples of tar files, in the order of the tars and of the images in them. Files that differ in their suffix only
    belong together: `0001.jpg` with `0001.txt` (each line a caption), `0001.json` (`text` or `caption`), or `0001.cls`.

    A tar is searched once, by the headers of its members. With an `index_folder` what was found is kept there as JSON,
    and read again as long as the tar has the same size and time of change. An image without caption is a sample too.
    Raises `ValueError` for a tar that is compressed (nothing in it can be found without unpacking), cut off, or
    without images. For the other options, see `ImageCaptionPairs`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        images: ImageReader | int,
        index_folder: str | Path | None = None,
        text: TextCodec | None = None,
        prob_describe: float = 0.0,
        modality_type: int = 0,
    ):
        super().__init__(images=images, text=text, prob_describe=prob_describe, modality_type=modality_type)
        self.paths = [Path(path) for path in paths]
        folder = None if index_folder is None else Path(index_folder)
        self.entries: list[tuple[int, str, Members]] = []
        for number, path in enumerate(self.paths):
            found = _index_of(path, folder)
            self.entries += [(number, name, members) for name, members in found.items() if _image_suffix(members)]
        if not self.entries:
            raise ValueError(
                f"no images in {', '.join(map(str, self.paths)) or 'no tars'}: looked for {', '.join(SUFFIXES)}"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def read_image(self, index: int) -> bytes:
        suffix = _image_suffix(self.entries[index][2])
        assert suffix is not None
        return self._read(index, suffix)

    def captions(self, index: int) -> Sequence[str]:
        members = self.entries[index][2]
        suffix = next((suffix for suffix in CAPTION_SUFFIXES if suffix in members), None)
        if suffix is None:
            return []
        text = self._read(index, suffix).decode()
        if suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        row = json.loads(text)
        texts = next((row[name] for name in TEXT_COLUMNS if row.get(name)), [])
        return texts if isinstance(texts, list) else [str(texts)]

    def describe(self, index: int) -> str:
        number, name, members = self.entries[index]
        return f"{self.paths[number]}: {name}{_image_suffix(members)}"

    def data_key(self) -> Any:
        """Names, sizes and times of change of the tars."""
        return [[path.name, *stamp_of(path)] for path in self.paths]

    def _read(self, index: int, suffix: str) -> bytes:
        number, _, members = self.entries[index]
        start, size = members[suffix]
        with self.paths[number].open("rb") as file:
            file.seek(start)
            return file.read(size)


def _image_suffix(members: Members) -> str | None:
    return next((suffix for suffix in members if suffix.lower() in SUFFIXES), None)


def _index_of(path: Path, folder: Path | None) -> dict[str, Members]:
    """The members of a tar by their name without suffix, from the index that was kept if it is of this tar."""
    if folder is None:
        return _search(path)
    file, stamp = folder / f"{path.name}.index.json", stamp_of(path)
    if file.is_file() and (kept := load_json(file)).get("stamp") == stamp:
        return kept["members"]
    members = _search(path)
    save_json(file, {"stamp": stamp, "members": members})
    return members


def _search(path: Path) -> dict[str, Members]:
    found: dict[str, Members] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isreg() or member.issparse() or name.name.startswith("."):
                    continue
                base, _, suffix = name.name.partition(".")  # WebDataset: a name ends at its first dot
                found.setdefault((name.parent / base).as_posix(), {})[f".{suffix}"] = [member.offset_data, member.size]
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is no uncompressed tar, or cut off: {error}") from error
    end = path.stat().st_size
    for name, members in found.items():
        if any(start + size > end for start, size in members.values()):
            raise ValueError(f"{path} is cut off in {name}")
    return found
