"""The sampler: any number of prompts at once, each somewhere between writing and drawing.

A turn of the loop lets every sample that writes choose one token, and every sample that draws take one step of the
solver, whatever their types and shapes.

k latents of a span, c their channels, v vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchdiffeq import odeint

from transfusion_pytorch.flow.guidance import guided
from transfusion_pytorch.flow.solver import check_method, integrate, is_single_step
from transfusion_pytorch.generation.context import CachedContext, Context, Lane, Model, Plan, RecomputeContext
from transfusion_pytorch.generation.grammar import Grammar, GrammarState
from transfusion_pytorch.generation.requests import SamplingOptions, forced_modality, parse_prompt, without_text
from transfusion_pytorch.generation.text import sample_tokens
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape, Text, mark, merge_texts
from transfusion_pytorch.sequence.vocabulary import format_shape


class Phase(Enum):
    WRITING = auto()
    DRAWING = auto()
    DONE = auto()


@dataclass
class Drawing:
    """A modality on its way from noise to data: `x` are its flat latents `(k, c)` after `step` intervals."""

    type: int
    shape: Shape
    x: Float[Tensor, "k c"]
    step: int = 0

    def as_piece(self) -> Modality:
        return Modality(self.type, self.x.unflatten(0, self.shape) if self.shape else self.x[0])


@dataclass
class SampleState:
    """One sample in the making.

    - `pieces`: the sample so far, markers included
    - `length`: its tokens
    - `lane`: the sample as the transformer reads it; `unconditional`: the same without its text, once it is guided,
      in the row of the cache kept for that (`guide_row`)
    - `grammar`: what may be written next; `drawing`: what is being drawn
    """

    lane: Lane
    guide_row: int = 0
    phase: Phase = Phase.WRITING
    pieces: list[Piece] = field(default_factory=list)
    length: int = 0
    grammar: GrammarState = field(default_factory=GrammarState)
    drawing: Drawing | None = None
    unconditional: Lane | None = None

    @property
    def lanes(self) -> list[Lane]:
        return [self.lane] if self.unconditional is None else [self.lane, self.unconditional]


class Engine:
    """Samples from a model with one set of options. Stateless between calls."""

    def __init__(self, model: Model, options: SamplingOptions):
        self.model, self.options, self.vocabulary = model, options, model.vocabulary
        self.solver = dict(model.odeint_kwargs if options.odeint_kwargs is None else options.odeint_kwargs)
        check_method(self.solver)
        num_dims = [io.spec.num_dim for io in model.modalities]
        self.grammar = Grammar(self.vocabulary, num_dims, fixed_shape=options.fixed_modality_shape)
        self._plan: tuple[Any, Plan] | None = None

    # mixed samples

    def sample(self, prompts: Sequence[Any]) -> list[list[Piece]]:
        """Continues every prompt until it ends its sentence or reaches `max_length`: marked samples, latents
        channel-last.
        """
        forced = forced_modality(
            self.options.force_modality_at_start, len(self.model.modalities), self.options.fixed_modality_shape
        )
        context = self._context(2 * len(prompts))
        states = self._start(prompts, forced)
        while active := [state for state in states if state.phase is not Phase.DONE]:
            self._turn(active, context)
        return [merge_texts(state.pieces) for state in states]

    def _turn(self, states: Sequence[SampleState], context: Context) -> None:
        features = self._read_pending(states, context)
        writing = [state for state in states if state.phase is Phase.WRITING]
        drawing = [state for state in states if state.phase is Phase.DRAWING]
        if writing:
            self._write(writing, self.model.logits(torch.stack([features[state.lane.row] for state in writing])))
        if drawing:
            self._draw(drawing, context)
            for state in drawing:
                if state.drawing is not None and state.drawing.step == self.options.modality_steps:
                    self._finish_drawing(state)

    def _read_pending(self, states: Sequence[SampleState], context: Context) -> dict[int, Tensor]:
        """Reads what every lane has not read yet, and returns the features of its last token by row."""
        lanes = [lane for state in states for lane in state.lanes if lane.pending]
        if not lanes:
            return {}
        lanes.sort(key=lambda lane: (sum(map(_size, lane.pending)), lane.row))
        return dict(zip([lane.row for lane in lanes], context.advance(lanes), strict=True))

    # starting

    def _start(self, prompts: Sequence[Any], forced: tuple[int, Shape | None] | None) -> list[SampleState]:
        parsed = [parse_prompt(prompt, self.vocabulary, f"prompt {i}") for i, prompt in enumerate(prompts)]
        encoded = self.model.encode([bare for bare, _ in parsed], "prompt")
        states = []
        for i, (bare, (_, opened)) in enumerate(zip(encoded, parsed, strict=True)):
            state = SampleState(Lane(row=i), guide_row=len(prompts) + i)
            for piece in mark(bare, self.vocabulary, complete=False):
                self._append(state, piece)
            if state.length > self.options.max_length:
                raise ValueError(
                    f"prompt {i} has {state.length} tokens with its markers, "
                    f"more than max_length={self.options.max_length}"
                )
            self._replay(state, opened, f"prompt {i}")
            if forced is not None and state.phase is Phase.WRITING:
                self._force(state, *forced)
            if state.length >= self.options.max_length and state.phase is Phase.WRITING:
                state.phase = Phase.DONE
            states.append(state)
        return states

    def _replay(self, state: SampleState, opened: Sequence[int], where: str) -> None:
        """Takes a prompt that ends inside the markers of a modality to where it stopped."""
        for token in opened:
            if not self.grammar.allowed(state.grammar, self._limit(state))[token]:
                raise ValueError(f"{where}: the modality it opens at its end, {list(opened)}, is not of a valid shape")
            self._accept(state, token)

    def _force(self, state: SampleState, modality: int, shape: Shape | None) -> None:
        if state.grammar.written is not None:
            raise ValueError("force_modality_at_start: a prompt opens a modality at its end already")
        shape = self._shape_or_default(modality, shape)
        self._append(state, Text(self.vocabulary.opening(modality, shape)))
        self._start_drawing(state, modality, shape)

    # writing

    def _write(self, states: Sequence[SampleState], logits: Float[Tensor, "r v"]) -> None:
        allowed = torch.stack([self.grammar.allowed(state.grammar, self._limit(state)) for state in states])
        tokens = sample_tokens(
            logits,
            allowed.to(logits.device),
            temperature=self.options.text_temperature,
            min_p=self.options.text_min_p,
        )
        for state, token in zip(states, tokens.tolist(), strict=True):
            self._accept(state, token)

    def _accept(self, state: SampleState, token: int) -> None:
        before = state.grammar
        state.grammar = self.grammar.advance(before, token, self._limit(state))
        self._append(state, Text(torch.tensor([token])))
        if token in self.vocabulary.som:
            modality = self.vocabulary.som.index(token)
            self._start_drawing(state, modality, self._written_shape(modality, before.written or ""))
        elif token == self.vocabulary.eos or state.length >= self.options.max_length:
            state.phase = Phase.DONE

    def _append(self, state: SampleState, piece: Piece) -> None:
        state.pieces.append(piece)
        state.length += self._num_tokens(piece)
        state.lane.pending.append(piece)
        if state.unconditional is not None:
            state.unconditional.pending += without_text([piece], self.vocabulary)

    def _num_tokens(self, piece: Piece) -> int:
        if isinstance(piece, Text):
            return len(piece.ids)
        return prod(self.model.modalities[piece.type].token_shape(piece.shape))

    def _limit(self, state: SampleState) -> int:
        return self.grammar.limit(self.options.max_length - state.length, self.options.max_modality_tokens)

    def _written_shape(self, modality: int, written: str) -> Shape:
        spec = self.model.modalities[modality].spec
        shape = spec.parse_shape(written)
        fixed = self.options.fixed_modality_shape
        if fixed is not None and written == format_shape(fixed):
            return tuple(fixed)
        if shape is not None and self.model.modalities[modality].supports(shape):
            return shape
        if self.model.fallback_to_default_shape_if_invalid:
            return self._shape_or_default(modality, None)
        raise ValueError(
            f"modality {modality}: {written!r} was written, no shape it can have; set fixed_modality_shape, or "
            "modality_default_shape and fallback_to_default_shape_if_invalid=True"
        )

    def _shape_or_default(self, modality: int, shape: Shape | None) -> Shape:
        io = self.model.modalities[modality]
        shape = io.spec.default_shape if shape is None else shape
        if shape is None:
            raise ValueError(
                f"modality {modality} has no default shape: give one here (fixed_modality_shape), or set "
                "modality_default_shape"
            )
        if not io.supports(tuple(shape)):
            raise ValueError(f"modality {modality} cannot have the shape {tuple(shape)}, it has {io.spec.num_dim} axes")
        return tuple(shape)

    # drawing

    def _start_drawing(self, state: SampleState, modality: int, shape: Shape) -> None:
        io = self.model.modalities[modality]
        if state.length + prod(io.token_shape(shape)) + 1 > self.options.max_length:
            raise ValueError(
                f"a modality of shape {shape} does not fit behind {state.length} tokens, max_length is "
                f"{self.options.max_length}"
            )
        state.phase = Phase.DRAWING
        state.drawing = Drawing(modality, shape, self._noise(prod(shape), io.spec.dim_latent))
        has_text = any(
            isinstance(piece, Text) and (piece.ids < self.vocabulary.num_text).any() for piece in state.pieces
        )
        if self.options.cfg_scale != 1 and has_text and state.unconditional is None:
            pieces = without_text(state.pieces, self.vocabulary)
            state.unconditional = Lane(state.guide_row, pending=pieces)

    def _noise(self, rows: int, channels: int) -> Float[Tensor, "k c"]:
        given = self.options.init_modality_noise
        if given is None:
            return torch.randn(rows, channels, device=self.model.device, dtype=self.model.dtype)
        if given.shape[0] < rows or given.shape[1] < channels:
            raise ValueError(f"init_modality_noise needs {rows} rows and {channels} channels, got {tuple(given.shape)}")
        return given[:rows, :channels].to(self.model.device, self.model.dtype)

    def _finish_drawing(self, state: SampleState) -> None:
        """The clean latents are read, and kept, like anything else that has been written."""
        drawing, state.drawing = state.drawing, None
        self._append(state, drawing.as_piece())
        self._append(state, Text(self.vocabulary.closing(drawing.type)))
        state.phase = Phase.DONE if state.length >= self.options.max_length else Phase.WRITING

    def _draw(self, states: Sequence[SampleState], context: Context) -> None:
        """One step of the solver for all together, or, for a method that chooses its own steps, all of them one by
        one.
        """
        steps = self.options.modality_steps
        if is_single_step(self.solver):
            self._step(states, context, 1 / steps, self._one_step)
            for state in states:
                state.drawing.step += 1
            return
        for state in states:
            self._step([state], context, 1.0, self._all_steps)
            state.drawing.step = steps

    def _one_step(self, velocity: Callable, x: Tensor) -> Tensor:
        return odeint(velocity, x, torch.tensor([0.0, 1.0], device=x.device, dtype=x.dtype), **self.solver)[-1]

    def _all_steps(self, velocity: Callable, x: Tensor) -> Tensor:
        return integrate(velocity, x, steps=self.options.modality_steps, options=self.solver)

    def _step(self, states: Sequence[SampleState], context: Context, span: float, solve: Callable) -> None:
        """Moves every drawing on by `span` of its way, all in one vector whose own time runs from 0 to 1."""
        drawings = [state.drawing for state in states]
        start = torch.tensor([drawing.step / self.options.modality_steps for drawing in drawings])
        start = start.to(self.model.device, self.model.dtype)
        sizes = [drawing.x.numel() for drawing in drawings]
        plan, lanes_of = self._planned(states, context)

        def velocity(time: Tensor, flat: Tensor) -> Tensor:
            x = [part.view_as(drawing.x) for part, drawing in zip(flat.split(sizes), drawings, strict=True)]
            velocities = self._velocities(context, plan, lanes_of, x, start + time * span)
            return span * torch.cat([part.flatten() for part in velocities])

        after = solve(velocity, torch.cat([drawing.x.flatten() for drawing in drawings]))
        for drawing, part in zip(drawings, after.split(sizes), strict=True):
            drawing.x = part.view_as(drawing.x)

    def _planned(self, states: Sequence[SampleState], context: Context) -> tuple[Plan, list[int]]:
        """The stream of all lanes that draw, conditional ones first, made once for as long as they stay the same."""
        guided_states = [i for i, state in enumerate(states) if state.unconditional is not None]
        lanes = [state.lane for state in states] + [states[i].unconditional for i in guided_states]
        key = tuple((lane.row, lane.past) for lane in lanes)
        if self._plan is None or self._plan[0] != key:
            spans = [states[i].drawing.as_piece() for i in [*range(len(states)), *guided_states]]
            self._plan = (key, context.plan(lanes, spans))
        return self._plan[1], guided_states

    def _velocities(
        self, context: Context, plan: Plan, guided_states: list[int], x: list[Tensor], times: Float[Tensor, " s"]
    ) -> list[Tensor]:
        again = [x[i] for i in guided_states]
        every = context.velocities(plan, x + again, torch.cat((times, times[guided_states])))
        conditional, unconditional = every[: len(x)], every[len(x) :]
        for i, without in zip(guided_states, unconditional, strict=True):
            conditional[i] = guided(conditional[i], without, self.options.cfg_scale)
        return conditional

    # one kind alone

    def write_only(self, prompt: Int[Tensor, "b n"], num_tokens: int) -> Int[Tensor, "b m"]:
        """Continues plain text by `num_tokens` ids of text, without markers."""
        context = self._context(len(prompt))
        lanes = [Lane(row, pending=[Text(ids)]) for row, ids in enumerate(prompt.cpu())]
        allowed = torch.zeros(1, self.vocabulary.num_logits, dtype=torch.bool, device=self.model.device)
        allowed[:, : self.vocabulary.num_text] = True
        written = []
        for _ in range(num_tokens):
            tokens = sample_tokens(
                self.model.logits(context.advance(lanes)),
                allowed,
                temperature=self.options.text_temperature,
                min_p=self.options.text_min_p,
            )
            written.append(tokens)
            for lane, token in zip(lanes, tokens.cpu(), strict=True):
                lane.pending = [Text(token[None])]
        return torch.stack(written, dim=1) if written else prompt[:, :0]

    def draw_only(self, batch_size: int, modality: int) -> list[Modality]:
        """Draws `batch_size` instances of a modality without any text around them."""
        io = self.model.modalities[modality]
        shape = self._shape_or_default(modality, self.options.fixed_modality_shape)
        states = [
            SampleState(
                Lane(row),
                phase=Phase.DRAWING,
                drawing=Drawing(modality, shape, self._noise(prod(shape), io.spec.dim_latent)),
            )
            for row in range(batch_size)
        ]
        context = RecomputeContext(self.model, batch_size)  # there is nothing to remember
        while states[0].drawing.step < self.options.modality_steps:
            self._draw(states, context)
        return [state.drawing.as_piece() for state in states]

    def _context(self, rows: int) -> Context:
        return (CachedContext if self.options.cache_kv else RecomputeContext)(self.model, rows)


def _size(piece: Piece) -> int:
    return len(piece.ids) if isinstance(piece, Text) else piece.tensor.numel()
