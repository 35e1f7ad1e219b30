"""`PolicyTrainer`: what it learns, and that a run which is resumed goes on bit for bit."""

import pytest
import torch

from transfusion_pytorch import SampleError, TrainConfig
from transfusion_pytorch.policy import FlowPolicy, PolicyTrainer, TransfusionPolicy

pytest.importorskip("tqdm")
LENGTH = 3


def items(count: int = 24, scale: float = 5.0):
    """Actions that repeat the state."""
    states = torch.randn(count, 1, 2, generator=torch.Generator().manual_seed(0)) * scale
    return [{"state": state, "action": state.repeat(LENGTH, 1)} for state in states]


def policy(kind=FlowPolicy):
    torch.manual_seed(0)
    built = kind(observations=dict(state=(2,)), dim_action=2, chunk_length=LENGTH, dim=16, depth=1, heads=2, dim_head=8)
    every = items()
    states, actions = (torch.stack([item[name] for item in every]) for name in ("state", "action"))
    built.fit_statistics(dict(state=states), actions)
    return built


def config(steps: int, **options) -> TrainConfig:
    return TrainConfig(**dict(steps=steps, batch_size=8, learning_rate=1e-2, schedule="constant", **options))


def test_it_learns(tmp_path):
    trainer = PolicyTrainer(policy(), items(), config(60, ema_beta=None), folder=tmp_path, validation=items())
    before = trainer.score()
    figures = trainer.fit().figures
    assert figures["loss"] < 0.5 * before
    assert figures["loss"] == pytest.approx(trainer.score())


@pytest.mark.parametrize("kind", [FlowPolicy, TransfusionPolicy])
def test_a_resumed_run_goes_on_bit_for_bit(kind, tmp_path):
    options = dict(ema_beta=0.9, ema_every=1, ema_start=0, warmup=0, cooldown=0.0)
    whole = PolicyTrainer(policy(kind), items(), config(4, **options), folder=tmp_path / "whole")
    whole.fit()
    PolicyTrainer(policy(kind), items(), config(2, **options), folder=tmp_path / "parts").fit()
    rest = PolicyTrainer(policy(kind), items(), config(4, **options), folder=tmp_path / "parts")
    assert rest.fit(resume=True).step == 4
    for ours, theirs in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(whole.average.parameters(), rest.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_items_without_actions_are_named(tmp_path):
    broken = [*items(2), {"state": torch.zeros(1, 2)}]
    with pytest.raises(SampleError, match=r"index 2: action missing, there are state"):
        PolicyTrainer(policy(), broken, config(2), folder=tmp_path).fit()


@pytest.mark.parametrize("padded_first", [True, False])
def test_items_with_and_without_padding_are_mixed(padded_first, tmp_path):
    one, other = items(2)
    mixed = [one | {"action_is_pad": torch.tensor([False, True, True])}, other]
    trainer = PolicyTrainer(policy(), mixed if padded_first else mixed[::-1], config(1), folder=tmp_path)
    (batch,) = trainer.in_order(mixed if padded_first else mixed[::-1])
    assert batch.is_pad.sum(dim=1).tolist() == [2, 0][:: 1 if padded_first else -1]


def test_a_policy_without_statistics_is_trained_with_a_warning(tmp_path):
    plain = FlowPolicy(observations=dict(state=(2,)), dim_action=2, chunk_length=LENGTH, dim=16, depth=1)
    with pytest.warns(UserWarning, match="the policy has no statistics of the data: call policy.fit_statistics"):
        PolicyTrainer(plain, items(2), config(1), folder=tmp_path)


def test_options_without_meaning(tmp_path):
    with pytest.raises(ValueError, match="accumulation cannot be set for a policy"):
        PolicyTrainer(policy(), items(), config(2, accumulation=2), folder=tmp_path)
    with pytest.raises(TypeError, match="a dataset with a length, or a list of dicts, got generator"):
        PolicyTrainer(policy(), (item for item in items()), config(2), folder=tmp_path)
    with pytest.raises(ValueError, match="there is no validation data"):
        PolicyTrainer(policy(), items(), config(2), folder=tmp_path).score()
