"""PushT (gym-pusht on PyPI): demonstrations of a scripted expert, and policies in closed loop.

n steps of all episodes, b environments, k actions of a chunk; actions are targets of the agent in pixels of the
simulator, `(2,)`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.examples.pusht_expert import SIDE, Expert, OutOfReach
from transfusion_pytorch.examples.run import optional, progress
from transfusion_pytorch.policy.executor import ChunkExecutor
from transfusion_pytorch.saving.files import load_tensors, save_tensors

Observations = Literal["state", "pixels"]
KIND: dict[str, str] = {"state": "environment_state_agent_pos", "pixels": "pixels_agent_pos"}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "state": {"environment_state": (16,), "agent_pos": (2,)},
    "pixels": {"pixels": (3, 96, 96), "agent_pos": (2,)},
}
MOST_STEPS = 300  # of an episode, as the environment is registered
DISTURBED = 0.04  # probability that a disturbance of the demonstration begins in a step
DISTURBED_STEPS, DISTURBED_BY = (2, 8), 35.0  # how long it lasts, and the standard deviation in pixels
LONGEST_LEAD = 250  # steps that a policy acts before the expert goes on
EPISODES_AT_ONCE = 50


class Demonstrations(NamedTuple):
    """All episodes one behind the other: what was observed, what the expert would do, and where each one ends."""

    observations: dict[str, Tensor]  # (n, *shape)
    actions: Float[Tensor, "n 2"]
    ends: Tensor  # (episodes,) the step behind the last one of each

    def save(self, path: Path) -> None:
        named = {f"observation.{name}": value for name, value in self.observations.items()}
        save_tensors(path, {**named, "action": self.actions, "ends": self.ends})

    @classmethod
    def load(cls, path: Path) -> "Demonstrations":
        tensors = load_tensors(path)
        actions, ends = tensors.pop("action"), tensors.pop("ends")
        return cls({name.removeprefix("observation."): value for name, value in tensors.items()}, actions, ends)

    @classmethod
    def joined(cls, parts: Sequence["Demonstrations"]) -> "Demonstrations":
        """All of them, one behind the other. Raises `ValueError` for none, and for others than the first observes."""
        if not parts:
            raise ValueError("there are no demonstrations to join")
        names = parts[0].observations
        for part in parts:
            if set(part.observations) != set(names):
                raise ValueError(
                    f"demonstrations of {', '.join(names)} cannot be joined with some of {', '.join(part.observations)}"
                )
        before = np.cumsum([0, *(len(part.actions) for part in parts)])
        return cls(
            {name: torch.cat([part.observations[name] for part in parts]) for name in names},
            torch.cat([part.actions for part in parts]),
            torch.cat([part.ends + int(start) for part, start in zip(parts, before[:-1], strict=True)]),
        )

    def split(self, held_out: int) -> tuple["Demonstrations", "Demonstrations"]:
        """The first episodes, and the last `held_out`. With too few of them they are in both."""
        if len(self.ends) <= held_out:
            return self, self
        cut = int(self.ends[-held_out - 1])
        first = Demonstrations(
            {n: x[:cut] for n, x in self.observations.items()}, self.actions[:cut], self.ends[:-held_out]
        )
        rest = {name: value[cut:] for name, value in self.observations.items()}
        return first, Demonstrations(rest, self.actions[cut:], self.ends[-held_out:] - cut)


class Chunks(NamedTuple):
    """A batch: observations `(b, o, *shape)`, the actions that follow, and which of them lie behind the episode."""

    observation: dict[str, Tensor]
    actions: Float[Tensor, "b k 2"]
    is_pad: Tensor  # (b, k)


def chunks_at(demonstrations: Demonstrations, steps: Tensor, *, chunk_length: int, observation_steps: int) -> Chunks:
    """The chunks that begin at these steps `(b,)`. Before an episode its first observation is repeated, behind it its
    last action, which counts as padding.
    """
    ends = demonstrations.ends
    episode = torch.searchsorted(ends, steps, right=True)
    first = torch.where(episode > 0, ends[episode - 1], 0)
    last = ends[episode] - 1
    past = torch.maximum(steps[:, None] + torch.arange(1 - observation_steps, 1), first[:, None])
    ahead = steps[:, None] + torch.arange(chunk_length)
    observation = {name: value[past] for name, value in demonstrations.observations.items()}
    actions = demonstrations.actions[torch.minimum(ahead, last[:, None])]
    return Chunks(observation, actions, ahead > last[:, None])


class ChunkDataset:
    """A chunk for each step of the demonstrations, as a dict with the names of LeRobot."""

    def __init__(self, demonstrations: Demonstrations, *, chunk_length: int, observation_steps: int):
        self.demonstrations = demonstrations
        self.lengths = dict(chunk_length=chunk_length, observation_steps=observation_steps)

    def __len__(self) -> int:
        return len(self.demonstrations.actions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chunk = chunks_at(self.demonstrations, torch.tensor([index]), **self.lengths)
        observation = {name: value[0] for name, value in chunk.observation.items()}
        return observation | {"action": chunk.actions[0], "action_is_pad": chunk.is_pad[0]}

    def everything(self) -> Chunks:
        """All chunks at once, for statistics. Images are left out: they need none."""
        vectors = {name: value for name, value in self.demonstrations.observations.items() if value.ndim == 2}
        return chunks_at(self.demonstrations._replace(observations=vectors), torch.arange(len(self)), **self.lengths)


def make_environment(observations: Observations) -> Any:
    """The environment itself, without the wrappers of gymnasium: its steps are counted by whoever runs it."""
    module = optional("gym_pusht.envs.pusht", extra="policy")
    return module.PushTEnv(obs_type=KIND[observations])


def as_tensors(observation: dict[str, Any]) -> dict[str, Tensor]:
    """Vectors in single precision; pixels as bytes, channels first."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(value.transpose(2, 0, 1)))
        if name == "pixels"
        else torch.as_tensor(value, dtype=torch.float32)
        for name, value in observation.items()
    }


class NothingToCorrect(ValueError):
    """A policy needs none of the corrections that were asked for."""


def demonstrate(
    count: int, *, observations: Observations = "state", seed: int = 0, policy: Any = None
) -> Demonstrations:
    """Episodes of the expert, from the environment's own random states.

    Now and then the agent is disturbed while the expert's choice is what is written down, so that the data show how to
    recover. With a `policy`, it acts for a random number of steps at first and the expert goes on from there (as in
    DAgger, arXiv 1011.0686): then the data have the states that the policy gets into. An episode in which it succeeds
    in that time is left out, and so is one in which it pushes the T so far into the walls that nobody can move it.

    Raises `NothingToCorrect` where none is left.
    """
    generator = np.random.default_rng(seed)
    episodes = []
    for index in progress(range(count), description="demonstrations"):
        env = make_environment(observations)
        observation, _ = env.reset(seed=seed + index)
        if policy is not None:
            observation, is_done = led_astray(env, observation, policy, int(generator.integers(0, LONGEST_LEAD)))
            if is_done:
                continue
        try:
            episodes.append(one_demonstration(env, observation, generator))
        except OutOfReach:
            if policy is None:
                raise
    if not episodes:
        raise NothingToCorrect(
            f"in all of {count} episodes the policy succeeded by itself, or left nothing to correct: try more episodes"
        )
    return Demonstrations.joined(episodes)


def led_astray(env: Any, observation: Any, policy: Any, steps: int) -> tuple[Any, bool]:
    """Lets a policy act for so many steps. Returns the last observation, and whether the episode is over."""
    executor = ChunkExecutor(policy, executed_steps=max(policy.chunk_length // 4, 1))
    for _ in range(steps):
        observation, is_done = step_by(executor, env, observation)
        if is_done:
            return observation, True
    return observation, False


def as_action(action: Tensor) -> np.ndarray:
    """What the environment takes, from the action of a policy on any device."""
    return action.cpu().double().numpy()


def step_by(executor: ChunkExecutor, env: Any, observation: Any) -> tuple[Any, bool]:
    """A step of one environment by a policy: the next observation, and whether the episode is over."""
    batch = {name: value[None] for name, value in as_tensors(observation).items()}
    observation, _, is_done, _, _ = env.step(as_action(executor.act(batch)[0]))
    return observation, is_done


def one_demonstration(env: Any, observation: Any, generator: np.random.Generator) -> Demonstrations:
    """The expert from the present state of an environment to the end of the episode."""
    expert = Expert(env, seed=int(generator.integers(2**31)))
    seen, actions = [], []
    left, offset = 0, np.zeros(2)
    for _ in range(MOST_STEPS):
        action = expert.act()
        seen.append(as_tensors(observation))
        actions.append(torch.as_tensor(action, dtype=torch.float32))
        if left == 0 and generator.random() < DISTURBED:
            left, offset = int(generator.integers(*DISTURBED_STEPS)), generator.normal(size=2) * DISTURBED_BY
        executed = np.clip(action + offset, 0, SIDE) if left else action
        left = max(left - 1, 0)
        observation, _, is_done, _, _ = env.step(executed)
        if is_done:
            break
    stacked = {name: torch.stack([step[name] for step in seen]) for name in seen[0]}
    return Demonstrations(stacked, torch.stack(actions), torch.tensor([len(actions)]))


class Episode(NamedTuple):
    """How an episode ended: whether the environment calls it a success, and its highest coverage of the goal."""

    is_success: bool
    coverage: float
    steps: int


class Scores(NamedTuple):
    """Means over episodes, with 95% intervals."""

    episodes: int
    success: float
    success_interval: tuple[float, float]
    coverage: float
    coverage_interval: tuple[float, float]
    steps: float

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> "Scores":
        coverage = np.array([episode.coverage for episode in episodes])
        success = float(np.mean([episode.is_success for episode in episodes]))
        half = 1.96 * float(coverage.std()) / math.sqrt(len(episodes))
        return cls(
            len(episodes),
            success,
            wilson(success, len(episodes)),
            float(coverage.mean()),
            (float(coverage.mean()) - half, min(float(coverage.mean()) + half, 1.0)),
            float(np.mean([episode.steps for episode in episodes])),
        )

    def __str__(self) -> str:
        low, high = self.success_interval
        least, most = self.coverage_interval
        return (
            f"success {self.success:.1%} (95% interval {low:.1%} to {high:.1%}), highest coverage {self.coverage:.3f} "
            f"({least:.3f} to {most:.3f}), {self.steps:.0f} steps, over {self.episodes} episodes"
        )


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which stays within 0 and 1."""
    z = 1.96
    middle, half = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max((middle - half) / (1 + z**2 / count), 0.0), (middle + half) / (1 + z**2 / count)


def evaluate(
    policy: Any,
    *,
    episodes: int,
    observations: Observations = "state",
    seed: int = 100_000,
    executed_steps: int = 8,
    delay: int = 0,
) -> list[Episode]:
    """A policy in closed loop, from the random states of the seeds from `seed` on, many environments at once."""
    results: list[Episode] = []
    for start in progress(range(0, episodes, EPISODES_AT_ONCE), description="episodes"):
        seeds = range(seed + start, seed + min(start + EPISODES_AT_ONCE, episodes))
        generator = torch.Generator().manual_seed(seed + start)
        executor = ChunkExecutor(policy, executed_steps=executed_steps, delay=delay, generator=generator)
        results += run_together(executor, seeds, observations)
    return results


def run_together(executor: ChunkExecutor, seeds: Sequence[int], observations: Observations) -> list[Episode]:
    """An episode for each seed, in step. Those that are over wait for the others."""
    environments = [make_environment(observations) for _ in seeds]
    seen = [env.reset(seed=seed)[0] for env, seed in zip(environments, seeds, strict=True)]
    highest, lengths = [0.0] * len(seeds), [0] * len(seeds)
    is_done = [False] * len(seeds)
    for _ in range(MOST_STEPS):
        tensors = [as_tensors(each) for each in seen]
        actions = executor.act({name: torch.stack([each[name] for each in tensors]) for name in tensors[0]})
        for i, env in enumerate(environments):
            if not is_done[i]:
                seen[i], _, is_done[i], _, info = env.step(as_action(actions[i]))
                highest[i], lengths[i] = max(highest[i], float(info["coverage"])), lengths[i] + 1
        if all(is_done):
            break
    return [Episode(bool(is_done[i]), highest[i], lengths[i]) for i in range(len(seeds))]


def frames(executor: ChunkExecutor, *, seed: int, observations: Observations) -> Iterator[np.ndarray]:
    """Pictures `(h, w, 3)` of an episode, one for each step, the action as a cross."""
    env = make_environment(observations)
    env.visualization_width = env.visualization_height = 256
    observation, _ = env.reset(seed=seed)
    executor.reset()
    for _ in range(MOST_STEPS):
        observation, is_done = step_by(executor, env, observation)
        yield env.render()
        if is_done:
            return


def save_gif(path: Path, pictures: Sequence[np.ndarray], *, seconds_per_frame: float = 0.1) -> None:
    image = optional("PIL.Image")
    images = [image.fromarray(picture).quantize(32) for picture in pictures]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 * seconds_per_frame), loop=0)
