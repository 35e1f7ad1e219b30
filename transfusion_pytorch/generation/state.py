"""One sample in the making: what it does with each token, between writing and drawing.

v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transfusion_pytorch.generation.context import Lane
from transfusion_pytorch.generation.drawing import Drawing
from transfusion_pytorch.generation.events import (
    DrawingProgress,
    EndReason,
    Event,
    ModalityDone,
    ModalityStarted,
    TextToken,
)
from transfusion_pytorch.generation.plan import ModalityPart, TextPart
from transfusion_pytorch.generation.rules import Rules
from transfusion_pytorch.sequence.prompts import without_text
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape, Text, as_text, merge_texts


class Phase(Enum):
    WRITING = auto()
    DRAWING = auto()
    DONE = auto()


class Sampled(NamedTuple):
    """A marked sample, text and modalities in turn, latents channel-last; and the first of its modalities as the prompt
    gave them.
    """

    pieces: list[Piece]
    given: list[Modality]


@dataclass(eq=False)
class SampleState:
    """One sample, as far as it has come. It knows nothing of the batch, and of the network only what that reads.

    - `rules`, `generator`: what it was asked to be, and the source of its random numbers
    - `where`: its name in error messages; `given`: the modalities of its prompt, as they came
    - `is_framed`: it is a sample with markers, not plain text or a modality alone
    - `is_observed`: someone listens to its `events`
    - `pieces`: the sample so far, markers included, but for the `ids` written behind the last of them; `length` is how
      many tokens that makes, `num_text` how many of those are text
    - `lane`: the sample as the transformer reads it; `without_text`: the same without its text, once that guides
    - `opening`: what it has written of the shape of a modality; `drawing`: the modality that is being drawn
    - `part`: where it stands in its plan; `part_length`: how many ids it has written of the text there
    - `seen`: the text that has come before, where that is to be penalised
    - `reason`, `error`: why it ended
    """

    rules: Rules
    generator: torch.Generator
    where: str = "prompt"
    given: list[Modality] = field(default_factory=list)
    is_framed: bool = True
    is_observed: bool = False
    phase: Phase = Phase.WRITING
    pieces: list[Piece] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    length: int = 0
    num_text: int = 0
    lane: Lane = field(default_factory=Lane)
    without_text: Lane | None = None
    opening: str | None = None
    drawing: Drawing | None = None
    part: int = 0
    part_length: int = 0
    seen: Bool[Tensor, " v"] | None = None
    events: list[Event] = field(default_factory=list)
    reason: EndReason | None = None
    error: Exception | None = None

    # what it is

    @property
    def lanes(self) -> list[Lane]:
        """All that it has the transformer read."""
        without_all = None if self.drawing is None else self.drawing.without_all
        return [lane for lane in (self.lane, self.without_text, without_all) if lane is not None]

    @property
    def to_read(self) -> list[Lane]:
        """What has to be read by now: without text, nothing is read but in order to draw."""
        lanes = self.lanes if self.phase is Phase.DRAWING else [self.lane]
        return [lane for lane in lanes if lane.is_pending]

    @property
    def allowed(self) -> Bool[Tensor, " v"]:
        """The ids that may come next. In the text of a plan the model says where it ends: by `eos`, or else `meta`."""
        grammar = self.rules.grammar
        if not self.is_framed:
            return grammar.text(eos=False, meta=False)
        if self.opening is None and isinstance(self._planned, TextPart):
            is_last = self.part + 1 == len(self.rules.plan.parts)
            return grammar.text(eos=is_last, meta=not is_last)
        return grammar.allowed(self.opening)

    def all_ids(self) -> list[int]:
        """Its text and markers, without what was drawn."""
        return [token for piece in self.pieces if isinstance(piece, Text) for token in piece.ids.tolist()] + self.ids

    def uniform(self) -> float:
        """Its next random number in [0, 1)."""
        device = self.generator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which that device has not
        return float(torch.rand((), generator=self.generator, device=device, dtype=dtype))

    def process(self, logits: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """The logits as its processors want them. Raises `ValueError` for what are no logits."""
        ids = torch.tensor(self.all_ids(), device=logits.device)
        for processor in self.rules.options.logits_processors:
            made = processor(ids.clone(), logits.clone())
            if not isinstance(made, Tensor) or made.shape != logits.shape:
                came = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ValueError(f"a logits processor must return logits of shape {tuple(logits.shape)}, got {came}")
            logits = made.to(logits)
        return logits

    def sampled(self) -> Sampled:
        return Sampled(merge_texts([*self.pieces, *as_text(self.ids)]), self.given)

    # what happens to it

    def begin(self, prompt: Sequence[Piece], opened: Sequence[int] = ()) -> "SampleState":
        """Takes a prompt with its markers, and those at its end that open a modality. Raises `ValueError` for one that
        its rules leave no room for.
        """
        if self.rules.options.text_repetition_penalty != 1:
            self.seen = torch.zeros(self.rules.vocabulary.num_logits, dtype=torch.bool, device="cpu")
        for piece in prompt:
            self._append(piece)
        self.events.clear()  # that is no news
        most = self.rules.options.max_length
        if (length := self.length + len(opened)) > most:
            raise ValueError(f"{self.where} has {length} tokens with its markers, more than max_length={most}")
        if opened and self.rules.plan.parts:
            raise ValueError(f"{self.rules.plan.name}: {self.where} opens a modality at its end already")
        self._replay(opened)
        self._follow_plan(must_fit=True)
        if self.phase is Phase.WRITING and self.length >= most:
            self.end(EndReason.LENGTH)
        return self

    def accept(self, token: int) -> None:
        """Takes an id that was `allowed`."""
        rules, vocabulary = self.rules, self.rules.vocabulary
        if self.opening is None and token == vocabulary.meta and isinstance(self._planned, TextPart):
            self._leave_part()
            return
        opening, self.opening = self.opening, rules.grammar.advance(self.opening, token)
        self._append_id(token)
        if token in vocabulary.som:
            modality = vocabulary.som.index(token)
            self._try_to_draw(modality, rules.written_shape(modality, opening or ""))
        elif token == vocabulary.eos:
            self.end(EndReason.EOS)
        elif token in rules.stop_ids:
            self.end(EndReason.STOP)
        elif self.length >= rules.options.max_length:
            self.end(EndReason.LENGTH)
        elif self.opening is None and isinstance(part := self._planned, TextPart):
            self.part_length += 1
            if self.part_length == part.most:
                self._leave_part()

    def tell_progress(self) -> None:
        """Says how far its drawing has come."""
        drawing = self.drawing
        if self.is_observed and drawing is not None:
            latents, estimate = (drawing.unflatten(flat).clone() for flat in (drawing.x, drawing.estimate()))
            steps, time = len(drawing.times) - 1, drawing.times[drawing.step]
            show = self.rules.show
            self.events.append(DrawingProgress(drawing.type, drawing.step, steps, time, latents, estimate, show))

    def finish_drawing(self) -> None:
        """Keeps the clean latents, like anything else that has been written; they are read next."""
        drawing = self.drawing
        assert drawing is not None
        piece = drawing.as_piece()
        if self.is_observed:
            shown = self.rules.show(piece.type, piece.tensor)
            self.events.append(ModalityDone(piece.type, shown, drawing.num_evaluations))
        if self.phase is Phase.DONE:  # who was shown it has cancelled it
            return
        self.drawing = None
        if not self.is_framed:
            self.pieces.append(piece)
            self.end(EndReason.PLAN)
            return
        self._append(piece)
        self._append_id(self.rules.vocabulary.eom[drawing.type])
        self.phase = Phase.WRITING
        if isinstance(self._planned, ModalityPart):
            self._leave_part()
        if self.phase is Phase.WRITING and self.length >= self.rules.options.max_length:
            self.end(EndReason.LENGTH)

    def end(self, reason: EndReason, error: Exception | None = None) -> None:
        self.phase, self.reason, self.error = Phase.DONE, reason, error

    # writing

    def _append_id(self, token: int) -> None:
        vocabulary = self.rules.vocabulary
        is_text = token < vocabulary.num_text
        self.ids.append(token)
        self.length += 1
        self.num_text += is_text
        self.lane.ids.append(token)
        if self.without_text is not None:
            self.without_text.ids.append(vocabulary.null if is_text else token)
        if self.seen is not None and is_text:
            self.seen[token] = True
        if self.is_observed and is_text:
            self.events.append(TextToken(token))

    def _append(self, piece: Piece) -> None:
        if isinstance(piece, Text):
            for token in piece.ids.tolist():
                self._append_id(token)
            return
        self.pieces += [*as_text(self.ids), piece]
        self.ids = []
        self.length += self.rules.num_latent_tokens(piece.type, piece.shape)
        self.lane.append(piece)
        if self.without_text is not None:
            self.without_text.append(piece)

    def _replay(self, opened: Sequence[int]) -> None:
        """Takes a prompt that ends inside the markers of a modality to where it stopped."""
        rules = self.rules
        for token in opened:
            if self.phase is not Phase.WRITING or not rules.grammar.allowed(self.opening)[token]:
                shapes = f"of at most max_modality_tokens={rules.options.max_modality_tokens} latents"
                raise ValueError(
                    f"{self.where}: the markers at its end, {list(opened)}, do not open a modality of a shape it can "
                    f"have, {shapes if rules.fixed is None else f'which is fixed_modality_shape={rules.fixed}'}, and "
                    f"of a type among allowed_modalities={rules.options.allowed_modalities}"
                )
            self.accept(token)

    # its plan

    @property
    def _planned(self) -> TextPart | ModalityPart | None:
        parts = self.rules.plan.parts
        return parts[self.part] if self.part < len(parts) else None

    def _leave_part(self) -> None:
        self.part, self.part_length = self.part + 1, 0
        self._follow_plan()

    def _follow_plan(self, must_fit: bool = False) -> None:
        """Does what the plan has next: opens its modality, lets text be written, or ends."""
        part, plan = self._planned, self.rules.plan
        if isinstance(part, ModalityPart):
            opening = self.rules.vocabulary.opening(part.type, part.shape).tolist()
            if must_fit and not self.rules.has_room(self.length + len(opening), part.type, part.shape):
                raise ValueError(
                    f"{plan.name}: a modality of shape {part.shape} does not fit behind the "
                    f"{self.length + len(opening)} tokens of {self.where}, max_length is "
                    f"{self.rules.options.max_length}"
                )
            for token in opening:
                if self.length < self.rules.options.max_length:
                    self._append_id(token)
            self._try_to_draw(part.type, part.shape)
        elif part is None and plan.parts and not plan.free:
            if self.length < self.rules.options.max_length:
                self._append_id(self.rules.vocabulary.eos)
            self.end(EndReason.PLAN)

    # drawing

    def _try_to_draw(self, modality: int, shape: Shape | None) -> None:
        if shape is None:
            self.end(EndReason.SHAPE)
        elif not self.rules.has_room(self.length, modality, shape):
            self.end(EndReason.LENGTH)
        else:
            self.draw(modality, shape)

    def draw(self, modality: int, shape: Shape) -> None:
        """Starts a modality right here."""
        rules, options = self.rules, self.rules.options
        num_modalities = sum(isinstance(piece, Modality) for piece in self.pieces)
        kept = rules.kept if num_modalities == len(self.given) else None
        drawing = Drawing.begin(modality, shape, rules, self.generator, self.lane, kept=kept)
        if options.modality_cfg_scale != 1 and num_modalities:
            drawing.without_all = self._lane_without_all(modality, shape)
        if self.num_text and (rules.cfg_scale != 1 or drawing.without_all is not None):
            if self.without_text is None:
                self.without_text = Lane()
                for piece in without_text(self.sampled().pieces, rules.vocabulary):
                    self.without_text.append(piece)
            drawing.without_text = self.without_text
        self.phase, self.drawing = Phase.DRAWING, drawing
        if self.is_observed:
            self.events.append(ModalityStarted(modality, shape))

    def _lane_without_all(self, modality: int, shape: Shape) -> Lane:
        """As much null text as there is text, and then this modality."""
        vocabulary = self.rules.vocabulary
        opening = vocabulary.opening(modality, shape).tolist()
        return Lane(ids=[vocabulary.sos, *[vocabulary.null] * self.num_text, *opening])
