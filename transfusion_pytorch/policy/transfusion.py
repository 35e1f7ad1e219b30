"""`TransfusionPolicy`: `Transfusion` as a policy. Observations are a `Condition`, the chunk of actions is a modality.

b samples, o observation steps, k actions of a chunk, a channels of an action; c channels, p the side of a patch.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.flow.times import TimePolicy
from transfusion_pytorch.policy.base import ActionPolicy
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.sequence.samples import Condition
from transfusion_pytorch.transfusion import Transfusion


@register_component
class TransfusionPolicy(ActionPolicy):
    """A `Transfusion` without text: each observation is a modality that is read, and actions are the last modality.

    Actions of a chunk see each other in both directions. A padded chunk is a shorter modality, so padding must be at
    its end (`ValueError`). The keys and values of observations are in the cache of the engine.

    - `observations`, `observation_steps`, `relative_to`: see `ActionPolicy`
    - `dim_action`, `chunk_length`: channels of an action, and actions that are predicted at once
    - `dim`, `depth`, `heads`, `dim_head`: of the `Transformer`
    - `patch_size`: side of the patches of images, whose pixels are the channels of a latent
    - `time_policy`, `solver_steps`: see `FlowPolicy`
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
        patch_size: int = 16,
        time_policy: TimePolicy | None = None,
        solver_steps: int = 4,
    ):
        super().__init__(
            observations=observations,
            dim_action=dim_action,
            chunk_length=chunk_length,
            observation_steps=observation_steps,
            relative_to=relative_to,
            solver_steps=solver_steps,
        )
        self.patch_size = patch_size
        self.action_modality = len(self.observation_spec.shapes)
        dims, axes = [], []
        for name, shape in self.observation_spec.shapes.items():
            if len(shape) == 3 and (shape[1] % patch_size or shape[2] % patch_size):
                raise ValueError(f"observation {name!r}: sides {shape[1:]} are no multiples of patch_size {patch_size}")
            dims.append(shape[0] if len(shape) == 1 else shape[0] * patch_size**2)
            axes.append(1 if len(shape) == 1 else 3)
        self.model = Transfusion(
            num_text_tokens=0,
            transformer=dict(dim=dim, depth=depth, heads=heads, dim_head=dim_head),
            dim_latent=(*dims, dim_action),
            modality_num_dim=(*axes, 1),
            text_loss_weight=0.0,
            prob_uncond=0.0,
            time_policy=time_policy,
            odeint_kwargs=dict(method="euler"),
        )

    def _conditions(self, values: Mapping[str, Tensor], index: int) -> list[Condition]:
        """The observations of one sample, each a modality."""
        latents = [self._latents(values[name][index]) for name in self.observation_spec.shapes]
        return [Condition((modality, each)) for modality, each in enumerate(latents)]

    def _latents(self, value: Tensor) -> Tensor:
        """`(o, d)` as it is; `(o, c, h, w)` to patches `(o, h/p, w/p, c p p)`."""
        if value.ndim == 2:
            return value
        p = self.patch_size
        return rearrange(value, "o c (h p) (w q) -> o h w (c p q)", p=p, q=p)

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
        if bool((is_pad[:, :-1] & ~is_pad[:, 1:]).any()):
            raise ValueError("action_is_pad: a chunk may be padded at its end only")
        lengths = (~is_pad).sum(dim=1).tolist()
        kept = ~is_pad
        kept[:, 0] = True  # a modality has at least one latent; that of a chunk of padding alone is zero, and weighs 0
        samples = [
            [*self._conditions(values, i), (self.action_modality, actions[i, : max(length, 1)])]
            for i, length in enumerate(lengths)
        ]
        all_times = None
        if times is not None:  # observations are clean, and are read whatever their time is
            times = times.to(actions.device)
            ones = torch.ones(len(samples), self.action_modality, device=times.device)
            all_times = torch.cat((ones, times[:, None]), dim=1)
        all_noise = None
        if noise is not None:
            flat = {modality: self._no_noise(samples, modality) for modality in range(self.action_modality)}
            all_noise = flat | {self.action_modality: noise.to(actions)[kept]}
        losses = self.model(samples, times=all_times, noise=all_noise, generator=generator, reduction="none")
        per_sample = losses.flow[:, self.action_modality].masked_fill(is_pad[:, 0], 0.0)
        if reduction == "none":
            return per_sample
        weights = torch.tensor(lengths, device=per_sample.device, dtype=per_sample.dtype)
        return (per_sample * weights).sum() / weights.sum().clamp(min=1)

    def _no_noise(self, samples: Sequence[Sequence], modality: int) -> Tensor:
        """Of observations, which are clean."""
        pieces = [sample[modality].part[1] for sample in samples]
        return torch.zeros_like(torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces]))

    def _denoise(
        self, values: dict[str, Tensor], noise: Tensor, fixed: Tensor | None, steps: int
    ) -> Float[Tensor, "b k a"]:
        engine = self.model.create_engine(max_batch=len(noise))
        length = self.chunk_length
        requests = []
        for i in range(len(noise)):
            options: dict = dict(init_modality_noise=noise[i], plan=[(self.action_modality, (length,))])
            if fixed is not None:
                start = noise.new_zeros(length, self.dim_action)
                start[: fixed.shape[1]] = fixed[i]
                options["init_modality"] = (self.action_modality, start)
                options["modality_mask"] = torch.arange(length) >= fixed.shape[1]
            prompt = self._conditions(values, i)
            requests.append(engine.submit(prompt, modality_steps=steps, **options))
        engine.run()
        return torch.stack([actions_in(request.result(), self.action_modality) for request in requests])


def actions_in(sample: Sequence, modality: int) -> Tensor:
    """The actions of a sample, which alternates markers and modalities."""
    (found,) = [part[1] for part in sample if isinstance(part, tuple) and part[0] == modality]
    return found
