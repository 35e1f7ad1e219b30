"""An exponential moving average of a model that can do what the model can."""

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

from ema_pytorch import EMA
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from transfusion_pytorch.evaluating import weights_changed
from transfusion_pytorch.sequence.checks import check_int, check_number

SAMPLING_METHODS = (
    "sample",
    "sample_one",
    "sample_many",
    "sample_stream",
    "create_engine",
    "generate_text_only",
    "generate_modality_only",
)


class MovingAverage(EMA):
    """An `EMA` that tells engines when it has changed weights: it writes to `.data`, where torch does not see it."""

    def __new__(cls, *args: Any, **options: Any) -> "MovingAverage":
        """`EMA.__new__` wants the model, which `copy.deepcopy` and `pickle` do not hand over."""
        return nn.Module.__new__(cls)

    def copy_params_from_model_to_ema(self) -> None:
        super().copy_params_from_model_to_ema()
        weights_changed(cast(nn.Module, self.ema_model))

    def copy_params_from_ema_to_model(self) -> None:
        super().copy_params_from_ema_to_model()
        weights_changed(cast(nn.Module, self.model))

    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        super().update_moving_average(ma_model, current_model, current_decay)
        weights_changed(ma_model)


def create_ema(
    model: nn.Module, beta: float = 0.99, *, update_every: int = 10, update_after_step: int = 100, **options: Any
) -> EMA:
    """An `ema_pytorch.EMA` of `model` with such sampling methods as it has; call `.update()` after each optimizer step.

    It starts late: for the first `update_after_step` updates it is a copy of the model, made anew every `update_every`
    of them. From then on every `update_every`-th update moves it: `beta` old and `1 - beta` new (less at the
    beginning, see `EMA`). Shorter runs than that want smaller numbers.

    Frozen autoencoders and latent statistics are shared with the model, not copied. Its `state_dict` has the average
    without the model (`include_online_model=True` adds it). `options` are those of `EMA`.

    Raises `TypeError` for a model that `fully_shard` has split already: create the average first, then shard both.
    Raises `TypeError` or `ValueError` for a `beta` outside of 0 to 1, and for numbers of updates that are none.
    """
    check_number(beta, "beta", least=0, most=1)
    check_int(update_every, "update_every")
    check_int(update_after_step, "update_after_step", least=0)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError("a sharded model cannot be copied: call create_ema before fully_shard, then shard both")
    shared = re.compile(r"(\.encoder|\.decoder|modalities\.\d+\.statistics)$")
    frozen = {name: module for name, module in model.named_modules() if shared.search(name)}
    frozen = {name: module for name, module in frozen.items() if _is_frozen(module)}
    average = copy.deepcopy(model, {id(module): module for module in frozen.values()})
    options = dict(include_online_model=False) | options
    ignored = {f"{name}." for name in frozen} | set(options.pop("ignore_startswith_names", ()))
    ema = MovingAverage(
        model,
        ema_model=average,
        beta=beta,
        update_every=update_every,
        update_after_step=update_after_step,
        forward_method_names=tuple(name for name in SAMPLING_METHODS if hasattr(model, name)),
        ignore_startswith_names=ignored,
        **options,
    )
    return cast(EMA, ema)


def ema_state(ema: EMA) -> dict[str, Tensor]:
    """The average and its counters, without the model and what is shared with it (frozen autoencoders)."""
    model = cast(nn.Module, ema.model)
    shared = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    return {
        name: tensor
        for name, tensor in ema.state_dict().items()
        if not name.startswith("online_model.") and not (tensor.numel() and tensor.data_ptr() in shared)
    }


def load_ema_state(ema: EMA, state: Mapping[str, Tensor]) -> None:
    """Puts back what `ema_state` gave. Raises `RuntimeError` where something is missing or too much."""
    saved = ema_state(ema)
    others = {name: tensor for name, tensor in ema.state_dict().items() if name not in saved}
    ema.load_state_dict({**others, **state})


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
