"""Labelled images with sentences as captions: a set to try captioned images on that needs no download, and its score.

n images, c channels, h height, w width. Pixels are in [-1, 1].
"""

import re
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.pairs import ImageCaptionPairs
from transfusion_pytorch.data.text import TextCodec

from .data import ImageData, LabelledImages
from .run import optional

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {a} is the class with its article, {name} the class alone
TEMPLATES = {
    "digits": ("a picture of {a}", "the digit {name}, handwritten", "{name}, written by hand", "someone wrote {a}"),
    "fashion": ("a picture of {a}", "{a}, in grey", "{name} on black", "a photo that shows {a}"),
}
TEMPLATES["mnist"] = TEMPLATES["digits"]


def class_words(data: ImageData) -> tuple[str, ...]:
    """What the classes are called in captions: digits are written out."""
    return NUMBERS if data.class_names == tuple("0123456789") else data.class_names


def sentences(name: str, templates: Sequence[str]) -> list[str]:
    """A caption of a class by each template: "a picture of an ankle boot"."""
    article = "an" if name[0] in "aeiou" else "a"
    return [template.format(a=f"{article} {name}", name=name) for template in templates]


def mentioned_class(caption: str, names: Sequence[str]) -> int | None:
    """The class whose name is in a caption; None for none or several. "t-shirt" does not mention "shirt"."""
    found = [i for i, name in enumerate(names) if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", caption)]
    return found[0] if len(found) == 1 else None


class LabelledCaptions(ImageCaptionPairs):
    """Labelled images as image files in memory, each with a caption by every template."""

    def __init__(
        self, labelled: LabelledImages, captions: Sequence[Sequence[str]], *, images: ImageReader, **options: Any
    ):
        super().__init__(images=images, **options)
        self.labels, self._captions = labelled.labels.tolist(), captions
        self._files = [png_of(image) for image in labelled.images]

    def __len__(self) -> int:
        return len(self._files)

    def read_image(self, index: int) -> bytes:
        return self._files[index]

    def captions(self, index: int) -> Sequence[str]:
        return self._captions[self.labels[index]]

    def describe(self, index: int) -> str:
        return f"image {index}"

    def data_key(self) -> Any:
        return ["labelled", len(self._files), self.labels]


def png_of(image: Float[Tensor, "c h w"]) -> bytes:
    """A grey image as a file."""
    levels = ((image[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    file = BytesIO()
    optional("PIL.Image").fromarray(levels.numpy()).save(file, format="PNG")
    return file.getvalue()


def longest_caption(pairs: ImageCaptionPairs, text: TextCodec, *, look_at: int = 2000) -> int:
    """The ids of the longest caption among the first images."""
    captions = (caption for index in range(min(len(pairs), look_at)) for caption in pairs.captions(index))
    return max((len(text.encode(caption)) for caption in captions), default=0)


def as_one_size(pictures: Sequence[Float[Tensor, "h w c"] | None]) -> Float[Tensor, "n c h w"]:
    """Pictures of any size, each in the upper left corner of a white one that has room for all; white for None."""
    drawn = [picture for picture in pictures if picture is not None] or [torch.ones(8, 8, 1)]
    height, width, channels = (max(picture.shape[axis] for picture in drawn) for axis in range(3))
    sheet = torch.ones(len(pictures), channels, height, width)
    for cell, picture in zip(sheet, pictures, strict=True):
        if picture is not None:
            cell[:, : picture.shape[0], : picture.shape[1]] = picture.movedim(-1, 0)
    return sheet


def share_of_right_captions(captions: Sequence[str], labels: Int[Tensor, " n"], names: Sequence[str]) -> float:
    """How many captions name the class of their image, and no other."""
    found = [mentioned_class(caption, names) for caption in captions]
    return sum(name == label for name, label in zip(found, labels.tolist(), strict=True)) / len(captions)
