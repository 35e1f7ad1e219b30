"""Continuous batching: admits requests, and runs one step for all of them.

r rows that write, d model, v vocabulary.
"""

import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from transfusion_pytorch.failures import Halving, caught, released
from transfusion_pytorch.generation.batch_state import BatchState, Branch
from transfusion_pytorch.generation.denoiser import Denoiser, check_finite
from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.generation.request import RequestState
from transfusion_pytorch.generation.runner import Model, create_runner
from transfusion_pytorch.generation.sampler import log_probabilities, to_host
from transfusion_pytorch.network.precision import precise

MOST_RESTARTS = 3  # of a request, after the cache has broken


class Limits(NamedTuple):
    """Bounds of a scheduler; `Engine` says what they mean."""

    max_batch: int
    max_waiting: int | None
    max_cache_tokens: int | None
    max_prefill_tokens: int
    max_denoising_tokens: int


class Scheduler:
    """Runs requests through a model.

    A step prefills, then decodes one id for every request that generates text, then takes one solver step for every
    request that denoises, whatever their types and shapes. A request does not depend on the others, and one that fails
    ends alone.
    """

    def __init__(self, model: Model, limits: Limits, *, cache_kv: bool):
        self.limits = limits
        self.runner = create_runner(model, cache_kv=cache_kv)
        self.halving = Halving()
        self.denoiser = Denoiser(self.runner, self.halving, most_tokens=limits.max_denoising_tokens)
        self.waiting: deque[RequestState] = deque()
        self.active: list[RequestState] = []
        self.steps = self.tokens_written = self.drawings = 0
        self.must_rewind = False
        self._state: BatchState | None = None
        self._unreleased: list[Branch] = []

    @property
    def is_idle(self) -> bool:
        return not self.active and not self.waiting

    @property
    def num_queued(self) -> int:
        """Waiting requests, without those that there is room for now."""
        return len(self.waiting) - self._num_admitted()

    def check_room(self, requests: Sequence[RequestState]) -> None:
        """Notes how many tokens of the cache each may need. Raises `ValueError` for one that can never be admitted."""
        most = self.limits.max_cache_tokens
        for request in requests:
            needed = request.cache_tokens = self.runner.cache_tokens(request.max_lengths)
            if most is not None and needed > most:
                raise ValueError(
                    f"{request.where} may come to {needed} tokens of the cache, and max_cache_tokens is {most}; ask "
                    "for a smaller max_length, or for less guidance"
                )

    def add(self, requests: Sequence[RequestState]) -> None:
        """Queues requests, whose room was checked."""
        self.waiting.extend(request for request in requests if not request.is_done)

    def cancel(self, requests: Sequence[RequestState]) -> None:
        """Ends requests that are not done, and frees their rows."""
        for request in requests:
            request.is_cancelled = True
        self._retire()

    def rewind(self) -> None:
        """Has everything read again, into an empty cache: weights or precision have changed. Where it is interrupted it
        has to be called again before anything is read.
        """
        self.must_rewind = True
        for branch in [*self._unreleased, *(branch for request in self.active for branch in request.branches)]:
            branch.rewind()
            branch.row = None
        self._unreleased = []
        self.runner.restart()
        self._state = None  # whose views hold what follows from the weights, as those of the layouts do
        self.denoiser.reset()
        self.must_rewind = False

    def step(self) -> None:
        """Takes every request one step further."""
        self.steps += 1
        if self.must_rewind or self.runner.must_restart:
            self.rewind()
        self._retire()
        self._admit()
        self._prefill()
        self._decode()
        self._denoise()
        self._retire()

    # admission and ends

    def _admit(self) -> None:
        """Takes waiting requests in order, while there is room for what they may come to."""
        for _ in range(self._num_admitted()):
            self.active.append(self.waiting.popleft())

    def _num_admitted(self) -> int:
        """How many of the waiting requests enter the batch with the next step."""
        places, most = self.limits.max_batch - len(self.active), self.limits.max_cache_tokens
        if most is None or not self.waiting:
            return min(places, len(self.waiting))
        taken = sum(request.cache_tokens for request in self.active)
        needed = accumulate((request.cache_tokens for request in islice(self.waiting, places)), initial=taken)
        return max(0, sum(total <= most for total in needed) - 1)  # the first is what is taken already

    def _retire(self) -> None:
        """Ends what is cancelled or overdue. Whatever has ended leaves, and its rows are freed."""
        now = time.monotonic()
        for request in [it for it in (*self.active, *self.waiting) if not it.is_done]:
            if request.is_cancelled:
                request.end(EndReason.CANCELLED)
            elif request.deadline is not None and now >= request.deadline:
                request.end(EndReason.TIMEOUT)
        self._close([branch for request in self.active if request.is_done for branch in request.branches])
        if any(request.is_done for request in (*self.active, *self.waiting)):
            self.active = [request for request in self.active if not request.is_done]
            self.waiting = deque(request for request in self.waiting if not request.is_done)
        if not self.active:
            self._state = None
            self.denoiser.reset()
            self.runner.reordered.clear()  # changes of weights need not be reported while nothing runs
            if self._unreleased:
                self.rewind()

    def _close(self, branches: Sequence[Branch]) -> None:
        """Frees the rows of branches; what cannot be freed now, for lack of memory to move others, is tried again."""
        left = []
        self._unreleased = list(dict.fromkeys((*self._unreleased, *branches)))  # first: an interruption loses none
        for branch in self._unreleased:
            try:
                self.runner.close(branch)
            except Exception:
                left.append(branch)
        self._unreleased = left

    # prefill

    def _prefill(self) -> None:
        """Reads prompts and finished modalities; long ones in pieces, one a step, while other requests go on."""
        owners = {branch: request for request in self.active for branch in request.to_prefill}
        if not owners:
            return
        others_go_on = any(not request.to_prefill for request in self.active)
        most = self.limits.max_prefill_tokens if others_go_on else None
        for branch, error in self.halving.run(list(owners), lambda branches: self.runner.prefill(branches, most)):
            self._fail(owners[branch], error)

    # text

    def _decode(self) -> None:
        """An id for every request that generates text."""
        decoding = [it for it in self.active if it.is_decoding and not it.branch.needs_prefill]
        if not decoding:
            self._state = None  # which holds memory of the cache
            return
        for request, error in self.halving.run(decoding, self._decode_step):
            if not request.is_done:
                self._fail(request, error)

    def _decode_step(self, requests: Sequence[RequestState]) -> None:
        """Nothing is committed before all ids are chosen, so a step that fails can be run again. Where it is
        interrupted after that, the request at work ends, and the same ids are chosen for those behind it.
        """
        requests = [request for request in requests if not request.is_done]  # a processor of its own has failed before
        if not requests:
            return
        state, self._state = self._state, None  # after a step that fails it is made anew
        if state is None or set(state.requests) != set(requests) or not self.runner.is_valid(state):
            state = self.runner.batch_state(requests)
        logits, tokens = self.runner.decode(state)
        if tokens is None:
            tokens = state.choose(_processed(logits, state.requests))
        if any(request.log_probabilities is not None for request in state.requests):
            chosen = to_host(tokens, log_probabilities(logits, tokens))
        else:
            chosen = [(token, None) for token in tokens.tolist()]
        state.finish_step()
        for request, (token, log_p) in zip(state.requests, chosen, strict=True):
            if request.is_done:  # a processor of its own failed
                continue
            try:
                request.accept(token, log_p)
                self.runner.commit(request.branch)
                self.tokens_written += 1
            except BaseException as error:
                _end_in_the_middle(request, error)
        if all(request.is_decoding for request in state.requests):
            state.update_masks()
            self._state = state

    def _fail(self, request: RequestState, error: BaseException) -> None:
        """Ends a request with its error. Where the cache has broken, the next step reads it again, a few times."""
        if self.runner.must_restart and request.num_restarts < MOST_RESTARTS:
            request.num_restarts += 1
        else:
            request.end(EndReason.ERROR, error)

    # modalities

    def _denoise(self) -> None:
        """One interval for every request that denoises, whose branches are read, and that nobody has just cancelled."""
        ready = [it for it in self.active if not (it.is_done or it.is_cancelled or it.to_prefill)]
        owners = {request.denoising: request for request in ready if request.denoising is not None}
        if not owners:
            self.denoiser.reset()  # layouts hold memory of the cache
            return
        unfinished = [denoising for denoising in owners if not denoising.is_done]  # done: a step was interrupted
        errors = dict(self.denoiser.step(unfinished))
        done = [denoising for denoising in owners if denoising.is_done and denoising not in errors]
        errors |= dict(self.halving.run(done, check_finite)) if done else {}
        for denoising, request in owners.items():
            if denoising in errors:
                self._fail(request, errors[denoising])
                continue
            try:
                if denoising.is_done and denoising.without_all is not None:
                    self._unreleased.append(denoising.without_all)  # first: an interruption loses none
                if denoising in unfinished:
                    request.report_progress()
                if denoising.is_done:
                    request.finish_denoising()
                    self.drawings += 1
            except BaseException as error:
                _end_in_the_middle(request, error)
        self._close(())


def _processed(logits: Shaped[Tensor, "r v"], requests: Sequence[RequestState]) -> Shaped[Tensor, "r v"]:
    """Logits after the processors of each row. One that raises an error ends its own request."""
    rows = list(logits.to(precise(logits.dtype)).unbind())
    for i, request in enumerate(requests):
        if not request.options.logits_processors:
            continue
        try:
            rows[i] = request.process(rows[i])
        except caught() as error:
            request.end(EndReason.ERROR, released(error))
    return torch.stack(rows)


def _end_in_the_middle(request: RequestState, error: BaseException) -> None:
    """Ends a request whose state has changed in part, and raises the error anew if it is an interruption."""
    if isinstance(error, caught()):
        request.end(EndReason.ERROR, released(error))
        return
    request.end(EndReason.ERROR, RuntimeError(f"{request.where}: it was interrupted by {type(error).__name__}"))
    raise error
