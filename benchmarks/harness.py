"""Runs the same work in two packages side by side, and what is left of it if only the matrix products are done.

Every package has a process of its own (`worker.py`), because both are imported by the same name. They take turns: in
each round every side has a turn, nobody computes while another does, and the side that begins changes from round to
round, so that a slow minute of the machine falls on all of them. Figures are medians over rounds, ratios are ratios of
those medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


SETTLE = 0.2  # seconds in which the threads of whoever ran last stop waiting for more work


class WorkerError(RuntimeError):
    """A worker crashed, reported an error or took too long; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """What all workers share. `seconds` is the longest that one request may take."""

    threads: int = 2
    quick: bool = False
    warmups: int = 1
    seconds: float = 1200.0
    memory_gib: float | None = None


class Worker:
    """A package in a process of its own: `worker.ask("run")`."""

    def __init__(self, package: str, python: str, settings: Settings):
        self.package, self.settings = package, settings
        options = dict(package=package, threads=settings.threads, quick=settings.quick, warmups=settings.warmups)
        options |= dict(memory_gib=settings.memory_gib)
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - it lives as long as the worker
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment_of(package, settings.threads),
        )
        self.lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to one request. Raises `WorkerError`; after a crash or a timeout the worker is gone."""
        try:
            self.process.stdin.write(json.dumps(dict(do=do, **request)) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=self.settings.seconds)
        except Empty:
            self.close()
            raise WorkerError(f"took more than {self.settings.seconds:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise WorkerError(f"ended by signal {-code}" if code < 0 else f"ended with status {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["ok"]

    def tail(self, lines: int = 15) -> str:
        """The last that the worker wrote to standard error."""
        self.log.seek(0)
        return "\n".join(self.log.read().splitlines()[-lines:])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")


def environment_of(package: str, threads: int) -> dict[str, str]:
    """The environment of a worker: no progress bars or logs, and a path that leads to no other package."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    env |= dict(TQDM_DISABLE="1", LOGURU_LEVEL="ERROR")
    path = env.pop("PYTHONPATH", None)
    if package != "peer" and path is not None:
        env["PYTHONPATH"] = path
    return env


@dataclass
class Measured:
    """One side of one workload. `error` is a line that says why figures are missing."""

    seconds: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, float] | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and self.error is None else None

    def as_dict(self) -> dict[str, Any]:
        figures = dict(median=self.median, seconds=self.seconds, memory=self.memory, error=self.error)
        return figures | self.info


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Measured]:
    """Times every side once a round, beginning with another one each time.

    Just before, each runs once untimed: what a process that waited has in memory may have been taken from it meanwhile.
    """
    results = {name: Measured() for name in sides}
    names = list(sides)
    for i in range(rounds if names else 0):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if results[name].error is None:
                time.sleep(SETTLE)
                try:
                    sides[name]()
                    results[name].seconds.append(sides[name]())
                except WorkerError as error:
                    results[name].error = str(error)
    return results


def compare(
    workload: str, pythons: Mapping[str, str], settings: Settings, *, rounds: int, bf16: bool = False
) -> dict[str, Measured]:
    """Times one workload in every package of `pythons`, and the matrix products of ours (`"limit"`).

    `bf16` puts ours under autocast and leaves the peer in single precision; then there is no limit, since products of
    that type, alone, may be slower than what we make of them. Returns the sides by name.
    """
    workers = {package: Worker(package, python, settings) for package, python in pythons.items()}
    failed: dict[str, Measured] = {}
    infos: dict[str, dict] = {}
    sides: dict[str, Callable[[], float]] = {}

    def prepare(side: str, worker: Worker, do: str, **request: Any) -> None:
        try:
            infos[side] = worker.ask(do, **request)
            sides[side] = partial(worker.ask, "replay" if side == "limit" else "run")
        except WorkerError as error:
            failed[side] = Measured(error=str(error))
            say(f"{workload}: {side}: {error}\n{worker.tail()}")

    try:
        for package, worker in workers.items():
            prepare(package, worker, "setup", workload=workload, bf16=bf16 and package != "peer")
        if "ours" in sides and not bf16:
            prepare("limit", workers["ours"], "record")
        results = interleave(sides, rounds) | failed
    finally:
        for worker in workers.values():
            worker.close()
    for side, info in infos.items():
        results[side].info = info
    return results


def measure_memory(workload: str, package: str, python: str, settings: Settings, *, bf16: bool = False):
    """What one run needs at its peak, in a process that does nothing else; a line of error instead, if it fails."""
    return in_fresh_worker(package, python, settings, ("setup", dict(workload=workload, bf16=bf16)), ("memory", {}))


def in_fresh_worker(package: str, python: str, settings: Settings, *requests: tuple[str, dict]) -> Any:
    """The answer to the last of some requests, or `{"error": line}`."""
    worker = Worker(package, python, settings)
    try:
        answers = [worker.ask(do, **request) for do, request in requests]
        return answers[-1]
    except WorkerError as error:
        say(f"{package}: {error}\n{worker.tail()}")
        return {"error": str(error)}
    finally:
        worker.close()


def pythons_of(peer: str | None, *, compiled: bool = False) -> dict[str, str]:
    """The interpreters: this one has ours."""
    ours = {"ours": sys.executable} | ({"compiled": sys.executable} if compiled else {})
    return ours | ({"peer": peer} if peer else {})


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
