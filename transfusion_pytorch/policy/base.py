"""What policies share: their interface, normalisation, losses without padding, chunks with a fixed start.

Inputs may be on any device and are moved to that of the policy.

b samples, o observation steps, k actions of a chunk, a channels of an action.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.mmdit.checks import check_positive
from transfusion_pytorch.policy.normalization import Normalization
from transfusion_pytorch.policy.observations import Observation, ObservationSpec, named
from transfusion_pytorch.saving.methods import PretrainedMethods


class ActionPolicy(PretrainedMethods, nn.Module):
    """Observations in, a chunk of actions out, by flow matching. `FlowPolicy` and `TransfusionPolicy` are the two.

    - `observations`: the shape of each, by name: `dict(state=(5,), pixels=(3, 96, 96))`; see `ObservationSpec`
    - `observation_steps`: how many steps up to now are seen
    - `relative_to`: the name of an observation whose first channels are in the unit of the actions. Actions are then
      learned as differences from its latest value, which makes small corrections easy to tell apart

    t = 0 is noise and t = 1 is data, as everywhere. Raises `ValueError` that names the argument.
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
        check_positive(dim_action=dim_action, chunk_length=chunk_length, solver_steps=solver_steps)
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
        actions: Float[Tensor, "_ _ _"],
        *,
        action_is_pad: Bool[Tensor, "_ _"] | None = None,
    ) -> None:
        """Takes the statistics of the data, which are kept and saved with the model.

        - `observation`: `(b, o, d)` for each vector, of all data; images need none and may be left out
        - `actions`: `(b, k, a)` chunks of any length, as the environment takes them
        - `action_is_pad`: `(b, k)`, True for actions that do not count

        Raises `TypeError` or `ValueError` that names the input for shapes and types that do not fit, and for NaN.
        """
        checked("actions", actions, (None, None, self.dim_action))
        is_pad = checked_padding(action_is_pad, actions).to(actions.device)
        if self.relative_to is not None:
            wanted = (len(actions), None, *self.observation_spec.shapes[self.relative_to])
            checked(f"observation {self.relative_to!r}", named(observation, self.relative_to), wanted)
        relative = actions - self._origin(observation).to(actions.device)
        self.observation_spec.fit(observation)
        self.action_statistics.fit(relative[~is_pad], name="actions")

    def loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "_ _ _"],
        *,
        action_is_pad: Bool[Tensor, "_ _"] | None = None,
        times: Float[Tensor, "..."] | None = None,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
    ) -> Float[Tensor, ""] | Float[Tensor, " b"]:
        """The flow matching loss: a mean over the channels of all actions that are not padded.

        - `observation`: `(b, o, *shape)` for each name
        - `actions`: `(b, k, a)`, as the environment takes them, not normalised
        - `action_is_pad`: `(b, k)`, True behind the end of an episode. Padded actions are neither learned nor attended
          to
        - `times`: `(b,)`, 0 for noise and 1 for data; `noise`: `(b, k, a)`, in the unit of normalised actions. Drawn
          from the generator, or from torch's own, unless given
        - `reduction`: "none" for a loss of each sample `(b,)`, a mean over its own actions. That of padding alone is 0

        Raises `TypeError` or `ValueError` that names the input for types and shapes that do not fit, and on a CPU for
        NaN, infinity, and images that are not in [0, 1]. Other devices are not waited for: there the loss is NaN, which
        `PolicyTrainer` reports.
        """
        size = self.observation_spec.batch_size(observation)
        self.observation_spec.check_values(observation, waits=False)
        shape = (size, self.chunk_length, self.dim_action)
        checked("actions", actions, shape)
        is_pad = checked_padding(action_is_pad, actions).to(self.device)
        if times is not None:
            checked("times", times, (size,))
        if noise is not None:
            checked("noise", noise, shape)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        normalized = self.action_statistics.normalize(actions.to(self.device) - self._origin(observation))
        normalized = normalized.masked_fill(is_pad[..., None], 0.0).to(self.dtype)
        if normalized.device.type == "cpu" and not normalized.isfinite().all():
            raise ValueError("actions contain NaN or infinity")
        values = self.observation_spec.normalized(observation, self.device, self.dtype)
        random: dict[str, Any] = dict(times=times, noise=noise, generator=generator)
        return self._loss(values, normalized, is_pad, reduction=reduction, **random)

    @torch.no_grad()
    def predict(
        self,
        observation: Observation,
        *,
        previous: Float[Tensor, "..."] | None = None,
        num_fixed: int = 0,
        noise: Float[Tensor, "..."] | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b k a"]:
        """A chunk of actions for each observation `(b, o, *shape)`, in evaluation mode, as the environment takes them.

        - `previous` `(b, p, a)`, `num_fixed`: real-time chunking. The first `num_fixed` actions of the new chunk are
          those of `previous`, which are being executed while this is computed. They are held on their way from noise
          to data in every step of the solver (inpainting, as in arXiv 2506.07339 without its soft mask), so that the
          rest of the chunk goes on from them
        - `noise`: `(b, k, a)`, where the flow starts, in the unit of normalised actions; drawn from the generator, or
          from torch's own, unless given
        - `steps`: Euler steps of the solver, each one evaluation of the network; by default `solver_steps`

        Raises `TypeError` or `ValueError` that names the input for types and shapes that do not fit, and for
        observations that are not finite, or images that are not in [0, 1].
        """
        size = self.observation_spec.batch_size(observation)
        self.observation_spec.check_values(observation, waits=True)
        steps = self.solver_steps if steps is None else steps
        check_positive(steps=steps)
        fixed = self._fixed(previous, num_fixed, size)
        shape = (size, self.chunk_length, self.dim_action)
        if noise is None:
            device = self.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device)
        checked("noise", noise, shape)
        origin = self._origin(observation)
        target = None if fixed is None else self.action_statistics.normalize(fixed - origin).to(self.dtype)
        with evaluating(self):
            values = self.observation_spec.normalized(observation, self.device, self.dtype)
            made = self._denoise(values, noise.to(self.device, self.dtype), target, steps)
        actions = self.action_statistics.denormalize(made) + origin
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

    def _origin(self, observation: Observation) -> Tensor:
        """What actions are relative to, `(b, 1, a)`, or 0."""
        if self.relative_to is None:
            return torch.zeros_like(self.action_statistics.mean)
        return observation[self.relative_to][:, -1:, : self.dim_action].to(self.action_statistics.mean)

    def _fixed(self, previous: Tensor | None, num_fixed: int, size: int) -> Tensor | None:
        if not 0 <= num_fixed < self.chunk_length:
            raise ValueError(f"num_fixed must be from 0 to chunk_length - 1 = {self.chunk_length - 1}, got {num_fixed}")
        if num_fixed == 0:
            return None
        if previous is None:
            raise ValueError(f"num_fixed is {num_fixed}, but there are no previous actions: give previous=")
        checked("previous", previous, (size, None, self.dim_action))
        if previous.shape[1] < num_fixed:
            raise ValueError(f"previous: expected at least num_fixed = {num_fixed} actions, got {previous.shape[1]}")
        if not previous[:, :num_fixed].isfinite().all():
            raise ValueError("previous contains NaN or infinity")
        return previous[:, :num_fixed].to(self.device)


def checked(name: str, value: Any, shape: Sequence[int | None]) -> Tensor:
    """Raises `TypeError` for what is no tensor, and `ValueError` for another shape; None is for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.ndim != len(shape) or any(
        size not in (None, found) for size, found in zip(shape, value.shape, strict=True)
    ):
        wanted = f"({', '.join('any' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"
        raise ValueError(f"{name}: expected the shape {wanted}, got {tuple(value.shape)}")
    return value


def checked_padding(is_pad: Tensor | None, actions: Tensor) -> Bool[Tensor, "b k"]:
    """Raises `TypeError` or `ValueError` for padding that does not fit to the actions."""
    if is_pad is None:
        return torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
    checked("action_is_pad", is_pad, actions.shape[:2])
    if is_pad.dtype != torch.bool:
        raise TypeError(f"action_is_pad must be bool, True for padding, got {is_pad.dtype}")
    return is_pad
