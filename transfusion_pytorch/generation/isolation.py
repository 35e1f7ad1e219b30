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


def released(error: Exception) -> Exception:
    """The same error, whose traceback shows where it was raised but no longer holds the tensors of those frames."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    return error


def _say_memory_is_short(count: int, error: Exception) -> None:
    with suppress(UserWarning):  # which is an error where warnings are, and would end the step in its middle
        warnings.warn(
            f"a forward pass over {count} requests did not fit into memory ({error}); it is run in halves. A smaller "
            "max_batch would need less",
            stacklevel=4,
        )
