"""A tokenizer that travels with a model: `tokenizer.json` of Hugging Face's `tokenizers`; if it has a chat template or
special tokens, also `chat_template.jinja` and `tokenizer_config.json`, as `transformers` has them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transfusion_pytorch.saving.files import load_json, save_json, whole_file

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"  # of older versions of transformers; read, and not written
TOKENIZER_FILES = (TOKENIZER_FILE, CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)


class TokenizerFiles(NamedTuple):
    """What the files say: the tokenizer as JSON text, its chat template, and its special tokens by their names."""

    tokenizer: str
    chat_template: str | None = None
    config: Mapping[str, Any] | None = None

    @property
    def is_plain(self) -> bool:
        """A tokenizer, and nothing else."""
        return self.chat_template is None and self.config is None


def num_ids(tokenizer: Any) -> int:
    """The highest id that a `tokenizers.Tokenizer` has, and one. A vocabulary may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def without_limits(tokenizer: Any) -> Any:
    """Of a tokenizer that cuts text off or fills it up, a copy that does not."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def tokenizer_json(tokenizer: Any, num_text_tokens: int) -> str:
    """A `tokenizers.Tokenizer`, or the one inside a fast tokenizer of `transformers`, as text.

    Raises `TypeError` for any other, and `ValueError` where it has ids that the model has not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not callable(getattr(backend, "to_str", None)) or not callable(getattr(backend, "get_vocab", None)):
        raise TypeError(
            "tokenizer must be a tokenizers.Tokenizer or a fast tokenizer of transformers, got "
            f"{type(tokenizer).__name__}"
        )
    if (size := num_ids(backend)) > num_text_tokens:
        raise ValueError(
            f"the tokenizer has {size} ids and the model num_text_tokens={num_text_tokens}: it would be refused what "
            "the tokenizer makes"
        )
    return backend.to_str(pretty=True)


def load_tokenizer(text: str, num_text_tokens: int | None, path: Path | str) -> Any:
    """The inverse of `tokenizer_json`. Raises `ImportError` that names the extra to install, and `ValueError` for what
    is no tokenizer or one that does not fit (unless `num_text_tokens` is None).
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f'{path} needs the package tokenizers: pip install "transfusion-pytorch[tokenizers]"'
        ) from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the one type that it raises
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    if num_text_tokens is not None and (size := num_ids(tokenizer)) > num_text_tokens:
        raise ValueError(f"{path} has {size} ids, and the model num_text_tokens={num_text_tokens}: it is another's")
    return tokenizer


def write_tokenizer_files(folder: Path, files: TokenizerFiles) -> None:
    """Each file is whole or not there; those of another tokenizer that was there are removed."""
    (folder / SPECIAL_TOKENS_FILE).unlink(missing_ok=True)
    _write_text(folder / TOKENIZER_FILE, files.tokenizer)
    if files.chat_template is None:
        (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        _write_text(folder / CHAT_TEMPLATE_FILE, files.chat_template)
    if files.config is None:
        (folder / TOKENIZER_CONFIG_FILE).unlink(missing_ok=True)
    else:
        save_json(folder / TOKENIZER_CONFIG_FILE, dict(files.config))


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """None where there is no tokenizer. Raises `ValueError` that names a file which is not readable.

    As in `transformers`, special tokens of `special_tokens_map.json` count where the configuration has no list of all
    added ones.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    template = folder / CHAT_TEMPLATE_FILE
    config = _read_dict(folder / TOKENIZER_CONFIG_FILE)
    if "added_tokens_decoder" not in (config or {}) and (special := _read_dict(folder / SPECIAL_TOKENS_FILE)):
        config = (config or {}) | special
    return TokenizerFiles(
        _read_text(folder / TOKENIZER_FILE),
        _read_text(template) if template.is_file() else None,
        config,
    )


def _read_dict(path: Path) -> dict[str, Any] | None:
    content = load_json(path) if path.is_file() else None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} is malformed: it must be a dict, got a {type(content).__name__}")
    return content


# line ends as they are


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(text.encode())


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
