"""Where a pretrained model is: in a folder, or in a repository of the Hugging Face hub, of which only some files are
downloaded.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from transfusion_pytorch.saving.hub import REPOSITORY


def local_folder(source: Any, what: str) -> Path | None:
    """The folder `source`, None where it is the id of a repository. `what` it should have is named in errors: "a
    language model".

    Raises `TypeError` for anything but a string or a path, and `FileNotFoundError` for a path without a folder.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{what} is a module, a folder, or the id of a repository, got {type(source).__name__}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not isinstance(source, str) or not REPOSITORY.fullmatch(source):
        raise FileNotFoundError(f"there is no folder {folder} with {what}")
    return None


def fetch(source: str | Path, files: Sequence[str], what: str, **hub: Any) -> Path:
    """The folder `source`, or the one that these files of a repository (names or patterns) are downloaded to. `hub` are
    options of `huggingface_hub.snapshot_download`. Raises `FileNotFoundError` where there is neither; see
    `local_folder`.
    """
    if (folder := local_folder(source, what)) is not None:
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(files), **hub))
    except Exception as error:  # of the hub, of the network, of names
        raise FileNotFoundError(
            f"{str(source)!r} is no folder here, and {what} could not be had from the Hugging Face hub under that "
            f"name: {error}"
        ) from error
