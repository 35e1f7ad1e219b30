"""Noised copies: a modality is learned on a copy of itself, and what follows sees it clean (BAGEL, arXiv 2505.14683).

A noised copy stands behind all samples of the stream, as a sample of its own. It sees what its clean copy has before
it, and itself; nothing else sees it. It has the position of its clean copy:

    slot       0   1   2   3   4   5   6  |  7   8
    token     sos som  i   i  eom  t  eos |  i   i
    sees up to 0   1   3   3   4   5   6  |  0 to 1, 7 to 8
    position   0   1   2   2   3   4   5  |  2   2

The samples themselves are laid out and attended as they are without copies.

m spans, s spans and k latents of one modality.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.stream import Placement, Spans, TokenStream


def with_noised_copies(batch: Batch, copied: Sequence[int]) -> Batch:
    """The same with a noised copy of each of the spans `copied`, which themselves become clean.

    The batch is on the CPU and not padded. A copy has the time, weight and random numbers that its span had. Its
    latents are repeated only once they are encoded (`Placement.with_copies`).
    """
    if not copied:
        return batch
    origin = torch.tensor([*range(len(batch.times)), *copied])  # of each row of the new span table, in the old one
    stream = _copied_stream(batch.stream, copied, origin)
    data = {}
    for kind, placement in stream.placements.items():
        instance = _instances(placement, batch.stream.placements[kind], origin)
        data[kind] = replace(batch.data[kind], decoded_size=batch.data[kind].decoded_size[instance])
    added = len(stream.token) - len(batch.stream.token)
    return replace(
        batch,
        stream=stream,
        data=data,
        times=batch.times[origin].masked_fill(~stream.spans.is_learned, 1.0),
        span_weight=batch.span_weight[origin],
        is_droppable=torch.cat((batch.is_droppable, batch.is_droppable.new_zeros(added))),
        clean_number=batch.clean_number[origin],
        time_number=None if batch.time_number is None else batch.time_number[origin],
        noise=batch.noise and {kind: stream.placements[kind].with_copies(each) for kind, each in batch.noise.items()},
    )


def _copied_stream(stream: TokenStream, copied: Sequence[int], origin: Int[Tensor, " m"]) -> TokenStream:
    """With the copies behind it, which in all columns but one have what stands at the slots of their spans."""
    spans = stream.spans
    first, sizes = ([of_spans[span] for span in copied] for of_spans in (spans.first, _num_tokens(spans)))
    slots = torch.cat([torch.arange(start, start + size) for start, size in zip(first, sizes, strict=True)])
    columns = {
        name: torch.cat((column, column[slots]))
        for name, column in (
            ("token", stream.token),
            ("sample", stream.sample),
            ("position", stream.position),
            ("label", stream.label),
        )
    }
    modulation_index = torch.arange(len(spans) + 1, len(origin) + 1).repeat_interleave(torch.tensor(sizes))
    table = _copied_spans(spans, copied, origin, [*accumulate(sizes[:-1], initial=len(stream.token))])
    return replace(
        stream,
        **columns,
        modulation_index=torch.cat((stream.modulation_index, modulation_index)),
        layout=_copied_layout(stream.layout, first, sizes),
        spans=table,
        placements={
            kind: replace(placement, source=_sources(placement, stream.placements[kind], origin))
            for kind, placement in table.placements().items()
        },
    )


def _copied_layout(layout: Layout, first: Sequence[int], sizes: Sequence[int]) -> Layout:
    """With a sample for each copy, whose past are the slots of its sample before the `first` of its clean copy."""
    slots = [slice(int(layout.start[start]), start) for start in first]
    past = [each.stop - each.start for each in slots]
    seen = (torch.tensor(past) + torch.tensor(sizes)).repeat_interleave(torch.tensor(sizes))
    return Layout(
        end=torch.cat((layout.end, seen)),
        lengths=(*layout.lengths, *sizes),
        past=(*layout.past, *past),
        past_slots=dict(enumerate(slots, len(layout.lengths))),
    )


def _copied_spans(spans: Spans, copied: Sequence[int], origin: Int[Tensor, " m"], first: Sequence[int]) -> Spans:
    """The span table with rows for the copies, of which the slots `first` are the first."""
    is_clean = torch.zeros(len(origin), dtype=torch.bool)
    is_clean[list(copied)] = True
    return Spans(
        modality=spans.modality[origin],
        sample=spans.sample[origin],
        index=spans.index[origin],
        is_captioned=spans.is_captioned[origin],
        is_learned=spans.is_learned[origin] & ~is_clean,
        first_slot=spans.first_slot[origin],
        types=tuple(spans.types[row] for row in origin.tolist()),
        first=(*spans.first, *first),
        shapes=tuple(spans.shapes[row] for row in origin.tolist()),
        token_shapes=tuple(spans.token_shapes[row] for row in origin.tolist()),
        most=spans.most,
    )


def _sources(placement: Placement, before: Placement, origin: Int[Tensor, " m"]) -> Int[Tensor, " k"]:
    """For each latent of a type, which of its latents without copies it is, or is copied from."""
    latents = torch.arange(len(before.span_of_latent)).split(before.sizes)
    return torch.cat([latents[i] for i in _instances(placement, before, origin).tolist()])


def _instances(placement: Placement, before: Placement, origin: Int[Tensor, " m"]) -> Int[Tensor, " s"]:
    """For each span of a type, which of its spans without copies it is, or is copied from."""
    return torch.searchsorted(before.spans, origin[placement.spans])


def _num_tokens(spans: Spans) -> list[int]:
    return list(map(prod, spans.token_shapes))
