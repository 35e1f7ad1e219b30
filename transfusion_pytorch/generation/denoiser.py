"""Denoising: modalities between noise and data, and one solver step for all of them together.

s denoisings, k latents of one, c their channels; u rows of joined latents, w their width, v rows of all branches.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transfusion_pytorch.failures import Halving
from transfusion_pytorch.flow.guidance import guided, guided_twice, rescaled
from transfusion_pytorch.flow.path import estimate_clean, interpolate
from transfusion_pytorch.flow.solver import TABLEAUS, integrate, is_single_step, single_step
from transfusion_pytorch.generation.batch_state import Branch
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.resolve import times_of
from transfusion_pytorch.generation.runner import SpanStream, UncachedRunner, batches
from transfusion_pytorch.network.conditions import ConditionTable
from transfusion_pytorch.sequence.joined import join, split
from transfusion_pytorch.sequence.samples import Modality, Shape

ROUNDING = 1e-6  # of a time in single precision: 0.6 is 0.60000002
STREAMS_KEPT = 4  # kept: with guidance and without it, for two solvers
TIMES_AT_ONCE = 64  # time embeddings and modulations are made for so many evaluations ahead


@dataclass(eq=False)
class Denoising:
    """A modality between noise and data: `x` are its flat latents after `step` of the intervals between `times`.

    - `where`: the name of its request in error messages
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
    where: str
    without_text: Branch | None = None
    without_all: Branch | None = None
    clean: Float[Tensor, "k c"] | None = None
    stays: Bool[Tensor, "k 1"] | None = None
    known_velocity: Float[Tensor, "k c"] | None = None
    velocity: Float[Tensor, "k c"] | None = None
    step: int = 0
    num_evaluations: int = 0

    @classmethod
    def edit(
        cls, options: SamplingOptions, noise: Float[Tensor, "k c"], conditional: Branch, where: str
    ) -> "Denoising":
        """On the straight path from noise to `init_modality`, as far along as `strength` says."""
        init, mask = options.init_modality, options.modality_mask
        clean = init.tensor.reshape(-1, init.tensor.shape[-1])
        times = times_of(options, 1 - options.strength)
        x, velocity, _ = interpolate(clean, noise, torch.full_like(noise[:, 0], times[0]))
        stays = None if mask is None else ~mask.reshape(-1, 1).to(noise.device)
        made = cls(init.type, init.shape, options, x, times, conditional, where)
        made.clean, made.stays, made.known_velocity = clean, stays, velocity
        return made

    @property
    def solver(self) -> dict[str, Any]:
        return dict(self.options.odeint_kwargs or {})

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

    def times_ahead(self, fractions: Sequence[float]) -> list[tuple[int, float]]:
        """Its type and the times of all evaluations to come, those at these fractions of each interval."""
        return [
            (self.type, start + fraction * (end - start))
            for start, end in pairwise(self.times[self.step :])
            for fraction in fractions
        ]

    def branches_at(self, time: float) -> list[Branch]:
        """The branches to evaluate at this time: guidance acts within its interval only."""
        low, high = self.options.cfg_interval
        return self.branches if low - ROUNDING <= time <= high + ROUNDING else [self.conditional]

    @property
    def guidance(self) -> Hashable:
        """Equal for denoisings whose velocities may be combined in one tensor, number by number."""
        options = self.options
        by_number = not options.cfg_rescale and self.stays is None
        return (options.cfg_scale, options.modality_cfg_scale, self.without_text is None) if by_number else self

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

    def __init__(self, runner: UncachedRunner, halving: Halving, *, most_tokens: int):
        self.runner, self.halving, self.most_tokens = runner, halving, most_tokens
        self.evaluations = 0
        self.reset()

    def reset(self) -> None:
        """Forgets all streams, and what follows from the weights."""
        self._streams: dict[Hashable, SpanStream] = {}
        self._table: ConditionTable | None = None

    def step(self, denoisings: Sequence[Denoising]) -> list[tuple[Denoising, BaseException]]:
        """One interval each. Adaptive and multi-step methods take all of their intervals at once, one denoising at a
        time. Returns those that failed, with their errors.
        """
        failed = []
        by_solver: dict[str, list[Denoising]] = {}
        for denoising in denoisings:
            by_solver.setdefault(repr(sorted(denoising.solver.items())), []).append(denoising)
        for members in by_solver.values():
            if is_single_step(members[0].solver):
                for batch in batches(members, lambda it: len(it.branches) * len(it.x), self.most_tokens):
                    failed += self.halving.run(batch, self._step_together)
            else:
                failed += [failure for each in members for failure in self.halving.run([each], self._solve_alone)]
        return failed

    def _step_together(self, denoisings: Sequence[Denoising]) -> None:
        """One interval each, all in one tensor. Times are numbers on the host."""
        method = denoisings[0].solver["method"]
        self._look_ahead(denoisings, TABLEAUS[method].fractions)
        start = join([it.x for it in denoisings])
        rates = _rates([it.times[it.step + 1] - it.times[it.step] for it in denoisings], denoisings, start)

        def derivative(fraction: float, x: Tensor) -> Tensor:
            return rates * self._velocity(denoisings, x, [it.time_at(fraction) for it in denoisings])

        # split before any denoising changes, so that a failure changes none
        after = split(single_step(method, derivative, start), [it.x for it in denoisings])
        for denoising, x in zip(denoisings, after, strict=True):
            denoising.x, denoising.step = x, denoising.step + 1

    def _look_ahead(self, denoisings: Sequence[Denoising], fractions: Sequence[float]) -> None:
        """Computes what depends on times only for many evaluations to come, unless that is done already."""
        needed = {(it.type, it.time_at(fraction)) for it in denoisings for fraction in fractions}
        if self._table is None or not self._table.has(needed):
            ahead = zip_longest(*(it.times_ahead(fractions) for it in denoisings))
            times = dict.fromkeys(time for each in ahead for time in each if time is not None)
            self._table = self.runner.condition_table(list(islice(times, max(len(needed), TIMES_AT_ONCE))))

    def _solve_alone(self, denoisings: Sequence[Denoising]) -> None:
        [denoising] = denoisings
        times = torch.tensor(denoising.times, dtype=torch.float64, device="cpu").to(denoising.x)

        def velocity(time: Tensor, x: Tensor) -> Tensor:
            made = self._velocity([denoising], x, [float(time)])
            # an adaptive method may never finish on a velocity that is not finite
            if not made.isfinite().all():
                raise ValueError("the velocity of a drawing is not finite")
            return made

        after = integrate(velocity, denoising.x, times, denoising.solver)
        denoising.x, denoising.step = after.clone(), len(denoising.times) - 1

    def _velocity(
        self, denoisings: Sequence[Denoising], x: Float[Tensor, "u w"], times: Sequence[float]
    ) -> Float[Tensor, "u w"]:
        """The guided velocity of every denoising at its own time, from one forward pass over all of their branches."""
        branches = [it.branches_at(time) for it, time in zip(denoisings, times, strict=True)]
        # all conditional branches first, then all of the next kind
        order = [
            (owner, own[rank])
            for rank in range(max(map(len, branches)))
            for owner, own in enumerate(branches)
            if rank < len(own)
        ]
        spans = self._span_stream(denoisings, order)
        every = self.runner.velocities(spans, x, [times[owner] for owner, _ in order], self._table)
        self.evaluations += 1
        if len({(len(own), it.guidance) for own, it in zip(branches, denoisings, strict=True)}) == 1:
            parts = [every] if len(every) == len(x) else every.unflatten(0, (-1, len(x))).unbind()
            velocity = denoisings[0].combine(parts)
        else:
            velocity = _combined(denoisings, order, every)
        for denoising, part in zip(denoisings, split(velocity, [it.x for it in denoisings]), strict=True):
            denoising.velocity = part
            denoising.num_evaluations += 1
        return velocity

    def _span_stream(self, denoisings: Sequence[Denoising], order: Sequence[tuple[int, Branch]]) -> SpanStream:
        """The stream of these branches, used again until they or their rows change."""
        key = (tuple(denoisings), tuple(order))
        spans = self._streams.pop(key, None)
        if spans is None or not self.runner.is_current(spans):
            pieces = [Modality(it.type, it.x, axes=it.shape) for it in denoisings]
            spans = self.runner.span_stream(order, pieces)
            # void ones hold memory that the cache has freed
            self._streams = {k: it for k, it in self._streams.items() if self.runner.is_current(it)}
        self._streams = dict([*self._streams.items(), (key, spans)][-STREAMS_KEPT:])
        return spans


def check_finite(done: Sequence[Denoising]) -> None:
    """Raises `ValueError` for finished latents with NaN or infinity: one copy back to the host."""
    if not torch.stack([it.x.isfinite().all() for it in done]).all():
        raise ValueError(f"{done[0].where}: the latents of modality {done[0].type} are not finite")


def _combined(
    denoisings: Sequence[Denoising], order: Sequence[tuple[int, Branch]], every: Float[Tensor, "v w"]
) -> Float[Tensor, "u w"]:
    """Guided velocities, where each denoising is guided in its own way."""
    parts = split(every, [denoisings[owner].x for owner, _ in order])
    by_owner: list[list[Tensor]] = [[] for _ in denoisings]
    for (owner, _), part in zip(order, parts, strict=True):
        by_owner[owner].append(part)
    return join([it.combine(own) for it, own in zip(denoisings, by_owner, strict=True)])


def _rates(
    intervals: Sequence[float], denoisings: Sequence[Denoising], joined: Float[Tensor, "u w"]
) -> float | Float[Tensor, "u 1"]:
    """The length of the interval of every row, or one for all."""
    if len(set(intervals)) == 1:
        return intervals[0]
    rows = torch.tensor([it.x.numel() // joined.shape[1] for it in denoisings], device="cpu")
    return torch.tensor(intervals, dtype=torch.float64, device="cpu").repeat_interleave(rows)[:, None].to(joined)
