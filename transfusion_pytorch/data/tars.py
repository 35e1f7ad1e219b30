"""Tar files of images with captions, as WebDataset has them: read in any order, never unpacked."""

import json
import tarfile
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from transfusion_pytorch.data.captioned import TEXT_COLUMNS, first_of
from transfusion_pytorch.data.images import SUFFIXES, ImageReader
from transfusion_pytorch.data.pairs import ImageCaptionPairs, clean_captions, stamp_of
from transfusion_pytorch.data.text import TextCodec
from transfusion_pytorch.saving.files import load_json, save_json

Members = dict[str, list[int]]  # by suffix: where the file's bytes start in the tar, and how many there are
CAPTION_SUFFIXES = (".txt", ".json", ".cls")


class WebDatasetTars(ImageCaptionPairs):
    """Samples of tar files, in the order of the tars and of the images in them. Files that differ in their suffix only
    belong together: `0001.jpg` with `0001.txt` (each line a caption), `0001.json` (`text` or `caption`), or `0001.cls`.
    A name ends at its first dot, as WebDataset has it: images such as `v1.2.png` are left out, with a warning.

    A tar is searched once, by the headers of its members. With an `index_folder` what was found is kept there as JSON,
    and read again as long as the tar has the same size and time of change. An image without caption is a sample too.
    Hard links are followed. Raises `ValueError` for a tar that is compressed (nothing in it can be found without
    unpacking), cut off, or without images. For the other options, see `ImageCaptionPairs`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path] | str | Path,
        *,
        images: ImageReader | int,
        index_folder: str | Path | None = None,
        text: TextCodec | None = None,
        prob_describe: float = 0.0,
        modality_type: int = 0,
    ):
        super().__init__(images=images, text=text, prob_describe=prob_describe, modality_type=modality_type)
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        folder = None if index_folder is None else Path(index_folder)
        self.entries: list[tuple[int, str, Members]] = []
        for number, path in enumerate(self.paths):
            found = _index_of(path, folder)
            _report_left_out(path, found)
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
        suffix = _find(members, CAPTION_SUFFIXES)
        if suffix is None:
            return []
        file = self._file(index, suffix)
        try:
            text = self._read(index, suffix).decode("utf-8-sig")
            row = json.loads(text) if suffix.lower() == ".json" else {"text": text.splitlines()}
        except ValueError as error:
            raise ValueError(f"{file} is not readable: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}: expected a JSON object, got {text.strip():.80}")
        return clean_captions(next((row[name] for name in TEXT_COLUMNS if row.get(name)), []), file)

    def describe(self, index: int) -> str:
        return self._file(index, _image_suffix(self.entries[index][2]) or "")

    def data_key(self) -> Any:
        """Names, sizes and times of change of the tars."""
        return [[path.name, *stamp_of(path)] for path in self.paths]

    def _file(self, index: int, suffix: str) -> str:
        number, name, _ = self.entries[index]
        return f"{self.paths[number]}: {name}{suffix}"

    def _read(self, index: int, suffix: str) -> bytes:
        number, _, members = self.entries[index]
        start, size = members[suffix]
        with self.paths[number].open("rb") as file:
            file.seek(start)
            return file.read(size)


def _image_suffix(members: Members) -> str | None:
    return _find(members, SUFFIXES)


def _find(members: Members, suffixes: Sequence[str]) -> str | None:
    """The first of these suffixes, as the tar has it: `.PNG` too."""
    return next((own for suffix in suffixes for own in members if own.lower() == suffix), None)


def _report_left_out(path: Path, found: dict[str, Members]) -> None:
    """Warns of images that belong to no sample, since a name ends at its first dot."""
    bare = {name: members for name, members in found.items() if _image_suffix(members) is None}
    images = [f"{name}{own}" for name, members in bare.items() for own in members if own.lower().endswith(SUFFIXES)]
    if images:
        warnings.warn(
            f"{len(images)} images in {path} are left out, with a dot in their names, where those of WebDataset end: "
            f"{first_of(images)}",
            stacklevel=3,
        )


def _index_of(path: Path, folder: Path | None) -> dict[str, Members]:
    """The members of a tar by their name without suffix, from the index that was kept if it is of this tar."""
    if folder is None:
        return _search(path)
    place = blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()  # two tars may have one name
    file, stamp = folder / f"{path.name}.{place}.index.json", stamp_of(path)
    if file.is_file() and (kept := load_json(file)).get("stamp") == stamp:
        return kept["members"]
    members = _search(path)
    save_json(file, {"stamp": stamp, "members": members})
    return members


def _search(path: Path) -> dict[str, Members]:
    places: dict[str, list[int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.islnk() and member.linkname in places:  # a second name of the same bytes
                    places[member.name] = places[member.linkname]
                elif member.isreg() and not member.issparse():
                    places[member.name] = [member.offset_data, member.size]
            end = tar.offset
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is no uncompressed tar, or cut off: {error}") from error
    length = path.stat().st_size
    if cut := [name for name, (start, size) in places.items() if start + size > length]:
        raise ValueError(f"{path} is cut off in {cut[0]}")
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything for the end
            raise ValueError(f"{path} is cut off, or damaged, at byte {end}: a tar ends in a block of zeros")
    found: dict[str, Members] = {}
    for name, place in places.items():
        file_name = PurePosixPath(name)
        base, _, suffix = file_name.name.partition(".")  # WebDataset: a name ends at its first dot
        if base:  # else it is hidden
            found.setdefault((file_name.parent / base).as_posix(), {})[f".{suffix}"] = place
    return found
