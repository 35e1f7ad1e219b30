"""How to sample: the options of one request, checked.

v vocabulary, n ids, k latents.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite
from numbers import Real
from typing import Any, TypeVar, no_type_check

import torch
from torch import Tensor

from transfusion_pytorch.sequence.samples import MAX_AXES, Shape, is_int, is_sequence

MOST_STEPS = 100_000  # of a solver
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
Door = TypeVar("Door", bound=Callable)


def checks_itself(door: Door) -> Door:
    """Leaves the arguments of a function or dataclass to its own checks, which say more than those of `TYPECHECK`."""
    return no_type_check(door)


def takes_sampling_options(method: Door) -> Door:
    """Lets `help` and editors show every field of `SamplingOptions` in place of `**options`."""
    own = [it for it in inspect.signature(method).parameters.values() if it.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(it.name, inspect.Parameter.KEYWORD_ONLY, default=it.default, annotation=it.type)
        for it in fields(SamplingOptions)
    ]
    method.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return method


@checks_itself
@dataclass(frozen=True)
class SamplingOptions:
    """How to continue one prompt. Raises `ValueError` or `TypeError` for what makes no sense.

    Length:
    - `max_length`: where a sample is cut off, in tokens: the rest of a longer one is not written, and a modality that
      does not fit is not drawn. It changes nothing before that: the same sample, given back as a prompt, goes on there
    - `stop_ids`: text ids that end the sample once written

    Text, in this order; everything but the temperature looks at the model's own distribution:
    - `logits_processors`: functions of the ids so far `(n,)`, markers included, and the logits `(v,)` to new logits
    - `text_repetition_penalty`: logits of text that has come before are divided by it if positive and else multiplied
      (CTRL, arXiv 1909.05858); 1 is none
    - `text_top_k`: the likeliest so many; `text_top_p`: the likeliest that together have this probability (arXiv
      1904.09751); `text_min_p`: those at least that times as likely as the likeliest (arXiv 2407.01082)
    - `text_temperature`: 0 takes the likeliest

    Structure:
    - `force_modality_at_start`: a type or (type, shape) to draw right behind the prompt
    - `plan`: all that is to come, in order, and nothing else: `"text"`, `("text", most)` with at most so many ids, a
      type, or (type, shape): `["text", (0, (4, 4)), ("text", 20)]`. The model chooses where a text ends
    - `allowed_modalities`: the types that it may open by itself; None for all, `()` for text alone
    - `fixed_modality_shape`: the shape of whatever is drawn
    - `max_modality_tokens`: how many latents a shape written by the model may come to

    Drawing:
    - `modality_steps`: intervals of the ODE solver; `time_shift` > 1 makes those near the noise shorter (`t / (t +
      shift (1 - t))`, arXiv 2403.03206); `odeint_kwargs` instead of the model's own
    - `cfg_scale`: guidance by the text before a modality, 3 where the model was trained for it (`prob_uncond`);
      `modality_cfg_scale`: guidance by the modalities before it, for editing (InstructPix2Pix, arXiv 2211.09800). 1
      turns each off, and costs nothing
    - `cfg_interval`: guidance acts at times between these two (arXiv 2404.07724), and costs nothing elsewhere
    - `cfg_rescale`: how far, from 0 to 1, guided velocities are brought back to the spread of the unguided ones (arXiv
      2305.08891)
    - `init_modality_noise`: `(n, d)` noise to start from, as much of it as needed, the same for every modality
    - `init_modality`: what the first modality starts from, as users have it (raw, or `(type, raw)`); it comes right
      behind the prompt and has this one's shape. `strength` says how much of the way from noise to data is travelled
      anew: 1 is all of it (`init_modality` then matters only behind a mask), 0.4 keeps most of what is there
    - `modality_mask`: booleans of the latents' axial shape: True is drawn anew, False is kept from `init_modality`

    `return_unprocessed_modalities`: latents as they are, those of the prompt too, not decoded.

    `generator`: the source of all random numbers, of noise and of text; for many prompts a list with one for each, or
    one to seed them all. What a request becomes depends on its own generator and on nothing else in the batch.
    """

    max_length: int = 2048
    stop_ids: Sequence[int] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    text_repetition_penalty: float = 1.0
    text_top_k: int | None = None
    text_top_p: float = 1.0
    text_min_p: float = 0.1
    text_temperature: float = 1.0
    force_modality_at_start: int | tuple[int, Shape] | None = None
    plan: Sequence[Any] | None = None
    allowed_modalities: Sequence[int] | None = None
    fixed_modality_shape: Shape | None = None
    max_modality_tokens: int = 4096
    modality_steps: int = 16
    time_shift: float = 1.0
    odeint_kwargs: Mapping[str, Any] | None = None
    cfg_scale: float | None = None
    modality_cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_rescale: float = 0.0
    init_modality_noise: Tensor | None = None
    init_modality: Any = None
    strength: float = 1.0
    modality_mask: Tensor | None = None
    generator: Any = None
    return_unprocessed_modalities: bool = False

    def __post_init__(self):
        for name in ("max_length", "modality_steps", "max_modality_tokens"):
            self._set(name, check_int(getattr(self, name), name))
        if self.modality_steps > MOST_STEPS:
            raise ValueError(f"modality_steps must be at most {MOST_STEPS}, got {self.modality_steps}")
        if self.text_top_k is not None:
            self._set("text_top_k", check_int(self.text_top_k, "text_top_k"))
        for name, bounds in BOUNDS.items():
            self._set(name, check_number(getattr(self, name), name, **bounds))
        if self.cfg_scale is not None:
            self._set("cfg_scale", check_number(self.cfg_scale, "cfg_scale"))
        _check_interval(self.cfg_interval)
        _check_processors(self.logits_processors)
        if self.fixed_modality_shape is not None:
            check_shape(self.fixed_modality_shape, "fixed_modality_shape")
        if self.init_modality_noise is not None:
            _check_noise(self.init_modality_noise)
        if self.odeint_kwargs is not None and not isinstance(self.odeint_kwargs, Mapping):
            raise TypeError(
                "odeint_kwargs must be a dict of arguments of torchdiffeq.odeint, such as dict(method='euler'), got "
                f"{type(self.odeint_kwargs).__name__}"
            )
        if not isinstance(self.return_unprocessed_modalities, bool):
            raise TypeError(f"return_unprocessed_modalities must be a bool, got {self.return_unprocessed_modalities!r}")
        if self.init_modality is None and (self.strength != 1 or self.modality_mask is not None):
            name = "strength" if self.strength != 1 else "modality_mask"
            raise ValueError(f"{name} says what to keep of an init_modality, and there is none: give one")

    def _set(self, name: str, value: Any) -> None:
        """Numbers of any kind become plain ones, while it is made."""
        object.__setattr__(self, name, value)


# what is finite, and within these
BOUNDS: dict[str, dict[str, float]] = {
    "text_temperature": dict(least=0),
    "text_min_p": dict(least=0, most=1),
    "text_top_p": dict(above=0, most=1),
    "text_repetition_penalty": dict(above=0),
    "modality_cfg_scale": dict(),
    "cfg_rescale": dict(least=0, most=1),
    "time_shift": dict(above=0),
    "strength": dict(above=0, most=1),
}


def check_int(value: Any, name: str, *, least: int = 1) -> int:
    """A plain int. Raises `TypeError` or `ValueError` unless `value` is one and at least `least`."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_number(
    value: Any, name: str, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """A plain float. Raises `TypeError` or `ValueError` unless `value` is a finite number within its bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    low = [f"at least {least}"] * (least is not None) + [f"above {above}"] * (above is not None)
    bounds = " and ".join(low + [f"at most {most}"] * (most is not None))
    is_low = (least is not None and number < least) or (above is not None and number <= above)
    if is_low or (most is not None and number > most):
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return number


def check_shape(shape: Any, name: str) -> None:
    """Raises `ValueError` unless `shape` is a tuple of positive ints."""
    is_shape = is_sequence(shape) and all(map(is_int, shape))
    if not is_shape or len(shape) > MAX_AXES or any(int(size) < 1 for size in shape):
        raise ValueError(f"{name} must be a tuple of 0 to {MAX_AXES} positive ints, such as (4, 4), got {shape!r}")


def check_type(modality: Any, num_modalities: int, name: str) -> int:
    """The type of one of a model's modalities. Raises `TypeError` or `ValueError` for anything else."""
    if not is_int(modality):
        raise TypeError(f"{name}: a modality type is an int, got {modality!r}")
    if not 0 <= int(modality) < num_modalities:
        raise ValueError(f"{name}: unknown modality type {modality}, this model has {num_modalities} (from 0)")
    return int(modality)


def with_own_generator(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a single request, which draws from the generator it is given and not from one seeded by that."""
    lone = isinstance(generator := options.get("generator"), torch.Generator)
    return {**options, "generator": [generator]} if lone else dict(options)


def as_generators(given: Any, count: int) -> list[torch.Generator]:
    """A generator for each of `count` prompts: those given, or new ones seeded by the one given or by torch's own."""
    if isinstance(given, (list, tuple)) and all(isinstance(one, torch.Generator) for one in given):
        if len(given) != count:
            raise ValueError(f"generator: {len(given)} of them for {count} prompts; give one for each, or one for all")
        if len(set(given)) < len(given):
            raise ValueError("generator: one is given twice; what it makes would hang on who comes first")
        return list(given)
    if given is not None and not isinstance(given, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(given).__name__}")
    device = "cpu" if given is None else given.device
    seeds = torch.randint(2**62, (count,), generator=given, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _check_noise(noise: Any) -> None:
    if not isinstance(noise, Tensor) or noise.ndim != 2 or not noise.is_floating_point():
        got = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"init_modality_noise must be a float tensor (n, d): rows of latents, channels, got {got}")
    if not noise.isfinite().all():
        raise ValueError("init_modality_noise contains NaN or infinity")


def _check_interval(interval: Any) -> None:
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise TypeError(f"cfg_interval must be two times, such as (0.1, 0.8), got {interval!r}")
    for time in interval:
        check_number(time, "cfg_interval", least=0, most=1)
    if interval[0] > interval[1]:
        raise ValueError(f"cfg_interval must begin before it ends, got {interval!r}")


def _check_processors(processors: Any) -> None:
    if not isinstance(processors, (tuple, list)) or not all(callable(processor) for processor in processors):
        raise TypeError(f"logits_processors must be a list of functions (ids, logits) -> logits, got {processors!r}")
