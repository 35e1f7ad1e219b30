"""Labelled images with sentences as captions: a set to try captioned images on that needs no download, and its score.

n images, c channels, h height, w width. Pixels are in [-1, 1].
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.data.pairs import ImageCaptionPairs
from transfusion_pytorch.data.text import TextCodec
from transfusion_pytorch.sequence.samples import Sample

from .data import ImageData, LabelledImages
from .judge import augment, frechet_distance, recognised, train_judge
from .pictures import save_grid
from .run import optional

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {a} is the class with its article, {name} the class alone
TEMPLATES = {
    "digits": ("a picture of {a}", "the digit {name}", "{name}, handwritten", "{a}"),
    "fashion": ("a picture of {a}", "{a}, in grey", "{name} on black", "{a}"),
}
TEMPLATES["mnist"] = TEMPLATES["digits"]


def class_words(data: ImageData) -> tuple[str, ...]:
    """What the classes are called in captions: digits are written out."""
    return NUMBERS if data.class_names == tuple("0123456789") else data.class_names


def sentences(name: str, templates: Sequence[str]) -> list[str]:
    """A caption of a class by each template: "a picture of an ankle boot"."""
    article = "an" if name[0] in "aeiou" and name != "one" else "a"
    return [template.format(a=f"{article} {name}", name=name) for template in templates]


def mentioned_class(caption: str, names: Sequence[str]) -> int | None:
    """The class whose name is in a caption; None for none or several. "t-shirt" does not mention "shirt"."""
    found = [i for i, name in enumerate(names) if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", caption)]
    return found[0] if len(found) == 1 else None


class LabelledCaptions(ImageCaptionPairs):
    """Labelled images as image files in memory, each with a caption by every template.

    With `augments`, images to be described are turned and shifted a little, anew each time; those to be drawn never.
    """

    def __init__(
        self,
        labelled: LabelledImages,
        captions: Sequence[Sequence[str]],
        *,
        images: ImageReader,
        augments: bool,
        **options: Any,
    ):
        super().__init__(images=images, **options)
        self.augments = augments
        self.labels: list[int] = labelled.labels.tolist()
        self._captions = captions
        self._files = [png_of(image) for image in labelled.images]

    def __len__(self) -> int:
        return len(self._files)

    def read_image(self, index: int) -> bytes:
        return self._files[index]

    def captions(self, index: int) -> Sequence[str]:
        return self._captions[self.labels[index]]

    def arrange(self, index: int, modalities: list[Any], generator: torch.Generator) -> Sample:
        sample = super().arrange(index, modalities, generator)
        first, *rest = sample.parts
        if not self.augments or not rest or isinstance(first, Tensor):
            return sample
        moved = augment(first[1].movedim(-1, 0)[None], generator)[0].movedim(0, -1)
        return replace(sample, parts=[(first[0], moved), *rest])

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


def as_one_size(pictures: Sequence[Float[Tensor, "_h _w _c"] | None]) -> Float[Tensor, "n c h w"]:
    """Pictures of any size, each in the upper left corner of a white one that has room for all; white for None."""
    drawn = [picture for picture in pictures if picture is not None] or [torch.ones(8, 8, 1)]
    height, width, channels = (max(picture.shape[axis] for picture in drawn) for axis in range(3))
    sheet = torch.ones(len(pictures), channels, height, width)
    for cell, picture in zip(sheet, pictures, strict=True):
        if picture is not None:
            cell[:, : picture.shape[0], : picture.shape[1]] = picture.movedim(-1, 0)
    return sheet


def some_images(pairs: ImageCaptionPairs, count: int) -> list[tuple[Float[Tensor, "_h _w _c"], Sequence[str]]]:
    """Up to `count` images with their captions, evenly spread over all; without those that are broken or bare."""
    found = []
    for index in range(0, len(pairs), max(1, len(pairs) // max(count, 1))):
        try:
            found.append((pairs.modalities(index)[0][1], pairs.captions(index)))
        except SkipSample:
            continue
    return [(image, captions) for image, captions in found if captions][:count]


# scores. `pictures` is a `PictureModel`; `options` are those of `SamplingOptions`


class Scores(NamedTuple):
    """Shares of what came out right.

    - `drawn`: drawings that show what was asked for; None where nobody can tell
    - `captioned`: captions that say what the image shows; None where there are none to learn from
    - `reference`: real images that the judge of the drawings recognises; None where there is none
    - `distance`: no share, but the Frechet distance of the drawings to as many held-out images, by what the judge sees;
      None where there are not as many
    """

    drawn: float | None
    captioned: float | None
    reference: float | None = None
    distance: float | None = None


def score_labelled(
    pictures: Any,
    data: ImageData,
    held_out: LabelledCaptions,
    *,
    per_class: int,
    seed: int,
    sheet: Path | None,
    options: Mapping[str, Any],
) -> Scores:
    """Drawings are recognised by an independent classifier. Captions of held-out images (at most 1,000) name their
    class, and no other.

    The first drawings are saved as `sheet`, with a red caption where they were not recognised.
    """
    judge, reference = train_judge(data, seed=seed)
    names, generator = class_words(data), torch.Generator().manual_seed(seed)
    labels = torch.arange(len(names)).repeat(per_class)
    captions = [sentences(names[label], TEMPLATES[data.name]) for label in labels.tolist()]
    prompts = [of_class[i // len(names) % len(of_class)] for i, of_class in enumerate(captions)]
    drawn = as_one_size(pictures.draw(prompts, generator=generator, **options))
    size = data.train.images.shape[2:]  # the only one that the judge takes
    sized = drawn if drawn.shape[2:] == size else F.interpolate(drawn, size, mode="area")
    seen = recognised(judge, sized)
    if sheet is not None:
        save_grid(sheet, drawn[:40], prompts[:40], smallest=96, correct=(seen == labels)[:40])
    shown = range(min(len(held_out), 1000))
    images = [held_out.modalities(i)[0][1] for i in shown]
    written = pictures.describe(images, text_temperature=0.0, generator=generator)
    right = sum(mentioned_class(written[i], names) == held_out.labels[i] for i in shown)
    real, distance = data.test.images[: len(sized)], None
    if len(real) == len(sized):
        distance = frechet_distance(judge, sized, real)
    return Scores((seen == labels).float().mean().item(), right / len(shown), reference, distance)


def score_remembered(pictures: Any, pairs: ImageCaptionPairs, *, count: int, seed: int, options: Any) -> Scores:
    """Of images that were trained on: a drawing is right if its image is nearest to it among all (at most 5,000), by
    the mean square of pixels; a caption if it is one of the image's, word for word. Images without captions have no
    score.
    """
    every, generator = some_images(pairs, 5000), torch.Generator().manual_seed(seed)
    if not every:
        return Scores(None, None)
    chosen = range(0, len(every), max(1, len(every) // count))[:count]
    asked = [every[i][1][0] for i in chosen]
    written = pictures.describe([every[i][0] for i in chosen], text_temperature=0.0, generator=generator)
    captioned = sum(text in every[i][1] for text, i in zip(written, chosen, strict=True)) / len(chosen)
    if len({image.shape for image, _ in every}) > 1:
        return Scores(None, captioned)
    flat = torch.stack([image.flatten() for image, _ in every])
    drawn = pictures.draw(asked, generator=generator, **options)
    right = [
        picture is not None
        and picture.numel() == flat.shape[1]
        and caption in every[int((flat - picture.flatten()).square().sum(-1).argmin())][1]
        for picture, caption in zip(drawn, asked, strict=True)
    ]
    return Scores(sum(right) / len(right), captioned)
