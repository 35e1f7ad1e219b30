"""Several drawn images in one sample: which of them get a clean copy for what follows."""

import pickle

import pytest
import torch
from tiny import tiny

from transfusion_pytorch import Condition, Latents, Sample, WithCleanCopy
from transfusion_pytorch.conversations import CleanContext, ConditionDropout

QUESTION, FIRST, SECOND = torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([4])
IMAGE, OTHER = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
SAMPLE = Sample([Condition(QUESTION), FIRST, IMAGE, SECOND, OTHER], name="two", weight=2.0)


def copied(*parts, **options):
    """The places of the parts that get a clean copy."""
    made = CleanContext(**options)(Sample(list(parts)), torch.Generator()).parts
    assert len(made) == len(parts)
    for part, before in zip(made, parts, strict=True):
        assert (part.part if isinstance(part, WithCleanCopy) else part) is before
    return [i for i, part in enumerate(made) if isinstance(part, WithCleanCopy)]


def test_an_image_that_something_learned_follows_gets_a_clean_copy():
    sample = CleanContext()(SAMPLE, torch.Generator())
    assert (sample.name, sample.weight) == ("two", 2.0)
    assert sample.parts[2].part is IMAGE
    assert copied(*SAMPLE.parts) == [2]
    assert copied(*SAMPLE.parts, SECOND) == [2, 4]
    assert copied(*SAMPLE.parts, Condition(SECOND)) == [2]
    assert copied(Latents(0, IMAGE), (1, OTHER), FIRST) == [0, 1]
    assert copied(Condition(IMAGE), IMAGE, Condition(QUESTION), OTHER) == [1]


def test_no_token_sees_a_noised_image_but_those_of_the_image_and_its_end():
    """By the mask: what is noised is a copy, or the last of its sample."""
    pack = tiny().packer()
    stream = pack([CleanContext()(SAMPLE, torch.Generator())]).stream
    noised, mask = stream.spans.is_learned.nonzero().flatten().tolist(), stream.layout.prepare().intervals.dense()
    assert noised == [1, 2]
    eom, eos = stream.lengths[0] - 2, stream.lengths[0] - 1
    for span, closing in ((1, [eom, eos]), (2, [])):
        own = (stream.modulation_index == span + 1).nonzero().flatten().tolist()
        seen_by = mask[:, own].any(1).nonzero().flatten().tolist()
        assert seen_by == own + closing


def test_the_original_is_left_alone():
    parts = list(SAMPLE.parts)
    CleanContext()(SAMPLE, torch.Generator())
    assert all(one is other for one, other in zip(SAMPLE.parts, parts, strict=True))
    once = CleanContext()(SAMPLE, torch.Generator())
    assert CleanContext()(once, torch.Generator()).parts == once.parts


def test_samples_with_one_image_stay_as_they_are():
    for parts in ([FIRST, IMAGE], [IMAGE, FIRST], [Condition(IMAGE), FIRST, OTHER], [FIRST]):
        sample = Sample(parts)
        assert CleanContext()(sample, torch.Generator()) is sample
    assert copied(IMAGE, FIRST, least=1) == [0]


def test_conditions_before_it_are_dropped_as_ever():
    sample = CleanContext()(
        Sample([Condition(IMAGE), FIRST, IMAGE, SECOND, Condition(OTHER), OTHER]), torch.Generator()
    )
    dropped = ConditionDropout(latents=1.0)(sample, torch.Generator())
    assert [type(part) for part in dropped.parts] == [torch.Tensor, WithCleanCopy, torch.Tensor, torch.Tensor]
    alone = ConditionDropout(latents=1.0)(Sample([Condition(IMAGE), WithCleanCopy(OTHER), FIRST]), torch.Generator())
    assert len(alone.parts) == 2


def test_at_least_one_image_is_drawn():
    with pytest.raises(ValueError, match="least is a number of drawn images, at least 1, got 0"):
        CleanContext(least=0)


def test_it_travels_to_data_workers():
    assert pickle.loads(pickle.dumps(CleanContext())) == CleanContext()
