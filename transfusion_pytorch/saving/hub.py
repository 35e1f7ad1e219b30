"""Where a saved model is: in a folder, or on the Hugging Face hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from transfusion_pytorch.saving.card import CARD_FILE, is_ours
from transfusion_pytorch.saving.configuration import CONFIG_FILE, LIBRARY
from transfusion_pytorch.saving.tokenizer import TOKENIZER_FILES
from transfusion_pytorch.saving.weights import WEIGHTS_FILE

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def folder_of(source: str | Path, **options: Any) -> Path:
    """The folder of a model, which is downloaded if `source` is the id of a repository and no folder. `options` are
    those of `huggingface_hub.snapshot_download`.

    Raises `NotADirectoryError` for a file, `FileNotFoundError` where there is neither folder nor repository, and
    `OSError` where the hub cannot be reached or refuses.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected a folder or the id of a repository, got {type(source).__name__}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; give the folder that save_pretrained wrote")
    if not isinstance(source, str) or not REPOSITORY.fullmatch(source):
        raise FileNotFoundError(f"there is no folder {folder}; give one that save_pretrained wrote")
    files = [CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES, CARD_FILE]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=files, library_name=LIBRARY, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        is_absent = isinstance(error, FileNotFoundError | HFValidationError) or _status(error) in (401, 404)
        kind = FileNotFoundError if is_absent else OSError
        raise kind(
            f"{source!r} is no folder here, and no model could be had from the Hugging Face hub under that name: "
            f"{error}"
        ) from error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    commit_message: str,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Uploads a folder to a repository, which is made if there is none. A README of the repository that is not ours
    stays. Returns the address of the commit.
    """
    api = huggingface_hub.HfApi(token=token, library_name=LIBRARY)
    repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    left_out = [CARD_FILE] if _has_other_card(api, repo_id, revision) else None
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=left_out,
    )
    return str(commit.commit_url)


def _has_other_card(api: Any, repo_id: str, revision: str | None) -> bool:
    read: Callable[..., str] = api.hf_hub_download
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    return not is_ours(Path(read(repo_id, CARD_FILE, revision=revision)))
