"""The optimizers that a `TrainConfig` asks for, and their learning rates."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.parameters import parameter_groups
from transfusion_pytorch.training.schedule import learning_rate_factor

FUSED_DEVICES = ("cpu", "cuda")  # those that it was tried on; elsewhere torch chooses
PEAK = "peak_lr"  # in a parameter group: its highest learning rate


def create_optimizers(model: Any, config: TrainConfig) -> dict[str, Optimizer]:
    """AdamW for all parameters; or Muon (arXiv 2502.16982) for the hidden matrices, and AdamW for the rest.

    Raises `RuntimeError` where torch has no Muon yet, and `ValueError` where nothing is trained.
    """
    groups = parameter_groups(model, weight_decay=config.weight_decay)
    optimizers: dict[str, Optimizer] = {}
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"torch.optim.Muon came with torch 2.9, this is {torch.__version__}; use adamw")
        matrices = model.muon_parameters()
        taken = {id(parameter) for parameter in matrices}
        groups = [group | {"params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        groups = [group for group in groups if group["params"]]
        rate, decay = config.muon_learning_rate, config.weight_decay
        if matrices:
            optimizers["muon"] = torch.optim.Muon(matrices, lr=rate, weight_decay=decay)
    if groups:
        options: dict[str, Any] = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2))
        optimizers["adamw"] = AdamW(groups, **options, fused=can_be_fused(groups) or None)
    if not optimizers:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group[PEAK] = group["lr"]
    return optimizers


def can_be_fused(groups: list[dict[str, Any]]) -> bool:
    """Whether AdamW can change all of these in one pass over memory, three times as fast on a CPU.

    There it goes through memory from end to end, so that moments which were loaded must lie as the parameter does.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(
        parameter.device.type in FUSED_DEVICES and parameter.is_floating_point() and parameter.is_contiguous()
        for parameter in parameters
    )


def set_learning_rates(optimizers: dict[str, Optimizer], step: int, config: TrainConfig) -> float:
    """Those of a step, counted from 0, by the schedule. Returns that of AdamW."""
    assert config.steps is not None
    factor = learning_rate_factor(
        step,
        total=config.steps,
        schedule=config.schedule,
        warmup=config.warmup,
        cooldown=config.cooldown,
        final=config.final_factor,
    )
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * factor
    return config.learning_rate * factor


def clip_gradients(model: nn.Module, longest: float | None) -> torch.Tensor:
    """The length of the gradient, which is scaled down if it is longer than that. Of all processes if it is sharded."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if longest is None else longest)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]
