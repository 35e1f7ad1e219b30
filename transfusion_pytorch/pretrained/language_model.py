"""A language model of `transformers` as the trunk of a `Transfusion`: where it is, and its weights into ours.

d model, v vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.pretrained.families import family_of, transformer_arguments, trunk_weights
from transfusion_pytorch.pretrained.files import fetch, local_folder
from transfusion_pytorch.saving.files import load_json, open_tensors

WHAT = "a language model"  # in errors
EMBEDDING, LOGITS = "model.embed_tokens.weight", "lm_head.weight"
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
# of a repository, before its architecture is known: configurations and tokenizers, but no weights
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")


class LanguageModel(NamedTuple):
    """A language model before its weights are read.

    - `config`: of `transformers`
    - `tensors`: its weights by name, read when they are asked for
    - `dtype`: of the weights
    - `folder`: where it is, None for one that is in memory
    """

    config: Any
    tensors: "Tensors"
    dtype: torch.dtype
    folder: Path | None

    @property
    def is_tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def num_text(self) -> int:
        """Rows of the embedding; some may stand for no id of the tokenizer."""
        return self.tensors.shape(EMBEDDING)[0]

    def transformer_arguments(self) -> dict[str, Any]:
        return transformer_arguments(self.config)


class Tensors:
    """Tensors by name, in memory or in files. Those of files are read one at a time."""

    def __init__(self, sources: Mapping[str, Any]):
        self._sources = sources  # a tensor, or the opened file that has it

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def names(self) -> list[str]:
        return list(self._sources)

    def read(self, name: str) -> Tensor:
        source = self._sources[name]
        return source.detach() if isinstance(source, Tensor) else source.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._sources[name]
        return tuple(source.shape if isinstance(source, Tensor) else source.get_slice(name).get_shape())


@contextmanager
def opened(source: Any, *, gguf_file: str | None = None, **hub: Any) -> Iterator[LanguageModel]:
    """A language model: a module of `transformers`, a folder, or the id of a repository on the hub, whose files are
    open meanwhile. With a `gguf_file` in the folder, `transformers` reads that, all at once.

    Raises `ImportError` without `transformers`, `TypeError` or `FileNotFoundError` for what is no model, and
    `ValueError` for one of an architecture that is not supported, before any weight is read.
    """
    transformers = import_optional("transformers", extra="pretrained")
    if isinstance(source, nn.Module):
        if gguf_file is not None:
            raise ValueError("gguf_file names a file in a folder, and the language model is a module already")
        yield _in_memory(source)
        return
    if gguf_file is not None:
        import_optional("gguf", extra="pretrained")  # transformers reads the file with it
        folder = fetch(source, ["*.json", "*.jinja", gguf_file], WHAT, **hub)
        if not (folder / gguf_file).is_file():
            raise FileNotFoundError(f"{folder} has no file {gguf_file}, which gguf_file names")
        family_of(transformers.AutoConfig.from_pretrained(folder, gguf_file=gguf_file))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        model.config.quantization_config = None  # its weights are plain numbers now
        yield _in_memory(model)._replace(folder=folder)
        return
    folder = fetch(source, SMALL_FILES, WHAT, **hub)
    config = _config_in(folder)
    family_of(config)
    if local_folder(source, WHAT) is None:  # all that is large, and nothing that the index does not name
        folder = fetch(source, [*SMALL_FILES, *_names_of_weights(folder)], WHAT, **hub)
    with _opened_files(folder) as tensors:
        dtype = tensors.read("model.norm.weight").dtype if "model.norm.weight" in tensors else torch.float32
        yield LanguageModel(config, tensors, dtype, folder)


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
    return LanguageModel(config, Tensors(weights), weights[EMBEDDING].dtype, None)


def _names_of_weights(folder: Path) -> list[str]:
    """The files that the index names, or the one file of a model without an index."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    index = load_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError(f"{folder / INDEX} is malformed: it has no weight_map")
    return sorted(set(names.values()))


@contextmanager
def _opened_files(folder: Path) -> Iterator[Tensors]:
    """The safetensors of a folder, one or several. Raises `FileNotFoundError` where there are none."""
    names = _names_of_weights(folder)
    if names == [WEIGHTS] and not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Weights are read from safetensors only; load the model with "
            "transformers and hand it over, with its tokenizer (tokenizer=...), or save it again from there"
        )
    sources: dict[str, Any] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {name}, which is not there")
        opened_file = open_tensors(folder / name)
        sources |= dict.fromkeys(opened_file.keys(), opened_file)
    yield Tensors(sources)


# into ours


def check_weights(model: LanguageModel) -> None:
    """Raises `ValueError` that lists what is missing, before anything large is made."""
    wanted = [part.source for _, parts in trunk_weights(model.config) for part in parts]
    wanted += [EMBEDDING, *([] if model.is_tied else [LOGITS])]
    missing = [name for name in wanted if name not in model.tensors]
    if missing:
        raise ValueError(
            f"the language model lacks {len(missing)} weights, the first being {missing[0]}; it is no causal language "
            f"model of type {model.config.model_type!r}, or its files are incomplete"
        )


@torch.no_grad()
def load_trunk(model: LanguageModel, transformer: Any, dtype: torch.dtype) -> None:
    """Gives a `Transformer` on the `meta` device these weights, one parameter after another; each expert a copy."""
    for name, parts in trunk_weights(model.config):
        places = _places(transformer, name)
        like = places[0][0].get_parameter(places[0][1])
        made = torch.empty(like.shape, dtype=dtype)
        for part in parts:
            rows = part.change(model.tensors.read(part.source))
            if made[part.rows].shape != rows.shape:
                raise ValueError(
                    f"{part.source} has the shape {tuple(rows.shape)}, and its configuration makes it "
                    f"{tuple(made[part.rows].shape)}"
                )
            made[part.rows] = rows
        done: dict[int, nn.Parameter] = {}
        for module, attribute in places:
            is_seen = id(module) in done
            parameter = done[id(module)] if is_seen else nn.Parameter(made.clone() if done else made)
            done[id(module)] = parameter
            setattr(module, attribute, parameter)


def _places(transformer: Any, name: str) -> list[tuple[nn.Module, str]]:
    """The modules of all experts that have this parameter of a layer or of the last norm."""
    path, _, attribute = name.rpartition(".")
    if not transformer.untied:
        return [(transformer.get_submodule(path), attribute)]
    if path == "final_norm":
        norm = transformer.final_norm
        return [(each, attribute) for each in (norm if isinstance(norm, nn.ModuleList) else [norm])]
    _, index, rest = path.split(".", 2)
    layer = transformer.layers[int(index)]
    return [(expert.get_submodule(rest), attribute) for expert in layer.experts]


@torch.no_grad()
def load_vocabulary(model: LanguageModel, embedding: Any, logits: Any, dtype: torch.dtype) -> None:
    """The rows of text, and markers that begin as the mean of all rows. Tied logits have no rows of their own."""
    tables = [(embedding, EMBEDDING)] if model.is_tied else [(embedding, EMBEDDING), (logits, LOGITS)]
    for table, name in tables:
        rows = model.tensors.read(name).to(dtype, copy=True)
        table.text.weight = nn.Parameter(rows)
        mean = rows.mean(dim=0, dtype=torch.float32).to(dtype)
        table.markers.weight = nn.Parameter(mean.expand(len(table.markers.weight), -1).contiguous())
