"""AdamW in one pass over memory: where that is right, and across runs with and without it."""

import copy

import pytest
import torch
from torch import nn

from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.launch import load_optimizer_state, whole_optimizer_state
from transfusion_pytorch.training.optimizers import can_be_fused, create_optimizers
from transfusion_pytorch.training.parameters import parameter_groups

RATE = 1e-2


def train(model, optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("spoil", [None, "transposed", "complex", "meta"])
def test_which_parameters_are_changed_in_one_pass(spoil):
    weight = torch.ones(4, 3)
    made = {None: weight, "transposed": weight.t(), "complex": weight.to(torch.complex64), "meta": weight.to("meta")}
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(made[spoil])]}]
    assert can_be_fused(groups) == (spoil is None)


@pytest.mark.parametrize("saved", [None, True])
def test_a_run_goes_on_whether_or_not_it_was_saved_by_one_like_it(saved):
    """torch puts the number of steps where the saved groups say, and a fused step wants it in single precision."""
    torch.manual_seed(0)
    first = nn.Linear(4, 3).double()
    optimizer = torch.optim.AdamW(parameter_groups(first, weight_decay=0.1), lr=RATE, betas=(0.9, 0.99), fused=saved)
    train(first, optimizer, range(3))
    resumed, state = copy.deepcopy(first), copy.deepcopy(whole_optimizer_state(first, optimizer))
    ours = create_optimizers(resumed, TrainConfig(steps=1, learning_rate=RATE, weight_decay=0.1))["adamw"]
    load_optimizer_state(resumed, ours, state)
    assert all(group["fused"] is True for group in ours.param_groups)
    assert {moments["step"].dtype for moments in ours.state.values()} == {torch.float32}
    train(first, optimizer, range(3, 6))
    train(resumed, ours, range(3, 6))
    for parameter, expected in zip(resumed.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12)
