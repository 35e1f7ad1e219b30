"""The losses, and their sum.

n slots, v vocabulary, e errors of different kinds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.flow.path import FlowSample, estimate_clean, velocity_towards
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.training.cross_entropy import summed_cross_entropy


class LossBreakdown(NamedTuple):
    """What the total is made of.

    `total = text_loss_weight * text + sum(flow_loss_weight * flow) + velocity_consistency_loss_weight * sum(velocity)
    + reconstruction_loss_weight * sum(recon)`. `text` is a scalar in nats per token; `flow`, `velocity` and `recon`
    have one entry for each modality, zero where a batch had none of it.
    """

    total: Float[Tensor, ""]
    text: Float[Tensor, ""]
    flow: Float[Tensor, " modalities"]
    velocity: Float[Tensor, " modalities"]
    recon: Float[Tensor, " modalities"]


class LossWeights(NamedTuple):
    text: float
    flow: Sequence[float]
    velocity: float
    recon: float


class ErrorSum(NamedTuple):
    """Errors added up, and how many of them: a mean that is yet to be taken."""

    total: Float[Tensor, ""]
    count: int


def text_error(x: Shaped[Tensor, "n d"], to_logits: nn.Module, labels: Int[Tensor, " n"]) -> ErrorSum:
    """Cross-entropy over the labels."""
    return ErrorSum(summed_cross_entropy(x, to_logits, labels), len(labels))


def squared_error(prediction: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]) -> ErrorSum:
    """Squared error over all elements."""
    prediction, exact = (x.to(precise(x.dtype)) for x in (prediction, target))
    return ErrorSum(F.mse_loss(prediction, exact, reduction="sum"), target.numel())


def flow_errors(
    velocities: Mapping[int, Tensor], flow: Mapping[int, FlowSample], *, of_clean: bool
) -> dict[int, ErrorSum]:
    """Errors of the velocities of each modality; `of_clean` says that they were made from predictions of the clean
    latent.
    """
    errors = {}
    for modality, sample in flow.items():
        target = sample.velocity
        if of_clean:  # damped as the prediction is, so that the perfect prediction scores zero
            target = velocity_towards(estimate_clean(*sample), sample.x_t, sample.t)
        errors[modality] = squared_error(velocities[modality], target)
    return errors


def combine(
    *,
    text: ErrorSum,
    flow: Mapping[int, ErrorSum],
    velocity: Mapping[int, ErrorSum],
    recon: Mapping[int, ErrorSum],
    weights: LossWeights,
) -> LossBreakdown:
    """Takes the means, of each modality that has errors and zero for the others, and adds the weighted ones up."""
    modalities = range(len(weights.flow))
    nothing = ErrorSum(text.total.new_zeros(()), 0)
    sums = [errors.get(modality, nothing) for errors in (flow, velocity, recon) for modality in modalities]
    means = global_means([text, *sums])
    of_text, (of_flow, of_velocity, of_recon) = means[0], means[1:].unflatten(0, (3, -1))
    total = (
        weights.text * of_text
        + (of_flow * of_flow.new_tensor(weights.flow)).sum()
        + weights.velocity * of_velocity.sum()
        + weights.recon * of_recon.sum()
    )
    return LossBreakdown(total, of_text, of_flow, of_velocity, of_recon)


def global_means(sums: Sequence[ErrorSum]) -> Float[Tensor, " e"]:
    """Means over the batches of all processes, scaled so that the averaging of gradients in DDP comes out right; zero
    where nothing was added up.

    Each process divides by the mean count instead of its own; otherwise a token in a short batch would weigh more.
    All counts travel together, also those of a modality that this process happens not to have. Where no gradient is
    wanted a process keeps to its own counts, so that one alone can evaluate.
    """
    totals = torch.stack([error.total for error in sums])
    counts = torch.tensor([error.count for error in sums], device=totals.device)
    processes = 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        processes = dist.get_world_size()
    return totals * processes / counts.clamp(min=1)
