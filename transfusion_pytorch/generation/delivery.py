"""What clients get of a request: its events and its sample, with modalities as users see them.

n ids.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.failures import Halving, caught
from transfusion_pytorch.generation.batch_state import as_pieces
from transfusion_pytorch.generation.events import Ended, EndReason, Event, FinishedModality, ModalityDone, Sample
from transfusion_pytorch.generation.request import RequestState
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.samples import Modality, TypedModality, UnprocessedModality


class EngineInUse(RuntimeError):
    """Another thread uses the engine, or a step calls it from inside of itself."""


class Request:
    """A client's handle of a request."""

    def __init__(self, engine: Any, request: RequestState):
        self._engine, self._request = engine, request
        self._has_ended = False

    @property
    def is_done(self) -> bool:
        return self._request.is_done

    @property
    def reason(self) -> EndReason | None:
        """Why it ended, once it has."""
        return self._request.reason

    def new_events(self) -> list[Event]:
        """Events since the last call; the last one of a request is `Ended`."""
        with self._engine.exclusive():
            self._engine.decode_modalities_of(self._request)
            events = list(shown_events(self._request))
            if is_last := self.is_done and not self._has_ended:
                assert self.reason is not None
                events.append(Ended(sample_of(self._request), self.reason, self._request.error))
            self._request.events = []  # from here on nothing can fail, so none is lost
            self._has_ended |= is_last
        return events

    def events(self) -> "EventStream":
        """Iterates over events, and steps the engine whenever there are none. Closing or dropping the iterator cancels
        the request. Raises the error that ends it, if one does.
        """
        return EventStream(self)

    def result(self) -> Sample:
        """The finished sample. Raises the error that ended it, if one did, and `RuntimeError` while it goes on."""
        if not self.is_done:
            raise RuntimeError("this request is not done yet: call step() of its engine until it is, or run()")
        with self._engine.exclusive():
            self._engine.decode_modalities_of(self._request)
        self._request.raise_error()
        return sample_of(self._request)

    def cancel(self) -> None:
        """Ends it and frees its memory, from any thread. Its result is the sample so far."""
        self._engine.cancel(self._request)


class EventStream(Iterator[Event]):
    """The events of a request, which is cancelled when this is closed or dropped."""

    def __init__(self, handle: Request):
        self._handle = handle
        self._events: list[Event] = []
        self._is_over = False

    def __iter__(self) -> "EventStream":
        return self

    def __next__(self) -> Event:
        if self._is_over:
            raise StopIteration
        handle = self._handle
        try:
            while not self._events:
                if handle._has_ended:
                    handle._request.raise_error()
                    raise StopIteration
                self._events = handle.new_events()
                if not self._events and not handle._has_ended:
                    handle._engine.step()
        except EngineInUse:
            raise
        except BaseException:
            self.close()
            raise
        return self._events.pop(0)

    def close(self) -> None:
        """Cancels the request, if it is not done yet."""
        if not self._is_over:
            self._is_over = True
            self._handle.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_is_over"):
            self.close()


def undecoded(request: RequestState) -> list[tuple[int, Modality]]:
    """Finished modalities that are not decoded yet, by their number in the sample."""
    return [(i, piece) for i, piece in enumerate(request.modalities) if i not in request.shown]


def decode_modalities(
    model: Any, requests: Sequence[RequestState], halving: Halving, *, most: int
) -> list[tuple[RequestState, BaseException]]:
    """Decodes what these requests have finished, all of a shape at once, but at most `most` in one call. Returns the
    requests whose decoder fails, and why; they have latents in its place.
    """
    pieces = [(it, number, piece) for it in requests for number, piece in undecoded(it)]
    failed = []
    for raw in (True, False):

        def decode(some: Sequence[tuple[RequestState, int, Modality]], raw: bool = raw) -> None:
            [parts] = model.decode([[piece for _, _, piece in some]], raw=raw)
            for (request, number, _), (_, shown) in zip(some, parts, strict=True):
                request.shown[number] = shown

        members = [it for it in pieces if it[0].options.return_unprocessed_modalities is raw]
        for start in range(0, len(members), most):
            for (request, number, piece), error in halving.run(members[start : start + most], decode):
                request.shown[number] = piece.tensor
                with suppress(caught()):  # the layout of users may be what failed
                    [[(_, request.shown[number])]] = model.decode([[piece]], raw=True)
                failed.append((request, error))
    return failed


def shown_events(request: RequestState) -> Iterator[Event]:
    """Its events as clients see them. Finished modalities have to be decoded before."""
    for event in request.events:
        if isinstance(event, FinishedModality):
            shown = request.shown[event.number].clone()
            yield ModalityDone(request.modalities[event.number].type, shown, event.num_evaluations)
        else:
            yield event


def sample_of(request: RequestState) -> Sample:
    """The sample so far: text, `(type, modality)`, text, ... Its modalities have to be decoded before."""
    device, dtype, chosen = request.model.device, precise(request.model.dtype), request.log_probabilities
    kind = UnprocessedModality if request.options.return_unprocessed_modalities else TypedModality
    parts: list[Any] = []
    log_probabilities: list[Tensor | None] = []
    items = request.branch.items
    skipped = request.prompt_items if request.options.return_without_prompt else 0
    number = sum(isinstance(item, Modality) for item in items[:skipped])  # of the next modality
    start = skipped - number  # of the next text among all ids
    for piece in as_pieces(items[skipped:]):
        if isinstance(piece, Modality):
            parts.append(kind(piece.type, request.shown[number].detach().clone().to(device)))
            log_probabilities.append(None)
            number += 1
            continue
        parts.append(piece.ids.to(device))
        if chosen is not None:
            made = chosen[start : start + len(piece.ids)]
            log_probabilities.append(torch.tensor(made, device=device, dtype=dtype))
        start += len(piece.ids)
    return Sample(
        parts,
        reason=request.reason or EndReason.CANCELLED,
        log_probabilities=None if chosen is None else log_probabilities,
    )
