"""Images with captions, wherever they come from, as samples: images to draw from captions, captions of images, or both.

A subclass says where the bytes of an image and its captions are; see `CaptionedImages`, `WebDatasetTars` and
`HuggingFaceImages`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from transfusion_pytorch.data.images import ImageReader, Size, size_of_image
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.data.order import generator_of, shuffled
from transfusion_pytorch.data.text import ByteText, TextCodec
from transfusion_pytorch.sequence.samples import Sample


class ImageCaptionPairs(Dataset, ABC):
    """Samples `[caption, image]`, to draw, or `[image, caption]`, to describe.

    - `images`: an `ImageReader`, or the side of squares in pixels
    - `text`: turns captions into ids; bytes by default
    - `prob_describe`: how often a sample is `[image, caption]`: 0 is only to draw, 1 only to describe
    - `modality_type`: of the images

    Which of several captions, and which way round, depends on a sample's position in the stream (`dataset[i]`: on `i`).
    An image without caption is a sample of its own. Broken images are left out and reported (`SkipSample`).
    """

    def __init__(
        self,
        *,
        images: ImageReader | int,
        text: TextCodec | None = None,
        prob_describe: float = 0.0,
        modality_type: int = 0,
    ):
        if not 0 <= prob_describe <= 1:
            raise ValueError(f"prob_describe is a probability, got {prob_describe}")
        self.images = images if isinstance(images, ImageReader) else ImageReader(images)
        self.text: TextCodec = ByteText() if text is None else text
        self.prob_describe, self.modality_type = prob_describe, modality_type
        self._sizes: dict[int, Size | str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_image(self, index: int) -> bytes:
        """The bytes of the image file."""

    @abstractmethod
    def captions(self, index: int) -> Sequence[str]:
        """The captions of an image, none, one or several."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where an image comes from, for messages."""

    @abstractmethod
    def data_key(self) -> Any:
        """What changes when the images do, as JSON."""

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, generator_of(0, index))

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        return self.arrange(index, self.modalities(index), generator)

    def modalities(self, index: int) -> list[Any]:
        """The image as it is on every visit: what `cache_latents` keeps."""
        try:
            return [(self.modality_type, self.images(self.read_image(index)))]
        except SkipSample as reason:
            raise SkipSample(f"{self.describe(index)}: {reason}") from reason

    def arrange(self, index: int, modalities: list[Any], generator: torch.Generator) -> Sample:
        """The image and one of its captions, as this visit has them."""
        parts = arrange_pair(modalities, self.captions(index), self.text, self.prob_describe, generator)
        return Sample(parts, name=self.describe(index))

    def outline(self, index: int, generator: torch.Generator) -> Sample:
        """The sample with its image on the `meta` device, whose shape the header of the file says."""
        image = torch.empty(self.images.shape_of(self.image_size(index)), device="meta")
        return self.arrange(index, [(self.modality_type, image)], generator)

    def image_size(self, index: int) -> Size:
        """Height and width of the file's image, from its header; remembered. Raises `SkipSample`."""
        if index not in self._sizes:
            try:
                self._sizes[index] = size_of_image(self.read_image(index))
            except SkipSample as reason:
                self._sizes[index] = f"{self.describe(index)}: {reason}"
        size = self._sizes[index]
        if isinstance(size, str):
            raise SkipSample(size)
        return size

    def fingerprint(self) -> str:
        """Changes with the images and how they are read: with what `modalities` gives."""
        content = self.data_key(), self.images.settings(), self.modality_type
        return blake2b(repr(content).encode(), digest_size=16).hexdigest()


class Selection(ImageCaptionPairs):
    """Some of the images of other pairs, such as those that are held out."""

    def __init__(self, pairs: ImageCaptionPairs, indices: Sequence[int]):
        super().__init__(images=pairs.images, text=pairs.text, prob_describe=pairs.prob_describe)
        self.modality_type = pairs.modality_type
        self.pairs, self.indices = pairs, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read_image(self, index: int) -> bytes:
        return self.pairs.read_image(self.indices[index])

    def captions(self, index: int) -> Sequence[str]:
        return self.pairs.captions(self.indices[index])

    def describe(self, index: int) -> str:
        return self.pairs.describe(self.indices[index])

    def data_key(self) -> Any:
        return [self.pairs.data_key(), self.indices]


def hold_out(pairs: ImageCaptionPairs, count: int, *, seed: int = 0) -> tuple[Selection, Selection]:
    """All but `count` images to train on, and those `count` to validate on, which the seed chooses.

    Raises `ValueError` where nothing would be left to train on.
    """
    if not 0 <= count < len(pairs):
        raise ValueError(f"{count} images cannot be held out of {len(pairs)}: hold out fewer")
    order = shuffled(len(pairs), seed, "held out").tolist()
    return Selection(pairs, sorted(order[count:])), Selection(pairs, sorted(order[:count]))


def arrange_pair(
    modalities: list[Any], captions: Sequence[str], text: TextCodec, prob_describe: float, generator: torch.Generator
) -> list[Any]:
    """`[caption, image]` or, as often as `prob_describe` says, `[image, caption]`, with one of the captions."""
    choice, order = torch.rand(2, generator=generator).tolist()
    ids = text.encode(captions[int(choice * len(captions))]) if captions else []
    if not len(ids):
        return modalities
    return [*modalities, ids] if order < prob_describe else [ids, *modalities]


def clean_captions(value: Any, where: str) -> list[str]:
    """A caption or a list of them, without blank ones and None. Raises `ValueError`, which begins with `where`, for
    what is no text.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    given = [each for each in values if each is not None]
    if other := [each for each in given if not isinstance(each, str)]:
        raise ValueError(f"{where}: a caption is text, got {other[0]!r:.80}, a {type(other[0]).__name__}")
    return [each.strip() for each in given if each.strip()]


def stamp_of(path: Path) -> list[int]:
    """Size and time of change of a file: they differ when the file does, as far as one can tell without reading it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
