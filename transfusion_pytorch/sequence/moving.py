"""Frozen dataclasses of tensors that move between devices as one, and where they are made."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


def on_cpu() -> AbstractContextManager:
    """New tensors are on the CPU, whatever the default device is. Costs nothing where that is the CPU anyway."""
    # not torch.get_default_device(), which does not see `with torch.device(...)` in torch 2.6
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


Self = TypeVar("Self", bound="Moving")


class Moving:
    """Mixed into a frozen dataclass: `to` and `pin_memory` go through its fields. Tensors, and what has these methods
    itself, also in a mapping, are moved; all else stays as it is.
    """

    def to(self: Self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """On another device. From pinned memory the host does not wait."""
        non_blocking = non_blocking and torch.device(device).type != "cpu"  # or the host would read too early
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self, device: Any = None) -> Self:
        """In memory from which a GPU copies by itself. Data loaders call it (`pin_memory=True`)."""
        return self._each(lambda value: value.pin_memory() if not _is_on_gpu(value) else value)

    def _each(self: Self, move: Callable[[Any], Any]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved = {name: _moved(value, move) for name, value in values.items()}
        changed = {name: value for name, value in moved.items() if value is not values[name]}
        return replace(self, **changed) if changed else self  # type: ignore[type-var]


def _moved(value: Any, move: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor) or (hasattr(value, "to") and hasattr(value, "pin_memory")):
        return move(value)
    if isinstance(value, Mapping):
        made = {key: _moved(each, move) for key, each in value.items()}
        return made if any(made[key] is not value[key] for key in made) else value
    if isinstance(value, tuple) and any(isinstance(each, (Tensor, Moving)) for each in value):
        made = tuple(_moved(each, move) for each in value)
        return made if any(one is not other for one, other in zip(made, value, strict=True)) else value
    return value


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
