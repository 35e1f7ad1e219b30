"""One step of the solver for every modality that is on its way, whatever their types, shapes and times.

s drawings, k latents of one, c their channels.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.solver import integrate, is_single_step
from transfusion_pytorch.generation.context import Context, Lane, Model, SpanStream
from transfusion_pytorch.generation.drawing import Drawing

# torchdiffeq asserts that a step size has not fallen to nothing; the others are those of the network
SOLVER_ERRORS = (AssertionError, RuntimeError, ValueError, TypeError, MemoryError)
KEPT = 4  # as many sets of lanes take turns in a step: with guidance and without, for two solvers


class JointSolver:
    """Moves drawings on. It keeps the layouts of the last few sets of lanes, which stay the same for many steps."""

    def __init__(self, model: Model, context: Context):
        self.model, self.context = model, context
        self.evaluations = 0
        self._laid: dict[tuple, SpanStream] = {}

    def step(self, drawings: Sequence[Drawing]) -> list[tuple[Drawing, Exception]]:
        """One step each. Those with one solver take theirs together; a method that chooses its own steps, or needs its
        own history, takes all of them for one drawing at a time. Returns those that failed, and why.
        """
        failed = []
        for _, group in groupby(sorted(drawings, key=_solver), key=_solver):
            members = list(group)
            if is_single_step(members[0].rules.solver):
                failed += self._step_together(members)
            else:
                failed += [(drawing, error) for drawing in members if (error := self._solve_alone(drawing)) is not None]
        return failed

    def _step_together(self, drawings: Sequence[Drawing]) -> list[tuple[Drawing, Exception]]:
        """One interval each, all in one vector whose own time runs from 0 to 1. If that fails, each by itself, so that
        only those fail whose fault it is.
        """
        like = drawings[0].x
        ends = torch.tensor(
            [drawing.times[drawing.step : drawing.step + 2] for drawing in drawings], dtype=torch.float64, device="cpu"
        )
        start, rate = (part.to(like) for part in (ends[:, 0], ends[:, 1] - ends[:, 0]))
        try:
            self._integrate(drawings, torch.tensor([0.0, 1.0], device="cpu").to(like), start, rate)
        except SOLVER_ERRORS as error:
            if len(drawings) == 1:
                return [(drawings[0], error)]
            return [failure for drawing in drawings for failure in self._step_together([drawing])]
        for drawing in drawings:
            drawing.step += 1
        return []

    def _solve_alone(self, drawing: Drawing) -> Exception | None:
        times = torch.tensor(drawing.times, dtype=torch.float64, device="cpu").to(drawing.x)
        try:
            # over what is not finite, methods that choose their own steps may never come to an end
            zero, one = torch.zeros_like(times[:1]), torch.ones_like(times[:1])
            self._integrate([drawing], times, zero, one, must_be_finite=True)
        except SOLVER_ERRORS as error:
            return error
        drawing.step = len(drawing.times) - 1
        return None

    def _integrate(
        self,
        drawings: Sequence[Drawing],
        times: Float[Tensor, " steps"],
        start: Float[Tensor, " s"],
        rate: Float[Tensor, " s"],
        must_be_finite: bool = False,
    ) -> None:
        """Follows every flow through `times`, at which drawing i stands at its own `start[i] + time rate[i]`."""
        sizes = [drawing.x.numel() for drawing in drawings]
        rates = rate.repeat_interleave(torch.tensor(sizes, device=rate.device))

        def velocity(time: Tensor, flat: Tensor) -> Tensor:
            x = [part.view_as(drawing.x) for part, drawing in zip(flat.split(sizes), drawings, strict=True)]
            velocities = self._velocities(drawings, x, start + time * rate)
            if must_be_finite and not all(part.isfinite().all() for part in velocities):
                raise ValueError("the velocity of a drawing is not finite")
            return rates * torch.cat([part.flatten() for part in velocities])

        flat = torch.cat([drawing.x.flatten() for drawing in drawings])
        after = integrate(velocity, flat, times, drawings[0].rules.solver)
        for drawing, part in zip(drawings, after.split(sizes), strict=True):
            drawing.x = part.view_as(drawing.x).clone()  # and nothing of the others, nor of earlier steps

    def _velocities(self, drawings: Sequence[Drawing], x: list[Tensor], times: Float[Tensor, " s"]) -> list[Tensor]:
        """The guided velocity of every drawing, from one forward pass over all of its lanes."""
        now = times.tolist() if any(drawing.is_guided_at_times for drawing in drawings) else [0.0] * len(drawings)
        lanes = [drawing.lanes_at(time) for drawing, time in zip(drawings, now, strict=True)]
        owner = [i for i, own in enumerate(lanes) for _ in own]
        laid = self._lay_out([lane for own in lanes for lane in own], [drawings[i] for i in owner])
        every = iter(self.context.velocities(laid, [x[i] for i in owner], times[owner]))
        self.evaluations += 1
        velocities = []
        for drawing, own in zip(drawings, lanes, strict=True):
            drawing.velocity = drawing.combine([next(every) for _ in own])
            drawing.num_evaluations += 1
            velocities.append(drawing.velocity)
        return velocities

    def _lay_out(self, lanes: Sequence[Lane], drawings: Sequence[Drawing]) -> SpanStream:
        """The stream of these lanes, made once for as long as they stay the same."""
        key = tuple((lane, lane.past, it.type, it.shape) for lane, it in zip(lanes, drawings, strict=True))
        if key not in self._laid:
            self._laid = dict(list(self._laid.items())[1 - KEPT :])
            self._laid[key] = self.context.lay_out(lanes, [drawing.as_piece() for drawing in drawings])
        return self._laid[key]


def _solver(drawing: Drawing) -> str:
    return drawing.rules.solver_key
