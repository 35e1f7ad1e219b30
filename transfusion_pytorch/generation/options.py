"""The options of a request, checked.

v vocabulary, n ids, k latents.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar, no_type_check

import torch
from torch import Tensor

from transfusion_pytorch.sequence.checks import check_bool, check_int, check_number, check_shape
from transfusion_pytorch.sequence.samples import Shape

MOST_STEPS = 100_000  # of a solver
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
Method = TypeVar("Method", bound=Callable)


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keywords, for type checkers and editors."""

    max_length: int
    max_new_tokens: int | None
    stop_ids: Sequence[int]
    logits_processors: Sequence[LogitsProcessor]
    text_repetition_penalty: float
    text_top_k: int | None
    text_top_p: float
    text_min_p: float
    text_temperature: float
    log_probabilities: bool
    force_modality_at_start: int | tuple[int, Shape] | None
    plan: Sequence[Any] | None
    allowed_modalities: Sequence[int] | None
    fixed_modality_shape: Shape | None
    max_modality_tokens: int | None
    modality_steps: int
    time_shift: float
    odeint_kwargs: Mapping[str, Any] | None
    cfg_scale: float | None
    modality_cfg_scale: float
    cfg_interval: tuple[float, float]
    cfg_rescale: float
    negative_prompt: Any
    init_modality_noise: Tensor | None
    init_modality: Any
    strength: float
    modality_mask: Tensor | None
    generator: Any
    return_unprocessed_modalities: bool
    return_without_prompt: bool


def checks_itself(method: Method) -> Method:
    """Leaves the arguments of a function or dataclass to its own checks, which say more than those of `TYPECHECK`."""
    return no_type_check(method)


def takes_sampling_options(method: Method) -> Method:
    """Shows every field of `SamplingOptions` in `help`: where the method names it, or else in place of `**keywords`."""
    signature = inspect.signature(method)
    own = [it for it in signature.parameters.values() if it.kind is not inspect.Parameter.VAR_KEYWORD]
    options = {
        it.name: inspect.Parameter(it.name, inspect.Parameter.KEYWORD_ONLY, default=it.default, annotation=it.type)
        for it in fields(SamplingOptions)
    }
    shown = [options.pop(it.name).replace(kind=it.kind) if it.name in options else it for it in own]
    method.__signature__ = signature.replace(parameters=[*shown, *options.values()])  # type: ignore[attr-defined]
    return method


@checks_itself
@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """How to continue one prompt. Raises `ValueError` or `TypeError` for values that are not valid.

    Length:
    - `max_length`: where the model stops writing, in tokens. A modality that it opens by itself and that does not fit
      is not generated. What the caller asks for (a modality that the prompt opens, `force_modality_at_start`, those of
      a plan) is generated even beyond it, and a longer prompt comes back as it is. Nothing before the cut depends on
      the length, but for shapes that could never fit, which are not written unless `max_modality_tokens` is set: given
      back as a prompt, the sample continues there
    - `max_new_tokens`: the same bound, counted from the end of the prompt; the smaller of both holds
    - `stop_ids`: text ids that end the sample

    Text, applied in this order; all filters act on the model's own distribution, before the temperature:
    - `logits_processors`: functions of the ids so far `(n,)`, markers included, and the logits `(v,)` to new logits;
      the ids are those of the engine and not to be changed
    - `text_repetition_penalty`: logits of text ids that came before are divided by it if positive and else multiplied
      (CTRL, arXiv 1909.05858); 1 is off
    - `text_top_k`: keeps the k likeliest ids; `text_top_p`: the likeliest that together have this probability (arXiv
      1904.09751); `text_min_p`: those with at least this share of the largest probability (arXiv 2407.01082)
    - `text_temperature`: 0 is greedy
    - `log_probabilities`: keep the natural logarithm of the model's own probability of each id, before all of the
      above

    Structure:
    - `force_modality_at_start`: a type or (type, shape) that comes right behind the prompt
    - `plan`: the parts to come, in order, and nothing else: `"text"`, `("text", most)` for at most that many ids, a
      type, or (type, shape): `["text", (0, (4, 4)), ("text", 20)]`. The model chooses where a text ends
    - `allowed_modalities`: the types that the model may open by itself; None for all, `()` for only text
    - `fixed_modality_shape`: the shape of every generated modality
    - `max_modality_tokens`: how many latents a shape written by the model may have; None for as many as fit into
      `max_length` from the start

    Modalities:
    - `modality_steps`: intervals of the ODE solver; `time_shift` > 1 makes those near the noise shorter (`t / (t +
      shift (1 - t))`, arXiv 2403.03206); `odeint_kwargs` replace the model's own
    - `cfg_scale`: guidance by the text before a modality, 3 where the model was trained for it (`prob_uncond`);
      `modality_cfg_scale`: guidance by the modalities before it, for editing (InstructPix2Pix, arXiv 2211.09800). A
      scale of 1 is off and costs nothing
    - `cfg_interval`: guidance acts at times between these two (arXiv 2404.07724), and costs nothing at others
    - `cfg_rescale`: how far, from 0 to 1, guided velocities are brought back to the spread of the unguided ones (arXiv
      2305.08891)
    - `negative_prompt`: ids `(n,)` that guidance leads away from. They are at the start of the unconditional branch, as
      its only text, in place of null text; for many prompts, ids for all or a list with ids for each
    - `init_modality_noise`: `(n, d)` noise to start from, the same for every modality; the first rows and channels are
      used. The model opens no modality by itself for which that is too small
    - `init_modality`: start the first modality from this (raw, or `(type, raw)`) and not from noise; it has its shape
      and comes right behind the prompt. `strength`: the part of the way from noise to data that is generated again; 1
      is all of it (then `init_modality` matters only with a mask), 0.4 keeps most
    - `modality_mask`: booleans of the latents' axial shape: True is generated, False is kept from `init_modality`

    `return_unprocessed_modalities`: return latents that are not decoded, also those of the prompt.
    `return_without_prompt`: return only what comes behind the prompt and its markers.

    `generator`: the seed of a request is drawn from it, and all random numbers of the request follow from that seed;
    for many prompts a list with one for each, or one for all. A sample does not depend on the others in the batch.
    """

    max_length: int = 2048
    max_new_tokens: int | None = None
    stop_ids: Sequence[int] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    text_repetition_penalty: float = 1.0
    text_top_k: int | None = None
    text_top_p: float = 1.0
    text_min_p: float = 0.1
    text_temperature: float = 1.0
    log_probabilities: bool = False
    force_modality_at_start: int | tuple[int, Shape] | None = None
    plan: Sequence[Any] | None = None
    allowed_modalities: Sequence[int] | None = None
    fixed_modality_shape: Shape | None = None
    max_modality_tokens: int | None = None
    modality_steps: int = 16
    time_shift: float = 1.0
    odeint_kwargs: Mapping[str, Any] | None = None
    cfg_scale: float | None = None
    modality_cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_rescale: float = 0.0
    negative_prompt: Any = None
    init_modality_noise: Tensor | None = None
    init_modality: Any = None
    strength: float = 1.0
    modality_mask: Tensor | None = None
    generator: Any = None
    return_unprocessed_modalities: bool = False
    return_without_prompt: bool = False

    def __post_init__(self):
        for name in ("max_length", "modality_steps"):
            self._set(name, check_int(getattr(self, name), name))
        for name in ("max_new_tokens", "max_modality_tokens", "text_top_k"):
            if getattr(self, name) is not None:
                self._set(name, check_int(getattr(self, name), name))
        if self.modality_steps > MOST_STEPS:
            raise ValueError(f"modality_steps must be at most {MOST_STEPS}, got {self.modality_steps}")
        for name, bounds in BOUNDS.items():
            self._set(name, check_number(getattr(self, name), name, **bounds))
        if self.cfg_scale is not None:
            self._set("cfg_scale", check_number(self.cfg_scale, "cfg_scale"))
        _check_interval(self.cfg_interval)
        _check_processors(self.logits_processors)
        self._set("logits_processors", tuple(self.logits_processors))
        if self.fixed_modality_shape is not None:
            self._set("fixed_modality_shape", check_shape(self.fixed_modality_shape, "fixed_modality_shape"))
        if self.init_modality_noise is not None:
            _check_noise(self.init_modality_noise)
        if self.odeint_kwargs is not None and not isinstance(self.odeint_kwargs, Mapping):
            raise TypeError(
                "odeint_kwargs must be a dict of arguments of torchdiffeq.odeint, such as dict(method='euler'), got "
                f"{type(self.odeint_kwargs).__name__}"
            )
        for name in ("return_unprocessed_modalities", "return_without_prompt", "log_probabilities"):
            check_bool(getattr(self, name), name)
        if self.init_modality is None and (self.strength != 1 or self.modality_mask is not None):
            name = "strength" if self.strength != 1 else "modality_mask"
            raise ValueError(f"{name} says what to keep of an init_modality, and there is none: give one")

    def _set(self, name: str, value: Any) -> None:
        """Sets a field of the frozen class while it is made: numbers of any type become plain ones."""
        object.__setattr__(self, name, value)


# options that are finite numbers, and their bounds
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


def as_options(options: Any, keywords: Mapping[str, Any]) -> SamplingOptions:
    """The `options` that were handed over, with these keywords in place of their own fields."""
    if options is None:
        return SamplingOptions(**keywords)
    if not isinstance(options, SamplingOptions):
        raise TypeError(f"options must be SamplingOptions, got {type(options).__name__}; single options are keywords")
    return replace(options, **keywords) if keywords else options


def seeds_of(generator: Any, count: int) -> list[int]:
    """A seed for each of `count` requests, from a generator for each, from one for all, or from torch's own.

    Raises `ValueError` or `TypeError` where these are no generators, too few or too many, or not different ones.
    """
    if isinstance(generator, (list, tuple)) and all(isinstance(one, torch.Generator) for one in generator):
        if len(generator) != count:
            raise ValueError(
                f"generator: {len(generator)} of them for {count} prompts; give one for each, or one for all"
            )
        if len(set(generator)) < len(generator):
            raise ValueError("generator: one is given twice; what it makes would depend on who comes first")
        return [seed for one in generator for seed in seeds_of(one, 1)]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


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
