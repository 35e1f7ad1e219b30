"""The learning rate of every step, relative to the highest: a function of the step, so that nothing has to be kept."""

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    *,
    total: int,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 0,
    cooldown: float = 0.2,
    final: float = 0.0,
) -> float:
    """The factor of step 0 to `total - 1`: a linear rise over `warmup` steps, then half a cosine down to `final`; or
    constant, and over the last part `cooldown` of all steps a straight line down to `final` (arXiv 2405.18392).

    With total 5 and warmup 1 the steps 0 to 5 of a cosine get 0.5, 1, 0.85, 0.5, 0.15, 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    falls_from = total - round(cooldown * total)
    done = min(1.0, max(0.0, (step - falls_from) / max(1, total - falls_from)))
    return 1 + (final - 1) * done
