"""The sampling methods of a model.

b samples, n and m tokens, d channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from transfusion_pytorch.evaluating import gathered
from transfusion_pytorch.generation.engine import MAX_BATCH, Engine, EngineOptions, Request
from transfusion_pytorch.generation.events import Event, Sample
from transfusion_pytorch.generation.options import (
    SamplingKeywords,
    SamplingOptions,
    checks_itself,
    takes_sampling_options,
)
from transfusion_pytorch.sequence.checks import check_int, check_type
from transfusion_pytorch.sequence.samples import Modality, Shape, check_text_batch, parse_part

if TYPE_CHECKING:
    from typing_extensions import Unpack


UNSET: Any = object()  # a `max_length` that was not given: it is that of the `options`


class SamplingMethods:
    """The sampling methods of `Transfusion`: thin calls of the engine."""

    # needed of the model beside `generation.runner.Model`
    vocabulary: Any
    modalities: Any

    @takes_sampling_options
    @checks_itself
    def sample(
        self,
        prompt: Any = None,
        max_length: int = UNSET,
        *,
        cache_kv: bool = True,
        progress: bool = False,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",  # type: ignore[misc] - `max_length` is one of them, by position too
    ) -> Sample:
        """Continues one prompt. See `sample_many`."""
        keywords = _with_max_length(max_length, keywords)
        return self.sample_many([prompt], cache_kv=cache_kv, progress=progress, options=options, **keywords)[0]

    sample_one = sample

    @takes_sampling_options
    @checks_itself
    def sample_many(
        self,
        prompts: Sequence[Any],
        max_length: int = UNSET,
        *,
        max_batch: int = MAX_BATCH,
        cache_kv: bool = True,
        progress: bool = False,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",  # type: ignore[misc]
    ) -> list[Sample]:
        """Continues any mixture of prompts, up to `max_batch` of them at once, and returns a sample for each, in order.

        A prompt is None, a text tensor, a modality (raw, encoded by its encoder) or `(type, modality)`, or a list of
        those; a returned sample is one too. One that ends in a `som` id, alone or behind `meta` and a shape, opens that
        modality, which is generated next. A prompt longer than `max_length` comes back as it is, with a warning.

        Each returned sample is a list that alternates text, markers included, with `(type, modality)`. It begins with
        sos, and ends with eos unless it was cut off; its `reason` says why it ended. Modalities of the prompt come back
        as they were given.

        `options` are `SamplingOptions`; keywords replace their fields. Without `cache_kv` everything is read again at
        every step; `progress` shows a progress bar.
        """
        with gathered(self):
            engine = self.create_engine(max_batch=max_batch, cache_kv=cache_kv)
            keywords = _with_max_length(max_length, keywords)
            return engine.sample_many(prompts, progress=progress, options=options, **keywords)

    @takes_sampling_options
    @checks_itself
    def sample_stream(
        self,
        prompt: Any = None,
        max_length: int = UNSET,
        *,
        cache_kv: bool = True,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",  # type: ignore[misc]
    ) -> Iterator[Event]:
        """Continues one prompt and reports every step (`generation.events`): text as it is written, modalities as they
        are denoised. The last event has the sample. Closing or dropping the iterator cancels the request.
        """
        engine = self.create_engine(max_batch=1, cache_kv=cache_kv)
        keywords = _with_max_length(max_length, keywords)
        return _while_gathered(self, engine.submit(prompt, options=options, **keywords))

    @checks_itself
    def create_engine(self, **options: "Unpack[EngineOptions]") -> Engine:
        """An engine that takes requests at any time, and keeps its cache between them. For its options see `Engine`."""
        return Engine(self, **options)

    @checks_itself
    def generate_text_only(
        self,
        prompt: Int[Tensor, "b n"],
        seq_len: int,
        temperature: float = 1.0,
        min_p: float = 0.1,
        cache_kv: bool = True,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        logits_processors: Sequence[Any] = (),
        generator: Any = None,
        max_batch: int = MAX_BATCH,
    ) -> Int[Tensor, "b m"]:
        """Continues plain text until it is `seq_len` long, prompt included. Returns the new ids, without the prompt.
        The options are those of `SamplingOptions` for text.
        """
        check_text_batch(prompt, self.vocabulary.num_text, "prompt")
        check_int(seq_len, "seq_len", least=0)
        options = SamplingOptions(
            max_length=max(seq_len, prompt.shape[1]),
            text_temperature=temperature,
            text_min_p=min_p,
            text_top_k=top_k,
            text_top_p=top_p,
            text_repetition_penalty=repetition_penalty,
            logits_processors=logits_processors,
            generator=generator,
        )
        with gathered(self):
            return self.create_engine(max_batch=max_batch, cache_kv=cache_kv).write_only(prompt.long(), options)

    @checks_itself
    def generate_modality_only(
        self,
        batch_size: int = 1,
        modality_type: int = 0,
        fixed_modality_shape: Shape | None = None,
        modality_steps: int = 16,
        *,
        time_shift: float = 1.0,
        odeint_kwargs: Mapping[str, Any] | None = None,
        init_modality_noise: Float[Tensor, "n d"] | None = None,
        init_modality: Any = None,
        strength: float = 1.0,
        modality_mask: Bool[Tensor, "..."] | None = None,
        generator: Any = None,
        max_batch: int = MAX_BATCH,
        return_unprocessed_modalities: bool = False,
    ) -> Tensor:
        """Generates `(batch_size, ...)` of one modality without any text, as `model(images, modality_type=...)` trains
        it. The options are those of `SamplingOptions` for modalities; all begin from the same `init_modality`, which is
        of this type: a tensor without a type, `(type, tensor)` or `Latents`.
        """
        check_int(batch_size, "batch_size")
        check_type(modality_type, len(self.modalities), "modality_type")
        if init_modality is not None:
            init_modality = _of_type(init_modality, modality_type, len(self.modalities))
        options = SamplingOptions(
            fixed_modality_shape=fixed_modality_shape,
            modality_steps=modality_steps,
            time_shift=time_shift,
            odeint_kwargs=odeint_kwargs,
            init_modality_noise=init_modality_noise,
            init_modality=init_modality,
            strength=strength,
            modality_mask=modality_mask,
            generator=generator,
            return_unprocessed_modalities=return_unprocessed_modalities,
        )
        with gathered(self):
            drawn = self.create_engine(max_batch=max_batch).draw_only(batch_size, modality_type, options)
        return torch.stack(drawn)


def _with_max_length(max_length: Any, keywords: Any) -> Any:
    """The options of a call, with `max_length` where it was given."""
    return keywords if max_length is UNSET else {**keywords, "max_length": max_length}


def _of_type(init: Any, modality_type: int, num_modalities: int) -> Any:
    """An `init_modality` that has a type. Raises `ValueError` where that is another than `modality_type`."""
    init = (modality_type, init) if isinstance(init, Tensor) else init
    given = parse_part(init, num_modalities, "init_modality")
    if isinstance(given, Modality) and given.type != modality_type:
        raise ValueError(
            f"init_modality is of type {given.type} and modality_type is {modality_type}: give modality_type="
            f"{given.type}, or a modality of type {modality_type}"
        )
    return init


def _while_gathered(model: Any, request: Request) -> Iterator[Event]:
    """The events of a request; the parameters of a sharded model are whole until the iterator ends."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return request.events()
    return _gathered_events(model, request)


def _gathered_events(model: Any, request: Request) -> Iterator[Event]:
    with gathered(model):
        yield from request.events()
