"""A policy under the names of LeRobot's documented interface (`PreTrainedPolicy`), without that package.

b samples, o observation steps, k actions of a chunk, a channels of an action.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.policy.base import ActionPolicy
from transfusion_pytorch.policy.executor import ChunkExecutor, check_steps
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.saving.methods import PretrainedMethods

ACTION, ACTION_IS_PAD = "action", "action_is_pad"


@register_component
@dataclass(frozen=True)
class LeRobotConfig:
    """How actions are selected.

    - `n_action_steps`: executed steps of a chunk, as LeRobot calls them; by default all but the `delay`
    - `delay`: real-time chunking, see `ChunkExecutor`
    """

    n_action_steps: int | None = None
    delay: int = 0


@register_component
class LeRobotPolicy(PretrainedMethods, nn.Module):
    """Wraps a policy whose observations have LeRobot's names, `observation.state` and `observation.images.top`.

    Batches are dicts as LeRobot's data loader makes them: observations `(b, o, *shape)` or, for one observation step,
    `(b, *shape)`; `action` `(b, k, a)`, `action_is_pad` `(b, k)`. Actions and observations are in their own units: the
    policy normalises by itself, so use no normalising processors around it. `save_pretrained` and `from_pretrained`
    keep the configuration and the policy.

    Raises `ValueError` for `n_action_steps` that do not fit into a chunk.

    >>> policy = LeRobotPolicy(FlowPolicy(observations={"observation.state": (5,)}, dim_action=2, chunk_length=16))
    >>> loss, figures = policy.forward(batch)
    >>> policy.reset()
    >>> action = policy.select_action({"observation.state": state})  # (b, a)
    """

    config_class: ClassVar[type] = LeRobotConfig
    name: ClassVar[str] = "transfusion_flow"
    example_call = "action = model.select_action(batch)  # (b, dim_action)"

    def __init__(self, policy: ActionPolicy, config: LeRobotConfig | None = None):
        super().__init__()
        self.config = LeRobotConfig() if config is None else config
        self.policy = policy
        steps, delay = self.config.n_action_steps, self.config.delay
        if steps is not None:
            check_steps(steps, delay, policy.chunk_length, name="n_action_steps")
        self.executor = ChunkExecutor(policy, executed_steps=steps, delay=delay)

    def get_optim_params(self) -> list[nn.Parameter]:
        """What an optimizer is to change."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def reset(self) -> None:
        """Call this whenever an environment is reset."""
        self.executor.reset()

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float] | None]:
        """The loss of a batch, and figures for a log. Raises `ValueError` without actions, and what
        `ActionPolicy.loss` raises.
        """
        if ACTION not in batch:
            raise ValueError(f"the batch has no {ACTION!r}, only {', '.join(batch) or 'nothing'}")
        loss = self.policy.loss(self._observation(batch), batch[ACTION], action_is_pad=batch.get(ACTION_IS_PAD))
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: Mapping[str, Tensor], noise: Float[Tensor, "b k a"] | None = None
    ) -> Float[Tensor, "b k a"]:
        """A whole chunk for the observations of a batch, `(b, o, *shape)`, from this noise or one that is drawn."""
        return self.policy.predict(self._observation(batch), noise=noise)

    @torch.no_grad()
    def select_action(
        self, batch: Mapping[str, Tensor], noise: Float[Tensor, "b k a"] | None = None
    ) -> Float[Tensor, "b a"]:
        """The next action for the present observations `(b, *shape)`. A decision is made where the chunk is used up,
        from this noise or one that is drawn; other steps need none.
        """
        return self.executor.act(batch, noise=noise)

    def _observation(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observations that the policy has, with an axis of observation steps."""
        found = {name: batch[name] for name in self.policy.observation_spec.shapes if name in batch}
        if self.policy.observation_steps > 1:
            return found
        shapes = self.policy.observation_spec.shapes
        return {name: x[:, None] if x.ndim == 1 + len(shapes[name]) else x for name, x in found.items()}
