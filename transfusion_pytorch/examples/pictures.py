"""Pictures of a run: grids of images, and curves of its losses. Nothing here needs a display.

n images, c channels (1 grey, 3 red green blue), h height, w width; pixels are in [-1, 1].
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from .run import optional

GAP = 8  # pixels between the cells of a grid
LABEL_HEIGHT = 20
LABEL_SIZES = range(14, 8, -1)  # of the font; the first that fits the cell is taken
INK, RED = "#222222", "#c0392b"
COLOURS = ("#1f6fb4", "#e07b26", "#2f9e5b", "#b8405e", "#7a5cab", "#7d7d7d")


def save_grid(
    path: str | Path,
    images: Float[Tensor, "n c h w"],
    labels: Sequence[object] | Int[Tensor, " n"] | None = None,
    *,
    columns: int = 10,
    correct: Bool[Tensor, " n"] | None = None,
    smallest: int = 64,
) -> Path:
    """Writes a PNG of all images, row by row, each with its label above it, in red where it is not `correct`.

    Small images are enlarged a whole number of times, to at least `smallest` pixels, and stay sharp.
    """
    check_grid(images, labels, correct, columns)
    image_module, draw_module = optional("PIL.Image"), optional("PIL.ImageDraw")
    count, _, height, width = images.shape
    pixels = to_bytes(images, scale=max(1, math.ceil(smallest / max(height, width))))
    columns = min(columns, count)
    top = 0 if labels is None else LABEL_HEIGHT
    cell_height, cell_width = pixels.shape[1] + top + GAP, pixels.shape[2] + GAP
    size = (columns * cell_width + GAP, math.ceil(count / columns) * cell_height + GAP)
    sheet = image_module.new("RGB", size, "white")
    draw = draw_module.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, columns)
        left, upper = GAP + column * cell_width, GAP + row * cell_height
        sheet.paste(image_module.fromarray(pixels[index].numpy()), (left, upper + top))
        if labels is not None:
            ink = INK if correct is None or correct[index] else RED
            write_label(draw, plain(labels[index]), left + pixels.shape[2] / 2, upper + top / 2, pixels.shape[2], ink)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def load_picture(path: str | Path) -> UInt8[Tensor, "h w 3"]:
    """A picture that was written, as trackers take it."""
    image = optional("PIL.Image").open(path).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


def check_grid(images: Tensor, labels: Any, correct: Tensor | None, columns: int) -> None:
    if len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images of shape (n, 1 or 3, h, w) with n > 0, got {tuple(images.shape)}")
    for name, given in (("labels", labels), ("correct", correct)):
        if given is not None and len(given) != len(images):
            raise ValueError(f"expected one of {name} for each of {len(images)} images, got {len(given)}")
    if columns < 1:
        raise ValueError(f"expected at least 1 column, got {columns}")


def to_bytes(images: Float[Tensor, "n c h w"], *, scale: int) -> Tensor:
    """(n, c, h, w) in [-1, 1] -> (n, scale h, scale w, 3) in 0 to 255, on the CPU."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    coloured = levels.expand(-1, 3, -1, -1)
    return repeat(coloured, "n c h w -> n (h y) (w x) c", y=scale, x=scale).contiguous()


def plain(label: Any) -> str:
    """In one line: what a model answers may have several."""
    return " ".join(str(label.item() if isinstance(label, Tensor) else label).split())


def write_label(draw: Any, text: str, middle: float, centre: float, room: int, ink: str) -> None:
    """Writes a line around a point, smaller or cut where `room` pixels are too few."""
    load_font = optional("PIL.ImageFont").load_default
    fonts = [load_font(size) for size in LABEL_SIZES]
    font = next((font for font in fonts if draw.textlength(text, font=font) <= room), fonts[-1])
    while len(text) > 1 and draw.textlength(text, font=font) > room:
        text = text.rstrip("…")[:-1] + "…"
    draw.text((middle, centre), text, fill=ink, font=font, anchor="mm")


def save_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[Any]],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "loss",
    log: bool = False,
) -> Path:
    """Writes a PNG of named series, each smoothed over a twentieth of its length, with the raw one faintly behind.

    A series holds numbers, at x = 1, 2, 3, ..., or pairs (x, number). It may be empty; what is not finite is left out.
    """
    figure = optional("matplotlib.figure").Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, series) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        x, y = points(series)
        few = len(y) < 40
        if not few:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.22)
            y = smooth(y, radius=len(y) // 40)
        if y:
            axes.plot(x, y, color=colour, linewidth=1.8, marker="o" if few else "", markersize=4, label=name)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_yscale("log" if log else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if axes.lines:
        axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def points(series: Sequence[Any]) -> tuple[list[float], list[float]]:
    """[5, 4] -> [1, 2], [5, 4] and [(10, 5), (20, 4)] -> [10, 20], [5, 4]; without what is not finite."""
    pairs = (value if isinstance(value, (tuple, list)) else (index, value) for index, value in enumerate(series, 1))
    finite = [(float(x), float(y)) for x, y in pairs if math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def smooth(values: Sequence[float], *, radius: int) -> list[float]:
    """The mean over `radius` values on either side, and near an end over as few as a quarter of them.

    With radius 1: [3, 0, 3, 6] -> [3, 2, 3, 6]. Long means at the ends would start below a falling curve.
    """
    count = len(values)
    sums = [0.0, *torch.tensor(values, dtype=torch.float64).cumsum(0).tolist()]
    reach = [max(radius // 4, min(radius, i, count - 1 - i)) for i in range(count)]
    spans = [(max(0, i - r), min(count, i + r + 1)) for i, r in enumerate(reach)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
