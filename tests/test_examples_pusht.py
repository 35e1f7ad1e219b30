"""PushT: the geometry of the expert, chunks of demonstrations, intervals; and, with gym-pusht, episodes."""

import copy
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

from transfusion_pytorch.examples import pusht, pusht_expert  # noqa: E402
from transfusion_pytorch.examples.pusht import ChunkDataset, Demonstrations, Episode, Scores, chunks_at  # noqa: E402
from transfusion_pytorch.examples.pusht_expert import OutOfReach, Pose  # noqa: E402
from transfusion_pytorch.policy import FlowPolicy  # noqa: E402

ROOT = Path(__file__).parent.parent
needs_environment = pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None, reason="gym-pusht is missing")


def test_poses_go_there_and_back():
    pose, points = Pose(np.array([100.0, 50.0]), 0.7), np.array([[3.0, 4.0], [-60.0, 30.0]])
    np.testing.assert_allclose(pose.to_local(pose.to_world(points)), points, atol=1e-9)
    quarter = Pose(np.array([100.0, 50.0]), np.pi / 2)
    np.testing.assert_allclose(quarter.to_world(np.array([[10.0, 0.0]])), [[100.0, 60.0]])


@pytest.mark.parametrize(
    ("point", "distance"),
    [((0, 15), 0), ((0, 119), 0), ((70, 15), 10), ((63, 34), 5), ((0, 130), 10), ((30, 50), 15), ((0, -8), 8)],
)
def test_distance_to_the_tee(point, distance):
    assert pusht_expert.distance_to_tee(np.array([point], float)) == pytest.approx(distance)


def test_normals_lead_away_from_the_tee():
    points, normals = pusht_expert.contacts()
    np.testing.assert_allclose(pusht_expert.distance_to_tee(points), 0, atol=1e-9)
    np.testing.assert_allclose(pusht_expert.distance_to_tee(points + normals), 1, atol=1e-9)


def test_ways_go_around_the_tee():
    pose = Pose(np.array([256.0, 256.0]), 0.3)
    start, end = pose.to_world(np.array([[0.0, -40.0], [0.0, 160.0]]))
    path = pusht_expert.way_around(start, end, pose)
    np.testing.assert_allclose(path[[0, -1]], [start, end])
    assert all(pusht_expert.is_clear(a, b, pose) for a, b in pairwise(path))
    assert not pusht_expert.is_clear(start, end, pose)


def test_targets_lie_ahead_on_the_way():
    path = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    np.testing.assert_allclose(pusht_expert.ahead_on(path, np.array([4.0, 1.0]), 3.0), [7.0, 0.0])
    np.testing.assert_allclose(pusht_expert.ahead_on(path, np.array([4.0, 1.0]), 8.0), [10.0, 2.0])
    np.testing.assert_allclose(pusht_expert.ahead_on(path, np.array([4.0, 1.0]), 99.0), [10.0, 10.0])


def numbered() -> Demonstrations:
    """Two episodes of 3 and 2 steps; observations and actions are the number of their step."""
    steps = torch.arange(5.0)
    return Demonstrations({"state": steps[:, None]}, torch.stack((steps, steps), dim=-1), torch.tensor([3, 5]))


def test_chunks_stay_within_their_episode():
    chunks = chunks_at(numbered(), torch.tensor([0, 2, 3]), chunk_length=3, observation_steps=2)
    assert chunks.observation["state"][..., 0].tolist() == [[0, 0], [1, 2], [3, 3]]
    assert chunks.actions[..., 0].tolist() == [[0, 1, 2], [2, 2, 2], [3, 4, 4]]
    assert chunks.is_pad.tolist() == [[False, False, False], [False, True, True], [False, False, True]]


def test_items_are_the_chunks_one_by_one():
    dataset = ChunkDataset(numbered(), chunk_length=3, observation_steps=2)
    every = dataset.everything()
    for index in range(len(dataset)):
        item = dataset[index]
        assert set(item) == {"state", "action", "action_is_pad"}
        assert torch.equal(item["state"], every.observation["state"][index])
        assert torch.equal(item["action"], every.actions[index])
        assert torch.equal(item["action_is_pad"], every.is_pad[index])


def test_demonstrations_are_joined_split_and_saved(tmp_path):
    joined = Demonstrations.joined([numbered(), numbered()])
    assert joined.ends.tolist() == [3, 5, 8, 10]
    first, last = joined.split(2)
    for part in (first, last):
        assert part.ends.tolist() == [3, 5]
        assert torch.equal(part.actions, numbered().actions)
    joined.save(tmp_path / "demonstrations.safetensors")
    loaded = Demonstrations.load(tmp_path / "demonstrations.safetensors")
    assert torch.equal(loaded.ends, joined.ends)
    assert torch.equal(loaded.observations["state"], joined.observations["state"])


def test_demonstrations_of_others_are_not_joined():
    with pytest.raises(ValueError, match="demonstrations of state cannot be joined with some of pixels"):
        Demonstrations.joined([numbered(), numbered()._replace(observations={"pixels": torch.zeros(5, 1)})])


def test_a_policy_that_needs_no_corrections_is_said_to(monkeypatch):
    env = SimpleNamespace(reset=lambda seed: ({}, {}))
    monkeypatch.setattr(pusht, "make_environment", lambda observations: env)
    monkeypatch.setattr(pusht, "led_astray", lambda *args: ({}, True))
    with pytest.raises(ValueError, match="in all of 2 episodes the policy succeeded by itself, or left nothing"):
        pusht.demonstrate(2, policy=untrained())


def test_what_the_expert_cannot_correct_is_left_out(monkeypatch):
    """A policy may push the T so far into the walls that nobody reaches it. The expert itself never does."""
    made = iter([numbered(), None, numbered()] * 2)
    env = SimpleNamespace(reset=lambda seed: ({}, {}))
    monkeypatch.setattr(pusht, "make_environment", lambda observations: env)
    monkeypatch.setattr(pusht, "led_astray", lambda *args: ({}, False))

    def one_demonstration(*args):
        if (one := next(made)) is None:
            raise OutOfReach("from any side")
        return one

    monkeypatch.setattr(pusht, "one_demonstration", one_demonstration)
    assert len(pusht.demonstrate(3, policy=untrained()).ends) == 2 * len(numbered().ends)
    with pytest.raises(OutOfReach):
        pusht.demonstrate(3)


def test_wilson_interval():
    low, high = pusht.wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert pusht.wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert pusht.wilson(0.0, 20)[0] == 0


def test_scores():
    scores = Scores.of([Episode(True, 0.96, 50), Episode(False, 0.5, 300)])
    assert (scores.success, scores.coverage, scores.steps) == (0.5, pytest.approx(0.73), 175)
    assert "success 50.0%" in str(scores)


def untrained(observations: str = "state") -> FlowPolicy:
    sizes = dict(dim=8, depth=1, heads=1, dim_head=8)
    return FlowPolicy(observations=pusht.SHAPES[observations], dim_action=2, chunk_length=4, **sizes)


@needs_environment
def test_expert_succeeds():
    made = pusht.demonstrate(1, seed=14)
    assert max(made.ends.diff(prepend=torch.tensor([0]))) < pusht.MOST_STEPS  # an episode ends early by success only


@needs_environment
def test_expert_goes_on_from_where_a_policy_got(monkeypatch):
    env = pusht.make_environment("state")
    env.reset(seed=3)
    observation, is_done = pusht.led_astray(env, env.get_obs(), untrained(), 5)
    assert not is_done
    np.testing.assert_allclose(observation["agent_pos"], np.array(env.agent.position))
    made = pusht.demonstrate(1, seed=3, policy=untrained())
    assert len(made.actions) < pusht.MOST_STEPS


@needs_environment
@pytest.mark.parametrize("observations", pusht.SHAPES)
def test_observations_have_their_shapes(observations):
    seen = pusht.as_tensors(pusht.make_environment(observations).reset(seed=0)[0])
    assert {name: tuple(value.shape) for name, value in seen.items()} == pusht.SHAPES[observations]


@needs_environment
def test_closed_loop_is_seeded(monkeypatch):
    monkeypatch.setattr(pusht, "MOST_STEPS", 6)
    policy = untrained()
    runs = [pusht.evaluate(policy, episodes=3, seed=seed, executed_steps=2) for seed in (7, 7, 8)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert [episode.steps for episode in runs[0]] == [6, 6, 6]


@needs_environment
def test_pictures_of_an_episode(monkeypatch, tmp_path):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(pusht, "MOST_STEPS", 3)
    executor = pusht.ChunkExecutor(untrained("pixels"))
    pusht.save_gif(tmp_path / "episode.gif", list(pusht.frames(executor, seed=0, observations="pixels")))
    with image.open(tmp_path / "episode.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (256, 256))


def load():
    spec = importlib.util.spec_from_file_location("script_train_policy", ROOT / "train_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_environment_the_script_says_what_to_install(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script = load()
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.run_command(script.main)
    assert capsys.readouterr().err == (
        'error: you need gym_pusht here, which is not installed: pip install "transfusion-pytorch[policy]"\n'
    )
    assert list(tmp_path.iterdir()) == []


@needs_environment
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executed-steps", "20"], "got executed_steps 20 and delay 0"),
        (["--delay", "-1"], "got executed_steps 4 and delay -1"),
        (["--dagger", "MODEL", "--observations", "pixels"], "observes environment_state, agent_pos: give other"),
        (["--demonstrations", "FILE"], "has state: give other --observations"),
    ],
)
def test_the_script_refuses_before_anything_long(options, message, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script = load()
    untrained().save_pretrained(tmp_path / "model")
    numbered().save(tmp_path / "file.safetensors")
    places = {"MODEL": str(tmp_path / "model"), "FILE": str(tmp_path / "file.safetensors")}
    arguments = [places.get(option, option) for option in options]
    monkeypatch.setattr(script, "demonstrate", lambda *args, **more: pytest.fail("demonstrated"))
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--results", str(tmp_path / "results"), *arguments])
    with pytest.raises(SystemExit):
        script.run_command(script.main)
    assert message in capsys.readouterr().err


@needs_environment
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flow", "transfusion"])
def test_script_trains_and_scores(policy, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script = load()
    options = [
        "--policy",
        policy,
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--dim",
        "32",
        "--depth",
        "1",
        "--episodes",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--results", str(tmp_path), *options])
    script.main()
    (made,) = tmp_path.iterdir()
    assert {"model", "episode.gif", "loss.png", "demonstrations.safetensors"} <= {file.name for file in made.iterdir()}
    assert "over 2 episodes" in capsys.readouterr().out
    again = ["--dagger", str(made / "model"), "--demonstrations", str(made / "demonstrations.safetensors")]
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--results", str(tmp_path / "again"), *options, *again])
    script.main()
    assert "6 demonstrations" in capsys.readouterr().out


@needs_environment
@pytest.mark.slow
def test_rounds_are_corrections_of_the_policy_so_far(monkeypatch, tmp_path, capsys):
    """All in one run, which can be gone on with; none is needed by a policy that always succeeds."""
    pytest.importorskip("matplotlib")
    script = load()
    options = ["--steps", "3", "--batch-size", "4", "--dim", "32", "--depth", "1", "--episodes", "3"]
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--results", str(tmp_path), *options, "--rounds", "2"])
    leaders, demonstrate = [], script.demonstrate

    def corrected(*args, policy, **more):
        leaders.append(copy.deepcopy(policy))
        return demonstrate(*args, policy=policy, **more)

    monkeypatch.setattr(script, "demonstrate", corrected)
    script.main()
    (made,) = tmp_path.iterdir()
    output = capsys.readouterr().out
    assert [f"round {i}: {3 + 3 * i} demonstrations" in output for i in range(3)] == [True] * 3
    assert leaders[0] is None
    policies = [FlowPolicy.from_pretrained(made / name) for name in ("round-0/model", "round-1/model", "model")]
    states = [policy.state_dict() for policy in policies]
    for leader, state in zip(leaders[1:], states[:2], strict=True):
        assert all(map(torch.equal, leader.state_dict().values(), state.values()))
    assert any(not torch.equal(one, other) for one, other in zip(states[0].values(), states[1].values(), strict=True))
    resumed = ["train_policy.py", "--results", str(tmp_path), *options, "--rounds", "3", "--resume"]

    def nothing(*args, **options):
        raise pusht.NothingToCorrect("it succeeded")

    monkeypatch.setattr(script, "demonstrate", nothing)
    monkeypatch.setattr(sys, "argv", [*resumed, str(made)])
    script.main()
    assert "round 3: it succeeded" in capsys.readouterr().out
    assert all(map(torch.equal, FlowPolicy.from_pretrained(made / "model").state_dict().values(), states[2].values()))
    for part in (made / "round-1", max((made / "checkpoints").iterdir())):
        monkeypatch.setattr(sys, "argv", [*resumed, str(part)])
        with pytest.raises(ValueError, match=f"goes on as a whole: --resume {made}"):
            script.main()
