"""Parts 4 and 6 of the GPU benchmark: throughput of training steps, and where the time goes."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpu_device import (
    NOT_COMPILED,
    Run,
    autocast,
    build_model,
    compile_model,
    intervals,
    mark,
    num_parameters,
    release,
    synchronize,
)
from gpu_workloads import Size, causal_twin, mixed_samples, text_of
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from transfusion_pytorch.training.flops import FlopCounter, Flops, peak_flops

WARMUPS, STEPS = 3, 12
Step = Callable[[Any], torch.Tensor]
# triton_tem_: templates of inductor, which are flex attention alone unless matrix products are autotuned
ATTENTION_KERNELS = ("flex_attention", "triton_tem_", "flash", "fmha", "scaled_dot_product", "packedattention")
KINDS = ("mixed", "causal", "text")


class Measured(NamedTuple):
    """Steps of training. `first` are the seconds of the first one, compilation included; `new_graphs` counts those
    compiled after the warm-up, and `cached` those that the caches of inductor had.
    """

    milliseconds: list[float]
    first: float
    graphs: int
    new_graphs: int
    cached: int
    peak_gib: float | None
    loss: float

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def training_step(model: nn.Module, device: torch.device) -> Step:
    """One step from a batch in pinned memory: upload, forward in bf16 autocast, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Any) -> torch.Tensor:
        with autocast(device, torch.bfloat16):
            loss = model(batch.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(step: Step, batches: Sequence[Any], device: torch.device, warmups: int) -> Measured:
    """Each batch once; the first ones are not timed."""
    graphs = lambda: counters["stats"]["unique_graphs"]  # noqa: E731
    cached = lambda: counters["inductor"]["fxgraph_cache_hit"]  # noqa: E731
    before, cached_before = graphs(), cached()
    synchronize(device)
    start = time.perf_counter()
    step(batches[0])
    synchronize(device)
    first = time.perf_counter() - start
    for batch in batches[1:warmups]:
        step(batch)
    synchronize(device)
    warm = graphs()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch._logging.set_logs(recompiles=True)  # says why, if there is one
    marks, losses = [mark(device)], []
    for batch in batches[warmups:]:
        losses.append(step(batch))
        marks.append(mark(device))
    synchronize(device)
    torch._logging.set_logs(recompiles=False)
    loss = losses[-1].item()
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is not finite: {loss}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return Measured(intervals(marks), first, warm - before, graphs() - warm, cached() - cached_before, peak, loss)


class Batches(NamedTuple):
    """Different batches of one kind, pinned, what a step on one takes, and how long packing one takes."""

    batches: list[Any]
    flops: Flops
    tokens: float
    share_of_latents: float
    packing_ms: float


def make_batches(model: Any, size: Size, kind: str, run: Run) -> Batches:
    """`mixed` samples, `text` of the same lengths, or their `causal` twins."""
    generator = torch.Generator().manual_seed(3)
    count = 4 if run.quick else WARMUPS + STEPS
    pack, count_flops = model.packer(token_budget=size.token_budget), FlopCounter(model)
    make = dict(mixed=lambda sample, *_: sample.parts, text=text_of, causal=causal_twin)[kind]
    batches, seconds, latents = [], [], 0
    for _ in range(count):
        samples = mixed_samples(size, generator)
        latents += sum(sample.latents for sample in samples) if kind == "mixed" else 0
        samples = [make(sample, size, generator) for sample in samples]
        start = time.perf_counter()
        batches.append(pack(samples))
        seconds.append(time.perf_counter() - start)
    flops = [count_flops(batch) for batch in batches]
    mean = Flops(*(statistics.mean(column) for column in zip(*flops, strict=True)))
    tokens = statistics.mean(batch.num_tokens for batch in batches)
    pinned = [batch.pin_memory() if run.has_gpu else batch for batch in batches]
    return Batches(pinned, mean, tokens, latents / count / tokens, 1000 * statistics.median(seconds))


def training_section(run: Run) -> Any:
    return run.page.section(
        "Training",
        "A step: upload of a new batch from pinned memory, forward in bf16 autocast, backward, fused AdamW; median of "
        f"{STEPS} steps after {WARMUPS} (CUDA events on a GPU, the clock on a CPU). "
        "`mixed`: captions and images in turns; `text`: text of the same lengths, all of it targets; `causal`: text of "
        "the same lengths with as many targets as `mixed`, so plain causal attention on the same work. "
        "FLOPs are those of the model: 6 for each weight and token in the layers, for each weight and span in "
        "modulations, for each weight and latent in adapters, for each weight and target in the logits, plus 12 depth "
        "heads dim_head times the sum of the intervals (keys that each query sees) for attention. No padding, nothing "
        "that is computed again. MFU is FLOPs over time over the peak above. `weights a token` are those in the layers "
        "and the logits, `parameters` all. Peak memory is what PyTorch had allocated, weights and optimizer included. "
        "`compile s` is the first step less a median one; `new graphs` were compiled after the warm-up (wanted: 0).",
    )


def train_small(run: Run, size: Size) -> dict[str, dict[str, Any]]:
    """Compiled on all kinds of batches, then mixed batches without compiling."""
    done = _train(run, size, "compiled", KINDS, seconds=60, traced=("mixed", "text"))
    return done | _train(run, size, "eager", ("mixed",), seconds=45, traced=("mixed",))


def train_large(run: Run, size: Size) -> dict[str, dict[str, Any]]:
    """Compiled as it is, then with selective checkpoints."""
    done = _train(run, size, "compiled", KINDS, seconds=100, traced=("mixed",))
    return done | _train(
        run, size, "compiled, selective checkpoints", ("mixed",), seconds=90, traced=(), use_checkpoint="selective"
    )


def _train(
    run: Run, size: Size, how: str, kinds: Sequence[str], *, seconds: float, traced: Sequence[str], **options: Any
) -> dict[str, dict[str, Any]]:
    """Rows of one model, by `how kind`. The first kind also pays for building and compiling it, about `seconds`.

    `traced` kinds are profiled once more behind all timings.
    """
    section, rows, batches = training_section(run), {}, {}
    if reason := run.lacks(seconds):
        run.page.add(section, model=size.name, how=how, batch=", ".join(kinds), note=reason)
        return rows
    model, failure = run.page.attempt(f"build {size.name}", lambda: build_model(size, run.device, **options))
    if model is None:
        run.page.add(section, model=size.name, how=how, note=failure)
        return rows
    if how != "eager":
        compile_model(model, run)
    step = training_step(model, run.device)
    for kind in kinds:
        row, name = dict(model=size.name, how=how, batch=kind), f"{how} {kind}"
        note = None if run.compiles or how == "eager" else NOT_COMPILED
        if kind != kinds[0] and (reason := run.lacks(15)):
            run.page.add(section, **row, note=reason)
            continue
        pair, failure = run.page.attempt(
            f"{size.name} {name}", lambda kind=kind: _measure_kind(model, step, size, kind, run)
        )
        if pair is None:
            run.page.add(section, **row, note=failure)
            model.zero_grad(set_to_none=True)
            release(run, graphs=False)
            continue
        rows[name], batches[name] = figures(model, *pair, run), pair[0].batches[-1]
        run.page.add(section, **row, **rows[name], note=note)
    for name, batch in batches.items():
        if name.split()[-1] in traced:
            trace(run, step, f"{size.name} {name}", batch, rows[name]["ms"])
    del model, step
    release(run)
    return rows


def _measure_kind(model: Any, step: Step, size: Size, kind: str, run: Run) -> tuple[Batches, Measured]:
    made = make_batches(model, size, kind, run)
    return made, measure(step, made.batches, run.device, warmups=1 if run.quick else WARMUPS)


def figures(model: nn.Module, made: Batches, measured: Measured, run: Run) -> dict[str, Any]:
    """A row of the table."""
    seconds, weights = measured.median / 1000, FlopCounter(model).weights
    return {
        "parameters": f"{num_parameters(model) / 1e6:.1f}M",
        "weights a token": f"{(weights.token + weights.target) / 1e6:.1f}M",
        "tokens": made.tokens,
        "latents %": 100 * made.share_of_latents,
        "tokens/s": made.tokens / seconds,
        "ms": measured.median,
        "fastest ms": min(measured.milliseconds),
        "slowest ms": max(measured.milliseconds),
        "TFLOP a step": made.flops.total / 1e12,
        "of that attention %": 100 * made.flops.attention / made.flops.total,
        "MFU %": mfu(made.flops, measured, run),
        "peak GiB": measured.peak_gib,
        "compile s": measured.first - seconds if measured.graphs else None,
        "graphs": measured.graphs,
        "from cache": measured.cached,
        "new graphs": measured.new_graphs,
        "packing ms (CPU)": made.packing_ms,
        "loss": measured.loss,
    }


def mfu(flops: Flops, measured: Measured, run: Run) -> float | None:
    peak = peak_flops(run.device)
    return None if peak is None else 100 * flops.total / (measured.median / 1000) / peak


def trace(run: Run, step: Step, name: str, batch: Any, median: float) -> None:
    """A Chrome trace of one step, and its ten most expensive kernels."""
    section = run.page.section(
        "Kernels",
        "One step under the profiler, the ten most expensive kernels (operators on a CPU). `all` are all of them and "
        "what they take of a median step above: what is missing to 100% is a device that waits for Python. "
        "`attention` are the kernels of attention and their share of all. Traces are beside this page, for "
        "`chrome://tracing` or https://ui.perfetto.dev.",
    )
    if reason := run.lacks(15):
        run.page.add(section, step=name, kernel=reason)
        return
    rows, failure = run.page.attempt(f"trace of {name}", lambda: profile_step(run, step, name, batch))
    if rows is None:
        run.page.add(section, step=name, kernel=failure)
        return
    total = sum(row["ms"] for row in rows)
    attention = sum(row["ms"] for row in rows if any(part in row["kernel"].lower() for part in ATTENTION_KERNELS))
    calls = sum(row["calls"] for row in rows)
    share = lambda row: f"{row['ms'] / max(total, 1e-9):.1%}"  # noqa: E731
    run.page.add(section, step=name, kernel="all", calls=calls, ms=total, share=f"{total / median:.0%} of step")
    run.page.add(section, step=name, kernel="attention", ms=attention, share=share(dict(ms=attention)))
    top = [dict(step=name, **row, share=share(row)) for row in rows[:10]]
    run.page.add_quietly(section, [row | dict(kernel=f"`{row['kernel'][:90]}`") for row in top])


def profile_step(run: Run, step: Step, name: str, batch: Any) -> list[dict[str, Any]]:
    """All kernels of one step, the most expensive first. Writes its trace."""
    device = run.device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.has_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        step(batch)
        synchronize(device)
    file = "gpu-" + "-".join(name.replace(",", "").lower().split()) + ".trace.json.gz"
    profiler.export_chrome_trace(str(run.page.folder / file))
    run.page.copy_out(file)
    wanted = DeviceType.CUDA if run.has_gpu else DeviceType.CPU
    events = [each for each in profiler.key_averages() if each.device_type == wanted and not each.is_user_annotation]
    time_of = lambda event: event.self_device_time_total if run.has_gpu else event.self_cpu_time_total  # noqa: E731
    rows = [dict(kernel=event.key, calls=event.count, ms=time_of(event) / 1000) for event in events]
    if not rows:
        raise RuntimeError("the profiler saw no kernels")
    return sorted(rows, key=lambda row: -row["ms"])
