"""The decoding parts of the GPU benchmark: equal samples by every path, text tokens/s against reading the weights once
for each token, images/s.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from gpu_checks import NAMES, checked_model
from gpu_device import Run, build_model, compile_model, relative_error, release, synchronize
from gpu_training import trace
from gpu_workloads import Size
from torch import Tensor, nn

from transfusion_pytorch.network.step_graph import STEPS_BEFORE_CAPTURE

BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes/s of the memory, by a part of the name
ROWS = (1, 8, 64)
PROMPT, STEPS = 130, 96  # ids; a row of the cache has 256 slots then, and does not move in the meantime
INTERVALS, GUIDANCE = 16, 3.0
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # relative errors of log-probabilities and latents


def forced(run: Run) -> int:
    """Ids of text that the checks have written: enough to capture a graph and replay it."""
    return 16 if run.quick else 48


class Sampled(NamedTuple):
    """What an engine made: ids, their log-probabilities and latents, request behind request."""

    ids: list[list[int]]
    log_probabilities: Tensor
    latents: Tensor


def forced_text(seed: int, start: int, count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that has the same ids written whatever the logits are."""
    script = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def force(ids: Tensor, logits: Tensor) -> Tensor:
        wanted = script[min(len(ids) - start, count - 1)]
        forced = torch.full_like(logits, float("-inf"))
        forced[wanted] = 0
        return forced

    return force


def sample(engine: Any, numbers: Sequence[int], count: int, *, is_forced: bool) -> Sampled:
    """Text and an image behind ragged prompts. Log-probabilities are those of the model, before any processor."""
    from transfusion_pytorch import SamplingOptions

    requests = []
    for i in numbers:
        prompt = torch.arange(5 + 40 * i) % 256
        options = SamplingOptions(
            plan=[("text", count), (0, (8, 8)), ("text", 8)] if is_forced else [("text", 3 * count)],
            max_length=1000,
            modality_steps=4,
            cfg_scale=GUIDANCE,
            log_probabilities=True,
            generator=torch.Generator().manual_seed(i),
            text_temperature=0.0 if is_forced else 1.0,
            logits_processors=[forced_text(i, len(prompt) + 1, count)] if is_forced else [],
        )
        requests.append(engine.submit(prompt, options=options))
    engine.run()
    states = [request._request for request in requests]
    for error in (state.error for state in states if state.error is not None):
        raise error
    log_p = torch.tensor([each for state in states for each in state.log_probabilities]).nan_to_num(0.0)
    pieces = [piece for state in states for piece in state.modalities]
    drawn = [piece.tensor.flatten().float().cpu() for piece in pieces]
    ids = [[item for item in state.branch.items if isinstance(item, int)] for state in states]
    return Sampled(ids, log_p, torch.cat([*drawn, torch.empty(0)]))


def engine_of(model: Any, *, captures: bool | None = None, **options: Any) -> Any:
    """An engine that captures its steps in graphs, if it can; with `captures=False` it runs them as they are, in the
    same shapes.
    """
    engine = model.create_engine(**options)
    if captures is False and hasattr(engine.scheduler.runner, "graphs"):
        engine.scheduler.runner.graphs.may_capture = lambda: False
    return engine


def sampling_tests(model: Any, run: Run) -> Iterator[tuple[str, Callable[[], Sampled], Callable[[], Sampled]]]:
    """Name, the samples in question, those that they should equal."""
    everyone, count = range(2 if run.quick else 3), forced(run)
    batch = lambda **options: sample(engine_of(model, **options), everyone, count, is_forced=True)  # noqa: E731
    free = lambda **options: sample(engine_of(model, **options), everyone, count, is_forced=False)  # noqa: E731

    def one_by_one() -> Sampled:
        each = [sample(engine_of(model), [i], count, is_forced=True) for i in everyone]
        ids, log_p, latents = zip(*each, strict=True)
        return Sampled([one for [one] in ids], torch.cat(log_p), torch.cat(latents))

    yield "cached = uncached", batch, lambda: batch(cache_kv=False)
    yield "batch = one by one", batch, one_by_one
    yield "graph = eager, forced text and images", batch, lambda: batch(captures=False)
    yield "graph = eager, sampled text", free, lambda: free(captures=False)
    if run.compiles:
        compiled = copy.deepcopy(model)
        compile_model(compiled, run)
        in_graphs = lambda: sample(engine_of(compiled), everyone, count, is_forced=True)  # noqa: E731
        yield "compiled = eager", in_graphs, batch


def check_sampling(run: Run) -> None:
    section = run.page.section(
        "Equality of sampling",
        "Three requests with prompts of 5, 45 and 85 ids: the same text is forced on every path, then a guided image "
        "is drawn. Relative errors of the log-probabilities that the model gave to the text, and of the latents. "
        f"A test passes below {', '.join(f'{NAMES[kind]}: {limit}' for kind, limit in TOLERANCES.items())}; sampled "
        "text must be the same to the id. fp32 without tf32; bf16 are the weights. "
        + ("" if run.has_gpu else "No graph is captured on a CPU."),
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for dtype, limit in TOLERANCES.items():
        model = checked_model(run.device).to(dtype).eval()
        for name, ours, other in sampling_tests(model, run):
            if reason := run.lacks(15):
                run.page.add(section, type=NAMES[dtype], test=name, passed=reason)
                continue
            pair, failure = run.page.attempt(f"{NAMES[dtype]} {name}", lambda a=ours, b=other: (a(), b()))
            row = dict(passed=failure) if pair is None else compared(*pair, limit)
            run.page.add(section, type=NAMES[dtype], test=name, **row)
    release(run)


def compared(ours: Sampled, other: Sampled, limit: float) -> dict[str, Any]:
    if ours.ids != other.ids:
        return dict(passed=False, note="other ids")
    log_p = relative_error(ours.log_probabilities, other.log_probabilities)
    latents = relative_error(ours.latents, other.latents)
    return dict(passed=log_p <= limit and latents <= limit, log_probabilities=log_p, latents=latents)


def decode(run: Run, size: Size) -> dict[str, Any]:
    """Text tokens/s for 1, 8 and 64 rows, with graphs and without, and images/s. The model is bf16."""
    section = run.page.section(
        "Decoding",
        f"Steps of an engine that writes text behind prompts of {PROMPT} ids, bf16 weights, sampled at temperature 1; "
        f"mean of {STEPS} steps after those that capture the graph. A step reads the weights of layers and logits "
        "once, whatever the number of rows: `limit` is that many bytes at the bandwidth of the memory (3.35 TB/s on an "
        "H100), without reading keys and values. Layers are compiled. `graph` says whether steps were replayed from a "
        "CUDA graph.",
    )
    model = build_model(size, run.device).bfloat16().eval()
    compile_model(model, run)
    done: dict[str, Any] = {}
    for rows in (1, 2) if run.quick else ROWS:
        for captures in (True, False) if run.has_gpu else (False,):
            what = dict(model=size.name, rows=rows)
            if reason := run.lacks(20):
                run.page.add(section, **what, graph=reason)
                continue
            name = f"decoding {size.name}, {rows} rows"
            row, failure = run.page.attempt(name, lambda r=rows, c=captures: time_text(run, model, size, r, captures=c))
            run.page.add(section, **what, **(row or dict(graph=failure)))
            done |= {f"{rows} {'graph' if captures else 'eager'}": row} if row else {}
    draw(run, model, size)
    release(run)
    return done


def time_text(run: Run, model: nn.Module, size: Size, rows: int, *, captures: bool) -> dict[str, Any]:
    steps = 4 if run.quick else STEPS
    engine = engine_of(model, captures=captures, max_batch=rows)
    prompts = torch.randint(0, size.vocabulary, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    options = dict(plan=[("text", 10 * STEPS)], max_length=20 * STEPS, listen=False, text_temperature=1.0)
    requests = [engine.submit(ids, **options) for ids in prompts]
    while engine.stats.tokens_written < rows * (STEPS_BEFORE_CAPTURE + 4):  # long prompts are read over many steps
        engine.step()
    synchronize(run.device)
    before, start = engine.stats.tokens_written, time.perf_counter()
    for _ in range(steps):
        engine.step()
    synchronize(run.device)
    seconds, written = time.perf_counter() - start, engine.stats.tokens_written - before
    if captures and rows == 1:
        trace(run, lambda _: engine.step(), f"decode {size.name}", None, 1000 * seconds / steps)
    for request in requests:
        if request._request.error is not None:
            raise request._request.error
    state = engine.scheduler._state
    per_step = weight_bytes(model)
    limit = None if (speed := bandwidth(run.device)) is None else rows * speed / per_step
    return {
        "graph": bool(state is not None and state.graph is not None and state.graph.is_captured),
        "tokens/s": written / seconds,
        "ms a step": 1000 * seconds / steps,
        "limit tokens/s": limit,
        "% of limit": None if limit is None else 100 * written / seconds / limit,
        "weights MB": per_step / 1e6,
    }


def weight_bytes(model: Any) -> int:
    """What a step of text reads: layers without the modulations of spans, and logits."""
    layers = [weight for name, weight in model.transformer.named_parameters() if "to_modulation" not in name]
    return sum(weight.numel() * weight.element_size() for weight in (*layers, *model.to_logits.parameters()))


def bandwidth(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((speed for part, speed in BANDWIDTHS.items() if part in name), None)


def draw(run: Run, model: nn.Module, size: Size) -> None:
    """Guided images behind short prompts, as many at once as there are prompts."""
    section = run.page.section(
        "Drawing",
        f"Images of {size.side} x {size.side} latents behind 4 ids of text, {INTERVALS} intervals of midpoint, "
        f"guidance {GUIDANCE}, so {4 * INTERVALS} evaluations of an image each; bf16 weights, after one call to "
        "warm up.",
    )
    for images in (1, 2) if run.quick else ROWS:
        if reason := run.lacks(20):
            run.page.add(section, model=size.name, images=images, **{"images/s": reason})
            continue
        seconds, failure = run.page.attempt(f"drawing {images}", lambda n=images: time_images(run, model, size, n))
        rate = failure if seconds is None else images / seconds
        run.page.add(section, model=size.name, images=images, **{"images/s": rate, "s": seconds})


def time_images(run: Run, model: nn.Module, size: Size, images: int) -> float:
    prompts = list(torch.randint(0, size.vocabulary, (images, 4), generator=torch.Generator().manual_seed(0)))
    options = dict(plan=[(0, (size.side, size.side))], modality_steps=2 if run.quick else INTERVALS, cfg_scale=GUIDANCE)
    engine = engine_of(model, max_batch=images)
    engine.sample_many(prompts, **options, odeint_kwargs=dict(method="midpoint"))
    synchronize(run.device)
    start = time.perf_counter()
    engine.sample_many(prompts, **options, odeint_kwargs=dict(method="midpoint"))
    synchronize(run.device)
    return time.perf_counter() - start
