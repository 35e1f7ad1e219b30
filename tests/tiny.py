"""Models as small as they can be, batches for them, and their layout worked out by hand."""

from math import prod

import torch
from torch import Tensor, nn, tensor

from transfusion_pytorch import Transfusion

NUM_TEXT = 10
CHANNELS = (3, 2)  # of modality 0, which has axes, and of modality 1


def tiny(*, trunk: dict | None = None, **options) -> Transfusion:
    """Two modalities, two layers, sixteen channels."""
    transformer = dict(dim=16, depth=2, heads=2, dim_head=8) | (trunk or {})
    return Transfusion(**(dict(num_text_tokens=NUM_TEXT, dim_latent=CHANNELS, transformer=transformer) | options))


def awake(model: Transfusion, scale: float = 0.2) -> Transfusion:
    """In float64 and evaluation mode, and with nothing at zero any more, so that everything has an effect."""
    generator = torch.Generator().manual_seed(1)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def ragged_batch() -> list[list]:
    """Modalities of 0 to 3 axes between texts, one after another, at the start and at the end; and text alone."""
    torch.manual_seed(2)
    return [
        [tensor([1, 2, 3]), torch.randn(2, 2, 3), tensor([4]), (1, torch.randn(3, 2)), tensor([5, 6])],
        [torch.randn(4, 3), (1, torch.randn(2)), tensor([7, 8])],
        [tensor([9, 0, 1, 2])],
        [tensor(3), (1, torch.randn(1, 2, 2, 2)), (0, torch.randn(2, 3, 3))],
    ]


def noise_of(latents: Tensor, *args, **options) -> Tensor:
    """Stands in for `torch.randn_like`: noise that an instance keeps wherever it stands in a batch."""
    return torch.cos(7 * latents)


def layout(model: Transfusion, sample: list) -> list[int | None]:
    """The ids of a marked sample one by one, None for a latent (without a U-Net)."""
    ids: list[int | None] = [model.sos_id]
    for part in sample:
        modality, value = part if isinstance(part, tuple) else (0, part)
        if not value.is_floating_point():
            ids += value.reshape(-1).tolist()
            continue
        shape = value.shape[:-1]
        chars = model.char_tokenizer(",".join(map(str, shape))).tolist()
        ids += [model.meta_id, *chars, model.som_ids[modality]]
        ids += [None] * prod(shape)
        ids += [model.eom_ids[modality]]
    return [*ids, model.eos_id]


def targets(ids: list[int | None], taken: frozenset[int] | set[int] = frozenset()) -> dict[int, int]:
    """What each slot has to predict: an id that directly follows another, unless one of them was `taken` away."""
    return {
        slot: ids[slot + 1]
        for slot in range(len(ids) - 1)
        if None not in (ids[slot], ids[slot + 1]) and not {slot, slot + 1} & taken
    }


def latents_of(batch: list[list], modality: int) -> Tensor:
    """All latents of a type in the order of the batch, flat."""
    typed = [part if isinstance(part, tuple) else (0, part) for sample in batch for part in sample]
    return torch.cat(
        [value.reshape(-1, value.shape[-1]) for kind, value in typed if value.is_floating_point() and kind == modality]
    )


class Spy:
    """Remembers what a module is called with."""

    def __init__(self, module: nn.Module):
        self.inputs: list[Tensor] = []
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.inputs.append(args[0])
