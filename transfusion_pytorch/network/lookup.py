"""Looking up a row of a table for every token, with a gradient that a GPU can add up.

n tokens, m rows of a table, d model, s segments.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from transfusion_pytorch.network.precision import precise, without_autocast

SEGMENT = 64  # tokens: one thread of a GPU adds up so many numbers
MOST_ENTRIES = 2**25  # of a matrix of tokens and indices, for which a product is three times as fast as segments


class Segments(NamedTuple):
    """A stream cut into at most `SEGMENT` neighbouring tokens of one index each; segment i is `edges[i] <= slot <
    edges[i + 1]`.

    `belongs` says which index a segment has, and is a matrix, so that the segments of each index add up as a product.
    Without `edges` every token is a segment.
    """

    edges: Int[Tensor, " s_plus_1"] | None
    belongs: Bool[Tensor, "m s"]

    @classmethod
    def of(cls, index: Int[Tensor, " n"], count: int) -> "Segments":
        """Found without reading from the device. Their number depends on n and on the `count` of indices only: every
        span is one stretch, and m of them have at most m + 1 stretches of text around them. What is left over is empty.
        """
        n, own = len(index), torch.arange(count, device=index.device)[:, None]
        if index.device.type == "cuda" and n * count <= MOST_ENTRIES:
            return cls(None, index == own)
        slot = torch.arange(n, device=index.device)
        starts = (slot % SEGMENT == 0) | (index != index.roll(1))
        segment_of = starts.cumsum(0) - 1
        most = n // SEGMENT + 2 * count
        edges = torch.searchsorted(segment_of, torch.arange(most + 1, device=index.device))
        owner = index.index_select(0, edges[:-1].clamp(max=n - 1))
        return cls(edges, owner == own)


def look_up(table: Shaped[Tensor, "m d"], index: Int[Tensor, " n"], segments: Segments | None) -> Shaped[Tensor, "n d"]:
    """`table[index]`.

    Its gradient adds up all tokens of an index. With `segments` that is done in a fixed order and without locks, which
    a GPU would need for every number: most tokens are text, whose index is 0.
    """
    if segments is None:
        return table.index_select(0, index)
    return LookUp.apply(table, index, *segments)  # type: ignore[return-value]


class LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, edges: Tensor | None, belongs: Tensor) -> Tensor:
        ctx.save_for_backward(edges, belongs)
        ctx.dtype = table.dtype
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sum_segments(grad, Segments(*ctx.saved_tensors)).to(ctx.dtype), None, None, None


def sum_segments(values: Shaped[Tensor, "n d"], segments: Segments) -> Shaped[Tensor, "m d"]:
    """What the tokens of each index add up to, in single precision at least; the sum of a product is rounded to the
    type of the values.
    """
    if segments.edges is None:
        with without_autocast(values.device.type):
            return segments.belongs.to(values.dtype) @ values
    exact = values.to(precise(values.dtype))
    sums = torch.segment_reduce(exact, "sum", offsets=segments.edges, axis=0, unsafe=True)
    with without_autocast(values.device.type):
        return segments.belongs.to(sums.dtype) @ sums
