"""Images of messages as tensors that a model takes, and what a model draws as pictures.

h height, w width, c channels.
"""

import base64
import binascii
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.data.images import ImageReader, size_of_image, turned_size
from transfusion_pytorch.data.model_images import PICTURE_CHANNELS
from transfusion_pytorch.data.optional import import_optional

Fetch = Callable[[str], bytes]
SHORTEST_BASE64 = 60  # characters of an image; the smallest PNG has 92
BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
URL_DIGITS = str.maketrans("-_", "+/")


def load_image(source: Any, *, root: Path | None = None, fetch: Fetch | None = None) -> Any:
    """What an `ImageReader` takes (bytes, or a Pillow image) of the source of an image; a tensor stays one.

    A path is relative to `root`. `fetch` loads `http` addresses, which are refused without it. Raises `ValueError`,
    `TypeError` or `FileNotFoundError` that says what is wrong with the source.
    """
    if isinstance(source, Tensor):
        if not source.is_floating_point():
            raise TypeError(f"a tensor is an image as the model takes it, in floating point, got {source.dtype}")
        return source
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if isinstance(source, (str, Path)):
        return _load_address(str(source), root, fetch)
    if callable(source):  # of our own datasets, which read files late
        return load_image(source(), root=root, fetch=fetch)
    if hasattr(source, "getbands") and hasattr(source, "convert"):  # Pillow's
        return source
    raise TypeError(f"an image is a path, a data URL, bytes, a Pillow image or a tensor, got {type(source).__name__}")


def _load_address(address: str, root: Path | None, fetch: Fetch | None) -> bytes:
    address = address.strip()
    scheme = _scheme_of(address)
    if scheme == "data":
        return _decode_data_url(address)
    if scheme in ("http", "https"):
        if fetch is None:
            raise ValueError(
                f"the image {address:.80} is on the internet, and nothing is loaded from there by itself: give its "
                "file, or fetch=... to the ConversationFormat, a function from an address to bytes"
            )
        return fetch(address)
    if scheme not in ("", "file"):
        raise ValueError(f"the image {address:.80}: expected a path, a file: or a data: URL, got {scheme}:")
    path = file_of(address, root)
    if path is not None:
        return path.read_bytes()
    shown = address if root is None else str(root / address)
    if len(address) >= SHORTEST_BASE64 and BASE64.fullmatch(address):
        raise ValueError(
            f'there is no image file {address:.40}...; an image as base64 stands behind "data:image/png;base64,"'
        )
    raise FileNotFoundError(f"there is no image file {shown:.200}")


def _scheme_of(address: str) -> str:
    return address.partition(":")[0].lower() if "://" in address or address[:5].lower() == "data:" else ""


def file_of(address: str, root: Path | None) -> Path | None:
    """The file that an address names by its path or a `file:` URL, which is relative to `root`; None where it names
    none, whatever else it is.
    """
    address = address.strip()
    try:
        scheme = _scheme_of(address)
        if scheme not in ("", "file"):
            return None
        path = Path(unquote(urlsplit(address).path) if scheme else address).expanduser()
        path = path if root is None else root / path  # an absolute path stays as it is
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a null byte, the home of nobody
        return None


def _decode_data_url(address: str) -> bytes:
    """Base64 of any usual kind: in lines, percent-encoded, of the alphabet for URLs, without its padding."""
    header, comma, data = address.partition(",")
    if not comma or not header.lower().rstrip().endswith(";base64"):
        raise ValueError(f'expected "data:image/png;base64,...", got {address:.40}')
    digits = "".join(unquote(data).split()).rstrip("=").translate(URL_DIGITS)
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: of what is not ASCII
        raise ValueError(f"the data URL {header} is no base64: {error}") from error


def shape_on_meta(image: Any, reader: ImageReader) -> Tensor:
    """What the reader would make of an image, on the `meta` device; of a file only the header is read."""
    size = size_of_image(image) if isinstance(image, bytes) else turned_size(image)
    return torch.empty(reader.shape_of(size), device="meta")


def as_picture(tensor: Float[Tensor, "..."], *, channels_first: bool = False) -> Any:
    """A Pillow image of pixels in [-1, 1], `(h, w, c)` or `(c, h, w)` with 1 or 3 channels; None for any other tensor.

    Decoders of images differ in where they have the channels: where only one end can be those, it is taken.
    """
    if tensor.ndim != 3:
        return None
    ends = [axis for axis in ((0, -1) if channels_first else (-1, 0)) if tensor.shape[axis] in PICTURE_CHANNELS]
    if not ends or not tensor.numel():
        return None
    pixels = tensor.detach().float().cpu().movedim(ends[0], -1)
    levels = ((pixels.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    height, width, channels = levels.shape
    mode = "L" if channels == 1 else "RGB"
    data = bytes(levels.reshape(-1).tolist())
    return import_optional("PIL.Image", extra="data").frombytes(mode, (width, height), data)
