"""One modality on its way from noise to data.

k latents, c their channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.guidance import guided, guided_twice, rescaled
from transfusion_pytorch.flow.path import estimate_clean, interpolate
from transfusion_pytorch.generation.context import Lane
from transfusion_pytorch.generation.rules import Kept, Rules
from transfusion_pytorch.sequence.samples import Modality, Shape

ROUNDING = 1e-6  # of a time in single precision: 0.6 is 0.60000002


@dataclass(eq=False)
class Drawing:
    """A modality in the making: `x` are its flat latents after `step` of the intervals between `times`.

    - `lane`: what it stands behind; `without_text`, `without_all`: the same without its text, and without its earlier
      modalities too, where guidance asks for them
    - `kept`: what it started from, if not from noise; `known_velocity` leads to the latents that stay
    - `velocity`: the last that was evaluated, of `num_evaluations`
    """

    type: int
    shape: Shape
    rules: Rules
    x: Float[Tensor, "k c"]
    times: list[float]
    lane: Lane
    without_text: Lane | None = None
    without_all: Lane | None = None
    kept: Kept | None = None
    known_velocity: Float[Tensor, "k c"] | None = None
    velocity: Float[Tensor, "k c"] | None = None
    step: int = 0
    num_evaluations: int = 0

    @classmethod
    def begin(
        cls, modality: int, shape: Shape, rules: Rules, generator: torch.Generator, lane: Lane, *, kept: Kept | None
    ) -> "Drawing":
        """From noise, or on the straight path from noise to what is `kept`, as far along as that says."""
        x, velocity, times = rules.noise(modality, shape, generator), None, rules.times(kept)
        if kept is not None:
            x, velocity, _ = interpolate(kept.latents, x, torch.full_like(x[:, 0], times[0]))
        return cls(modality, shape, rules, x, times, lane, kept=kept, known_velocity=velocity)

    @property
    def is_done(self) -> bool:
        return self.step == len(self.times) - 1

    @property
    def is_guided_at_times(self) -> bool:
        """Whether guidance comes and goes, so that one has to know the time."""
        return tuple(self.rules.options.cfg_interval) != (0, 1)

    def lanes_at(self, time: float) -> list[Lane]:
        """What it has to be seen behind at this time: guidance acts within its interval only."""
        low, high = self.rules.options.cfg_interval
        guides = [lane for lane in (self.without_text, self.without_all) if lane is not None]
        return [self.lane, *(guides if low - ROUNDING <= time <= high + ROUNDING else [])]

    def combine(self, velocities: Sequence[Float[Tensor, "k c"]]) -> Float[Tensor, "k c"]:
        """The velocity to follow, from those behind each of `lanes_at`."""
        options, conditional = self.rules.options, velocities[0]
        text_scale, modality_scale = self.rules.cfg_scale, options.modality_cfg_scale
        velocity = conditional
        if len(velocities) == 3:
            velocity = guided_twice(conditional, velocities[1], velocities[2], text_scale, modality_scale)
        elif len(velocities) == 2:
            velocity = guided(conditional, velocities[1], text_scale if self.without_text else modality_scale)
        if len(velocities) > 1 and options.cfg_rescale:
            velocity = rescaled(velocity, conditional, options.cfg_rescale)
        if self.kept is not None and self.kept.stays is not None and self.known_velocity is not None:
            velocity = torch.where(self.kept.stays, self.known_velocity, velocity)
        return velocity

    def estimate(self) -> Float[Tensor, "k c"]:
        """Where the latents land if they keep the last velocity."""
        if self.velocity is None:
            return self.x
        return estimate_clean(self.x, self.velocity, torch.full_like(self.x[:, 0], self.times[self.step]))

    def as_piece(self) -> Modality:
        """What there is so far. What was to stay is there to the last digit once it is done."""
        x = self.x
        if self.is_done and self.kept is not None and self.kept.stays is not None:
            x = torch.where(self.kept.stays, self.kept.latents, x)
        return Modality(self.type, self.unflatten(x).to(self.rules.model.dtype))

    def unflatten(self, flat: Float[Tensor, "k c"]) -> Float[Tensor, "..."]:
        """Flat latents in their axial shape."""
        return flat.unflatten(0, self.shape) if self.shape else flat[0]
