"""An exponential moving average of a model that can do what the model can."""

from typing import Any, cast

from ema_pytorch import EMA
from torch import nn

SAMPLING_METHODS = (
    "sample",
    "sample_one",
    "sample_many",
    "sample_stream",
    "create_engine",
    "generate_text_only",
    "generate_modality_only",
)


def create_ema(model: nn.Module, *, beta: float = 0.99, **options: Any) -> EMA:
    """An `ema_pytorch.EMA` of `model` with its sampling methods. `options` are those of `EMA` (`update_every` and
    others).
    """
    return cast(EMA, EMA(model, beta=beta, forward_method_names=SAMPLING_METHODS, **options))
