"""The engine: prompts in, samples or events out.

b samples, n and m tokens.
"""

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict
from weakref import WeakSet

import torch
from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.display.progress import SampleProgress
from transfusion_pytorch.evaluating import WeightVersions, evaluation_view, watch_weights
from transfusion_pytorch.generation.delivery import EngineInUse, Request, decode_modalities, sample_of, undecoded
from transfusion_pytorch.generation.events import EndReason, Sample
from transfusion_pytorch.generation.options import (
    SamplingKeywords,
    SamplingOptions,
    as_options,
    checks_itself,
    seeds_of,
    takes_sampling_options,
)
from transfusion_pytorch.generation.request import RequestState
from transfusion_pytorch.generation.resolve import resolve, shape_of, with_negative_prompts
from transfusion_pytorch.generation.scheduler import Limits, Scheduler
from transfusion_pytorch.sequence.checks import check_int, check_number
from transfusion_pytorch.sequence.hashing import content_key
from transfusion_pytorch.sequence.plan import ModalityPart, Plan
from transfusion_pytorch.sequence.prompts import Prompt, parse_prompt, split_unfinished_modality
from transfusion_pytorch.sequence.samples import Modality, Piece, Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_BATCH = 64
MAX_PREFILL_TOKENS = 512
MAX_DENOISING_TOKENS = 32_768


class QueueFull(RuntimeError):
    """`max_waiting` requests are in the queue already: try again later."""


class EngineOptions(TypedDict, total=False):
    """The options of an `Engine` as keywords, for type checkers and editors."""

    max_batch: int
    cache_kv: bool
    max_waiting: int | None
    max_cache_tokens: int | None
    max_prefill_tokens: int
    max_denoising_tokens: int


@dataclass(frozen=True)
class EngineStats:
    """Counters of an engine, and the memory of its cache.

    - `steps` of the engine; `tokens_read`: tokens that were prefilled or decoded (a shared prompt counts once);
      `tokens_written`: ids that were chosen
    - `drawings`: finished modalities; `evaluations`: forward passes of denoising, each for a whole batch
    - `bytes_per_token` of the cache; `used_bytes` by committed tokens; `cache_bytes` reserved
    - `active` and `waiting` requests
    """

    steps: int
    tokens_read: int
    tokens_written: int
    drawings: int
    evaluations: int
    bytes_per_token: int
    used_bytes: int
    cache_bytes: int
    active: int
    waiting: int


class Engine:
    """Continuous batching for a model: takes prompts at any time, and runs up to `max_batch` of them together.

    ```python
    engine = model.create_engine(max_batch=16)
    requests = [engine.submit(prompt, max_length=256) for prompt in prompts]
    while not engine.is_idle:
        engine.step()
        for request in requests:
            print(request.new_events())
    samples = [request.result() for request in requests]
    ```

    - `max_batch`: requests in the batch, and modalities of one call of a decoder
    - `max_waiting`: requests in the queue besides those that there is room for; beyond it `submit` raises `QueueFull`
    - `max_cache_tokens`: a request enters the batch when the most tokens that it may need (`max_length`, or more where
      a plan asks for it, for each of its branches) fit beside the others; None for no bound
    - `max_prefill_tokens`: long prompts are read in pieces of so many tokens while other requests go on
    - `max_denoising_tokens`: latents of one forward pass, those of unconditional branches included

    The model may be trained meanwhile; its mode is never changed. Changed weights are noticed where torch counts
    changes; otherwise call `weights_changed`. Requests in the batch are then read again.

    One thread may use an engine at a time; another gets a `RuntimeError`, and so do calls from inside of a step other
    than `submit` and `cancel`. For clients in many threads there is `serving.AsyncEngine`.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = MAX_BATCH,
        cache_kv: bool = True,
        max_waiting: int | None = None,
        max_cache_tokens: int | None = None,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        max_denoising_tokens: int = MAX_DENOISING_TOKENS,
    ):
        limits = Limits(max_batch, max_waiting, max_cache_tokens, max_prefill_tokens, max_denoising_tokens)
        for name, value in limits._asdict().items():
            if value is not None or name not in ("max_waiting", "max_cache_tokens"):
                check_int(value, name)
        self.model, self.limits, self.cache_kv = model, limits, cache_kv
        self._view = evaluation_view(model)
        self.scheduler = Scheduler(self._view, limits, cache_kv=cache_kv)
        self._owner = 0  # the thread that uses it
        self._gate = threading.RLock()  # others wait for a cancellation, which may come from any thread, to end
        self._weights = WeightVersions(model)
        self._is_stale = False
        self._requests: WeakSet[RequestState] = WeakSet()
        watch_weights(model, self)

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    @property
    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        bytes_per_token, used, reserved = scheduler.runner.memory
        return EngineStats(
            steps=scheduler.steps,
            tokens_read=scheduler.runner.tokens_read,
            tokens_written=scheduler.tokens_written,
            drawings=scheduler.drawings,
            evaluations=scheduler.denoiser.evaluations,
            bytes_per_token=bytes_per_token,
            used_bytes=bytes_per_token * used,
            cache_bytes=bytes_per_token * reserved,
            active=len(scheduler.active),
            waiting=len(scheduler.waiting),
        )

    # requests that come and go

    @takes_sampling_options
    @checks_itself
    def submit(
        self,
        prompt: Any = None,
        *,
        listen: bool = True,
        timeout: float | None = None,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",
    ) -> Request:
        """Queues one prompt, with options of its own: `SamplingOptions`, or its fields as keywords.

        Without `listen` its only event is `Ended`. After `timeout` seconds it ends with the sample so far. Raises
        `ValueError` or `TypeError` for a bad request, which affects no other, and `QueueFull`.
        """
        chosen = as_options(options, keywords)
        with self.exclusive(may_nest=True):
            queued, most = self.scheduler.num_queued, self.limits.max_waiting
            if most is not None and queued >= most:
                raise QueueFull(f"{queued} requests wait already, and max_waiting is {most}")
            self._check_generators(chosen.generator)
            [request] = self._prepare([prompt], chosen, is_observed=listen)
            if timeout is not None:
                request.deadline = time.monotonic() + check_number(timeout, "timeout", least=0)
            generator = chosen.generator
            request.generator = generator[0] if isinstance(generator, (list, tuple)) else generator
            self.scheduler.add([request])
        return Request(self, request)

    def step(self) -> None:
        """One id for each request that writes text, one solver step for each that denoises."""
        with self.exclusive():
            self._step()

    def run(self) -> None:
        """Steps until no request is left."""
        with self.exclusive():
            while not self.is_idle:
                self._step()

    def cancel(self, request: RequestState) -> None:
        """Ends a request: now, or where the engine is in use at the end of this or the next step."""
        request.is_cancelled = True
        with self._gate:
            if not request.is_done and not self._owner:
                with self.exclusive():
                    self.scheduler.cancel([request])

    def weights_changed(self) -> None:
        """Call this, from any thread, after weights have changed in a way that torch does not count (fused optimizers,
        `.data`): everything is then read again.
        """
        self._is_stale = True

    def reset(self) -> None:
        """Cancels all requests, frees the cache, and begins the statistics again."""
        with self.exclusive():
            self.scheduler.cancel([*self.scheduler.active, *self.scheduler.waiting])
            self.scheduler = Scheduler(self._view, self.limits, cache_kv=self.cache_kv)

    # calls that wait for their results

    @takes_sampling_options
    @checks_itself
    def sample_many(
        self,
        prompts: Sequence[Any],
        *,
        progress: bool = False,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",
    ) -> list[Sample]:
        """Continues every prompt to its end, all with the same options; see `Transfusion.sample_many`."""
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}; for one there is sample")
        if not prompts:
            raise ValueError("there are no prompts; for a sample from nothing give [None]")
        chosen = as_options(options, keywords)
        with self.exclusive():
            self._check_generators(chosen.generator)
            requests = self._prepare(prompts, chosen)
            self._finish(requests, progress)
            return self._samples_of(requests)

    def write_only(self, prompt: Int[Tensor, "b n"], options: SamplingOptions) -> Int[Tensor, "b m"]:
        """Continues plain text to `max_length` ids, without markers. Returns the new ids."""
        prompts = [Prompt([Text(ids)], []) for ids in prompt.cpu()]
        with self.exclusive():
            requests = self._finish_unframed(prompts, resolve(options, self._view), "text")
        ids = [request.branch.items[prompt.shape[1] :] for request in requests]
        return torch.tensor(ids, device=self.model.device).long()

    def draw_only(self, batch_size: int, modality: int, options: SamplingOptions) -> list[Tensor]:
        """Draws `batch_size` instances of a modality without any text around them."""
        with self.exclusive():
            resolved = resolve(options, self._view)
            init = None if resolved.init_modality is None else resolved.init_modality.shape
            shape = shape_of(self._view, resolved.fixed_modality_shape, modality, init)
            resolved = replace(resolved, plan=Plan((ModalityPart(modality, shape),), free=False))
            requests = self._finish_unframed([Prompt([], [])] * batch_size, resolved, "instance")
            return [instance for [(_, instance)] in self._samples_of(requests)]

    # one thread at a time

    @contextmanager
    def exclusive(self, *, may_nest: bool = False) -> Iterator[None]:
        """Holds the engine, without gradients. Raises `RuntimeError` if it is in use.

        A caller's inference mode ends here: what it makes cannot be changed in a later step outside of it.
        """
        here, is_ours = threading.get_ident(), False
        try:
            with self._gate:
                owner = self._owner
                if not owner:  # no lock: after it was acquired, an interruption could come before that is noted
                    self._owner, is_ours = here, True
            if owner not in (0, here):
                raise EngineInUse(
                    "this engine is in use by another thread; use it from one thread at a time, or serve many clients "
                    "with transfusion_pytorch.serving.AsyncEngine"
                )
            if owner and not may_nest:
                raise EngineInUse("this engine is in a step, from inside of which only submit and cancel may be called")
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            if is_ours:
                self._owner = 0

    def _step(self) -> None:
        if not self.scheduler.active:  # modules may have been replaced; to look for them takes too long
            self._weights.look_again()
        if self._weights.have_changed() or self._is_stale:
            self._is_stale = False
            self.scheduler.rewind()
        self.scheduler.step()

    # before and after

    def _prepare(
        self, prompts: Sequence[Any], options: SamplingOptions, *, is_observed: bool = False
    ) -> list[RequestState]:
        """Prompts checked, encoded and ready to be continued. Raises `ValueError` or `TypeError` that names the prompt
        and part at fault.
        """
        model, vocabulary, count = self._view, self.model.vocabulary, len(prompts)
        parsed = [parse_prompt(prompt, vocabulary, f"prompt {i}") for i, prompt in enumerate(prompts)]
        parsed = [[self._with_key(piece) for piece in pieces] for pieces in parsed]
        resolved = with_negative_prompts(resolve(options, model), count, vocabulary.num_text)
        seeds, requests = seeds_of(options.generator, count), []
        for i, encoded in enumerate(model.encode(parsed, "prompt")):
            where = f"prompt {i}"
            given = [piece for piece in parsed[i] if isinstance(piece, Modality)]
            request = RequestState(model, resolved[i], seeds[i], where, given, is_observed=is_observed)
            requests.append(request.begin(split_unfinished_modality(encoded, vocabulary, where)))
        self.scheduler.check_room(requests)
        _warn_of_long_prompts(requests)
        self._requests.update(requests)
        return requests

    def _with_key(self, piece: Piece) -> Piece:
        """Latents that are on the CPU get their key there; what an encoder makes of equal data may differ."""
        if not isinstance(piece, Modality) or piece.tensor.device.type != "cpu":
            return piece
        is_latent = piece.is_encoded or self.model.modalities[piece.type].encoder is None
        return piece._replace(key=content_key(piece.tensor)) if is_latent else piece

    def _check_generators(self, generators: Any) -> None:
        """Raises `ValueError` for a generator that a request uses which is not done yet."""
        unfinished = (it for it in (*self.scheduler.active, *self.scheduler.waiting) if not it.is_done)
        in_use = {id(request.generator) for request in unfinished if request.generator is not None}
        if any(id(each) in in_use for each in (generators if isinstance(generators, (list, tuple)) else [generators])):
            raise ValueError(
                "generator: it is that of a request which is not done yet; what it makes would depend on who comes "
                "first. Give each request its own, or leave it out"
            )

    def _finish_unframed(self, prompts: Sequence[Prompt], options: SamplingOptions, name: str) -> list[RequestState]:
        """Finished requests without markers: plain text, or one modality. `options` are resolved."""
        seeds = seeds_of(options.generator, len(prompts))
        requests = [
            RequestState(self._view, options, seed, f"{name} {i}", is_framed=False).begin(prompt)
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self.scheduler.check_room(requests)
        self._finish(requests)
        return requests

    def _finish(self, requests: Sequence[RequestState], progress: bool = False) -> None:
        """Steps until all of these are done. Raises the first error that ends one of them, and cancels the others."""
        self.scheduler.add(requests)
        before = self.stats
        unfinished = [request for request in requests if not request.is_done]
        try:
            with SampleProgress(len(requests), show=progress) as bar:
                while unfinished:
                    self._step()
                    for request in unfinished:
                        request.raise_error()
                    unfinished = [request for request in unfinished if not request.is_done]
                    bar.update(
                        finished=len(requests) - len(unfinished),
                        tokens=self.scheduler.tokens_written - before.tokens_written,
                        steps=self.scheduler.denoiser.evaluations - before.evaluations,
                    )
        finally:
            self.scheduler.cancel(unfinished)

    def decode_modalities_of(self, request: RequestState) -> None:
        """Decodes what a request has finished and somebody may see now, together with the same of up to `max_batch`
        others: each modality once.
        """
        if (request.is_observed or request.is_done) and undecoded(request):
            shown = (it for it in self._requests if it is not request and (it.is_observed or it.is_done))
            others = islice((it for it in shown if undecoded(it)), self.limits.max_batch)
            self._decode_modalities([request, *others])

    def _decode_modalities(self, requests: Sequence[RequestState]) -> None:
        failed = decode_modalities(self._view, requests, self.scheduler.halving, most=self.limits.max_batch)
        for request, error in failed:
            if request.error is None:
                request.end(EndReason.ERROR, error)
                self.scheduler.cancel([request])  # frees its rows

    def _samples_of(self, requests: Sequence[RequestState]) -> list[Sample]:
        """Those of finished requests. Raises the first error of a decoder."""
        self._decode_modalities(requests)
        for request in requests:
            request.raise_error()
        return [sample_of(request) for request in requests]


def _warn_of_long_prompts(requests: Sequence[RequestState]) -> None:
    """Once for all prompts of a call."""
    long = [request for request in requests if request.prompt_length > request.options.max_length]
    if long:
        others = f", and {len(long) - 1} more like it" if len(long) > 1 else ""
        warnings.warn(
            f"{long[0].where} has {long[0].prompt_length} tokens with its markers, more than max_length="
            f"{long[0].options.max_length}{others}: the model writes nothing behind it",
            stacklevel=5,
        )
