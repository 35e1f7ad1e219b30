"""`PictureModel`: a model of text and images as people see it, captions and pictures instead of ids and latents.

h height, w width, c channels, n ids. Pixels are in [-1, 1].
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.data.model_images import has_channels_first, image_reader_of, picture_channels
from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.data.text import ByteText, TextCodec, TokenizerText
from transfusion_pytorch.modalities.patches import PatchEncoder
from transfusion_pytorch.saving.files import whole_file

Picture = Float[Tensor, "_h _w _c"]  # many of them need not be of one size
MOST_LATENTS = 4096  # of a picture, where the model has no default shape
MARKERS = 32  # more than enough for what stands around text and a picture


class Written(NamedTuple):
    """A sample as people see it, its parts in order.

    - `texts`: all its text, as one
    - `pictures`: all its pictures
    """

    text: str
    pictures: list[Picture]


class PictureModel:
    """A model, or its average, that draws from captions and captions pictures. Keyword options of all methods are those
    of `SamplingOptions`.

    - `text`: the codec of its captions; by default the tokenizer that the model was saved with, or bytes
    - `longest_text`: ids that a caption has at most
    - `most_latents`: of a picture; by default four times as many as in the default shape

    Raises `ValueError` for a model whose text nobody can read.
    """

    def __init__(
        self, model: Any, *, text: TextCodec | None = None, longest_text: int = 512, most_latents: int | None = None
    ):
        shapes = [io.spec.default_shape for io in model.modalities]
        usual = max((4 * prod(shape) for shape in shapes if shape is not None), default=MOST_LATENTS)
        self.model, self.longest_text, self.most_latents = model, longest_text, most_latents or usual
        self.text = codec_of(model) if text is None else text
        self.modality = next((io.spec.type for io in model.modalities if picture_channels(io)), None)

    @property
    def reader(self) -> ImageReader:
        """Reads image files as the model has seen images. Raises `ValueError` for a model without images."""
        reader = image_reader_of(self.model.modalities[self._images()])
        if reader is None:
            raise ValueError("the model does not say how large its images are: it has no modality_default_shape")
        return reader

    def read(self, file: str | Path) -> Picture:
        """An image file. Raises `ValueError` where it is none, and `OSError` where it cannot be read."""
        try:
            return self.reader(Path(file).read_bytes())
        except SkipSample as reason:
            raise ValueError(f"{file} is {reason}") from reason

    def draw(self, captions: Sequence[str], **options: Any) -> list[Picture | None]:
        """A picture for each caption, whose size the model writes itself; None where that is no size."""
        modality, opening = self._images(), torch.tensor([self.model.meta_id])
        prompts = [torch.cat((self._ids(caption), opening)) for caption in captions]
        samples = self._sample(prompts, **options)
        drawn = [[part for part in sample if isinstance(part, tuple) and part[0] == modality] for sample in samples]
        return [self._as_picture(parts[0]) if parts else None for parts in drawn]

    def describe(self, pictures: Sequence[Picture], *, beginning: str = "", **options: Any) -> list[str]:
        """A caption for each picture as `read` gives it, with its `beginning` if there is one."""
        begun = [self._ids(beginning)] if beginning else []
        prompts = [[(self._images(), picture), *begun] for picture in pictures]
        samples = self._sample(prompts, plan=[("text", self.longest_text)], **options)
        return [self.written(sample).text for sample in samples]

    def invent(self, count: int, **options: Any) -> list[Written]:
        """Samples as the model likes them."""
        return [self.written(sample) for sample in self._sample([None] * count, **options)]

    def written(self, sample: Sequence[Any]) -> Written:
        """A sample as people see it: without markers, and without modalities that are no pictures."""
        ids = [part[part < self.model.vocabulary.num_text].cpu() for part in sample if isinstance(part, Tensor)]
        pictures = [self._as_picture(part) for part in sample if isinstance(part, tuple) and part[0] == self.modality]
        return Written(" ".join(filter(None, map(self.text.decode, ids))), pictures)

    def _sample(self, prompts: Sequence[Any], **options: Any) -> list[list[Any]]:
        most = self.most_latents
        if not prompts:
            return []
        longest = max(self.longest_text, *map(self._num_tokens, prompts)) + most + MARKERS  # one picture to be drawn
        return self.model.sample_many(prompts, **(dict(max_length=longest, max_modality_tokens=most) | options))

    def _num_tokens(self, prompt: Any) -> int:
        """What a prompt takes up: ids of its text, latents of its pictures."""
        parts = prompt if isinstance(prompt, list) else [prompt]
        return sum(
            len(part) if isinstance(part, Tensor) else self._num_latents(*part) for part in parts if part is not None
        )

    def _num_latents(self, kind: int, picture: Tensor) -> int:
        io = self.model.modalities[kind]
        if isinstance(io.encoder, PatchEncoder):
            return prod(side // io.encoder.patch_size for side in picture.shape[:2])
        return picture.numel() // io.spec.dim_latent

    def _ids(self, text: str) -> Int[Tensor, " n"]:
        if not text.strip():
            raise ValueError("the prompt is empty")
        return self.text.encode(text)

    def _images(self) -> int:
        if self.modality is None:
            kinds = ", ".join(f"{io.spec.dim_latent} channels, {io.spec.num_dim} axes" for io in self.model.modalities)
            raise ValueError(
                f"the model has no images: those have two axes, and a PatchEncoder or 1 or 3 channels; it has {kinds}"
            )
        return self.modality

    def _as_picture(self, part: tuple[int, Tensor]) -> Picture:
        is_first = has_channels_first(self.model.modalities[part[0]])
        return (part[1].movedim(0, -1) if is_first else part[1]).detach().float().cpu()


def codec_of(model: Any) -> TextCodec:
    """The tokenizer that a model was saved with, or bytes where it has 256 text tokens."""
    if model.tokenizer is not None:
        return model.tokenizer if isinstance(model.tokenizer, TextCodec) else TokenizerText(model.tokenizer)
    if model.vocabulary.num_text != ByteText.num_tokens:
        raise ValueError(
            f"the model has {model.vocabulary.num_text} text tokens and no tokenizer, so nobody can tell what they "
            "mean: save it with one (save_pretrained(folder, tokenizer=...))"
        )
    return ByteText()


def save_picture(path: Path, picture: Picture) -> None:
    """Writes a PNG."""
    module = import_optional("PIL.Image", extra="data")
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = module.fromarray(levels.squeeze(-1).numpy() if levels.shape[-1] == 1 else levels.numpy())
    with whole_file(path) as partial:
        image.save(partial, format="PNG")
