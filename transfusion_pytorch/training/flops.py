"""Floating point operations of a training step, for the utilisation of the device (MFU)."""

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
    """Elements of the matrices that each of these is multiplied with."""

    token: int
    span: int
    latent: int
    target: int

    @classmethod
    def of(cls, model: nn.Module) -> "MultipliedWeights":
        """Linear layers alone: convolutions (of a U-Net) and frozen autoencoders are left out."""
        sums = dict.fromkeys(cls._fields, 0)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (kind := _multiplied_by(name)):
                sums[kind] += module.weight.numel()
        return cls(**sums)


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
        stream, tokens = batch.stream, batch.num_tokens
        latents = sum(len(placement.slots) for placement in stream.placements.values())
        counts = MultipliedWeights(tokens, len(stream.spans), latents, len(batch.targets.label))
        linear = 6 * sum(weight * count for weight, count in zip(self.weights, counts, strict=True))
        visible = int(stream.layout.end[:tokens].sum())  # stays on the CPU
        return Flops(linear, 12 * self.width * visible)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device, None where it is not known."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _multiplied_by(name: str) -> str | None:
    if name.startswith("modalities.") and {"positions", "encoder", "decoder"} & set(name.split(".")):
        return None  # positions are made once for each shape
    if name == "to_logits":
        return "target"
    if "to_modulation" in name or name.startswith("time_embedding"):
        return "span"
    return "latent" if name.startswith("modalities.") else "token"
