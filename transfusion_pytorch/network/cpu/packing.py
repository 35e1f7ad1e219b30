"""CPU only: weights in the order in which the matrix library reads them (oneDNN calls it a blocked format).

A product of few rows takes as long as its weight takes to be read, and `F.linear` reads it less well, or reorders it
first, at every call. Here it is reordered once. That makes products of 8 to 32 rows 1.1 to 1.3 times as fast in single
precision, and all of up to 64 rows 1.3 to 1.5 times in bfloat16, for a second copy of the weights. The operators are
those that torch's own compiler uses.

n rows, i and o features.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Shaped
from torch import Tensor

ROWS = {torch.float32: range(6, 49), torch.bfloat16: range(1, 65)}  # that gain by it; others are as fast without
STEPS_BEFORE_PACKING = 32  # it takes as long as 15 to 40 steps gain by it
LARGEST, SMALLEST = 2**30, 2**20  # bytes: of all copies together, and of a weight that is worth one


class PackedWeights:
    """The packed copies of the weights of one model, made when they are first asked for, after enough decode steps.

    They are copies: `clear` has to be called when weights have changed. Where there is no room for all, the rest of the
    weights are read as they are.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_steps = self._num_bytes = 0

    def count_step(self, rows: int, dtype: torch.dtype) -> None:
        """Notes a decode step of so many rows."""
        self._num_steps += rows in ROWS.get(dtype, ())

    def of(self, weight: Shaped[Tensor, "o i"], rows: int) -> Tensor | None:
        """The packed copy, an opaque tensor; None where products of so many rows are better made with the weight."""
        if self._num_steps < STEPS_BEFORE_PACKING or rows not in ROWS.get(weight.dtype, ()):
            return None
        known, packed = self._packed.get(id(weight), (None, None))
        if known is weight:
            return packed
        if not can_pack(weight) or self._num_bytes + weight.nbytes > LARGEST:
            return None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self._packed[id(weight)] = (weight, packed)  # which keeps the id its own
        self._num_bytes += weight.nbytes
        return packed

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside of this, our own linear layers make their products with packed weights where those serve."""
        token = _USED.set(self)
        try:
            yield
        finally:
            _USED.reset(token)


_USED: ContextVar[PackedWeights | None] = ContextVar("packed_weights", default=None)


def packed_for(x: Shaped[Tensor, "... i"], weight: Shaped[Tensor, "o i"]) -> Tensor | None:
    """The packed copy of a weight, if one is in use that serves this product."""
    packed = _USED.get()
    return None if packed is None or x.dtype != weight.dtype else packed.of(weight, x.shape[:-1].numel())


def can_pack(weight: Tensor) -> bool:
    """Whether this processor has packed products for a weight, and it is large enough."""
    return (
        weight.device.type == "cpu"
        and weight.nbytes >= SMALLEST
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def packed_linear(x: Shaped[Tensor, "... i"], packed: Tensor, bias: Tensor | None) -> Shaped[Tensor, "... o"]:
    """`x weight^T + bias`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
