"""Any nested state (of a model, an optimizer, a scheduler, random numbers) as tensors and JSON, and back.

A JSON object whose only key starts with `$` stands for what JSON has not:

| JSON | Python |
|---|---|
| `{"$tensor": name}`, `{"$array": name}`, `{"$scalar": name}` | a tensor; a NumPy array or scalar, kept as a tensor |
| `{"$tuple": [...]}` | a tuple |
| `{"$float": "inf"}` | a float that is not finite |
| `{"$dtype": "float32"}`, `{"$device": "cpu"}`, `{"$size": [2, 3]}` | a `torch.dtype`, `torch.device`, `torch.Size` |
| `{"$items": [[key, value], ...]}` | a dict whose keys are not all strings, or look like one of these |
| `{"$ordered": [[key, value], ...]}`, `{"$counter": ...}` | an `OrderedDict`, a `Counter` |
"""

import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAPPINGS = {"$items": dict, "$ordered": OrderedDict, "$counter": Counter}
TEXTS = {"$float": float, "$dtype": lambda name: getattr(torch, name), "$device": torch.device}


class FlatState(NamedTuple):
    """Tensors by their place in the state (`state.0.exp_avg`), and the rest with references to them."""

    tensors: dict[str, Tensor]
    json: Any


def flatten_state(state: Any) -> FlatState:
    """Splits a state into tensors and JSON; `unflatten_state` makes the same of them again, types included.

    Takes dicts with keys of any of these types, lists, tuples, numbers, strings, None, tensors, NumPy arrays and
    scalars, and the types of torch that the table above lists. Nothing is copied; a parameter becomes a tensor. Raises
    `TypeError` that names the place of anything else, such as a function or a shard of FSDP.
    """
    flattening = Flattening()
    json = flattening.encode(state, "")
    return FlatState(flattening.tensors, json)


def unflatten_state(tensors: Mapping[str, Tensor], json: Any) -> Any:
    """The state that `flatten_state` split. Raises `ValueError` where a tensor is missing or a tag is unknown."""
    if isinstance(json, list):
        return [unflatten_state(tensors, value) for value in json]
    if not isinstance(json, dict):
        return json
    if not _looks_tagged(json):
        return {key: unflatten_state(tensors, value) for key, value in json.items()}
    ((tag, content),) = json.items()
    if tag == "$tensor":
        return _find(tensors, content)
    if tag == "$array":
        return _find(tensors, content).numpy()
    if tag == "$scalar":
        return _find(tensors, content).numpy()[()]
    if tag in TEXTS:
        return TEXTS[tag](content)
    if tag == "$tuple":
        return tuple(unflatten_state(tensors, value) for value in content)
    if tag == "$size":
        return torch.Size(content)
    if tag in MAPPINGS:
        return MAPPINGS[tag]({unflatten_state(tensors, key): unflatten_state(tensors, value) for key, value in content})
    raise ValueError(f"{tag!r} is nothing that this version knows: the state is of a newer one, or of something else")


@dataclass
class Flattening:
    """The tensors met so far. One that is met again is a second reference to the first."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of id(tensor), which lives as long as `tensors`

    def encode(self, value: Any, place: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if kind is list:
            return [self.encode(item, _join(place, index)) for index, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.encode(item, _join(place, index)) for index, item in enumerate(value)]}
        if isinstance(value, Tensor):
            if hasattr(value, "full_tensor"):  # a DTensor
                raise TypeError(f"'{place}' of the state is one shard of a tensor; gather the state before it is saved")
            return {"$tensor": self.keep(value.detach(), place, key=id(value))}
        if kind in MAPPINGS.values():
            return self.encode_mapping(value, place)
        if kind is torch.Size:
            return {"$size": list(value)}
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"$device": str(value)}
        return self.encode_numpy(value, place)

    def encode_mapping(self, value: Mapping[Any, Any], place: str) -> Any:
        is_plain = type(value) is dict and all(type(key) is str for key in value) and not _looks_tagged(value)
        if is_plain:
            return {key: self.encode(item, _join(place, key)) for key, item in value.items()}
        (tag,) = (tag for tag, kind in MAPPINGS.items() if kind is type(value))
        items = [
            [self.encode(key, _join(place, f"key {index}")), self.encode(item, _join(place, key))]
            for index, (key, item) in enumerate(value.items())
        ]
        return {tag: items}

    def encode_numpy(self, value: Any, place: str) -> Any:
        numpy = sys.modules.get("numpy")
        kinds = (numpy.ndarray, numpy.generic) if numpy else ()
        if isinstance(value, kinds) and value.dtype.kind in "biuf":
            tag = "$array" if type(value) is numpy.ndarray else "$scalar"  # type: ignore[union-attr]
            tensor = torch.from_numpy(numpy.array(value))  # type: ignore[union-attr]
            return {tag: self.keep(tensor, place, key=id(tensor))}
        name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"'{place}' of the state is a {name}, which is neither a tensor nor JSON and is not saved; "
            "leave it out and make it anew when the state is loaded"
        )

    def keep(self, tensor: Tensor, place: str, *, key: int) -> str:
        if key in self.names:
            return self.names[key]
        name = place or "value"
        while name in self.tensors:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        self.tensors[name] = tensor
        self.names[key] = name
        return name


def map_tensors(change: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with every tensor changed: `map_tensors(Tensor.cpu, state)`."""
    tensors, json = flatten_state(state)
    return unflatten_state({name: change(tensor) for name, tensor in tensors.items()}, json)


def _join(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _looks_tagged(value: Mapping[Any, Any]) -> bool:
    return len(value) == 1 and all(isinstance(key, str) and key.startswith("$") for key in value)


def _find(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor '{name}' of the state is missing")
    return tensors[name]
