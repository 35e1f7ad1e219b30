"""The losses, and their sum.

k slots of one type, c channels, v vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


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


def text_loss(logits: Shaped[Tensor, "n v"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labels, zero where there is none."""
    return global_mean(F.cross_entropy(_precise(logits), labels, reduction="sum"), len(labels))


def squared_error(prediction: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean squared error over all elements."""
    error = F.mse_loss(_precise(prediction), _precise(target), reduction="sum")
    return global_mean(error, target.numel())


def combine(
    *,
    text: Float[Tensor, ""],
    flow: Float[Tensor, " modalities"],
    velocity: Float[Tensor, " modalities"],
    recon: Float[Tensor, " modalities"],
    weights: LossWeights,
) -> LossBreakdown:
    """Adds the weighted parts up."""
    total = (
        weights.text * text
        + (flow * flow.new_tensor(weights.flow)).sum()
        + weights.velocity * velocity.sum()
        + weights.recon * recon.sum()
    )
    return LossBreakdown(total, text, flow, velocity, recon)


def global_mean(total: Float[Tensor, ""], count: int) -> Float[Tensor, ""]:
    """A mean over the batches of all processes, scaled so that the averaging of gradients in DDP comes out right.

    Each process divides by the mean count instead of its own; otherwise a token in a short batch would weigh more.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        counts = torch.tensor(float(count), device=total.device)
        dist.all_reduce(counts)
        return total / (counts / dist.get_world_size()).clamp(min=1 / dist.get_world_size())
    return total / max(count, 1)


def _precise(x: Tensor) -> Tensor:
    """Losses are taken in at least float32, whatever autocast says."""
    return x if x.dtype == torch.float64 else x.float()
