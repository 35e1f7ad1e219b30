"""When something faster may stand in for a plain formula.

Every formula of the network is written down in a few lines of plain PyTorch, and that is what runs on a GPU, in
compiled graphs and inside of `plain_formulas()`. On a CPU, the functions of the folder `cpu` stand in otherwise. They
use the weights of a module without calling it, which is right only for a module that is what it seems.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from transfusion_pytorch.evaluating import class_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_PLAIN = ContextVar("plain_formulas", default=False)


@contextmanager
def plain_formulas() -> Iterator[None]:
    """Inside of this, the network is made of operators that PyTorch can differentiate any number of times.

    For `torch.func.grad`, forward mode (`torch.func.jvp`) and gradients of gradients. Slower, and attention needs
    memory for `n * n` logits. Layers are neither compiled nor checkpointed.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def forces_plain_formulas() -> bool:
    """Whether the caller is inside of `plain_formulas()`."""
    return _PLAIN.get()


def uses_cpu_kernels(x: Tensor) -> bool:
    """Whether the functions of the folder `cpu` stand in for the plain formulas."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _PLAIN.get()


def is_untouched(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is one of these types itself, and nobody waits for its call: then it may be left uncalled."""
    watched = "forward" in vars(module) or any(getattr(module, name) for name in HOOKS)
    is_plain = class_of(module) in types and not watched
    return is_plain and not any(getattr(nn.modules.module, f"_global{name}") for name in HOOKS)


def is_hooked(model: nn.Module) -> bool:
    """Whether anybody waits for the call of any of its modules."""
    return any(getattr(module, name) for module in model.modules() for name in HOOKS) or any(
        getattr(nn.modules.module, f"_global{name}") for name in HOOKS
    )


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is stored as it is, and not quantised or otherwise of a subclass."""
    return type(weight) in (nn.Parameter, Tensor)
