"""The sampling methods of a model.

b samples, n and m tokens, d channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transfusion_pytorch.generation.engine import Engine, Sampled
from transfusion_pytorch.generation.requests import SamplingOptions, check_int, check_type, checks_itself
from transfusion_pytorch.sequence.samples import Shape, Text, check_text_batch

Sample = list[Tensor | tuple[int, Tensor]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is back in the mode it had, whatever happened."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class SamplingMethods:
    """What a model offers that can sample: thin calls of the engine. Mixed into `Transfusion`."""

    # what is needed of the model beside `generation.context.Model`
    decode: Any
    prob_uncond: float
    vocabulary: Any
    modalities: Any
    device: Any

    def sample(self, prompt: Any = None, **options: Any) -> Sample:
        """Continues one prompt. See `sample_many`."""
        return self.sample_many([prompt], **options)[0]

    sample_one = sample

    @checks_itself
    def sample_many(
        self,
        prompts: Sequence[Any],
        *,
        max_length: int = 2048,
        text_temperature: float = 1.0,
        text_min_p: float = 0.1,
        modality_steps: int = 16,
        cfg_scale: float | None = None,
        fixed_modality_shape: Shape | None = None,
        force_modality_at_start: Any = None,
        init_modality_noise: Float[Tensor, "n d"] | None = None,
        cache_kv: bool = True,
        max_modality_tokens: int = 4096,
        odeint_kwargs: Mapping[str, Any] | None = None,
        return_unprocessed_modalities: bool = False,
    ) -> list[Sample]:
        """Continues any mixture of prompts, all at once.

        A prompt is None, a text tensor, a modality (raw, encoded by its encoder) or `(type, modality)`, or a list of
        those; a returned sample is one too. Each returned sample alternates text, markers included, with `(type,
        modality)`, begins with sos, and ends with eos unless `max_length` cut it off. Modalities of the prompt come
        back as they were given.

        - `max_length`: where a sample is cut off, in tokens: the rest of a longer one is not written, and a modality
          that does not fit is not drawn. It changes nothing before that: the same sample, given back as a prompt, goes
          on from there
        - `text_temperature` 0 takes the likeliest token; `text_min_p` cuts off what is less likely than that times
          the likeliest
        - `modality_steps`: intervals of the ODE solver; `odeint_kwargs` instead of the model's own
        - `cfg_scale`: classifier-free guidance by the text; 1 is none; by default 3 if the model was trained for it
        - `fixed_modality_shape`: axial shape of every modality that is drawn
        - `force_modality_at_start`: a type or `(type, shape)` to draw right after the prompt
        - `init_modality_noise`: `(n, d)` noise to start from, as much of it as needed, the same for every modality
        - `cache_kv`: False reads everything again at every step
        - `max_modality_tokens`: how many latents a shape written by the model may come to
        - `return_unprocessed_modalities`: latents as they are, those of the prompt too, not decoded
        """
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}; for one there is sample")
        if not prompts:
            raise ValueError("there are no prompts; for a sample from nothing give [None]")
        if cfg_scale is None:
            cfg_scale = 3.0 if self.prob_uncond > 0 else 1.0
        options = SamplingOptions(
            max_length=max_length,
            text_temperature=text_temperature,
            text_min_p=text_min_p,
            modality_steps=modality_steps,
            cfg_scale=cfg_scale,
            fixed_modality_shape=fixed_modality_shape,
            force_modality_at_start=force_modality_at_start,
            init_modality_noise=init_modality_noise,
            cache_kv=cache_kv,
            max_modality_tokens=max_modality_tokens,
            odeint_kwargs=odeint_kwargs,
        )
        model: Any = self
        with evaluating(model):
            sampled = Engine(model, options).sample(prompts)
            if return_unprocessed_modalities:
                latents = self.decode([pieces for pieces, _ in sampled], raw=True)
                return [[_own(part) for part in sample] for sample in latents]
            made = self.decode([pieces[2 * len(given) :] for pieces, given in sampled])
            return [self._given(sample) + parts for sample, parts in zip(sampled, made, strict=True)]

    @checks_itself
    def generate_text_only(
        self,
        prompt: Int[Tensor, "b n"],
        seq_len: int,
        *,
        temperature: float = 1.0,
        min_p: float = 0.1,
        cache_kv: bool = True,
    ) -> Int[Tensor, "b m"]:
        """Continues plain text until it is `seq_len` long, prompt included. Returns what was written, without the
        prompt.
        """
        check_text_batch(prompt, self.vocabulary.num_text)
        check_int(seq_len, "seq_len", least=0)
        options = SamplingOptions(text_temperature=temperature, text_min_p=min_p, cache_kv=cache_kv)
        model: Any = self
        with evaluating(model):
            num_tokens = max(seq_len - prompt.shape[1], 0)
            return Engine(model, options).write_only(prompt.to(self.device, torch.long), num_tokens)

    @checks_itself
    def generate_modality_only(
        self,
        batch_size: int = 1,
        *,
        modality_type: int = 0,
        fixed_modality_shape: Shape | None = None,
        modality_steps: int = 16,
        init_modality_noise: Float[Tensor, "n d"] | None = None,
        odeint_kwargs: Mapping[str, Any] | None = None,
        return_unprocessed_modalities: bool = False,
    ) -> Tensor:
        """Draws `(batch_size, ...)` of one modality without any text, as `model(images, modality_type=...)` trains
        it.
        """
        check_int(batch_size, "batch_size")
        check_type(modality_type, len(self.modalities), "modality_type")
        options = SamplingOptions(
            modality_steps=modality_steps,
            fixed_modality_shape=fixed_modality_shape,
            init_modality_noise=init_modality_noise,
            odeint_kwargs=odeint_kwargs,
        )
        model: Any = self
        with evaluating(model):
            drawn = Engine(model, options).draw_only(batch_size, modality_type)
            returned = self.decode([[piece] for piece in drawn], raw=return_unprocessed_modalities)
        return torch.stack([instance for [(_, instance)] in returned])

    def _given(self, sample: Sampled) -> Sample:
        """A sample as far as its prompt's last modality, those being the user's own."""
        given = iter([(piece.type, piece.tensor.detach().clone().to(self.device)) for piece in sample.given])
        return [
            piece.ids.to(self.device) if isinstance(piece, Text) else next(given)
            for piece in sample.pieces[: 2 * len(sample.given)]
        ]


def _own(part: Tensor | tuple[int, Tensor]) -> Tensor | tuple[int, Tensor]:
    """A copy, so that nothing returned shares memory with a prompt."""
    return (part[0], part[1].clone()) if isinstance(part, tuple) else part
