"""`Transfusion`: one module that reads, writes and draws.

b samples, n tokens of the packed stream, m spans (instances of a modality), d model, v vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from ema_pytorch import EMA
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from transfusion_pytorch import preparation
from transfusion_pytorch.flow.path import FlowSample, estimate_clean, velocity_towards
from transfusion_pytorch.flow.solver import check_method
from transfusion_pytorch.flow.times import CLEAN, TimePolicy, times_of_spans
from transfusion_pytorch.generation.engine import evaluating
from transfusion_pytorch.generation.methods import SamplingMethods
from transfusion_pytorch.latents import Latents, add_noise, latent_times, latents_by_type, unflatten, x_t_of
from transfusion_pytorch.modality import ModalityInfo, build_modalities, per_modality
from transfusion_pytorch.network.cache import CacheView
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import Conditioning, TimeEmbedding
from transfusion_pytorch.network.transformer import Transformer, as_trunk
from transfusion_pytorch.preparation import as_times, check_probability
from transfusion_pytorch.sequence.samples import Piece, Shape
from transfusion_pytorch.sequence.stream import Past, TokenStream, pack
from transfusion_pytorch.sequence.vocabulary import Vocabulary
from transfusion_pytorch.training.data import create_dataloader
from transfusion_pytorch.training.ema import create_ema
from transfusion_pytorch.training.losses import (
    ErrorSum,
    LossBreakdown,
    LossWeights,
    combine,
    flow_errors,
    squared_error,
    text_error,
)


class Hidden(NamedTuple):
    """What the transformer made of a stream, and what the adapters remember for reading it."""

    tokens: Shaped[Tensor, "n d"]
    condition: Shaped[Tensor, "m d"]
    memory: dict[int, Any]


class Teacher(NamedTuple):
    """Whose velocities ours are to be consistent with, and how far ahead of us on the path it stands."""

    model: "Transfusion"
    ahead: float


class Transfusion(SamplingMethods, nn.Module):
    """Autoregressive text and flow matching over any number of modalities, in one transformer (arXiv 2408.11039).

    Every call, whether a batch of mixed samples, plain text, plain images or a decoding step, is one packed stream
    through one path. Arguments (a scalar where a tuple per modality is meant applies to all):

    - `num_text_tokens`: size of the text vocabulary; 0 for modalities alone
    - `transformer`: a `Transformer`, a module that is called as one, or a dict of the arguments of one
    - `dim_latent`: channels of each modality; its length is the number of modalities
    - `modality_default_shape`: axial shape to use where none is written or asked for; `()` is a single vector
    - `modality_num_dim`: number of axes, 0 to 3, where the default shape does not tell
    - `channel_first_latent`: latents come and go as `(c, *axes)`
    - `modality_encoder`, `modality_decoder`: data to latents and back, frozen; called on batches of equal shape if
      `modality_encoder_decoder_requires_batch_dim`
    - `pre_post_transformer_enc_dec`: a pair of modules, such as `UNetDown` and `UNetUp`, instead of linear
      projections
    - `add_pos_emb`: axial positions are added to latents; on where the number of axes is known and positive
    - `to_modality_shape_fn`: what the model writes before a modality, `"4,6"`, to its axial shape; None or a
      `ValueError` where it is none, and then the default shape serves if `fallback_to_default_shape_if_invalid`
    - `text_loss_weight`, `flow_loss_weight`, `velocity_consistency_loss_weight`, `reconstruction_loss_weight`
    - `model_output_clean`: the network predicts the clean latent instead of the velocity (arXiv 2511.13720)
    - `odeint_kwargs`: `method`, tolerances and options of `torchdiffeq.odeint`
    - `prob_uncond`: how often training takes the text away from a modality, for classifier-free guidance
    - `time_policy`: how training draws times
    - `ignore_index`: the label of what is not predicted
    """

    def __init__(
        self,
        *,
        num_text_tokens: int,
        transformer: Any,
        dim_latent: int | Sequence[int] | None = None,
        modality_default_shape: Any = None,
        modality_num_dim: Any = None,
        channel_first_latent: bool | Sequence[bool] = False,
        modality_encoder: Any = None,
        modality_decoder: Any = None,
        modality_encoder_decoder_requires_batch_dim: bool | Sequence[bool] = True,
        pre_post_transformer_enc_dec: Any = None,
        add_pos_emb: bool | Sequence[bool | None] | None = None,
        to_modality_shape_fn: Any = None,
        fallback_to_default_shape_if_invalid: bool = False,
        text_loss_weight: float = 1.0,
        flow_loss_weight: float | Sequence[float] = 1.0,
        velocity_consistency_loss_weight: float = 0.1,
        reconstruction_loss_weight: float = 0.0,
        model_output_clean: bool = False,
        odeint_kwargs: Mapping[str, Any] | None = None,
        prob_uncond: float = 0.1,
        time_policy: TimePolicy | None = None,
        ignore_index: int = -1,
    ):
        super().__init__()
        if num_text_tokens < 0:
            raise ValueError(f"num_text_tokens must not be negative, got {num_text_tokens}")
        check_probability(prob_uncond)
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative, all others are ids, got {ignore_index}")
        self.transformer: Transformer = as_trunk(transformer)
        self.dim = dim = self.transformer.dim
        self.modalities = build_modalities(
            dim=dim,
            dim_latent=dim_latent,
            modality_default_shape=modality_default_shape,
            modality_num_dim=modality_num_dim,
            channel_first_latent=channel_first_latent,
            modality_encoder=modality_encoder,
            modality_decoder=modality_decoder,
            modality_encoder_decoder_requires_batch_dim=modality_encoder_decoder_requires_batch_dim,
            pre_post_transformer_enc_dec=pre_post_transformer_enc_dec,
            add_pos_emb=add_pos_emb,
            to_modality_shape_fn=to_modality_shape_fn,
        )
        self.vocabulary = Vocabulary(num_text_tokens, len(self.modalities))
        self.text_embedding = nn.Embedding(self.vocabulary.size, dim)
        self.to_logits = Linear(dim, self.vocabulary.num_logits, bias=False)
        self.time_embedding = TimeEmbedding(dim)
        self.type_embedding = nn.Embedding(len(self.modalities), dim)
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.zeros_(self.type_embedding.weight)

        self.loss_weights = LossWeights(
            text=text_loss_weight,
            flow=per_modality(flow_loss_weight, len(self.modalities), "flow_loss_weight"),
            velocity=velocity_consistency_loss_weight,
            recon=reconstruction_loss_weight,
        )
        self.odeint_kwargs = dict(odeint_kwargs or dict(atol=1e-5, rtol=1e-5, method="midpoint"))
        check_method(self.odeint_kwargs)
        self.fallback_to_default_shape_if_invalid = fallback_to_default_shape_if_invalid
        self.model_output_clean = model_output_clean
        self.prob_uncond = prob_uncond
        self.time_policy = time_policy or TimePolicy()
        self.ignore_index = ignore_index

    def forward(
        self,
        samples: Any,
        *,
        times: Any = None,
        num_modalities_to_times_fn: Any = None,
        modality_type: Any = None,
        return_loss: bool = True,
        return_breakdown: bool = False,
        velocity_consistency_ema_model: Any = None,
        velocity_consistency_delta_time: float = 1e-3,
        prob_uncond: float | None = None,
    ) -> Tensor | tuple[Tensor, LossBreakdown]:
        """The loss of a batch, or its logits.

        `samples` is a list of samples (lists of integer tensors for text, float tensors for modality 0, `(type,
        tensor)` for any modality), or ids `(b, n)` for text alone, or floats `(b, ...)` for `modality_type` alone.

        `times` for the modalities are a scalar, `(b,)` or `(b, m)`, and else drawn by the time policy or by
        `num_modalities_to_times_fn`, which takes the number of modalities of each sample `(b,)` and gives `(b, m)`.

        With a `velocity_consistency_ema_model` (from `create_ema`) velocities are held to those of the average a
        `velocity_consistency_delta_time` further along, for which times leave room. `prob_uncond` replaces the model's.

        Returns the total loss; with `return_breakdown` also its parts. Without `return_loss`, returns the logits `(b,
        n, vocabulary)` of every slot, markers included, zero behind the end of shorter samples; modalities are then
        clean unless `times` are given. Raises `ValueError` or `TypeError` that says what is wrong where.
        """
        teacher = as_teacher(self, velocity_consistency_ema_model, velocity_consistency_delta_time)
        dropped = check_probability(self.prob_uncond if prob_uncond is None else prob_uncond)
        stream, clean = self.prepare(samples, modality_type)
        if not return_loss:
            return self._all_logits(stream, clean, times, num_modalities_to_times_fn)
        if self.training:
            stream = self._drop_text(stream, dropped)
        t = self._times(stream, times, num_modalities_to_times_fn)
        if teacher is not None:
            t = t.clamp(max=CLEAN - teacher.ahead)
        stream, t = stream.to(self.device), t.to(self.device)
        flow = add_noise(clean, stream, t)

        hidden = self.run(stream, x_t_of(flow), t)
        velocities = self.velocities(hidden, stream, x_t_of(flow), t)
        breakdown = combine(
            text=self._text_error(hidden, stream),
            flow=flow_errors(velocities, flow, of_clean=self.model_output_clean),
            velocity=self._consistency_errors(velocities, flow, teacher, stream, t),
            recon=self._reconstruction_errors(velocities, flow, stream),
            weights=self.loss_weights,
        )
        return (breakdown.total, breakdown) if return_breakdown else breakdown.total

    # what forward, and sampling, are made of

    def prepare(self, samples: Any, modality_type: Any = None) -> tuple[TokenStream, Latents]:
        """Validates, encodes and packs a batch: its stream, on the CPU, and its clean latents by type."""
        marked = preparation.prepare(
            samples, modality_type, self.vocabulary, self.modalities, device=self.device, dtype=self.precision
        )
        return self.pack(marked), self.latents_by_type(marked)

    def encode(self, samples: Sequence[Sequence[Piece]], name: str = "sample") -> list[list[Piece]]:
        """Replaces raw data by channel-last latents, on this model's device."""
        return preparation.encode(samples, self.modalities, device=self.device, dtype=self.precision, name=name)

    def decode(self, samples: Sequence[Sequence[Piece]], *, raw: bool = False) -> list[list[Any]]:
        """Samples as users see them: modalities decoded (or their latents, if `raw`), channels where the user has
        them.
        """
        return preparation.decode(samples, self.modalities, device=self.device, raw=raw)

    def pack(self, samples: Sequence[Sequence[Piece]], past: Sequence[Past] | None = None) -> TokenStream:
        """Lays out encoded samples as one stream, on the CPU."""
        return pack(samples, past=past, ignore_index=self.ignore_index, token_shape=self._token_shape)

    def latents_by_type(self, samples: Sequence[Sequence[Piece]]) -> Latents:
        return latents_by_type(samples)

    def run(
        self, stream: TokenStream, latents: Latents, t: Float[Tensor, " m"], cache: CacheView | None = None
    ) -> Hidden:
        """Embeds a stream, whose latents stand at the times `t`, and runs the transformer over it."""
        x = self.text_embedding(stream.token)
        condition = self.time_embedding(t) + self.type_embedding(stream.spans.modality.to(t.device))
        memory = {}
        for modality, values in latents.items():
            members = stream.spans.of_type(modality)
            tokens, memory[modality] = self.modalities[modality].embed(
                values.to(self.dtype), stream.spans.shapes_of(modality), condition[members]
            )
            x = x.index_copy(0, stream.slots(modality), tokens.to(x.dtype))
        hidden = self.transformer(
            x,
            position=stream.position,
            layout=stream.layout,
            conditioning=Conditioning(condition, stream.row) if latents else None,
            cache=cache,
        )
        return Hidden(hidden, condition, memory)

    def logits(self, tokens: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n v"]:
        """What may come next, for every id that can be written."""
        return self.to_logits(tokens)

    def velocities(self, hidden: Hidden, stream: TokenStream, x_t: Latents, t: Float[Tensor, " m"]) -> Latents:
        """Where every latent moves, whatever the network predicts."""
        velocities = {}
        for modality, values in x_t.items():
            members = stream.spans.of_type(modality)
            predicted = (
                self.modalities[modality]
                .read(
                    hidden.tokens[stream.slots(modality)],
                    stream.spans.shapes_of(modality),
                    hidden.condition[members],
                    hidden.memory[modality],
                )
                .to(values.dtype)
            )
            if self.model_output_clean:
                predicted = velocity_towards(predicted, values, latent_times(stream, modality, t.to(values.dtype)))
            velocities[modality] = predicted
        return velocities

    # helpers

    @property
    def device(self) -> torch.device:
        return self.to_logits.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.to_logits.weight.dtype

    @property
    def precision(self) -> torch.dtype:
        """Of times, latents and losses, whatever the parameters have: single precision at least."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def num_modalities(self) -> int:
        return len(self.modalities)

    @property
    def sos_id(self) -> int:
        return self.vocabulary.sos

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos

    @property
    def meta_id(self) -> int:
        return self.vocabulary.meta

    @property
    def som_ids(self) -> list[int]:
        return list(self.vocabulary.som)

    @property
    def eom_ids(self) -> list[int]:
        return list(self.vocabulary.eom)

    def char_tokenizer(self, text: str) -> Int[Tensor, " n"]:
        """The ids that spell a shape: `"4,4"`."""
        return self.vocabulary.encode_chars(text).to(self.device)

    def decode_chars(self, ids: Int[Tensor, " n"]) -> str:
        """The inverse of `char_tokenizer`."""
        return self.vocabulary.decode_chars(ids)

    def get_modality_info(self, modality_type: int | None = None) -> ModalityInfo:
        """What one modality looks like; `modality_type` may be left out if there is only one."""
        modality_type = 0 if modality_type is None and self.num_modalities == 1 else modality_type
        if modality_type is None or not 0 <= modality_type < self.num_modalities:
            raise ValueError(f"unknown modality type {modality_type}, this model has {self.num_modalities} (from 0)")
        return self.modalities[modality_type].info(self.vocabulary)

    def compile(self, **options: Any) -> None:
        """Compiles the transformer's layers (see `Transformer.compile`); the rest is too small to gain by it.

        Raises `TypeError` if the transformer is a module of the user's own.
        """
        if not isinstance(self.transformer, Transformer):
            raise TypeError(f"only a Transformer is compiled from here, this is a {type(self.transformer).__name__}")
        self.transformer.compile(**options)

    def create_ema(self, beta: float = 0.99, **options: Any) -> EMA:
        """A moving average of this model that can sample; call `.update()` after each optimizer step."""
        return create_ema(self, beta=beta, **options)

    def create_dataloader(self, dataset: Any, **options: Any) -> DataLoader:
        """Batches of a dataset of samples, as this model takes them."""
        return create_dataloader(dataset, **options)

    def parameters_without_encoder_decoder(self) -> list[nn.Parameter]:
        """What is to be trained: all parameters but those of the frozen autoencoders."""
        frozen = {id(parameter) for io in self.modalities for module in io.frozen for parameter in module.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in frozen]

    def muon_parameters(self) -> list[nn.Parameter]:
        """The hidden matrices, for the Muon optimizer; the rest goes to Adam."""
        return self.transformer.muon_parameters()

    # inside forward

    def _token_shape(self, modality: int, shape: Shape) -> Shape:
        return self.modalities[modality].token_shape(shape)

    def _all_logits(self, stream: TokenStream, clean: Latents, times: Any, times_fn: Any) -> Float[Tensor, "b n v"]:
        is_clean = times is None and times_fn is None
        t = self._times(stream, CLEAN if is_clean else times, times_fn).to(self.device)
        stream = stream.to(self.device)
        hidden = self.run(stream, clean if is_clean else x_t_of(add_noise(clean, stream, t)), t)
        return pad_sequence(list(self.logits(hidden.tokens).split(stream.lengths)), batch_first=True)

    def _drop_text(self, stream: TokenStream, probability: float) -> TokenStream:
        if probability == 0 or not len(stream.spans):
            return stream
        dropped = torch.rand(len(stream.lengths)) < probability
        return stream.drop_text(dropped, num_text=self.vocabulary.num_text, null=self.vocabulary.null)

    def _times(self, stream: TokenStream, times: Any, times_fn: Any) -> Float[Tensor, " m"]:
        """A time for every span: given, from the user's function of the number of modalities, or from the policy."""
        spans, num_samples = stream.spans, len(stream.lengths)
        if times is not None and times_fn is not None:
            raise ValueError("give times or num_modalities_to_times_fn, not both")
        if times_fn is not None and not callable(times_fn):
            raise TypeError(f"num_modalities_to_times_fn must be a function, got {type(times_fn).__name__}")
        if times is None and (times_fn is None or not len(spans)):
            return self.time_policy.draw(spans.is_context).to(self.precision)
        if times_fn is not None:
            times = times_fn(torch.bincount(spans.sample, minlength=num_samples).to(self.device))
        return times_of_spans(as_times(times), spans.sample, spans.index, num_samples).to(self.precision)

    def _text_error(self, hidden: Hidden, stream: TokenStream) -> ErrorSum:
        """Logits are made only where there is something to predict."""
        targets = (stream.label != stream.ignore_index).nonzero().flatten()
        return text_error(hidden.tokens[targets], self.to_logits, stream.label[targets])

    def _consistency_errors(
        self,
        velocities: Latents,
        flow: Mapping[int, FlowSample],
        teacher: Teacher | None,
        stream: TokenStream,
        t: Float[Tensor, " m"],
    ) -> dict[int, ErrorSum]:
        """A straight path has one velocity: ours should be the teacher's a little later (Consistency-FM, arXiv
        2407.02398).
        """
        if teacher is None or not flow:
            return {}
        later = t + teacher.ahead
        x_later = {modality: sample.x_t + teacher.ahead * sample.velocity for modality, sample in flow.items()}
        with evaluating(teacher.model):
            targets = teacher.model.velocities(teacher.model.run(stream, x_later, later), stream, x_later, later)
        errors = {}
        for modality, target in targets.items():
            if self.model_output_clean:  # the same clean latent, seen from where we stand: damping depends on the time
                times = latent_times(stream, modality, later)
                clean = estimate_clean(x_later[modality], target, times, damped=True)
                target = velocity_towards(clean, flow[modality].x_t, flow[modality].t)
            errors[modality] = squared_error(velocities[modality], target)
        return errors

    def _reconstruction_errors(
        self, velocities: Latents, flow: Mapping[int, FlowSample], stream: TokenStream
    ) -> dict[int, ErrorSum]:
        """What the clean estimate decodes to, against what the clean latent decodes to."""
        if self.loss_weights.recon == 0:
            return {}
        errors = {}
        for modality, sample in flow.items():
            estimate = estimate_clean(sample.x_t, velocities[modality], sample.t, damped=self.model_output_clean)
            io, shapes = self.modalities[modality], stream.spans.shapes_of(modality)
            target = io.decode(unflatten(estimate_clean(*sample), shapes))
            made = io.decode_with_gradient(unflatten(estimate, shapes))
            errors[modality] = squared_error(*(torch.cat([x.flatten() for x in each]) for each in (made, target)))
        return errors


def as_teacher(student: Transfusion, ema: Any, ahead: float) -> Teacher | None:
    """The averaged model inside an `EMA`, or a model as it is."""
    if ema is None:
        return None
    model = getattr(ema, "ema_model", ema)
    dims = [io.spec.dim_latent for io in student.modalities]
    if not isinstance(model, Transfusion) or [io.spec.dim_latent for io in model.modalities] != dims:
        raise TypeError(f"velocity_consistency_ema_model must be an EMA of this model, got {type(ema).__name__}")
    if not 0 < ahead < 1:
        raise ValueError(f"velocity_consistency_delta_time must lie between 0 and 1, got {ahead}")
    return Teacher(model, ahead)
