"""Failures: an error ends only the request at fault, and keeps no tensors alive.

What counts as one is an `Exception`. What else is raised (Ctrl-C, `SystemExit`) is an interruption and goes on to
whoever called, but in a thread of our own, which nobody interrupts: there it is a failure of somebody's code too.
"""

import inspect
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import TypeVar

import torch

Item = TypeVar("Item")
Error = TypeVar("Error", bound=BaseException)
# frames of generators and coroutines are left alone: to clear one would close it
SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_CAUGHT: ContextVar[type[BaseException]] = ContextVar("caught", default=Exception)


def caught() -> type[BaseException]:
    """What counts as a failure in this thread."""
    return _CAUGHT.get()


def catch_everything() -> None:
    """From now on interruptions count as failures in this thread."""
    _CAUGHT.set(BaseException)


class Halving:
    """Runs items as one batch; if that fails, each half by itself, and so on, until only items at fault fail.

    The activations of a failed run are freed before the next begins. If memory was short, one warning says that smaller
    batches are run.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def run(
        self, items: Sequence[Item], together: Callable[[Sequence[Item]], None]
    ) -> list[tuple[Item, BaseException]]:
        """Returns the items that failed, with their errors."""
        try:
            together(items)
            return []
        except caught() as error:
            failure = released(error)
        if len(items) == 1:
            return [(items[0], failure)]
        if _is_out_of_memory(failure):
            self._warn(len(items), failure)
        half = len(items) // 2
        return [*self.run(items[:half], together), *self.run(items[half:], together)]

    def _warn(self, count: int, error: BaseException) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        with suppress(UserWarning):  # where warnings are errors, this one must not end the step
            warnings.warn(
                f"memory is short: what was run for a batch of {count} did not fit ({error}), and is run in halves. A "
                "smaller max_batch needs less",
                stacklevel=4,
            )


class OriginalTraceback(Exception):
    """Where an error was raised, as text: frames would keep their tensors alive, and those of whoever called them."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def released(error: Error) -> Error:
    """The same error without the frames of its traceback, which becomes text in its cause (see `OriginalTraceback`)."""
    if isinstance(error.__cause__, OriginalTraceback):  # raised for the second time
        error.__cause__ = None
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        chain += [each.__cause__, each.__context__]
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if not frame.f_code.co_flags & SUSPENDABLE:
                with suppress(RuntimeError):  # a frame that is still running, such as the caller's
                    frame.clear()
        each.__traceback__ = None
    error.__context__, error.__cause__ = None, OriginalTraceback(text)
    return error


def _is_out_of_memory(error: BaseException) -> bool:
    """On any device; for a CPU torch has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
