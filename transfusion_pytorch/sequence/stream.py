"""The packed stream: any batch, laid out as one row of tokens without padding.

n tokens, m spans (one for each instance of a modality). Everything here is built on the CPU, vectorised over pieces,
and moved to the device of the model in one go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape, Text


class Past(NamedTuple):
    """What a sample has in the cache already: its tokens, and the rotary position that comes next."""

    length: int = 0
    position: int = 0


@dataclass(frozen=True)
class Spans:
    """A row for each modality instance, in the order of the stream.

    `shapes` are the axial shapes of the latents, `token_shapes` those of their tokens (smaller after a U-Net half).
    `first` is the slot of the first token, `index` counts the modalities of a sample; `is_context` says that something
    follows in the sample.
    """

    modality: Int[Tensor, " m"]
    first: Int[Tensor, " m"]
    sample: Int[Tensor, " m"]
    index: Int[Tensor, " m"]
    is_context: Bool[Tensor, " m"]
    shapes: tuple[Shape, ...]
    token_shapes: tuple[Shape, ...]

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def sizes(self) -> list[int]:
        """How many latents each span has."""
        return [prod(shape) for shape in self.shapes]

    def of_type(self, modality: int) -> list[int]:
        """Which spans are of this type."""
        return (self.modality == modality).nonzero().flatten().tolist()

    def shapes_of(self, modality: int) -> list[Shape]:
        """The axial shapes of all latents of a type."""
        return [self.shapes[i] for i in self.of_type(modality)]


@dataclass(frozen=True)
class TokenStream:
    """One packed batch. Per token, n long:

    - `token`: text id, 0 where the slot is a latent
    - `sample`: which sample it belongs to
    - `span`: row of the span table, -1 for text
    - `position`: rotary position in its sample; a span shares one: `[t t i i i t] -> [0 1 2 2 2 3]`
    - `end`: it sees the keys of its sample before this one: `[t t i i i t] -> [1 2 5 5 5 6]`
    - `label`: the text id that comes next, `ignore_index` where there is none to predict

    `lengths` and `past` are those of the samples. `spans` and `end` are always on the CPU.
    """

    token: Int[Tensor, " n"]
    sample: Int[Tensor, " n"]
    span: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    end: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    lengths: tuple[int, ...]
    past: tuple[Past, ...]
    spans: Spans
    ignore_index: int

    @property
    def is_text(self) -> Bool[Tensor, " n"]:
        return self.span < 0

    @cached_property
    def layout(self) -> Layout:
        """Who sees whom, for the attention backends."""
        past = tuple(past.length for past in self.past)
        return Layout(end=self.end, lengths=self.lengths, past=past, device=self.token.device)

    @cached_property
    def last(self) -> Int[Tensor, " b"]:
        """The slot of each sample's last token."""
        return torch.tensor(self.lengths, device=self.token.device).cumsum(0) - 1

    @cached_property
    def row(self) -> Int[Tensor, " n"] | None:
        """The span of each token counted from 1, 0 for text; None where there is nothing but spans of one length."""
        sizes = set(map(prod, self.spans.token_shapes))
        is_even = len(sizes) == 1 and max(sizes) * len(self.spans) == len(self.token)
        return None if is_even else self.span + 1

    def slots(self, modality: int) -> Int[Tensor, " k"]:
        """The slots of all latents of a type."""
        return self._slots.get(modality, torch.empty(0, dtype=torch.long, device=self.token.device))

    @cached_property
    def _slots(self) -> dict[int, Int[Tensor, " k"]]:
        """Found on the CPU, once: a search on the device would make that wait."""
        size = torch.tensor(list(map(prod, self.spans.token_shapes)), dtype=torch.long)
        owner = torch.arange(len(size)).repeat_interleave(size)
        slot = (self.spans.first - (size.cumsum(0) - size))[owner] + torch.arange(len(owner))
        kind = self.spans.modality[owner]
        return {modality: slot[kind == modality].to(self.token.device) for modality in kind.unique().tolist()}

    def drop_text(self, dropped: Bool[Tensor, " b"], *, num_text: int, null: int) -> "TokenStream":
        """Replaces the text of the `dropped` samples by `null` for classifier-free guidance.

        Only text that a modality still follows is a condition of anything, so only that goes. Structure stays.
        """
        last_modality = torch.full((len(self.lengths),), -1)
        where = torch.arange(len(self.token))
        last_modality.scatter_reduce_(0, self.sample, torch.where(self.is_text, -1, where), "amax")
        goes = dropped[self.sample] & self.is_text & (self.token < num_text) & (where < last_modality[self.sample])
        label = self.label.clone()
        label[goes] = self.ignore_index  # nothing is predicted from null ...
        label[:-1][goes[1:]] = self.ignore_index  # ... and null is never predicted
        return replace(self, token=self.token.masked_fill(goes, null), label=label)

    def to(self, device: torch.device | str) -> "TokenStream":
        if self.token.device == torch.device(device):
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor) and field.name != "end"
        }
        return replace(self, **moved)


def same_shape(modality: int, shape: Shape) -> Shape:
    """Where there is no U-Net, every latent is a token."""
    return shape


def pack(
    samples: Sequence[Sequence[Piece]],
    *,
    past: Sequence[Past] | None = None,
    ignore_index: int = -1,
    token_shape: Callable[[int, Shape], Shape] = same_shape,
) -> TokenStream:
    """Lays out marked samples as one stream, each continuing after its `past`."""
    past = tuple(past) if past is not None else (Past(),) * len(samples)
    pieces = [piece for sample in samples for piece in sample]
    modalities = [piece for piece in pieces if isinstance(piece, Modality)]
    shapes = tuple(piece.shape for piece in modalities)
    token_shapes = tuple(token_shape(piece.type, piece.shape) for piece in modalities)

    # per piece
    sizes = iter(map(prod, token_shapes))
    length = torch.tensor([len(piece.ids) if isinstance(piece, Text) else next(sizes) for piece in pieces])
    is_span = torch.tensor([isinstance(piece, Modality) for piece in pieces])
    sample = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(pieces) for pieces in samples]))
    span = torch.where(is_span, is_span.cumsum(0) - 1, -1)
    before = _start_in_sample(length, sample) + torch.tensor([row.length for row in past])[sample]
    advance = torch.where(is_span, 1, length)
    position = _start_in_sample(advance, sample) + torch.tensor([row.position for row in past])[sample]

    # per token
    of_piece = torch.arange(len(pieces)).repeat_interleave(length)
    in_piece = torch.arange(len(of_piece)) - (length.cumsum(0) - length)[of_piece]
    in_span = is_span[of_piece]
    end = before[of_piece] + torch.where(in_span, length[of_piece], in_piece + 1)
    token = torch.zeros_like(of_piece)
    texts = [piece.ids for piece in pieces if isinstance(piece, Text)]
    if texts:
        token[~in_span] = torch.cat(texts)
    label = torch.full_like(token, ignore_index)
    predicts = ~in_span[:-1] & ~in_span[1:] & (sample[of_piece][:-1] == sample[of_piece][1:])
    label[:-1][predicts] = token[1:][predicts]

    span_sample = sample[is_span]
    return TokenStream(
        token=token,
        sample=sample[of_piece],
        span=span[of_piece],
        position=position[of_piece] + torch.where(in_span, 0, in_piece),
        end=end,
        label=label,
        lengths=tuple(torch.zeros(len(samples), dtype=torch.long).index_add_(0, sample, length).tolist()),
        past=past,
        spans=Spans(
            modality=torch.tensor([piece.type for piece in modalities], dtype=torch.long),
            first=(length.cumsum(0) - length)[is_span],
            sample=span_sample,
            index=_start_in_sample(torch.ones_like(span_sample), span_sample),
            is_context=torch.tensor([piece.is_context for piece in modalities], dtype=torch.bool),
            shapes=shapes,
            token_shapes=token_shapes,
        ),
        ignore_index=ignore_index,
    )


def pack_ids(samples: Sequence[Sequence[int]], past: Sequence[Past], *, ignore_index: int = -1) -> TokenStream:
    """What `pack` makes of text that is only read, without labels. A step of decoding is an id for each sample, and
    plain numbers are the fastest way to lay out so few.
    """
    lengths = tuple(map(len, samples))
    token, sample, position, end = (
        torch.tensor(list(chain.from_iterable(column)))
        for column in (
            samples,
            ([i] * length for i, length in enumerate(lengths)),
            (range(row.position, row.position + length) for row, length in zip(past, lengths, strict=True)),
            (range(row.length + 1, row.length + length + 1) for row, length in zip(past, lengths, strict=True)),
        )
    )
    none = torch.empty(0, dtype=torch.long)
    return TokenStream(
        token=token,
        sample=sample,
        span=torch.full_like(token, -1),
        position=position,
        end=end,
        label=torch.full_like(token, ignore_index),
        lengths=lengths,
        past=tuple(past),
        spans=Spans(none, none, none, none, none.bool(), (), ()),
        ignore_index=ignore_index,
    )


def _start_in_sample(size: Int[Tensor, " p"], sample: Int[Tensor, " p"]) -> Int[Tensor, " p"]:
    """Sum of the sizes that come before, in the same sample: sizes `[2 3 | 4 1]` -> `[0 2 | 0 4]`."""
    start = size.cumsum(0) - size
    first = torch.zeros_like(sample)
    if len(sample):
        is_first = torch.ones_like(sample, dtype=torch.bool)
        is_first[1:] = sample[1:] != sample[:-1]
        first = start[is_first][is_first.cumsum(0) - 1]
    return start - first
