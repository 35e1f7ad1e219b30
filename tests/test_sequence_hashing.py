"""Random numbers by hashing: SplitMix64 to the bit, uniform and normal, and no stream like another."""

from math import erf, sqrt

import pytest
import torch

from transfusion_pytorch.sequence.hashing import mix, normal, uniform

CPU, MASK = torch.device("cpu"), (1 << 64) - 1
SEEDS = [0, 1, 2, 12345, 2**31, 2**62 - 1, 2**63 - 1]


def splitmix64(state: int) -> int:
    """The finaliser as it was published, in whole numbers without a sign."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def naive_bits(seed: int, counter: int) -> int:
    golden = 0x9E3779B97F4A7C15
    return splitmix64((splitmix64((seed + golden) & MASK) + (counter + 1) * golden) & MASK)


def numbers(seed: int, count: int, start: int = 0) -> torch.Tensor:
    return uniform(torch.tensor(seed), start + torch.arange(count), CPU)


def test_mix_is_splitmix64():
    """The first outputs of the published generator for the seed 1234567, and any number of 64 bits."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + (i + 1) * golden) & MASK for i in range(3)]
    assert [splitmix64(state) for state in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    inputs = [0, 1, MASK, 1 << 63, (1 << 63) - 1, *states]
    signed = torch.tensor([value - (1 << 64) if value >> 63 else value for value in inputs])
    assert [value & MASK for value in mix(signed).tolist()] == list(map(splitmix64, inputs))


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_numbers_are_the_highest_bits_of_splitmix64(seed):
    counters = [0, 1, 2, 63, 64, 2**20, 2**40, 2**40 + 1, 2**47]
    got = uniform(torch.tensor(seed), torch.tensor(counters), CPU)
    assert got.dtype == torch.float64
    assert got.tolist() == [(naive_bits(seed, counter) >> 11) / 2**53 for counter in counters]


def test_a_number_depends_on_its_seed_and_counter_alone():
    seeds, counters = torch.tensor(SEEDS)[:, None], torch.arange(50)
    table = uniform(seeds, counters, CPU)
    assert table.shape == (len(SEEDS), 50)
    for row, seed in zip(table, SEEDS, strict=True):
        assert torch.equal(row, numbers(seed, 50))
        assert torch.equal(row[20:], numbers(seed, 30, start=20))


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_uniform(seed):
    count = 100_000
    x = numbers(seed, count)
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    assert chi_square(torch.histc(x, bins=64, min=0, max=1)) < 103.5, "the 99.9th percentile of 63 degrees of freedom"
    assert abs(float(x.mean()) - 0.5) < 4 * sqrt(1 / 12 / count)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((x, y)))[0, 1])


@pytest.mark.parametrize("distance", [1, 2, 7, 64])
def test_neighbouring_counters_and_neighbouring_seeds_are_independent(distance):
    count = 50_000
    most = 4 / sqrt(count)
    x = numbers(3, count + distance)
    assert abs(correlation(x[:count], x[distance:])) < most
    assert abs(correlation(numbers(3, count), numbers(3 + distance, count))) < most
    first = uniform(torch.arange(count), torch.tensor(0), CPU)
    assert abs(correlation(first, uniform(torch.arange(count), torch.tensor(distance), CPU))) < most
    assert chi_square(torch.histc(first, bins=64, min=0, max=1)) < 103.5
    pairs = (8 * x[:count]).long() * 8 + (8 * x[distance:]).long()
    assert chi_square(torch.bincount(pairs, minlength=64).double()) < 103.5


def test_no_number_of_one_seed_is_that_of_another():
    table = uniform(torch.arange(1000)[:, None], torch.arange(200), CPU).flatten()
    assert len(table.unique()) == len(table)


def test_each_bit_of_a_seed_changes_half_of_the_bits():
    base = naive_bits(12345, 6)
    for bit in range(62):
        flipped = int(uniform(torch.tensor(12345 ^ (1 << bit)), torch.tensor(6), CPU) * 2**53)
        assert 12 < bin(flipped ^ (base >> 11)).count("1") < 42


def phi(x: float) -> float:
    return 0.5 * (1 + erf(x / sqrt(2)))


@pytest.mark.parametrize("seed", SEEDS[:-1])
def test_normal_numbers_are_normal(seed):
    count = 50_001
    x = normal(seed, 1, (count,), CPU).sort().values
    assert x.isfinite().all()
    assert abs(float(x.mean())) < 4 / sqrt(count)
    assert abs(float(x.var()) - 1) < 4 * sqrt(2 / count)
    assert abs(float((x**4).mean()) - 3) < 4 * sqrt(96 / count)
    ideal = torch.tensor([phi(value) for value in x[::100].tolist()], dtype=torch.float64)
    ranks = torch.arange(count, dtype=torch.float64)[::100] / count
    assert (ideal - ranks).abs().max() < 1.95 / sqrt(count), "Kolmogorov and Smirnov, 99.9%"


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (5, 1, 3)])
def test_normal_numbers_have_their_shape(shape):
    x = normal(5, 2, shape, CPU)
    assert x.shape == shape
    assert torch.equal(x, normal(5, 2, shape, CPU))


def test_streams_of_a_seed_are_independent_of_each_other_and_of_its_uniform_numbers():
    count = 40_000
    streams = [normal(9, stream, (count,), CPU) for stream in (1, 2, 3)] + [normal(10, 1, (count,), CPU)]
    text = numbers(9, count) - 0.5
    for i, one in enumerate(streams):
        assert abs(correlation(one, text)) < 4 / sqrt(count)
        for other in streams[:i]:
            assert abs(correlation(one, other)) < 4 / sqrt(count)
    first, second = streams[0].chunk(2)
    assert abs(correlation(first, second)) < 4 / sqrt(count // 2), "made of the same radius"
    assert abs(correlation(first**2, second**2)) < 4 / sqrt(count // 2)
