"""What may be written next, so that every modality has a shape that can be drawn.

Text is free. After `meta` come digits and commas that spell a shape of the right number of axes and of at most
`limit` latents, then the som marker of a modality that has that many axes. An untrained model can neither crash the
sampler nor ask for more memory than it was given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Bool
from torch import Tensor

from transfusion_pytorch.sequence.samples import MAX_AXES, Shape
from transfusion_pytorch.sequence.vocabulary import ALPHABET, Vocabulary, format_shape, parse_shape


@dataclass(frozen=True)
class GrammarState:
    """What has been written since `meta` (None in text), and how many latents the shape may come to."""

    written: str | None = None
    limit: int = 0


class Grammar:
    """Which ids may follow a state.

    `num_dims` is the number of axes of each modality, None where any will do; `fixed_shape` is the only shape to be
    written, if given.
    """

    def __init__(self, vocabulary: Vocabulary, num_dims: Sequence[int | None], *, fixed_shape: Shape | None = None):
        self.vocabulary = vocabulary
        self.fixed = None if fixed_shape is None else format_shape(fixed_shape)
        self.axes = [set(range(MAX_AXES + 1)) if dims is None else {dims} for dims in num_dims]
        self.can_draw = fixed_shape is None or any(len(fixed_shape) in axes for axes in self.axes)
        self.num_fixed = 1 if fixed_shape is None else prod(fixed_shape)
        self._masks: dict[frozenset[int] | bool, Tensor] = {}

    def limit(self, room: int, most: int) -> int:
        """How many latents fit if `meta` is written into `room` tokens: beside them stand meta, shape, som and eom."""
        longest = len(str(max(room, 0))) + 2 * (MAX_AXES - 1) if self.fixed is None else len(self.fixed)
        limit = min(max(most, self.num_fixed), room - 3 - longest)
        return limit if self.can_draw and limit >= self.num_fixed else 0

    def allowed(self, state: GrammarState, limit: int) -> Bool[Tensor, " v"]:
        """The ids that may come next. `limit` is what `limit()` says of the room that is left; 0 forbids `meta`."""
        if state.written is None:
            return self._text_mask(limit > 0)
        ids = frozenset(self._shape_ids(state))
        if ids not in self._masks:
            mask = torch.zeros(self.vocabulary.num_logits, dtype=torch.bool)
            mask[list(ids)] = True
            self._masks[ids] = mask
        return self._masks[ids]

    def advance(self, state: GrammarState, token: int, limit: int) -> GrammarState:
        """The state after an allowed token."""
        if token == self.vocabulary.meta:
            return GrammarState("", limit)
        if state.written is not None and self.vocabulary.is_char(token):
            return replace(state, written=state.written + self.vocabulary.char(token))
        return GrammarState()

    def _text_mask(self, may_draw: bool) -> Tensor:
        if may_draw not in self._masks:
            mask = torch.zeros(self.vocabulary.num_logits, dtype=torch.bool)
            mask[: self.vocabulary.num_text] = True
            mask[self.vocabulary.eos] = True
            mask[self.vocabulary.meta] = may_draw
            self._masks[may_draw] = mask
        return self._masks[may_draw]

    def _shape_ids(self, state: GrammarState) -> list[int]:
        chars = [char for char in ALPHABET if self._may_write(state.written + char, state.limit)]
        ids = [self.vocabulary.first_char + ALPHABET.index(char) for char in chars]
        shape = parse_shape(state.written)
        if shape is not None and self.fixed in (None, state.written):
            ids += [som for som, axes in zip(self.vocabulary.som, self.axes, strict=True) if len(shape) in axes]
        return ids

    def _may_write(self, text: str, limit: int) -> bool:
        """Whether `text` can still become a shape: `"3,"` can, if some modality has two axes or more; `"03"` cannot."""
        if self.fixed is not None:
            return self.fixed.startswith(text)
        sizes = text.split(",")
        if len(sizes) > max(map(max, self.axes)) or any(size.startswith("0") for size in sizes) or "" in sizes[:-1]:
            return False
        return prod(int(size) for size in sizes if size) <= limit
