"""Sizes and data of the GPU benchmark. Needs torch alone: the interpreter of the PyPI package imports it as well."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from training_jobs import CHANNELS, marker_tokens

SAMPLE_MARKERS = 2  # sos, eos


@dataclass(frozen=True)
class Size:
    """A model and the batches it is trained on: `token_budget` tokens a step, images of `(side, side)` latents."""

    name: str
    transformer: dict[str, Any]
    vocabulary: int = 49_152
    token_budget: int = 32_768
    side: int = 16

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What both packages are given."""
        return dict(num_text_tokens=self.vocabulary, dim_latent=CHANNELS, modality_default_shape=(self.side, self.side))

    def with_budget(self, token_budget: int) -> "Size":
        return replace(self, token_budget=token_budget)


# A name counts the weights that a token is multiplied with, logits included, as those of a language model are counted.
# Modulations are made once for each span, and embeddings are looked up: the page gives the number of all parameters.
SMALL = Size("135M", dict(dim=576, depth=30, heads=9, dim_head=64, kv_heads=3, ff_expansion_factor=3.5))
LARGE = Size("1B", dict(dim=2048, depth=16, heads=32, dim_head=64, kv_heads=8))

TINY = dict(dim=64, depth=2, heads=2, dim_head=32, kv_heads=1)
QUICK_SMALL = Size("135M", TINY, vocabulary=256, token_budget=1024, side=8)
QUICK_LARGE = Size("1B", TINY | dict(dim=96), vocabulary=256, token_budget=1024, side=8)


class MixedSample(NamedTuple):
    """Captions and images in turns. `length` counts the tokens with markers, `latents` those of the images."""

    parts: list[Tensor]
    length: int
    latents: int


def mixed_samples(size: Size, generator: torch.Generator) -> list[MixedSample]:
    """One batch of exactly `token_budget` tokens: samples of 1 to 4 captioned images, about half of it latents.

    What does not fit any more becomes one text.
    """
    samples, left = [], size.token_budget
    while left > SAMPLE_MARKERS:
        sample = _captioned_images(size, generator)
        if sample.length > left:
            ids = torch.randint(size.vocabulary, (left - SAMPLE_MARKERS,), generator=generator)
            sample = MixedSample([ids], left, 0)
        samples.append(sample)
        left -= sample.length
    return samples


def _captioned_images(size: Size, generator: torch.Generator) -> MixedSample:
    latents, markers = size.side**2, marker_tokens((size.side, size.side))
    mean = max(latents - markers, 4)  # then text and markers are as many tokens as the image
    images = int(torch.randint(1, 5, (), generator=generator))
    captions = torch.randint(mean * 3 // 4, mean * 5 // 4 + 1, (images,), generator=generator).tolist()
    parts = []
    for caption in captions:
        parts.append(torch.randint(size.vocabulary, (caption,), generator=generator))
        parts.append(torch.randn(size.side, size.side, CHANNELS, generator=generator))
    length = SAMPLE_MARKERS + sum(captions) + images * (latents + markers)
    return MixedSample(parts, length, images * latents)


def text_of(sample: MixedSample, size: Size, generator: torch.Generator) -> list[Any]:
    """Text of the same length, every token of which is to be predicted."""
    return [torch.randint(size.vocabulary, (sample.length - SAMPLE_MARKERS,), generator=generator)]


def causal_twin(sample: MixedSample, size: Size, generator: torch.Generator) -> list[Any]:
    """Text of the same length and with as many text targets: what were latents is read and not predicted.

    Attention is plain causal attention. Without this, text would have twice the logits of a mixed sample.
    """
    from transfusion_pytorch import Condition

    (ids,) = text_of(sample, size, generator)
    if not sample.latents:
        return [ids]
    return [Condition(ids[: sample.latents]), ids[sample.latents :]]
