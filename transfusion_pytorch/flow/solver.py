"""Integration from noise to data with the solvers of torchdiffeq."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint

Velocity = Callable[[Tensor, Tensor], Tensor]

# A step of these depends on nothing but its start, so rows that stand at different times can take theirs together.
SINGLE_STEP_METHODS = frozenset({"euler", "midpoint", "heun2", "heun3", "rk4"})
ADAPTIVE_METHODS = frozenset({"dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"})
MOST_STEPS = 1000  # of an adaptive method, which would otherwise try for ever to follow a rough flow
OTHER_METHODS = ADAPTIVE_METHODS | {"explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"}


def check_method(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a solver, or an argument of one, that torchdiffeq does not have."""
    if unknown := sorted(set(options) - {"method", "atol", "rtol", "options"}):
        raise ValueError(f"unknown arguments of an ODE solver: {unknown}; there are method, atol, rtol and options")
    known = SINGLE_STEP_METHODS | OTHER_METHODS
    if options.get("method", "dopri5") not in known:
        raise ValueError(f"unknown ODE method {options['method']!r}, choose one of {', '.join(sorted(known))}")


def is_single_step(options: Mapping[str, Any]) -> bool:
    """Whether each interval of the grid is one step that needs no history: rows may then be stepped together."""
    refined = {"step_size", "grid_constructor"} & set(options.get("options") or {})
    return options.get("method", "dopri5") in SINGLE_STEP_METHODS and not refined


def integrate(
    velocity: Velocity, start: Float[Tensor, "..."], times: Float[Tensor, " steps"], options: Mapping[str, Any]
) -> Float[Tensor, "..."]:
    """Follows `velocity(t, x)` from `start` at the first of the `times` to the last; between two of them lies a step.

    `options` are those of `torchdiffeq.odeint` (method, atol, rtol, options). An adaptive method chooses its own steps
    between the ends; the first that it tries is the first of these.
    """
    if len(times) < 2:
        raise ValueError(f"steps are intervals between times, at least 1, got {len(times)} times")
    path: Any = odeint(velocity, start, times, **_within(times, options))
    return path[-1]


def _within(grid: Float[Tensor, " steps"], options: Mapping[str, Any]) -> dict[str, Any]:
    """Left alone, an adaptive method tries and takes steps beyond the last time, where no velocity was ever trained."""
    options = {"method": "dopri5", **options}
    if options["method"] in ADAPTIVE_METHODS:
        bounds = {"first_step": grid[1] - grid[0], "step_t": grid[-1:], "max_num_steps": MOST_STEPS}
        if grid.device.type == "mps":
            bounds["dtype"] = torch.float32  # of times; torchdiffeq's double precision is not to be had there
        options["options"] = bounds | dict(options.get("options") or {})
    return options
