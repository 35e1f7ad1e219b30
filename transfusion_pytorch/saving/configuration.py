"""`config.json`: how a model was made, readable, and enough to make it again."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

from transfusion_pytorch.saving.components import MODULE, decode, encode, named_modules_in, qualified_name
from transfusion_pytorch.saving.files import load_json

LIBRARY, FORMAT = "transfusion_pytorch", 1
CONFIG_FILE = "config.json"
PAIRS = "pre_post_transformer_enc_dec"
# the arguments that are modules, functions or a policy, with a list of one for each modality where that is so
MODULES_BY_MODALITY = ("modality_encoder", "modality_decoder", PAIRS, "to_modality_shape_fn")


def describe(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a model of this class and these arguments. Raises `TypeError` for arguments that JSON
    cannot hold, or that its constructor does not take.
    """
    check_names(cls, arguments)
    return {
        "library": LIBRARY,
        "library_version": version("transfusion-pytorch"),
        "format_version": FORMAT,
        "class": qualified_name(cls),
        "arguments": {name: encode(value, name) for name, value in arguments.items()},
    }


def check_names(cls: type, arguments: Mapping[str, Any]) -> None:
    """Raises `TypeError` unless the constructor of a class takes arguments of these names, and needs no other."""
    parameters = list(signature(cls).parameters.values())
    named = {each.name: each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    unknown = [] if takes_any else [name for name in arguments if name not in named]
    missing = [each.name for each in named.values() if each.default is each.empty and each.name not in arguments]
    if unknown or missing:
        wrong = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(unknown)}"] * bool(unknown)
        raise TypeError(
            f"{qualified_name(cls)} cannot be built {' and '.join(wrong)}; its arguments are {', '.join(named)}. A "
            "subclass with another constructor overrides constructor_arguments()"
        )


def load_config(path: Path) -> dict[str, Any]:
    """What `describe` wrote. Raises `ValueError` that names the file where it is something else, or too new."""
    config = load_json(path)
    if not _is_ours(config):
        names = ("library", "model_type", "_class_name")
        others = [config[key] for key in names if key in config] if isinstance(config, dict) else []
        other = f"of {others[0]!r}" if others else f"a {type(config).__name__} without its name"
        raise ValueError(f"{path} is no configuration of {LIBRARY}, but {other}")
    number, arguments = config.get("format_version"), config.get("arguments")
    if not isinstance(number, int) or not isinstance(arguments, dict):
        raise ValueError(f"{path} is malformed: it must have a format_version and a dict of arguments")
    if number > FORMAT:
        raise ValueError(
            f"{path} has format {number}, written by {LIBRARY} {config.get('library_version')}; this version reads up "
            f"to {FORMAT}: upgrade with pip install -U transfusion-pytorch"
        )
    return config


def is_our_config(path: Path) -> bool:
    """Whether a file is the configuration of a model of this library, of any version."""
    try:
        return _is_ours(load_json(path))
    except (OSError, ValueError):
        return False


def _is_ours(config: Any) -> bool:
    return isinstance(config, dict) and config.get("library") == LIBRARY


def constructor_arguments(config: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments that a configuration describes, components built, and what the caller has given in their place.

    Raises `ValueError` that names the file, and lists everything that has to be handed over and is not.
    """
    described = dict(config["arguments"])
    handed_over = {name: _in_place(name, value, described.get(name)) for name, value in given.items()}
    merged = described | handed_over
    check_handed_over(merged, path)
    try:
        return {name: decode(value, name) if name in described else value for name, value in merged.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _in_place(name: str, given: Any, described: Any) -> Any:
    """What is given for an argument that has an entry for each modality. A single module goes where one is named, and
    a None of a list leaves what is there.
    """
    if name not in MODULES_BY_MODALITY or not isinstance(described, list):
        return given
    is_pair = name == PAIRS and _is_list(given) and len(given) == 2 and not any(map(_is_list, given))
    if _is_list(given) and not is_pair and len(given) == len(described):
        return [was if now is None and _is_named(was, name) else now for now, was in zip(given, described, strict=True)]
    if (_is_list(given) and not is_pair) or not any(_is_named(was, name) for was in described):
        return given
    return [given if _is_named(was, name) else was for was in described]


def _is_named(described: Any, name: str) -> bool:
    return any(named_modules_in(described, name))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_handed_over(arguments: Mapping[str, Any], path: Path) -> None:
    """Raises `ValueError` that lists the arguments for which a configuration only has the name of a module."""
    missing = needed_modules(arguments)
    if missing:
        lines = "".join(f"\n- {line}" for line in missing)
        call = ", ".join(
            f"{name}=..." for name in dict.fromkeys(line.partition(" ")[0].rstrip(":") for line in missing)
        )
        raise ValueError(
            f"{path} names what only you can build; hand it over, from_pretrained(..., {call}), or register its class "
            f"with register_component before saving:{lines}"
        )


def needed_modules(arguments: Mapping[str, Any]) -> list[str]:
    """What has to be handed over to `from_pretrained`: `modality_encoder of modality 0: my.module.Encoder`."""
    found = []
    for name, value in arguments.items():
        if name in MODULES_BY_MODALITY and isinstance(value, list):
            for i, each in enumerate(value):
                # a pair is two modules of one modality
                halves = [each] if isinstance(each, dict) else each if isinstance(each, list) else []
                classes = [half[MODULE] for half in halves if isinstance(half, dict) and MODULE in half]
                found += [f"{name} of modality {i}: {' and '.join(classes)}"] if classes else []
        else:
            found += [f"{name}: {module}" for _, module in named_modules_in(value, name)]
    return found
