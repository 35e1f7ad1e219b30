"""Resident memory over 1,000 small requests to one engine."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jobs import Library

AT_ONCE = 4


def leak(package: str, *, quick: bool) -> dict[str, Any]:
    """MiB after every 100 requests: four prompts each time, of other lengths, with a picture in one of them."""
    library = Library(package)
    requests = 40 if quick else 1000
    model = library.build(
        num_text=64, transformer=dict(dim=64, depth=2, heads=2, dim_head=32), latents=(4,), shapes=((4, 4),)
    ).eval()
    sample_many, through = sampler(model)
    resident = []
    for i in range(requests // AT_ONCE):
        prompts: list[Any] = [torch.randint(0, 64, (1 + (i + j) % 13,)) for j in range(AT_ONCE - 1)]
        prompts.append([torch.randint(0, 64, (3,)), torch.randn(2 + i % 3, 2 + i % 2, 4)])
        sample_many(prompts, max_length=48, modality_steps=library.steps(2))
        if ((i + 1) * AT_ONCE) % (requests // 10) == 0:
            gc.collect()
            resident.append(resident_mib())
    return {"requests": requests, "resident": resident, "through": through}


def sampler(model: Any) -> tuple[Callable, str]:
    """One engine for all requests, where the model has one to give."""
    if hasattr(model, "create_engine"):
        return model.create_engine(max_batch=AT_ONCE).sample_many, "one engine"
    return model.sample_many, "sample_many of one model"


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def leak_lines(study: dict[str, Any]) -> list[str]:
    first, last = study["resident"][0], study["resident"][-1]
    return [
        f"{study['requests']:,} requests, {AT_ONCE} at once, through {study['through']}: {first:.1f} MiB resident "
        f"after a tenth of them, {last:.1f} MiB at the end ({last - first:+.1f}).",
        "",
        "MiB after every tenth: " + ", ".join(f"{mib:.1f}" for mib in study["resident"]),
    ]
