"""Evaluation mode, and whole parameters, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is back in the mode it had, whatever happened."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Whole parameters of a model that `fully_shard` has split over processes; any other stays as it is.

    Processes wait for each other here and nowhere inside, so each may sample as long as it needs.
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
