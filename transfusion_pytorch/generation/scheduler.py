"""Continuous batching: samples that end leave, waiting ones enter, and those that write and those that draw all go on.

r rows that write, d model.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from transfusion_pytorch.generation.context import CachedContext, Context, Lane, Model, RecomputeContext
from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.generation.joint_solver import JointSolver
from transfusion_pytorch.generation.state import Phase, SampleState
from transfusion_pytorch.generation.text import NO_CHOICE, sample_tokens


class Scheduler:
    """Runs samples through a model, at most `max_batch` at once.

    In a turn, every sample that writes chooses one token, and every sample that draws takes one step of its solver,
    whatever their types and shapes. What a sample becomes does not depend on the others, and one that fails ends alone.
    """

    def __init__(self, model: Model, *, max_batch: int, cache_kv: bool):
        self.model, self.max_batch = model, max_batch
        can_cache = hasattr(model.transformer, "create_cache")  # a user's own trunk may not have one
        self.context: Context = (CachedContext if cache_kv and can_cache else RecomputeContext)(model)
        self.solver = JointSolver(model, self.context)
        self.waiting: deque[SampleState] = deque()
        self.active: list[SampleState] = []
        self.turns = self.tokens_written = self.drawings = 0

    @property
    def is_idle(self) -> bool:
        return not self.active and not self.waiting

    def add(self, states: Sequence[SampleState]) -> None:
        self.waiting.extend(state for state in states if state.phase is not Phase.DONE)

    def cancel(self, states: Sequence[SampleState]) -> None:
        """Stops the work on samples, if there is any left, and frees their places."""
        for state in states:
            if state.phase is not Phase.DONE:
                state.end(EndReason.CANCELLED)
        self.waiting = deque(state for state in self.waiting if state.phase is not Phase.DONE)
        self._part_with_finished()

    def turn(self) -> None:
        """Lets every sample go one step on."""
        self.turns += 1
        self._admit()
        self._step(self.active)
        self._part_with_finished()

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.max_batch:
            self.active.append(self.waiting.popleft())
        if isinstance(self.context, CachedContext):
            self.context.cache.limit = max((state.rules.options.max_length for state in self.active), default=None)

    def _part_with_finished(self) -> None:
        for state in self.active:
            for lane in state.lanes if state.phase is Phase.DONE else ():
                self.context.close(lane)
        self.active = [state for state in self.active if state.phase is not Phase.DONE]

    def _step(self, states: Sequence[SampleState]) -> None:
        self._read({lane: state for state in states for lane in state.to_read})
        writing = [state for state in states if state.phase is Phase.WRITING]
        drawing = [state for state in states if state.phase is Phase.DRAWING]  # what is opened now has yet to be read
        if writing:
            self._write(writing)
        if drawing := [state for state in drawing if state.phase is Phase.DRAWING]:
            self._draw(drawing)

    def _read(self, lanes: Mapping[Lane, SampleState]) -> None:
        """Reads what has not been read yet: all together, or if that fails one by one, so that only those end whose
        fault it is.
        """
        for lane in lanes:
            self.context.open(lane)
        if not lanes:
            return
        try:
            self.context.advance(list(lanes))
        except Exception as error:
            if len(lanes) == 1:
                for state in lanes.values():
                    state.end(EndReason.ERROR, error)
                return
            for lane, state in lanes.items():
                if lane.is_pending and state.phase is not Phase.DONE:
                    self._read({lane: state})

    # writing

    def _write(self, states: Sequence[SampleState]) -> None:
        features = [state.lane.features for state in states if state.lane.features is not None]
        assert len(features) == len(states), "what writes has read"
        logits = self._processed(self.model.logits(torch.stack(features)), states)
        allowed = [state.allowed for state in states]
        same = all(mask is allowed[0] for mask in allowed)
        tokens = sample_tokens(
            logits,
            (allowed[0][None] if same else torch.stack(allowed)).to(logits.device),
            [state.rules.options for state in states],
            [state.uniform() for state in states],
            self._seen(states, logits),
        )
        for state, token in zip(states, tokens, strict=True):
            if state.phase is Phase.DONE:  # a processor of its own failed
                continue
            if token == NO_CHOICE:
                maybe = ", or its logits_processors have ruled all out" if state.rules.options.logits_processors else ""
                message = f"{state.where}: the logits of the next token are not finite{maybe}"
                state.end(EndReason.ERROR, ValueError(message))
                continue
            self.tokens_written += 1
            try:
                state.accept(token)
            except Exception as error:
                state.end(EndReason.ERROR, error)

    def _processed(self, logits: Shaped[Tensor, "r v"], states: Sequence[SampleState]) -> Shaped[Tensor, "r v"]:
        """Logits as the processors of each row leave them. One that raises an error ends its own sample."""
        if not any(state.rules.options.logits_processors for state in states):
            return logits
        rows = list(logits.to(torch.promote_types(logits.dtype, torch.float32)).unbind())
        for i, state in enumerate(states):
            try:
                rows[i] = state.process(rows[i])
            except Exception as error:
                state.end(EndReason.ERROR, error)
        return torch.stack(rows)

    def _seen(self, states: Sequence[SampleState], like: Tensor) -> Tensor | None:
        """The ids that are to be penalised, in any row."""
        if all(state.seen is None for state in states):
            return None
        none = torch.zeros(like.shape[-1], dtype=torch.bool, device="cpu")
        return torch.stack([none if state.seen is None else state.seen for state in states]).to(like.device)

    # drawing

    def _draw(self, states: Sequence[SampleState]) -> None:
        drawings = {state: state.drawing for state in states if state.drawing is not None}
        unfinished = [it for it in drawings.values() if not it.is_done]  # an interrupt may have left others
        errors = dict(self.solver.step(unfinished))
        for state, drawing in drawings.items():
            if drawing in errors:
                state.end(EndReason.ERROR, errors[drawing])
                continue
            if drawing in unfinished:
                state.tell_progress()
            if drawing.is_done:
                self._finish_drawing(state)

    def _finish_drawing(self, state: SampleState) -> None:
        drawing = state.drawing
        assert drawing is not None
        self.drawings += 1
        if drawing.without_all is not None:
            self.context.close(drawing.without_all)
        try:
            state.finish_drawing()
        except Exception as error:
            state.end(EndReason.ERROR, error)
