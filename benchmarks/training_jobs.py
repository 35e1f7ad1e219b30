"""Workloads of training: one step, which is forward, backward and Adam. See `jobs` for what both packages are told.

Adam is the fused one for both: it is the same code in either, and is not what is compared. Gradients are dropped after
every step, as training loops do. The batch is the same at every step; times and noise are drawn anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jobs import Job, Library
from torch import Tensor

CHANNELS = 16


@dataclass(frozen=True)
class Training:
    """What to train on what: `batch` makes the data, `latents` and `shapes` are those of the modalities."""

    batch: Callable[[], Any]
    width: dict[str, Any]
    num_text: int = 256
    latents: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()


def captioned(samples: int, side: int) -> list[list[Tensor]]:
    """One id of text and one picture each."""
    return [[torch.randint(0, 10, (1,)), torch.randn(side, side, 4)] for _ in range(samples)]


def ragged(samples: int) -> list[list[Tensor]]:
    """Four texts of 10 to 60 ids and, between them, three pictures from (4, 4) to (12, 12)."""
    size = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    batch = []
    for _ in range(samples):
        texts = [torch.randint(0, 256, (size(10, 60),)) for _ in range(4)]
        pictures = [torch.randn(size(4, 12), size(4, 12), CHANNELS) for _ in range(3)]
        batch.append(between(texts, pictures))
    return batch


def long(samples: int, length: int, pictures: int, side: int = 14) -> list[list[Tensor]]:
    """Samples of exactly `length` tokens, markers included, with so many pictures between texts of equal length."""
    words = length - 2 - pictures * (side * side + marker_tokens((side, side)))
    cuts = [words * i // (pictures + 1) for i in range(pictures + 2)]
    batch = []
    for _ in range(samples):
        texts = [torch.randint(0, 256, (end - start,)) for start, end in pairwise(cuts)]
        drawn = [torch.randn(side, side, CHANNELS) for _ in range(pictures)]
        batch.append(between(texts, drawn))
    return batch


def between(texts: list[Tensor], pictures: list[Tensor]) -> list[Tensor]:
    """Text, picture, text, picture, text: one text more than pictures."""
    return [part for pair in zip(texts[:-1], pictures, strict=True) for part in pair] + texts[-1:]


def text(samples: int, length: int, num_text: int = 256) -> Tensor:
    return torch.randint(0, num_text, (samples, length))


def marker_tokens(shape: tuple[int, ...]) -> int:
    """Of one modality: meta, its shape in characters, som, eom."""
    return 3 + len(",".join(map(str, shape)))


def num_tokens(batch: Any) -> int:
    """Tokens of a batch with its markers."""
    if isinstance(batch, Tensor):
        return batch.numel()
    shapes = [tuple(part.shape[:-1]) for sample in batch for part in sample if part.is_floating_point()]
    words = sum(part.numel() for sample in batch for part in sample if not part.is_floating_point())
    return words + 2 * len(batch) + sum(torch.Size(shape).numel() + marker_tokens(shape) for shape in shapes)


def widths(dim: int, depth: int, heads: int, dim_head: int = 64) -> dict[str, int]:
    return dict(dim=dim, depth=depth, heads=heads, dim_head=dim_head)


MNIST = dict(num_text=10, latents=(4,), shapes=((14, 14),))
RAGGED = dict(latents=(CHANNELS,), shapes=((12, 12),))
LONG = dict(latents=(CHANNELS,), shapes=((14, 14),))
LENGTHS = (1024, 2048, 4096, 8192)
SAMPLES = (1, 4, 16, 32)

TRAINING: dict[str, Training] = {
    "W1": Training(partial(captioned, 16, 14), widths(64, 4, 8, 32), **MNIST),
    "W2": Training(partial(captioned, 16, 14), widths(256, 8, 4), **MNIST),
    "W3": Training(partial(text, 4, 1024), widths(512, 8, 8)),
    "W4": Training(partial(ragged, 16), widths(256, 6, 4), **RAGGED),
    "W5": Training(partial(long, 2, 4096, 12), widths(256, 4, 4), **LONG),
    "W6": Training(partial(text, 4, 512, 50_000), widths(512, 4, 8), num_text=50_000),
}
TRAINING |= {f"length-{n}": Training(partial(long, 1, n, 3 * n // 1024), widths(256, 4, 4), **LONG) for n in LENGTHS}
TRAINING |= {f"samples-{n}": Training(partial(ragged, n), widths(256, 6, 4), **RAGGED) for n in SAMPLES}

TINY = widths(32, 2, 2, 16)
QUICK: dict[str, Training] = {
    "W1": Training(partial(captioned, 2, 4), TINY, **MNIST),
    "W2": Training(partial(captioned, 2, 4), TINY, **MNIST),
    "W3": Training(partial(text, 2, 32), TINY),
    "W4": Training(partial(ragged, 2), TINY, **RAGGED),
    "W5": Training(partial(long, 1, 256, 2, 6), TINY, **LONG),
    "W6": Training(partial(text, 2, 16, 500), TINY, num_text=500),
}
QUICK |= {f"length-{n}": Training(partial(long, 1, n // 8, 1, 4), TINY, **LONG) for n in LENGTHS}
QUICK |= {f"samples-{n}": Training(partial(ragged, min(n, 4)), TINY, **RAGGED) for n in SAMPLES}


def training_job(library: Library, workload: str, quick: bool) -> Job:
    """A step of training. bf16 means autocast around the forward pass, as is usual."""
    return job_of(library, (QUICK if quick else TRAINING)[workload])


def job_of(library: Library, training: Training) -> Job:
    batch = training.batch()  # before the model, which draws as many random numbers as it has weights
    model = library.build(
        num_text=training.num_text, transformer=training.width, latents=training.latents, shapes=training.shapes
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    losses: list[float] = []

    def run() -> None:
        with library.precision():
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    def check() -> dict[str, Any]:
        if not torch.tensor(losses).isfinite().all():
            raise RuntimeError(f"the loss is not finite: {losses}")
        return {"work": num_tokens(batch), "unit": "tokens", "loss": round(losses[0], 3)}

    return Job(model, run, check)
