"""Which samples a step sees: mixtures in closed form, packs, resumption."""

import json
from itertools import islice, pairwise

import pytest
import torch
from checks import no_typecheck
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ragged_batch, tiny
from torch import tensor

from transfusion_pytorch import (
    Condition,
    DataPlan,
    Latents,
    Mixture,
    Sample,
    SampleError,
    SampleReference,
    SkipSample,
    WithCleanCopy,
)
from transfusion_pytorch.data.lengths import Lengths
from transfusion_pytorch.data.order import generators_kept, seed_generators, seed_of, shuffled
from transfusion_pytorch.data.packing import best_fit


class Sized(torch.utils.data.Dataset):
    """Samples of given lengths; sample i is the text [i, ...]."""

    def __init__(self, lengths):
        self.sizes, self.asked = list(lengths), []

    def __len__(self):
        return len(self.sizes)

    def num_tokens(self, index):
        self.asked.append(index)
        return self.sizes[index]

    def __getitem__(self, index):
        return [torch.full((self.sizes[index],), index)]


def captioned_lengths(count, seed=0, low=64, high=300):
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plans():
    """Every way to cut a step, over a mixture whose sources are passed through many times."""
    data = Mixture({"a": Sized(captioned_lengths(70)), "b": Sized(captioned_lengths(9, 1))}, weights={"a": 2, "b": 0.5})
    return {
        "samples": lambda **o: DataPlan(data, seed=3, batch_size=7, **o),
        "packs": lambda **o: DataPlan(data, seed=3, token_budget=1024, packs_per_step=3, buffer=32, **o),
        "small windows": lambda **o: DataPlan(data, seed=3, token_budget=2048, packs_per_step=2, buffer=4, **o),
        "wide steps": lambda **o: DataPlan(data, seed=3, token_budget=512, packs_per_step=40, buffer=32, **o),
    }


KINDS = list(plans())


# order and mixture


def test_seeds_depend_on_every_key_and_on_their_order():
    seeds = [seed_of(0, "a"), seed_of(1, "a"), seed_of(0, "b"), seed_of(0, "a", 1), seed_of(0, 1, "a"), seed_of(0, "1")]
    assert len(set(seeds)) == len(seeds)
    assert seed_of(0, "a") == seed_of(0, "a")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_seeded_and_put_back():
    import random

    import numpy

    def draw():
        return random.random(), float(numpy.random.rand()), torch.rand(()).item()

    before = []
    for _ in range(2):
        with generators_kept():
            before.append(draw())
    assert before[0] == before[1]
    inside = []
    with generators_kept():
        for seed in (5, 5, 6):
            seed_generators(seed)
            inside.append(draw())
    assert inside[0] == inside[1]
    assert all(one != other for one, other in zip(inside[0], inside[2], strict=True))
    assert draw() == before[0]


def test_small_orders_are_all_equally_likely():
    counts: dict = {}
    for seed in range(2400):
        order = tuple(shuffled(4, seed, "order").tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 55  # 23 degrees of freedom: 1 in 5,000


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 20), min_size=5, max_size=5),
)
def test_shares_are_met_at_every_position(weights, sizes):
    names = [f"s{i}" for i in range(len(weights))]
    datasets = {name: Sized([1] * size) for name, size in zip(names, sizes, strict=False)}
    mixture = Mixture(datasets, weights=dict(zip(names, weights, strict=True)))
    whole = mixture.weights  # as whole numbers
    seen = dict.fromkeys(names, 0)
    for position in range(200):
        assert mixture.counts(position) == seen
        for name in names:
            assert abs(seen[name] - position * whole[name] / sum(whole.values())) <= len(names)
        reference = mixture.reference(position, seed=0)
        assert reference.position == position
        assert reference.epoch == seen[reference.source] // len(datasets[reference.source])
        seen[reference.source] += 1


def test_each_source_has_every_sample_once_an_epoch_and_in_a_new_order():
    mixture = Mixture({"a": Sized([1] * 12), "b": Sized([1] * 5)}, weights={"a": 1, "b": 3})
    seen: dict = {}
    for position in range(400):
        _, source, index, epoch = mixture.reference(position, seed=1)
        seen.setdefault((source, epoch), []).append(index)
    full = {key: order for key, order in seen.items() if len(order) == len(mixture.datasets[key[0]])}
    assert len(full) > 60
    assert all(sorted(order) == list(range(len(order))) for order in full.values())
    assert full["a", 0] != full["a", 1]
    assert [mixture.reference(p, seed=1) for p in (0, 399, 7)] != [mixture.reference(p, seed=2) for p in (0, 399, 7)]
    assert mixture.reference(0, seed=1) == Mixture(mixture.datasets, weights={"a": 1, "b": 3}).reference(0, seed=1)


def test_without_weights_a_mixture_ends_with_all_sources_at_once():
    mixture = Mixture({"a": Sized([1] * 12), "b": Sized([1] * 5), "c": Sized([1])})
    assert [mixture.length(epochs) for epochs in (1, 2, 7)] == [18, 36, 126]
    assert mixture.counts(36) == {"a": 24, "b": 10, "c": 2}


def test_a_weighted_mixture_ends_when_the_slowest_source_does():
    mixture = Mixture({"a": Sized([1] * 12), "b": Sized([1] * 5)}, weights={"a": 0.5, "b": 0.5})
    length = mixture.length(1)
    assert mixture.counts(length)["a"] == 12
    assert mixture.counts(length - 1)["a"] == 11


def test_positions_may_be_as_large_as_they_like():
    mixture = Mixture({"a": Sized([1] * 3), "b": Sized([1] * 4)}, weights={"a": 0.3, "b": 0.7})
    assert mixture.counts(10**20) == {"a": 3 * 10**19, "b": 7 * 10**19}
    assert mixture.reference(10**20, seed=0).epoch >= 10**19


def test_an_order_may_be_kept():
    mixture = Mixture({"a": Sized([1] * 3)}, shuffle=False)
    assert [mixture.reference(p, seed=0).index for p in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(datasets={}), "at least one dataset"),
        (dict(datasets={"a": []}), "source 'a' has no samples"),
        (dict(datasets={"a": [1]}, weights={"b": 1}), r"weights are for the sources \['a'\], got \['b'\]"),
        (dict(datasets={"a": [1]}, weights={"a": 0}), "source 'a' is a positive number, got 0"),
        (dict(datasets={"a": [1]}, weights={"a": float("nan")}), "positive number, got nan"),
        (dict(datasets={"a": [1]}, weights={"a": 1e-9}), "too small"),
    ],
)
def test_mixtures_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**arguments)


def test_a_stream_is_not_a_source():
    with pytest.raises(TypeError, match=r"source 'a': a generator has no length.*StreamLoader"):
        Mixture({"a": (i for i in range(3))})


# packs


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_packs_everything_once_within_the_budget(lengths):
    packs = best_fit(lengths, 50)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= 50 for pack in packs)
    for earlier, later in pairwise(packs):  # a pack is opened only where no other has room
        assert sum(lengths[i] for i in earlier if i < later[0]) + lengths[later[0]] > 50


def test_best_fit_takes_the_fullest_pack_with_room():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([], 10) == []
    with pytest.raises(ValueError, match="1 to 10 tokens, got 11"):
        best_fit([11], 10)


@pytest.mark.parametrize(("budget", "low", "high"), [(2048, 64, 300), (1024, 64, 300), (16384, 16, 1100)])
def test_packs_of_captioned_images_are_full(budget, low, high):
    plan = DataPlan(Sized(captioned_lengths(5000, low=low, high=high)), token_budget=budget)
    list(islice(plan, 200))
    assert plan.fill > 0.97


def test_long_and_short_samples_fill_each_other():
    lengths = [1100, 1500, 900, 200, 100, 350] * 300
    plan = DataPlan(Sized(lengths), token_budget=2048, packs_per_step=4)
    list(islice(plan, 100))
    assert plan.fill > 0.95


def test_a_sample_that_fits_with_no_other_does_not_wait_for_ever():
    """Alone in its pack it is always the emptiest one."""
    plan = DataPlan(Sized([600] + [900] * 63), token_budget=1000, buffer=8, seed=1)
    seen = [r for step in islice(plan, 4 * 64) for pack in step.micro_batches for r in pack]
    waited = [place - r.position for place, r in enumerate(seen) if r.index == 0]
    assert len(waited) >= 3
    assert max(waited) < 2 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_every_sample_of_its_epochs_once(kind):
    plan = plans()[kind](epochs=2)
    steps = list(plan)
    positions = [r.position for step in steps for batch in step.micro_batches for r in batch]
    assert sorted(positions) == list(range(plan.mixture.length(2)))
    assert [step.step for step in steps] == list(range(len(steps)))
    assert plan.num_steps in (None, len(steps))
    assert list(plan) == []  # it is at its end


def test_packs_keep_to_their_budget_and_are_counted():
    plan = plans()["packs"](epochs=3)
    sizes = [
        sum(plan.mixture.datasets[r.source].sizes[r.index] for r in pack)
        for step in plan
        for pack in step.micro_batches
    ]
    assert max(sizes) <= 1024
    assert plan.fill == sum(sizes) / (1024 * len(sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_a_function_of_the_seed(kind):
    make = plans()[kind]
    steps = list(islice(make(), 20))
    assert list(islice(make(), 20)) == steps
    other = make()
    other.seed = 4
    assert list(islice(other, 20)) != steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epochs", [None, 4])
def test_a_resumed_plan_goes_on_as_if_it_had_never_stopped(kind, epochs):
    make = plans()[kind]
    whole, states = make(epochs=epochs), []
    states.append(json.dumps(whole.state()))
    steps = []
    for step in islice(whole, 40):
        steps.append(step)
        states.append(json.dumps(whole.state()))
    assert len(steps) >= 4
    assert max(map(len, states)) < 1000
    for start in torch.randint(len(steps) + 1, (8,)).tolist():
        resumed = make(epochs=epochs)
        resumed.load_state(json.loads(states[start]))
        assert list(islice(resumed, len(steps) - start)) == steps[start:]
        assert json.dumps(resumed.state()) == states[-1]


def test_resuming_late_measures_one_window():
    make = lambda: DataPlan(Sized(captioned_lengths(100_000)), token_budget=2048, buffer=256)  # noqa: E731
    plan = make()
    list(islice(plan, 300))
    resumed = make()
    resumed.load_state(plan.state())
    next(iter(resumed))
    assert len(resumed.mixture.datasets["data"].asked) <= 256 + 32


def test_lengths_are_asked_for_once():
    data = Sized([10] * 20)
    list(DataPlan(data, token_budget=40, epochs=3, buffer=8))
    assert sorted(data.asked) == list(range(20))


def test_a_state_of_other_data_is_refused():
    state = DataPlan(Sized([1] * 4), batch_size=2).state()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        DataPlan(Sized([1] * 4), batch_size=2, seed=1).load_state(state)
    with pytest.raises(ValueError, match=r"sizes was {'data': 4} and is {'data': 5}"):
        DataPlan(Sized([1] * 5), batch_size=2).load_state(state)
    with pytest.raises(ValueError, match=r"expected a state with 'plan' and 'cursor', got {'step': 3}"):
        DataPlan(Sized([1] * 5), batch_size=2).load_state({"step": 3})
    DataPlan(Sized([1] * 4), batch_size=2, epochs=9).load_state(state)  # longer is the same order


def test_a_window_does_not_begin_with_its_longest_samples():
    plan = DataPlan(Sized(range(30, 94)), token_budget=100, epochs=1)
    longest = [max(30 + r.index for r in pack) for step in plan for pack in step.micro_batches]
    assert longest != sorted(longest, reverse=True)
    assert abs(sum(longest[: len(longest) // 2]) / sum(longest) - 0.5) < 0.1


def test_more_epochs_go_on_at_the_end_and_lose_nothing():
    def make(epochs):
        return DataPlan(Sized([7] * 30), token_budget=20, epochs=epochs, buffer=16)

    short, long = make(2), make(5)
    seen = [r.position for step in short for pack in step.micro_batches for r in pack]
    long.load_state(short.state())
    seen += [r.position for step in long for pack in step.micro_batches for r in pack]
    assert sorted(seen) == list(range(150))


def test_an_end_that_moves_within_the_window_is_refused():
    def make(epochs):
        return DataPlan(Sized([7] * 30), token_budget=20, epochs=epochs, buffer=16)

    plan, states = make(2), []
    for _ in plan:
        states.append(plan.state())
    longer = make(None)
    longer.load_state(states[2])
    with pytest.raises(ValueError, match="ended after 60 samples and now end after None; go on with the same epochs"):
        longer.load_state(states[-2])
    make(2).load_state(states[-2])


def test_a_sample_longer_than_the_budget():
    data = Sized([5, 50, 5])
    with pytest.raises(
        SampleError, match=r"source 'data', index 1: 50 tokens are more than the token budget of 20.*skip"
    ):
        list(DataPlan(data, token_budget=20, epochs=1))
    (step,) = DataPlan(data, token_budget=20, epochs=1, too_long="skip")
    assert sorted(r.index for pack in step.micro_batches for r in pack) == [0, 2]
    assert [(s.reference.index, s.reason) for s in step.skipped] == [
        (1, "50 tokens are more than the token budget of 20")
    ]


def test_what_is_skipped_is_reported_once_and_again_every_epoch():
    plan = DataPlan(Sized([5] * 7 + [50]), token_budget=10, epochs=3, too_long="skip", buffer=8)
    found = [skipped.reference.epoch for step in plan for skipped in step.skipped]
    assert found == [0, 1, 2]


def test_a_plan_of_nothing_that_fits_ends_with_an_error():
    with pytest.raises(SampleError, match="every sample was left out; the last one because: 50 tokens"):
        next(iter(DataPlan(Sized([50] * 3), token_budget=10, too_long="skip", buffer=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "give batch_size or token_budget, got None and None"),
        (dict(batch_size=2, token_budget=2), "got 2 and 2"),
        (dict(batch_size=2, packs_per_step=2), "packs_per_step goes with a token_budget"),
        (dict(batch_size=0), "batch_size is at least 1, got 0"),
        (dict(token_budget=5, buffer=0), "buffer is at least 1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        DataPlan(Sized([1]), **options)


@no_typecheck
def test_what_happens_to_long_samples_has_two_answers():
    with pytest.raises(ValueError, match="'error' or 'skip', got 'cut'"):
        DataPlan(Sized([1]), batch_size=1, too_long="cut")


# lengths


def test_a_packer_counts_the_tokens_that_a_batch_has():
    model = tiny()
    packer = model.packer()
    samples = [
        *ragged_batch(),
        [tensor([1]), Latents(0, torch.randn(2, 3, 3))],
        tensor([1, 2]),
        (tensor([1]), tensor([2])),
    ]
    batch = packer(samples)
    assert [packer.num_tokens(sample) for sample in samples] == list(batch.stream.lengths)
    assert packer.num_tokens(Sample(samples[0])) == batch.stream.lengths[0]
    shapes = [part.to("meta") if torch.is_tensor(part) and part.is_floating_point() else part for part in samples[0]]
    shapes[3] = (1, samples[0][3][1].to("meta"))
    assert packer.num_tokens(shapes) == batch.stream.lengths[0]


def test_a_packer_counts_behind_an_encoder():
    encoder = torch.nn.Conv2d(3, 4, 2, stride=2)
    model = tiny(dim_latent=4, modality_encoder=encoder, channel_first_latent=True, modality_num_dim=2)
    sample = [tensor([1, 2]), torch.randn(3, 8, 6)]
    packer = model.packer()
    assert packer.num_tokens(sample) == packer([sample]).stream.lengths[0]


class Unmeasured(torch.utils.data.Dataset):
    """Without a length of its own."""

    def __init__(self, samples):
        self.samples, self.loaded = samples, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.loaded.append(index)
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


class Outlined(Unmeasured):
    def outline(self, index, generator):
        return [part.to("meta") if part.is_floating_point() else part for part in self.samples[index]]


@pytest.mark.parametrize("kind", [Unmeasured, Outlined])
def test_samples_without_a_length_are_measured_once(kind):
    samples = [[tensor([1]), torch.randn(i + 1, 2, 3)] for i in range(6)]
    model, data = tiny(), kind(samples)
    plan = DataPlan(data, token_budget=64, epochs=3, packer=model.packer(), buffer=4)
    packs = [pack for step in plan for pack in step.micro_batches]
    tokens = [model.packer()([samples[r.index] for r in pack]).num_tokens for pack in packs]
    assert max(tokens) <= 64
    assert plan.fill == sum(tokens) / (64 * len(packs))
    assert sorted(data.loaded) == ([] if kind is Outlined else list(range(6)))


def test_outlines_are_told_apart_by_all_that_matters():
    samples = [
        [tensor([1, 2]), torch.ones(2, 3)],
        [tensor([1]), torch.ones(2, 3)],
        [tensor([1, 2]), torch.ones(3, 3)],
        [tensor([1, 2]), (1, torch.ones(3, 2))],
        [tensor([1, 2]), (1, torch.ones(1, 3, 2))],
        [torch.ones(2, 3), tensor([1, 2])],
        [Condition(tensor([1, 2, 3])), Latents(0, torch.ones(2, 3))],
        (1, torch.ones(2, 2)),
        [tensor([1, 2]), WithCleanCopy(torch.ones(2, 3))],
    ]
    packer = tiny().packer()
    lengths = Lengths(Mixture({"a": AsItIs(samples)}), packer, 0)
    for _ in range(2):
        measured = [lengths(SampleReference(i, "a", i, 0)) for i in range(len(samples))]
        assert measured == [packer.num_tokens(sample) for sample in samples]


class AsItIs(Unmeasured):
    def outline(self, index, generator):
        return self.samples[index]


def test_measuring_needs_a_packer():
    with pytest.raises(ValueError, match=r"source 'data' has no num_tokens\(index\).*packer=model.packer"):
        DataPlan(Unmeasured([[1]]), token_budget=64)


def test_a_sample_that_cannot_be_measured():
    packer = tiny().packer()
    with pytest.raises(SampleError, match=r"source 'data', index 0: could not be loaded: OSError: gone") as caught:
        next(iter(DataPlan(Unmeasured([OSError("gone")]), token_budget=64, packer=packer)))
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(SampleError, match=r"source 'data', index 0: could not be measured: TypeError.*complex"):
        next(iter(DataPlan(Unmeasured([[torch.ones(2, dtype=torch.complex64)]]), token_budget=64, packer=packer)))
    data = Unmeasured([[tensor([1])], SkipSample("broken")])
    (step,) = DataPlan(data, token_budget=64, packer=packer, epochs=1)
    assert [(s.reference.index, s.reason) for s in step.skipped] == [(1, "broken")]
