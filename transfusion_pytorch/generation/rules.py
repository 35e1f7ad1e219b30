"""What the options of a request come to for a given model: what may be written, how large, how it is drawn.

k latents of a modality, c their channels.
"""

from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transfusion_pytorch.flow.solver import check_method
from transfusion_pytorch.flow.times import shift_times
from transfusion_pytorch.generation.context import Model
from transfusion_pytorch.generation.grammar import grammar_of
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.plan import ModalityPart, Plan, check_types, forced_plan, parse_plan
from transfusion_pytorch.sequence.samples import MAX_AXES, Modality, Shape, Text, parse_part


class Kept(NamedTuple):
    """Where a drawing begins instead of at noise: flat `latents`, and which of them are to stay as they are."""

    latents: Float[Tensor, "k c"]
    stays: Bool[Tensor, "k 1"] | None


class Rules:
    """The options of a request in the terms of a model. Raises `ValueError` where the two do not go together."""

    def __init__(self, model: Model, options: SamplingOptions):
        self.model, self.options, self.vocabulary = model, options, model.vocabulary
        own = model.odeint_kwargs
        tolerances = {name: own[name] for name in ("atol", "rtol") if name in own}
        self.solver = dict(own) if options.odeint_kwargs is None else tolerances | dict(options.odeint_kwargs)
        check_method(self.solver)
        default = 3.0 if model.prob_uncond > 0 else 1.0
        self.cfg_scale = default if options.cfg_scale is None else float(options.cfg_scale)
        self.fixed = None if options.fixed_modality_shape is None else tuple(map(int, options.fixed_modality_shape))
        axes = [_axes(io, self.fixed) for io in model.modalities]
        if not any(axes):
            raise ValueError(f"fixed_modality_shape {self.fixed}: no modality of this model can have that shape")
        if options.allowed_modalities is not None:
            allowed = check_types(options.allowed_modalities, len(axes), "allowed_modalities")
            axes = [counts if i in allowed else set() for i, counts in enumerate(axes)]
        counts = tuple(map(frozenset, axes))
        self.grammar = grammar_of(self.vocabulary, counts, options.max_modality_tokens, self.fixed)
        self.stop_ids = self._checked_stop_ids()
        self.init = None if options.init_modality is None else self._encoded(options.init_modality)
        self.init_noise = None if options.init_modality_noise is None else options.init_modality_noise.clone()
        self.kept = self._kept()
        self.plan = self._plan()
        self._check_noise()
        self._check_times()

    # what is written

    def written_shape(self, modality: int, written: str) -> Shape | None:
        """What was written, or else the default shape if that is to serve; None for no shape that can be drawn."""
        if self.fixed is not None:
            return self.fixed
        io = self.model.modalities[modality]
        shape = io.spec.parse_shape(written)
        if shape is not None and prod(shape) <= self.options.max_modality_tokens and io.supports(shape):
            return shape
        return self.shape_of(modality, None) if self.model.fallback_to_default_shape_if_invalid else None

    def shape_of(self, modality: int, shape: Shape | None, name: str = "") -> Shape:
        """The shape asked for, or the fixed or default one. Raises `ValueError` for one that cannot be drawn."""
        io, where = self.model.modalities[modality], f"{name}: " if name else ""
        if shape is not None and self.fixed is not None and shape != self.fixed:
            raise ValueError(f"{where}the shape {shape} is asked for, and fixed_modality_shape is {self.fixed}")
        asked = self.fixed if shape is None else shape
        default = () if io.spec.num_dim == 0 else io.spec.default_shape
        shape = default if asked is None else asked
        if shape is None:
            raise ValueError(
                f"{where}modality {modality} has no default shape: give one here (fixed_modality_shape), or set "
                "modality_default_shape"
            )
        if not io.supports(shape):
            axes = " or ".join(map(str, sorted(_axes(io, None))))
            reason = "the modules around the transformer do not take it"
            raise ValueError(
                f"{where}modality {modality} cannot have the shape {shape}: "
                f"{reason if len(shape) in _axes(io, None) else f'it has {axes} axes'}"
            )
        return shape

    def num_latent_tokens(self, modality: int, shape: Shape) -> int:
        return prod(self.model.modalities[modality].token_shape(shape))

    def has_room(self, length: int, modality: int, shape: Shape) -> bool:
        """Whether the latents, and what closes them, come within `max_length`."""
        return length + self.num_latent_tokens(modality, shape) + 1 <= self.options.max_length

    # what is drawn

    def times(self, kept: Kept | None) -> list[float]:
        """The ends of all intervals, from where the flow starts to 1."""
        uniform = torch.linspace(0, 1, self.options.modality_steps + 1, dtype=torch.float64, device="cpu")
        start = 0.0 if kept is None else 1 - self.options.strength
        return (start + (1 - start) * shift_times(uniform, self.options.time_shift)).tolist()

    @cached_property
    def solver_key(self) -> str:
        """Drawings of equal solvers take their steps together."""
        return repr(sorted(self.solver.items()))

    def noise(self, modality: int, shape: Shape, generator: torch.Generator) -> Float[Tensor, "k c"]:
        """The noise that a modality starts from, in single precision at least."""
        rows, channels = prod(shape), self.model.modalities[modality].spec.dim_latent
        noise = self.init_noise
        if noise is None:
            noise = torch.randn(
                rows, channels, generator=generator, device=generator.device, dtype=self.model.precision
            )
        if noise.shape[0] < rows or noise.shape[1] < channels:
            raise ValueError(
                f"init_modality_noise needs {rows} rows and {channels} channels for shape {shape} of modality "
                f"{modality}, got {tuple(noise.shape)}"
            )
        return noise[:rows, :channels].to(self.model.device, self.model.precision)

    def _kept(self) -> Kept | None:
        """What the first modality keeps of `init_modality`."""
        if self.init is None:
            return None
        latents, mask = self.init.tensor.reshape(-1, self.init.tensor.shape[-1]), self.options.modality_mask
        return Kept(latents, None if mask is None else ~mask.reshape(-1, 1).to(self.model.device))

    def show(self, modality: int, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """One modality as users see it."""
        raw = self.options.return_unprocessed_modalities
        [[(_, shown)]] = self.model.decode([[Modality(modality, latents.to(self.model.dtype, copy=True))]], raw=raw)
        return shown

    # made ready

    def _checked_stop_ids(self) -> frozenset[int]:
        ids = self.options.stop_ids
        if not isinstance(ids, (list, tuple, set, frozenset)):
            raise TypeError(f"stop_ids must be a list of ids, got {ids!r}")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"stop_ids must be ints, got {token!r}")
            if not 0 <= token < self.vocabulary.num_text:
                last = self.vocabulary.num_text - 1
                expected = f"expected 0 to {last}" if last >= 0 else "this model has no text"
                raise ValueError(f"stop_ids: {token} is no id of text, {expected}")
        return frozenset(ids)

    def _encoded(self, init: Any) -> Modality:
        """`init_modality` as latents; checks the mask against them."""
        given = parse_part(init, len(self.model.modalities), "init_modality")
        if isinstance(given, Text):
            raise TypeError("init_modality must be floating point, or (type, tensor): it is a modality, not text")
        [[encoded]] = self.model.encode([[given._replace(tensor=given.tensor.clone())]], "init_modality, sample")
        assert isinstance(encoded, Modality)
        mask = self.options.modality_mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"modality_mask must be a bool tensor, True where to draw anew, got {came}")
        if mask is not None and tuple(mask.shape) != encoded.shape:
            raise ValueError(
                f"modality_mask must have the axial shape of the latents, {encoded.shape}, got {tuple(mask.shape)}"
            )
        return encoded

    def _plan(self) -> Plan:
        options, count = self.options, len(self.model.modalities)
        if options.plan is not None and options.force_modality_at_start is not None:
            raise ValueError("give force_modality_at_start or a plan that begins with that modality, not both")
        if options.plan is not None:
            plan = parse_plan(options.plan, count, self.shape_of, first=self.init)
        elif options.force_modality_at_start is not None:
            plan = forced_plan(options.force_modality_at_start, count, self.shape_of, first=self.init)
        elif self.init is not None:
            name, (modality, shape) = "init_modality", (self.init.type, self.init.shape)
            plan = Plan((ModalityPart(modality, self.shape_of(modality, shape, name)),), name=name)
        else:
            return Plan()
        if self.init is not None and plan.parts[0] != (expected := ModalityPart(self.init.type, self.init.shape)):
            raise ValueError(
                f"init_modality comes right behind the prompt, as {tuple(expected)}, but {tuple(plan.parts[0])} is "
                "asked for there"
            )
        return plan

    def _check_times(self) -> None:
        """Times so close that the solver could not tell them apart."""
        for kept in (None, self.kept):
            if not (
                torch.tensor(self.times(kept), dtype=torch.float64, device="cpu").to(self.model.precision).diff() > 0
            ).all():
                options = self.options
                raise ValueError(
                    f"modality_steps={options.modality_steps}, time_shift={options.time_shift} and strength="
                    f"{options.strength} leave intervals too short for {self.model.precision}"
                )

    def _check_noise(self) -> None:
        """Noise that is too small for what is planned is said so before anything is computed."""
        for part in self.plan.parts:
            if isinstance(part, ModalityPart) and self.init_noise is not None:
                self.noise(part.type, part.shape, torch.Generator())


def _axes(io: Any, fixed: Shape | None) -> set[int]:
    """How many axes a modality can have; none where it cannot have the one shape that is to be."""
    if fixed is not None:
        return {len(fixed)} if io.supports(fixed) else set()
    return set(range(MAX_AXES + 1)) if io.spec.num_dim is None else {io.spec.num_dim}
