"""A tokenizer that travels with a model, as `tokenizer.json` of Hugging Face's `tokenizers`."""

from pathlib import Path
from typing import Any

from transfusion_pytorch.saving.files import whole_file

TOKENIZER_FILE = "tokenizer.json"


def num_ids(tokenizer: Any) -> int:
    """The highest id that a `tokenizers.Tokenizer` has, and one. A vocabulary may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


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


def save_tokenizer(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load_tokenizer(text: str, num_text_tokens: int, path: Path | str) -> Any:
    """The inverse of `tokenizer_json`. Raises `ImportError` that names the extra to install, and `ValueError` for what
    is no tokenizer or one that does not fit.
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
    if (size := num_ids(tokenizer)) > num_text_tokens:
        raise ValueError(f"{path} has {size} ids, and the model num_text_tokens={num_text_tokens}: it is another's")
    return tokenizer
