"""ODE solvers from noise to data: single-step methods without waits for the device, and torchdiffeq for all others.

A single-step method needs nothing but the start of its interval, so members of a batch that stand at different times
can take a step together (`single_step`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint

Velocity = Callable[[Tensor, Tensor], Tensor]


class Tableau(NamedTuple):
    """Butcher tableau of an explicit Runge-Kutta method.

    - `fractions`: where in the interval, from 0 to 1, the derivative of each stage is evaluated
    - `moves`: for each stage, how far its point lies from the start along each earlier derivative
    - `weights`: how far the step goes along each derivative
    """

    fractions: tuple[float, ...]
    moves: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# By the names that torchdiffeq gives them; its rk4 is the 3/8 rule.
TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "heun2": Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    ),
}
SINGLE_STEP_METHODS = frozenset(TABLEAUS)
ADAPTIVE_METHODS = frozenset({"dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"})
MOST_STEPS = 1000  # of an adaptive method, which would otherwise try for ever to follow a rough flow
OTHER_METHODS = ADAPTIVE_METHODS | {"explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"}


def check_method(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a solver, or an argument of one, that torchdiffeq does not have, and `TypeError` for what
    is no dict of such arguments.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"odeint_kwargs must be a dict, such as dict(method='euler'), got {options!r}")
    if unknown := sorted(set(options) - {"method", "atol", "rtol", "options"}):
        raise ValueError(f"unknown arguments of an ODE solver: {unknown}; there are method, atol, rtol and options")
    known = SINGLE_STEP_METHODS | OTHER_METHODS
    if options.get("method", "dopri5") not in known:
        raise ValueError(f"unknown ODE method {options['method']!r}, choose one of {', '.join(sorted(known))}")


def is_single_step(options: Mapping[str, Any]) -> bool:
    """Whether each interval of the grid is one step of `single_step`: the method is single-step, and no option of
    torchdiffeq refines the grid (`step_size`, `grid_constructor`) or moves its times (`perturb`).

    `interp` makes no difference: nothing is interpolated where every time of the grid is the end of a step.
    """
    own = dict(options.get("options") or {})
    is_plain = own.pop("interp", "linear") in ("linear", "cubic") and all(
        name in ("step_size", "grid_constructor", "perturb") and (value is None or value is False)
        for name, value in own.items()
    )
    return options.get("method", "dopri5") in SINGLE_STEP_METHODS and is_plain


def single_step(
    method: str, derivative: Callable[[float, Tensor], Tensor], start: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Takes one step from `start`: integrates `dx/ds = derivative(s, x)` over s from 0 to 1.

    s is a Python float that says where in the interval a stage lies, so nothing here waits for the device. For a batch
    whose members stand at different times, the caller turns s into a time for each member and scales the velocities:

    >>> def derivative(s, x):  # of members whose intervals run from `begin` (b) to `end` (b)
    ...     return (end - begin)[:, None] * velocity(torch.lerp(begin, end, s), x)

    Raises `ValueError` for a method that is not one of `SINGLE_STEP_METHODS`.
    """
    if method not in TABLEAUS:
        raise ValueError(f"{method!r} is no single-step method, choose one of {', '.join(sorted(TABLEAUS))}")
    tableau, derivatives = TABLEAUS[method], []
    for fraction, moves in zip(tableau.fractions, tableau.moves, strict=True):
        derivatives.append(derivative(fraction, _moved(start, derivatives, moves)))
    return _moved(start, derivatives, tableau.weights)


def _moved(start: Tensor, derivatives: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`start` and the weighted sum of the derivatives, which is made first: in low precision it rounds less."""
    terms = [(weight, derivative) for weight, derivative in zip(weights, derivatives, strict=True) if weight]
    if not terms:
        return start
    (weight, change), *rest = terms
    change = change if weight == 1 else weight * change
    for weight, derivative in rest:
        change = torch.add(change, derivative, alpha=weight)
    return start + change


def integrate(
    velocity: Velocity, start: Float[Tensor, "..."], times: Float[Tensor, " steps"], options: Mapping[str, Any]
) -> Float[Tensor, "..."]:
    """Follows `velocity(t, x)` from `start` at the first of the `times` to the last; between two of them lies a step.
    t is 0-d and has the precision of x.

    `options` are those of `torchdiffeq.odeint` (method, atol, rtol, options). An adaptive method chooses its own steps
    between the ends; the first that it tries is the first of these. Where `is_single_step(options)`, nothing waits for
    the device, wherever the times lie.
    """
    if len(times) < 2:
        raise ValueError(f"steps are intervals between times, at least 1, got {len(times)} times")
    if is_single_step(options):
        x = start
        for begin, end in pairwise(times):
            x = single_step(options["method"], partial(_scaled_velocity, velocity, begin, end), x)
        return x.to(start.dtype)
    path: Any = odeint(velocity, start, times, **_within(times, options))
    return path[-1]


def _scaled_velocity(velocity: Velocity, begin: Tensor, end: Tensor, fraction: float, x: Tensor) -> Tensor:
    """The derivative of x by the `fraction` of the interval from `begin` to `end`; lerp meets both to the bit."""
    return velocity(torch.lerp(begin, end, fraction).to(x.dtype), x) * (end - begin)


def _within(grid: Float[Tensor, " steps"], options: Mapping[str, Any]) -> dict[str, Any]:
    """Left alone, an adaptive method tries and takes steps beyond the last time, where no velocity was ever trained."""
    options = {"method": "dopri5", **options}
    if options["method"] in ADAPTIVE_METHODS:
        bounds = {"first_step": grid[1] - grid[0], "step_t": grid[-1:], "max_num_steps": MOST_STEPS}
        if grid.device.type == "mps":
            bounds["dtype"] = torch.float32  # of times; torchdiffeq's double precision is not to be had there
        options["options"] = bounds | dict(options.get("options") or {})
    return options
