"""Images with captions out of Hugging Face `datasets`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.data.pairs import ImageCaptionPairs, arrange_pair, clean_captions
from transfusion_pytorch.data.text import ByteText, TextCodec


class HuggingFaceImages(ImageCaptionPairs):
    """The rows of a `datasets.Dataset` with a column of images, and one of captions: text, lists of text, or classes.

    Images are decoded here, not by `datasets`, so that they are turned, made opaque and reported in the same way. An
    `IterableDataset` goes into a `StreamLoader`, with `CaptionedRow` as its `prepare`. Raises `ValueError` for columns
    that are not there. For the other options, see `ImageCaptionPairs`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        images: ImageReader | int,
        image_column: str = "image",
        text_column: str | None = "text",
        text: TextCodec | None = None,
        prob_describe: float = 0.0,
        modality_type: int = 0,
    ):
        super().__init__(images=images, text=text, prob_describe=prob_describe, modality_type=modality_type)
        for column in (image_column, text_column):
            if column is not None and column not in dataset.column_names:
                raise ValueError(f"no column {column!r}, this dataset has {', '.join(dataset.column_names)}")
        undecoded = import_optional("datasets", extra="hub").Image(decode=False)
        self.dataset = dataset.cast_column(image_column, undecoded)
        self.image_column, self.text_column = image_column, text_column
        feature = None if text_column is None else dataset.features[text_column]
        self.class_names: Sequence[str] | None = getattr(feature, "names", None)
        self._texts = None if text_column is None else self.dataset.select_columns([text_column])

    def __len__(self) -> int:
        return len(self.dataset)

    def read_image(self, index: int) -> bytes:
        return _bytes_of(self.dataset[index][self.image_column])

    def captions(self, index: int) -> Sequence[str]:
        if self._texts is None:
            return []
        return _captions_of(self._texts[index][self.text_column], self.class_names, self.describe(index))

    def describe(self, index: int) -> str:
        return f"row {index}"

    def data_key(self) -> Any:
        return self.dataset._fingerprint


@dataclass(frozen=True)
class CaptionedRow:
    """A row of a stream to a sample: the `prepare` of a `StreamLoader`. Its fields are those of `HuggingFaceImages`.

    `datasets` must not decode the images: `stream.cast_column("image", datasets.Image(decode=False))`.
    """

    images: ImageReader
    image_column: str = "image"
    text_column: str | None = "text"
    text: TextCodec = field(default_factory=ByteText)
    prob_describe: float = 0.0
    modality_type: int = 0
    class_names: Sequence[str] | None = None

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> list[Any]:
        captions = [] if self.text_column is None else _captions_of(row[self.text_column], self.class_names, "a row")
        image = (self.modality_type, self.images(_bytes_of(row[self.image_column])))
        return arrange_pair([image], captions, self.text, self.prob_describe, generator)


def _bytes_of(image: Any) -> bytes:
    if image is None:
        raise SkipSample("no image")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Mapping):
        raise TypeError(
            f"expected the bytes of an image, got {type(image).__name__}; do not let datasets decode it: "
            'cast_column("image", datasets.Image(decode=False))'
        )
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _captions_of(value: Any, class_names: Sequence[str] | None, where: str) -> list[str]:
    """Text, a list of texts, or a class. A negative class is none, as in the test sets of many."""
    if class_names is None:
        return clean_captions(value, where)
    values = value if isinstance(value, list) else [value]
    return clean_captions([class_names[each] for each in values if each is not None and each >= 0], where)
