"""The packed stream: any batch, laid out as one row of tokens without padding.

n tokens, m spans (one for each instance of a modality), b samples, s spans of one modality, t their tokens, k their
latents. Everything is built on the CPU, vectorised over pieces, and moved to the device of the model in one go.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.moving import Moving, on_cpu
from transfusion_pytorch.sequence.samples import Modality, Piece, Shape, Text


class Past(NamedTuple):
    """What a sample has in the cache already: its tokens, and the rotary position that comes next."""

    length: int = 0
    position: int = 0


@dataclass(frozen=True, eq=False)
class Placement(Moving):
    """Where the latents of one modality stand. They are flat: those of all its spans, one behind the other.

    - `spans`: rows of the span table
    - `slots`: slots of the stream that its tokens take
    - `span_of_latent`: the row of the span table of every latent
    - `shapes`, `token_shapes`: axial shapes of each span's latents, and of its tokens (fewer behind a U-Net half)
    - `source`: of every latent, which of the latents without noised copies it is; None where there are no copies
    """

    spans: Int[Tensor, " s"]
    slots: Int[Tensor, " t"]
    span_of_latent: Int[Tensor, " k"]
    shapes: tuple[Shape, ...]
    token_shapes: tuple[Shape, ...]
    source: Int[Tensor, " k"] | None = None

    @property
    def sizes(self) -> list[int]:
        """Latents of each span."""
        return list(map(prod, self.shapes))

    def with_copies(self, latents: Shaped[Tensor, "_ c"]) -> Shaped[Tensor, "k c"]:
        """Those of all spans, of which noised copies have the ones of their clean copies."""
        return latents if self.source is None else latents.index_select(0, self.source)


@dataclass(frozen=True, eq=False)
class Spans(Moving):
    """The span table: a row for each modality instance, and for each noised copy of one, in the order of the stream.

    - `modality`, `sample`: its type, and its sample
    - `index`: which of its sample's modalities it is
    - `is_captioned`: text follows it in its sample, and none stands before
    - `is_learned`: it is noised and has a flow loss; a `Condition` is clean, and so is what has a noised copy
    - `first_slot`: the slot of its first token; of a noised copy that of its clean copy, behind what conditions it
    - `types`, `first`, `shapes`, `token_shapes`: type, slot of its own first token, and axial shapes of latents and
      tokens, for the host
    - `most`: how many modalities a sample has at most
    """

    modality: Int[Tensor, " m"]
    sample: Int[Tensor, " m"]
    index: Int[Tensor, " m"]
    is_captioned: Bool[Tensor, " m"]
    is_learned: Bool[Tensor, " m"]
    first_slot: Int[Tensor, " m"]
    types: tuple[int, ...]
    first: tuple[int, ...]
    shapes: tuple[Shape, ...]
    token_shapes: tuple[Shape, ...]
    most: int

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def sizes(self) -> list[int]:
        """How many latents each span has."""
        return list(map(prod, self.shapes))

    def of_type(self, modality: int) -> list[int]:
        """Which spans are of this type."""
        return [row for row, kind in enumerate(self.types) if kind == modality]

    def placements(self) -> dict[int, Placement]:
        """Where the latents of each type stand, by type in ascending order."""
        return {modality: self._placement(modality) for modality in sorted(set(self.types))}

    def _placement(self, modality: int) -> Placement:
        rows = self.of_type(modality)
        shapes, token_shapes = (tuple(each[row] for row in rows) for each in (self.shapes, self.token_shapes))
        spans, first, latents, tokens = (
            torch.tensor(column, dtype=torch.long, device="cpu")
            for column in (
                rows,
                [self.first[row] for row in rows],
                list(map(prod, shapes)),
                list(map(prod, token_shapes)),
            )
        )
        start = (first - (tokens.cumsum(0) - tokens)).repeat_interleave(tokens)
        slots = start + torch.arange(len(start), device="cpu")
        return Placement(spans, slots, spans.repeat_interleave(latents), shapes, token_shapes)


@dataclass(frozen=True, eq=False)
class TokenStream(Moving):
    """One packed batch. Per token, n long:

    - `token`: text id, 0 where the slot is a latent
    - `sample`: which sample it belongs to
    - `modulation_index`: 0 for text, i + 1 for span i
    - `position`: rotary position in its sample; a span shares one: `[t t i i i t] -> [0 1 2 2 2 3]`
    - `label`: the text id to predict there, `ignore_index` where there is none

    `layout` says who sees whom. `lengths` and `past` are those of the samples. `placements` has an entry for each
    modality that occurs. Noised copies stand behind the samples (`copies.py`).

    A stream may be padded at its end: then `num_padding` tokens belong to no sample and see only themselves, and
    `num_modulations`, if given, is the number of spans to which the span table is filled up. `position_embeddings` are
    those of the latents by modality, where they were made before, for passes that share them.
    """

    token: Int[Tensor, " n"]
    sample: Int[Tensor, " n"]
    modulation_index: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    layout: Layout
    spans: Spans
    placements: Mapping[int, Placement]
    lengths: tuple[int, ...]
    past: tuple[Past, ...]
    ignore_index: int
    num_padding: int = 0
    num_modulations: int | None = None
    position_embeddings: Mapping[int, Tensor] | None = None

    @property
    def is_text(self) -> Bool[Tensor, " n"]:
        return self.modulation_index == 0

    @property
    def end(self) -> Int[Tensor, " n"]:
        """It sees the keys of its sample before this one, on the CPU: `[t t i i i t] -> [1 2 5 5 5 6]`."""
        return self.layout.end

    @cached_property
    def last(self) -> Int[Tensor, " b"]:
        """The slot of each sample's last token."""
        return torch.tensor(self.lengths, device=self.token.device).cumsum(0) - 1

    @cached_property
    def has_equal_spans(self) -> bool:
        """Whether it is nothing but spans of one length, one behind the other."""
        sizes = set(map(prod, self.spans.token_shapes))
        if self.num_modulations is not None:
            return False
        return len(sizes) == 1 and max(sizes) * len(self.spans) == len(self.token)

    def slots(self, modality: int) -> Int[Tensor, " k"]:
        """The slots of all tokens of a type."""
        if modality in self.placements:
            return self.placements[modality].slots
        return torch.empty(0, dtype=torch.long, device=self.token.device)


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
    with on_cpu():
        return _pack(samples, past, ignore_index, token_shape)


def _pack(
    samples: Sequence[Sequence[Piece]],
    past: Sequence[Past] | None,
    ignore_index: int,
    token_shape: Callable[[int, Shape], Shape],
) -> TokenStream:
    past = tuple(past) if past is not None else (Past(),) * len(samples)
    pieces = [piece for sample in samples for piece in sample]
    modalities = [piece for piece in pieces if isinstance(piece, Modality)]
    shapes = tuple(piece.shape for piece in modalities)
    token_shapes = tuple(token_shape(piece.type, piece.shape) for piece in modalities)

    # per piece
    sizes = iter(map(prod, token_shapes))
    length = torch.tensor([len(piece.ids) if isinstance(piece, Text) else next(sizes) for piece in pieces])
    is_span = torch.tensor([isinstance(piece, Modality) for piece in pieces])
    is_learned = torch.tensor([piece.is_learned for piece in pieces])
    sample = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(pieces) for pieces in samples]))
    modulation_index = torch.where(is_span, is_span.cumsum(0), 0)
    before = _start_in_sample(length, sample) + torch.tensor([row.length for row in past])[sample]
    advance = torch.where(is_span, 1, length)
    position = _start_in_sample(advance, sample) + torch.tensor([row.position for row in past])[sample]

    # per token
    of_piece = torch.arange(len(pieces)).repeat_interleave(length)
    in_piece = torch.arange(len(of_piece)) - (length.cumsum(0) - length)[of_piece]
    in_span, token_sample = is_span[of_piece], sample[of_piece]
    end = before[of_piece] + torch.where(in_span, length[of_piece], in_piece + 1)
    token = torch.zeros_like(of_piece)
    texts = [piece for piece in pieces if isinstance(piece, Text)]
    wanted = token
    if texts:
        token[~in_span] = torch.cat([piece.ids for piece in texts])
        if any(piece.labels is not None for piece in texts):
            wanted = token.clone()
            wanted[~in_span] = torch.cat([piece.ids if piece.labels is None else piece.labels for piece in texts])
    label = torch.full_like(token, ignore_index)
    is_target = ~in_span & is_learned[of_piece]
    predicts = ~in_span[:-1] & is_target[1:] & (token_sample[:-1] == token_sample[1:])
    label[:-1][predicts] = wanted[1:][predicts]

    lengths = tuple(torch.zeros(len(samples), dtype=torch.long).index_add_(0, sample, length).tolist())
    span_sample = sample[is_span]
    index = _start_in_sample(torch.ones_like(span_sample), span_sample)
    spans = Spans(
        modality=torch.tensor([piece.type for piece in modalities], dtype=torch.long),
        sample=span_sample,
        index=index,
        is_captioned=torch.tensor([piece.is_captioned for piece in modalities], dtype=torch.bool),
        is_learned=torch.tensor([piece.is_learned for piece in modalities], dtype=torch.bool),
        first_slot=(length.cumsum(0) - length)[is_span],
        types=tuple(piece.type for piece in modalities),
        first=tuple((length.cumsum(0) - length)[is_span].tolist()),
        shapes=shapes,
        token_shapes=token_shapes,
        most=int(index.max()) + 1 if len(index) else 0,
    )
    return TokenStream(
        token=token,
        sample=token_sample,
        modulation_index=modulation_index[of_piece],
        position=position[of_piece] + torch.where(in_span, 0, in_piece),
        label=label,
        layout=Layout(end=end, lengths=lengths, past=tuple(row.length for row in past)),
        spans=spans,
        placements=spans.placements(),
        lengths=lengths,
        past=past,
        ignore_index=ignore_index,
    )


def pad_stream(stream: TokenStream, length: int, *, num_modulations: int | None = None) -> TokenStream:
    """Fills a stream up to `length` tokens. What is added are samples of one token, which sees itself alone."""
    missing = length - len(stream.token)
    if missing < 0:
        raise ValueError(f"the batch has {len(stream.token)} tokens, more than the token budget of {length}")
    filled = {
        name: torch.cat((column, column.new_full((missing,), value)))
        for name, column, value in (
            ("token", stream.token, 0),
            ("sample", stream.sample, 0),
            ("modulation_index", stream.modulation_index, 0),
            ("position", stream.position, 0),
            ("label", stream.label, stream.ignore_index),
        )
    }
    layout = Layout(
        end=torch.cat((stream.layout.end, stream.layout.end.new_ones(missing))),
        lengths=(*stream.layout.lengths, *[1] * missing),
        past=(*stream.layout.past, *[0] * missing),
        past_slots=stream.layout.past_slots,
    )
    return replace(stream, **filled, layout=layout, num_padding=missing, num_modulations=num_modulations)


def _start_in_sample(size: Int[Tensor, " p"], sample: Int[Tensor, " p"]) -> Int[Tensor, " p"]:
    """Sum of the sizes that come before, in the same sample: sizes `[2 3 | 4 1]` -> `[0 2 | 0 4]`."""
    start = size.cumsum(0) - size
    first = torch.zeros_like(sample)
    if len(sample):
        is_first = torch.ones_like(sample, dtype=torch.bool)
        is_first[1:] = sample[1:] != sample[:-1]
        first = start[is_first][is_first.cumsum(0) - 1]
    return start - first


def _no_spans() -> Spans:
    none = torch.empty(0, dtype=torch.long, device="cpu")
    return Spans(none, none, none, none.bool(), none.bool(), none, (), (), (), (), 0)


NO_SPANS = _no_spans()
