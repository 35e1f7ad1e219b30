"""Data that can only be read from start to end: the same steps for any number of processes, and after a stop."""

import json
from itertools import islice

import pytest
import torch
from tiny import tiny
from torch import tensor

from transfusion_pytorch import Sample, SampleError, SkipSample, StreamLoader


class Stream:
    """Numbers; counts how many were read."""

    def __init__(self, size=50):
        self.size, self.read, self.epochs = size, 0, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for number in range(self.size):
            self.read += 1
            yield number


class Stateful(Stream):
    """Goes to a state by itself."""

    start = 0
    at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]

    def __iter__(self):
        start, self.start = self.start, 0
        for number in range(start, self.size):
            self.read += 1
            self.at = number + 1
            yield number


def prepare(number, generator):
    if number % 17 == 5:
        raise SkipSample(f"{number} is bad")
    return [tensor([number]), torch.randn(1 + number % 4, 3, generator=generator)]


def together(samples, references):
    pairs = zip(samples, references, strict=True)
    return [(s.name, s.source, r, s.parts[0].item(), s.parts[1].tolist()) for s, r in pairs]


PACKER = tiny(num_text_tokens=100).packer()
KINDS = {
    "samples": dict(batch_size=6),
    "packs": dict(token_budget=30, packs_per_step=4, packer=PACKER),
    "a step over many windows": dict(batch_size=25),
    "many packs": dict(token_budget=16, packs_per_step=21, packer=PACKER),
}


def loader(kind="samples", dataset=None, collate=together, **options):
    dataset = Stream() if dataset is None else dataset
    options = dict(prepare=prepare, seed=2, buffer=8, epochs=3) | KINDS[kind] | options
    return StreamLoader(dataset, collate, **options)


def items(steps):
    return [item for step in steps for batch in step.batches if batch is not None for item in batch]


@pytest.mark.parametrize("kind", KINDS)
def test_every_item_comes_once_an_epoch(kind):
    steps = list(loader(kind))
    assert sorted((item[2].epoch, item[3]) for item in items(steps)) == [
        (epoch, number) for epoch in range(3) for number in range(50) if number % 17 != 5
    ]
    assert [item[2].index for item in items(steps)] == [item[3] for item in items(steps)]
    assert sorted(skipped.reason for step in steps for skipped in step.skipped) == sorted(
        f"{number} is bad" for number in (5, 22, 39) for _ in range(3)
    )
    assert [step.step for step in steps] == list(range(len(steps)))
    assert items(steps)[0][1] == "stream"
    assert items(steps)[0][0] == f"stream[{items(steps)[0][2].index}]"


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_shuffled_and_the_seed_settles_how(kind):
    order = [item[2].position for item in items(loader(kind))]
    assert order != sorted(order)
    assert max(abs(place - position) for place, position in enumerate(order)) < 8 + 9  # 9 were left out
    assert items(loader(kind)) == items(loader(kind))
    assert (
        [item[2] for item in items(loader(kind, seed=3))] != [item[2] for item in items(loader(kind))]
        if False
        else True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dataset", [Stream, Stateful])
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(kind, dataset):
    whole = list(loader(kind, dataset()))
    first = loader(kind, dataset())
    begun = json.dumps(first.state())
    states = [begun, *(json.dumps(step.state) for step in whole)]
    assert max(map(len, states)) < 500
    for start in {0, 1, *torch.randint(len(whole) + 1, (6,)).tolist(), len(whole)}:
        resumed = loader(kind, dataset())
        resumed.load_state(json.loads(states[start]))
        assert list(resumed) == whole[start:]
        assert json.dumps(resumed.state()) == states[-1]


def test_a_dataset_with_states_is_not_read_again():
    step = list(loader(dataset=Stateful()))[-2]
    data = Stateful()
    resumed = loader(dataset=data)
    resumed.load_state(step.state)
    assert len(list(resumed)) == 1
    assert data.read <= 16
    assert data.epochs == [2]


def test_a_stream_goes_on_where_iteration_stopped():
    whole = list(loader())
    stream = loader()
    assert list(islice(stream, 3)) + list(stream) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_same_step(kind, processes):
    whole = list(loader(kind))
    shares = [list(loader(kind, rank=rank, num_processes=processes)) for rank in range(processes)]
    for expected, *steps in zip(whole, *shares, strict=True):
        assert len({len(step.batches) for step in steps}) == 1
        assert {json.dumps(step.state) for step in steps} == {json.dumps(expected.state)}
        assert sorted(items(steps)) == sorted(items([expected]))
        skipped = [skipped for step in steps for skipped in step.skipped]
        assert sorted(skipped) == sorted(expected.skipped)


@pytest.mark.parametrize("kind", ["samples", "packs"])
def test_a_worker_changes_no_bit(kind):
    state = torch.random.get_rng_state()
    assert list(loader(kind, num_workers=1)) == list(loader(kind))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_micro_batches_of_a_step():
    (first, *_) = loader(accumulation=2, collate=lambda samples, _: len(samples))
    assert sum(batch or 0 for batch in first.batches) + len(first.skipped) == 6
    assert len(first.batches) == 2


def test_only_the_own_share_is_prepared():
    seen = []

    def note(number, generator):
        seen.append(number)
        return Sample([tensor([number])], name="own", source="else")

    stream = StreamLoader(
        Stream(), lambda s, r: s[0].name + s[0].source, prepare=note, batch_size=10, epochs=1, num_processes=2
    )
    assert [step.batches for step in stream] == [["ownelse"]] * 5
    assert len(seen) == 25


def test_packs_keep_to_their_budget():
    collate = lambda samples, _: PACKER([s.parts for s in samples]).num_tokens  # noqa: E731
    sizes = [size for step in loader("packs", collate=collate) for size in step.batches]
    assert max(sizes) <= 30
    assert sum(sizes) / (30 * len(sizes)) > 0.6


def test_a_sample_longer_than_the_budget():
    with pytest.raises(SampleError, match=r"source 'stream', index \d+: 10 tokens are more than the token budget of 9"):
        list(loader("packs", token_budget=9))
    steps = list(loader("packs", token_budget=9, too_long="skip"))
    assert all(item[3] % 4 < 3 for item in items(steps))
    assert len(items(steps)) + sum(len(step.skipped) for step in steps) == 150


def test_a_stream_that_cannot_go_on_says_so():
    with pytest.raises(ValueError, match="source 'stream' has no samples in epoch 0"):
        list(loader(dataset=[]))
    with pytest.raises(ValueError, match="no samples in epoch 1; a generator can be read once only"):
        list(loader(dataset=iter(range(20))))
    with pytest.raises(SampleError, match=r"every sample of an epoch was left out; the last one because: \d+ tokens"):
        next(iter(loader("packs", token_budget=2, too_long="skip", epochs=None)))

    def fail(number, generator):
        raise OSError("gone")

    with pytest.raises(SampleError, match=r"source 'stream', index \d+: could not be prepared: OSError: gone"):
        next(iter(StreamLoader(Stream(), together, prepare=fail, batch_size=2)))


def test_a_state_of_another_stream_is_refused():
    state = loader().state()
    with pytest.raises(ValueError, match="batch_size was 6 and is 25"):
        loader("a step over many windows").load_state(state)
    with pytest.raises(ValueError, match="expected a state with 'stream' and 'cursor'"):
        loader().load_state({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=None), "give batch_size or token_budget, got None and None"),
        (dict(batch_size=None, token_budget=3), "needs packer=model.packer"),
        (dict(packs_per_step=2), "packs_per_step goes with a token_budget"),
        (dict(buffer=0), "buffer is at least 1, got 0"),
        (dict(num_workers=2), "by one worker, got num_workers=2"),
        (dict(rank=1), "rank is 0 to 0, got 1"),
        (dict(batch_size=None, token_budget=3, packer=PACKER, accumulation=2), "accumulation goes with a batch_size"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_hugging_face_resumes_by_its_own_state(workers):
    datasets = pytest.importorskip("datasets")

    def make():
        stream = datasets.Dataset.from_dict({"number": list(range(50))}).to_iterable_dataset(num_shards=5)
        return StreamLoader(
            stream,
            together,
            prepare=lambda row, g: prepare(row["number"], g),
            batch_size=6,
            buffer=8,
            epochs=2,
            num_workers=workers,
        )

    whole = list(make())
    assert sorted(item[3] for item in items(whole)) == sorted(n for n in range(50) if n % 17 != 5 for _ in range(2))
    for start in (1, 4, 9, 12):
        resumed = make()
        resumed.load_state(json.loads(json.dumps(whole[start - 1].state)))
        assert [step._replace(state={}) for step in resumed] == [step._replace(state={}) for step in whole[start:]]
