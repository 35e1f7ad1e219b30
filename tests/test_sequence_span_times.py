"""Times that a caller gives, looked up for every span."""

import pytest
import torch

from transfusion_pytorch.sequence.samples import Modality, Text
from transfusion_pytorch.sequence.span_times import times_of_spans
from transfusion_pytorch.sequence.stream import NO_SPANS, pack

IMAGE = Modality(0, torch.zeros(1, 4))
SPANS = pack([[IMAGE, IMAGE], [Text(torch.tensor([1]))], [IMAGE, IMAGE, IMAGE]]).spans  # sample 1 has no modality


def of_spans(times):
    return times_of_spans(times, SPANS, 3)


def test_times_are_given_for_all_for_each_sample_or_for_each_modality():
    assert of_spans(0.25).tolist() == [0.25] * 5
    assert of_spans(torch.tensor(0.25)).tolist() == [0.25] * 5
    assert of_spans(1).tolist() == [1.0] * 5
    assert of_spans(torch.tensor([0.25, 0.5, 0.75])).tolist() == [0.25, 0.25, 0.75, 0.75, 0.75]
    table = torch.arange(12).view(3, 4) / 16
    assert of_spans(table).tolist() == [0.0, 1 / 16, 8 / 16, 9 / 16, 10 / 16]


def test_given_times_keep_their_precision():
    times = torch.rand(3, dtype=torch.float64)
    assert torch.equal(of_spans(times), times[[0, 0, 2, 2, 2]])


def test_without_spans_any_times_will_do():
    for times in (0.5, torch.rand(3), torch.rand(3, 0), torch.rand(3, 2)):
        assert times_of_spans(times, NO_SPANS, 3).shape == (0,)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 2), (2, 3), (5, 3), (1, 3), (3, 3, 1)])
def test_times_of_another_shape_are_refused(shape):
    came = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"a scalar, \(3,\) or \(3, 3\), .* got {came}$"):
        of_spans(torch.rand(shape))


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("nan"), float("inf")])
def test_times_outside_the_path_are_refused(wrong):
    for times in (wrong, torch.tensor([0.5, wrong, 0.5])):
        with pytest.raises(ValueError, match=r"times must lie between 0 \(noise\) and 1 \(data\)"):
            of_spans(times)


def test_a_condition_takes_its_column_and_stays_clean():
    spans = pack([[IMAGE, IMAGE._replace(is_learned=False), IMAGE]]).spans
    assert times_of_spans(torch.tensor([[0.25, 0.5, 0.75]]), spans, 1).tolist() == [0.25, 1.0, 0.75]
    assert times_of_spans(0.25, spans, 1).tolist() == [0.25, 1.0, 0.25]
