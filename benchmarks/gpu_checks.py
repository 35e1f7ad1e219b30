"""Parts 2 and 3 of the GPU benchmark: equal results by every path, and no wait for the device in a step."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_device import (
    NOT_COMPILED,
    Run,
    autocast,
    build_model,
    compile_model,
    relative_error,
    release,
    synchronize,
    upload,
)
from gpu_page import short_path
from gpu_workloads import Size
from torch import Tensor, nn
from training_jobs import CHANNELS, ragged

MODEL = dict(dim=128, depth=2, heads=4, dim_head=64, kv_heads=2)
OPTIONS = dict(attn_laser=True, use_value_residual=True, attn_kwargs=dict(softcap_value=30.0))
SIZE = Size("checks", MODEL, vocabulary=256, side=8)
MOST_TOKENS = 768  # of a ragged sample, at most 4 * 60 ids and 3 * 152 latents and markers
IMAGES_A_SAMPLE = 3


class Tolerance(NamedTuple):
    """The greatest relative errors that pass, in Euclidean norms."""

    loss: float
    logits: float
    gradients: float


# bf16 has 8 bits: two orders of summation differ by about 2^-8 for each product, and layers add up
TOLERANCES = {torch.float32: Tolerance(1e-5, 1e-4, 1e-3), torch.bfloat16: Tolerance(5e-3, 3e-2, 6e-2)}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Outcome(NamedTuple):
    """What a model makes of a batch. `logits` are those of all tokens, sample behind sample."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Case:
    """Samples, and the times `(b, m)` and noise `(k, c)` of their modalities: nothing is left to chance."""

    samples: Any
    times: Tensor
    noise: Tensor
    options: dict[str, Any]

    def one_by_one(self, pack: Any) -> Iterator["Case"]:
        """Each sample as a batch."""
        spans = pack(self.samples).stream.spans
        sizes = torch.tensor(spans.sizes, dtype=torch.long)
        counts = torch.zeros(len(self.samples), dtype=torch.long).index_add(0, spans.sample, sizes)
        noise = self.noise.split(counts.tolist())
        for i, sample in enumerate(self.samples):
            yield Case([sample], self.times[i : i + 1], noise[i], self.options)


def samples_of(run: Run) -> int:
    return 2 if run.quick else 3


def budget_of(run: Run) -> int:
    return samples_of(run) * MOST_TOKENS


def make_case(kind: str, pack: Any, num_samples: int) -> Case:
    """Ragged samples of text and images of several sizes, the same number of texts, or of images of one size."""
    torch.manual_seed(1)
    options = {}
    if kind == "images":
        samples, options = torch.randn(num_samples, 8, 8, CHANNELS), dict(modality_type=0)
    elif kind == "text":
        samples = [[torch.randint(0, 256, (100 + 70 * i,))] for i in range(num_samples)]
    else:
        samples = ragged(num_samples)
    times = torch.rand(num_samples, IMAGES_A_SAMPLE)
    latents = sum(pack(samples, **options).stream.spans.sizes)
    return Case(samples, times, torch.randn(latents, CHANNELS), options)


def outcome(model: Any, case: Case, pack: Any, dtype: torch.dtype, counts: Any = None) -> Outcome:
    """The loss, its gradients, and the logits, of a batch packed by `pack`."""
    device = model.device
    batch = upload(pack(case.samples, times=case.times, **case.options), device)
    noise = case.noise.to(device) if len(case.noise) else None
    model.zero_grad(set_to_none=True)
    with autocast(device, dtype):
        loss = model(batch, noise=noise, counts=counts)
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    with autocast(device, dtype):  # with gradients, so that compiled layers need no graph of their own
        logits = model(batch, noise=noise, return_loss=False).detach()
    rows = [row[:length] for row, length in zip(logits, batch.stream.lengths, strict=True)]
    return Outcome(loss.detach(), torch.cat(rows), gradients)


def dense_outcome(model: Any, case: Case, pack: Any, dtype: torch.dtype) -> Outcome:
    """The same by the definition of attention and plain formulas."""
    from transfusion_pytorch import plain_formulas

    with plain_formulas():
        return outcome(model, case, pack, dtype)


def outcome_one_by_one(model: Any, case: Case, pack: Any, dtype: torch.dtype) -> Outcome:
    """The sum over batches of one sample each, divided by the counts of the whole batch."""
    counts = pack(case.samples, times=case.times, **case.options).count_targets().to(model.device)
    each = [outcome(model, single, pack, dtype, counts) for single in case.one_by_one(pack)]
    gradients: dict[str, Tensor] = {}
    for one in each:
        gradients |= {name: gradients.get(name, 0) + grad for name, grad in one.gradients.items()}
    loss = torch.stack([one.loss for one in each]).sum()
    return Outcome(loss, torch.cat([one.logits for one in each]), gradients)


def with_checkpoints(model: Any, kind: bool | str) -> Any:
    copied = copy.deepcopy(model)
    copied.gradient_checkpointing_enable(kind)
    return copied


def checked_model(device: torch.device, **transformer: Any) -> Any:
    """A model none of whose parameters are zero: fresh gates are, and would hide what lies behind them."""
    model = build_model(SIZE, device, **transformer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator).to(device))
    return model


def equality_tests(run: Run, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Outcome], Callable[[], Outcome]]]:
    """Name, the outcome in question, the outcome that it should equal."""
    model = checked_model(run.device)
    pack, padded = (model.packer(prob_uncond=0.0, token_budget=budget) for budget in (None, budget_of(run)))
    mixed, text, images = (make_case(kind, pack, samples_of(run)) for kind in ("mixed", "text", "images"))
    eager = lambda case=mixed, by=pack, of=model: outcome(of, case, by, dtype)  # noqa: E731
    dense = lambda case, of=model: dense_outcome(of, case, pack, dtype)  # noqa: E731

    for name, case in (("mixed", mixed), ("text", text), ("images", images)):
        yield f"flex = dense, {name}", lambda case=case: eager(case), lambda case=case: dense(case)
    yield "padded = unpadded", lambda: eager(by=padded), eager
    yield "batch = one by one", eager, lambda: outcome_one_by_one(model, mixed, pack, dtype)
    for kind in (True, "selective"):
        checkpointed = with_checkpoints(model, kind)
        yield f"use_checkpoint={kind} = without", lambda of=checkpointed: eager(of=of), eager
    if dtype == torch.float32:
        on_cpu = copy.deepcopy(model).cpu()
        yield "this device = CPU", eager, lambda: outcome(on_cpu, mixed, on_cpu.packer(prob_uncond=0.0), dtype)
        rich = checked_model(run.device, **OPTIONS)
        yield "flex = dense, LASER, softcap, value residual", lambda: eager(of=rich), lambda: dense(mixed, of=rich)
    compiled = copy.deepcopy(model)
    compile_model(compiled, run)
    yield "compiled = eager", lambda: eager(by=padded, of=compiled), lambda: eager(by=padded)
    if dtype == torch.bfloat16:
        selective = with_checkpoints(compiled, "selective")  # copies are compiled too
        name = "compiled, selective checkpoints = eager"
        yield name, lambda: eager(by=padded, of=selective), lambda: eager(by=padded)


def check_equality(run: Run) -> None:
    section = run.page.section(
        "Equality",
        "Relative errors `|a - b| / |b|` in Euclidean norms of the loss, of all logits, and of the gradient of each "
        "parameter (the worst of them; a gradient counts as 1e-3 of the largest at least). fp32 without tf32; bf16 is "
        f"autocast. A test passes below {', '.join(f'{NAMES[d]}: {tuple(t)}' for d, t in TOLERANCES.items())}. Times "
        "and noise are given, no parameter is zero. "
        + ("" if run.has_gpu else 'On a CPU "flex" is the ragged path, and compiled graphs hold dense attention.'),
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for dtype in (torch.float32, torch.bfloat16):
        for name, ours, other in equality_tests(run, dtype):
            if reason := why_skipped(run, name, 30):
                run.page.add(section, type=NAMES[dtype], test=name, passed=reason)
                continue
            pair, failure = run.page.attempt(f"{NAMES[dtype]} {name}", lambda a=ours, b=other: (a(), b()))
            row = dict(passed=failure) if pair is None else compared(*pair, TOLERANCES[dtype])
            run.page.add(section, type=NAMES[dtype], test=name, **row)
        release(run, graphs=False)  # the next part can use them


def why_skipped(run: Run, name: str, seconds: float) -> str | None:
    return NOT_COMPILED if "compiled" in name and not run.compiles else run.lacks(seconds)


def compared(ours: Outcome, other: Outcome, tolerance: Tolerance) -> dict[str, Any]:
    """One row: the errors, the parameter with the worst gradient, and whether all are small enough."""
    loss, logits = relative_error(ours.loss, other.loss), relative_error(ours.logits, other.logits)
    floor = 1e-3 * max(grad.norm().item() for grad in other.gradients.values())
    nothing = torch.zeros(1)
    errors = {
        name: relative_error(ours.gradients.get(name, nothing), other.gradients.get(name, nothing), floor)
        for name in ours.gradients | other.gradients
    }
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    found = Tolerance(loss, logits, errors[worst])
    passed = all(error <= limit for error, limit in zip(found, tolerance, strict=True))  # NaN does not
    return dict(passed=passed, **found._asdict(), worst=worst)


def check_waits(run: Run) -> None:
    """A step that waits for the device anywhere between the batch and the optimizer raises an error."""
    section = run.page.section(
        "No wait for the device",
        "`model(batch)`, `backward()` and, in the last rows, a step of fused AdamW, in bf16 autocast under "
        '`torch.cuda.set_sync_debug_mode("error")`, after one step of the same shapes. The batch is a new one, pinned '
        "and uploaded before. Where it fails, all places that wait are listed.",
    )
    model = checked_model(run.device)
    compiled, selective = copy.deepcopy(model), with_checkpoints(model, "selective")
    compile_model(compiled, run)
    padded = model.packer(token_budget=budget_of(run))
    unpadded = model.packer()
    rows = [(kind, model, unpadded, kind, False) for kind in ("mixed", "text", "images")]
    rows += [(f"{kind}, padded", model, padded, kind, False) for kind in ("mixed", "text", "images")]
    rows += [(f"{kind}, padded, compiled", compiled, padded, kind, False) for kind in ("mixed", "text")]
    rows += [("mixed, padded, selective checkpoints", selective, padded, "mixed", False)]
    rows += [("mixed, padded, compiled, with AdamW", compiled, padded, "mixed", True)]
    for name, trained, pack, kind, with_optimizer in rows:
        if reason := why_skipped(run, name, 20):
            run.page.add(section, step=name, passed=reason)
            continue
        found, failure = run.page.attempt(
            f"no wait: {name}", lambda m=trained, p=pack, k=kind, w=with_optimizer: places_that_wait(run, m, p, k, w)
        )
        passed = failure if found is None else (not found if run.has_gpu else "not checked: no CUDA (the step ran)")
        run.page.add(section, step=name, passed=passed, waits="; ".join(found or ()) or None)
    release(run)


def places_that_wait(run: Run, model: nn.Module, pack: Any, kind: str, with_optimizer: bool) -> list[str]:
    """Empty if a warmed-up step raises nothing; else every place of it that waits."""
    case = make_case(kind, pack, samples_of(run))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(mode: str) -> None:
        batch = upload(pack(case.samples, **case.options), run.device)
        model.zero_grad(set_to_none=True)
        synchronize(run.device)
        with sync_debug(mode) if run.has_gpu else nullcontext():
            with autocast(run.device, torch.bfloat16):
                loss = model(batch)
            loss.backward()
            if with_optimizer:
                optimizer.step()
        synchronize(run.device)

    for _ in range(2):
        step("default")
    try:
        step("error")
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step("warn")
        waits = [each for each in caught if "called a sync" in str(each.message)]
        places = [f"{short_path(each.filename)}:{each.lineno}" for each in waits]
        return list(dict.fromkeys(places)) or [str(error)]
    return []


@contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
