"""How fast this library trains and how much memory it needs, beside the PyPI package and the matrix products alone.

    python benchmarks/training.py --peer PEER/bin/python --rounds 5
    python benchmarks/training.py --workloads W1 W4 --quick
    python benchmarks/training.py --profile W2

Workloads (see `training_jobs`): `W1` to `W6`; `length-1024` to `length-8192`, one sample of text and pictures; and
`samples-1` to `samples-32`, so many ragged samples as in W4. Writes `results/training.md`, `.json` and two plots.
"""

import json
from pathlib import Path
from typing import Any

from command import parser, print_profile, run_workload, settings_of
from harness import Settings, in_fresh_worker, pythons_of
from plots import draw_growth, draw_ratios
from report import Targets, cell, environment, needed, ratio, save, seconds, write_page
from training_jobs import LENGTHS, SAMPLES, TRAINING

TARGETS = {
    "W1": Targets(peer=3.0, limit=2.5),
    "W2": Targets(peer=3.0, limit=1.7),
    "W3": Targets(peer=3.0, limit=1.4),
    "W4": Targets(peer=4.5, limit=1.8, memory=1 / 3),
    "W5": Targets(peer=5.0, limit=1.6, memory=1 / 3),
    "W6": Targets(peer=3.0, limit=1.5, memory=1 / 4),
}
BF16 = {"W2": Targets(peer=5.0), "W3": Targets(peer=5.0), "W4": Targets(peer=7.0)}
GROWTH = 1.6  # of the time per token from 1k to 8k, attention's own quadratic part aside


def main() -> None:
    args = parser("Training: ours, the peer, and the limit.", list(TRAINING)).parse_args()
    settings = settings_of(args)
    if args.profile:
        return print_profile(args, settings)
    title = "Training step" + (" (quick: sizes without meaning)" if args.quick else "")
    for name in args.workloads:
        rows = [run_workload(name, args, settings, TARGETS.get(name, Targets()))]
        if args.bf16 and name in BF16:
            rows.append(run_workload(name, args, settings, BF16[name], bf16=True))
        if name.startswith("length-"):
            rows[0]["attention"] = attention_seconds(name, settings)
        save(args.out, "training", title, rows, {}, order=list(TRAINING))
    every = rows_by_name(args.out)
    lines = ["![time and memory by size](training-growth.png)", "", *length_lines(every), "", *samples_lines(every)]
    where = environment(args.threads)
    studies = {
        "ratios": {"lines": ["![time in units of the products alone](training-ratios.png)"], "environment": where},
        "growth": {"lines": lines, "environment": where},
    }
    table = save(args.out, "training", title, [], studies, order=list(TRAINING))
    draw_ratios(every, list(TARGETS), args.out / "training-ratios.png")
    draw_growth(every, {"length": LENGTHS, "samples": SAMPLES}, args.out / "training-growth.png")
    if not args.quick:
        write_page(args.out)
    print(table.read_text())


def attention_seconds(workload: str, settings: Settings) -> float | None:
    """Attention's kernels alone, forward and backward, as one step calls them. The first replay warms up."""
    again = ("replay", dict(what="attention"))
    requests = [("setup", dict(workload=workload)), ("record", {}), again, again]
    answer = in_fresh_worker("ours", pythons_of(None)["ours"], settings, *requests)
    return None if isinstance(answer, dict) else answer


def rows_by_name(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["workload"]: row for row in json.loads((folder / "training.json").read_text())["rows"]}


def length_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Time and memory by length, and the cost of a token with attention and without."""
    lines = [
        "One sample of text and pictures; microseconds per token of ours, attention's kernels aside in the second.",
        "",
        "| length | ours s | peer s | attention s | us per token | without attention | MiB ours | MiB peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rest: dict[int, float] = {}
    for length in LENGTHS:
        if (row := rows.get(f"length-{length}")) is None:
            continue
        ours, attention = seconds(row, "ours"), row.get("attention")
        if ours is not None and attention is not None:
            rest[length] = 1e6 * (ours - attention) / length
        cells = [
            f"{length:,}",
            *(cell(value) for value in (ours, seconds(row, "peer"), attention)),
            cell(None if ours is None else 1e6 * ours / length, 1),
            cell(rest.get(length), 1),
            *(cell(needed(row, side), 0) for side in ("ours", "peer")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    growth = ratio(rest.get(LENGTHS[-1]), rest.get(LENGTHS[0]))
    if growth is not None:
        lines += ["", f"From 1k to 8k, a token costs {growth:.2f} times as much without attention (<= {GROWTH})."]
    return lines


def samples_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Time and memory by the number of samples."""
    lines = [
        "| ragged samples | ours s | peer s | ms per sample | MiB ours | MiB peer |",
        "|---|---|---|---|---|---|",
    ]
    for samples in SAMPLES:
        if (row := rows.get(f"samples-{samples}")) is None:
            continue
        ours = seconds(row, "ours")
        cells = [
            str(samples),
            *(cell(seconds(row, side)) for side in ("ours", "peer")),
            cell(None if ours is None else 1e3 * ours / samples, 1),
            *(cell(needed(row, side), 0) for side in ("ours", "peer")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
