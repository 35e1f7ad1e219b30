"""A training step with untied weights beside one with tied weights: `python benchmarks/untied.py`.

Both make the same products for each token, so equal FLOPs: what untied weights cost is to sort the tokens, and products
of fewer rows each. Workloads are those of `training.py` that have images. All sides are in one process and take turns;
figures are medians, and the ratio is that of the medians. Writes `results/untied.md` and `.json`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

from harness import interleave
from jobs import Library
from report import save_table
from torch import set_num_threads
from training_jobs import QUICK, TRAINING, job_of

WORKLOADS = ("W1", "W2", "W4", "W5")
TARGET = 1.10


def timed(run: Callable[[], None]) -> Callable[[], float]:
    def turn() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of every side (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    args = parser.parse_args()
    set_num_threads(args.threads)
    lines = ["# Untied weights", "", f"| workload | tied ms | untied ms | untied / tied (<= {TARGET}) |"]
    lines.append("|---|---|---|---|")
    figures = {}
    for workload in WORKLOADS:
        training, sides = (QUICK if args.quick else TRAINING)[workload], {}
        for name in ("tied", "untied"):
            width = training.width | {"untied": name == "untied"}
            sides[name] = timed(job_of(Library("ours"), replace(training, width=width)).run)
        measured = interleave(sides, 1 if args.quick else args.rounds)
        tied, untied = (measured[name].median or 0.0 for name in sides)
        figures[workload] = dict(tied=tied, untied=untied, ratio=untied / tied)
        lines.append(f"| {workload} | {1000 * tied:.0f} | {1000 * untied:.0f} | {untied / tied:.2f} |")
        print(lines[-1], flush=True)
    save_table("untied", lines, dict(workloads=figures), threads=args.threads, quick=args.quick)


if __name__ == "__main__":
    main()
