"""`ChunkExecutor`: a policy in closed loop, one action for each observation.

b environments, k actions of a chunk, a channels of an action.
"""

from collections import deque
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.policy.base import ActionPolicy
from transfusion_pytorch.policy.observations import Observation, named


class ChunkExecutor:
    """Keeps the last observations and the present chunk of a policy, for a batch of environments that run in step.

    - `executed_steps`: so many actions of a chunk are executed before the next decision; by default all of them. Fewer
      react sooner, and cost more decisions
    - `delay`: real-time chunking. A decision is made from an observation after which so many actions of the last chunk
      are still executed, because the decision takes that long; the new chunk begins with them
    - `generator`: draws the noise

    Raises `ValueError` for steps that do not fit into a chunk, and whatever `ActionPolicy.predict` raises.

    >>> executor = ChunkExecutor(policy, executed_steps=8)
    >>> executor.reset()  # at the start of each episode
    >>> action = executor.act(dict(state=state))  # (b, d) to (b, a), at each step
    """

    def __init__(
        self,
        policy: ActionPolicy,
        *,
        executed_steps: int | None = None,
        delay: int = 0,
        generator: torch.Generator | None = None,
    ):
        executed_steps = policy.chunk_length - delay if executed_steps is None else executed_steps
        check_steps(executed_steps, delay, policy.chunk_length)
        self.policy, self.executed_steps, self.delay, self.generator = policy, executed_steps, delay, generator
        self.reset()

    def reset(self) -> None:
        """Forgets everything: a new episode begins."""
        self.history: deque[Observation] = deque(maxlen=self.policy.observation_steps)
        self.chunk: Float[Tensor, "b k a"] | None = None
        self.position = 0  # in the chunk

    def act(self, observation: Observation, *, noise: Float[Tensor, "b k a"] | None = None) -> Float[Tensor, "b a"]:
        """The next action, from the present observation `(b, *shape)` of each name. Before there are enough
        observations the first one is repeated. `noise` is where the flow starts, if this step makes a decision.
        """
        self.observe(observation)
        if self.chunk is None or self.position == self.executed_steps:
            self.chunk, self.position = self.decide(noise=noise), 0
        action = self.chunk[:, self.position]
        self.position += 1
        return action

    def observe(self, observation: Observation) -> None:
        """Takes an observation in, without an action. Raises `ValueError` or `TypeError` that names one that is missing
        or does not go on from the steps before.
        """
        kept = {name: named(observation, name) for name in self.policy.observation_spec.shapes}
        for name, value in kept.items() if self.history else ():
            if value.shape != (expected := self.history[-1][name].shape):
                raise ValueError(
                    f"observation {name!r}: expected the shape {tuple(expected)} of the steps before, got "
                    f"{tuple(value.shape)}; call reset() before another episode"
                )
        self.history.extend([kept] * (1 if self.history else self.policy.observation_steps))

    def decide(self, *, noise: Float[Tensor, "b k a"] | None = None) -> Float[Tensor, "b k a"]:
        """A new chunk from the observations so far, which begins with what is still to be executed of the last one."""
        names = self.history[-1]
        stacked = {name: torch.stack([step[name] for step in self.history], dim=1) for name in names}
        random: dict[str, Any] = dict(generator=self.generator, noise=noise)
        if self.chunk is None or not self.delay:
            return self.policy.predict(stacked, **random)
        left = self.chunk[:, self.executed_steps :]
        return self.policy.predict(stacked, previous=left, num_fixed=self.delay, **random)


def check_steps(executed_steps: int, delay: int, chunk_length: int, *, name: str = "executed_steps") -> None:
    """Raises `ValueError` unless executed steps and delay fit into a chunk; `name` is that of the executed steps."""
    if delay < 0 or executed_steps < max(1, delay) or executed_steps + delay > chunk_length:
        raise ValueError(
            f"{name} must be at least 1 and delay, and {name} + delay at most chunk_length = {chunk_length}, got "
            f"{name} {executed_steps} and delay {delay}"
        )
