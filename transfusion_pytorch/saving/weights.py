"""Weights of a model as one file, and back: strictly, without a second copy of them in memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transfusion_pytorch.saving.files import load_tensors

WEIGHTS_FILE = "model.safetensors"
MOST_LISTED = 20


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` with whole tensors: those that `fully_shard` has split are gathered, for which every process
    must call this. Raises `TypeError` for what safetensors cannot hold, and `ValueError` for weights on `meta`.
    """
    if adapted := [name for name, module in model.named_modules() if _is_adapter(module)]:
        raise TypeError(
            f"the model carries a LoRA adapter (at {adapted[0]}): save that by itself, with save_pretrained of the "
            "PeftModel, or put it into the weights with merge_and_unload()"
        )
    weights = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"{name} is of type {type(tensor).__name__}, which safetensors cannot hold; quantise a model after it "
                "is loaded, and keep other state in buffers"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, without numbers: there is nothing to save")
        weights[name] = tensor
    return weights


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def build_without_weights(build: Callable[[], Any]) -> Any:
    """A model whose own modules are on the `meta` device; modules that its caller hands over are as they come.

    Where a module does not let itself be built there (it reads its numbers), the model is built plainly.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, ValueError, TypeError):  # what is wrong anywhere is raised again
        return _build_plainly(build)


def _build_plainly(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return build()


def load_weights(
    model: nn.Module, path: Path, build: Callable[[], Any], *, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Gives a model that was built without weights those of a file, on their device and in the file's dtype, or its
    floating point parameters in `dtype`.

    `build` is called again if the model has buffers that are not saved, to have their values. Raises `ValueError` that
    lists what is missing, left over or of another shape.
    """
    tensors = load_tensors(path, device=device)
    tied = _tied_names(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _check_shapes(model.state_dict(), tensors, path)
    _check_ties(tied, tensors, path)
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name in parameters and tensor.is_floating_point() and dtype is not None:
            tensor = tensor.to(dtype)
        # an alias in the file: without a tie in the model these are two parameters, which may be trained apart
        tensors[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
    _refuse(path, missing=missing, unexpected=unexpected)
    for first, *others in tied:
        for name in others:
            (owner, last), (other, attribute) = _split(name), _split(first)
            setattr(model.get_submodule(owner), last, getattr(model.get_submodule(other), attribute))
    if any(True for module in model.modules() for _ in _left_on_meta(module)):
        _fill_in(model, build)
    model.to(device)


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as that of its module and its own."""
    module, _, own = name.rpartition(".")
    return module, own


def _check_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    both = [name for name in tensors if name in expected]
    shapes = [(name, tuple(expected[name].shape), tuple(tensors[name].shape)) for name in both]
    wrong = [f"{name}: expected {model}, got {file}" for name, model, file in shapes if model != file]
    if wrong:
        _refuse(path, shapes=wrong)


def _refuse(
    path: Path,
    *,
    missing: list[str] | None = None,
    unexpected: list[str] | None = None,
    shapes: list[str] | None = None,
) -> None:
    """Raises `ValueError` if there is anything in these lists."""
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [_listed(title, names) for title, names in lists.items() if names]
    if parts:
        raise ValueError(
            f"{path} has the weights of another model than this configuration and what was handed over make; load it "
            f"with the class and the modules that it was saved with:{''.join(parts)}"
        )


def _listed(title: str, names: list[str]) -> str:
    more = f"\n  and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"\n{len(names)} {title}:" + "".join(f"\n  {name}" for name in names[:MOST_LISTED]) + more


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of parameters and buffers that have several: tied weights, and modules with several places."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _check_ties(tied: list[list[str]], tensors: Mapping[str, Tensor], path: Path) -> None:
    for first, *others in tied:
        for name in others:
            if first in tensors and name in tensors and not torch.equal(tensors[first], tensors[name]):
                raise ValueError(
                    f"{path}: {first} and {name} differ, and are one tensor of this model; if one module was handed "
                    "over for several modalities, hand over a list of one for each"
                )


def _left_on_meta(module: nn.Module) -> list[str]:
    """The names of a module's tensors that have no numbers: buffers that are not saved, and plain attributes."""
    held = {**vars(module), **module._buffers}
    return [name for name, value in held.items() if isinstance(value, Tensor) and value.is_meta]


def _fill_in(model: nn.Module, build: Callable[[], Any]) -> None:
    """Takes what is not saved from a model that is built plainly."""
    plain = _build_plainly(build)
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute in _left_on_meta(module):
            setattr(module, attribute, getattr(plain.get_submodule(name), attribute))
