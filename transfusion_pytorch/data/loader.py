"""`StepLoader`: the steps of a `DataPlan`, loaded and collated by data workers, for one of several processes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from transfusion_pytorch.data.loading import SampleError, Skipped, SkipSample, leave_signals, load_sample
from transfusion_pytorch.data.order import SampleReference, generators_kept
from transfusion_pytorch.data.plan import DataPlan, StepPlan
from transfusion_pytorch.sequence.samples import Sample

Collate = Callable[[list[Sample], list[SampleReference]], Any]
MicroBatch = tuple[SampleReference, ...]


class LoadedStep(NamedTuple):
    """What one process computes in one optimizer step.

    - `step`: counted from 0
    - `batches`: its micro-batches, equally many in all processes; None for one that has no samples here
    - `state`: that of the plan after this step, as JSON
    - `skipped`: samples that were left out; those of all processes together are each listed once
    """

    step: int
    batches: list[Any]
    state: dict[str, Any]
    skipped: list[Skipped]


class StepLoader:
    """Iterates over the steps of a plan, from where it stands; a step that was handed out has moved the plan on.

    `collate(samples, references)` makes a micro-batch of `Sample`s, in a data worker if there are any; the position in
    a reference can seed random numbers of its sample. With a `batch_size`, the samples of a step are split into
    `num_processes * accumulation` nearly equal neighbouring pieces, of which process `rank` gets `accumulation`. With a
    token budget, pack `k` of a step goes to process `k % num_processes`.

    With `skips_errors`, samples that cannot be loaded are left out, as those that raise `SkipSample` are.

    Samples and bits are the same for any number of workers, and a step has the same samples for any number of
    processes. The global random generators do not move. Iterate over one iterator at a time.
    """

    def __init__(
        self,
        plan: DataPlan,
        collate: Collate,
        *,
        rank: int = 0,
        num_processes: int = 1,
        accumulation: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        skips_errors: bool = False,
    ):
        check_share(rank, num_processes, accumulation, plan.batch_size)
        self.plan = plan
        self._upcoming = _Upcoming(plan, rank, num_processes, accumulation or 1)
        self._loader = DataLoader(
            _MicroBatches(plan.mixture.datasets, plan.seed, collate, skips_errors),
            batch_size=None,
            sampler=self._upcoming,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            generator=torch.Generator(),  # the loader would draw from torch's own otherwise
        )

    def state(self) -> dict[str, Any]:
        """That of the plan."""
        return self.plan.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken: the steps after it follow."""
        self.plan.load_state(state)

    def __iter__(self) -> Iterator[LoadedStep]:
        loaded = iter(self._loader)
        for first in loaded:
            upcoming = self._upcoming.announced.popleft()
            rest = islice(loaded, len(upcoming.micro_batches) - 1)
            micro_batches = [first, *rest]
            skipped = [*upcoming.skipped, *(entry for each in micro_batches for entry in each.skipped)]
            self.plan.load_state(upcoming.state)
            yield LoadedStep(upcoming.step, [each.batch for each in micro_batches], upcoming.state, skipped)


class _Announced(NamedTuple):
    """A step whose micro-batches are on their way through the data workers."""

    step: int
    micro_batches: list[MicroBatch]
    state: dict[str, Any]
    skipped: tuple[Skipped, ...]


class _Upcoming(Sampler):
    """The micro-batches of one process, in order. Announces each step before the first of its micro-batches."""

    def __init__(self, plan: DataPlan, rank: int, num_processes: int, accumulation: int):
        self.plan, self.rank, self.num_processes, self.accumulation = plan, rank, num_processes, accumulation
        self.announced: deque[_Announced] = deque()

    def __iter__(self) -> Iterator[MicroBatch]:
        self.announced = announced = deque()
        for plan, state in self.plan.upcoming():
            micro_batches = self._share(plan)
            skipped = plan.skipped if self.rank == 0 else ()
            announced.append(_Announced(plan.step, micro_batches, state, skipped))
            yield from micro_batches

    def _share(self, plan: StepPlan) -> list[MicroBatch]:
        """What this process gets of a step: as many micro-batches as every other, at least one, some of them empty."""
        if self.plan.batch_size is None:
            count = max(1, -(-len(plan.micro_batches) // self.num_processes))
            own = list(plan.micro_batches[self.rank :: self.num_processes])
            return own + [()] * (count - len(own))
        (samples,) = plan.micro_batches
        pieces = split_evenly(samples, self.num_processes * self.accumulation)
        return pieces[self.rank * self.accumulation :][: self.accumulation]


class _Loaded(NamedTuple):
    """A micro-batch, or None where it has no samples."""

    batch: Any
    skipped: list[Skipped]


class _MicroBatches(Dataset):
    """Loads and collates; this is what data workers get."""

    def __init__(self, datasets: Mapping[str, Any], seed: int, collate: Collate, skips_errors: bool):
        self.datasets, self.seed, self.collate, self.skips_errors = datasets, seed, collate, skips_errors

    def __getitem__(self, references: MicroBatch) -> _Loaded:
        samples: list[Sample] = []
        kept: list[SampleReference] = []
        skipped: list[Skipped] = []
        with generators_kept():  # whatever collating draws comes from what loading has seeded
            for reference in references:
                try:
                    samples.append(load_sample(self.datasets, reference, self.seed))
                    kept.append(reference)
                except (SkipSample, SampleError) as reason:
                    if isinstance(reason, SampleError) and not self.skips_errors:
                        raise
                    skipped.append(Skipped.because(reference, reason))
            return _Loaded(self.collate(samples, kept) if samples else None, skipped)


def check_share(rank: int, num_processes: int, accumulation: int | None, batch_size: int | None) -> None:
    """Raises `ValueError` unless a process can have this share of a step."""
    if not 0 <= rank < num_processes:
        raise ValueError(f"rank is 0 to {num_processes - 1}, got {rank}")
    if batch_size is None and accumulation is not None:
        raise ValueError("accumulation goes with a batch_size; with a token_budget, set packs_per_step")
    if accumulation is not None and accumulation < 1:
        raise ValueError(f"accumulation is at least 1, got {accumulation}")


def split_evenly(samples: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """`count` neighbouring pieces, the longest of which has one more than the shortest; some may be empty."""
    return [tuple(samples[len(samples) * i // count : len(samples) * (i + 1) // count]) for i in range(count)]


def as_it_is(loaded: Any) -> Any:
    """In place of torch's conversion of what a dataset gives."""
    return loaded
