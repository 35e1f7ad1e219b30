"""`DataPlan`: which samples every training step sees, before any of them is loaded."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from transfusion_pytorch.data.lengths import Lengths
from transfusion_pytorch.data.loading import SampleError, Skipped
from transfusion_pytorch.data.mixture import Mixture, as_mixture
from transfusion_pytorch.data.order import SampleReference
from transfusion_pytorch.data.packing import TooLong, Window, make_window
from transfusion_pytorch.sequence.packer import Packer


class StepPlan(NamedTuple):
    """The samples of one optimizer step over all processes.

    - `step`: counted from 0
    - `micro_batches`: its packs; or with a `batch_size`, all of its samples as one, for the loader to split
    - `skipped`: samples that planning left out since the last step
    """

    step: int
    micro_batches: tuple[tuple[SampleReference, ...], ...]
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Cursor:
    """How far a plan has come. With a `batch_size` only `step` and `start` change.

    - `step`: the next one
    - `start`: the position at which the present window starts, or the next step
    - `deferred`: positions that the window before it left over
    - `pack`: how many packs of the present window are used
    - `tokens`, `capacity`: what all packs so far hold, and could hold
    """

    step: int = 0
    start: int = 0
    deferred: tuple[int, ...] = ()
    pack: int = 0
    tokens: int = 0
    capacity: int = 0


class DataPlan:
    """The steps of a training, as a function of a seed. Iterating gives a `StepPlan` for each, and moves the plan on.

    `data` is a `Mixture` or a dataset. A step has `batch_size` samples, or `packs_per_step` packs of at most
    `token_budget` tokens, each of which is a micro-batch. Neither depends on the number of processes or data workers.

    - `epochs`: the plan ends when every source has been passed through so often; None never ends. The last step may be
      smaller.

    And with a token budget:

    - `buffer`: samples are packed within windows of so many: more is fuller, and costs more when a run is resumed
    - `packer`: `model.packer()`, which measures samples that do not know their length (see `Lengths`)
    - `too_long`: what happens to a sample longer than the budget: "error" names it, "skip" leaves it out and reports it

    Every process measures the samples of all processes. Raises `ValueError` for options that do not go together.
    """

    def __init__(
        self,
        data: Any,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        token_budget: int | None = None,
        packs_per_step: int | None = None,
        epochs: int | None = None,
        buffer: int = 1024,
        packer: Packer | None = None,
        too_long: TooLong = "error",
    ):
        check_sizes(batch_size, token_budget, packs_per_step, epochs, buffer, too_long)
        self.mixture: Mixture = as_mixture(data)
        self.seed, self.epochs, self.batch_size = seed, epochs, batch_size
        self.token_budget, self.packs_per_step = token_budget, None if token_budget is None else packs_per_step or 1
        self.buffer, self.too_long = buffer, too_long
        self.total = None if epochs is None else self.mixture.length(epochs)
        self._per_step: int | _Packing  # a batch size, or packs
        if token_budget is None:
            assert batch_size is not None
            self._per_step = batch_size
        else:
            lengths = Lengths(self.mixture, packer, seed)
            self._per_step = _Packing(token_budget, packs_per_step or 1, buffer, too_long, lengths)
        self._cursor = Cursor()
        self._window: tuple[tuple[int, tuple[int, ...]], Window] | None = None

    def __iter__(self) -> Iterator[StepPlan]:
        for plan, cursor in self._steps(self._cursor):
            self._cursor = cursor
            yield plan

    def upcoming(self) -> Iterator[tuple[StepPlan, dict[str, Any]]]:
        """The steps from here on, each with the state after it. The plan itself stays where it is."""
        for plan, cursor in self._steps(self._cursor):
            yield plan, self._state_of(cursor)

    @property
    def num_steps(self) -> int | None:
        """How many steps there are in all; None where the plan has no end, or where that depends on lengths."""
        if self.total is None or self.batch_size is None:
            return None
        return -(-self.total // self.batch_size)

    @property
    def fill(self) -> float | None:
        """The mean share of the token budget that the packs so far use; None before the first."""
        return self._cursor.tokens / self._cursor.capacity if self._cursor.capacity else None

    def state(self) -> dict[str, Any]:
        """How far it has come, as JSON: a few numbers, and the positions of at most a pack of samples."""
        return self._state_of(self._cursor)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken. Raises `ValueError` where that was another plan. `epochs` may differ, unless
        the data then end within the present window.
        """
        check_state(state, "plan", self._identity())
        cursor = Cursor(**{**state["cursor"], "deferred": tuple(state["cursor"]["deferred"])})
        before, end = state["plan"].get("total"), cursor.start + self.buffer
        ends = {total for total in (before, self.total) if total is not None}
        if self.batch_size is None and before != self.total and end >= min(ends) and cursor.start != before:
            raise ValueError(
                f"the state was taken in the last window of its data, which ended after {before} samples and now end "
                f"after {self.total}; go on with the same epochs, or from an earlier state"
            )
        self._cursor = cursor

    def _state_of(self, cursor: Cursor) -> dict[str, Any]:
        identity = self._identity() | {"total": self.total}
        return {"plan": identity, "cursor": asdict(cursor) | {"deferred": list(cursor.deferred)}}

    def _identity(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        packs = {"buffer": self.buffer, "too_long": self.too_long} if self.batch_size is None else {}
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "token_budget": self.token_budget,
            "packs_per_step": self.packs_per_step,
            "shuffle": self.mixture.shuffle,
            "sizes": self.mixture.sizes,
            "weights": self.mixture.weights,
            **packs,
        }

    def _steps(self, cursor: Cursor) -> Iterator[tuple[StepPlan, Cursor]]:
        while (following := self._next(cursor)) is not None:
            yield following
            cursor = following[1]

    def _next(self, cursor: Cursor) -> tuple[StepPlan, Cursor] | None:
        if isinstance(self._per_step, int):
            return self._next_samples(cursor, self._per_step)
        return self._next_packs(cursor, self._per_step)

    def _references(self, start: int, count: int) -> list[SampleReference]:
        end = start + count if self.total is None else min(start + count, self.total)
        return [self.mixture.reference(position, seed=self.seed) for position in range(start, end)]

    def _next_samples(self, cursor: Cursor, count: int) -> tuple[StepPlan, Cursor] | None:
        samples = self._references(cursor.start, count)
        if not samples:
            return None
        step = StepPlan(cursor.step, (tuple(samples),))
        return step, replace(cursor, step=cursor.step + 1, start=cursor.start + len(samples))

    def _next_packs(self, cursor: Cursor, packing: "_Packing") -> tuple[StepPlan, Cursor] | None:
        packs: list[tuple[SampleReference, ...]] = []
        skipped: list[Skipped] = []
        step, unusable = cursor.step, 0
        while len(packs) < packing.packs_per_step and not self._is_at_end(cursor):
            window = self._window_at(packing, cursor.start, cursor.deferred)
            if not cursor.pack:
                skipped += window.skipped
            unusable = 0 if window.sizes else unusable + packing.buffer
            if unusable and unusable >= self.mixture.length(1) + packing.buffer:
                raise SampleError(f"every sample was left out; the last one because: {skipped[-1].reason}")
            taken = window.packs[cursor.pack : cursor.pack + packing.packs_per_step - len(packs)]
            packs += taken
            sizes = [window.sizes[reference.position] for pack in taken for reference in pack]
            cursor = replace(
                cursor,
                pack=cursor.pack + len(taken),
                tokens=cursor.tokens + sum(sizes),
                capacity=cursor.capacity + len(taken) * packing.budget,
            )
            if cursor.pack == len(window.packs):
                following = cursor.start + packing.buffer
                start = following if self.total is None else min(following, self.total)
                cursor = replace(cursor, start=start, deferred=window.deferred, pack=0)
        if not packs and not skipped:
            return None
        return StepPlan(step, tuple(packs), tuple(skipped)), replace(cursor, step=step + 1)

    def _is_at_end(self, cursor: Cursor) -> bool:
        return self.total is not None and cursor.start >= self.total and not cursor.deferred

    def _window_at(self, packing: "_Packing", start: int, deferred: tuple[int, ...]) -> Window:
        """The window that starts at a position; the last one is kept."""
        if self._window is None or self._window[0] != (start, deferred):
            references = [reference for position in deferred for reference in self._references(position, 1)]
            window = make_window(
                references + self._references(start, packing.buffer),
                deferred,
                packing.lengths,
                budget=packing.budget,
                too_long=packing.too_long,
                seed=self.seed,
                start=start,
                is_last=self.total is not None and start + packing.buffer >= self.total,
            )
            self._window = (start, deferred), window
        return self._window[1]


class _Packing(NamedTuple):
    """How samples are packed, where they are."""

    budget: int
    packs_per_step: int
    buffer: int
    too_long: TooLong
    lengths: Lengths


def check_sizes(
    batch_size: int | None,
    token_budget: int | None,
    packs_per_step: int | None,
    epochs: int | None,
    buffer: int,
    too_long: str,
) -> None:
    """Raises `ValueError` unless this is a way to cut data into steps."""
    if (batch_size is None) == (token_budget is None):
        raise ValueError(f"give batch_size or token_budget, got {batch_size} and {token_budget}")
    if batch_size is not None and packs_per_step is not None:
        raise ValueError("packs_per_step goes with a token_budget; the loader splits a batch_size by its accumulation")
    sizes = dict(batch_size=batch_size, token_budget=token_budget, packs_per_step=packs_per_step)
    for name, number in (sizes | dict(epochs=epochs, buffer=buffer)).items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is at least 1, got {number}")
    if too_long not in ("error", "skip"):
        raise ValueError(f"too_long is 'error' or 'skip', got {too_long!r}")


def check_state(state: Any, kind: str, expected: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless this is a state of a "plan" or "stream" of which all this is true."""
    if not isinstance(state, Mapping) or set(state) != {kind, "cursor"}:
        raise ValueError(f"expected a state with {kind!r} and 'cursor', got {state!r:.200}")
    found = state[kind]
    differs = [name for name in expected if found.get(name) != expected[name]]
    if differs:
        lines = ", ".join(f"{name} was {found.get(name)!r} and is {expected[name]!r}" for name in differs)
        raise ValueError(f"the order of samples differs from that of the state: {lines}")
