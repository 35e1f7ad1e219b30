"""How a run is doing, on a terminal or in a log."""

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.display.terminal import print_text, printable
from transfusion_pytorch.training.flops import peak_flops
from transfusion_pytorch.training.metrics import RunningMeans

SECONDS_ON_TERMINAL, SECONDS_IN_LOG = 1.0, 10.0  # between two readings of the device


class ProgressReporter:
    """A progress bar where `file` (stderr) is a terminal, and a plain line every so many `seconds` where it is not.

    >>> with ProgressReporter(total_steps=1000, device="cuda") as progress:
    ...     progress.update({"loss": loss}, tokens=32_768, samples=64, learning_rate=3e-4)
    step 1/1,000  loss 9.13  3.21 GiB  lr 3.0e-04
    step 52/1,000  loss 6.24  163,840 tokens/s  320 samples/s  MFU 41.2%  3.25 GiB  lr 3.0e-04  0:03:09 left

    Losses are means since the line before, read from the device only for a line. The first step is shown at once,
    and its time counts for nothing: it compiles and allocates. `figures` are those of the last line: the metrics by
    the names that they were given, and `tokens_per_second`, `samples_per_second`, `mfu`, `memory_gib`, `learning_rate`.

    Memory is the peak of what was allocated on a GPU, and what the process occupies on a CPU. `processes` train
    together, on devices of one kind; those without `is_main` are silent.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial: int = 0,
        device: torch.device | str = "cpu",
        processes: int = 1,
        seconds: float | None = None,
        file: Any = None,
        is_main: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.step, self.is_main, self.clock = total_steps, initial, is_main, clock
        self.file = sys.stderr if file is None else file
        self.device = torch.device(device)
        self.figures: dict[str, float] = {}
        self._bar = _open_bar(total_steps, initial, self.file) if is_main and self.file.isatty() else None
        self._seconds = (SECONDS_IN_LOG if self._bar is None else SECONDS_ON_TERMINAL) if seconds is None else seconds
        peak = peak_flops(self.device)
        self._peak = None if peak is None else peak * processes
        self._process = _this_process() if is_main and self.device.type == "cpu" else None
        self._means = RunningMeans()
        self._sums: dict[str, float] = {"tokens": 0.0, "samples": 0.0, "flops": 0.0}
        self._learning_rate: float | None = None
        self._shown_at: float | None = None  # when the last line was written, None before the first
        self._shown_step = initial
        self._timed_from: tuple[float, int] = (0.0, initial)  # when, and at which step, the first one ended

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self,
        metrics: Mapping[str, Tensor | float],
        *,
        tokens: int = 0,
        samples: int = 0,
        flops: float = 0.0,
        learning_rate: float | None = None,
    ) -> None:
        """After each optimizer step, with what all processes worked through in it."""
        self.step += 1
        if not self.is_main:
            return
        self._means.add(metrics)
        for name, value in (("tokens", tokens), ("samples", samples), ("flops", flops)):
            self._sums[name] += value
        self._learning_rate = learning_rate
        if self._bar is not None:
            self._bar.update()
        is_due = self._shown_at is None or self.clock() - self._shown_at >= self._seconds
        if is_due or self.step == self.total_steps:
            self._show()

    def write(self, message: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(printable(message, self.file), file=self.file)
        elif self.is_main:
            print_text(message, file=self.file, flush=True)

    def close(self) -> None:
        """Shows the steps since the last line, and leaves the bar where it is."""
        if self.is_main and self.step > self._shown_step:
            self._show()
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        losses = self._means.read()  # waits for the device, so the clock is read after it
        now = self.clock()
        self.figures = losses | self._rates(now) | self._state()
        line = "  ".join([*(f"{name} {value:.4g}" for name, value in losses.items()), *self._phrases()])
        if self._bar is None:
            left = self._seconds_left(now)
            eta = "" if left is None else f"  {timedelta(seconds=round(left))} left"
            self.write(f"step {self.step:,}/{self.total_steps:,}  {line}{eta}")
        else:
            self._bar.set_postfix_str(line)
        if self._shown_at is None:
            self._timed_from = (now, self.step)
        self._shown_at, self._shown_step = now, self.step
        self._sums = dict.fromkeys(self._sums, 0.0)

    def _rates(self, now: float) -> dict[str, float]:
        """Since the line before; nothing for the first step."""
        if self._shown_at is None or now <= self._shown_at:
            return {}
        per_second = {name: total / (now - self._shown_at) for name, total in self._sums.items() if total}
        rates = {f"{name}_per_second": per_second[name] for name in ("tokens", "samples") if name in per_second}
        if self._peak is not None and "flops" in per_second:
            rates["mfu"] = per_second["flops"] / self._peak
        return rates

    def _state(self) -> dict[str, float]:
        rate = {} if self._learning_rate is None else {"learning_rate": float(self._learning_rate)}
        return {"memory_gib": self._memory() / 2**30, **rate}

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return 0 if self._process is None else self._process.memory_info().rss

    def _phrases(self) -> list[str]:
        forms = dict(
            tokens_per_second="{:,.0f} tokens/s",
            samples_per_second="{:,.3g} samples/s",
            mfu="MFU {:.1%}",
            memory_gib="{:.2f} GiB",
            learning_rate="lr {:.1e}",
        )
        return [form.format(self.figures[name]) for name, form in forms.items() if name in self.figures]

    def _seconds_left(self, now: float) -> float | None:
        """From the mean speed since the first step."""
        since, first = self._timed_from
        if self._shown_at is None or self.step <= first:
            return None
        return (now - since) / (self.step - first) * (self.total_steps - self.step)


def _open_bar(total: int, initial: int, file: Any) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ImportError(
            'progress bars need tqdm, which is not installed: pip install "transfusion-pytorch[train]"'
        ) from error
    return tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, file=file)


def _this_process() -> Any:
    try:
        from psutil import Process
    except ModuleNotFoundError as error:
        raise ImportError(
            "the memory of a process is read with psutil, which is not installed: "
            'pip install "transfusion-pytorch[train]"'
        ) from error
    return Process()
