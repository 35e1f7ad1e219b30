"""A language model of `transformers` as the trunk of a `Transfusion`: where it is, and its weights into ours.

d model, v vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from torch import Tensor, nn

from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.pretrained.families import family_of, transformer_arguments, trunk_weights
from transfusion_pytorch.saving.files import open_tensors

EMBEDDING, LOGITS = "model.embed_tokens.weight", "lm_head.weight"
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


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
    if not isinstance(source, (str, Path)):
        raise TypeError(
            "a language model is a module of transformers, a folder, or the id of a repository, got "
            f"{type(source).__name__}"
        )
    folder = _folder_of(source, gguf_file, **hub)
    if gguf_file is not None:
        import_optional("gguf", extra="pretrained")  # transformers reads the file with it
        family_of(transformers.AutoConfig.from_pretrained(folder, gguf_file=gguf_file))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        model.config.quantization_config = None  # its weights are plain numbers now
        yield _in_memory(model)._replace(folder=folder)
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no language model of transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    family_of(config)
    with _opened_files(folder) as tensors:
        dtype = tensors.read("model.norm.weight").dtype if "model.norm.weight" in tensors else torch.float32
        yield LanguageModel(config, tensors, dtype, folder)


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


def _folder_of(source: str | Path, gguf_file: str | None, **hub: Any) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") > 1:
        raise FileNotFoundError(f"there is no folder {folder} with a language model")
    try:
        files = DOWNLOADED if gguf_file is None else ["*.json", "*.jinja", gguf_file]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=files, **hub))
    except Exception as error:  # of the hub, of the network, of names
        raise FileNotFoundError(
            f"{str(source)!r} is no folder here, and no language model could be had from the Hugging Face hub under "
            f"that name: {error}"
        ) from error


@contextmanager
def _opened_files(folder: Path) -> Iterator[Tensors]:
    """The safetensors of a folder, one or several. Raises `FileNotFoundError` where there are none."""
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Weights are read from safetensors only; load the model with "
            "transformers and hand it over, or save it again from there"
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
