"""Components: modules and dataclasses that a configuration names, and that are built again from their arguments.

`{"component": "UNetDown", "version": 1, "arguments": {...}}` stands for a component, `{"module": "my.module.Encoder"}`
for anything that only its user can build. Nothing is imported because a configuration names it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

Class = TypeVar("Class", bound=type)

# the keys that say what a dict of a configuration stands for
COMPONENT, MODULE, DTYPE = "component", "module", "torch.dtype"
ARGUMENTS = "_constructor_arguments"  # the attribute of a component that has them


class Component(NamedTuple):
    """A class that is built from arguments which fit into JSON."""

    name: str
    version: int
    cls: type


_BY_NAME: dict[str, Component] = {}
_BY_CLASS: dict[type, Component] = {}


@overload
def register_component(cls: Class, /, *, name: str | None = ..., version: int = ...) -> Class: ...
@overload
def register_component(
    cls: None = None, /, *, name: str | None = ..., version: int = ...
) -> Callable[[Class], Class]: ...
def register_component(cls: Any = None, /, *, name: str | None = None, version: int = 1) -> Any:
    """Makes a class one that `save_pretrained` describes and `from_pretrained` builds again. A decorator.

    ```python
    @register_component
    class Encoder(nn.Module):
        def __init__(self, channels: int): ...
    ```

    Its constructor takes numbers, strings, None, lists and dicts of those, dtypes, and other components, all by name.
    They are recorded when an instance is built; of a dataclass its fields are read. Instances that were built before
    the class was registered, or by a subclass, are no components. `name` is the name of the class by default; raise
    `version` when old arguments mean something else, and configurations of a newer version are refused.

    Raises `TypeError` for a constructor with `*args` or positional-only parameters, and `ValueError` for a name that
    another class has.
    """
    if cls is None:
        return functools.partial(register_component, name=name, version=version)
    if not isinstance(cls, type):
        raise TypeError(f"register_component takes a class, got {type(cls).__name__}")
    name = cls.__name__ if name is None else name
    known = _BY_NAME.get(name)
    # a cell of a notebook that runs again defines the class anew
    if known is not None and qualified_name(known.cls) != qualified_name(cls):
        raise ValueError(
            f"there is a component {name!r} already, {qualified_name(known.cls)}; give {qualified_name(cls)} another "
            "name="
        )
    if not dataclasses.is_dataclass(cls):
        _record_arguments(cls)
    _BY_NAME[name] = _BY_CLASS[cls] = Component(name, version, cls)
    return cls


def _record_arguments(cls: type) -> None:
    """From now on an instance keeps what it was built with, defaults included, in the attribute `ARGUMENTS`."""
    build: Any = cls.__init__
    takes_nothing = build in (nn.Module.__init__, object.__init__)  # whose signatures say that they take anything
    signature = inspect.signature(_of_itself if takes_nothing else build)
    _, *parameters = signature.parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    if unnamed := [parameter.name for parameter in parameters if parameter.kind in kinds]:
        raise TypeError(f"a component is built by arguments that have names; {cls.__name__} takes {', '.join(unnamed)}")
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(build)
    def __init__(self, *args, **options):
        if type(self) is not cls:  # a subclass may have other arguments
            build(self, *args, **options)
            return
        bound = signature.bind(self, *args, **options)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        more = dict(given).pop(names[0]) if names else {}
        arguments = {key: _copied(value) for key, value in (dict(given) | more).items() if key not in names}
        build(self, *args, **options)
        vars(self)[ARGUMENTS] = arguments

    cls.__init__ = __init__


def _of_itself(self: Any) -> None: ...


def _copied(value: Any) -> Any:
    """With containers of its own: the caller may change theirs."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_copied(inner) for inner in value]
    return value


def own_class(instance: Any) -> type:
    """The class of an instance as its user wrote it: `fully_shard` puts one in front."""
    cls = type(instance)
    return next(base for base in cls.__bases__ if base is not FSDPModule) if isinstance(instance, FSDPModule) else cls


def qualified_name(function_or_class: Any) -> str:
    """`my.module.Encoder`, or `my.module.make.<locals>.<lambda>`; of an instance, that of its class."""
    named = function_or_class if hasattr(function_or_class, "__qualname__") else own_class(function_or_class)
    return f"{named.__module__}.{named.__qualname__}"


def component_of(instance: Any) -> Component | None:
    """What an instance is registered as, if it can be built again."""
    component = _BY_CLASS.get(own_class(instance))
    if component is None or not (dataclasses.is_dataclass(instance) or ARGUMENTS in vars(instance)):
        return None
    return component


def arguments_of(instance: Any) -> dict[str, Any]:
    """What a component was built with."""
    if dataclasses.is_dataclass(instance):
        return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance) if field.init}
    return vars(instance)[ARGUMENTS]


# values as JSON, and back


def encode(value: Any, where: str, *, may_name: bool = True) -> Any:
    """A value as JSON has it, `where` being its name in errors.

    Modules and functions that are no components are named, if the caller `may_name` them: those are to be handed over
    again. Raises `TypeError` for what can be neither written nor named.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _finite(float(value), where)
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return _encoded_dict(value, where, may_name)
    if isinstance(value, Sequence):
        return [encode(each, f"{where}[{i}]", may_name=may_name) for i, each in enumerate(value)]
    if (component := component_of(value)) is not None:
        arguments = {key: encode(each, f"{where}.{key}", may_name=False) for key, each in arguments_of(value).items()}
        return {COMPONENT: component.name, "version": component.version, "arguments": arguments}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # its bool is none of Python's
        return encode(value.item(), where)
    if may_name and (callable(value) or isinstance(value, nn.Module) or dataclasses.is_dataclass(value)):
        return {MODULE: qualified_name(value)}
    kinds = "numbers, strings, None, dtypes, lists and dicts of those, and registered components"
    raise TypeError(f"{where} is of type {qualified_name(type(value))}; what can be saved are {kinds}")


def _finite(number: float, where: str) -> float:
    if number - number != 0:
        raise ValueError(f"{where} is {number}, which JSON cannot hold")
    return number


def _encoded_dict(value: Mapping[Any, Any], where: str, may_name: bool) -> dict[str, Any]:
    reserved = (COMPONENT, MODULE, DTYPE)
    if wrong := [key for key in value if not isinstance(key, str) or key in reserved]:
        raise TypeError(f"{where}: keys must be strings other than {', '.join(reserved)}, got {wrong[0]!r}")
    return {key: encode(each, f"{where}.{key}", may_name=may_name) for key, each in value.items()}


def decode(value: Any, where: str) -> Any:
    """The inverse of `encode`: builds the components. Raises `ValueError` for one that is unknown or too new."""
    if isinstance(value, list):
        return [decode(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if COMPONENT in value:
        return _built(value, where)
    if DTYPE in value:
        dtype = getattr(torch, str(value[DTYPE]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{where}: torch has no dtype {value[DTYPE]!r}")
        return dtype
    return {key: decode(each, f"{where}.{key}") for key, each in value.items()}


def _built(value: dict[str, Any], where: str) -> Any:
    name, version, given = value[COMPONENT], value.get("version"), value.get("arguments")
    if not isinstance(name, str) or not isinstance(version, int) or not isinstance(given, dict):
        raise ValueError(f"{where}: a component has a name, a version and a dict of arguments, got {value}")
    if name not in _BY_NAME:
        known = ", ".join(sorted(_BY_NAME))
        raise ValueError(
            f"{where}: the component {name!r} is unknown, those registered are {known}; import the module that "
            "registers it, or hand over the argument"
        )
    component = _BY_NAME[name]
    if version > component.version:
        raise ValueError(
            f"{where}: the component {name!r} is of version {version}, newer than the {component.version} known here; "
            f"upgrade {component.cls.__module__.partition('.')[0]}"
        )
    arguments = {key: decode(each, f"{where}.{key}") for key, each in given.items()}
    try:
        return component.cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {name} cannot be built from {given}: {error}") from error


def named_modules_in(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Where a configuration names something that has to be handed over, and what that was."""
    if isinstance(value, list):
        for i, each in enumerate(value):
            yield from named_modules_in(each, f"{where}[{i}]")
    elif isinstance(value, dict) and MODULE in value:
        yield where, str(value[MODULE])
