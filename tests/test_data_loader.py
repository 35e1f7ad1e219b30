"""Steps as they are loaded: the same samples and bits for any number of workers and processes."""

import json
import random
import re
from itertools import islice

import numpy
import pytest
import torch
from tiny import tiny
from torch import tensor

from transfusion_pytorch import DataPlan, Mixture, Sample, SampleError, SkipSample, StepLoader
from transfusion_pytorch.data.loader import split_evenly
from transfusion_pytorch.data.order import generator_of


class Noisy(torch.utils.data.Dataset):
    """Sample i is the text [i, i, ...] and an image of random numbers from global generators."""

    def __init__(self, count=23):
        self.count = count

    def __len__(self):
        return self.count

    def num_tokens(self, index):
        return 10 + index

    def __getitem__(self, index):
        return [tensor([index]), torch.randn(2, 3), torch.tensor([random.random(), numpy.random.rand(), 0.0])[None]]


class Augmented(Noisy):
    def sample(self, index, generator):
        return Sample([tensor([index]), torch.randn(2, 3, generator=generator)], name=f"own {index}", weight=2.0)


class Broken(Noisy):
    def __getitem__(self, index):
        if index % 5 == 0:
            raise SkipSample(f"{index} is broken")
        return super().__getitem__(index)


class Failing(Noisy):
    def __getitem__(self, index):
        raise OSError("cut off")

    def describe(self, index):
        return f"folder/{index}.png"


def plan_of(kind, data=None, **options):
    mixture = Mixture(data or {"plain": Noisy(), "augmented": Augmented(7)})
    if kind == "samples":
        return DataPlan(mixture, seed=5, batch_size=8, epochs=2, **options)
    return DataPlan(mixture, seed=5, token_budget=64, packs_per_step=5, buffer=16, epochs=2, **options)


def together(samples, references):
    """A micro-batch that can be compared: everything as plain numbers."""
    return [
        (
            s.name,
            s.source,
            s.weight,
            r,
            [part.tolist() for part in s.parts],
            torch.rand((), generator=generator_of(1, r[0])).item(),
        )
        for s, r in zip(samples, references, strict=True)
    ]


def test_samples_have_a_name_and_a_source():
    (step, *_) = StepLoader(plan_of("samples"), together)
    for name, source, weight, reference, _, _ in step.batches[0]:
        assert source == reference.source
        assert name == (f"own {reference.index}" if source == "augmented" else f"plain[{reference.index}]")
        assert weight == (2 if source == "augmented" else 1)


@pytest.mark.parametrize("kind", ["samples", "packs"])
def test_workers_change_no_bit_and_nothing_global_moves(kind):
    options = dict(accumulation=3) if kind == "samples" else {}
    state = torch.random.get_rng_state()
    alone = list(StepLoader(plan_of(kind), together, **options))
    helped = list(StepLoader(plan_of(kind), together, num_workers=2, prefetch_factor=3, **options))
    assert alone == helped
    assert len(alone) >= 4
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["samples", "packs"])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_the_same_step(kind, processes):
    whole = [[item for batch in step.batches for item in batch] for step in StepLoader(plan_of(kind), together)]
    loaders = [StepLoader(plan_of(kind), together, rank=rank, num_processes=processes) for rank in range(processes)]
    for expected, steps in zip(whole, zip(*loaders, strict=True), strict=True):
        assert len({len(step.batches) for step in steps}) == 1
        assert len({json.dumps(step.state) for step in steps}) == 1
        found = [item for step in steps for batch in step.batches if batch is not None for item in batch]
        assert sorted(found, key=lambda item: item[3]) == sorted(expected, key=lambda item: item[3])


class Drawing(Noisy):
    """Draws from its own generator and not from the global ones."""

    def sample(self, index, generator):
        return [tensor([index]), torch.rand(1, 1, generator=generator)]


def test_collating_draws_numbers_of_its_own():
    def collate(samples, references):
        return [sample.parts[1].item() for sample in samples] + [torch.rand(1, 1).item()]

    steps = StepLoader(DataPlan(Drawing(12), batch_size=4, epochs=1), collate)
    numbers = [number for step in steps for number in step.batches[0]]
    assert len(set(numbers)) == len(numbers) == 15


def test_a_step_is_split_into_nearly_equal_pieces():
    sizes = []
    for rank in range(2):
        steps = list(StepLoader(plan_of("samples"), together, rank=rank, num_processes=2, accumulation=3))
        sizes.append([[len(batch) if batch else None for batch in step.batches] for step in steps])
    assert sizes[0][0] == [1, 1, 2]
    assert sizes[1][0] == [1, 1, 2]
    assert sizes[0][-1] == [None, 1, 1]  # 60 samples: the last step has 4
    assert sizes[1][-1] == [None, 1, 1]
    assert [len(piece) for piece in split_evenly(range(3), 5)] == [0, 1, 0, 1, 1]


def test_a_plan_moves_on_with_what_was_handed_out_not_with_what_was_prefetched():
    loader = StepLoader(plan_of("packs"), together, num_workers=2)
    whole = list(StepLoader(plan_of("packs"), together))
    for i, step in enumerate(loader):
        assert loader.plan.state() == step.state
        if i == 2:
            break
    assert list(loader) == whole[3:]
    resumed = plan_of("packs")
    resumed.load_state(json.loads(json.dumps(whole[1].state)))
    assert list(StepLoader(resumed, together)) == whole[2:]


def test_batches_are_packed_in_workers_and_drop_the_same_text():
    model = tiny(num_text_tokens=50)
    packer = model.packer(prob_uncond=0.5)
    loaded = []
    for workers in (0, 1, 2):
        plan = DataPlan(Noisy(12), batch_size=4, epochs=2)
        collate = lambda samples, _: packer([sample.parts for sample in samples])  # noqa: E731
        loaded.append([batch for step in StepLoader(plan, collate, num_workers=workers) for batch in step.batches])
        torch.rand(3)  # what others draw changes nothing
    assert [len(batch) for batch in loaded[0]] == [4] * 6
    numbers = [[batch.drop_text_number.tolist() for batch in batches] for batches in loaded]
    assert numbers[0] == numbers[1] == numbers[2]
    assert len({tuple(each) for each in numbers[0]}) == 6
    assert model(loaded[1][0]).isfinite()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_left_out_and_reported_once(workers):
    loaders = [
        StepLoader(plan_of("samples", {"data": Broken()}), together, rank=rank, num_processes=2, num_workers=workers)
        for rank in range(2)
    ]
    steps = [step for loader in loaders for step in loader]
    reported = sorted(skipped.reason for step in steps for skipped in step.skipped)
    assert reported == sorted(f"{i} is broken" for i in (0, 5, 10, 15, 20) for _ in range(2))
    loaded = [item[3].index for step in steps for batch in step.batches if batch for item in batch]
    assert sorted(loaded) == sorted(i for i in range(23) if i % 5 for _ in range(2))


def test_what_planning_leaves_out_is_reported_by_one_process():
    plans = [DataPlan(Noisy(), token_budget=30, epochs=1, too_long="skip", packs_per_step=4) for _ in range(2)]
    loaders = [StepLoader(plan, together, rank=rank, num_processes=2) for rank, plan in enumerate(plans)]
    reported = [[s.reference.index for step in loader for s in step.skipped] for loader in loaders]
    assert (sorted(reported[0]), reported[1]) == ([21, 22], [])


def test_a_step_without_any_sample_is_still_a_step():
    class Nothing(Noisy):
        def __getitem__(self, index):
            raise SkipSample("no")

    steps = list(StepLoader(DataPlan(Nothing(4), batch_size=2, epochs=1), together, accumulation=2))
    assert [step.batches for step in steps] == [[None, None]] * 2


def failure(loader):
    """The message and the cause. No traceback is kept, so that workers end at once."""
    try:
        next(iter(loader))
    except SampleError as error:
        error.__traceback__ = None
        return str(error), type(error.__cause__)
    raise AssertionError("did not fail")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_says_which_it_was(workers):
    message, cause = failure(StepLoader(DataPlan(Failing(3), batch_size=1), together, num_workers=workers))
    assert re.search(r"source 'data', index (\d) \(folder/\1.png\): could not be loaded: OSError: cut off", message)
    assert workers or cause is OSError


def test_endless_plans_do_not_end():
    loader = StepLoader(DataPlan(Noisy(3), batch_size=2), together)
    assert len(list(islice(loader, 20))) == 20


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("samples", dict(rank=2, num_processes=2), "rank is 0 to 1, got 2"),
        ("samples", dict(accumulation=0), "accumulation is at least 1"),
        ("packs", dict(accumulation=2), "accumulation goes with a batch_size"),
    ],
)
def test_options_that_cannot_be(kind, options, message):
    with pytest.raises(ValueError, match=message):
        StepLoader(plan_of(kind), together, **options)
