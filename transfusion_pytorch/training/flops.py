"""Floating point operations of a training step, for the utilisation of the device (MFU)."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from transfusion_pytorch.network.layer import Attention
from transfusion_pytorch.sequence.batch import Batch

# Dense bf16 FLOP/s without sparsity, from the vendor's data sheets. The first name that is part of the device's counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Flops(NamedTuple):
    """Forward and backward, without padding and without what is computed twice (checkpointed activations)."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


class MultipliedWeights(NamedTuple):
    """Elements of the matrices that each of these is multiplied with; `latents` by modality."""

    token: int
    span: int
    target: int
    latents: dict[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> "MultipliedWeights":
        """Linear layers alone: convolutions (of a U-Net) and frozen autoencoders are left out."""
        sums: Counter[str | int] = Counter()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (kind := _multiplied_by(name)) is not None:
                sums[kind] += module.weight.numel()
        latents = {kind: number for kind, number in sums.items() if isinstance(kind, int)}
        return cls(sums["token"], sums["span"], sums["target"], latents)


class FlopCounter:
    """Counts the operations of training steps of a `Transfusion`. Nothing is read from the device.

    A weight multiplies and adds, forward, for the gradient of the input and for its own: 6 for each token (or span,
    latent, target). A visible key of a query is 2 products (q k and p v) of `dim_head` numbers forward and 4 backward,
    2 operations each: 12 for each head and layer.

    >>> FlopCounter(model)(batch).total / seconds / peak_flops("cuda")  # MFU
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = MultipliedWeights.of(model)
        layers = (module for module in model.modules() if isinstance(module, Attention))
        self.width = sum(layer.heads * layer.dim_head for layer in layers)  # of all layers together

    def __call__(self, batch: Batch) -> Flops:
        stream, weights, tokens = batch.stream, self.weights, batch.num_tokens
        products = weights.token * tokens + weights.span * len(stream.spans) + weights.target * len(batch.targets.label)
        for kind, placement in stream.placements.items():
            products += weights.latents.get(kind, 0) * len(placement.slots)
        visible = int(stream.layout.end[:tokens].sum())  # stays on the CPU
        return Flops(6 * products, 12 * self.width * visible)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device, None where it is not known."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _multiplied_by(name: str) -> str | int | None:
    """A field of `MultipliedWeights`, or a modality, for the linear layer `modalities.0.adapter.to_model`."""
    parts = name.split(".")
    if parts[0] == "modalities":
        is_extra = {"positions", "encoder", "decoder"} & set(parts)  # positions are made once for each shape
        return None if is_extra else int(parts[1])
    if parts[0] == "to_logits":
        return "target"
    return "span" if "to_modulation" in parts or parts[0] == "time_embedding" else "token"
