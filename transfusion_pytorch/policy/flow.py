"""`FlowPolicy`: an `InContextMMDiT` that denoises actions beside the tokens of observations.

b samples, n observation tokens, k actions of a chunk, a channels of an action, d model.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from transfusion_pytorch.flow.solver import integrate
from transfusion_pytorch.flow.times import TimePolicy
from transfusion_pytorch.mmdit import Context, InContextMMDiT, TimestepEmbedding, imitation_mask
from transfusion_pytorch.mmdit.trunk import Backend
from transfusion_pytorch.policy.base import ActionPolicy
from transfusion_pytorch.policy.observations import Observation, ObservationEncoder
from transfusion_pytorch.saving.components import register_component


@register_component
class FlowPolicy(ActionPolicy):
    """Denoises a chunk of actions behind a time token, which attend to observations and causally to each other.

    The observations do not depend on the time, so that their keys and values are computed once for a decision.

    - `observations`, `observation_steps`, `relative_to`: see `ActionPolicy`
    - `dim_action`, `chunk_length`: channels of an action, and actions that are predicted at once
    - `dim`, `depth`, `heads`, `dim_head`, `ff_mult`, `attention`, `use_checkpoint`: of the `InContextMMDiT`
    - `time_policy`: how training draws times: `TimePolicy("beta")` is that of pi0
    - `solver_steps`: Euler steps from noise to actions, each one evaluation

    >>> policy = FlowPolicy(observations=dict(state=(5,)), dim_action=2, chunk_length=16)
    >>> policy.fit_statistics(dict(state=states), actions)  # (n, o, 5), (n, 16, 2)
    >>> policy.loss(dict(state=states), actions, action_is_pad=is_pad).backward()
    >>> policy.predict(dict(state=state))  # (b, 16, 2)
    """

    def __init__(
        self,
        *,
        observations: Mapping[str, Sequence[int]],
        dim_action: int,
        chunk_length: int,
        observation_steps: int = 1,
        relative_to: str | None = None,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        dim_head: int = 32,
        ff_mult: float = 4,
        time_policy: TimePolicy | None = None,
        solver_steps: int = 4,
        attention: Backend = "sdpa",
        use_checkpoint: bool = False,
    ):
        super().__init__(
            observations=observations,
            dim_action=dim_action,
            chunk_length=chunk_length,
            observation_steps=observation_steps,
            relative_to=relative_to,
            solver_steps=solver_steps,
        )
        self.time_policy = TimePolicy() if time_policy is None else time_policy
        self.encode_observation = ObservationEncoder(self.observation_spec.shapes, dim)
        self.embed_time = TimestepEmbedding(dim, timestep_scale=1000)
        self.embed_action = nn.Linear(dim_action, dim)
        self.transformer = InContextMMDiT(
            depth=depth,
            dim_modalities=(dim, dim),
            dim_outs=(None, dim_action),
            heads=heads,
            dim_head=dim_head,
            ff_mult=ff_mult,
            attention=attention,
            use_checkpoint=use_checkpoint,
        )

    def encode(self, observation: Observation) -> Context:
        """The keys and values of an observation `(b, o, *shape)`, for any number of calls of `velocity`."""
        self.observation_spec.batch_size(observation)
        return self._encode(self.observation_spec.normalized(observation, self.device, self.dtype))

    def velocity(
        self,
        noised: Float[Tensor, "b k a"],
        times: Float[Tensor, " b"],
        context: Context,
        *,
        is_pad: Bool[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b k a"]:
        """The velocity of normalised actions at these times, 0 for noise and 1 for data, one for each sample.

        Nobody attends to actions that are padded (`is_pad` is True); what comes out for them means nothing.
        """
        tokens = torch.cat((self.embed_time(times[:, None]), self.embed_action(noised)), dim=1)
        num_observations = sum(context.lengths)
        mask = imitation_mask(num_observations, tokens.shape[1], device=noised.device)[num_observations:]
        padding = None
        if is_pad is not None:
            padding = [torch.cat((torch.ones_like(is_pad[:, :1]), ~is_pad), dim=1)]
        (out,) = self.transformer((tokens,), mask, padding_masks=padding, context=context)
        assert out is not None
        return out[:, 1:]

    def _encode(self, values: dict[str, Tensor]) -> Context:
        return self.transformer.encode_context((self.encode_observation(values),))

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
    ) -> Tensor:
        device = actions.device if generator is None else generator.device
        if times is None:
            times = self.time_policy.draw(actions.new_zeros(len(actions), dtype=torch.bool), generator=generator)
        if noise is None:
            noise = torch.randn(actions.shape, generator=generator, device=device)
        times, noise = times.to(actions), noise.to(actions).masked_fill(is_pad[..., None], 0.0)
        noised = torch.lerp(noise, actions, times[:, None, None])
        velocity = self.velocity(noised, times, self._encode(values), is_pad=is_pad)
        error = (velocity - (actions - noise)).float().square().mean(dim=-1)
        error = error.masked_fill(is_pad, 0.0)
        counts = (~is_pad).sum(dim=1)
        if reduction == "none":
            return error.sum(dim=1) / counts.clamp(min=1)
        return error.sum() / counts.sum().clamp(min=1)

    def _denoise(self, values: dict[str, Tensor], noise: Tensor, fixed: Tensor | None, steps: int) -> Tensor:
        flow = partial(self._held_velocity, context=self._encode(values), noise=noise, fixed=fixed)
        times = torch.linspace(0, 1, steps + 1, device=noise.device)
        return integrate(flow, noise, times, dict(method="euler"))

    def _held_velocity(
        self, t: Tensor, x: Tensor, *, context: Context, noise: Tensor, fixed: Tensor | None
    ) -> Float[Tensor, "b k a"]:
        """The velocity at one time for all. Fixed actions are on the straight line from their noise, whatever was
        predicted for them.
        """
        times = t.expand(len(x))
        if fixed is None:
            return self.velocity(x, times, context)
        count = fixed.shape[1]
        held = torch.lerp(noise[:, :count], fixed, t)
        velocity = self.velocity(torch.cat((held, x[:, count:]), dim=1), times, context)
        return torch.cat((fixed - noise[:, :count], velocity[:, count:]), dim=1)
