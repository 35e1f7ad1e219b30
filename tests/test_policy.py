"""Policies: what reaches losses and actions, and what must not."""

import json

import pytest
import torch
from mmdit_models import refused
from torch import Tensor

from transfusion_pytorch import TimePolicy
from transfusion_pytorch.mmdit import imitation_mask
from transfusion_pytorch.policy import ChunkExecutor, FlowPolicy, LeRobotConfig, LeRobotPolicy, TransfusionPolicy
from transfusion_pytorch.policy.normalization import Normalization

SMALL = dict(dim=16, depth=1, heads=1, dim_head=8)
POLICIES = {"flow": FlowPolicy, "transfusion": TransfusionPolicy}
LENGTH, STEPS, BATCH = 6, 2, 3
SHAPES = {"state": (4,), "camera.top": (3, 16, 16)}


def build(kind: str, shapes=SHAPES, **options):
    """With all parameters away from their zero initialisation, without which most tests could not fail."""
    torch.manual_seed(0)
    options = dict(observation_steps=STEPS, dim=16, depth=2, heads=2, dim_head=8) | options
    policy = POLICIES[kind](observations=shapes, dim_action=2, chunk_length=LENGTH, **options)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy.fit_statistics(observation(64), seeded(64, LENGTH, 2) * 5 + 3)
    return policy.eval()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observation(size: int = BATCH, seed: int = 1) -> dict[str, Tensor]:
    images = seeded(size, STEPS, 3, 16, 16, seed=seed).sigmoid()
    return {"state": seeded(size, STEPS, 4, seed=seed) * 3 + 1, "camera.top": images}


def fixed_randomness(size: int = BATCH) -> dict[str, Tensor]:
    return dict(times=torch.linspace(0.1, 0.9, size), noise=seeded(size, LENGTH, 2, seed=3))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


both = pytest.mark.parametrize("kind", POLICIES)


def test_normalization_round_trip_and_moments():
    values = seeded(500, 3) * torch.tensor([1.0, 100.0, 0.0]) + torch.tensor([0.0, 50.0, 7.0])
    normalization = Normalization(3)
    close(normalization.normalize(values), values)
    normalization.fit(values)
    normalized = normalization.normalize(values)
    close(normalization.denormalize(normalized), values)
    close(normalized.mean(dim=0), torch.zeros(3))
    close(normalized[:, :2].std(dim=0, correction=0), torch.ones(2))
    assert normalized[:, 2].abs().max() < 0.01  # a channel that never moves


def test_statistics_do_not_count_padding():
    policy = build("flow")
    actions, is_pad = seeded(BATCH, LENGTH, 2), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    is_pad[:, 4:] = True
    policy.fit_statistics(observation(), actions.masked_fill(is_pad[..., None], 1e6), action_is_pad=is_pad)
    close(policy.action_statistics.mean, actions[:, :4].reshape(-1, 2).mean(dim=0))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            dict(actions=torch.zeros(8, 4, 1)),
            ValueError,
            r"actions: expected the shape \(any, any, 2\), got \(8, 4, 1\)",
        ),
        (dict(is_pad=torch.zeros(8, 6).long()), TypeError, "action_is_pad must be bool, True for padding, got .*int64"),
        (
            dict(is_pad=torch.zeros(8, 5).bool()),
            ValueError,
            r"action_is_pad: expected the shape \(8, 6\), got \(8, 5\)",
        ),
        (dict(state=torch.zeros(8, 1, 3)), ValueError, r"observation 'state': expected the shape \(8, any, 4\)"),
        (dict(pose=torch.zeros(8, 1, 3)), ValueError, "observation 'pose': expected 2 channels, got the shape"),
        (dict(pose=torch.full((8, 1, 2), torch.nan)), ValueError, "observation 'pose': .* contain NaN"),
    ],
)
def test_statistics_of_what_does_not_fit_are_refused(change, kind, message):
    shapes = dict(state=(4,), pose=(2,))
    policy = FlowPolicy(observations=shapes, dim_action=2, chunk_length=LENGTH, relative_to="state", **SMALL)
    given = (
        dict(state=torch.zeros(8, 1, 4), pose=torch.zeros(8, 1, 2), actions=torch.zeros(8, 6, 2), is_pad=None) | change
    )
    with refused(kind, message, is_type=kind is TypeError):
        policy.fit_statistics(given, given["actions"], action_is_pad=given["is_pad"])
    assert not policy.action_statistics.is_fitted


def test_statistics_stay_precise():
    policy, data = build("flow"), observation()
    mean = policy.action_statistics.mean.clone()
    assert torch.equal(policy.bfloat16().action_statistics.mean, mean)
    assert policy.predict(data).dtype == torch.float32
    double = policy.double().observation_spec.statistics[0]
    fine = torch.tensor([[300.0, 0, 0, 0]], dtype=torch.float64) + 1e-9
    values = policy.observation_spec.normalized({"state": fine, "camera.top": fine}, policy.device, torch.float64)
    torch.testing.assert_close(values["state"], (fine - double.mean) / double.std, rtol=0, atol=0)


def test_inputs_are_moved_to_the_device_of_the_policy():
    policy, is_pad = build("flow", relative_to="state").to("meta"), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    assert policy.loss(observation(), seeded(BATCH, LENGTH, 2), action_is_pad=is_pad, **fixed_randomness()).is_meta
    assert policy.encode(observation()).layers[0].k.is_meta


@both
def test_loss_is_that_of_actions_in_any_unit(kind):
    """Statistics that are fitted to scaled data undo the scale."""
    policy = build(kind)
    actions = seeded(BATCH, LENGTH, 2)
    policy.fit_statistics(observation(), actions)
    expected = policy.loss(observation(), actions, **fixed_randomness())
    policy.fit_statistics(observation(), actions * 40 + 7)
    close(policy.loss(observation(), actions * 40 + 7, **fixed_randomness()), expected)


@both
def test_padded_actions_reach_neither_loss_nor_gradients(kind):
    policy = build(kind)
    is_pad = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    is_pad[0, 2:] = True
    results = []
    for filler in (0.0, 1e3):
        actions = seeded(BATCH, LENGTH, 2).masked_fill(is_pad[..., None], filler)
        policy.zero_grad()
        loss = policy.loss(observation(), actions, action_is_pad=is_pad, **fixed_randomness())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@both
def test_mean_weighs_actions_and_not_samples(kind):
    policy = build(kind)
    is_pad = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    is_pad[0, 2:] = True
    each = policy.loss(
        observation(), seeded(BATCH, LENGTH, 2), action_is_pad=is_pad, reduction="none", **fixed_randomness()
    )
    mean = policy.loss(observation(), seeded(BATCH, LENGTH, 2), action_is_pad=is_pad, **fixed_randomness())
    counts = torch.tensor([2.0, LENGTH, LENGTH])
    close((each * counts).sum() / counts.sum(), mean)


@both
def test_a_chunk_of_padding_alone_is_no_loss(kind):
    policy, actions = build(kind), seeded(BATCH, LENGTH, 2)
    is_pad = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    loss = policy.loss(observation(), actions, action_is_pad=is_pad)
    loss.backward()
    assert loss == 0
    is_pad[1:] = False
    given = dict(action_is_pad=is_pad, **fixed_randomness())
    each = policy.loss(observation(), actions, reduction="none", **given)
    assert each[0] == 0
    close(policy.loss(observation(), actions, **given), each[1:].mean())


@both
def test_the_time_policy_draws_the_times_of_a_loss(kind):
    policy, noise = build(kind, time_policy=TimePolicy(0.3)), seeded(BATCH, LENGTH, 2, seed=3)
    drawn = policy.loss(observation(), seeded(BATCH, LENGTH, 2), noise=noise)
    close(drawn, policy.loss(observation(), seeded(BATCH, LENGTH, 2), noise=noise, times=torch.full((BATCH,), 0.3)))


@both
def test_actions_depend_on_each_observation_and_each_of_its_steps(kind):
    policy, noise = build(kind), seeded(BATCH, LENGTH, 2, seed=5)
    expected = policy.predict(observation(), noise=noise, steps=1)
    for name in SHAPES:
        for step in range(STEPS):
            changed = observation()
            changed[name][:, step] = 1 - changed[name][:, step]
            assert not torch.allclose(policy.predict(changed, noise=noise, steps=1), expected, atol=1e-4)


@both
def test_batch_equals_one_by_one(kind):
    policy, noise = build(kind), seeded(BATCH, LENGTH, 2, seed=5)
    together = policy.predict(observation(), noise=noise)
    for i in range(BATCH):
        alone = policy.predict({name: x[i : i + 1] for name, x in observation().items()}, noise=noise[i : i + 1])
        close(alone[0], together[i])


@both
def test_fixed_actions_are_kept_and_change_the_rest(kind):
    policy, noise = build(kind), seeded(BATCH, LENGTH, 2, seed=5)
    free = policy.predict(observation(), noise=noise)
    previous = seeded(BATCH, 4, 2, seed=6) * 5
    held = policy.predict(observation(), noise=noise, previous=previous, num_fixed=2)
    assert torch.equal(held[:, :2], previous[:, :2])
    assert (held[:, 2:] - free[:, 2:]).abs().max() > 1e-3
    later = previous.clone()
    later[:, 2:] += 100  # beyond what is fixed
    assert torch.equal(policy.predict(observation(), noise=noise, previous=later, num_fixed=2), held)


@both
def test_actions_that_the_model_made_itself_change_nothing_where_its_flow_is_straight(kind):
    """With one step of the solver the path of a chunk is straight, so to hold its start where it lands is no change."""
    policy, noise = build(kind), seeded(BATCH, LENGTH, 2, seed=5)
    free = policy.predict(observation(), noise=noise, steps=1)
    close(policy.predict(observation(), noise=noise, steps=1, previous=free, num_fixed=3), free)


def test_keys_of_observations_computed_once_equal_those_computed_each_time():
    policy = build("flow")
    noised, times = seeded(BATCH, LENGTH, 2), torch.tensor([0.1, 0.5, 0.9])
    tokens = policy.encode_observation(policy.observation_spec.normalized(observation(), policy.device, torch.float32))
    count = tokens.shape[1]
    own = torch.cat((policy.embed_time(times[:, None]), policy.embed_action(noised)), dim=1)
    whole = policy.transformer((tokens, own), imitation_mask(count, 1 + LENGTH))[1][:, 1:]
    close(policy.velocity(noised, times, policy.encode(observation())), whole)


@both
def test_observations_are_encoded_once_for_a_decision(kind):
    policy, calls = build(kind, {"state": (4,)}), []
    reads_state = policy.encode_observation if kind == "flow" else policy.model.modalities[0].adapter.to_model
    reads_state.register_forward_hook(lambda *args: calls.append(1))
    policy.predict(observation(1), steps=5)
    assert len(calls) == 1


@pytest.mark.parametrize("padded", [[], [1]])
def test_actions_attend_to_earlier_actions_only_and_not_to_padding(padded):
    policy, is_pad = build("flow"), torch.zeros(1, LENGTH, dtype=torch.bool)
    is_pad[:, padded] = True
    noised = seeded(1, LENGTH, 2).requires_grad_()
    one = {name: x[:1] for name, x in observation().items()}
    policy.velocity(noised, torch.tensor([0.5]), policy.encode(one), is_pad=is_pad)[0, 2].sum().backward()
    assert (noised.grad[0].abs().sum(dim=-1) > 0).tolist() == [i <= 2 and i not in padded for i in range(LENGTH)]


def test_a_policy_checkpoints_all_of_its_blocks_and_chooses_its_attention():
    policy, calls = build("flow", use_checkpoint=True, attention="flex"), []
    assert policy.transformer.attention == "flex"
    policy.transformer.attention = "sdpa"
    for block in policy.transformer.blocks:
        block.register_forward_pre_hook(lambda *args: calls.append(1))
    policy.loss(observation(), seeded(BATCH, LENGTH, 2)).backward()
    assert len(calls) == 2 * 2 * 2  # observations and actions, in two blocks, and again in the backward pass


@both
def test_relative_actions_move_with_the_observation(kind):
    """States are normalised by a shifted mean too, so that nothing but the origin of the actions changes."""
    policy = build(kind, {"state": (4,)}, relative_to="state")
    noise, shift = seeded(BATCH, LENGTH, 2), torch.tensor([10.0, -5.0, 0.0, 0.0])
    state = observation()["state"]
    before = policy.predict(dict(state=state), noise=noise)
    policy.observation_spec.statistics[0].mean += shift
    close(policy.predict(dict(state=state + shift), noise=noise), before + shift[:2])


@both
def test_a_saved_policy_acts_as_before(kind, tmp_path):
    policy = build(kind, time_policy=TimePolicy("beta"), solver_steps=3)
    policy.save_pretrained(tmp_path)
    loaded = POLICIES[kind].from_pretrained(tmp_path)
    noise = seeded(BATCH, LENGTH, 2)
    assert torch.equal(loaded.predict(observation(), noise=noise), policy.predict(observation(), noise=noise))
    assert "beta" in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@both
def test_generators_decide(kind):
    policy = build(kind)
    made = [policy.predict(observation(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_beta_times_have_the_moments_of_their_distribution():
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    times = TimePolicy("beta").times(uniform, torch.zeros(20_000, dtype=torch.bool))
    left = 1 - times  # Beta(3/2, 1): mean a / (a + 1), second moment a / (a + 2)
    assert left.mean() == pytest.approx(1.5 / 2.5, abs=1e-4)
    assert left.square().mean() == pytest.approx(1.5 / 3.5, abs=1e-4)
    assert (times.diff() > 0).all()


class Counting(FlowPolicy):
    """Actions that say which decision they come from, and where in its chunk they are."""

    def predict(self, observation, *, previous=None, num_fixed=0, **options):
        self.seen = getattr(self, "seen", [])
        self.seen.append(observation)
        chunk = torch.stack((torch.full((LENGTH,), float(len(self.seen))), torch.arange(float(LENGTH))), dim=-1)[None]
        return torch.cat((previous[:, :num_fixed], chunk[:, num_fixed:]), dim=1) if num_fixed else chunk


def counting():
    return Counting(observations=dict(state=(1,)), dim_action=2, chunk_length=LENGTH, observation_steps=STEPS, dim=8)


def act(executor, steps: int) -> list[tuple[float, ...]]:
    return [tuple(executor.act(dict(state=torch.full((1, 1), float(i))))[0].tolist()) for i in range(steps)]


def test_executor_executes_part_of_each_chunk():
    policy = counting()
    executor = ChunkExecutor(policy, executed_steps=2)
    assert act(executor, 5) == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert [seen["state"].flatten().tolist() for seen in policy.seen] == [[0, 0], [1, 2], [3, 4]]


def test_executor_goes_on_with_what_is_being_executed():
    executor = ChunkExecutor(counting(), executed_steps=3, delay=2)
    assert act(executor, 7) == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3)]
    executor.reset()
    assert act(executor, 1) == [(4, 0)]


def test_executor_names_what_does_not_go_on_from_earlier_steps():
    executor = ChunkExecutor(counting())
    with pytest.raises(ValueError, match="observation 'state' is missing, there are pose"):
        executor.act(dict(pose=torch.zeros(1, 1)))
    act(executor, 1)
    with pytest.raises(ValueError, match=r"expected the shape \(1, 1\) of the steps before, got \(2, 1\); call reset"):
        executor.act(dict(state=torch.zeros(2, 1)))


def test_lerobot_interface():
    names = {"observation.state": (4,)}
    torch.manual_seed(0)
    policy = FlowPolicy(observations=names, dim_action=2, chunk_length=LENGTH, **SMALL)
    adapter = LeRobotPolicy(policy, LeRobotConfig(n_action_steps=2))
    assert (adapter.name, adapter.config_class) == ("transfusion_flow", LeRobotConfig)
    batch = {"observation.state": seeded(BATCH, 4), "action": seeded(BATCH, LENGTH, 2), "index": torch.arange(BATCH)}
    batch["action_is_pad"] = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    loss, figures = adapter.forward(batch)
    loss.backward()
    assert figures == {"loss": loss.item()}
    assert {id(p) for p in adapter.get_optim_params()} == {id(p) for p in policy.parameters()}
    assert adapter.predict_action_chunk(batch).shape == (BATCH, LENGTH, 2)
    torch.manual_seed(1)
    chunk = policy.predict({"observation.state": batch["observation.state"][:, None]})
    torch.manual_seed(1)
    adapter.reset()
    close(torch.stack([adapter.select_action(batch) for _ in range(2)], dim=1), chunk[:, :2])
    with pytest.raises(ValueError, match=r"the batch has no 'action', only observation\.state"):
        adapter.forward({"observation.state": batch["observation.state"]})


def test_lerobot_adapters_keep_their_configuration_and_see_several_steps(tmp_path):
    names = {"observation.state": (4,)}
    policy = FlowPolicy(observations=names, dim_action=2, chunk_length=LENGTH, observation_steps=2, **SMALL)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    LeRobotPolicy(policy, LeRobotConfig(n_action_steps=2, delay=1)).save_pretrained(tmp_path)
    adapter = LeRobotPolicy.from_pretrained(tmp_path)
    assert (adapter.config.n_action_steps, adapter.executor.delay) == (2, 1)
    states, noise = seeded(BATCH, 2, 4), seeded(BATCH, LENGTH, 2)
    batch, options = {"observation.state": states, "action": seeded(BATCH, LENGTH, 2)}, dict(noise=noise)
    chunk = policy.predict({"observation.state": states}, **options)
    assert torch.equal(adapter.predict_action_chunk(batch, noise), chunk)
    assert adapter.forward(batch)[0].requires_grad
    adapter.executor.observe({"observation.state": states[:, 0]})
    assert torch.equal(adapter.select_action({"observation.state": states[:, 1]}, **options), chunk[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(state=None), "observation 'state' is missing, there are camera.top"),
        (dict(state=torch.zeros(BATCH, STEPS, 5)), r"observation 'state': expected the shape \(b, 2, 4\)"),
        (dict(state=torch.zeros(BATCH, 4)), r"observation 'state': expected .* a batch of 2 observation steps"),
        (dict(state=torch.zeros(7, STEPS, 4)), r"different batch sizes: {'state': 7, 'camera.top': 3}"),
    ],
)
@both
def test_observations_that_do_not_fit(kind, change, message):
    given = {name: x for name, x in (observation() | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        build(kind).predict(given)


def test_images_of_the_wrong_type():
    given = observation() | {"camera.top": torch.zeros(BATCH, STEPS, 3, 16, 16, dtype=torch.long)}
    with pytest.raises(TypeError, match=r"'camera.top' is an image of bytes or floats in \[0, 1\], got torch.int64"):
        build("flow").predict(given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", torch.nan, "observation 'state' contains NaN or infinity"),
        ("camera.top", 255.0, r"observation 'camera.top' is an image of floats in \[0, 1\], got .* to 255"),
    ],
)
@both
def test_observations_of_wrong_values_are_named(kind, name, value, message):
    policy, given = build(kind), observation()
    given[name][0, 0, 0] = value
    with pytest.raises(ValueError, match=message):
        policy.predict(given)
    with pytest.raises(ValueError, match=message):
        policy.loss(given, seeded(BATCH, LENGTH, 2))


def test_bytes_equal_floats():
    policy, noise = build("flow"), seeded(BATCH, LENGTH, 2)
    image = (observation()["camera.top"] * 255).to(torch.uint8)
    made = [policy.predict(observation() | {"camera.top": x}, noise=noise) for x in (image, image.float() / 255)]
    close(*made)


@both
def test_actions_that_do_not_fit(kind):
    policy = build(kind)
    with pytest.raises(ValueError, match=r"actions: expected the shape \(3, 6, 2\)"):
        policy.loss(observation(), torch.zeros(BATCH, 5, 2))
    with pytest.raises(ValueError, match=r"action_is_pad: expected the shape \(3, 6\), got \(3, 5\)"):
        policy.loss(observation(), torch.zeros(BATCH, LENGTH, 2), action_is_pad=torch.zeros(BATCH, 5, dtype=torch.bool))
    wrong_randomness = {
        r"noise: expected the shape \(3, 6, 2\), got \(6, 2\)": dict(noise=torch.zeros(LENGTH, 2)),
        r"times: expected the shape \(3,\), got \(3, 1\)": dict(times=torch.zeros(BATCH, 1)),
        r"times: expected the shape \(3,\), got \(\)": dict(times=torch.tensor(0.5)),
    }
    for message, given in wrong_randomness.items():
        with pytest.raises(ValueError, match=message):
            policy.loss(observation(), torch.zeros(BATCH, LENGTH, 2), **given)
    with refused(TypeError, "actions must be a tensor, got list", is_type=True):
        policy.loss(observation(), [[0.0, 0.0]] * LENGTH)
    with refused(TypeError, "previous must be a tensor, got list", is_type=True):
        policy.predict(observation(), num_fixed=2, previous=[[0.0, 0.0]] * LENGTH)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
        policy.loss(observation(), torch.zeros(BATCH, LENGTH, 2), reduction="sum")
    with pytest.raises(ValueError, match="num_fixed is 2, but there are no previous actions"):
        policy.predict(observation(), num_fixed=2)
    with pytest.raises(ValueError, match="num_fixed must be from 0 to chunk_length - 1 = 5, got 6"):
        policy.predict(observation(), num_fixed=LENGTH, previous=torch.zeros(BATCH, LENGTH, 2))
    with pytest.raises(ValueError, match="previous: expected at least num_fixed = 2 actions, got 1"):
        policy.predict(observation(), num_fixed=2, previous=torch.zeros(BATCH, 1, 2))
    with pytest.raises(ValueError, match=r"previous: expected the shape \(3, any, 2\), got \(3, 4, 3\)"):
        policy.predict(observation(), num_fixed=2, previous=torch.zeros(BATCH, 4, 3))


def test_transfusion_wants_padding_at_the_end():
    is_pad = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    is_pad[0, 1] = True
    with pytest.raises(ValueError, match="padded at its end only"):
        build("transfusion").loss(observation(), torch.zeros(BATCH, LENGTH, 2), action_is_pad=is_pad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(observations={}), "observations is empty"),
        (dict(observations=dict(state=(2, 3))), r"observation 'state': expected the shape of a vector, \(d,\), or of"),
        (dict(chunk_length=0), "chunk_length must be positive, got 0"),
        (dict(observation_steps=0), "observation_steps must be positive, got 0"),
        (dict(relative_to="pose"), r"relative_to must name a vector of at least 2 channels .*\(state\), got 'pose'"),
    ],
)
@both
def test_options_that_make_no_sense(kind, options, message):
    with pytest.raises(ValueError, match=message):
        POLICIES[kind](**dict(observations=dict(state=(4,)), dim_action=2, chunk_length=LENGTH) | options)


@pytest.mark.parametrize(("side", "dim"), [(8, 16), (16, 2)])
def test_images_that_are_too_small_for_their_encoder(side, dim):
    message = rf"observation 'camera': images need .* got sides \({side}, {side}\) and dim {dim}"
    with pytest.raises(ValueError, match=message):
        FlowPolicy(observations=dict(camera=(3, side, side)), dim_action=2, chunk_length=LENGTH, dim=dim)


def test_executed_steps_fit_into_a_chunk():
    with pytest.raises(ValueError, match="got executed_steps 5 and delay 2"):
        ChunkExecutor(counting(), executed_steps=5, delay=2)
    with pytest.raises(ValueError, match="got n_action_steps 7 and delay 0"):
        LeRobotPolicy(counting(), LeRobotConfig(n_action_steps=7))


def test_the_card_of_a_policy_says_from_where_it_is_imported(tmp_path):
    build("flow").save_pretrained(tmp_path)
    assert "from transfusion_pytorch.policy import FlowPolicy\n" in (tmp_path / "README.md").read_text()
