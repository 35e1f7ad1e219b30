"""Files that are either whole or not there: written beside, flushed to the disk, renamed.

Tensors are safetensors, everything else is JSON. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial-"  # in the name of what is still being written; left over by a killed process
ALIASES = "aliases"  # in the metadata of a safetensors file: names of tensors that are another one's


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `path` once it is full and on the disk. Raises `FileExistsError` if
    `path` is there already.

    A killed process leaves a folder with `PARTIAL` in its name, never half of `path`; an exception leaves nothing.
    """
    path = Path(path)
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        for file in sorted(partial.rglob("*")):
            flush(file)
        flush(partial)
        partial.rename(path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives the name of a file to write, which then takes the place of `path`, whether or not that was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_json(path: str | Path, content: Any) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def load_json(path: str | Path) -> Any:
    """Raises `ValueError` that names the file where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON, it may be cut off: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is malformed: it is nested too deeply") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors of any device. One that several names share is written once.

    Raises `OSError` where the disk is full or fails.
    """
    kept, aliases, names = {}, {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and tensor.device.type != "meta" and (first := names.setdefault(view, name)) != name:
            aliases[name] = first
        else:
            kept[name] = tensor.cpu().contiguous()
    separate = {name: tensor.clone() if _is_part(tensor) else tensor for name, tensor in kept.items()}
    with whole_file(path) as partial:
        try:
            save_file(separate, partial, metadata={**(metadata or {}), ALIASES: json.dumps(aliases)})
        except SafetensorError as error:
            raise _as_os_error(error, Path(path)) from error


def load_tensors(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote, or those of any other safetensors file.

    Raises `ValueError` that names the file where it is cut off or something else, and `FileNotFoundError`.
    """
    try:
        with safe_open(path, framework="pt", device=_device_name(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            aliases = _read_aliases(file.metadata() or {}, tensors, path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors | {name: tensors[first] for name, first in aliases.items()}


def _device_name(device: torch.device | str) -> str:
    """As safetensors takes it, which knows no `cpu:0`."""
    return "cpu" if torch.device(device).type == "cpu" else str(device)


def _read_aliases(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, str]:
    try:
        aliases = json.loads(metadata.get(ALIASES, "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is malformed: its {ALIASES} are no JSON: {error}") from error
    if not isinstance(aliases, dict):
        raise ValueError(f"{path} is malformed: its {ALIASES} must be a dict of names, got a {type(aliases).__name__}")
    if lost := [name for name, first in aliases.items() if not isinstance(first, str) or first not in tensors]:
        raise ValueError(f"{path} is malformed: {lost[0]} is an alias of {aliases[lost[0]]!r}, which it does not have")
    return aliases


def open_tensors(path: str | Path) -> Any:
    """A safetensors file whose tensors are read one by one: `get_tensor(name)`, `get_slice(name).get_shape()`.

    Errors as in `load_tensors`.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """What was written beside the tensors. Errors as in `load_tensors`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    metadata.pop(ALIASES, None)
    return metadata


def remove_partial(folder: str | Path) -> None:
    """Removes what killed processes left half written in a folder. Nobody else may be writing there."""
    for path in Path(folder).glob(f".*{PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}{uuid4().hex[:8]}")


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """safetensors has one exception for everything: `I/O error: No space left on device (os error 28)`."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), f"{path} could not be written: {error}") if number else error


def _is_part(tensor: Tensor) -> bool:
    """Whether it shares its memory with others, which safetensors refuses: slices of one flat buffer."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
