"""Denoising: modalities between noise and data, and one solver step for all of them together.

s denoisings, k latents of one, c their channels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transfusion_pytorch.flow.guidance import guided, guided_twice, rescaled
from transfusion_pytorch.flow.path import estimate_clean, interpolate
from transfusion_pytorch.flow.solver import integrate, is_single_step, single_step
from transfusion_pytorch.generation.isolation import Halving
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.plan import times_of
from transfusion_pytorch.generation.runner import Branch, Model, Runner, SpanStream
from transfusion_pytorch.sequence.samples import Modality, Shape

ROUNDING = 1e-6  # of a time in single precision: 0.6 is 0.60000002
LAYOUTS = 4  # kept: with guidance and without it, for two solvers


@dataclass(eq=False)
class Denoising:
    """A modality between noise and data: `x` are its flat latents after `step` of the intervals between `times`.

    - `conditional`: the branch that it follows; `without_text`, `without_all`: unconditional branches, without the
      text and without earlier modalities too, None where guidance does not need them
    - `clean`, `stays`: `init_modality`, and which of its latents a mask keeps; `known_velocity` leads from the noise to
      it
    - `velocity`: the last of `num_evaluations`
    """

    type: int
    shape: Shape
    options: SamplingOptions
    x: Float[Tensor, "k c"]
    times: list[float]
    conditional: Branch
    without_text: Branch | None = None
    without_all: Branch | None = None
    clean: Float[Tensor, "k c"] | None = None
    stays: Bool[Tensor, "k 1"] | None = None
    known_velocity: Float[Tensor, "k c"] | None = None
    velocity: Float[Tensor, "k c"] | None = None
    step: int = 0
    num_evaluations: int = 0
    solver_key: str = field(init=False)

    def __post_init__(self) -> None:
        self.solver_key = repr(sorted(self.options.odeint_kwargs.items()))  # type: ignore[union-attr]

    @classmethod
    def begin(
        cls, modality: int, shape: Shape, options: SamplingOptions, noise: Float[Tensor, "k c"], conditional: Branch
    ) -> "Denoising":
        """From noise."""
        return cls(modality, shape, options, noise, times_of(options), conditional)

    @classmethod
    def edit(cls, options: SamplingOptions, noise: Float[Tensor, "k c"], conditional: Branch) -> "Denoising":
        """On the straight path from noise to `init_modality`, as far along as `strength` says."""
        init, mask = options.init_modality, options.modality_mask
        clean = init.tensor.reshape(-1, init.tensor.shape[-1])
        times = times_of(options, 1 - options.strength)
        x, velocity, _ = interpolate(clean, noise, torch.full_like(noise[:, 0], times[0]))
        stays = None if mask is None else ~mask.reshape(-1, 1).to(noise.device)
        made = cls(init.type, init.shape, options, x, times, conditional)
        made.clean, made.stays, made.known_velocity = clean, stays, velocity
        return made

    @property
    def is_done(self) -> bool:
        return self.step == len(self.times) - 1

    @property
    def branches(self) -> list[Branch]:
        return [it for it in (self.conditional, self.without_text, self.without_all) if it is not None]

    def time_at(self, fraction: float) -> float:
        """The time at this fraction of the current interval."""
        start, end = self.times[self.step : self.step + 2]
        return start + fraction * (end - start)

    def branches_at(self, time: float) -> list[Branch]:
        """The branches to evaluate at this time: guidance acts within its interval only."""
        low, high = self.options.cfg_interval
        return self.branches if low - ROUNDING <= time <= high + ROUNDING else [self.conditional]

    def combine(self, velocities: Sequence[Float[Tensor, "k c"]]) -> Float[Tensor, "k c"]:
        """The guided velocity, from those of each branch of `branches_at`."""
        options, conditional = self.options, velocities[0]
        text_scale, modality_scale = float(options.cfg_scale or 0.0), options.modality_cfg_scale
        velocity = conditional
        if len(velocities) == 3:
            velocity = guided_twice(conditional, velocities[1], velocities[2], text_scale, modality_scale)
        elif len(velocities) == 2:
            velocity = guided(conditional, velocities[1], text_scale if self.without_text else modality_scale)
        if len(velocities) > 1 and options.cfg_rescale:
            velocity = rescaled(velocity, conditional, options.cfg_rescale)
        if self.stays is not None and self.known_velocity is not None:
            velocity = torch.where(self.stays, self.known_velocity, velocity)
        return velocity

    def estimate(self) -> Float[Tensor, "k c"]:
        """Where the latents land if they keep the last velocity."""
        if self.velocity is None:
            return self.x
        return estimate_clean(self.x, self.velocity, torch.full_like(self.x[:, 0], self.times[self.step]))

    def latents(self) -> Float[Tensor, "..."]:
        """The current latents in their axial shape. Once it is done, kept latents are exactly the original ones."""
        x = self.x
        if self.is_done and self.stays is not None and self.clean is not None:
            x = torch.where(self.stays, self.clean, x)
        return self.unflatten(x)

    def unflatten(self, flat: Float[Tensor, "k c"]) -> Float[Tensor, "..."]:
        return flat.unflatten(0, self.shape) if self.shape else flat[0]


class Denoiser:
    """Takes solver steps. Denoisings of one solver step together, whatever their types, shapes and times.

    The streams of the last few sets of branches are kept, since they serve many steps. One forward pass evaluates at
    most `most_tokens` (latents, those of unconditional branches included).
    """

    def __init__(self, model: Model, runner: Runner, halving: Halving, *, most_tokens: int):
        self.model, self.runner, self.halving, self.most_tokens = model, runner, halving, most_tokens
        self.evaluations = 0
        self._laid: dict[tuple, SpanStream] = {}

    def step(self, denoisings: Sequence[Denoising]) -> list[tuple[Denoising, Exception]]:
        """One interval each. Adaptive and multi-step methods take all of their intervals at once, one denoising at a
        time. Returns those that failed, with their errors.
        """
        failed = []
        for _, group in groupby(sorted(denoisings, key=_solver_key), key=_solver_key):
            members = list(group)
            if is_single_step(members[0].options.odeint_kwargs or {}):
                for part in self._parts(members):
                    failed += self.halving.run(part, self._step_together)
            else:
                failed += [failure for each in members for failure in self.halving.run([each], self._solve_alone)]
        return failed

    def reset(self) -> None:
        """Forgets all layouts."""
        self._laid = {}

    def _parts(self, denoisings: Sequence[Denoising]) -> Iterable[list[Denoising]]:
        part: list[Denoising] = []
        size = 0
        for denoising in denoisings:
            own = len(denoising.branches) * len(denoising.x)
            if part and size + own > self.most_tokens:
                yield part
                part, size = [], 0
            part.append(denoising)
            size += own
        yield part

    def _step_together(self, denoisings: Sequence[Denoising]) -> None:
        """One interval each, all in one flat vector. Times are numbers on the host."""
        sizes = [it.x.numel() for it in denoisings]
        rates = _rates([it.times[it.step + 1] - it.times[it.step] for it in denoisings], sizes, denoisings[0].x)

        def derivative(fraction: float, flat: Tensor) -> Tensor:
            return rates * self._velocity(denoisings, flat, sizes, [it.time_at(fraction) for it in denoisings])

        flat = torch.cat([it.x.flatten() for it in denoisings])
        after = single_step((denoisings[0].options.odeint_kwargs or {})["method"], derivative, flat)
        # clones, which keep no other latents alive; all are made before any denoising changes, so a failure leaves none
        moved = [part.view_as(it.x).clone() for part, it in zip(after.split(sizes), denoisings, strict=True)]
        for denoising, x in zip(denoisings, moved, strict=True):
            denoising.x = x
            denoising.step += 1

    def _solve_alone(self, denoisings: Sequence[Denoising]) -> None:
        [denoising] = denoisings
        times = torch.tensor(denoising.times, dtype=torch.float64, device="cpu").to(denoising.x)

        def velocity(time: Tensor, flat: Tensor) -> Tensor:
            made = self._velocity([denoising], flat, [flat.numel()], [float(time)])
            # an adaptive method may never finish on a velocity that is not finite
            if not made.isfinite().all():
                raise ValueError("the velocity of a drawing is not finite")
            return made

        after = integrate(velocity, denoising.x.flatten(), times, denoising.options.odeint_kwargs or {})
        denoising.x, denoising.step = after.view_as(denoising.x).clone(), len(denoising.times) - 1

    def _velocity(
        self, denoisings: Sequence[Denoising], flat: Tensor, sizes: Sequence[int], times: Sequence[float]
    ) -> Tensor:
        """The guided velocity of every denoising at its own time, from one forward pass over all of their branches."""
        x = [part.view_as(it.x) for part, it in zip(flat.split(list(sizes)), denoisings, strict=True)]
        branches = [it.branches_at(time) for it, time in zip(denoisings, times, strict=True)]
        owners = [i for i, own in enumerate(branches) for _ in own]
        laid = self._lay_out([branch for own in branches for branch in own], [denoisings[i] for i in owners])
        every = iter(self.runner.velocities(laid, [x[i] for i in owners], [times[i] for i in owners]))
        self.evaluations += 1
        velocities = []
        for denoising, own in zip(denoisings, branches, strict=True):
            denoising.velocity = denoising.combine([next(every) for _ in own])
            denoising.num_evaluations += 1
            velocities.append(denoising.velocity.flatten())
        return torch.cat(velocities)

    def _lay_out(self, branches: Sequence[Branch], owners: Sequence[Denoising]) -> SpanStream:
        """The stream of these branches, used again until they or their rows change."""
        key = tuple((branch, branch.past, it.type, it.shape) for branch, it in zip(branches, owners, strict=True))
        laid = self._laid.pop(key, None)
        if laid is None or not self.runner.is_current(laid.rows, laid.stamp):
            pieces = [Modality(it.type, it.latents()) for it in owners]
            laid = self.runner.lay_out(branches, pieces)
            # void ones hold memory that the cache has freed
            self._laid = {k: it for k, it in self._laid.items() if self.runner.is_current(it.rows, it.stamp)}
        self._laid = dict([*self._laid.items(), (key, laid)][-LAYOUTS:])
        return laid


def _rates(intervals: Sequence[float], sizes: Sequence[int], like: Tensor) -> float | Float[Tensor, " n"]:
    """The length of the interval of every number, or one for all."""
    if len(set(intervals)) == 1:
        return intervals[0]
    lengths = torch.tensor(sizes, device="cpu")
    return torch.tensor(intervals, dtype=torch.float64, device="cpu").repeat_interleave(lengths).to(like)


def _solver_key(denoising: Denoising) -> Any:
    return denoising.solver_key
