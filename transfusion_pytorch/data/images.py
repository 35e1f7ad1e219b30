"""Images as tensors: opened right, brought to a size that a model takes, and cut into patches.

h height, w width, c channels, p side of a patch. Pixels are in [-1, 1], channels last.
"""

import marshal
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.modalities.patches import patchify, unpatchify  # noqa: F401 - for whoever has images
from transfusion_pytorch.saving.components import qualified_name, register_component

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # height, width
Mode = Literal["RGB", "L"]

ORIENTATION = 0x0112  # the EXIF tag; from 5 on, height and width are exchanged
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, struct.error)  # what Pillow raises
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# sizes


@runtime_checkable
class Sizing(Protocol):
    """The size to which an image of some size is brought: it is scaled to cover that, and cropped around its centre."""

    def __call__(self, size: Size) -> Size: ...


@register_component
@dataclass(frozen=True)
class FixedSize:
    """Every image becomes `height` x `width`."""

    height: int
    width: int

    def __call__(self, size: Size) -> Size:
        return self.height, self.width


@register_component
@dataclass(frozen=True)
class BucketedSize:
    """The best of a few sizes of about `area` pixels, by aspect ratio, so that little is cropped.

    Sides are multiples of `multiple` (of the patch), and neither is more than `max_aspect` times the other.
    """

    area: int
    multiple: int
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError(f"no size of about {self.area} pixels has sides that are multiples of {self.multiple}")

    @cached_property
    def sizes(self) -> list[Size]:
        """For each short side, the long side that comes closest to the area; lying and standing."""
        most = int(math.sqrt(self.area)) // self.multiple
        short = [self.multiple * count for count in range(1, most + 1)]
        pairs = [(side, self.multiple * round(self.area / side / self.multiple)) for side in short]
        kept = [(side, long) for side, long in pairs if side <= long <= side * self.max_aspect]
        return sorted({*kept, *((long, side) for side, long in kept)})

    def __call__(self, size: Size) -> Size:
        aspect = math.log(size[1] / size[0])
        return min(self.sizes, key=lambda bucket: (abs(math.log(bucket[1] / bucket[0]) - aspect), bucket))


@register_component
@dataclass(frozen=True)
class NativeSize:
    """The image's own size, cropped to multiples of `multiple` (of the patch), and scaled only where its area is below
    `min_area` or above `max_area`, which are in pixels.
    """

    multiple: int
    min_area: int
    max_area: int

    def __post_init__(self) -> None:
        if not self.multiple**2 <= self.min_area <= self.max_area:
            raise ValueError(
                f"expected multiple² <= min_area <= max_area, got {self.multiple}², {self.min_area}, {self.max_area}"
            )

    def __call__(self, size: Size) -> Size:
        area = size[0] * size[1]
        scale = math.sqrt(min(max(area, self.min_area), self.max_area) / area)
        height, width = self._fitted(size[0] * scale), self._fitted(size[1] * scale)
        # a side that was raised to `multiple` takes what the other then cannot have
        return min(height, self._fitted(self.max_area / width)), min(width, self._fitted(self.max_area / height))

    def _fitted(self, side: float) -> int:
        return self.multiple * max(1, math.floor(side / self.multiple + 1e-9))


# reading


@dataclass(frozen=True)
class ImageReader:
    """The bytes of an image file, or a Pillow image, to a tensor `(h, w, c)`.

    - `size`: a side for squares, or what chooses the size: `FixedSize`, `BucketedSize`, `NativeSize`
    - `mode`: "RGB" (three channels) or "L" (one, luminance)
    - `patch_size`: cuts the image into patches, `(h / p, w / p, c * p * p)`: latents for a model without an encoder
    - `channels_first`: `(c, h, w)`, as most encoders take it
    """

    size: int | Sizing
    mode: Mode = "RGB"
    patch_size: int | None = None
    channels_first: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("RGB", "L"):
            raise ValueError(f'mode is "RGB" or "L", got {self.mode!r}')
        for name, value in (("size", self.size), ("patch_size", self.patch_size)):
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is at least 1 pixel, got {value}")
        if not isinstance(self.size, int) and not callable(self.size):
            raise TypeError(f"size is a side in pixels or chooses a size, got {type(self.size).__name__}")
        if self.patch_size is not None and self.channels_first:
            raise ValueError("patches have their channels last; leave out patch_size or channels_first")

    def __call__(self, data: "bytes | Image") -> Float[Tensor, "..."]:
        """Raises `SkipSample` where the image is broken."""
        image = decode_image(data, mode=self.mode) if isinstance(data, bytes) else convert_image(data, self.mode)
        pixels = to_pixels(fit(image, self._size_for((image.height, image.width))))
        if self.channels_first:
            return pixels.movedim(-1, 0).contiguous()
        return pixels if self.patch_size is None else patchify(pixels.movedim(-1, 0), self.patch_size)

    def settings(self) -> list[str]:
        """What its images depend on, the same in every process: functions by their names and what they do."""
        return [_described(self.size), self.mode, str(self.patch_size), str(self.channels_first)]

    def shape_of(self, size: Size) -> tuple[int, ...]:
        """The shape that an image of some size gets."""
        (height, width), channels, patch = self._size_for(size), len(self.mode), self.patch_size
        if self.channels_first:
            return channels, height, width
        return (height, width, channels) if patch is None else (height // patch, width // patch, channels * patch**2)

    def _size_for(self, size: Size) -> Size:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size(size)
        if self.patch_size is not None and (height % self.patch_size or width % self.patch_size):
            raise ValueError(
                f"patches of {self.patch_size}x{self.patch_size} do not divide images of {height}x{width}; "
                "set the multiple of the size to that of the patch"
            )
        return height, width


def _described(sizing: Any) -> str:
    """`repr`, without the address in memory that functions have there."""
    code = getattr(sizing, "__code__", None)
    if code is None:
        return repr(sizing)
    around = [cell.cell_contents for cell in sizing.__closure__ or ()]
    done = blake2b(marshal.dumps(code), digest_size=16).hexdigest()  # two lambdas may have one name
    return f"{qualified_name(sizing)} {done} {sizing.__defaults__} {sizing.__kwdefaults__} {around}"


def decode_image(data: bytes, *, mode: Mode = "RGB") -> "Image":
    """The image in a file's bytes: turned as its EXIF orientation says, on white where it is transparent, in 8 bits.

    Of an animation, the first frame. Raises `SkipSample` where the data are cut off or no image.
    """
    return _reading(data, lambda image: convert_image(image, mode))


def size_of_image(data: bytes) -> Size:
    """Height and width as `decode_image` would give them, from the header alone. Errors as there."""
    return _reading(data, turned_size)


def fit(image: "Image", size: Size) -> "Image":
    """Scales an image, antialiased, until it covers a size, and crops it around its centre."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    lanczos = import_optional("PIL.Image", extra="data").Resampling.LANCZOS
    return import_optional("PIL.ImageOps", extra="data").fit(image, (width, height), method=lanczos)


def to_pixels(image: "Image") -> Float[Tensor, "h w c"]:
    """An 8-bit image as numbers from -1 to 1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, len(image.getbands())).float() / 127.5 - 1


def _reading(data: bytes, read: Callable[["Image"], Any]) -> Any:
    module = import_optional("PIL.Image", extra="data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; what cannot be read is an error as well
        try:
            with module.open(BytesIO(data)) as image:
                if image.format == "TIFF":  # loading turns it, and no other kind
                    image.load()
                return read(image)
        except (*BROKEN, module.DecompressionBombError) as error:
            raise SkipSample(f"not a whole image: {error}") from error


def turned_size(image: "Image") -> Size:
    """Height and width of an image once it is turned as its EXIF orientation says."""
    is_turned = image.getexif().get(ORIENTATION, 1) >= 5
    return (image.width, image.height) if is_turned else (image.height, image.width)


def convert_image(image: "Image", mode: Mode) -> "Image":
    """Turned as its EXIF orientation says, on white where it is transparent, in 8 bits."""
    image = import_optional("PIL.ImageOps", extra="data").exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # which is a value of 16 bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = import_optional("PIL.Image", extra="data").new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert(mode)
