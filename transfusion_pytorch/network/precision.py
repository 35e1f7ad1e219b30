"""Which type numbers are made in: one rule for sums and losses, one for matrix products."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6


def precise(dtype: torch.dtype) -> torch.dtype:
    """What sums, norms and losses are made in, whatever autocast says: single precision at least."""
    is_precise = dtype.is_floating_point and dtype.itemsize >= torch.float32.itemsize
    return dtype if is_precise else torch.float32  # torch.promote_types says the same, as one more operation


def working_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` returns: autocast's type, or its own."""
    kind = x.device.type
    rounds = (
        kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    )  # which autocast leaves alone
    return torch.get_autocast_dtype(kind) if rounds else x.dtype


def without_autocast(device_type: str) -> AbstractContextManager:
    """Products inside of this are made in the types of their factors."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class Precision(NamedTuple):
    """The types that a model computes in: its own, and that of products under autocast (None without), and where."""

    own: torch.dtype
    autocast: torch.dtype | None
    device: torch.device


def precision_of(device: torch.device, dtype: torch.dtype) -> Precision:
    """For a model of this dtype, here and now."""
    is_autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return Precision(dtype, torch.get_autocast_dtype(device.type) if is_autocast else None, device)
