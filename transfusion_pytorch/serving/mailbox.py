"""Events on their way from the thread of an engine to an event loop."""

import asyncio
from collections import deque
from collections.abc import Iterable
from threading import Lock

from transfusion_pytorch.generation.events import DrawingProgress, Event


class Mailbox:
    """The events of one request that its client has not read yet.

    The engine's thread calls `put` and `close`, one client at a time awaits `get`, in any event loop. The two share a
    lock that is never held while either waits.

    A client that reads slowly, or not at all, costs no more memory than the sample: of several `DrawingProgress` in a
    row only the latest is kept. Text and modalities are part of the sample.

    - `is_abandoned`: nobody will read any more. It is set without the lock, because the garbage collector may do it at
      any moment, in any thread
    """

    def __init__(self) -> None:
        self.is_abandoned = False
        self._lock = Lock()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False
        self._error: BaseException | None = None

    def put(self, events: Iterable[Event]) -> None:
        """Adds events, and wakes the client."""
        with self._lock:
            for event in events:
                latest = self._events[-1] if self._events else None
                if isinstance(event, DrawingProgress) and isinstance(latest, DrawingProgress):
                    self._events.pop()
                self._events.append(event)
        self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """Nothing will come any more. `error` is raised in the client once it has read everything else."""
        with self._lock:
            self._is_closed = True
            self._error = None if error is None else raisable(error)
        self._wake()

    async def get(self) -> Event | None:
        """The next event, as soon as there is one; None after the last."""
        while not self.is_abandoned:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._is_closed:
                    break
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            await waiter
        error, self._error = self._error, None
        try:
            if error is not None and not self.is_abandoned:
                raise error
        finally:
            del error  # its traceback holds this frame, which must not hold the error
        return None

    def _wake(self) -> None:
        with self._lock:
            waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        try:
            waiter.get_loop().call_soon_threadsafe(_finish, waiter)
        except RuntimeError:  # the event loop was closed while the client waited in it
            self.is_abandoned = True


def _finish(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():  # it is cancelled if the client has stopped waiting
        waiter.set_result(None)


def raisable(error: BaseException) -> BaseException:
    """An error that a coroutine can raise and that says what it means there.

    User code may raise anything. Out of a coroutine, `StopIteration` and `StopAsyncIteration` would look like the end
    of a loop, `CancelledError` like a cancelled task, and `SystemExit` would end the event loop.
    """
    is_ordinary = isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration))
    if is_ordinary:
        return error
    wrapped = RuntimeError(f"{type(error).__name__} was raised in the engine: {error}")
    wrapped.__cause__ = error
    return wrapped
