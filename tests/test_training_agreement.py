"""What processes tell each other before a step: in one exchange, and the same for all."""

import torch
from tiny import tiny
from torch import tensor

from transfusion_pytorch.data.loader import LoadedStep
from transfusion_pytorch.data.loading import Skipped
from transfusion_pytorch.data.order import SampleReference
from transfusion_pytorch.training.agreement import StepAgreement
from transfusion_pytorch.training.collate import Packed
from transfusion_pytorch.training.launch import Launch

SKIPPED = Skipped(SampleReference(3, "web", 7, 0), "broken")


class Others(Launch):
    """Two processes, of which the other has sent this; one if there is nothing."""

    def __init__(self, sent=None):
        self.device = torch.device("cpu")
        self.size, self.sent, self.received = 1 if sent is None else 2, sent, []

    def sum(self, values):
        self.received.append(values.clone())
        return values if self.sent is None else values + self.sent


def step_of(model, *samples, skipped=()):
    batches = [None if sample is None else Packed(model.packer()([sample]), []) for sample in samples]
    return LoadedStep(0, batches, {}, list(skipped))


def sent_by(model, step, **options):
    """What a process sends."""
    launch = Others()
    StepAgreement(model, model.packer(), launch)(step, **options)
    (values,) = launch.received
    return values


def test_one_exchange_tells_everything():
    model = tiny()
    text, latents = [tensor([1, 2, 3])], [torch.randn(2, 2, 3), (1, torch.randn(4, 2))]
    other = sent_by(model, step_of(model, latents, skipped=[SKIPPED]), is_stopped=True)
    launch = Others(other)
    batches, skipped, agreement = StepAgreement(model, model.packer(), launch)(step_of(model, text), is_stopped=False)
    assert len(launch.received) == 1
    assert (len(batches), skipped) == (1, [])
    assert (agreement.has_skipped, agreement.has_samples, agreement.is_stopped) == (True, True, True)
    assert agreement.kinds == {"text", "flow_0", "flow_1", "velocity_0", "velocity_1"}
    assert agreement.counts.processes == 2
    assert agreement.counts.latents.tolist() == [4 * 3, 4 * 2]


def test_counts_are_those_of_all_micro_batches():
    model = tiny(reconstruction_loss_weight=1.0)
    samples = [[tensor([1, 2])], [tensor([3]), torch.randn(2, 2, 3)], [(0, torch.randn(3, 3))]]
    whole = model.packer(prob_uncond=0.0)(samples).counts
    agree = StepAgreement(model, model.packer(), Others())
    step = LoadedStep(0, [Packed(model.packer(prob_uncond=0.0)([sample]), []) for sample in samples], {}, [])
    agreement = agree(step, is_stopped=False).agreement
    assert agreement.counts.as_tensor().tolist() == whole.as_tensor().tolist()
    assert agreement.kinds == {"text", "flow_0", "velocity_0", "recon_0"}
    assert not agreement.counts.processes


def test_who_has_no_samples_takes_part_unless_nobody_has():
    model = tiny()
    nothing = step_of(model, None, None)
    some = sent_by(model, step_of(model, [tensor([1])], None), is_stopped=False)
    agree = StepAgreement(model, model.packer(), Others(some))
    batches, _, agreement = agree(nothing, is_stopped=False)
    assert agreement.has_samples
    assert [batch is agree.idle for batch in batches] == [True, True]
    none = sent_by(model, nothing, is_stopped=False)
    batches, _, agreement = StepAgreement(model, model.packer(), Others(none))(nothing, is_stopped=False)
    assert (batches, agreement.has_samples, agreement.kinds) == ([], False, frozenset())
