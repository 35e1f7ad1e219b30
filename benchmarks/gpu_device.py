"""What the parts of the GPU benchmark share: the device, models, clocks."""

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from gpu_page import Page
from gpu_workloads import Size
from torch import Tensor, nn

NOT_COMPILED = "not compiled: takes minutes on a CPU, see --compile"


@dataclass
class Run:
    """One run of the benchmark: where, how long at most, and the page that it writes."""

    device: torch.device
    page: Page
    deadline: float  # of time.monotonic
    quick: bool = False
    peer: str | None = None
    compiles: bool = True

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def lacks(self, seconds: float) -> str | None:
        """Why something that takes so long is skipped (a fifth of it if `quick`), None if there is time."""
        seconds = seconds / 5 if self.quick else seconds
        if self.left >= seconds:
            return None
        return f"skipped: takes about {seconds:.0f} s, {max(self.left, 0):.0f} s are left"


def build_model(size: Size, device: torch.device, **transformer: Any) -> nn.Module:
    from transfusion_pytorch import Transfusion

    torch.manual_seed(0)
    with device:  # a CPU takes many seconds to draw a billion numbers
        return Transfusion(**size.model_arguments, transformer=size.transformer | transformer).to(device)


def compile_model(model: Any, run: Run) -> None:
    """Flex attention has no backward pass on a CPU, so there the graphs hold the dense formula instead."""
    if not run.compiles:
        return
    if not run.has_gpu:
        model.transformer.attention = "dense"
    model.compile()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """bf16 as autocast, single precision without."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def upload(batch: Any, device: torch.device) -> Any:
    """To the device from pinned memory, which the host does not wait for."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def mark(device: torch.device) -> Any:
    """A moment in the work of the device: an event of CUDA, or seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks: Sequence[Any]) -> list[float]:
    """Milliseconds between neighbouring marks, once the device has passed them all."""
    return [1000 * (b - a) if isinstance(a, float) else a.elapsed_time(b) for a, b in pairwise(marks)]


def release(run: Run, *, graphs: bool = True) -> None:
    """Gives back the memory of what is no longer used, and compiled `graphs`."""
    gc.collect()
    if graphs:
        torch._dynamo.reset()
    if run.has_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def relative_error(ours: Tensor, other: Tensor, floor: float = 0.0) -> float:
    """`|ours - other| / |other|` in Euclidean norms, where `|other|` is taken as `floor` at least. NaN stays NaN."""
    ours, other = ours.detach().double().cpu(), other.detach().double().cpu()
    size = max(other.norm().item(), floor)
    return (ours - other).norm().item() / size if size else (ours - other).norm().item()
