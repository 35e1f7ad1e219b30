"""What policies share: their interface, normalisation, losses without padding, chunks with a fixed start.

b samples, o observation steps, k actions of a chunk, a channels of an action.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.policy.normalization import Normalization
from transfusion_pytorch.policy.observations import Observation, ObservationSpec
from transfusion_pytorch.saving.methods import PretrainedMethods


class ActionPolicy(PretrainedMethods, nn.Module):
    """Observations in, a chunk of actions out, by flow matching. `FlowPolicy` and `TransfusionPolicy` are the two.

    - `observations`: the shape of each, by name: `dict(state=(5,), pixels=(3, 96, 96))`; see `ObservationSpec`
    - `observation_steps`: how many steps up to now are seen
    - `relative_to`: the name of an observation whose first channels are in the unit of the actions. Actions are then
      learned as differences from its latest value, which makes small corrections easy to tell apart
    """

    example_call = "actions = model.predict(observation)  # (b, chunk_length, dim_action)"

    def __init__(
        self,
        *,
        observations: Mapping[str, Sequence[int]],
        dim_action: int,
        chunk_length: int,
        observation_steps: int,
        relative_to: str | None,
        solver_steps: int,
    ):
        super().__init__()
        for name, value in (("dim_action", dim_action), ("chunk_length", chunk_length), ("solver_steps", solver_steps)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.observation_spec = ObservationSpec(observations, steps=observation_steps)
        self.action_statistics = Normalization(dim_action)
        self.dim_action, self.chunk_length, self.solver_steps = dim_action, chunk_length, solver_steps
        self.observation_steps, self.relative_to = observation_steps, relative_to
        if relative_to is not None:
            shape = self.observation_spec.shapes.get(relative_to)
            if shape is None or len(shape) != 1 or shape[0] < dim_action:
                raise ValueError(
                    f"relative_to must name a vector of at least {dim_action} channels among the observations "
                    f"({', '.join(observations)}), got {relative_to!r}"
                )

    def fit_statistics(
        self,
        observation: Observation,
        actions: Float[Tensor, "b k a"],
        *,
        action_is_pad: Bool[Tensor, "b k"] | None = None,
    ) -> None:
        """Takes the statistics of the data, which are kept and saved with the model. Padded actions do not count."""
        self.observation_spec.fit(observation)
        relative = actions - self._origin(observation)
        self.action_statistics.fit(relative if action_is_pad is None else relative[~action_is_pad])

    def loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "_ _ _"],
        *,
        action_is_pad: Bool[Tensor, "_ _"] | None = None,
        times: Float[Tensor, " b"] | None = None,
        noise: Float[Tensor, "b k a"] | None = None,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The flow matching loss: a mean over the channels of all actions that are not padded.

        - `observation`: `(b, o, *shape)` for each name
        - `actions`: as the environment takes them, not normalised
        - `action_is_pad`: True behind the end of an episode. Padded actions are neither learned nor attended to
        - `times`, `noise`: those of the flow, else drawn from the generator, or from torch's own
        - `reduction`: "none" for a loss of each sample `(b,)`, a mean over its own actions, 0 if all are padded
        """
        size = self.observation_spec.batch_size(observation)
        self._check_actions(actions, size)
        is_pad = checked_padding(action_is_pad, actions)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        normalized = self.action_statistics.normalize(actions - self._origin(observation))
        normalized = normalized.masked_fill(is_pad[..., None], 0.0).to(self.dtype)
        values = self.observation_spec.normalized(observation, self.dtype)
        random: dict[str, Any] = dict(times=times, noise=noise, generator=generator)
        return self._loss(values, normalized, is_pad, reduction=reduction, **random)

    @torch.no_grad()
    def predict(
        self,
        observation: Observation,
        *,
        previous: Float[Tensor, "b p a"] | None = None,
        num_fixed: int = 0,
        noise: Float[Tensor, "b k a"] | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b k a"]:
        """A chunk of actions for each observation `(b, o, *shape)`, in evaluation mode.

        - `previous`, `num_fixed`: real-time chunking. The first `num_fixed` actions of the new chunk are those of
          `previous`, which are being executed while this is computed. They are held on their way from noise to data
          in every step of the solver (inpainting, as in arXiv 2506.07339 without its soft mask), so that the rest of
          the chunk goes on from them
        - `noise`: where the flow starts, else drawn from the generator, or from torch's own
        - `steps`: Euler steps of the solver, each one evaluation of the network; by default `solver_steps`
        """
        size = self.observation_spec.batch_size(observation)
        steps = self.solver_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        fixed = self._fixed(previous, num_fixed, size)
        if noise is None:
            shape = (size, self.chunk_length, self.dim_action)
            device = self.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device)
        self._check_actions(noise, size, name="noise")
        origin = self._origin(observation)
        target = None if fixed is None else self.action_statistics.normalize(fixed - origin).to(self.dtype)
        with evaluating(self):
            values = self.observation_spec.normalized(observation, self.dtype)
            made = self._denoise(values, noise.to(self.device, self.dtype), target, steps)
        actions = self.action_statistics.denormalize(made.to(self.action_statistics.mean.dtype)) + origin
        return actions if fixed is None else torch.cat((fixed.to(actions), actions[:, num_fixed:]), dim=1)

    # what a policy is made of

    @abstractmethod
    def _loss(
        self,
        values: dict[str, Tensor],
        actions: Tensor,
        is_pad: Tensor,
        *,
        times: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        reduction: str,
    ) -> Tensor: ...

    @abstractmethod
    def _denoise(self, values: dict[str, Tensor], noise: Tensor, fixed: Tensor | None, steps: int) -> Tensor:
        """Normalised actions from noise, `(b, k, a)`; the first are to be `fixed`, `(b, f, a)`."""

    @property
    def device(self) -> torch.device:
        return self.action_statistics.mean.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _origin(self, observation: Observation) -> Any:
        """What actions are relative to, `(b, 1, a)`, or 0."""
        if self.relative_to is None:
            return 0.0
        return observation[self.relative_to][:, -1:, : self.dim_action].to(self.action_statistics.mean.dtype)

    def _check_actions(self, actions: Tensor, size: int, *, name: str = "actions") -> None:
        wanted = (size, self.chunk_length, self.dim_action)
        if tuple(actions.shape) != wanted:
            raise ValueError(
                f"{name}: expected the shape {wanted} (batch, chunk_length, dim_action), got {tuple(actions.shape)}"
            )

    def _fixed(self, previous: Tensor | None, num_fixed: int, size: int) -> Tensor | None:
        if not 0 <= num_fixed < self.chunk_length:
            raise ValueError(f"num_fixed must be from 0 to chunk_length - 1 = {self.chunk_length - 1}, got {num_fixed}")
        if num_fixed == 0:
            return None
        if previous is None:
            raise ValueError(f"num_fixed is {num_fixed}, but there are no previous actions: give previous=")
        if previous.ndim != 3 or len(previous) != size or previous.shape[1] < num_fixed:
            raise ValueError(
                f"previous: expected the shape ({size}, at least {num_fixed}, {self.dim_action}), got "
                f"{tuple(previous.shape)}"
            )
        if previous.shape[2] != self.dim_action:
            raise ValueError(f"previous: expected {self.dim_action} channels, got {previous.shape[2]}")
        return previous[:, :num_fixed].to(self.device)


def checked_padding(is_pad: Tensor | None, actions: Tensor) -> Bool[Tensor, "b k"]:
    """Raises `TypeError` or `ValueError` for padding that does not fit to the actions."""
    if is_pad is None:
        return torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
    if is_pad.dtype != torch.bool:
        raise TypeError(f"action_is_pad must be bool, True for padding, got {is_pad.dtype}")
    if is_pad.shape != actions.shape[:2]:
        raise ValueError(f"action_is_pad: expected the shape {tuple(actions.shape[:2])}, got {tuple(is_pad.shape)}")
    return is_pad
