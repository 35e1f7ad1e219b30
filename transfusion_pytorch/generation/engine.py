"""The engine: prompts in, samples or events out.

b samples, n and m tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.display.progress import SampleProgress
from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.generation.context import CachedContext
from transfusion_pytorch.generation.events import Ended, EndReason, Event
from transfusion_pytorch.generation.options import (
    SamplingOptions,
    as_generators,
    check_int,
    checks_itself,
    takes_sampling_options,
    with_own_generator,
)
from transfusion_pytorch.generation.prompts import bare_and_opened, parse_prompt
from transfusion_pytorch.generation.rules import Rules
from transfusion_pytorch.generation.scheduler import Scheduler
from transfusion_pytorch.generation.state import Phase, Sampled, SampleState
from transfusion_pytorch.sequence.samples import Modality, Text, mark

Sample = list[Tensor | tuple[int, Tensor]]
MAX_BATCH = 64


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done so far, and what its cache takes.

    - `turns` of the loop; `tokens_read` went through the transformer and stayed (a prompt that several share is read
      once); `tokens_written` were chosen
    - `drawings` were finished, after `evaluations` of the network, each for all that were drawn at the time
    - `bytes_per_token` of the cache, and the `cache_bytes` of all its slots
    """

    turns: int
    tokens_read: int
    tokens_written: int
    drawings: int
    evaluations: int
    bytes_per_token: int
    cache_bytes: int


class Request:
    """A prompt on its way through an engine."""

    def __init__(self, engine: "Engine", state: SampleState):
        self._engine, self._state = engine, state
        self._is_told = False

    @property
    def is_done(self) -> bool:
        return self._state.phase is Phase.DONE

    @property
    def reason(self) -> EndReason | None:
        """Why it ended, once it has."""
        return self._state.reason

    def new_events(self) -> list[Event]:
        """What has happened since it was asked last; `Ended` is the last of all."""
        events, self._state.events = self._state.events, []
        if self.is_done and not self._is_told:
            self._is_told = True
            sample = self._delivered()
            assert self.reason is not None
            events.append(Ended(sample, self.reason, self._state.error))
        return events

    def _delivered(self) -> Sample:
        """Its sample; latents as they are where their decoder fails, which is then what ended it."""
        try:
            return self._engine.deliver([self._state])[0]
        except Exception as error:
            if self._state.error is None:
                self._state.end(EndReason.ERROR, error)
            return self._engine.model.decode([self._state.sampled().pieces], raw=True)[0]

    def events(self) -> Iterator[Event]:
        """What happens, as it happens: the engine is set to work whenever there is no news. Whoever stops listening
        cancels the request. Raises the error that ends it, if one does.
        """
        try:
            while not self._is_told:
                yield from self.new_events()
                if not self.is_done:
                    self._engine.step()
        finally:
            self.cancel()
        if self._state.error is not None:
            raise self._state.error

    def result(self) -> Sample:
        """The finished sample. Raises the error that ended it, if one did, and `RuntimeError` while it goes on."""
        if not self.is_done:
            raise RuntimeError("this request is not done yet: call step() of its engine until it is, or run()")
        if self._state.error is not None:
            raise self._state.error
        [sample] = self._engine.deliver([self._state])
        return sample

    def cancel(self) -> None:
        """Stops the work on it and frees its place. What there is so far is its result."""
        self._engine.scheduler.cancel([self._state])


class Engine:
    """Serves a model: takes prompts at any time, works on up to `max_batch` of them at once, and tells what becomes of
    them.

    ```python
    engine = model.create_engine(max_batch=16)
    requests = [engine.submit(prompt, max_length=256) for prompt in prompts]
    while not engine.is_idle:
        engine.step()
        for request in requests:
            print(request.new_events())
    samples = [request.result() for request in requests]
    ```

    It keeps its cache from one request to the next. Only one thread may use it.
    """

    def __init__(self, model: Any, *, max_batch: int = MAX_BATCH, cache_kv: bool = True):
        check_int(max_batch, "max_batch")
        self.model = model
        self.scheduler = Scheduler(model, max_batch=max_batch, cache_kv=cache_kv)

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    @property
    def stats(self) -> EngineStats:
        scheduler, context = self.scheduler, self.scheduler.context
        cache = context.cache if isinstance(context, CachedContext) else None
        return EngineStats(
            turns=scheduler.turns,
            tokens_read=context.tokens_read,
            tokens_written=scheduler.tokens_written,
            drawings=scheduler.drawings,
            evaluations=scheduler.solver.evaluations,
            bytes_per_token=0 if cache is None else cache.bytes_per_token,
            cache_bytes=0 if cache is None else cache.num_bytes,
        )

    # requests that come and go

    @takes_sampling_options
    @checks_itself
    def submit(self, prompt: Any = None, *, listen: bool = True, **options: Any) -> Request:
        """Queues one prompt, with `SamplingOptions` of its own. Without `listen` it has no event but `Ended`. Raises
        `ValueError` or `TypeError` for a bad one, which harms no other.
        """
        with evaluating(self.model):
            [state] = self._prepare([prompt], SamplingOptions(**with_own_generator(options)), listen=listen)
        self.scheduler.add([state])
        return Request(self, state)

    def step(self) -> None:
        """One turn: every sample that writes chooses a token, every one that draws takes a step of its solver."""
        with evaluating(self.model):
            self.scheduler.turn()

    def run(self) -> None:
        """Works until there is nothing left to do."""
        with evaluating(self.model):
            while not self.is_idle:
                self.scheduler.turn()

    # calls that wait for their results

    @takes_sampling_options
    @checks_itself
    def sample_many(self, prompts: Sequence[Any], *, progress: bool = False, **options: Any) -> list[Sample]:
        """Continues every prompt to its end, all with the same `SamplingOptions`; see `Transfusion.sample_many`."""
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}; for one there is sample")
        if not prompts:
            raise ValueError("there are no prompts; for a sample from nothing give [None]")
        with evaluating(self.model):
            states = self._prepare(prompts, SamplingOptions(**options))
            self._finish(states, progress)
            return self.deliver(states)

    def write_only(self, prompt: Int[Tensor, "b n"], options: SamplingOptions) -> Int[Tensor, "b m"]:
        """Continues plain text to `max_length` ids, without markers. Returns what was written."""
        with evaluating(self.model):
            rules, generators = Rules(self.model, options), as_generators(options.generator, len(prompt))
            states = [
                SampleState(rules, generator, f"text {i}", is_framed=False).begin([Text(ids)])
                for i, (ids, generator) in enumerate(zip(prompt.cpu(), generators, strict=True))
            ]
            self._finish(states)
        return torch.tensor([state.ids[prompt.shape[1] :] for state in states], device=self.model.device).long()

    def draw_only(self, batch_size: int, modality: int, options: SamplingOptions) -> list[Tensor]:
        """Draws `batch_size` instances of a modality without any text around them."""
        with evaluating(self.model):
            rules, generators = Rules(self.model, options), as_generators(options.generator, batch_size)
            shape = rules.shape_of(modality, None if rules.init is None else rules.init.shape)
            states = [
                SampleState(rules, generator, f"instance {i}", is_framed=False)
                for i, generator in enumerate(generators)
            ]
            for state in states:
                state.draw(modality, shape)
            self._finish(states)
            raw = options.return_unprocessed_modalities
            return [instance for [(_, instance)] in self.model.decode([state.pieces for state in states], raw=raw)]

    # before and after

    def _prepare(self, prompts: Sequence[Any], options: SamplingOptions, *, listen: bool = False) -> list[SampleState]:
        """Prompts checked, encoded and ready to be continued. Raises `ValueError` or `TypeError` that names the prompt
        and part at fault.
        """
        vocabulary = self.model.vocabulary
        rules, generators = Rules(self.model, options), as_generators(options.generator, len(prompts))
        parsed = [parse_prompt(prompt, vocabulary, f"prompt {i}") for i, prompt in enumerate(prompts)]
        states = []
        for i, (prompt, generator) in enumerate(zip(self.model.encode(parsed, "prompt"), generators, strict=True)):
            bare, opened = bare_and_opened(prompt, vocabulary, f"prompt {i}")
            given = [piece for piece in parsed[i] if isinstance(piece, Modality)]
            state = SampleState(rules, generator, f"prompt {i}", given, is_observed=listen)
            states.append(state.begin(mark(bare, vocabulary, complete=False), opened))
        return states

    def _finish(self, states: Sequence[SampleState], progress: bool = False) -> None:
        """Works until all of these are done. Raises the first error that ends one of them, and gives up the others."""
        self.scheduler.add(states)
        before = self.stats
        unfinished = [state for state in states if state.phase is not Phase.DONE]
        try:
            with SampleProgress(len(states), show=progress) as bar:
                while unfinished:
                    self.scheduler.turn()
                    for state in unfinished:
                        if state.error is not None:
                            raise state.error
                    unfinished = [state for state in unfinished if state.phase is not Phase.DONE]
                    bar.update(
                        finished=len(states) - len(unfinished),
                        tokens=self.scheduler.tokens_written - before.tokens_written,
                        steps=self.scheduler.solver.evaluations - before.evaluations,
                    )
        finally:
            self.scheduler.cancel(unfinished)

    def deliver(self, states: Sequence[SampleState]) -> list[Sample]:
        """Samples as users see them: decoded, but for the modalities of the prompt, which come back as they came."""
        made = [state.sampled() for state in states]
        raw = [state.rules.options.return_unprocessed_modalities for state in states]
        shown = iter(self._shown([sample for sample, is_raw in zip(made, raw, strict=True) if not is_raw]))
        return [
            [_own(part) for part in self.model.decode([sample.pieces], raw=True)[0]] if is_raw else next(shown)
            for sample, is_raw in zip(made, raw, strict=True)
        ]

    def _shown(self, made: Sequence[Sampled]) -> list[Sample]:
        parts = self.model.decode([pieces[2 * len(given) :] for pieces, given in made])
        return [self._given(sample) + [_own(part) for part in rest] for sample, rest in zip(made, parts, strict=True)]

    def _given(self, sample: Sampled) -> Sample:
        """A sample as far as its prompt's last modality, those being the user's own."""
        device = self.model.device
        given = iter([(piece.type, piece.tensor.detach().clone().to(device)) for piece in sample.given])
        return [
            piece.ids.clone().to(device) if isinstance(piece, Text) else next(given)
            for piece in sample.pieces[: 2 * len(sample.given)]
        ]


def _own(part: Tensor | tuple[int, Tensor]) -> Tensor | tuple[int, Tensor]:
    """A copy, so that nothing returned shares memory with a prompt."""
    return (part[0], part[1].clone()) if isinstance(part, tuple) else part.clone()
