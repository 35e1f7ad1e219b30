"""Results as JSON and as a table, with the targets beside the figures and the environment below.

A run of some workloads replaces their rows and keeps the others; every row says when and of which commit it is.
"""

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from harness import HERE, ROOT, Measured


class Targets(NamedTuple):
    """Least ratio peer / ours, greatest ratio ours / limit, greatest ratio of memory ours / peer."""

    peer: float | None = None
    limit: float | None = None
    memory: float | None = None


def environment(threads: int) -> dict[str, Any]:
    """Where and when. No names of hosts or users."""
    from importlib.metadata import version

    return {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": threads,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def commit() -> str:
    """The short hash, with a + where the package differs from it."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("status", "--porcelain", "--", "transfusion_pytorch").stdout.strip()
    return (head or "unknown") + ("+" if changed else "")


def row(name: str, sides: dict[str, Measured], targets: Targets, where: dict[str, Any]) -> dict[str, Any]:
    """One workload: every side, and the ratios that have both of their sides."""
    names = ("ours", "compiled", "peer", "limit")
    ours, compiled, peer, limit = (sides[side].median if side in sides else None for side in names)
    memory = {side: (sides[side].memory or {}).get("needed") for side in ("ours", "peer") if side in sides}
    return {
        "workload": name,
        "sides": {side: measured.as_dict() for side, measured in sides.items()},
        "ratios": {
            "peer / ours": ratio(peer, ours),
            "ours / limit": ratio(ours, limit),
            "peer / compiled": ratio(peer, compiled),
            "compiled / limit": ratio(compiled, limit),
            "memory ours / peer": ratio(memory.get("ours"), memory.get("peer")),
        },
        "targets": targets._asdict(),
        "environment": where,
    }


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def save(folder: Path, name: str, title: str, rows: list[dict], extra: dict[str, Any], *, order: Sequence[str]) -> Path:
    """Writes `name.json` and `name.md`, merged with what is there. Returns the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "extra": {}}
    new = {r["workload"] for r in rows}
    merged = [r for r in old["rows"] if r["workload"] not in new] + rows
    merged.sort(key=lambda r: order.index(r["workload"].split()[0]))
    everything = {"rows": merged, "extra": old["extra"] | extra}
    path.write_text(json.dumps(everything, indent=1) + "\n")
    table = folder / f"{name}.md"
    table.write_text(markdown(title, everything))
    return table


def save_table(name: str, lines: Sequence[str], figures: dict[str, Any], *, threads: int, quick: bool) -> str:
    """Writes a table with its environment below, as `results/NAME.md`, and the figures beside it as JSON. Returns the
    page. Runs with tiny sizes have a folder of their own.
    """
    where = environment(threads)
    about = [where["cpu"], f"{threads} threads", f"torch {where['torch']}", where["commit"], where["date"]]
    page = "\n".join([*lines, "", ", ".join(map(str, about)) + "."])
    folder = HERE / "results" / ("quick" if quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(figures | dict(environment=where), indent=1) + "\n")
    (folder / f"{name}.md").write_text(page + "\n")
    return page


def write_page(folder: Path) -> None:
    """All tables of a folder on one page beside it: `results.md`."""
    pages = [path.read_text().replace("](", f"]({folder.name}/") for path in sorted(folder.glob("*.md"))]
    folder.with_suffix(".md").write_text("\n".join(pages))


def markdown(title: str, results: dict[str, Any]) -> str:
    lines = [f"# {title}", ""]
    if results["rows"]:
        lines += main_table(results["rows"])
    for name, study in results["extra"].items():
        lines += ["", f"## {name}", "", *study["lines"]]
    lines += ["", "## What was run", "", *notes(results["rows"])]
    lines += ["", "## Where", "", *places(results)]
    return "\n".join(lines) + "\n"


def main_table(rows: list[dict]) -> list[str]:
    lines = [
        "Seconds are medians. The limit is the matrix products of ours alone. Rates are of ours. Memory is what a run",
        "needs above weights, data and optimizer state, at its peak, in MiB. A target stands in brackets. Compilation",
        "is not in the seconds of the compiled model.",
        "",
        "| workload | ours s | compiled s | peer s | limit s | rate | peer / ours | ours / limit "
        "| peer / compiled | compiled / limit | MiB ours | MiB peer | MiB ours / peer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        sides, ratios, targets = entry["sides"], entry["ratios"], entry["targets"]
        cells = [
            entry["workload"],
            *(cell(seconds(entry, side)) for side in ("ours", "compiled", "peer", "limit")),
            rate(sides.get("ours", {})),
            against(ratios["peer / ours"], targets["peer"], ">="),
            against(ratios["ours / limit"], targets["limit"], "<="),
            *(cell(ratios.get(name), 2) for name in ("peer / compiled", "compiled / limit")),
            *(cell(needed(entry, side), 0) for side in ("ours", "peer")),
            against(ratios["memory ours / peer"], targets["memory"], "<="),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def notes(rows: list[dict]) -> list[str]:
    """Parameters, failures and remarks of every side."""
    lines = []
    for entry in rows:
        for side, figures in entry["sides"].items():
            if facts := facts_of(figures):
                lines.append(f"- {entry['workload']}, {side}: {'; '.join(facts)}")
    return lines


def facts_of(figures: dict[str, Any]) -> list[str]:
    facts = []
    if "parameters" in figures:
        facts.append(f"{figures['parameters'] / 1e6:.2f}M parameters, version {figures['version']}")
    if "gflop" in figures:
        facts.append(f"{figures['products']:,} products, {figures['gflop']:,} GFLOP")
    if figures.get("unknown"):
        facts.append(f"not counted: {', '.join(figures['unknown'])}")
    if (figures.get("check") or {}).get("structure"):
        facts.append(f"structure of the samples {figures['check']['structure']}")
    facts += [figures[key] for key in ("note", "error") if figures.get(key)]
    if (figures.get("memory") or {}).get("error"):
        facts.append(f"memory: {figures['memory']['error']}")
    return facts


def places(results: dict[str, Any]) -> list[str]:
    """Every environment once, with what was run in it."""
    by_place: dict[str, list[str]] = {}
    named = [(entry["workload"], entry["environment"]) for entry in results["rows"]]
    named += [(name, study["environment"]) for name, study in results["extra"].items()]
    for name, where in named:
        day = where | {"date": where["date"].split()[0]}
        by_place.setdefault(", ".join(f"{key} {value}" for key, value in day.items()), []).append(name)
    return [f"- {', '.join(names)}: {place}" for place, names in by_place.items()]


def cell(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def against(value: float | None, target: float | None, sign: str) -> str:
    aim = "" if target is None else f" ({sign} {target:.2g})"
    return f"{'-' if value is None else f'{value:.2f}'}{aim}"


def seconds(row: dict[str, Any], side: str) -> float | None:
    return row["sides"].get(side, {}).get("median")


def needed(row: dict[str, Any], side: str) -> float | None:
    return (row["sides"].get(side, {}).get("memory") or {}).get("needed")


def rate(side: dict[str, Any]) -> str:
    work = side.get("check") or {}
    if not side.get("median") or "work" not in work:
        return "-"
    return f"{work['work'] / side['median']:.4g} {work['unit']}/s"
