"""The processes of a training, as `accelerate launch` or `torchrun` started them, and a model that they share.

`accelerate` finds out about processes and devices. The wrapper of the model is torch's own: that of accelerate replaces
`forward` for mixed precision, and its FSDP2 becomes DDP on a CPU.
"""

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from transfusion_pytorch.training.ema import ema_state, load_ema_state

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
ACCELERATE_PRECISIONS: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
AVERAGE = "ema_model."  # in the names of an EMA's state
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Launch:
    """This process among those that train one model.

    - `rank`, `size`: which it is, and how many there are
    - `device`: where it computes
    - `shards`: whether parameters are split over the processes (FSDP2: `accelerate launch --use_fsdp`), and not copied
    - `precision`: of autocast

    Raises `ImportError` without accelerate, and `ValueError` for a device or a precision that is not here.
    """

    def __init__(self, *, device: str | None = None, precision: Precision | None = None) -> None:
        self._state = _partial_state(device)
        _leave_at_exit()
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.device: torch.device = self._state.device if device is None else _placed(device, self._state)
        self.shards = self.size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        if precision is None:
            said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            if said not in ACCELERATE_PRECISIONS:
                raise ValueError(
                    f"the precision {said!r} that accelerate was told is not known here; use no, bf16, fp16"
                )
            precision = ACCELERATE_PRECISIONS[said]
        self.precision = precision

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()

    def autocast(self) -> AbstractContextManager:
        dtype = AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def synchronise(self, model: nn.Module) -> None:
        """Gives all processes the parameters and buffers of the main one, before they are copied or split."""
        if self.size > 1:
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        """A model on this process's device as all processes call it: itself, or DDP around it."""
        if self.size == 1:
            return model
        if self.shards:
            shard(model)
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        # buffers do not change in training, and one process alone could not evaluate if they were synchronised
        named = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # its name since torch 2.13
        still: dict[str, Any] = {"forward_sync_buffers" if named else "broadcast_buffers": False}
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **still)

    def all(self, value: Any) -> list[Any]:
        """What every process has, for all. All must ask."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What the main process makes, for all. All must ask."""
        made = [make() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, on this device. All must ask. Alone, the values are returned as they are."""
        if self.size == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What every process has, for the main one; the others get an empty list. All must ask."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered)
        return gathered or []


def shard(model: nn.Module) -> None:
    """Splits the parameters of every layer, and of the rest, over the processes (FSDP2)."""
    mesh = dist.device_mesh.init_device_mesh(_device_type(model), (dist.get_world_size(),))
    for layer in getattr(getattr(model, "transformer", None), "layers", ()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """The state of a model, gathered on the CPU of the main process if it is sharded. All processes must ask."""
    return get_model_state_dict(model, options=WHOLE) if is_sharded(model) else model.state_dict()


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """That of an optimizer, with names of parameters instead of numbers, so that it fits any number of processes."""
    if is_sharded(model):
        return get_optimizer_state_dict(model, optimizer, options=WHOLE)
    names = {parameter: name for name, parameter in model.named_parameters()}
    members = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    groups = [group | {"params": [members[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {members[index]: value for index, value in state["state"].items()}, "param_groups": groups}


def outline_of_state(model: nn.Module) -> dict[str, Tensor]:
    """Names, shapes and types of a model's whole state, without values."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of `whole_model_state`; every process has the whole state."""
    if is_sharded(model):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `whole_optimizer_state`. Raises `ValueError` where the groups are those of another optimizer."""
    if len(state["param_groups"]) == len(optimizer.param_groups):
        # whether it is fused is a matter of this run, and decides where torch puts the number of its steps
        pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
        state = state | {
            "param_groups": [saved | {key: mine[key] for key in ("fused",) if key in mine} for saved, mine in pairs]
        }
    if is_sharded(model):
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [list(group["params"]) for group in state["param_groups"]]
    if own != saved:
        raise ValueError(
            f"the checkpoint's optimizer has {[len(group) for group in saved]} parameters in its groups, this one "
            f"{[len(group) for group in own]}, or they have other names; resume with the options of the run"
        )
    index = {name: i for i, name in enumerate(name for group in own for name in group)}
    groups = [group | {"params": [index[name] for name in group["params"]]} for group in state["param_groups"]]
    numbered = {index[name]: value for name, value in state["state"].items()}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def whole_ema_state(ema: Any) -> dict[str, Any]:
    """The average and its counters, gathered like a model's state."""
    if not is_sharded(ema.ema_model):
        return ema_state(ema)
    average = {f"{AVERAGE}{name}": tensor for name, tensor in whole_model_state(ema.ema_model).items()}
    return average | {"initted": ema.initted, "step": ema.step}


def load_whole_ema_state(ema: Any, state: dict[str, Any]) -> None:
    """The inverse of `whole_ema_state`, whoever saved it: a sharded average has its frozen autoencoders with it."""
    if not is_sharded(ema.ema_model):
        own = ema_state(ema)
        load_ema_state(ema, {name: tensor for name, tensor in state.items() if name in own})
        return
    saved = {name.removeprefix(AVERAGE): tensor for name, tensor in state.items() if name.startswith(AVERAGE)}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(ema.ema_model, saved, options=options)
    for name in ("initted", "step"):
        getattr(ema, name).copy_(state[name])


def _partial_state(device: str | None) -> Any:
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise ImportError('training needs accelerate: pip install "transfusion-pytorch[train]"') from error
    # without being told, accelerate connects processes only where it sees accelerators
    return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def _placed(device: str, state: Any) -> torch.device:
    """A device that was asked for: the kind, of which each process has its own, or one of several."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not here.get(device.partition(":")[0], False):
        available = ", ".join(kind for kind, is_here in here.items() if is_here)
        raise ValueError(f"device {device!r} is not available on this machine, which has {available}")
    return state.device if state.device.type == device else torch.device(device)


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


@lru_cache(maxsize=1)
def _leave_at_exit() -> None:
    """The threads of a process group that is still there when the interpreter is taken apart can abort the process."""
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
