"""CPU only: weights in the order in which the matrix library reads them (oneDNN calls it a blocked format).

A product of few rows takes as long as its weight takes to be read, and `F.linear` reads it less well, or reorders it
first, at every call. Here it is reordered once, for a second copy of the weights. The operators are those that torch's
own compiler uses; where a torch or a processor has none, products are plain.

n rows, i and o features.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

ROWS = {torch.float32: range(4, 49), torch.bfloat16: range(1, 65)}  # that gain by it; others are as fast without
STEPS_BEFORE = 16  # that would have gained: reordering takes as long as 6 of them gain, or 40 if all memory is new
LARGEST, SMALLEST = 2**30, 2**20  # bytes: of all copies together, and of a weight that is worth one


class ReorderedWeights:
    """Reordered copies of the weights of one model, made when they are first asked for.

    They are copies: `clear` has to be called when weights may have changed. Where there is no room for all, the rest of
    the weights are read as they are.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._copies: dict[nn.Parameter, tuple[object, Tensor | None]] = {}
        self._num_steps = self._num_bytes = 0

    def note_step(self, rows: int, dtype: torch.dtype) -> None:
        """Notes a decode step of so many rows. After as many that do not gain, the copies are dropped."""
        gains = rows in ROWS.get(dtype, ())
        self._num_steps = min(self._num_steps + 1, 2 * STEPS_BEFORE) if gains else max(self._num_steps - 1, 0)
        if not self._num_steps:
            self.clear()

    def serves(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether there were enough steps, and products of so many rows gain."""
        return self._num_steps >= STEPS_BEFORE and rows in ROWS.get(dtype, ())

    def of(self, weight: Shaped[Tensor, "o i"], rows: int) -> Tensor | None:
        """The reordered copy, an opaque tensor; None where products of so many rows are better made with the weight."""
        if not isinstance(weight, nn.Parameter) or weight.is_inference():  # others are new at each call, or uncounted
            return None
        if not self.serves(rows, weight.dtype):
            return None
        stamp = (weight.data_ptr(), weight._version, weight.dtype)
        known, copy = self._copies.get(weight, (None, None))
        if known is not None and known != stamp:
            self._copies, self._num_bytes = {}, 0
        if known != stamp:
            copy = None if self._num_bytes + weight.nbytes > LARGEST else reordered(weight, rows)
            self._num_bytes += 0 if copy is None else weight.nbytes
            self._copies[weight] = (stamp, copy)
        return copy

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside of this, our own linear layers make their products with reordered weights where those serve."""
        token = _USED.set(self)
        try:
            yield
        finally:
            _USED.reset(token)


_USED: ContextVar[ReorderedWeights | None] = ContextVar("reordered_weights", default=None)


def reordered_in_use(x: Shaped[Tensor, "... i"], weight: Shaped[Tensor, "o i"]) -> Tensor | None:
    """The reordered copy of a weight, if copies are in use that serve this product."""
    used = _USED.get()
    return None if used is None or x.dtype != weight.dtype else used.of(weight, x.shape[:-1].numel())


def reordered(weight: Shaped[Tensor, "o i"], rows: int) -> Tensor | None:
    """A copy for products of about so many rows; None where it cannot be made, or is not worth it."""
    if weight.device.type != "cpu" or weight.nbytes < SMALLEST or weight.dtype not in types_of_processor():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    except RuntimeError:  # no memory, or a shape that the library does not take
        return None


@lru_cache(maxsize=1)
def types_of_processor() -> frozenset[torch.dtype]:
    """The types that this torch and this processor have such products for; only of x86 is that known."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    is_known = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    if not is_known or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return frozenset()
    has_half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if has_half else {torch.float32})


def reordered_linear(x: Shaped[Tensor, "... i"], weight: Tensor, bias: Tensor | None = None) -> Shaped[Tensor, "... o"]:
    """`x weight^T + bias` with a reordered weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
