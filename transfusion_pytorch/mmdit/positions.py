"""Rotary positions of tokens, counted or measured in each modality by itself.

s tokens of one modality, a axes, f frequencies; rows are the tokens of all samples of a batch.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transfusion_pytorch.mmdit.checks import check_one_each
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.positions import axial_coordinates, rotary_phases

Positions = Sequence[Tensor | tuple[int, ...] | None]


def check_rope(axes: int, dim_head: int) -> None:
    if axes < 0:
        raise ValueError(f"rope_axes must be 0 (no rotary positions) or the number of axes, got {axes}")
    if axes and dim_head % (2 * axes):
        raise ValueError(
            f"dim_head must be a multiple of {2 * axes}, so that each of {axes} rotary axes gets as many pairs of "
            f"channels, got {dim_head}"
        )


def joint_phases(
    positions: Positions | None,
    tokens: Sequence[Tensor | None],
    *,
    axes: int,
    dim_head: int,
    theta: float = 10_000.0,
    registers: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "rows f 2"] | None, ...]:
    """For every modality the cosines and sines that rotate each of its tokens, `(*batch, s_i, d_i)`; None for all if
    there are no `axes`, and for a modality that is not there.

    | `positions` of a modality | meaning |
    |---|---|
    | None | counted from 0 along the first axis |
    | a tuple of sizes | a grid, the first axis slowest: `(2, 2) -> [[0 0] [0 1] [1 0] [1 1]]` |
    | a tensor `(s, a)` or `(*batch, s, a)` | coordinates, whole or not |

    Frequencies are divided evenly among the axes, in their order. Coordinates may have fewer axes; the others are 0.
    As many `registers` stand before the tokens, at the origin.
    """
    count = len(tokens)
    check_one_each("positions", positions, count)
    if axes == 0:
        if positions is not None and any(each is not None for each in positions):
            raise ValueError("positions are of no use to a model with rope_axes=0; leave them out")
        return (None,) * count
    found: list[Tensor | None] = []
    for i, x in enumerate(tokens):
        if x is None:
            found.append(None)
            continue
        given = None if positions is None else positions[i]
        extra = 0 if registers is None else registers[i]
        coordinates = _coordinates(given, x, axes, f"positions of modality {i}")
        found.append(_phases(coordinates, x, axes=axes, dim_head=dim_head, theta=theta, registers=extra))
    return tuple(found)


def _coordinates(given: Tensor | tuple[int, ...] | None, x: Tensor, axes: int, name: str) -> Tensor:
    """`(s, a)` or `(*batch, s, a)`."""
    length = x.shape[-2]
    if given is None:
        return torch.arange(length, device=x.device)[:, None]
    if not isinstance(given, (Tensor, tuple, list)):
        kinds = "None, a tuple of sizes such as (2, 2), or a tensor of coordinates"
        raise TypeError(f"{name}: expected {kinds}, got {type(given).__name__}")
    if not isinstance(given, Tensor):
        given = axial_coordinates(tuple(given), device=x.device, dtype=precise(x.dtype))
    shapes = [(length,), (*x.shape[:-2], length)]
    if given.ndim < 2 or given.shape[:-1] not in shapes or given.shape[-1] > axes:
        wanted = " or ".join(f"({', '.join(map(str, shape))}, at most {axes})" for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name}: expected coordinates of shape {wanted}, got {tuple(given.shape)}")
    return given.to(x.device)


def _phases(
    coordinates: Shaped[Tensor, "*rows s a"], x: Tensor, *, axes: int, dim_head: int, theta: float, registers: int
) -> Float[Tensor, "rows f 2"]:
    of_axis = dim_head // axes
    flat = coordinates.flatten(0, -2)
    parts = [
        rotary_phases(flat[:, axis], of_axis, theta=theta, dtype=precise(x.dtype))
        if axis < flat.shape[-1]
        else _origin(len(flat), of_axis // 2, x)
        for axis in range(axes)
    ]
    phases = torch.cat(parts, dim=1).unflatten(0, (-1, x.shape[-2]))
    if registers:
        phases = torch.cat((_origin(registers, dim_head // 2, x).expand(len(phases), -1, -1, -1), phases), dim=1)
    return phases.expand(x.shape[:-2].numel(), -1, -1, -1).flatten(0, 1)


def _origin(count: int, frequencies: int, x: Tensor) -> Tensor:
    """Phases that rotate nothing."""
    angle = torch.zeros(count, frequencies, device=x.device, dtype=precise(x.dtype))
    return torch.stack((angle.cos(), angle.sin()), dim=-1)
