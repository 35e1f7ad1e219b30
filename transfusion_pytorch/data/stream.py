"""`StreamLoader`: the steps of a training over data that can only be read from the start to the end."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

from transfusion_pytorch.data.loader import Collate, LoadedStep, as_it_is, check_share, split_evenly
from transfusion_pytorch.data.loading import SampleError, Skipped, SkipSample, as_sample, default_name, leave_signals
from transfusion_pytorch.data.order import (
    SampleReference,
    generator_of,
    generators_kept,
    sample_seed,
    seed_generators,
    shuffled,
)
from transfusion_pytorch.data.packing import TooLong, make_window
from transfusion_pytorch.data.plan import check_sizes, check_state
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.samples import Sample

Prepare = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class StreamCursor:
    """How far a stream has come.

    - `step`: the next one
    - `position`, `epoch`, `index`: where the present window starts: in the endless stream, and in its epoch
    - `state`: that of the dataset there, if it has states
    - `used`: how many packs (or samples, with a `batch_size`) of the window are used
    """

    step: int = 0
    position: int = 0
    epoch: int = 0
    index: int = 0
    state: Any = None
    used: int = 0


class StreamLoader:
    """What a `StepLoader` is for a `DataPlan`, for an iterable dataset. Iterating gives `LoadedStep`s.

    The stream is cut into windows of `buffer` items, each of which is shuffled, or packed, by itself. `prepare(item,
    generator)` makes a sample of an item; by default the items are samples. Its random numbers depend on the seed and
    the item's position alone. `source` is the name of the stream.

    Limits, which datasets with an index do not have:

    - Every process reads the whole stream, and keeps its share of each step. With a `batch_size` it prepares its own
      samples only; with a token budget all of them, since they must be measured.
    - Reading is done here, or by one data worker (`num_workers=1`), not by several.
    - Shuffling reaches no further than a window, and the last pack of a window is not full: a window should have many
      packs. Leave shuffling to this loader: a buffer of the dataset's own would not be saved.
    - A resumed run reads what came before its window again, and drops it; unless the dataset has `state_dict()` and
      `load_state_dict()`, as those of Hugging Face do.

    `set_epoch(epoch)` is called before each epoch where the dataset has it. All other options are those of `DataPlan`
    and `StepLoader`.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        collate: Collate,
        *,
        prepare: Prepare | None = None,
        source: str = "stream",
        seed: int = 0,
        batch_size: int | None = None,
        token_budget: int | None = None,
        packs_per_step: int | None = None,
        epochs: int | None = None,
        buffer: int = 1024,
        packer: Packer | None = None,
        too_long: TooLong = "error",
        rank: int = 0,
        num_processes: int = 1,
        accumulation: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        skips_errors: bool = False,
    ):
        check_sizes(batch_size, token_budget, packs_per_step, epochs, buffer, too_long)
        check_share(rank, num_processes, accumulation, batch_size)
        if token_budget is not None and packer is None:
            raise ValueError("packing by tokens needs packer=model.packer(), which measures samples")
        if num_workers not in (0, 1):
            raise ValueError(f"a stream is read here or by one worker, got num_workers={num_workers}")
        self.dataset, self.collate, self.prepare, self.source = dataset, collate, prepare, source
        self.seed, self.epochs, self.buffer, self.packer = seed, epochs, buffer, packer
        self.batch_size, self.token_budget, self.packs_per_step = batch_size, token_budget, packs_per_step or 1
        self.too_long: TooLong = too_long
        self.rank, self.num_processes, self.accumulation = rank, num_processes, accumulation or 1
        self._cursor = StreamCursor()
        self.num_workers, self.pin_memory, self.skips_errors = num_workers, pin_memory, skips_errors

    def __iter__(self) -> Iterator[LoadedStep]:
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )
        for step in loader:
            self.load_state(step.state)
            yield step

    def state(self) -> dict[str, Any]:
        """How far it has come, as JSON (if the dataset's own state is)."""
        return {"stream": self._identity(), "cursor": asdict(self._cursor)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken. Raises `ValueError` where that was another stream."""
        check_state(state, "stream", self._identity())
        self._cursor = StreamCursor(**state["cursor"])

    def _identity(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        names = ("source", "seed", "batch_size", "token_budget", "packs_per_step", "buffer", "too_long")
        return {name: getattr(self, name) for name in names}

    def steps(self) -> Iterator[LoadedStep]:
        """Reads, prepares and collates the steps from where it stands."""
        step, units = self._cursor.step, self._units(self._cursor)
        while taken := list(islice(units, self.packs_per_step if self.batch_size is None else self.batch_size)):
            skipped = [entry for unit in taken for entry in unit.skipped] if self.rank == 0 else []
            batches = [self._collated(micro_batch, skipped) for micro_batch in self._share(taken)]
            step += 1
            state = {"stream": self._identity(), "cursor": asdict(replace(taken[-1].after, step=step))}
            yield LoadedStep(step - 1, batches, state, skipped)

    def _share(self, units: list["_Unit"]) -> list[list["_Item"]]:
        """The micro-batches of this process, as many as every other has."""
        if self.batch_size is None:
            packs = [unit.items for unit in units if unit.items]
            own = packs[self.rank :: self.num_processes]
            return own + [[]] * (max(1, -(-len(packs) // self.num_processes)) - len(own))
        pieces = split_evenly([item for unit in units for item in unit.items], self.num_processes * self.accumulation)
        return [list(piece) for piece in pieces[self.rank * self.accumulation :][: self.accumulation]]

    def _collated(self, items: list["_Item"], skipped: list[Skipped]) -> Any:
        """None where nothing is left."""
        samples: list[Sample] = []
        references: list[SampleReference] = []
        with generators_kept():
            for item in items:
                try:
                    samples.append(self._prepared(item))
                    references.append(item.reference)
                except (SkipSample, SampleError) as reason:
                    if isinstance(reason, SampleError) and not self.skips_errors:
                        raise
                    skipped.append(Skipped.because(item.reference, reason))
            return self.collate(samples, references) if samples else None

    def _prepared(self, item: "_Item") -> Sample:
        content, reference = item.content, item.reference
        own = sample_seed(self.seed, reference.position)
        try:
            seed_generators(own)
            made = content if self.prepare is None or item.is_prepared else self.prepare(content, generator_of(own))
            return as_sample(made, name=default_name(self.source, reference.index), source=self.source)
        except SkipSample:
            raise
        except Exception as error:
            problem = f"could not be prepared: {type(error).__name__}: {error}"
            raise SampleError.of(reference, problem) from error

    def _units(self, cursor: StreamCursor) -> Iterator["_Unit"]:
        """Packs, or single samples with a `batch_size`, each with the cursor behind it."""
        items, late = self._items(cursor), []
        while window := list(islice(items, self.buffer)):
            following = replace(window[-1].after, state=_state_of(self.dataset), used=0)
            units, skipped = self._cut(window, cursor.position)
            late += skipped if not cursor.used else []
            if late and not units and late[-1].reference.epoch > late[0].reference.epoch + 1:
                raise SampleError(f"every sample of an epoch was left out; the last one because: {late[-1].reason}")
            for used in range(cursor.used, len(units)):
                is_last = used + 1 == len(units)
                yield _Unit(units[used], late, following if is_last else replace(cursor, used=used + 1))
                late = []
            cursor = following
        if late:
            yield _Unit([], late, cursor)

    def _cut(self, window: list["_Item"], start: int) -> tuple[list[list["_Item"]], list[Skipped]]:
        """A window into packs, or shuffled samples; and what was left out."""
        if self.token_budget is None:
            order = shuffled(len(window), self.seed, "window", start).tolist()
            return [[window[i]] for i in order], []
        assert self.packer is not None
        prepared: dict[int, _Item] = {}
        by_position = {item.reference.position: item for item in window}

        def size_of(reference: SampleReference) -> int:
            item = by_position[reference.position]
            sample = self._prepared(item)
            prepared[reference.position] = item._replace(content=sample, is_prepared=True)
            try:
                return packer.num_tokens(sample)
            except (ValueError, TypeError) as error:
                raise SampleError.of(reference, f"could not be measured: {error}") from error

        packer = self.packer
        with generators_kept():
            packed = make_window(
                [item.reference for item in window],
                (),
                size_of,
                budget=self.token_budget,
                too_long=self.too_long,
                seed=self.seed,
                start=start,
                is_last=True,
            )
        return [[prepared[r.position] for r in pack] for pack in packed.packs], list(packed.skipped)

    def _items(self, cursor: StreamCursor) -> Iterator["_Item"]:
        """The items of all epochs from the start of the cursor's window on."""
        position, epoch, first = cursor.position, cursor.epoch, cursor.index
        state = cursor.state
        while self.epochs is None or epoch < self.epochs:
            index = first
            for content in _epoch_of(self.dataset, epoch, first, state):
                reference = SampleReference(position, self.source, index, epoch)
                position, index = position + 1, index + 1
                yield _Item(content, reference, StreamCursor(position=position, epoch=epoch, index=index))
            if not index:
                raise ValueError(
                    f"source {self.source!r} has no samples in epoch {epoch}; a generator can be read once only"
                )
            epoch, first, state = epoch + 1, 0, None


class _Item(NamedTuple):
    """What was read, and the cursor behind it."""

    content: Any
    reference: SampleReference
    after: StreamCursor
    is_prepared: bool = False


class _Unit(NamedTuple):
    items: list[_Item]
    skipped: list[Skipped]
    after: StreamCursor


class _Steps(IterableDataset):
    """For a data worker, or none."""

    def __init__(self, stream: StreamLoader):
        self.stream = stream

    def __iter__(self) -> Iterator[LoadedStep]:
        return self.stream.steps()


def _epoch_of(dataset: Any, epoch: int, index: int, state: Any) -> Iterator[Any]:
    """An epoch of a dataset from an index on: from the state that it had there, or by dropping what came before."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    if state is not None:
        dataset.load_state_dict(state)
        return iter(dataset)
    return islice(iter(dataset), index, None)


def _state_of(dataset: Any) -> Any:
    has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    return dataset.state_dict() if has_state else None
