"""The state of a request: one sample while it is generated.

v vocabulary, n ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import nan, prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transfusion_pytorch.generation.batch_state import Branch, Item, as_items
from transfusion_pytorch.generation.denoiser import Denoising
from transfusion_pytorch.generation.events import (
    DrawingProgress,
    EndReason,
    Event,
    FinishedModality,
    ModalityStarted,
    TextToken,
)
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.resolve import allowed_axes, initial_noise, most_latents, shape_of, times_of
from transfusion_pytorch.generation.runner import Model
from transfusion_pytorch.generation.sampler import NO_CHOICE
from transfusion_pytorch.sequence.grammar import Grammar, shared_grammar
from transfusion_pytorch.sequence.plan import ModalityPart, Plan, TextPart
from transfusion_pytorch.sequence.prompts import Prompt
from transfusion_pytorch.sequence.samples import Modality, Shape, Text, as_ids, mark
from transfusion_pytorch.sequence.vocabulary import format_shape

MOST_PROGRESS = 16  # events of a request that wait to be taken


class RequestState:
    """One sample, from its prompt to its end. It does not know the batch.

    - `options`: resolved for the model; `seed`: of all of its random numbers
    - `where`: its name in error messages; `given`: the modalities of its prompt, as the user has them
    - `is_framed`: it is a sample with markers, not plain text or a single modality
    - `is_observed`: its `events` are collected
    - `branch`: the sample so far, markers included; `modalities` are those in it, `length` is how many tokens it makes,
      `num_chosen` how many of them the model wrote; `prompt_items`, `prompt_length`: items and tokens of the prompt
    - `without_text`: the unconditional version of the sample, for guidance
    - `opening`: the characters of a shape so far, None in text; `denoising`: the current modality
    - `part`: the current part of the plan; `part_length`: how many ids of its text were written
    - `log_probabilities` of all ids, where asked for
    - `shown`: modalities by their number in the sample, as users see them; latents are decoded first
    - `generator`: what its seed was drawn from, if it is its own
    - `deadline`: in `time.monotonic()`; `is_cancelled`: the next step ends it
    - `cache_tokens`: the most that it may need of the cache; `num_restarts`: how often that has broken under it
    """

    def __init__(
        self,
        model: Model,
        options: SamplingOptions,
        seed: int,
        where: str = "prompt 0",
        given: Sequence[Modality] = (),
        *,
        is_framed: bool = True,
        is_observed: bool = False,
    ):
        assert isinstance(options.plan, Plan), "options are resolved first"
        self.model, self.options, self.seed, self.where = model, options, seed, where
        self.plan: Plan = options.plan
        self.vocabulary = model.vocabulary
        self.grammar = _grammar(options, model)
        self.is_framed, self.is_observed, self.is_cancelled = is_framed, is_observed, False
        self.branch = Branch(is_decoding=True)
        self.modalities: list[Modality] = []
        self.num_given = len(given)
        self.length = self.num_chosen = self.part = self.part_length = 0
        self.without_text: Branch | None = None
        self.opening: str | None = None
        self.denoising: Denoising | None = None
        self.log_probabilities: list[float] | None = [] if options.log_probabilities else None
        self.shown: dict[int, Tensor] = {}
        for i, piece in enumerate(given):
            is_latent = piece.is_encoded and model.modalities[piece.type].encoder is not None
            if not (is_latent or options.return_unprocessed_modalities):
                self.shown[i] = piece.tensor
        self.events: list[Event | FinishedModality] = []
        self.reason: EndReason | None = None
        self.error: BaseException | None = None
        self.deadline: float | None = None
        self.generator: torch.Generator | None = None
        self.cache_tokens = self.num_restarts = self.prompt_items = self.prompt_length = self._num_buffered = 0
        self._ids_buffer: Int[Tensor, " n"] | None = None

    @property
    def is_done(self) -> bool:
        return self.reason is not None

    @property
    def is_decoding(self) -> bool:
        """Whether it generates text; otherwise it denoises a modality, or is done."""
        return not self.is_done and self.denoising is None

    # for the scheduler

    @property
    def branches(self) -> list[Branch]:
        """All sequences that the transformer reads for it."""
        without_all = None if self.denoising is None else self.denoising.without_all
        return [it for it in (self.branch, self.without_text, without_all) if it is not None]

    @property
    def to_prefill(self) -> list[Branch]:
        """The branches to be read before its next step; unconditional ones only before denoising."""
        branches = [self.branch] if self.is_decoding else self.branches
        return [] if self.is_done else [branch for branch in branches if branch.needs_prefill]

    @property
    def max_lengths(self) -> list[int]:
        """How long each of its branches may become: what the model writes stops at `max_length`, a plan does not."""
        options, parts = self.options, list(self.plan.parts[self.part :])
        most = self.length - self.part_length  # where the text under way began
        if self.denoising is not None:
            most += self.num_tokens(self.denoising.type, self.denoising.shape) + 1
            parts = parts[isinstance(self._planned, ModalityPart) :]
        for part in parts:
            if isinstance(part, ModalityPart):
                opening = len(self.vocabulary.opening(part.type, part.shape))
                most += opening + self.num_tokens(part.type, part.shape) + 1
            else:
                room = options.max_length if part.most is None else most + part.most
                most = max(most, min(options.max_length, room))
        most = max(most, self.length)
        most = max(most, options.max_length) if self.plan.free else most + 1
        guides = 2 if options.modality_cfg_scale != 1 else int(options.cfg_scale != 1)
        guides *= self.is_framed  # text alone, and a modality alone, have no other branch
        negative = 0 if options.negative_prompt is None else len(options.negative_prompt)
        return [most, *[most + negative] * guides]

    @property
    def allowed(self) -> Bool[Tensor, " v"]:
        """The ids that may come next. In the text of a plan the model says where it ends: by `eos`, or else `meta`."""
        if not self.is_framed:  # plain text, in which the eos of a language model is an id like all others
            return self.grammar.text(eos=not self.vocabulary.is_framed, meta=False)
        if self.opening is None and isinstance(self._planned, TextPart):
            is_last = self.part + 1 == len(self.plan.parts)
            return self.grammar.text(eos=is_last, meta=not is_last)
        return self.grammar.allowed(self.opening)

    def process(self, logits: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Applies its logits processors. Raises `ValueError` if one does not return logits of the same shape."""
        ids = self._ids_on(logits.device)
        for processor in self.options.logits_processors:
            made = processor(ids, logits.clone())
            if not isinstance(made, Tensor) or made.shape != logits.shape or made.is_complex():
                came = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                came = f"complex ones of {came}" if isinstance(made, Tensor) and made.is_complex() else came
                raise ValueError(f"a logits processor must return logits of shape {tuple(logits.shape)}, got {came}")
            logits = made.to(logits)
        return logits

    # what happens to it

    def begin(self, prompt: Prompt) -> "RequestState":
        """Takes its prompt, and starts what that or the plan opens. Raises `ValueError` for an invalid opening."""
        framed = mark(prompt.pieces, self.vocabulary, complete=False) if self.is_framed else prompt.pieces
        self._append(*as_items(framed))
        self.events.clear()  # a prompt is no news
        opening = () if self.plan.parts else prompt.opening  # a plan says itself what comes there
        self.prompt_items, self.prompt_length = len(self.branch.items) + len(opening), self.length + len(opening)
        if (new := self.options.max_new_tokens) is not None:
            self.options = replace(self.options, max_length=min(self.options.max_length, self.prompt_length + new))
            self.grammar = _grammar(self.options, self.model)
        if opening:
            self._open(opening)
        else:
            self._follow_plan()
        self._check_length()
        if self.reason is EndReason.LENGTH and prompt.is_complete and self.is_framed:
            self._append(self.vocabulary.eos)  # it comes back as it is
        return self

    def accept(self, token: int, log_probability: float | None = None) -> None:
        """Appends a chosen id, which was `allowed`, and does what follows from it. Raises `ValueError` where there was
        no choice.
        """
        if token == NO_CHOICE:
            maybe = ", or its logits_processors have left no finite choice" if self.options.logits_processors else ""
            raise ValueError(f"{self.where}: the logits of the next token are not finite{maybe}")
        shape = None
        if token in self.vocabulary.som:  # with a user's parser, before anything changes: it may be interrupted
            shape = self._written_shape(self.vocabulary.som.index(token), self.opening or "")
        self.num_chosen += 1
        is_planned = self.opening is None and isinstance(self._planned, TextPart)
        if is_planned and token == self.vocabulary.meta:
            self._leave_part()
            return
        self.opening = self.grammar.advance(self.opening, token)
        self._append(token, log_probability=log_probability)
        if token in self.vocabulary.som:
            self._denoise_written(self.vocabulary.som.index(token), shape)
        elif token == self.vocabulary.eos and self.is_framed:
            self.end(EndReason.EOS)
        elif token in self.options.stop_ids:
            self.end(EndReason.STOP)
        elif is_planned:
            self.part_length += 1
            if self.part_length == getattr(self._planned, "most", None) or self._is_full:
                self._leave_part()
        else:
            self._check_length()

    def report_progress(self) -> None:
        """Adds a `DrawingProgress`. The latest `MOST_PROGRESS` are kept until they are taken."""
        it = self.denoising
        if not self.is_observed or it is None:
            return
        latents, estimate = (it.unflatten(flat).clone() for flat in (it.x, it.estimate()))
        num_steps, time = len(it.times) - 1, it.times[it.step]
        waiting = [event for event in self.events if isinstance(event, DrawingProgress)]
        if len(waiting) == MOST_PROGRESS:
            self.events.remove(waiting[0])
        self.events.append(DrawingProgress(it.type, it.step, num_steps, time, latents, estimate, self._show))

    def finish_denoising(self) -> None:
        """Appends the clean latents, which are read next, like anything else that was written."""
        it = self.denoising
        assert it is not None
        piece = Modality(it.type, it.latents().to(self.model.dtype, copy=True))  # no view that keeps others alive
        self.denoising = None
        self._append(piece)
        if self.is_observed:
            self.events.append(FinishedModality(len(self.modalities) - 1, it.num_evaluations))
        if not self.is_framed:
            self.end(EndReason.PLAN)
            return
        self._append(self.vocabulary.eom[piece.type])
        self.branch.is_decoding = True
        if isinstance(self._planned, ModalityPart):
            self._leave_part()
        self._check_length()

    def end(self, reason: EndReason, error: BaseException | None = None) -> None:
        self.reason, self.error = reason, error

    def raise_error(self) -> None:
        """Raises the error that ended it, if one did."""
        if self.error is not None:
            raise self.error.with_traceback(None)  # that of the last time would hold the frames of its callers

    # its plan

    @property
    def _planned(self) -> TextPart | ModalityPart | None:
        return self.plan.parts[self.part] if self.part < len(self.plan.parts) else None

    @property
    def _is_full(self) -> bool:
        return self.length >= self.options.max_length

    def _check_length(self) -> None:
        if self.is_decoding and self._is_full:
            self.end(EndReason.LENGTH)

    def _leave_part(self) -> None:
        self.part, self.part_length = self.part + 1, 0
        self._follow_plan()

    def _follow_plan(self) -> None:
        """Starts the next part of the plan: opens its modality, lets text be written, or ends. Text beyond `max_length`
        is empty, a modality is generated all the same.
        """
        while isinstance(self._planned, TextPart) and self._is_full:
            self.part += 1
        part = self._planned
        if isinstance(part, ModalityPart):
            self._open_modality(part.type, part.shape)
        elif part is None and self.plan.parts and not self.plan.free:
            is_full = self._is_full
            if not is_full:
                self._append(self.vocabulary.eos)
            self.end(EndReason.LENGTH if is_full else EndReason.PLAN)

    # modalities

    def _open_modality(self, modality: int, shape: Shape) -> None:
        if self.is_framed:
            self._append(*self.vocabulary.opening(modality, shape).tolist())
        self.start_denoising(modality, shape)

    def start_denoising(self, modality: int, shape: Shape) -> None:
        """Makes the next part of the sample a modality of this shape."""
        options, number = self.options, len(self.modalities)
        noise = initial_noise(options, modality, shape, self.model, seed=self.seed, number=number)
        if options.init_modality is not None and number == self.num_given:
            denoising = Denoising.edit(options, noise, self.branch, self.where)
        else:
            denoising = Denoising(modality, shape, options, noise, times_of(options), self.branch, self.where)
        if options.modality_cfg_scale != 1 and number:
            denoising.without_all = self._branch_without_all(modality, shape)
        has_text = options.negative_prompt is not None or any(map(self._is_text, self.branch.items))
        if has_text and (options.cfg_scale != 1 or denoising.without_all is not None):
            denoising.without_text = self.without_text = self.without_text or self._branch_without_text()
        self.denoising, self.branch.is_decoding = denoising, False
        if self.is_observed:
            self.events.append(ModalityStarted(modality, shape))

    def _open(self, opening: Sequence[int]) -> None:
        """Continues the opening at the end of the prompt: denoises its modality, or lets the model complete its
        shape.
        """
        chars = [token for token in opening if self.vocabulary.is_char(token)]
        if opening[-1] in self.vocabulary.som:
            modality = self.vocabulary.som.index(opening[-1])
            shape = self._opened_shape(modality, "".join(map(self.vocabulary.char, chars)), opening)
            self._open_modality(modality, shape)
            return
        for token in opening:
            if not self.grammar.allowed(self.opening)[token]:
                raise self._no_opening(opening)
            self.opening = self.grammar.advance(self.opening, token)
            self._append(token)

    def _opened_shape(self, modality: int, spelled: str, opening: Sequence[int]) -> Shape:
        """The shape of a modality that the prompt opens; the fixed or default one where it has none."""
        options, io = self.options, self.model.modalities[modality]
        spelled_shape = io.spec.parse_shape(spelled) if spelled else None
        is_refused = options.allowed_modalities is not None and modality not in options.allowed_modalities
        if is_refused or (spelled and (spelled_shape is None or not io.supports(spelled_shape))):
            raise self._no_opening(opening)
        shape = shape_of(self.model, options.fixed_modality_shape, modality, spelled_shape, self.where)
        if prod(shape) > (options.max_modality_tokens or prod(shape)):
            raise self._no_opening(opening)
        return shape

    def _no_opening(self, opening: Sequence[int]) -> ValueError:
        fixed, most = self.options.fixed_modality_shape, self.options.max_modality_tokens
        shapes = "" if most is None else f"of at most max_modality_tokens={most} latents, "
        shapes = shapes if fixed is None else f"which is fixed_modality_shape={fixed}, "
        return ValueError(
            f"{self.where}: the markers at its end, {list(opening)}, do not open a modality of a shape it can have, "
            f"{shapes}and of a type among allowed_modalities={self.options.allowed_modalities}"
        )

    def _written_shape(self, modality: int, written: str) -> Shape | None:
        """The written shape if it is valid, else the default shape if that is the fallback, else None."""
        fixed, io = self.options.fixed_modality_shape, self.model.modalities[modality]
        if fixed is not None:
            return fixed
        shape = io.spec.parse_shape(written)
        if shape is not None and self.grammar.most.allows(format_shape(shape)) and io.supports(shape):
            return shape
        if not self.model.fallback_to_default_shape_if_invalid:
            return None
        default = shape_of(self.model, None, modality, None)
        return default if prod(default) <= (self.grammar.most.rows or prod(default)) else None

    def _denoise_written(self, modality: int, shape: Shape | None) -> None:
        """Starts denoising what the model opened by itself, if it has a shape and fits."""
        if shape is None:
            self.end(EndReason.SHAPE)
        elif self.length + self.num_tokens(modality, shape) + 1 > self.options.max_length:
            self.end(EndReason.LENGTH)
        else:
            self.start_denoising(modality, shape)

    def _branch_without_text(self) -> Branch:
        """The sample with null in place of its text, or with the negative prompt as its only text, at the start."""
        items = [other for item in self.branch.items for other in self._unconditional(item)]
        negative = self.options.negative_prompt
        return Branch(items if negative is None else [*self._begun_with(negative), *items])

    def _branch_without_all(self, modality: int, shape: Shape) -> Branch:
        """Null for each id of text, or the negative prompt, then the opening of this modality."""
        text = self.options.negative_prompt
        if text is None:
            text = as_ids([self.vocabulary.null] * sum(map(self._is_text, self.branch.items)))
        return Branch([*self._begun_with(text), *self.vocabulary.opening(modality, shape).tolist()])

    def _unconditional(self, item: Item) -> list[Item]:
        """What stands for an item of the sample where its text is left out."""
        vocabulary = self.vocabulary
        if self.options.negative_prompt is None:
            return [vocabulary.null] if self._is_text(item) else [item]
        return [] if self._is_text(item) or item == vocabulary.sos else [item]  # the negative prompt has its own sos

    def _begun_with(self, text: Int[Tensor, " n"]) -> list[Item]:
        """How a sample with this text begins."""
        return as_items(mark([Text(text)] if len(text) else [], self.vocabulary, complete=False))

    def _is_text(self, item: Item) -> bool:
        return isinstance(item, int) and item < self.vocabulary.num_text

    def num_tokens(self, modality: int, shape: Shape) -> int:
        return prod(self.model.modalities[modality].token_shape(shape))

    def _show(self, modality: int, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """One modality as users see it."""
        raw = self.options.return_unprocessed_modalities
        with torch.no_grad():
            [[(_, shown)]] = self.model.decode([[Modality(modality, latents.to(self.model.dtype, copy=True))]], raw=raw)
        return shown

    # what it has written

    def _append(self, *items: Item, log_probability: float | None = None) -> None:
        for item in items:
            if isinstance(item, Modality):  # first: whenever an interruption comes, what is shown has been decoded
                self.modalities.append(item)
            self.branch.items.append(item)
            if self.without_text is not None:
                self.without_text.items += self._unconditional(item)
            if isinstance(item, Modality):
                self.length += self.num_tokens(item.type, item.shape)
                continue
            self.length += 1
            if self.log_probabilities is not None:
                self.log_probabilities.append(nan if log_probability is None else log_probability)
            is_end = item == self.vocabulary.eos and self.is_framed
            if self.is_observed and self._is_text(item) and not is_end:
                self.events.append(TextToken(item, log_probability))

    def _ids_on(self, device: torch.device) -> Int[Tensor, " n"]:
        """Its text and markers, without modalities: a view of a growing buffer, so each id is uploaded once."""
        count, buffer = len(self.branch.items) - len(self.modalities), self._ids_buffer
        if buffer is None or count > len(buffer) or buffer.device != device:
            buffer = self._ids_buffer = torch.zeros(max(64, 2 * count), dtype=torch.long, device=device)
            self._num_buffered = 0
        newest = islice((it for it in reversed(self.branch.items) if isinstance(it, int)), count - self._num_buffered)
        buffer[self._num_buffered : count] = torch.tensor([*newest][::-1], device=device)
        self._num_buffered = count
        return buffer[:count]


def _grammar(options: SamplingOptions, model: Model) -> Grammar:
    counts = tuple(map(frozenset, allowed_axes(options, model)))
    return shared_grammar(model.vocabulary, counts, most_latents(options, model), options.fixed_modality_shape)
