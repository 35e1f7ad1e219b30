"""Workloads of generation: text, pictures, and a mixture of both. See `jobs` for what both packages are told."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jobs import Job, Library, parts_of
from mixed import mixed_job

GUIDANCE = 3.0
INTERVALS = 16


def text_job(library: Library, quick: bool) -> Job:
    """A batch of 8, from 16 to 512 ids of 256, with a cache on both sides."""
    width = dict(dim=64, depth=2, heads=2, dim_head=32) if quick else dict(dim=512, depth=8, heads=8, dim_head=64)
    batch, start, end = (2, 4, 24) if quick else (8, 16, 512)
    model = library.build(num_text=256, transformer=width).eval()
    prompt = torch.randint(0, 256, (batch, start))
    made: dict[str, Any] = {}

    def run() -> None:
        with library.precision():
            made["ids"] = model.generate_text_only(prompt, end, cache_kv=True)

    def check() -> dict[str, Any]:
        ids = made["ids"]
        if tuple(ids.shape) != (batch, end - start) or int(ids.max()) >= 256:
            raise RuntimeError(f"expected {batch} x {end - start} ids of text, got {tuple(ids.shape)}")
        return {"work": batch * (end - start), "unit": "tokens"}

    return Job(model, run, check)


def draw_job(library: Library, quick: bool, *, batch: int) -> Job:
    """Pictures right after a few ids of text: 16 intervals of midpoint, guidance 3, and nothing after.

    One is drawn by `sample`, more by `sample_many`. `max_length` counts the whole sample here and what is generated
    there, where it also must be exceeded; both stop as soon as the picture stands.
    """
    shape = (4, 4) if quick else (14, 14)
    width = dict(dim=64, depth=2, heads=2, dim_head=32) if quick else dict(dim=256, depth=8, heads=4, dim_head=64)
    model = library.build(num_text=256, transformer=width, latents=(4,), shapes=(shape,)).eval()
    prompts = [torch.randint(0, 256, (4,)) for _ in range(batch)]
    latents, markers = shape[0] * shape[1], len(str(shape)) - 3 + 4  # sos, meta, "14,14", som, eom
    options = dict(
        max_length=4 + markers + latents if library.is_ours else latents - 1,
        modality_steps=library.steps(INTERVALS),
        cfg_scale=GUIDANCE,
        force_modality_at_start=(0, shape),
    )
    made: dict[str, Any] = {}
    note = ""
    if batch == 1:
        cached, note = faster_cache(partial(model.sample, prompts[0], **options), library)
        options |= dict(cache_kv=cached)

    def run() -> None:
        with library.precision():
            one = batch == 1
            made["samples"] = [model.sample(prompts[0], **options)] if one else model.sample_many(prompts, **options)

    def check() -> dict[str, Any]:
        for sample in made["samples"]:
            drawn = [part for part in parts_of(sample) if isinstance(part, tuple)]
            if [(kind, tuple(x.shape)) for kind, x in drawn] != [(0, (*shape, 4))]:
                raise RuntimeError(f"expected one picture of {shape}, got {[tuple(x.shape) for _, x in drawn]}")
            if not drawn[0][1].isfinite().all():
                raise RuntimeError("a picture is not finite")
        return {"work": batch, "unit": "images"}

    return Job(model, run, check, note)


def faster_cache(sample: Callable, library: Library) -> tuple[bool, str]:
    """`cache_kv` of the peer's `sample`, whose default is off: whichever is faster. Ours is on by default."""
    if library.is_ours:
        return True, ""
    seconds = {}
    for cached in (True, False, True, False):
        start = time.perf_counter()
        sample(cache_kv=cached)
        seconds[cached] = min(seconds.get(cached, float("inf")), time.perf_counter() - start)
    cached = seconds[True] <= seconds[False]
    return cached, f"cache_kv={cached} ({seconds[cached]:.2f} s, {seconds[not cached]:.2f} s otherwise)"


GENERATION: dict[str, Callable[[Library, bool], Job]] = {
    "text": text_job,
    "draw-1": partial(draw_job, batch=1),
    "draw-16": partial(draw_job, batch=16),
    "mixed-64": mixed_job,
}
