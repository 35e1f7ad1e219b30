"""Failures: what one request did wrong ends that one alone, and keeps no memory."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

Item = TypeVar("Item")


def run_halving(items: Sequence[Item], run: Callable[[Sequence[Item]], None]) -> list[tuple[Item, Exception]]:
    """Runs all items together; if that fails, each half by itself, and so on, so that only those fail whose fault it
    is. Returns them, and why.

    The failed run is let go before the next begins, with all of its activations. Where memory was short, a warning says
    once that less was run at a time.
    """
    try:
        run(items)
        return []
    except Exception as error:
        failure = released(error)
    if len(items) == 1:
        return [(items[0], failure)]
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        _say_memory_is_short(len(items), failure)
    half = len(items) // 2
    return [*run_halving(items[:half], run), *run_halving(items[half:], run)]


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


def _say_memory_is_short(count: int, error: Exception) -> None:
    with suppress(UserWarning):  # which is an error where warnings are, and would end the step in its middle
        warnings.warn(
            f"a forward pass over {count} requests did not fit into memory ({error}); it is run in halves. A smaller "
            "max_batch would need less",
            stacklevel=4,
        )
