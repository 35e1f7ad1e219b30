"""`Transfusion`: one module for autoregressive text and flow matching.

b samples, n tokens of the packed stream, m spans (instances of a modality), d model, v vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from transfusion_pytorch.batching import BatchingMethods
from transfusion_pytorch.conversations.chat import ChatMethods
from transfusion_pytorch.flow.solver import check_method
from transfusion_pytorch.flow.times import CLEAN, TimePolicy
from transfusion_pytorch.forwarding import StreamMethods, StreamOutput
from transfusion_pytorch.modalities import preparation
from transfusion_pytorch.modalities.build import build_modalities, count_modalities
from transfusion_pytorch.modalities.io import ModalityInfo
from transfusion_pytorch.modalities.latents import LatentsByType, add_noise, latents_by_type, x_t_of
from transfusion_pytorch.modalities.statistics import StatisticsMethods, names_of_statistics
from transfusion_pytorch.modalities.timing import TimeConditioning
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import TimeEmbedding
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.network.transformer import Transformer, as_trunk, check_trunk
from transfusion_pytorch.network.vocabulary_layers import TextEmbedding, TextLogits, TiedLogits
from transfusion_pytorch.pretrained.methods import LanguageModelMethods
from transfusion_pytorch.sampling import SamplingMethods
from transfusion_pytorch.saving.methods import SavingMethods
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.checks import check_bool, check_int, check_probability, check_type
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.samples import Piece, Shape, is_int
from transfusion_pytorch.sequence.stream import Past, TokenStream, pack
from transfusion_pytorch.sequence.vocabulary import MarkerIds, Vocabulary
from transfusion_pytorch.training.distributed import Processes, training_processes
from transfusion_pytorch.training.losses import (
    REDUCTIONS,
    LossBreakdown,
    LossWeights,
    Objective,
    Predictions,
    SpanLosses,
    as_teacher,
)
from transfusion_pytorch.training.methods import TrainingMethods

RunNetwork = Callable[[Batch, LatentsByType, Tensor, torch.Generator | None], StreamOutput]


class Transfusion(
    BatchingMethods,
    TrainingMethods,
    SamplingMethods,
    SavingMethods,
    StatisticsMethods,
    LanguageModelMethods,
    ChatMethods,
    StreamMethods,
    MarkerIds,
    nn.Module,
):
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
    - `text_loss_weight`, and of each modality `flow_loss_weight`, `velocity_consistency_loss_weight` and
      `reconstruction_loss_weight`; a modality whose last is 0 is not decoded in training
    - `model_output_clean`: the network predicts the clean latent instead of the velocity (arXiv 2511.13720)
    - `odeint_kwargs`: `method`, tolerances and options of `torchdiffeq.odeint`
    - `prob_uncond`: probability that the text before a sample's modalities is replaced by the null token in training,
      for classifier-free guidance
    - `time_policy`: how training draws times
    - `ignore_index`: the label of what is not predicted
    - `time_conditioning`: how spans are told their time: by the `"norms"` of the transformer, `"added"` to their
      tokens, by a time `"token"`, or at the `"output"` (see `modalities.timing.Timing`)
    - `eos_id`: the id that ends the text of a language model. Text is then as its tokenizer makes it: sos is written
      only where a sample does not begin with text, and eos where its text does not end with it. Its rows in the
      embedding stand apart from those of the markers. See `from_pretrained_lm`.
    - `tie_embeddings`: logits have the weights of the embedding
    - `freeze_text`: what reads text is not trained; see `freeze_text()`, which needs `untied=True` of the transformer
    """

    def __init__(
        self,
        *,
        num_text_tokens: Integral | int,
        transformer: Any,
        dim_latent: Integral | int | Sequence[Any] | None = None,
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
        velocity_consistency_loss_weight: float | Sequence[float] = 0.1,
        reconstruction_loss_weight: float | Sequence[float] = 0.0,
        model_output_clean: bool = False,
        odeint_kwargs: Mapping[str, Any] | None = None,
        prob_uncond: float = 0.1,
        time_policy: TimePolicy | None = None,
        ignore_index: int = -1,
        time_conditioning: TimeConditioning = "norms",
        eos_id: int | None = None,
        tie_embeddings: bool = False,
        freeze_text: bool = False,
    ):
        super().__init__()
        num_text_tokens = check_int(num_text_tokens, "num_text_tokens", least=0)
        check_probability(prob_uncond, "prob_uncond")
        if not is_int(ignore_index):
            raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative, all others are ids, got {ignore_index}")
        if time_policy is not None and not isinstance(time_policy, TimePolicy):
            raise TypeError(f"time_policy must be a TimePolicy, got {time_policy!r}")
        check_bool(fallback_to_default_shape_if_invalid, "fallback_to_default_shape_if_invalid")
        for name, value in (
            ("model_output_clean", model_output_clean),
            ("tie_embeddings", tie_embeddings),
            ("freeze_text", freeze_text),
        ):
            check_bool(value, name)
        if tie_embeddings and not num_text_tokens:
            raise ValueError("tie_embeddings needs text, but num_text_tokens is 0")
        if eos_id is not None and not is_int(eos_id):
            raise TypeError(f"eos_id must be an int, got {type(eos_id).__name__}")
        if eos_id is not None and not 0 <= eos_id < num_text_tokens:
            raise ValueError(f"eos_id must be an id of text, 0 to {num_text_tokens - 1}, got {eos_id}")
        self.transformer: Transformer = as_trunk(transformer, num_modalities=count_modalities(dim_latent))
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
            time_conditioning=time_conditioning,
        )
        check_trunk(self.transformer, len(self.modalities), time_conditioning)
        self.vocabulary = Vocabulary(num_text_tokens, len(self.modalities), eos_id)
        self.time_conditioning, self.tie_embeddings = time_conditioning, tie_embeddings
        self._build_text_layers()
        self.time_embedding = TimeEmbedding(dim)
        self.type_embedding = nn.Embedding(len(self.modalities), dim)
        self._reset_embeddings()

        self.objective = Objective(
            LossWeights.of(
                len(self.modalities),
                text=text_loss_weight,
                flow=flow_loss_weight,
                velocity=velocity_consistency_loss_weight,
                recon=reconstruction_loss_weight,
            ),
            of_clean=model_output_clean,
        )
        odeint_kwargs = odeint_kwargs or dict(atol=1e-5, rtol=1e-5, method="midpoint")
        check_method(odeint_kwargs)
        self.odeint_kwargs = dict(odeint_kwargs)
        self.fallback_to_default_shape_if_invalid = fallback_to_default_shape_if_invalid
        self.model_output_clean = model_output_clean
        self.prob_uncond = prob_uncond
        self.time_policy = time_policy or TimePolicy()
        self.ignore_index = ignore_index
        self.process_group: Any = None  # of data parallelism, where it is neither DDP's own nor the default one
        self._ddp_params_and_buffers_to_ignore = names_of_statistics(len(self.modalities))
        self._live_shapes = self._shape_finders(is_live=True)
        if freeze_text:
            self.freeze_text()

    def _build_text_layers(self) -> None:
        """The embedding of ids, and the layer that makes logits; text has tables of its own where it may be frozen."""
        vocabulary, dim = self.vocabulary, self.dim
        has_tables = not vocabulary.is_framed or self.tie_embeddings or getattr(self.transformer, "untied", ())
        if not has_tables or not vocabulary.num_text:
            self.text_embedding: Any = nn.Embedding(vocabulary.size, dim)
            self.to_logits: Any = Linear(dim, vocabulary.num_logits, bias=False)
            return
        num_text, num_markers = vocabulary.num_text, vocabulary.num_logits - vocabulary.num_text
        self.text_embedding = TextEmbedding(num_text, num_markers + 1, dim)
        if self.tie_embeddings:
            self.to_logits = TiedLogits(self.text_embedding, num_markers)
        else:
            self.to_logits = TextLogits(num_text, num_markers, dim)

    def forward(
        self,
        samples: Any,
        times: Any = None,
        *,
        num_modalities_to_times_fn: Any = None,
        modality_type: Any = None,
        labels: Any = None,
        sample_weights: Any = None,
        counts: TargetCounts | None = None,
        reduction: str = "mean",
        noise: Any = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        return_breakdown: bool = False,
        velocity_consistency_ema_model: Any = None,
        velocity_consistency_delta_time: float = 1e-3,
        prob_uncond: float | None = None,
        run_network: RunNetwork | None = None,
    ) -> Tensor | tuple[Tensor, LossBreakdown] | LossBreakdown | SpanLosses:
        """The loss of a batch, or its logits.

        `samples` is one of:

        - a list of samples, each a list of integer tensors (text), float tensors (modality 0), `(type, tensor)`,
          `Latents`, `Condition`s and what is `WithCleanCopy`, or a `Sample` of such a list
        - ids `(b, n)` for text alone, or floats `(b, ...)` for `modality_type` alone. `ignore_index` at the end of a
          row of ids is padding: neither read nor learned
        - a `Batch` that `packer()` made of any of these

        Targets and their weights:

        - `labels` `(b, n)` replace the ids of a batch `(b, n)` as targets. They are shifted inside: `labels[:, i]` is
          predicted from `ids[:, :i]`. `ignore_index` and -100 mean no target.
        - `sample_weights` `(b,)`: losses are divided by the weighted counts
        - `counts`: what the sums are divided by instead of the batch's own, for gradient accumulation; see
          `count_targets`
        - `reduction`: `"mean"`; `"none"` for a `LossBreakdown` with a row for each sample, divided by its own counts:
          its weight cancels unless it is 0; `"span"` for the flow loss of each span (`SpanLosses`)

        Times and noise:

        - `times` of the modalities: a scalar, `(b,)` or `(b, m)`; else `num_modalities_to_times_fn` takes the number of
          modalities of each sample `(b,)` and gives `(b, m)`; else the time policy draws them. Modalities whose
          `times` you set to 1 are read and have no loss.
        - `noise`: `(k, c)` for the flat latents of a modality, in a dict if there are several; those of noised copies
          stand behind all others
        - `generator`: draws everything random, so that two evaluations with equal generators are equal
        - `velocity_consistency_ema_model` (from `create_ema`): adds the velocity consistency loss against this model at
          `t + velocity_consistency_delta_time`; times below 1 are at most 1 minus that
        - `prob_uncond` replaces the model's, or that of the packer
        - `run_network`: called instead of `forward_stream`, with the settled batch, `x_t` by modality, the times of the
          spans and the generator, for objectives that look inside the network (`SelfMaskedRepTraining`)

        Returns the total loss; with `return_breakdown` also its parts. Without `return_loss`, returns the logits `(b,
        n, vocabulary)` of every slot, markers included, zero behind the end of shorter samples; modalities are then
        clean unless `times` are given. Nothing is read back from the device. Raises `ValueError` or `TypeError` that
        says what is wrong where, before anything is computed.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        check_probability(self.prob_uncond if prob_uncond is None else prob_uncond, "prob_uncond")
        teacher = as_teacher(self, velocity_consistency_ema_model, velocity_consistency_delta_time)
        check_options(counts, generator)
        times_fn = num_modalities_to_times_fn
        packing = dict(modality_type=modality_type, labels=labels, sample_weights=sample_weights, generator=generator)
        batch = self._as_batch(samples, return_loss, **packing)
        if not return_loss:
            return self._all_logits(batch, self._times_of_spans(batch, times, times_fn), noise, generator)
        batch = self._settled(batch, times, times_fn, prob_uncond)
        latest = CLEAN if teacher is None else CLEAN - teacher.ahead
        predictions = self._predict(batch, noise, generator, latest=latest, run_network=run_network)
        losses = self.objective(
            self, batch, predictions, teacher=teacher, counts=counts, reduction=reduction, processes=self._processes()
        )
        if reduction != "mean":
            return losses
        return (losses.total, losses) if return_breakdown else losses.total

    # what forward, and sampling, are made of; the network itself is in `StreamMethods`

    def encode(self, samples: Sequence[Sequence[Piece]], name: str = "sample") -> list[list[Piece]]:
        """Replaces raw data by channel-last latents, on this model's device."""
        return preparation.encode(samples, self.modalities, device=self.device, dtype=self.precision, name=name)

    def decode(self, samples: Sequence[Sequence[Piece]], *, raw: bool = False) -> list[list[Any]]:
        """Samples as users see them: modalities decoded (or their latents, if `raw`), channels where the user has
        them.
        """
        return preparation.decode(samples, self.modalities, device=self.device, raw=raw)

    def pack_stream(self, samples: Sequence[Sequence[Piece]], past: Sequence[Past] | None = None) -> TokenStream:
        """Lays out encoded samples as one stream, on the CPU."""
        return pack(samples, past=past, ignore_index=self.ignore_index, token_shape=self._token_shape)

    def latents_by_type(self, samples: Sequence[Sequence[Piece]]) -> LatentsByType:
        return latents_by_type(samples)

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
        return precise(self.dtype)

    @property
    def loss_weights(self) -> LossWeights:
        return self.objective.weights

    @property
    def num_modalities(self) -> int:
        return len(self.modalities)

    def get_modality_info(self, modality_type: int | None = None) -> ModalityInfo:
        """What one modality looks like; `modality_type` may be left out if there is only one."""
        modality_type = 0 if modality_type is None and self.num_modalities == 1 else modality_type
        if modality_type is None:
            raise ValueError(f"unknown modality type None, this model has {self.num_modalities} (from 0)")
        return self.modalities[check_type(modality_type, self.num_modalities, "modality_type")].info(self.vocabulary)

    def get_all_modality_info(self) -> list[ModalityInfo]:
        """What each modality looks like, by its type."""
        return [io.info(self.vocabulary) for io in self.modalities]

    def _reset_embeddings(self) -> None:
        for embedding in self.text_embedding.modules():
            if isinstance(embedding, nn.Embedding):
                nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.type_embedding.weight)

    # inside forward

    def _token_shape(self, modality: int, shape: Shape) -> Shape:
        return self.modalities[modality].token_shape(shape)

    def _predict(
        self,
        batch: Batch,
        noise: Any,
        generator: torch.Generator | None,
        *,
        latest: float,
        run_network: RunNetwork | None = None,
    ) -> Predictions:
        """Noises every latent at its time, which is drawn if need be, and predicts the velocities."""
        if self.training and batch.has_times and noise is not None:
            torch.rand((), generator=generator)  # nothing else moves it, and the next batch is to drop other text
        t = self._draw_times(batch, latest, generator)
        noise = batch.noise if noise is None else noise
        flow = add_noise(self._latents(batch, generator), batch.stream, t, noise=noise, generator=generator)
        if run_network is None:
            output = self.forward_stream(batch.stream, x_t_of(flow), t)
        else:
            output = run_network(batch, x_t_of(flow), t, generator)
        velocities = self.velocities(output, batch.stream, x_t_of(flow), t)
        return Predictions(output.hidden, velocities, flow, t)

    def _draw_times(self, batch: Batch, latest: float, generator: torch.Generator | None) -> Float[Tensor, " m"]:
        """The time of every span: settled already, or from the policy. Learned spans stand at `latest` at most."""
        t, is_captioned = batch.times.to(self.precision), batch.stream.spans.is_captioned
        if batch.has_times or not len(t):
            drawn = t
        elif batch.time_number is not None:
            drawn = self.time_policy.times(batch.time_number, is_captioned)
        else:
            drawn = self.time_policy.draw(is_captioned, generator=generator)
        t = torch.where(t.isnan(), drawn.to(t), t)
        return t if latest == CLEAN else torch.where(batch.is_learned, t.clamp(max=latest), t)

    def _latents(self, batch: Batch, generator: torch.Generator | None = None) -> LatentsByType:
        """Clean latents by type; what is raw goes through its encoder."""
        return {
            kind: self.modalities[kind].latents(data, batch.stream.placements[kind], self.precision, generator)
            for kind, data in batch.data.items()
        }

    def _all_logits(
        self, batch: Batch, times: Any, noise: Any, generator: torch.Generator | None
    ) -> Float[Tensor, "b n v"]:
        batch = batch if times is None else batch.with_times(times)
        t, x_t = batch.times.to(self.precision), self._latents(batch, generator)
        t = torch.where(t.isnan(), CLEAN, t)
        if batch.has_times:
            x_t = x_t_of(add_noise(x_t, batch.stream, t, noise=noise, generator=generator))
        logits = self.logits(self.forward_stream(batch.stream, x_t, t).hidden)
        rows = logits[: sum(batch.stream.lengths)].split(batch.stream.lengths)
        return pad_sequence(list(rows), batch_first=True)

    def _processes(self) -> Processes | None:
        """The processes to share means with: in training only, so that one alone may evaluate."""
        return training_processes(self.process_group) if self.training else None


def check_options(counts: Any, generator: Any) -> None:
    for name, value, kind in (("counts", counts, TargetCounts), ("generator", generator, torch.Generator)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
