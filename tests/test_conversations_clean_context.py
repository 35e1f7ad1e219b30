"""Several drawn images in one sample: each is learned once, behind clean ones."""

import pickle
from collections import Counter

import pytest
import torch
from tiny import tiny

from transfusion_pytorch import Condition, Sample
from transfusion_pytorch.conversations import CleanContext

QUESTION, FIRST, SECOND = torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([4])
IMAGE, OTHER = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
SAMPLE = Sample([Condition(QUESTION), FIRST, IMAGE, SECOND, OTHER], name="two")


def visits(sample, count=300):
    generator = torch.Generator().manual_seed(0)
    return [CleanContext()(sample, generator) for _ in range(count)]


def learned(sample):
    return [part for part in sample.parts if not isinstance(part, Condition)]


def test_each_image_is_learned_with_the_text_before_it():
    seen = Counter()
    for sample in visits(SAMPLE):
        parts = learned(sample)
        is_first = torch.equal(parts[0], FIRST)
        seen[is_first] += 1
        assert torch.equal(parts[1], IMAGE if is_first else OTHER)
        assert len(sample.parts) == (3 if is_first else 5)
        assert sample.name == "two"
    assert set(seen) == {True, False}
    assert abs(seen[True] - seen[False]) < 60  # 3.5 standard deviations


def test_text_behind_the_last_image_is_a_part_of_its_own():
    tail = torch.tensor([5])
    lengths = Counter(len(sample.parts) for sample in visits(Sample([*SAMPLE.parts, tail])))
    assert set(lengths) == {3, 5, 6}
    read = Counter(len(sample.parts) for sample in visits(Sample([*SAMPLE.parts, Condition(tail)])))
    assert set(read) == {3, 5}


def test_no_token_sees_a_noised_image_but_those_of_the_image():
    """By the stream: what is noised is the last of its sample."""
    pack = tiny().packer()
    for sample in visits(SAMPLE, 20):
        spans = pack([sample]).stream.spans
        assert spans.is_learned.tolist() == [False] * (len(spans) - 1) + [True]
        assert spans.first_slot[-1] + 4 + 1 >= len(pack([sample]).stream.token) - 1  # eom, eos


def test_samples_with_one_image_stay_as_they_are():
    for parts in ([FIRST, IMAGE], [Condition(IMAGE), FIRST, OTHER], [FIRST]):
        sample = Sample(parts)
        assert CleanContext()(sample, torch.Generator()) is sample


def test_at_least_one_image_is_drawn():
    with pytest.raises(ValueError, match="least is a number of drawn images, at least 1, got 0"):
        CleanContext(least=0)


def test_it_travels_to_data_workers():
    assert pickle.loads(pickle.dumps(CleanContext())) == CleanContext()
