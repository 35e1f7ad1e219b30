"""Failures: what one request did wrong ends that one alone, and keeps no memory."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Isolation:
    """Runs many items together, and finds out which of them fail.

    Where memory is short, it says so once in its life.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def run(self, items: Sequence[Item], run: Callable[[Sequence[Item]], None]) -> list[tuple[Item, Exception]]:
        """Runs all items together; if that fails, each half by itself, and so on, so that only those fail whose fault
        it is. Returns them, and why.

        The failed run is let go before the next begins, with all of its activations.
        """
        try:
            run(items)
            return []
        except Exception as error:
            failure = released(error)
        if len(items) == 1:
            return [(items[0], failure)]
        if _is_out_of_memory(failure):
            self._say_memory_is_short(len(items), failure)
        half = len(items) // 2
        return [*self.run(items[:half], run), *self.run(items[half:], run)]

    def _say_memory_is_short(self, count: int, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        with suppress(UserWarning):  # which is an error where warnings are, and would end the step in its middle
            warnings.warn(
                f"a forward pass over {count} requests did not fit into memory ({error}); it is run in halves. A "
                "smaller max_batch would need less",
                stacklevel=4,
            )


class OriginalTraceback(Exception):
    """Where an error was raised, as text: frames would keep their tensors alive, and those of whoever called them."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def released(error: Exception) -> Exception:
    """The same error without the frames of its traceback, which becomes text in its cause (see `OriginalTraceback`)."""
    if isinstance(error.__cause__, OriginalTraceback):  # raised for the second time
        error.__cause__ = None
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            chain += [each.__cause__, each.__context__]
            traceback.clear_frames(each.__traceback__)
            each.__traceback__ = None
    error.__context__, error.__cause__ = None, OriginalTraceback(text)
    return error


def _is_out_of_memory(error: Exception) -> bool:
    """On any device; for a CPU torch has no type of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
