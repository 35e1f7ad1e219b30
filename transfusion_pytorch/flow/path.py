"""The straight path from noise (t = 0) to data (t = 1), and the conversions along it.

n slots, c channels. One time per slot, so slots of different spans can stand at different times.
"""

from typing import NamedTuple

import einx
import torch
from jaxtyping import Float
from torch import Tensor

MIN_REMAINING = 0.05  # where the clean latent is predicted, 1 - t is not taken below this (JiT, arXiv 2511.13720)


class FlowSample(NamedTuple):
    """A point on the path, the direction of travel there, and when that is."""

    x_t: Float[Tensor, "n c"]
    velocity: Float[Tensor, "n c"]
    t: Float[Tensor, " n"]


def interpolate(clean: Float[Tensor, "n c"], noise: Float[Tensor, "n c"], t: Float[Tensor, " n"]) -> FlowSample:
    """`x_t = (1 - t) noise + t clean`, whose velocity is `clean - noise` everywhere (rectified flow, arXiv
    2209.03003).
    """
    return FlowSample(torch.lerp(noise, clean, t[:, None]), clean - noise, t)


def estimate_clean(
    x_t: Float[Tensor, "n c"], velocity: Float[Tensor, "n c"], t: Float[Tensor, " n"], *, damped: bool = False
) -> Float[Tensor, "n c"]:
    """Where `x_t` lands if it keeps its velocity until t = 1. Undoes `interpolate`, and `velocity_towards` if
    `damped`.
    """
    return x_t + einx.multiply("n c, n -> n c", velocity, _remaining(t, damped))


def velocity_towards(
    clean: Float[Tensor, "n c"], x_t: Float[Tensor, "n c"], t: Float[Tensor, " n"]
) -> Float[Tensor, "n c"]:
    """The velocity that reaches `clean` at t = 1; near there it is damped instead of divided by almost nothing."""
    return einx.divide("n c, n -> n c", clean - x_t, _remaining(t, damped=True))


def slerp(start: Float[Tensor, "n c"], end: Float[Tensor, "n c"], weight: float) -> Float[Tensor, "n c"]:
    """Noise between two noises, from `start` at weight 0 to `end` at 1, each one point of n c coordinates.

    It goes along the sphere on which noise lies: a straight line passes through noise that is too weak (arXiv
    1609.04468).
    """
    if start.shape != end.shape:
        raise ValueError(
            f"slerp goes between two tensors of one shape, got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    precise = torch.promote_types(start.dtype, torch.float32)
    one, other = start.to(precise), end.to(precise)
    cosine = torch.dot(one.flatten(), other.flatten()) / (one.norm() * other.norm()).clamp(min=1e-12)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-4:  # side by side, where the two ways are the same, or opposite, where there is no one way
        return torch.lerp(one, other, weight).to(start.dtype)
    mixed = ((1 - weight) * angle).sin() * one + (weight * angle).sin() * other
    return (mixed / angle.sin()).to(start.dtype)


def _remaining(t: Tensor, damped: bool) -> Tensor:
    return (1 - t).clamp(min=MIN_REMAINING if damped else 0.0)
