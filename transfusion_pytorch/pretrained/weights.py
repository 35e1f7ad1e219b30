"""The weights of a language model of `transformers`: read by name, compared with its configuration, put into ours.

d model, v vocabulary.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.pretrained.families import transformer_arguments, trunk_weights
from transfusion_pytorch.saving.files import load_json, open_tensors

EMBEDDING, LOGITS = "model.embed_tokens.weight", "lm_head.weight"
PREFIX, HEAD = "model.", "lm_head."  # of the names of a decoder, and of the layer behind it
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
BUFFERS = ("rotary_emb.inv_freq",)  # in older files; the configuration says them


class Tensors:
    """Tensors by name, in memory or in files. Those of files are read one at a time."""

    def __init__(self, sources: Mapping[str, tuple[Any, str]]):
        self._sources = dict(sources)  # a tensor, or the opened file that has it, and its name there

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def names(self) -> list[str]:
        return list(self._sources)

    def read(self, name: str) -> Tensor:
        source, key = self._sources[name]
        return source.detach() if isinstance(source, Tensor) else source.get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        source, key = self._sources[name]
        return tuple(source.shape if isinstance(source, Tensor) else source.get_slice(key).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        source, key = self._sources[name]
        return source.dtype if isinstance(source, Tensor) else source.get_slice(key)[:1].dtype

    def are_equal(self, name: str, other: str) -> bool:
        if self.shape(name) != self.shape(other) or self.dtype(name) != self.dtype(other):
            return False
        first, second = self.read(name), self.read(other)
        return first.data_ptr() == second.data_ptr() or torch.equal(first, second)

    def name_also(self, name: str, other: str) -> None:
        """Lets the tensor `name` have another name as well."""
        self._sources[other] = self._sources[name]


def tensors_of(state: Mapping[str, Tensor]) -> Tensors:
    return Tensors({name: (tensor, name) for name, tensor in state.items()})


def tensors_in(fetch: Callable[[Iterable[str]], Path]) -> Tensors:
    """The safetensors of a folder, one file or those that the index names. As for `transformers`, the one file goes
    before an index, which is then left over from an earlier model. `fetch` gives the folder, with files of these names
    if there are any.

    Raises `FileNotFoundError` where there are none.
    """
    folder = fetch([WEIGHTS])
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        names = _names_in_index(folder)
        folder = fetch(names)
    else:
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Weights are read from safetensors only; load the model with "
            "transformers and hand it over, with its tokenizer (tokenizer=...), or save it again from there"
        )
    if lost := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder / INDEX} names {lost[0]}, which is not there")
    files = [open_tensors(folder / name) for name in names]
    sources = {name: (file, name) for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
    if EMBEDDING not in sources and EMBEDDING.removeprefix(PREFIX) in sources:  # of the decoder alone
        sources = {name if name.startswith(HEAD) else PREFIX + name: source for name, source in sources.items()}
    return Tensors(sources)


def _names_in_index(folder: Path) -> list[str]:
    index = load_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError(f"{folder / INDEX} is malformed: it has no weight_map")
    return sorted(set(names.values()))


class Weights(NamedTuple):
    """The weights of a language model, none of them read.

    - `is_tied`: logits are products with the rows of the embedding
    - `dtype`: that of the embedding
    """

    tensors: Tensors
    is_tied: bool
    dtype: torch.dtype


def checked_weights(config: Any, tensors: Tensors, *, is_module: bool) -> Weights:
    """Raises `ValueError` for weights that are missing, of another shape than the configuration makes them, or in a
    module, where they would be used, of no place in ours; in a file these are left out with a warning, as in
    `transformers`. Nothing large is made.

    Weights are tied where the configuration says so, unless there are two tables that differ: also as there.
    """
    is_tied = bool(config.tie_word_embeddings)
    if is_tied and LOGITS in tensors and EMBEDDING not in tensors:
        tensors.name_also(LOGITS, EMBEDDING)
    if is_tied and LOGITS in tensors and EMBEDDING in tensors and not tensors.are_equal(EMBEDDING, LOGITS):
        is_tied = False
        warnings.warn(
            f"the configuration ties {LOGITS} to {EMBEDDING}, and the weights have both with different numbers: they "
            "are not tied. With tie_word_embeddings=False the configuration says so, too",
            stacklevel=3,
        )
    shapes = _expected_shapes(config, is_tied)
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(
            f"the language model lacks {len(missing)} weights, the first being {missing[0]}; it is no causal language "
            f"model of type {config.model_type!r}, or its files are incomplete"
        )
    for name, expected in shapes.items():
        if (shape := tensors.shape(name)) != expected:
            raise ValueError(f"{name} has the shape {shape}, and its configuration makes it {expected}")
    unread = [name for name in tensors.names() if name not in (*shapes, LOGITS) and not name.endswith(BUFFERS)]
    if unread:
        reason = f"a model of type {config.model_type!r} has no place for {len(unread)} weights, such as {unread[0]}"
        if is_module:
            raise ValueError(f"{reason}: the language model would be another without them")
        warnings.warn(f"{reason}: they are left out", stacklevel=3)
    return Weights(tensors, is_tied, tensors.dtype(EMBEDDING))


def _expected_shapes(config: Any, is_tied: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights by their names: the places in our `Transformer` that they go to."""
    arguments = transformer_arguments(config)
    with torch.device("meta"):
        trunk = Transformer(**arguments)
    shapes = {}
    for name, parts in trunk_weights(config):
        parameter = trunk.get_parameter(name)
        shapes |= {part.source: tuple(parameter[part.rows].shape) for part in parts}
    table = (config.vocab_size, config.hidden_size)
    return shapes | {EMBEDDING: table} | ({} if is_tied else {LOGITS: table})


@torch.no_grad()
def load_trunk(config: Any, tensors: Tensors, transformer: Any, dtype: torch.dtype) -> None:
    """Gives a `Transformer` on the `meta` device these weights, one parameter after another; each expert a copy."""
    for name, parts in trunk_weights(config):
        places = _places(transformer, name)
        like = places[0][0].get_parameter(places[0][1])
        made = torch.empty(like.shape, dtype=dtype)
        for part in parts:
            made[part.rows] = part.change(tensors.read(part.source))
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
def load_vocabulary(weights: Weights, embedding: Any, logits: Any, dtype: torch.dtype) -> None:
    """The rows of text, and markers that begin as the mean of all rows. Tied logits have no rows of their own."""
    tables = [(embedding, EMBEDDING)] if weights.is_tied else [(embedding, EMBEDDING), (logits, LOGITS)]
    for table, name in tables:
        rows = weights.tensors.read(name).to(dtype, copy=True)
        table.text.weight = nn.Parameter(rows)
        mean = rows.mean(dim=0, dtype=torch.float32).to(dtype)
        table.markers.weight = nn.Parameter(mean.expand(len(table.markers.weight), -1).contiguous())
