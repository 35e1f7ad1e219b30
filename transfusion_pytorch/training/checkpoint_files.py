"""One checkpoint: a folder of safetensors and JSON, without pickle.

step-00001000/
    state.json              step, figures, identity of the run, size and checksum of every other file
    model.safetensors       one file for each part: tensors, and the rest of its state as JSON in the metadata
    scheduler.json          a part without tensors
    rank-00000.safetensors  what belongs to one process alone (random states)
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from transfusion_pytorch.saving.files import load_json, load_metadata, load_tensors, save_json, save_tensors
from transfusion_pytorch.saving.nested import flatten_state, unflatten_state

FORMAT = 1
STATE_FILE = "state.json"
FOLDER_NAME = re.compile(r"step-(\d{8,})")
PART_NAME = re.compile(r"(?!state$)[a-z][a-z0-9_]*")
STRUCTURE = "state"  # in the metadata of a part's tensors
MOST_DIFFERENCES = 5  # in an error


class StoredParts(Mapping[str, Any]):
    """The parts of a checkpoint by name. Each access reads one from the disk, after its checksum was compared."""

    def __init__(self, folder: Path, names: Sequence[str], files: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder, self.names, self.files = folder, tuple(names), files

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(f"{self.folder} has no part '{name}', only {', '.join(self.names)}")
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> Any:
        """A part, or what one process saved (`rank-00001`)."""
        (file,) = (each for each in _files_of(self.folder, name) if each.name in self.files)
        try:
            if _checksum(file) != self.files[file.name]["crc32"]:
                raise ValueError(f"{file} is not what was saved (its checksum differs)")
            return _read_state(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}{offer_earlier(self.folder)}") from error


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that is open for reading.

    - `parts`: by name, read from the disk at each access, on the CPU
    - `num_ranks`: how many processes saved something of their own (`of_rank`)
    """

    path: Path
    step: int
    figures: dict[str, float]
    identity: Any
    parts: StoredParts
    num_ranks: int

    def part_for(self, name: str, expected: Any) -> Any:
        """The part `name`, which must have the same tensors (names, shapes, dtypes) as the state `expected`.

        Raises `ValueError` with the first differences where it is the state of another model.
        """
        part = self.parts[name]
        found = tensor_differences(flatten_state(part).tensors, flatten_state(expected).tensors)
        if found:
            raise ValueError(
                f"'{name}' in {self.path} belongs to another model than this one: {_few(found)}; "
                "build the model with the options that it was trained with"
            )
        return part

    def of_rank(self, rank: int, ranks: int) -> Any:
        """What process `rank` of `ranks` saved of its own; None where the number of processes was another one."""
        return self.parts.read(rank_name(rank)) if ranks == self.num_ranks else None


def load_checkpoint(path: str | Path, *, identity: Any = None) -> LoadedCheckpoint:
    """Opens one checkpoint, also in a folder that cannot be written.

    The sizes of its files are checked here, their checksums when a part is read. Raises `FileNotFoundError` where there
    is none, and `ValueError` where it is cut off, altered, of another format or, unless `identity` is None, of another
    run, with the path of the one before it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}{offer_earlier(path)}")
    try:
        loaded = open_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}{offer_earlier(path)}") from error
    if identity is not None and (found := json_differences(loaded.identity, json.loads(json.dumps(identity)))):
        raise ValueError(f"{path} is a checkpoint of another run: {_few(found)}")
    return loaded


def open_checkpoint(path: Path) -> LoadedCheckpoint:
    """Reads `state.json` and compares sizes. Raises `ValueError` where it is not ours, or not whole."""
    content = _read_description(path)
    for name, entry in content["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            found = "missing" if size is None else f"cut off or altered: {size:,} bytes instead of {entry['bytes']:,}"
            raise ValueError(f"{file} is {found}")
    return LoadedCheckpoint(
        path=path,
        step=content["step"],
        figures=unflatten_state({}, content["figures"]),
        identity=content["identity"],
        parts=StoredParts(path, content["parts"], content["files"]),
        num_ranks=content["ranks"],
    )


def write_checkpoint(
    folder: Path,
    step: int,
    parts: Mapping[str, Any],
    *,
    figures: Mapping[str, float],
    identity: Any,
    per_rank: Sequence[Any],
) -> None:
    """Fills an empty folder. Errors as in `Checkpoints.save`."""
    for name, state in [*parts.items(), *((rank_name(rank), state) for rank, state in enumerate(per_rank))]:
        try:
            _write_state(folder, name, state)
        except TypeError as error:
            raise TypeError(f"part '{name}' of the checkpoint: {error}") from error
    files = {file.name: {"bytes": file.stat().st_size, "crc32": _checksum(file)} for file in sorted(folder.iterdir())}
    content = dict(
        format=FORMAT,
        written_by=version("transfusion-pytorch"),
        step=step,
        parts=list(parts),
        ranks=len(per_rank),
        figures=flatten_state({name: float(value) for name, value in figures.items()}).json,
        identity=json.loads(json.dumps(identity)),
        files=files,
    )
    save_json(folder / STATE_FILE, content | dict(crc32=_checksum_of_json(content)))


def step_of(path: Path) -> int | None:
    """Of the folder `step-00000012`, 12; of anything else None."""
    match = FOLDER_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def offer_earlier(path: Path) -> str:
    """The end of an error: which is the newest whole checkpoint before this one."""
    step = step_of(path)
    beside = [(number, each) for each in path.parent.glob("step-*") if (number := step_of(each)) is not None]
    for number, earlier in sorted(beside, reverse=True):
        try:
            if step is not None and number < step and open_checkpoint(earlier):
                return f"; the checkpoint before it is {earlier}: load that one by its path"
        except (ValueError, OSError):
            continue
    return "; there is no checkpoint before it"


def tensor_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """One phrase for each tensor that only one side has, or whose shape or dtype differs."""
    phrases = [f"'{name}' is missing" for name in expected if name not in found]
    phrases += [f"'{name}' is not expected" for name in found if name not in expected]
    for name in (name for name in expected if name in found):
        one, other = (f"{tuple(each[name].shape)} {str(each[name].dtype)[6:]}" for each in (found, expected))
        if one != other:
            phrases.append(f"'{name}' is {one} instead of {other}")
    return phrases


def json_differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """One phrase for each value that differs between two JSON trees."""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = [*expected, *(name for name in found if name not in expected)]
        return [
            phrase
            for name in names
            for phrase in json_differences(found.get(name), expected.get(name), f"{place}.{name}" if place else name)
        ]
    return [] if found == expected else [f"{place or 'identity'} is {found!r} instead of {expected!r}"]


def _read_description(path: Path) -> dict[str, Any]:
    """What `state.json` says."""
    file = path / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{path} is no checkpoint of transfusion-pytorch: it has no {STATE_FILE}")
    content = load_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ValueError(f"{file} is not that of a checkpoint of transfusion-pytorch: it has no format number")
    if content["format"] != FORMAT:
        age = "a newer" if content["format"] > FORMAT else "an older"
        raise ValueError(
            f"{path} was written by {age} version, {content.get('written_by', 'unknown')} (format "
            f"{content['format']}, this one reads {FORMAT}); load it with that version"
        )
    if content.pop("crc32", None) != _checksum_of_json(content):
        raise ValueError(f"{file} is not what was saved (its checksum differs)")
    return content


def _write_state(folder: Path, name: str, state: Any) -> None:
    tensors_file, json_file = _files_of(folder, name)
    tensors, structure = flatten_state(state)
    if tensors:
        save_tensors(tensors_file, tensors, {STRUCTURE: json.dumps(structure)})
    else:
        save_json(json_file, structure)


def _read_state(file: Path) -> Any:
    if file.suffix == ".json":
        return unflatten_state({}, load_json(file))
    tensors = {name: tensor.detach() for name, tensor in load_tensors(file).items()}  # an alias is a tensor of its own
    return unflatten_state(tensors, json.loads(load_metadata(file)[STRUCTURE]))


def _files_of(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a part with tensors is, and one without."""
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _checksum(file: Path) -> str:
    """CRC-32: 2 GiB/s, against 1 GiB/s of SHA-256. It is there to find damage, not forgery."""
    total = 0
    with file.open("rb") as content:
        while chunk := content.read(2**24):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def _checksum_of_json(content: Any) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _few(phrases: Sequence[str]) -> str:
    more = len(phrases) - MOST_DIFFERENCES
    return "; ".join(phrases[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
