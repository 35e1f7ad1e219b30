"""Options resolved for a model: defaults filled in, and the plan of parts.

k latents of a modality, c their channels.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.solver import check_method
from transfusion_pytorch.flow.times import shift_times
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.sequence.grammar import MostLatents
from transfusion_pytorch.sequence.hashing import normal
from transfusion_pytorch.sequence.plan import ModalityPart, Plan, check_types, forced_plan, parse_plan
from transfusion_pytorch.sequence.samples import (
    MAX_AXES,
    Modality,
    Shape,
    Text,
    check_ids,
    is_int,
    is_integer,
    parse_part,
)


def resolve(options: SamplingOptions, model: Any) -> SamplingOptions:
    """The same options with everything filled in that depends on the model.

    `plan` becomes a `Plan` (`force_modality_at_start` and `init_modality` are short forms of one), `init_modality`
    latents (a `Modality`), `cfg_scale` a number, `odeint_kwargs` complete. Raises `ValueError` or `TypeError` where
    options and model do not match.
    """
    own = model.odeint_kwargs
    tolerances = {name: own[name] for name in ("atol", "rtol") if name in own}
    solver = dict(own) if options.odeint_kwargs is None else tolerances | dict(options.odeint_kwargs)
    check_method(solver)
    if options.allowed_modalities is not None:
        check_types(options.allowed_modalities, len(model.modalities), "allowed_modalities")
    if not any(axes_of(io, options.fixed_modality_shape) for io in model.modalities):
        raise ValueError(
            f"fixed_modality_shape {options.fixed_modality_shape}: no modality of this model can have that shape"
        )
    init = None if options.init_modality is None else _encoded(options, model)
    noise = options.init_modality_noise
    resolved = replace(
        options,
        odeint_kwargs=solver,
        stop_ids=_checked_stop_ids(options.stop_ids, model.vocabulary.num_text),
        cfg_scale=(3.0 if model.prob_uncond > 0 else 1.0) if options.cfg_scale is None else options.cfg_scale,
        init_modality=init,
        init_modality_noise=None if noise is None else noise.clone(),
        plan=_plan(options, init, model),
    )
    _check_noise_for_all(resolved, model)
    _check_times(resolved, model.precision)
    return resolved


def with_negative_prompts(options: SamplingOptions, count: int, num_text: int) -> list[SamplingOptions]:
    """Resolved options for each of `count` requests, with a negative prompt of its own. Raises `ValueError` or
    `TypeError` where they have none for each.
    """
    given = options.negative_prompt
    every = list(given) if isinstance(given, (list, tuple)) else [given] * count
    for ids in every:
        if ids is not None and not (isinstance(ids, Tensor) and is_integer(ids) and ids.numel()):
            came = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"negative_prompt must be an integer tensor of text ids (n,), got {came}")
    if len(every) != count:
        raise ValueError(
            f"negative_prompt: {len(every)} of them for {count} prompts; give one for each, or one for all"
        )
    if options.cfg_scale == 1 and any(ids is not None for ids in every):
        raise ValueError("negative_prompt: guidance is off (cfg_scale is 1); set cfg_scale to another number")
    prompts = [None if ids is None else ids.detach().reshape(-1).to("cpu", torch.long).clone() for ids in every]
    for ids in prompts:
        if ids is not None:
            check_ids(ids, num_text, "negative_prompt")
    without = replace(options, negative_prompt=None)
    return [without if ids is None else replace(without, negative_prompt=ids) for ids in prompts]


# shapes


def allowed_axes(options: SamplingOptions, model: Any) -> list[set[int]]:
    """The numbers of axes that each modality may have that the model opens by itself; none for one that it may not
    open. Of those that are only read, or have more channels than `init_modality_noise`, none is opened, unless
    `allowed_modalities` names it.
    """
    named, noise = options.allowed_modalities, options.init_modality_noise
    allowed = [
        i in named
        if named is not None
        else not io.is_read_only and (noise is None or (len(noise) > 0 and noise.shape[1] >= io.spec.dim_latent))
        for i, io in enumerate(model.modalities)
    ]
    axes = [axes_of(io, options.fixed_modality_shape) for io in model.modalities]
    return [counts if may_open else set() for counts, may_open in zip(axes, allowed, strict=True)]


def axes_of(io: Any, fixed: Shape | None = None) -> set[int]:
    """The numbers of axes that a modality can have; none where it cannot have the `fixed` shape."""
    if fixed is not None:
        return {len(fixed)} if io.supports(fixed) else set()
    return set(range(MAX_AXES + 1)) if io.spec.num_dim is None else {io.spec.num_dim}


def shape_of(model: Any, fixed: Shape | None, modality: int, shape: Shape | None, name: str = "") -> Shape:
    """The shape asked for, or the fixed or default one. Raises `ValueError` for one that the modality cannot have."""
    io, where = model.modalities[modality], f"{name}: " if name else ""
    if shape is not None and fixed is not None and shape != fixed:
        raise ValueError(f"{where}the shape {shape} is asked for, and fixed_modality_shape is {fixed}")
    asked = fixed if shape is None else shape
    default = () if io.spec.num_dim == 0 else io.spec.default_shape
    shape = default if asked is None else asked
    if shape is None:
        raise ValueError(
            f"{where}modality {modality} has no default shape: give one here (fixed_modality_shape), or set "
            "modality_default_shape"
        )
    if not io.supports(shape):
        axes = " or ".join(map(str, sorted(axes_of(io))))
        reason = "the modules around the transformer do not take it"
        raise ValueError(
            f"{where}modality {modality} cannot have the shape {shape}: "
            f"{reason if len(shape) in axes_of(io) else f'it has {axes} axes'}"
        )
    return shape


def most_latents(options: SamplingOptions, model: Any) -> MostLatents:
    """How many latents a shape that the model writes may have: by default those that fit into `max_length` from the
    start, and never more than `init_modality_noise` has rows. Behind a U-Net half there are fewer tokens than latents.
    """
    known = [io for io in model.modalities if io.spec.default_shape and io.supports(io.spec.default_shape)]
    ratios = [prod(io.spec.default_shape) / prod(io.token_shape(io.spec.default_shape)) for io in known]
    rows = None if options.init_modality_noise is None else len(options.init_modality_noise)
    return MostLatents(options.max_modality_tokens, options.max_length, max([1.0, *ratios]), rows)


# plans


def _plan(options: SamplingOptions, init: Modality | None, model: Any) -> Plan:
    count = len(model.modalities)
    find_shape = partial(shape_of, model, options.fixed_modality_shape)
    if options.plan is not None and options.force_modality_at_start is not None:
        raise ValueError("give force_modality_at_start or a plan that begins with that modality, not both")
    if options.plan is not None:
        plan = parse_plan(options.plan, count, find_shape, first=init)
    elif options.force_modality_at_start is not None:
        plan = forced_plan(options.force_modality_at_start, count, find_shape, first=init)
    elif init is not None:
        name = "init_modality"
        plan = Plan((ModalityPart(init.type, find_shape(init.type, init.shape, name)),), name=name)
    else:
        return Plan()
    if init is not None and plan.parts[0] != (expected := ModalityPart(init.type, init.shape)):
        raise ValueError(
            f"init_modality comes right behind the prompt, as {tuple(expected)}, but {tuple(plan.parts[0])} is "
            "asked for there"
        )
    return plan


# what else is checked


def _checked_stop_ids(ids: Any, num_text: int) -> frozenset[int]:
    given = ids.tolist() if isinstance(ids, Tensor) else ids
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | Set):
        raise TypeError(f"stop_ids must be a list of ids, got {ids!r}")
    for token in given:
        if not is_int(token):
            raise TypeError(f"stop_ids must be ints, got {token!r}")
        if not 0 <= token < num_text:
            expected = f"expected 0 to {num_text - 1}" if num_text else "this model has no text"
            raise ValueError(f"stop_ids: {token} is no id of text, {expected}")
    return frozenset(map(int, given))


def _encoded(options: SamplingOptions, model: Any) -> Modality:
    """`init_modality` as latents; checks the mask against them."""
    given = parse_part(options.init_modality, len(model.modalities), "init_modality")
    if isinstance(given, Text):
        raise TypeError("init_modality must be floating point, or (type, tensor): it is a modality, not text")
    [[encoded]] = model.encode([[given._replace(tensor=given.tensor.clone())]], "init_modality, sample")
    assert isinstance(encoded, Modality)
    mask = options.modality_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"modality_mask must be a bool tensor, True where to draw anew, got {came}")
    if mask is not None and tuple(mask.shape) != encoded.shape:
        raise ValueError(
            f"modality_mask must have the axial shape of the latents, {encoded.shape}, got {tuple(mask.shape)}"
        )
    return encoded


def initial_noise(
    options: SamplingOptions, modality: int, shape: Shape, model: Any, *, seed: int, number: int
) -> Float[Tensor, "k c"]:
    """The noise that modality `number` of a request starts from, in single precision at least."""
    channels = model.modalities[modality].spec.dim_latent
    given = options.init_modality_noise
    if given is None:
        return normal(seed, number + 1, (prod(shape), channels), model.device).to(model.precision)
    check_noise(given, modality, shape, channels)
    return given[: prod(shape), :channels].to(model.device, model.precision)


def times_of(options: SamplingOptions, start: float = 0.0) -> list[float]:
    """The ends of all intervals of the solver, from where the flow starts to 1."""
    uniform = torch.linspace(0, 1, options.modality_steps + 1, dtype=torch.float64, device="cpu")
    return (start + (1 - start) * shift_times(uniform, options.time_shift)).tolist()


def _check_times(options: SamplingOptions, precision: torch.dtype) -> None:
    """Raises `ValueError` for times so close that they are equal in this precision."""
    for start in {0.0, 1 - options.strength}:
        times = torch.tensor(times_of(options, start), dtype=torch.float64, device="cpu").to(precision)
        if not (times.diff() > 0).all():
            raise ValueError(
                f"modality_steps={options.modality_steps}, time_shift={options.time_shift} and "
                f"strength={options.strength} leave intervals too short for {precision}"
            )


def check_noise(noise: Tensor, modality: int, shape: Shape, channels: int) -> None:
    """Raises `ValueError` where `init_modality_noise` is too small for a modality."""
    if noise.shape[0] < prod(shape) or noise.shape[1] < channels:
        raise ValueError(
            f"init_modality_noise needs {prod(shape)} rows and {channels} channels for shape {shape} of modality "
            f"{modality}, got {tuple(noise.shape)}"
        )


def _check_noise_for_all(options: SamplingOptions, model: Any) -> None:
    """Raises `ValueError` where `init_modality_noise` is too small for what the caller asks for by name."""
    plan, noise = options.plan, options.init_modality_noise
    assert isinstance(plan, Plan)
    if noise is None:
        return
    asked = [(part.type, part.shape) for part in plan.parts if isinstance(part, ModalityPart)]
    if plan.free or not plan.parts:
        opened = [i for i, axes in enumerate(allowed_axes(options, model)) if axes]
        asked += [(i, options.fixed_modality_shape or ()) for i in opened]
    for modality, shape in asked:
        check_noise(noise, modality, shape, model.modalities[modality].spec.dim_latent)
