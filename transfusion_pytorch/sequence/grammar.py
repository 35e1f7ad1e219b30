"""Which ids may come next, so that every modality gets a valid shape.

Text is free. After `meta` come digits and commas that spell a shape of the right number of axes that is not too large,
then the som marker of a modality that has that many axes. So even an untrained model writes valid shapes only, and
none that is too large.

An opening is what has been written since `meta`: `"4,"`; it is None in text.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from transfusion_pytorch.sequence.samples import Shape
from transfusion_pytorch.sequence.vocabulary import ALPHABET, Vocabulary, format_shape, parse_shape

MARKERS = 4  # of a sample with one modality: sos, meta, som, eom


class MostLatents(NamedTuple):
    """How many latents a written shape may have: `count` of them, or those that fit into `max_length` tokens together
    with all markers and the characters of the shape itself, where `per_token` latents make a token. Never more than
    there are `rows` of noise, if that is given.
    """

    count: int | None
    max_length: int = 0
    per_token: float = 1.0
    rows: int | None = None

    def allows(self, shape: str) -> bool:
        latents = prod(map(int, shape.split(","))) if shape else 1
        if self.rows is not None and latents > self.rows:
            return False
        if self.count is not None:
            return latents <= self.count
        return latents <= self.per_token * (self.max_length - MARKERS - len(shape)) or latents == 1


class Grammar:
    """Which ids may follow an opening, or text.

    `axes`: the numbers of axes that each modality can have, none for one that is not allowed. `most`: how large a
    written shape may be, as a number of latents or `MostLatents`. `fixed_shape`: the only shape allowed, if given.
    Every allowed beginning can be completed: some id is always allowed next, and `som` is reached in the end.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        axes: Sequence[Collection[int]],
        *,
        most: int | MostLatents,
        fixed_shape: Shape | None = None,
    ):
        self.vocabulary, self.axes = vocabulary, axes
        self.most = MostLatents(most) if isinstance(most, int) else most
        self.fixed = None if fixed_shape is None else format_shape(fixed_shape)
        self.counts = sorted({count for counts in axes for count in counts})
        self._masks: dict[Any, Tensor] = {}

    def allowed(self, opening: str | None) -> Bool[Tensor, " v"]:
        """The ids that may come next."""
        if opening is None:
            return self.text(eos=True, meta=any(self.axes))
        ids = frozenset(self._shape_ids(opening))
        if ids not in self._masks:
            self._masks[ids] = self._mask(list(ids))
        return self._masks[ids]

    def text(self, *, eos: bool, meta: bool) -> Bool[Tensor, " v"]:
        """The ids of text, and with them `eos` and `meta` where those are allowed."""
        if (eos, meta) not in self._masks:
            ends = [self.vocabulary.eos] * eos + [self.vocabulary.meta] * meta
            mask = self._mask(ends)
            mask[: self.vocabulary.num_text] = True
            mask[self.vocabulary.eos] = eos  # which is text in a language model
            self._masks[eos, meta] = mask
        return self._masks[eos, meta]

    def advance(self, opening: str | None, token: int) -> str | None:
        """The opening after an allowed id."""
        if token == self.vocabulary.meta:
            return ""
        if opening is not None and self.vocabulary.is_char(token):
            return opening + self.vocabulary.char(token)
        return None

    def _mask(self, ids: list[int]) -> Bool[Tensor, " v"]:
        mask = torch.zeros(self.vocabulary.num_logits, dtype=torch.bool, device="cpu")
        mask[ids] = True
        return mask

    def _shape_ids(self, opening: str) -> list[int]:
        chars = [char for char in ALPHABET if self._may_write(opening + char)]
        ids = [self.vocabulary.first_char + ALPHABET.index(char) for char in chars]
        shape = parse_shape(opening)
        if shape is not None and self.fixed in (None, opening):
            ids += [som for som, axes in zip(self.vocabulary.som, self.axes, strict=True) if len(shape) in axes]
        return ids

    def _may_write(self, text: str) -> bool:
        """Whether `text` can still become a shape: `"3,"` can, if some modality has two axes or more; `"03"` cannot."""
        if self.fixed is not None:
            return self.fixed.startswith(text)
        sizes = text.split(",")
        if any(size.startswith("0") for size in sizes) or "" in sizes[:-1]:
            return False
        return any(self.most.allows(_completed(sizes, count)) for count in self.counts if count >= len(sizes))


def _completed(sizes: Sequence[str], count: int) -> str:
    """The smallest shape of so many axes that begins with these: `["3", ""]` is `"3,1"`."""
    return ",".join([*(size or "1" for size in sizes), *["1"] * (count - len(sizes))])


@lru_cache(maxsize=64)
def shared_grammar(
    vocabulary: Vocabulary, axes: tuple[frozenset[int], ...], most: MostLatents, fixed_shape: Shape | None
) -> Grammar:
    """One grammar for all requests with equal options, so that rows of a batch share their masks."""
    return Grammar(vocabulary, axes, most=most, fixed_shape=fixed_shape)
