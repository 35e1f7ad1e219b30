"""What a batch is trained on: the errors of text, flow, consistency and reconstruction, and their means.

b samples, e errors of one kind, n tokens, m spans, k latents of one modality, c channels, d model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.flow.path import FlowSample, estimate_clean, velocity_towards
from transfusion_pytorch.modalities.latents import LatentsByType, latent_times, unflatten
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.checks import check_number, per_modality
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.training.cross_entropy import cross_entropy_per_target, summed_cross_entropy
from transfusion_pytorch.training.distributed import Processes, zero_gradients


class LossBreakdown(NamedTuple):
    """What the total is made of.

    `total = text_loss_weight * text + sum(flow_loss_weight * flow) + sum(velocity_consistency_loss_weight * velocity)
    + sum(reconstruction_loss_weight * recon)`. `text` is a scalar in nats per token; `flow`, `velocity` and `recon`
    have one entry for each modality, zero where a batch had none of it. With `reduction="none"` each has a row for
    every sample in front.
    """

    total: Float[Tensor, "*b"]
    text: Float[Tensor, "*b"]
    flow: Float[Tensor, "*b modalities"]
    velocity: Float[Tensor, "*b modalities"]
    recon: Float[Tensor, "*b modalities"]


class SpanLosses(NamedTuple):
    """The losses of a batch as finely as they go (`reduction="span"`).

    - `flow`: of every span, a mean over its latents; what is not learned scores zero
    - `modality`, `time`, `sample`: of every span
    - `text`: of every sample, a mean over its targets; zero where there are none
    - `names`, `sources`: of every sample
    """

    flow: Float[Tensor, " m"]
    modality: Int[Tensor, " m"]
    time: Float[Tensor, " m"]
    sample: Int[Tensor, " m"]
    text: Float[Tensor, " b"]
    names: tuple[str | None, ...]
    sources: tuple[str | None, ...]


class LossWeights(NamedTuple):
    """Of the parts of a `LossBreakdown`: `text`, and an entry for each modality of the others."""

    text: float
    flow: tuple[float, ...]
    velocity: tuple[float, ...]
    recon: tuple[float, ...]

    @classmethod
    def of(cls, num_modalities: int, *, text: Any, flow: Any, velocity: Any, recon: Any) -> "LossWeights":
        """The weights that `Transfusion` was given. Raises `TypeError` or `ValueError` unless they are numbers of at
        least 0, one or one for each modality.
        """
        given = dict(flow_loss_weight=flow, velocity_consistency_loss_weight=velocity, reconstruction_loss_weight=recon)
        each = [
            tuple(check_number(weight, name, least=0) for weight in per_modality(value, num_modalities, name))
            for name, value in given.items()
        ]
        return cls(check_number(text, "text_loss_weight", least=0), *each)


class Errors(NamedTuple):
    """Errors of one kind, each the sum of `size` numbers, with its weight and its sample."""

    error: Float[Tensor, " e"]
    weight: Float[Tensor, " e"]
    size: Float[Tensor, " e"] | int
    sample: Int[Tensor, " e"]


class ErrorSum(NamedTuple):
    """Weighted errors added up, and the weighted number of them: a mean that is yet to be taken, or one per sample."""

    total: Float[Tensor, "*b"]
    count: Float[Tensor, "*b"]

    @classmethod
    def of(cls, errors: Errors, num_samples: int | None = None) -> "ErrorSum":
        """Over all, or one for each of so many samples."""
        total, count = errors.error * errors.weight, errors.weight * errors.size
        if num_samples is None:
            return cls(total.sum(), count.sum())
        sums = [part.new_zeros(num_samples).index_add(0, errors.sample, part) for part in (total, count)]
        return cls(sums[0], sums[1])


def combine(
    *,
    text: ErrorSum,
    flow: Mapping[int, ErrorSum],
    velocity: Mapping[int, ErrorSum],
    recon: Mapping[int, ErrorSum],
    weights: LossWeights,
    counts: TargetCounts | None = None,
    processes: Processes | None = None,
) -> LossBreakdown:
    """Takes the means, zero where there is nothing, and adds the weighted ones up.

    Sums are divided by their own counts, or by `counts` where these are given. With `processes` the means are over the
    batches of all of them (see `Processes`).
    """
    modalities = range(len(weights.flow))
    nothing = ErrorSum(torch.zeros_like(text.total), torch.zeros_like(text.count))
    kinds = [[errors.get(modality, nothing) for modality in modalities] for errors in (flow, velocity, recon)]
    sums = [text, *kinds[0], *kinds[1], *kinds[2]]
    totals = torch.stack([each.total for each in sums], dim=-1)
    if counts is None:
        own = torch.stack([each.count for each in sums], dim=-1)
        means = divided(totals, own) if processes is None else processes.means(totals, own)
    else:
        if len(counts.latents) != len(weights.flow):
            raise ValueError(f"counts are of {len(counts.latents)} modalities, this model has {len(weights.flow)}")
        given = torch.cat((counts.text[None], counts.latents, counts.latents, counts.decoded)).to(totals)
        given = given.expand_as(totals)  # of one row, which all samples of `reduction="none"` share
        means = divided(totals, given) if processes is None else processes.means_over(totals, given, counts.processes)
    of_text, (of_flow, of_velocity, of_recon) = means[..., 0], means[..., 1:].unflatten(-1, (3, -1)).unbind(-2)
    total = weights.text * of_text
    for means_of, weights_of in ((of_flow, weights.flow), (of_velocity, weights.velocity), (of_recon, weights.recon)):
        total = total + sum(mean * weight for mean, weight in zip(means_of.unbind(-1), weights_of, strict=True))
    # copies: FSDP hooks into what a module returns, and views would lose that
    return LossBreakdown(total, *(part.clone() for part in (of_text, of_flow, of_velocity, of_recon)))


def divided(totals: Float[Tensor, "*b e"], counts: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
    """Means, zero where nothing was added up."""
    counts = counts.to(totals.dtype)
    return totals / torch.where(counts > 0, counts, 1)


REDUCTIONS = ("mean", "none", "span")


class Predictions(NamedTuple):
    """What the model made of a batch: outputs of the transformer, velocities, and what they should have been."""

    hidden: Shaped[Tensor, "n d"]
    velocities: LatentsByType
    flow: Mapping[int, FlowSample]
    t: Float[Tensor, " m"]


class Teacher(NamedTuple):
    """The EMA model of the consistency loss, and how much later on the path it is evaluated."""

    model: Any
    ahead: float


@dataclass(frozen=True)
class Objective:
    """All losses of a batch and their weighted sum; `of_clean` if the network predicts the clean latent."""

    weights: LossWeights
    of_clean: bool

    def __call__(
        self,
        model: Any,
        batch: Batch,
        predictions: Predictions,
        *,
        teacher: Teacher | None = None,
        counts: TargetCounts | None = None,
        reduction: str = "mean",
        processes: Processes | None = None,
    ) -> LossBreakdown | SpanLosses:
        """`reduction` and `counts` as in `Transfusion.forward`; means are over the batches of all `processes`."""
        _, velocities, flow, t = predictions
        errors = flow_errors(velocities, flow, batch, of_clean=self.of_clean)
        absent = [module for kind, io in enumerate(model.modalities) if kind not in batch.data for module in io.trained]
        times = (model.time_embedding, model.type_embedding)  # which norms may not read
        if reduction == "span":
            text = text_errors(predictions.hidden, batch, model.to_logits, per_sample=True)
            losses = span_losses(errors, batch, predictions, text=divided(text.total, text.count))
            zero = 0.0 if processes is None else zero_gradients([*absent, *times, model.to_logits])
            return losses._replace(flow=losses.flow + zero)
        rows = len(batch) if reduction == "none" else None
        consistency = consistency_errors(velocities, flow, batch, teacher, t, of_clean=self.of_clean)
        recon = {}
        if any(self.weights.recon):
            rebuilt = {kind: sample for kind, sample in flow.items() if self.weights.recon[kind]}
            recon = reconstruction_errors(velocities, rebuilt, batch, model.modalities, of_clean=self.of_clean)
        breakdown = combine(
            text=text_errors(predictions.hidden, batch, model.to_logits, per_sample=rows is not None),
            flow={modality: ErrorSum.of(each, rows) for modality, each in errors.items()},
            velocity={modality: ErrorSum.of(each, rows) for modality, each in consistency.items()},
            recon={modality: ErrorSum.of(each, rows) for modality, each in recon.items()},
            weights=self.weights,
            counts=counts,
            processes=processes if rows is None else None,
        )
        if processes is None:
            return breakdown
        return breakdown._replace(total=breakdown.total + zero_gradients([*absent, *times]))


def text_errors(hidden: Float[Tensor, "n d"], batch: Batch, to_logits: nn.Module, *, per_sample: bool) -> ErrorSum:
    """Cross-entropy of the ids to predict. Logits are made only where there is one."""
    targets = batch.targets
    x = hidden.index_select(0, targets.slot)
    if not per_sample:
        total = summed_cross_entropy(x, to_logits, targets.label, targets.weight)
        return ErrorSum(total, targets.weight.sum())
    errors = cross_entropy_per_target(x, to_logits, targets.label)
    return ErrorSum.of(Errors(errors, targets.weight, 1, targets.sample), len(batch))


def flow_errors(
    velocities: LatentsByType, flow: Mapping[int, FlowSample], batch: Batch, *, of_clean: bool
) -> dict[int, Errors]:
    """Squared errors of the velocities of each modality."""
    return {
        modality: latent_errors(velocities[modality], flow_target(sample, of_clean=of_clean), modality, batch)
        for modality, sample in flow.items()
    }


def consistency_errors(
    velocities: LatentsByType,
    flow: Mapping[int, FlowSample],
    batch: Batch,
    teacher: Teacher | None,
    t: Float[Tensor, " m"],
    *,
    of_clean: bool,
) -> dict[int, Errors]:
    """A straight path has one velocity: ours should be the teacher's a little later (Consistency-FM, arXiv
    2407.02398).
    """
    if teacher is None or not flow:
        return {}
    stream, later = batch.stream, torch.where(batch.is_learned, t + teacher.ahead, t)
    x_later = {
        modality: (sample.x_t + (latent_times(stream, modality, later) - sample.t)[:, None] * sample.velocity).detach()
        for modality, sample in flow.items()
    }
    with evaluating(teacher.model):
        targets = teacher.model.velocities(teacher.model.forward_stream(stream, x_later, later), stream, x_later, later)
    if of_clean:  # the same clean latent, seen from where we stand: damping depends on the time
        for modality, target in targets.items():
            times = latent_times(stream, modality, later)
            clean = estimate_clean(x_later[modality], target, times, damped=True)
            targets[modality] = velocity_towards(clean, flow[modality].x_t, flow[modality].t)
    return {kind: latent_errors(velocities[kind], target, kind, batch) for kind, target in targets.items()}


def reconstruction_errors(
    velocities: LatentsByType, flow: Mapping[int, FlowSample], batch: Batch, modalities: Any, *, of_clean: bool
) -> dict[int, Errors]:
    """What the clean estimate decodes to, against what the clean latent decodes to."""
    errors = {}
    for modality, sample in flow.items():
        placement, io = batch.stream.placements[modality], modalities[modality]
        estimate = estimate_clean(sample.x_t, velocities[modality], sample.t, damped=of_clean)
        target = io.decode(unflatten(estimate_clean(*sample).detach(), placement.shapes))
        made = io.decode_with_gradient(unflatten(estimate, placement.shapes))
        pairs = zip(made, target, strict=True)
        error = [squared_error(one.flatten()[None], other.flatten()[None]) for one, other in pairs]
        errors[modality] = Errors(
            torch.cat(error),
            batch.weight_of_spans(modality),
            batch.data[modality].decoded_size,
            batch.stream.spans.sample.index_select(0, placement.spans),
        )
    return errors


def latent_errors(prediction: Tensor, target: Tensor, modality: int, batch: Batch) -> Errors:
    """Squared errors of flat latents, each with the weight and the sample of its span."""
    of_latent = batch.stream.placements[modality].span_of_latent
    sample = batch.stream.spans.sample.index_select(0, of_latent)
    return Errors(squared_error(prediction, target), batch.latent_weight(modality), prediction.shape[-1], sample)


def squared_error(prediction: Shaped[Tensor, "k c"], target: Shaped[Tensor, "k c"]) -> Float[Tensor, " k"]:
    """Squared error of each row, in single precision at least. No gradient flows into the target."""
    prediction, exact = (x.to(precise(x.dtype)) for x in (prediction, target.detach()))
    return (prediction - exact).square().sum(dim=-1)


def flow_target(sample: FlowSample, *, of_clean: bool) -> Float[Tensor, "k c"]:
    """The velocity to predict; `of_clean` says that velocities are made from predictions of the clean latent."""
    if of_clean:  # damped as the prediction is, so that the perfect prediction scores zero
        return velocity_towards(estimate_clean(*sample), sample.x_t, sample.t)
    return sample.velocity


def span_losses(
    errors: Mapping[int, Errors], batch: Batch, predictions: Predictions, *, text: Float[Tensor, " b"]
) -> SpanLosses:
    """The flow loss of every span, a mean over its own latents, beside the `text` loss of every sample."""
    spans, t = batch.stream.spans, predictions.t
    flow = t.new_zeros(len(spans)) + predictions.hidden[:0].sum()  # with a gradient, if only of nothing
    for modality, each in errors.items():
        placement = batch.stream.placements[modality]
        means = each.error * (each.weight > 0) / each.size / _sizes_of_latents(placement.sizes, each.error)
        flow = flow.to(means.dtype).index_add(0, placement.span_of_latent, means)
    return SpanLosses(flow, spans.modality, t, spans.sample, text, batch.names, batch.sources)


def _sizes_of_latents(sizes: list[int], like: Tensor) -> Tensor:
    """For every latent, how many its span has: `[2 1] -> [2 2 1]`."""
    return torch.cat([like.new_full((size,), size) for size in sizes])


def as_teacher(student: Any, ema: Any, ahead: float) -> Teacher | None:
    """The averaged model inside an `EMA`, or a model as it is."""
    if ema is None:
        return None
    model = getattr(ema, "ema_model", ema)
    dims = [io.spec.dim_latent for io in student.modalities]
    if not isinstance(model, type(student)) or [io.spec.dim_latent for io in model.modalities] != dims:
        raise TypeError(f"velocity_consistency_ema_model must be an EMA of this model, got {type(ema).__name__}")
    if not 0 < check_number(ahead, "velocity_consistency_delta_time") < 1:
        raise ValueError(f"velocity_consistency_delta_time must lie between 0 and 1, got {ahead}")
    return Teacher(model, ahead)
