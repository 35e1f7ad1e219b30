"""How a vision model wants its images: what the configuration of its image processor says.

h height, w width, c channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.data.images import FixedSize, ImageReader, convert_image, decode_image
from transfusion_pytorch.saving.files import load_json

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
BICUBIC = 3  # of Pillow's resampling filters the one that processors have by default


@dataclass(frozen=True)
class ProcessorReader(ImageReader):
    """An `ImageReader` that resizes as a processor of `transformers` does.

    - `shortest_edge`: images are scaled until their shorter side has so many pixels, and cropped around their centre;
      None: they are scaled to the size whatever their aspect ratio is
    - `resample`: the number of one of Pillow's filters
    """

    shortest_edge: int | None = None
    resample: int = BICUBIC

    def __call__(self, data: "bytes | Image") -> Float[Tensor, "..."]:
        image = decode_image(data, mode=self.mode) if isinstance(data, bytes) else convert_image(data, self.mode)
        height, width = self._size_for((image.height, image.width))
        if self.shortest_edge is None:
            return super().__call__(image.resize((width, height), self.resample))
        edge, short = self.shortest_edge, min(image.size)
        image = image.resize((edge * image.width // short, edge * image.height // short), self.resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return super().__call__(image.crop((left, top, left + width, top + height)))

    def settings(self) -> list[str]:
        return [*super().settings(), str(self.shortest_edge), str(self.resample)]


def read_processor(folder: Path) -> Mapping[str, Any]:
    """How images are prepared. Raises `FileNotFoundError` where no file says so."""
    for file in (folder / name for name in PROCESSORS):
        if file.is_file():
            content = load_json(file)
            return content.get("image_processor", content)
    raise FileNotFoundError(
        f"{folder} has no {PROCESSORS[0]}, which says how its images are resized and normalised; load the model with "
        "transformers, and hand it over: VisionEncoder(model, size=..., mean=..., std=...)"
    )


def size_of(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of what the model gets, in pixels."""
    size = _crop_of(processor) or processor.get("size")
    if not isinstance(size, Mapping):
        return None if size is None else (int(size), int(size))
    sides = (size.get("height"), size.get("width")) if "height" in size else (size.get("shortest_edge"),) * 2
    return None if None in sides else sides  # type: ignore[return-value]


def resizing_of(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `ProcessorReader` that say how images come to that size."""
    size, edge = processor.get("size"), None
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
    elif size is not None and _crop_of(processor):
        edge = int(size)
    return dict(shortest_edge=edge, resample=int(processor.get("resample", BICUBIC)))


def scale_of(processor: Mapping[str, Any], channels: int) -> dict[str, Sequence[float] | None]:
    """`mean` and `std` of pixels in [0, 1]."""
    if not processor.get("do_normalize", True):
        return dict(mean=[0.0] * channels, std=[1.0] * channels)
    given = {name: processor.get(f"image_{name}") for name in ("mean", "std")}
    return {name: [each] * channels if isinstance(each, (int, float)) else each for name, each in given.items()}


def image_reader(
    size: tuple[int, int] | None, channels: int, resizing: Mapping[str, Any] | None = None
) -> ImageReader | None:
    """Reads image files of this size, None where there is none or images are no colour or grey ones. `resizing` are the
    fields of a `ProcessorReader`; without, images are cropped.
    """
    modes: dict[int, Any] = {1: "L", 3: "RGB"}
    if size is None or channels not in modes:
        return None
    made: dict[str, Any] = dict(size=FixedSize(*size), mode=modes[channels], channels_first=True)
    return ImageReader(**made) if resizing is None else ProcessorReader(**made, **resizing)


def _crop_of(processor: Mapping[str, Any]) -> Any:
    """What the processor crops images to, if it does."""
    return processor.get("crop_size") if processor.get("do_center_crop", True) else None
