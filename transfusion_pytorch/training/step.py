"""One step of the optimizer: micro-batches, gradients, and what must not reach the weights."""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from transfusion_pytorch.evaluating import weights_changed
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.training.agreement import Agreement
from transfusion_pytorch.training.checkpoint_files import LoadedCheckpoint
from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.launch import (
    Launch,
    is_sharded,
    load_model_state,
    load_optimizer_state,
    load_whole_ema_state,
    outline_of_state,
    whole_ema_state,
    whole_model_state,
    whole_optimizer_state,
)
from transfusion_pytorch.training.losses import LossBreakdown
from transfusion_pytorch.training.optimizers import clip_gradients, set_learning_rates

USUAL_STEPS = 100  # whose median length of the gradient is the usual one
FEWEST_STEPS = 20  # before which nothing counts as an explosion
NEW_NORMAL = 10  # explosions in a row, after which gradients are taken to be so long now


class StepResult(NamedTuple):
    """What a step came to.

    - `losses`: by name, on the device, over all processes; those that nothing in this step has a target of are left out
    - `gradient_norm`: before clipping
    - `problem`: why the weights were left as they are; None for a step that was made
    - `overflowed`: float16 overflowed, as it does now and then, and the scaler has left the step out
    """

    losses: dict[str, Tensor]
    gradient_norm: float
    learning_rate: float
    problem: str | None
    overflowed: bool = False

    @property
    def is_made(self) -> bool:
        return self.problem is None and not self.overflowed


class OptimizerStep:
    """Makes steps with any model, from the gradients that `make` is told to compute.

    The device is waited for once a step: whether the gradient is finite must be known before the weights change.
    """

    def __init__(
        self, model: Any, optimizers: dict[str, Optimizer], ema: Any, launch: Launch, config: TrainConfig
    ) -> None:
        self.model, self.optimizers, self.ema = model, optimizers, ema
        self.launch, self.config = launch, config
        self.scaler = torch.amp.GradScaler(launch.device.type, enabled=launch.precision == "fp16")
        self.usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self.explosions = 0  # in a row

    def make(self, step: int, compute_gradients: Callable[[], dict[str, Tensor]]) -> StepResult:
        """`step` is counted from 0. `compute_gradients` scales its loss by `self.scaler`, and returns losses by name,
        of which `loss` is the one that is trained.
        """
        self._forget_gradients()  # somebody else's, or those of a step that was interrupted
        rate = set_learning_rates(self.optimizers, step, self.config)
        losses = compute_gradients()
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self.config.clip).item()
        overflowed = self.scaler.is_enabled() and not math.isfinite(norm) and math.isfinite(losses["loss"].item())
        problem = None if overflowed else self._problem(norm)
        if problem is None and not overflowed:
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
            weights_changed(self.model)  # fused optimizers change them behind torch's back
            if self.ema is not None:
                self.ema.update()
            self.usual.append(norm)
        self.scaler.update()
        self._forget_gradients()
        return StepResult(losses, norm, rate, problem, overflowed)

    def parts(self) -> dict[str, Any]:
        """The parts of a checkpoint: model, average, optimizers and what else a step depends on. All processes must
        ask; sharded states are gathered.
        """
        parts = {"model": whole_model_state(self.model)}
        if self.ema is not None:
            parts["ema"] = whole_ema_state(self.ema)
        for name, optimizer in self.optimizers.items():
            parts[name] = whole_optimizer_state(self.model, optimizer)
        state = {"usual": list(self.usual), "explosions": self.explosions, "scaler": self.scaler.state_dict()}
        return parts | {"step": state}

    def load_parts(self, loaded: LoadedCheckpoint) -> None:
        """The inverse of `parts`. Raises `ValueError` where they belong to another model or other options."""
        names = {"model", "step", *self.optimizers, *(["ema"] if self.ema is not None else [])}
        if missing := sorted(names - set(loaded.parts)):
            raise ValueError(
                f"{loaded.path} has no {', '.join(missing)}, only {', '.join(loaded.parts)}: it was saved with another "
                "optimizer, or without a moving average; resume with the options of the run"
            )
        load_model_state(self.model, loaded.part_for("model", outline_of_state(self.model)))
        if self.ema is not None:
            load_whole_ema_state(self.ema, loaded.parts["ema"])
        for name, optimizer in self.optimizers.items():
            own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            load_optimizer_state(self.model, optimizer, loaded.parts[name])
            for group, options in zip(optimizer.param_groups, own, strict=True):
                group.update(options)  # those of this configuration
        state = loaded.parts["step"]
        self.usual, self.explosions = deque(state["usual"], maxlen=USUAL_STEPS), state["explosions"]
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def _problem(self, norm: float) -> str | None:
        """Equal in all processes, since the gradient is."""
        if not math.isfinite(norm):
            return f"the gradient is not finite ({norm})"
        limit, usual = self.config.explosion, median(self.usual) if len(self.usual) >= FEWEST_STEPS else None
        if limit is None or usual is None or norm <= limit * usual:
            self.explosions = 0
            return None
        self.explosions += 1
        if self.explosions > NEW_NORMAL:
            self.usual.clear()
            self.explosions = 0
            return None
        return f"the gradient explodes: its length is {norm:.3g}, the usual one {usual:.3g}"

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()


class TrainStep(OptimizerStep):
    """Makes steps with a `Transfusion`. `call` is the model as all processes call it (see `Launch.wrap`)."""

    def __init__(
        self, model: Any, call: Any, optimizers: dict[str, Optimizer], ema: Any, launch: Launch, config: TrainConfig
    ) -> None:
        super().__init__(model, optimizers, ema, launch, config)
        self.call = call
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._teacher = dict(velocity_consistency_ema_model=ema) if config.velocity_consistency else {}

    def __call__(self, batches: Sequence[Batch], step: int, agreement: Agreement) -> StepResult:
        """`step` is counted from 0. Every process has equally many micro-batches, and the same `agreement` on them."""
        return self.make(step, partial(self._accumulate, batches, agreement))

    def _accumulate(self, batches: Sequence[Batch], agreement: Agreement) -> dict[str, Tensor]:
        """Gradients of all micro-batches, divided by the targets of all of them in all processes."""
        # one micro-batch in every process: the model counts by itself
        counts = None if len(batches) == 1 else agreement.counts.to(self.launch.device)
        sums: LossBreakdown | None = None
        for index, batch in enumerate(batches):
            batch = batch.to(self.launch.device)
            with self._exchange(index == len(batches) - 1):
                with self.launch.autocast():
                    loss, parts = self.call(batch, counts=counts, return_breakdown=True, **self._teacher)
                self.scaler.scale(loss).backward()
            parts = LossBreakdown(*(part.detach() for part in parts))
            sums = parts if sums is None else LossBreakdown(*map(torch.add, sums, parts))
        assert sums is not None
        for parameter in self._trained:  # of what no sample had; with several processes they are zeros anyway
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return named_losses(sums, kinds=agreement.kinds, has_velocity=bool(self._teacher))

    def _exchange(self, is_last: bool) -> AbstractContextManager:
        """Gradients travel between the processes with the last micro-batch of a step."""
        if isinstance(self.call, DistributedDataParallel):
            return nullcontext() if is_last else self.call.no_sync()
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(is_last)
        return nullcontext()


def named_losses(parts: LossBreakdown, *, kinds: Collection[str], has_velocity: bool = False) -> dict[str, Tensor]:
    """`loss`, and `text`, `flow_0`, `flow_1`, ..., `velocity_0`, `recon_0`, ... where `kinds` has them."""
    losses = {"text": parts.text}
    for kind, values in (("flow", parts.flow), ("velocity", parts.velocity), ("recon", parts.recon)):
        if kind != "velocity" or has_velocity:
            losses |= {f"{kind}_{modality}": value for modality, value in enumerate(values.unbind(-1))}
    return {"loss": parts.total} | {name: value for name, value in losses.items() if name in kinds}
