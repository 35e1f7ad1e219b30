"""Tensors as pictures, and whatever a renderer returns as HTML.

h height, w width, c channels (1 grey, 3 red green blue, 4 with opacity).
"""

import importlib
import math
import sys
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from html import escape
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by channels
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def render_image(
    *, channel_first: bool = False, value_range: tuple[float, float] = (-1.0, 1.0)
) -> Callable[[Tensor], Any]:
    """Makes a renderer of ordinary images: from a tensor (h, w, c), or (c, h, w) if `channel_first`, to a PIL image.

    c is 1 (grey), 3 (red, green, blue) or 4 (with opacity). `value_range` holds what is black and what is white; values
    beyond are clamped, and NaN is black. The renderer raises `ValueError` for other shapes, `TypeError` for what is not
    floating point, and `ImportError` where Pillow is missing.
    """
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError) as error:
        raise TypeError(f"value_range: expected two numbers, of black and of white, got {value_range!r}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range: expected two finite numbers, the lower one first, got {value_range!r}")
    return partial(to_picture, channel_first=channel_first, low=low, high=high)


def to_picture(tensor: Tensor, *, channel_first: bool, low: float, high: float) -> Any:
    """Floats (h, w, c) or (c, h, w) between `low` and `high` -> a PIL image."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"render_image: expected a floating point tensor, got {got}")
    place, axis, other = ("(c, h, w)", 0, -1) if channel_first else ("(h, w, c)", -1, 0)
    if tensor.ndim != 3 or tensor.shape[axis] not in MODES or not tensor.numel():
        swapped = tensor.ndim == 3 and tensor.shape[other] in MODES and tensor.shape[other] < tensor.shape[axis]
        own = "write a renderer that returns a PIL image"
        hint = f"say render_image(channel_first={not channel_first})" if swapped else own
        raise ValueError(
            f"render_image: expected an image {place} of 1, 3 or 4 channels, got shape {tuple(tensor.shape)}; {hint}"
        )
    return picture_of(levels((tensor.detach().cpu().movedim(axis, -1).float() - low) / (high - low)))


def levels(values: Tensor) -> Tensor:
    """Floats from 0 to 1 -> uint8 from 0 to 255, rounded; NaN -> 0."""
    return (values.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def picture_of(pixels: Tensor) -> Any:
    """uint8 (h, w, c) -> a PIL image."""
    height, width, channels = pixels.shape
    # through a list: torch's own arrays would need numpy
    return pillow().frombytes(MODES[channels], (width, height), bytes(pixels.reshape(-1).tolist()))


def pillow() -> Any:
    """The module `PIL.Image`, or an `ImportError` with the extra to install."""
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise ImportError(
            'pictures need Pillow, which is not installed: pip install "transfusion-pytorch[notebook]"'
        ) from error


def rendered_html(rendered: Any, *, caption: str, smallest: int) -> str:
    """HTML of what a renderer returned; an image has `caption` as its description.

    A PIL image, PNG bytes, a tensor or array of pixels; any object with `_repr_html_`, as it is; or a str, as text.
    """
    if is_pil_image(rendered):
        return image_html(png_of(rendered), caption=caption, smallest=smallest)
    if isinstance(rendered, (bytes, bytearray)):
        return image_html(bytes(rendered), caption=caption, smallest=smallest)
    if isinstance(rendered, Tensor):
        return image_html(png_of(picture_of(pixels_of(rendered, caption))), caption=caption, smallest=smallest)
    if isinstance(rendered, str):
        return f'<div dir="auto" style="white-space:pre-wrap">{escape(rendered)}</div>'
    if isinstance(page := html_of(rendered), str):
        return page
    if hasattr(rendered, "__array__"):
        array = importlib.import_module("numpy").array(rendered)  # a copy: torch warns of one that is read-only
        return rendered_html(torch.from_numpy(array), caption=caption, smallest=smallest)
    raise TypeError(
        f"the renderer of {caption} returned {type(rendered).__name__}; expected a PIL image, PNG bytes, an array or "
        "tensor of pixels, a str, or an object with _repr_html_"
    )


def html_of(rendered: Any) -> Any:
    method = getattr(rendered, "_repr_html_", None)
    return method() if callable(method) and not isinstance(rendered, type) else None


def is_pil_image(rendered: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # whoever has made an image has imported it
    return module is not None and isinstance(rendered, module.Image)


def pixels_of(array: Tensor, caption: str) -> Tensor:
    """uint8, or floats from 0 to 1, of (h, w) or (h, w, c) -> uint8 (h, w, c)."""
    pixels = array.detach().cpu()
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] not in MODES or not pixels.numel():
        raise ValueError(
            f"the renderer of {caption} returned an array of shape {tuple(array.shape)}; "
            "expected (h, w) or (h, w, c) with 1, 3 or 4 channels"
        )
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise TypeError(
            f"the renderer of {caption} returned an array of {array.dtype}; expected uint8, or floats from 0 to 1"
        )
    return pixels if pixels.dtype == torch.uint8 else levels(pixels)


def png_of(image: Any) -> bytes:
    buffer = BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()


def image_html(png: bytes, *, caption: str, smallest: int) -> str:
    """An `<img>` that holds its data, enlarged a whole number of times to at least `smallest` pixels, and sharp."""
    if not png.startswith(PNG_SIGNATURE) or len(png) < 24:
        raise ValueError(f"the renderer of {caption} returned bytes that are no PNG image, beginning {png[:8]!r}")
    width, height = (int.from_bytes(png[place : place + 4], "big") for place in (16, 20))  # of the header
    scale = max(1, math.ceil(smallest / max(1, width, height)))
    sharp = "image-rendering:pixelated;" if scale > 1 else ""
    label = escape(caption)
    return (
        f'<img alt="{label}" title="{label}" width="{width * scale}" height="{height * scale}" '
        f'style="{sharp}max-width:100%;height:auto" src="data:image/png;base64,{b64encode(png).decode()}">'
    )
