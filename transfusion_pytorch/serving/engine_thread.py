"""The thread that runs an engine, the only one that touches it."""

import atexit
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

import torch

from transfusion_pytorch.failures import catch_everything
from transfusion_pytorch.generation.engine import Engine, Request
from transfusion_pytorch.generation.events import Ended
from transfusion_pytorch.serving.mailbox import Mailbox

_all: "WeakSet[EngineThread]" = WeakSet()


class EngineClosed(RuntimeError):
    """The engine was closed, or has failed for good: it takes no requests, and those that it had are cancelled."""


class EngineThread:
    """Steps an engine as long as there are requests, and sleeps otherwise.

    Other threads talk to it through a queue of commands, which run between two steps. It talks to clients through their
    mailboxes, and waits for none of them.

    - `stats`: those of the engine after its latest step
    - `ended`: a future that is done when the thread has nothing left to do
    """

    def __init__(self, engine: Engine):
        self.stats = engine.stats
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # a client that no longer waits for it cannot cancel it
        self.engine = engine
        self._autocast = _autocast_of(engine)
        self._requests: dict[Mailbox, Request] = {}
        # put() of this queue may be called by the garbage collector, even while this very thread is inside of put()
        self._commands: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._lock = threading.Lock()  # of `_is_open` against what is being put into the queue
        self._is_open = True
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="AsyncEngine", daemon=True)
        self._thread.start()
        _all.add(self)

    # what other threads may call

    def submit(self, mailbox: Mailbox, prompt: Any, options: Mapping[str, Any], *, listen: bool) -> None:
        """Queues a request. All that becomes of it goes to the mailbox. Raises `EngineClosed`."""
        self.post(partial(self._submit, mailbox, prompt, options, listen))

    def post(self, command: Callable[[], Any]) -> None:
        """Has the thread run a command before its next step. Raises `EngineClosed`."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "an AsyncEngine was called by code that it runs itself (a logits processor, a decoder), and would wait "
                "for itself"
            )
        with self._lock:
            if not self._is_open:
                raise self._closed()
            self._commands.put(command)

    def weights_changed(self) -> None:
        """Tells the engine before its next step. Raises `EngineClosed`."""
        self.post(self.engine.weights_changed)

    def wake(self) -> None:
        """Has the thread look after its requests now, though no command has come."""
        self._commands.put(_nothing)

    def stop(self) -> None:
        """Ends the thread after its current step, and cancels what is unfinished. Does not wait for it."""
        self._is_open = False
        self.wake()

    def join(self) -> None:
        """Waits until the thread has ended; does nothing in that thread itself."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # what runs in the thread

    def _run(self) -> None:
        catch_everything()
        while self._is_open:
            try:
                with self._autocast():  # entered anew each time: it keeps converted weights, which may change
                    self._run_commands(wait=self.engine.is_idle)
                    self._cancel_abandoned()
                    if not self.engine.is_idle:
                        self.engine.step()
                    self._tell_clients()
                    self.stats = self.engine.stats
            except BaseException as error:  # whatever it is, nobody may wait for ever
                self._recover(error)
        with self._lock:  # whoever is inside of `post` gets his command into the queue
            self._is_open = False
        try:
            self._end()
        finally:
            self.ended.set_result(None)

    def _run_commands(self, *, wait: bool) -> None:
        """Runs all commands there are; with `wait` it sleeps until there is one."""
        while (command := self._next_command(wait)) is not None:
            try:
                command()
            except BaseException as error:
                self._recover(error)
            wait = False

    def _next_command(self, wait: bool) -> Callable[[], Any] | None:
        try:
            return self._commands.get(block=wait)
        except Empty:
            return None

    def _submit(self, mailbox: Mailbox, prompt: Any, options: Mapping[str, Any], listen: bool) -> None:
        if mailbox.is_abandoned:
            return
        if self._failure is not None:
            mailbox.close(self._closed())
            return
        try:  # also while it closes: what was accepted before is cancelled like everything else
            self._requests[mailbox] = self.engine.submit(prompt, listen=listen, **options)
        except BaseException as error:
            mailbox.close(error)

    def _cancel_abandoned(self) -> None:
        for mailbox in [mailbox for mailbox in self._requests if mailbox.is_abandoned]:
            self._requests.pop(mailbox).cancel()

    def _tell_clients(self) -> None:
        for mailbox, request in list(self._requests.items()):
            try:
                events = request.new_events()
            except BaseException as error:  # it decodes what is finished, with code of the user
                request.cancel()
                mailbox.close(error)
                del self._requests[mailbox]
                continue
            if events:
                mailbox.put(events)
            if events and isinstance(events[-1], Ended):
                mailbox.close(events[-1].error)
                del self._requests[mailbox]

    def _recover(self, error: BaseException) -> None:
        """After a step that has failed, which an engine's never should: tells all clients, and goes on with an empty
        engine, or ends where that cannot be had.
        """
        requests, self._requests = self._requests, {}
        try:
            for request in requests.values():
                request.cancel()
            self.engine.reset()
            self._carry_out_cancellations()
            if not self.engine.is_idle:
                raise error
        except BaseException:
            self._failure, self._is_open = error, False
        finally:
            for mailbox in requests:
                mailbox.close(error)

    def _end(self) -> None:
        """Cancels what is unfinished, also what is still in the queue of commands."""
        self._run_commands(wait=False)
        try:
            if self._failure is None:
                for request in self._requests.values():
                    request.cancel()
                self._carry_out_cancellations()
                self._tell_clients()
                self.stats = self.engine.stats
        except BaseException as error:
            self._failure = error
        for mailbox in self._requests:
            mailbox.close(self._closed())
        self._requests = {}

    def _carry_out_cancellations(self) -> None:
        if not self.engine.is_idle:
            self.engine.step()

    def _closed(self) -> EngineClosed:
        if self._failure is None:
            return EngineClosed("this AsyncEngine is closed")
        error = EngineClosed(f"this AsyncEngine is closed, because its engine failed: {self._failure!r}")
        error.__cause__ = self._failure
        return error


def _nothing() -> None:
    pass


def _autocast_of(engine: Engine) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of the current thread, for another one."""
    kind = engine.model.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind))


@atexit.register
def _end_all() -> None:
    """A thread that computes while the interpreter is taken apart can crash it."""
    threads = list(_all)
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join()
