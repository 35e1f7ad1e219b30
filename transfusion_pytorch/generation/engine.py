"""The sampler: any number of prompts at once, each somewhere between writing and drawing.

A turn of the loop lets every sample that writes choose one token, and every sample that draws take one step of the
solver, whatever their types and shapes.

s drawings, r rows that write, v vocabulary, b samples, n and m tokens.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.flow.guidance import guided
from transfusion_pytorch.flow.solver import check_method, integrate, is_single_step
from transfusion_pytorch.generation.context import CachedContext, Context, Lane, Model, Plan, RecomputeContext
from transfusion_pytorch.generation.grammar import Grammar
from transfusion_pytorch.generation.requests import (
    SamplingOptions,
    bare_and_opened,
    forced_modality,
    parse_prompt,
    without_text,
)
from transfusion_pytorch.generation.state import Drawing, Phase, Sampled, SampleState
from transfusion_pytorch.generation.text import sample_tokens
from transfusion_pytorch.sequence.samples import MAX_AXES, Modality, Piece, Shape, Text, mark, merge_texts


class Engine:
    """Samples from a model with one set of options. Stateless between calls."""

    def __init__(self, model: Model, options: SamplingOptions):
        self.model, self.options, self.vocabulary = model, options, model.vocabulary
        self.solver = dict(model.odeint_kwargs if options.odeint_kwargs is None else options.odeint_kwargs)
        check_method(self.solver)
        self.fixed = None if options.fixed_modality_shape is None else tuple(options.fixed_modality_shape)
        axes = [_axes(io, self.fixed) for io in model.modalities]
        if not any(axes):
            raise ValueError(f"fixed_modality_shape {self.fixed}: no modality of this model can have that shape")
        self.grammar = Grammar(self.vocabulary, axes, most=options.max_modality_tokens, fixed_shape=self.fixed)
        self._plan: tuple[Any, Plan] | None = None

    # mixed samples

    def sample(self, prompts: Sequence[Any]) -> list[Sampled]:
        """Continues every prompt until it ends its sentence or comes to `max_length`."""
        forced = forced_modality(self.options.force_modality_at_start, len(self.model.modalities), self.fixed)
        parsed = [parse_prompt(prompt, self.vocabulary, f"prompt {i}") for i, prompt in enumerate(prompts)]
        states = self._start(self.model.encode(parsed, "prompt"), forced)
        context = self._context(len(prompts) * (1 if self.options.cfg_scale == 1 else 2))
        while active := [state for state in states if state.phase is not Phase.DONE]:
            self._turn(active, context)
        return [
            Sampled(merge_texts(state.pieces), [piece for piece in prompt if isinstance(piece, Modality)])
            for state, prompt in zip(states, parsed, strict=True)
        ]

    def _turn(self, states: Sequence[SampleState], context: Context) -> None:
        features = self._read_pending(states, context)
        writing = [state for state in states if state.phase is Phase.WRITING]
        drawings = [state.drawing for state in states if state.drawing is not None]
        if writing:
            self._write(writing, self.model.logits(torch.stack([features[state.lane.row] for state in writing])))
        if drawings:
            self._draw(drawings, context)
            for state in states:
                if state.drawing is not None and state.drawing.step == self.options.modality_steps:
                    self._finish_drawing(state, state.drawing)

    def _read_pending(self, states: Sequence[SampleState], context: Context) -> dict[int, Tensor]:
        """Reads what has not been read yet, and returns the features of each lane's last token by row."""
        lanes = [lane for state in states for lane in state.lanes if lane.pending]
        if not lanes:
            return {}
        lanes.sort(key=lambda lane: (self._num_tokens(lane.pending), lane.row))  # one length is one plain batch
        return dict(zip([lane.row for lane in lanes], context.advance(lanes), strict=True))

    # starting

    def _start(self, prompts: Sequence[Sequence[Piece]], forced: tuple[int, Shape | None] | None) -> list[SampleState]:
        states = []
        for i, prompt in enumerate(prompts):
            where, state = f"prompt {i}", SampleState(Lane(row=i), guide_row=len(prompts) + i)
            bare, opened = bare_and_opened(prompt, self.vocabulary, where)
            for piece in mark(bare, self.vocabulary, complete=False):
                self._append(state, piece)
            if (length := state.length + len(opened)) > self.options.max_length:
                raise ValueError(
                    f"{where} has {length} tokens with its markers, more than max_length={self.options.max_length}"
                )
            self._replay(state, opened, where)
            if forced is not None:
                if opened:
                    raise ValueError(f"force_modality_at_start: {where} opens a modality at its end already")
                self._force(state, *forced)
            elif state.length == self.options.max_length:
                state.phase = Phase.DONE
            states.append(state)
        return states

    def _replay(self, state: SampleState, opened: Sequence[int], where: str) -> None:
        """Takes a prompt that ends inside the markers of a modality to where it stopped."""
        for token in opened:
            if state.phase is not Phase.WRITING or not self.grammar.allowed(state.opening)[token]:
                shapes = f"of at most max_modality_tokens={self.options.max_modality_tokens} latents"
                raise ValueError(
                    f"{where}: the markers at its end, {list(opened)}, do not open a modality of a shape it can have, "
                    f"{shapes if self.fixed is None else f'which is fixed_modality_shape={self.fixed}'}"
                )
            self._accept(state, token)

    def _force(self, state: SampleState, modality: int, shape: Shape | None) -> None:
        shape = self._shape_or_default(modality, shape)
        self._append(state, Text(self.vocabulary.opening(modality, shape)))
        if not self._has_room(state, modality, shape):
            raise ValueError(
                f"force_modality_at_start: a modality of shape {shape} does not fit behind {state.length} tokens, "
                f"max_length is {self.options.max_length}"
            )
        self._start_drawing(state, modality, shape)

    # writing

    def _write(self, states: Sequence[SampleState], logits: Float[Tensor, "r v"]) -> None:
        tokens = sample_tokens(
            logits,
            torch.stack([self.grammar.allowed(state.opening) for state in states]).to(logits.device),
            temperature=self.options.text_temperature,
            min_p=self.options.text_min_p,
        )
        for state, token in zip(states, tokens.tolist(), strict=True):
            self._accept(state, token)

    def _accept(self, state: SampleState, token: int) -> None:
        opening, state.opening = state.opening, self.grammar.advance(state.opening, token)
        self._append(state, Text(torch.tensor([token])))
        if token in self.vocabulary.som:
            modality = self.vocabulary.som.index(token)
            shape = self._written_shape(modality, opening or "")
            if shape is not None and self._has_room(state, modality, shape):
                self._start_drawing(state, modality, shape)
            else:
                state.phase = Phase.DONE
        elif token == self.vocabulary.eos or state.length == self.options.max_length:
            state.phase = Phase.DONE

    def _append(self, state: SampleState, piece: Piece) -> None:
        state.pieces.append(piece)
        state.length += self._num_tokens([piece])
        state.lane.pending.append(piece)
        if state.unconditional is not None:
            state.unconditional.pending += without_text([piece], self.vocabulary)

    def _num_tokens(self, pieces: Iterable[Piece]) -> int:
        return sum(
            len(piece.ids) if isinstance(piece, Text) else self._num_latent_tokens(piece.type, piece.shape)
            for piece in pieces
        )

    def _num_latent_tokens(self, modality: int, shape: Shape) -> int:
        return prod(self.model.modalities[modality].token_shape(shape))

    def _has_room(self, state: SampleState, modality: int, shape: Shape) -> bool:
        """Whether the latents, and what closes them, come within `max_length`."""
        return state.length + self._num_latent_tokens(modality, shape) + 1 <= self.options.max_length

    def _written_shape(self, modality: int, written: str) -> Shape | None:
        """What was written, or else the default shape if that is to serve; None for no shape that can be drawn."""
        if self.fixed is not None:
            return self.fixed
        io = self.model.modalities[modality]
        shape = io.spec.parse_shape(written)
        if shape is not None and prod(shape) <= self.options.max_modality_tokens and io.supports(shape):
            return shape
        if self.model.fallback_to_default_shape_if_invalid:
            return self._shape_or_default(modality, None)
        return None

    def _shape_or_default(self, modality: int, shape: Shape | None) -> Shape:
        io = self.model.modalities[modality]
        shape = io.spec.default_shape if shape is None else shape
        if shape is None:
            raise ValueError(
                f"modality {modality} has no default shape: give one here (fixed_modality_shape), or set "
                "modality_default_shape"
            )
        if not io.supports(tuple(shape)):
            axes = " or ".join(map(str, sorted(_axes(io, None))))
            reason = "the modules around the transformer do not take it"
            raise ValueError(
                f"modality {modality} cannot have the shape {tuple(shape)}: "
                f"{reason if len(shape) in _axes(io, None) else f'it has {axes} axes'}"
            )
        return tuple(shape)

    # drawing

    def _start_drawing(self, state: SampleState, modality: int, shape: Shape) -> None:
        has_text = any(
            isinstance(piece, Text) and (piece.ids < self.vocabulary.num_text).any() for piece in state.pieces
        )
        if self.options.cfg_scale != 1 and has_text and state.unconditional is None:
            state.unconditional = Lane(state.guide_row, pending=without_text(state.pieces, self.vocabulary))
        state.phase = Phase.DRAWING
        state.drawing = self._blank(modality, shape, state.lane, state.unconditional)

    def _blank(self, modality: int, shape: Shape, lane: Lane, unconditional: Lane | None = None) -> Drawing:
        """A drawing that is nothing but noise."""
        rows, channels = prod(shape), self.model.modalities[modality].spec.dim_latent
        noise = self.options.init_modality_noise
        if noise is None:
            noise = torch.randn(rows, channels, device=self.model.device, dtype=self.model.dtype)
        if noise.shape[0] < rows or noise.shape[1] < channels:
            raise ValueError(
                f"init_modality_noise needs {rows} rows and {channels} channels for shape {shape} of modality "
                f"{modality}, got {tuple(noise.shape)}"
            )
        x = noise[:rows, :channels].to(self.model.device, self.model.dtype)
        return Drawing(modality, shape, x, lane, unconditional)

    def _finish_drawing(self, state: SampleState, drawing: Drawing) -> None:
        """The clean latents are read, and kept, like anything else that has been written."""
        state.drawing = None
        self._append(state, drawing.as_piece())
        self._append(state, Text(self.vocabulary.closing(drawing.type)))
        state.phase = Phase.DONE if state.length == self.options.max_length else Phase.WRITING

    def _draw(self, drawings: Sequence[Drawing], context: Context) -> None:
        """One step of the solver for all together, or, for a method that chooses its own steps, all of them one by
        one.
        """
        if is_single_step(self.solver):
            self._step(drawings, context, 1)
            return
        for drawing in drawings:
            self._step([drawing], context, self.options.modality_steps)

    def _step(self, drawings: Sequence[Drawing], context: Context, intervals: int) -> None:
        """Moves every drawing on by so many intervals, all in one vector whose own time runs from 0 to 1."""
        steps, sizes = self.options.modality_steps, [drawing.x.numel() for drawing in drawings]
        start = [drawing.step / steps for drawing in drawings]
        start = torch.tensor(start, device=self.model.device, dtype=self.model.dtype)
        span = intervals / steps
        plan, guided_drawings = self._planned(drawings, context)

        def velocity(time: Tensor, flat: Tensor) -> Tensor:
            x = [part.view_as(drawing.x) for part, drawing in zip(flat.split(sizes), drawings, strict=True)]
            velocities = self._velocities(context, plan, guided_drawings, x, start + time * span)
            return span * torch.cat([part.flatten() for part in velocities])

        x = torch.cat([drawing.x.flatten() for drawing in drawings])
        after = integrate(velocity, x, steps=intervals, options=self.solver)
        for drawing, part in zip(drawings, after.split(sizes), strict=True):
            drawing.x = part.view_as(drawing.x)
            drawing.step += intervals

    def _planned(self, drawings: Sequence[Drawing], context: Context) -> tuple[Plan, list[int]]:
        """The stream of all lanes that draw, conditional ones first, made once for as long as they stay the same; and
        which of the drawings are guided.
        """
        pairs = [(i, drawing.unconditional) for i, drawing in enumerate(drawings) if drawing.unconditional is not None]
        guided_drawings = [i for i, _ in pairs]
        lanes = [drawing.lane for drawing in drawings] + [lane for _, lane in pairs]
        key = (context, *((lane.row, lane.past) for lane in lanes))
        if self._plan is None or self._plan[0] != key:
            spans = [drawings[i].as_piece() for i in [*range(len(drawings)), *guided_drawings]]
            self._plan = (key, context.plan(lanes, spans))
        return self._plan[1], guided_drawings

    def _velocities(
        self, context: Context, plan: Plan, guided_drawings: list[int], x: list[Tensor], times: Float[Tensor, " s"]
    ) -> list[Tensor]:
        again = [x[i] for i in guided_drawings]
        every = context.velocities(plan, x + again, torch.cat((times, times[guided_drawings])))
        conditional, unconditional = every[: len(x)], every[len(x) :]
        for i, without in zip(guided_drawings, unconditional, strict=True):
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
        shape = self._shape_or_default(modality, self.fixed)
        drawings = [self._blank(modality, shape, Lane(row)) for row in range(batch_size)]
        context = RecomputeContext(self.model, batch_size)  # there is nothing to remember
        while drawings[0].step < self.options.modality_steps:
            self._draw(drawings, context)
        return [drawing.as_piece() for drawing in drawings]

    def _context(self, rows: int) -> Context:
        return (CachedContext if self.options.cache_kv else RecomputeContext)(self.model, rows)


def _axes(io: Any, fixed: Shape | None) -> set[int]:
    """How many axes a modality can have; none where it cannot have the one shape that is to be."""
    if fixed is not None:
        return {len(fixed)} if io.supports(fixed) else set()
    return set(range(MAX_AXES + 1)) if io.spec.num_dim is None else {io.spec.num_dim}
