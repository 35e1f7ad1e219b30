"""The pictures beside the table of training: where each side stands, and how time and memory grow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from report import needed, seconds

SIDES = {"ours": "#3b6fb6", "compiled": "#7fb2e5", "peer": "#c8553d"}


def draw_ratios(rows: dict[str, dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Each side's time in units of the matrix products alone."""
    limits = {name: seconds(rows[name], "limit") for name in names if name in rows}
    names = [name for name, limit in limits.items() if limit]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for i, (side, color) in enumerate(SIDES.items()):
        times = [seconds(rows[name], side) for name in names]
        places = [(place, time / limits[names[place]]) for place, time in enumerate(times) if time]
        if places:
            bars = axes.bar(
                [x + 0.27 * (i - 1) for x, _ in places], [y for _, y in places], 0.25, label=side, color=color
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="time / matrix products alone", xticks=range(len(names)), xticklabels=names)
    axes.legend()
    save(figure, path)


def draw_growth(rows: dict[str, dict[str, Any]], sizes: dict[str, Sequence[int]], path: Path) -> None:
    """Seconds and memory of a step by length, and by the number of samples."""
    figure, axes = plt.subplots(2, len(sizes), figsize=(8, 5.5), layout="constrained", squeeze=False)
    for column, (kind, every) in enumerate(sizes.items()):
        for side in ("ours", "peer"):
            known = {size: rows[f"{kind}-{size}"] for size in every if f"{kind}-{size}" in rows}
            draw_line(axes[0, column], {size: seconds(row, side) for size, row in known.items()}, side)
            draw_line(axes[1, column], {size: needed(row, side) for size, row in known.items()}, side)
        for row, label in enumerate(("seconds", "MiB")):
            axes[row, column].set(
                xscale="log", yscale="log", xlabel=kind, ylabel=label, xticks=every, xticklabels=every
            )
            axes[row, column].minorticks_off()
            axes[row, column].set_yticks([])
            axes[row, column].margins(0.12)
    if axes[0, 0].lines:
        axes[0, 0].legend()
    save(figure, path)


def draw_line(axes: Any, values: dict[int, float | None], side: str) -> None:
    known = {size: value for size, value in values.items() if value is not None}
    if known:
        axes.plot(list(known), list(known.values()), "o-", label=side, color=SIDES[side])
        for size, value in known.items():
            text = f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
            axes.annotate(text, (size, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
