"""An engine for asyncio: many clients, in any threads and event loops, share one model."""

import asyncio
import weakref
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.generation.engine import Engine, EngineOptions, EngineStats
from transfusion_pytorch.generation.events import DrawingProgress, Ended, EndReason, Event, Sample
from transfusion_pytorch.generation.options import (
    SamplingKeywords,
    SamplingOptions,
    checks_itself,
    takes_sampling_options,
)
from transfusion_pytorch.sampling import SamplingMethods
from transfusion_pytorch.serving.engine_thread import EngineClosed, EngineThread
from transfusion_pytorch.serving.mailbox import Mailbox, raisable

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncEngine:
    """Serves a model to clients that await: requests of all of them are batched together.

    ```python
    async with AsyncEngine(model, max_batch=16) as engine:
        sample = await engine.sample(prompt, max_length=256)
        async for event in engine.stream(prompt, max_length=256):
            ...
    ```

    A thread of its own steps the engine, under the autocast in which this is created, and sleeps while there are no
    requests. All methods may be called from any thread and any event loop, several at once; none blocks the event loop.
    Prompts, options and samples are those of `Engine.submit`.

    - A client that leaves cancels its request: its task is cancelled, its stream closed, or forgotten.
    - A request that fails raises its error where it is awaited, and nowhere else.
    - If the engine itself fails (a bug), all clients get that error. The engine then serves on, with an empty cache.

    `source` is a model, whose `create_engine` gets the `options`, or an engine, which from then on belongs to this
    object alone. The thread ends with `aclose`, with the `async with`, or when the object is forgotten.
    """

    @checks_itself
    def __init__(self, source: Engine | SamplingMethods, **options: "Unpack[EngineOptions]"):
        if isinstance(source, Engine) and options:
            raise TypeError(f"options of an engine that exists already cannot be set: {', '.join(options)}")
        self._thread = EngineThread(source if isinstance(source, Engine) else source.create_engine(**options))
        # the thread does not know this object, so that one that nobody closes can go, and takes its thread along
        weakref.finalize(self, self._thread.stop).atexit = False

    @takes_sampling_options
    @checks_itself
    async def sample(
        self,
        prompt: Any = None,
        *,
        timeout: float | None = None,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",
    ) -> Sample:
        """Continues one prompt, and returns its sample; after `timeout` seconds, as far as it has come.

        Raises the error that ends it, if one does, and `EngineClosed` if the engine is closed first.
        """
        ended = None
        arguments = dict(keywords, timeout=timeout, options=options)
        async with EventStream(self, prompt, arguments, listen=False) as stream:
            async for event in stream:
                ended = event
        assert isinstance(ended, Ended), "the last event of a request says that it has ended"
        if ended.reason is EndReason.CANCELLED:
            raise EngineClosed("this AsyncEngine was closed before the sample was finished")
        return cast(Sample, ended.sample)

    @takes_sampling_options
    @checks_itself
    def stream(
        self,
        prompt: Any = None,
        *,
        timeout: float | None = None,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",
    ) -> "EventStream":
        """Continues one prompt, and streams its events, for at most `timeout` seconds. It is submitted at once. Errors,
        also of a bad prompt, are raised while the stream is read.
        """
        return EventStream(self, prompt, dict(keywords, timeout=timeout, options=options), listen=True)

    async def preview(self, event: DrawingProgress) -> Float[Tensor, "..."]:
        """`event.preview()`, computed between two steps of the engine and not in the event loop."""
        future: Future[Tensor] = Future()
        self._thread.post(partial(_show, event, future))
        return await asyncio.wrap_future(future)

    def weights_changed(self) -> None:
        """Call this after the model's weights have changed: requests that are submitted from now on use the new weights
        only. Does not wait.
        """
        self._thread.weights_changed()

    @property
    def stats(self) -> EngineStats:
        """What the engine has done up to its latest step."""
        return self._thread.stats

    async def aclose(self) -> None:
        """Cancels all requests, and ends the thread. Streams then end with the reason `CANCELLED`; `sample` raises
        `EngineClosed`, and so does every later call.
        """
        self._thread.stop()
        await asyncio.wrap_future(self._thread.ended)
        self._thread.join()  # returns at once: `ended` is done

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class EventStream:
    """The events of one request (`generation.events`), in order; `Ended` is the last. If an error ended the request,
    it is raised after that.

    As with an asynchronous generator, the request is cancelled when the stream is closed or no longer referenced, and
    when a task is cancelled that waits for an event. Unlike with one, this needs no event loop, and the request is
    submitted at once.

    A client that reads slowly misses steps of drawings, and nothing else: of several that it has not read, the latest
    is kept.
    """

    def __init__(self, engine: AsyncEngine, prompt: Any, options: dict[str, Any], *, listen: bool):
        self._engine = engine  # which lives as long as its clients
        self._mailbox = Mailbox()
        self._is_awaited = False
        engine._thread.submit(self._mailbox, prompt, options, listen=listen)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> Event:
        if self._is_awaited:
            raise RuntimeError("this stream is awaited already: one client reads it, and one event at a time")
        self._is_awaited = True
        try:
            event = await self._mailbox.get()
        except BaseException:  # the error of the request, or nobody waits for it any more
            self._leave()
            raise
        finally:
            self._is_awaited = False
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Cancels the request, if it is not done yet."""
        self._leave()

    def _leave(self) -> None:
        if not self._mailbox.is_abandoned:
            self._mailbox.is_abandoned = True
            self._engine._thread.wake()

    async def __aenter__(self) -> "EventStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        if hasattr(self, "_mailbox"):
            self._leave()


def _show(event: DrawingProgress, future: "Future[Tensor]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        with torch.no_grad():
            preview = event.preview()
    except BaseException as error:
        future.set_exception(raisable(error))
    else:
        future.set_result(preview)
