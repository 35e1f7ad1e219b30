"""A language model of `transformers` as the trunk of a `Transfusion`: where it is, and what its small files say."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.pretrained.families import family_of
from transfusion_pytorch.pretrained.files import fetch
from transfusion_pytorch.pretrained.weights import (
    EMBEDDING,
    Tensors,
    Weights,
    checked_weights,
    tensors_in,
    tensors_of,
)
from transfusion_pytorch.saving.files import load_json

WHAT = "a language model"  # in errors
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# configurations and tokenizers of a repository, but no weights
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")


class LanguageModel(NamedTuple):
    """A language model of which nothing large has been read, nor downloaded.

    - `config`: of `transformers`
    - `folder`: where it is, None for one that is in memory
    - `eos_ids`: the ids that end text, as its configurations say; the first is that of the model itself
    - `open_tensors`: downloads what is not there, and opens the weights
    """

    config: Any
    folder: Path | None
    eos_ids: list[int]
    open_tensors: Callable[[], Tensors]

    @property
    def num_text(self) -> int:
        """Rows of the embedding; some may stand for no id of the tokenizer."""
        return self.config.vocab_size

    def weights(self) -> Weights:
        """Errors are those of `checked_weights`, and `FileNotFoundError` where there are no safetensors."""
        return checked_weights(self.config, self.open_tensors(), is_module=self.folder is None)


def find_language_model(source: Any, *, gguf_file: str | None = None, **hub: Any) -> LanguageModel:
    """A language model: a module of `transformers`, a folder, or the id of a repository on the hub. With a `gguf_file`
    in the folder, `transformers` reads that, all at once when its weights are opened.

    Raises `ImportError` without `transformers`, `TypeError` or `FileNotFoundError` for what is no model, and
    `ValueError` for one of an architecture that is not supported.
    """
    transformers = import_optional("transformers", extra="pretrained")
    if isinstance(source, nn.Module):
        if gguf_file is not None:
            raise ValueError("gguf_file names a file in a folder, and the language model is a module already")
        return _in_memory(source)
    if gguf_file is not None:
        return _in_gguf(transformers, fetch(source, [*SMALL_FILES, gguf_file], WHAT, **hub), gguf_file)
    folder = fetch(source, SMALL_FILES, WHAT, **hub)
    config = _config_in(folder)
    family_of(config)
    generation = load_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    eos_ids = _ids(config.eos_token_id) + _ids(generation.get("eos_token_id"))
    return LanguageModel(config, folder, eos_ids, partial(tensors_in, partial(_fetch_files, source, hub)))


def language_model_dim(name_or_model: str | Path | nn.Module, **hub: Any) -> int:
    """The width of the layers of a language model: the `dim` of `UNetDown` and `UNetUp`. Of a folder or a repository on
    the hub only the configuration is read; `hub` are options of `huggingface_hub.snapshot_download`.

    Raises `ImportError` without `transformers`, `TypeError` or `FileNotFoundError` for what is no model, and
    `ValueError` for an architecture that is not supported.
    """
    if isinstance(name_or_model, nn.Module):
        config: Any = getattr(name_or_model, "config", None)
    else:
        config = _config_in(fetch(name_or_model, [CONFIG], WHAT, **hub))
    family_of(config)
    return config.hidden_size


def _config_in(folder: Path) -> Any:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is no language model of transformers")
    return import_optional("transformers", extra="pretrained").AutoConfig.from_pretrained(folder)


def _in_memory(module: nn.Module) -> LanguageModel:
    config: Any = getattr(module, "config", None)
    family_of(config)
    weights = module.state_dict()
    if EMBEDDING not in weights:
        raise TypeError(
            f"{type(module).__name__} has no {EMBEDDING}: hand over the causal language model, not its decoder alone"
        )
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError("the language model is on the meta device, without numbers: load its weights first")
    generation = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    return LanguageModel(config, None, _ids(config.eos_token_id) + _ids(generation), partial(tensors_of, weights))


def _in_gguf(transformers: Any, folder: Path, file: str) -> LanguageModel:
    import_optional("gguf", extra="pretrained")  # transformers reads the file with it
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} has no file {file}, which gguf_file names")
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
    family_of(config)
    read = partial(_read_gguf, transformers.AutoModelForCausalLM, folder, file)
    return LanguageModel(config, folder, _ids(config.eos_token_id), read)


def _read_gguf(model_class: Any, folder: Path, file: str) -> Tensors:
    return tensors_of(model_class.from_pretrained(folder, gguf_file=file, dtype=torch.float32).state_dict())


def _fetch_files(source: str | Path, hub: dict[str, Any], files: Iterable[str]) -> Path:
    return fetch(source, [*SMALL_FILES, *files], WHAT, **hub)


def _ids(given: int | list[int] | None) -> list[int]:
    return [int(id) for id in (given if isinstance(given, list) else [given]) if id is not None]
