"""The losses: means of the errors of every kind over their targets.

b samples, e errors of one kind.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.training.distributed import Processes


class LossBreakdown(NamedTuple):
    """What the total is made of.

    `total = text_loss_weight * text + sum(flow_loss_weight * flow) + velocity_consistency_loss_weight * sum(velocity)
    + reconstruction_loss_weight * sum(recon)`. `text` is a scalar in nats per token; `flow`, `velocity` and `recon`
    have one entry for each modality, zero where a batch had none of it. With `reduction="none"` each has a row for
    every sample in front.
    """

    total: Float[Tensor, "*b"]
    text: Float[Tensor, "*b"]
    flow: Float[Tensor, "*b modalities"]
    velocity: Float[Tensor, "*b modalities"]
    recon: Float[Tensor, "*b modalities"]


class SpanLosses(NamedTuple):
    """The flow loss of every span, a mean over its latents, and what it belongs to (`reduction="span"`).

    What is not learned scores zero; `names` and `sources` are those of its sample.
    """

    flow: Float[Tensor, " m"]
    modality: Int[Tensor, " m"]
    time: Float[Tensor, " m"]
    sample: Int[Tensor, " m"]
    names: tuple[str | None, ...]
    sources: tuple[str | None, ...]


class LossWeights(NamedTuple):
    text: float
    flow: Sequence[float]
    velocity: float
    recon: float


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
        means = divided(totals, given) if processes is None else processes.means_over(totals, given, counts.processes)
    of_text, (of_flow, of_velocity, of_recon) = means[..., 0], means[..., 1:].unflatten(-1, (3, -1)).unbind(-2)
    weighted = [each * weight for each, weight in zip(of_flow.unbind(-1), weights.flow, strict=True)]
    total = (
        weights.text * of_text
        + sum(weighted)
        + weights.velocity * of_velocity.sum(dim=-1)
        + weights.recon * of_recon.sum(dim=-1)
    )
    return LossBreakdown(total, of_text, of_flow, of_velocity, of_recon)


def divided(totals: Float[Tensor, "*b e"], counts: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
    """Means, zero where nothing was added up."""
    counts = counts.to(totals.dtype)
    return totals / torch.where(counts > 0, counts, 1)
