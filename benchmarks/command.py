"""What the command lines of both benchmarks share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import HERE, Measured, Settings, compare, in_fresh_worker, measure_memory, pythons_of, say
from report import Targets, environment, row


def parser(description: str, workloads: Sequence[str], studies: Sequence[str] = ()) -> argparse.ArgumentParser:
    """`studies` can be asked for like workloads, but have no one run to profile."""
    names = [*workloads, *studies]
    parse = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parse.add_argument("--workloads", nargs="+", choices=names, default=names, metavar="NAME")
    parse.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with the PyPI package 0.20.0")
    parse.add_argument("--rounds", type=int, default=5, help="runs of every side")
    parse.add_argument("--threads", type=int, default=2, help="of every worker")
    parse.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    parse.add_argument("--bf16", action="store_true", help="also ours in bfloat16 autocast, beside the peer in fp32")
    parse.add_argument("--compiled", action="store_true", help="also ours after model.compile()")
    parse.add_argument("--no-memory", action="store_true", help="leave out the runs that measure memory")
    parse.add_argument("--seconds", type=float, default=1200.0, help="the longest that one run may take")
    parse.add_argument("--memory-gib", type=float, help="the most for a worker (default: 70%% of what is free)")
    parse.add_argument("--profile", choices=workloads, metavar="NAME", help="only print where ours spends its time")
    parse.add_argument("--out", type=Path, help="folder of results (default: results, or results/quick)")
    return parse


def settings_of(args: argparse.Namespace) -> Settings:
    if args.rounds < 1 or args.threads < 1:
        raise SystemExit("--rounds and --threads must be at least 1")
    if args.quick:
        args.rounds = 1
    if args.memory_gib is None:
        args.memory_gib = 0.7 * free_gib()
    args.out = args.out or HERE / "results" / ("quick" if args.quick else "")
    return Settings(threads=args.threads, quick=args.quick, seconds=args.seconds, memory_gib=args.memory_gib)


def free_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/meminfo does not say what is free: give --memory-gib")


def print_profile(args: argparse.Namespace, settings: Settings) -> None:
    setup = ("setup", dict(workload=args.profile, bf16=args.bf16))
    package = "compiled" if args.compiled else "ours"
    table = in_fresh_worker(package, pythons_of(None)["ours"], settings, setup, ("profile", {}))
    print(table if isinstance(table, str) else table["error"])


def run_workload(name: str, args: argparse.Namespace, settings: Settings, targets: Targets, *, bf16: bool = False):
    """The row of one workload: time in turns, then memory one by one."""
    pythons = pythons_of(args.peer, compiled=args.compiled)
    sides = compare(name, pythons, settings, rounds=args.rounds, bf16=bf16)
    if not args.no_memory:
        for package, python in pythons.items():
            if sides[package].error is None and package != "compiled":
                sides[package].memory = measure_memory(name, package, python, settings, bf16=bf16 and package != "peer")
    check_same_structure(name, sides)
    label = f"{name} bf16" if bf16 else name
    entry = row(label, sides, targets, environment(args.threads))
    say(f"{label}: {summary(entry)}")
    return entry


def check_same_structure(name: str, sides: dict[str, Measured]) -> None:
    """Both packages must have made samples of the same structure, where that is known."""
    digests = {side: (measured.info.get("check") or {}).get("structure") for side, measured in sides.items()}
    for side, digest in digests.items():
        if digest and digests["ours"] and digest != digests["ours"]:
            sides[side].error = f"{name}: the samples have another structure than ours"


def summary(entry: dict[str, Any]) -> str:
    times = [
        f"{side} {f['median']:.4f} s" if f["median"] else f"{side} {f['error']}" for side, f in entry["sides"].items()
    ]
    ratios = [f"{name} {value:.2f}" for name, value in entry["ratios"].items() if value is not None]
    return ", ".join(times + ratios)
