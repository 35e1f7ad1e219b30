"""Evaluation mode, whole parameters of sharded models, and notices of changed weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is back in the mode it had, whatever happened.

    It changes the modules themselves. If another thread may use the model meanwhile, take an `evaluation_view`.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _EvaluationView:
    """Mixed into a subclass of a module's class: the same attributes, but for `training` and the submodules.

    A view and its module share one `__dict__`, so parameters, hooks and all other attributes are those of both. Only
    the properties of this class are a view's own: data descriptors take precedence over a `__dict__`.
    """

    _view_of: nn.Module
    _view_children: "dict[int, _KnownView]"

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """A slice of a `ModuleList` calls the class of what it slices: that of the module makes it, of views."""
        return cls.__bases__[1](*args, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is the view of a copy of the module."""
        return evaluation_view, (self._view_of,)

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignored: a view has one mode, and that of its module must not change."""

    @property
    def _modules(self) -> dict[str, nn.Module | None]:
        return {name: self._view(child) for name, child in self._view_of.__dict__["_modules"].items()}

    def __getattr__(self, name: str) -> Any:
        child = self._view_of.__dict__["_modules"].get(name)
        return super().__getattr__(name) if child is None else self._view(child)  # type: ignore[misc]

    def _view(self, child: nn.Module | None) -> nn.Module | None:
        if child is None:
            return None
        known = self._view_children.get(id(child))
        # the child is kept with its view, so that no other can get its id; a parametrization changes its class
        if known is None or known.kind is not type(child):
            view = _view_with(child, self._view_children)
            known = self._view_children[id(child)] = _KnownView(child, type(child), view)
        return known.view


class _KnownView(NamedTuple):
    """A view that was made of a module when it was of this class."""

    module: nn.Module
    kind: type[nn.Module]
    view: nn.Module


_VIEW_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def evaluation_view(module: Module) -> Module:
    """The same module in evaluation mode, whatever mode the module itself has.

    Nothing is copied and no mode is changed, so any number of threads may sample from a model while another trains it.
    Scripted modules have no view and are returned as they are; of compiled ones the original module is used.
    """
    return _view_with(module, {})


def _view_with(module: Module, children: dict[int, _KnownView]) -> Module:
    """`children` are the views of the tree so far: a module that stands in it twice has one."""
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, torch.jit.ScriptModule | _EvaluationView):
        return module
    kind = type(module)
    if kind not in _VIEW_CLASSES:
        slots = {"__slots__": ("_view_of", "_view_children"), "__module__": kind.__module__, "__doc__": kind.__doc__}
        metaclass: Any = type(kind)
        _VIEW_CLASSES[kind] = metaclass(kind.__name__, (_EvaluationView, kind), slots)
    view = object.__new__(_VIEW_CLASSES[kind])
    for name, value in (("__dict__", module.__dict__), ("_view_of", module), ("_view_children", children)):
        object.__setattr__(view, name, value)
    return view


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, also through a view."""
    return type(module_of(module))


def module_of(module: nn.Module) -> nn.Module:
    """The module itself, also through a view."""
    return module._view_of if isinstance(module, _EvaluationView) else module


@runtime_checkable
class Watcher(Protocol):
    """An object whose state depends on a model's weights, such as an engine."""

    def weights_changed(self) -> None: ...


_WATCHERS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def watch_weights(model: nn.Module, watcher: Watcher) -> None:
    """From now on `weights_changed(model)` calls `watcher.weights_changed()`. The watcher is referenced weakly."""
    _WATCHERS.setdefault(model, WeakSet()).add(watcher)


def weights_changed(model: nn.Module) -> None:
    """Notifies all watchers of a model (its engines) that its weights have changed.

    `Trainer` and the EMA call it. A training loop of your own needs it only if an engine is kept from step to step and
    the optimizer changes weights without torch counting it (`fused=True`).
    """
    for watcher in tuple(_WATCHERS.get(model, ())):
        watcher.weights_changed()


class WeightVersions:
    """Notices changes of a model's parameters and buffers that torch counts, and others that are put in their place;
    modules that are replaced; forward hooks that come or go. Tensors made in inference mode have no count.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.look_again()
        self._versions = self._now()

    def look_again(self) -> None:
        """Finds everything anew. Takes longer than `have_changed`."""
        modules = list(self._model.modules())
        tables = [_as_dict(table) for module in modules for table in (module._parameters, module._buffers)]
        self._tensors = [table for table in tables if table]
        self._children = [table for module in modules if (table := _as_dict(module._modules))]
        self._hooks = [table for module in modules for table in (module._forward_pre_hooks, module._forward_hooks)]
        self._found = self._objects()

    def have_changed(self) -> bool:
        """Whether there was a change since the last call."""
        found = self._objects()
        are_same = len(found) == len(self._found) and all(map(is_, found, self._found))
        if are_same and self._now() == self._versions:
            return False
        self.look_again()  # what has changed may have more parameters now
        self._versions = self._now()
        return True

    def _objects(self) -> list[Any]:
        """The modules and forward hooks."""
        return [*_values(self._children), *_values(filter(None, self._hooks))]

    def _now(self) -> tuple[list[int], list[int] | None]:
        """Which tensors there are, and how often they have changed. It is asked for every step."""
        tensors = list(_values(self._tensors))
        try:
            return [*map(id, tensors)], [it._version for it in tensors if it is not None]
        except RuntimeError:  # an inference tensor
            return [*map(id, tensors)], None


def _as_dict(table: Any) -> dict[str, Any]:
    """A table of a module itself; of a scripted one, whose tables are no dictionaries, what is in it now."""
    return table if isinstance(table, dict) else dict(table.items())


def _values(tables: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, tables))


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Gathers the parameters of a model that `fully_shard` has split over processes; does nothing for others.

    Processes wait for each other only on entry and exit, so each may sample as long as it needs.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if isinstance(model, FSDPModule):
        _connect(model)
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def _connect(model: Any) -> None:
    """Lets FSDP know the root of a model before an inner module runs: it finds the others in the root's first forward
    pass, and sampling has none.
    """
    if "begin_forward" not in vars(model):
        register_fsdp_forward_method(model, "begin_forward")
    model.begin_forward()
