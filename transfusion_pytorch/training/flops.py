"""Floating point operations of a training step, for the utilisation of the device (MFU)."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from transfusion_pytorch.network.experts import TEXT, expert_of
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
    """Elements of the matrices that each of these is multiplied with: `token` by those that all read, `expert` by those
    of one expert; `latents` by modality.
    """

    token: int
    span: int
    target: int
    latents: dict[int, int]
    expert: dict[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> "MultipliedWeights":
        """Linear layers alone: convolutions (of a U-Net) and frozen autoencoders are left out."""
        sums: Counter[tuple[str, int]] = Counter()
        for name, module in model.named_modules(remove_duplicate=False):
            replaced = "original_module" in name.split(".")  # by a copy that PEFT trains
            if isinstance(module, nn.Linear) and not replaced and (kind := _multiplied_by(name)) is not None:
                sums[kind] += module.weight.numel()
        latents, expert = ({i: sums[kind, i] for kind, i in sums if kind == one} for one in ("latents", "expert"))
        return cls(sums["token", 0], sums["span", 0], sums["target", 0], latents, expert)


class FlopCounter:
    """Counts the operations of training steps of a `Transfusion`. Nothing is read from the device.

    A weight multiplies and adds, forward, for the gradient of the input and for its own: 6 for each token (or span,
    latent, target). A visible key of a query is 2 products (q k and p v) of `dim_head` numbers forward and 4 backward,
    2 operations each: 12 for each head and layer.

    >>> FlopCounter(model)(batch).total / seconds / peak_flops("cuda")  # MFU
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = MultipliedWeights.of(model)
        names = [name for name, module in model.named_modules() if isinstance(module, Attention)]
        layers = [model.get_submodule(name) for name in names if _expert_in(name) in (None, 0)]
        self.width = sum(int(layer.heads * layer.dim_head) for layer in layers)  # type: ignore[operator] - of all together

    def __call__(self, batch: Batch) -> Flops:
        stream, weights, tokens = batch.stream, self.weights, batch.num_tokens
        products = weights.token * tokens + weights.span * len(stream.spans) + weights.target * len(batch.targets.label)
        num_experts, counts = max(len(weights.expert), 2), Counter({TEXT: tokens})
        for kind, placement in stream.placements.items():
            products += weights.latents.get(kind, 0) * len(placement.slots)
            counts[TEXT] -= len(placement.slots)
            counts[expert_of(kind, num_experts)] += len(placement.slots)
        products += sum(weights.expert.get(expert, 0) * count for expert, count in counts.items())
        visible = int(stream.layout.end[:tokens].sum())  # stays on the CPU
        return Flops(6 * products, 12 * self.width * visible)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device, None where it is not known."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _multiplied_by(name: str) -> tuple[str, int] | None:
    """A field of `MultipliedWeights`, and the modality or expert: for the linear layer `modalities.0.adapter.to_model`
    ("latents", 0).
    """
    parts = name.split(".")
    if parts[0] == "modalities":
        if "timing" in parts:
            return "span", 0
        is_extra = {"positions", "encoder", "decoder"} & set(parts)  # positions are made once for each shape
        return None if is_extra else ("latents", int(parts[1]))
    if parts[0] == "to_logits":
        return "target", 0
    expert = _expert_in(name)
    if "to_modulation" in parts or parts[0] == "time_embedding":
        return None if expert == TEXT else ("span", 0)  # text has none, where it shares its norms
    return ("token", 0) if expert is None else ("expert", expert)


def _expert_in(name: str) -> int | None:
    """The expert that a module belongs to, by its name `transformer.layers.0.experts.1.attn`."""
    parts = name.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else None
