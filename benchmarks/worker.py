"""One package in one process: answers JSON lines, one at a time, so that only one side of a comparison ever computes.

Started by `harness.Worker` with the interpreter of an environment that has either this library or its peer installed;
both have the same import name, so they cannot share a process. Standard output belongs to the answers: whatever a
library prints goes to standard error.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    limit_memory(options["memory_gib"])

    import torch

    torch.set_num_threads(options["threads"])
    side = Side(options)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(side, request.pop("do"))(**request)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": one_line(error)}
        answers.write(json.dumps(answer) + "\n")


class Side:
    """What can be asked of a package: set a workload up, run it once, and what it needs."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.job: Any = None
        self.calls: list[Any] = []
        self.replays: dict[str, Any] = {}

    def setup(self, workload: str, bf16: bool = False) -> dict[str, Any]:
        """Builds the workload and runs it once, so that no lazy initialisation is timed."""
        from jobs import make_job

        self.job = make_job(self.options["package"], workload, quick=self.options["quick"], bf16=bf16)
        for _ in range(self.options["warmups"]):
            self.run()
        return {
            "parameters": sum(parameter.numel() for parameter in self.job.model.parameters()),
            "version": package_version(),
            "note": self.job.note,
            **({"check": self.job.check()} if self.job.check is not None else {}),
        }

    def run(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.job.run()
        return time.perf_counter() - start

    def record(self) -> dict[str, Any]:
        """Notes every matrix product of one run, and lays out operands for `replay`."""
        from products import Recorder, products_of, replay

        with Recorder() as recorder:
            self.job.run()
        products = products_of(recorder.calls)
        replay(products)  # the first pays for its memory
        self.calls, self.replays = recorder.calls, {"products": products}
        return {
            "products": len(products),
            "gflop": round(sum(product.flop for product in products) / 1e9, 2),
            "unknown": sorted(recorder.unknown),
        }

    def replay(self, what: str = "products") -> float:
        """Seconds of nothing but the products (or the `"attention"` kernels) of the recorded run."""
        from products import attention_of, replay

        if what not in self.replays:
            self.replays[what] = attention_of(self.calls)
        return replay(self.replays[what])

    def memory(self) -> dict[str, float]:
        """MiB that one run needs above what is there before it (weights, data and optimizer state), at its peak.

        The kernel's own mark of the highest resident size is set back just before the run (`/proc/self/clear_refs`),
        after memory that earlier runs freed has been handed back: `ru_maxrss` alone would include imports and
        initialisation, and sampling would miss short peaks.
        """
        gc.collect()
        trim()
        before = status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.job.run()
        peak = status_mib("VmHWM")
        return {"before": before, "peak": peak, "needed": peak - before}

    def measure(self, what: str) -> dict[str, Any]:
        """A study that is no plain run: see `growth` and `leak`."""
        from jobs import studies

        return studies()[what](self.options["package"], quick=self.options["quick"])

    def profile(self) -> str:
        """The table of operators of one run, by their own time."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], record_shapes=False) as profiler:
            self.job.run()
        return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)


def one_line(error: BaseException) -> str:
    """What went wrong, without the folders of this machine: results hold it."""
    first = next(iter(str(error).strip().splitlines()), "")
    first = re.sub(r"(?<![\w.])/[^\s'\"]+/", "", first)
    return f"{type(error).__name__}: {first}".rstrip(": ")[:300]


def limit_memory(gib: float | None) -> None:
    """Makes an allocation beyond the limit an error of this process, before the system ends whichever it likes."""
    if gib is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)


def trim() -> None:
    """Hands freed memory back to the system (glibc only)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def package_version() -> str:
    from importlib.metadata import version

    return version("transfusion-pytorch")


if __name__ == "__main__":
    main()
