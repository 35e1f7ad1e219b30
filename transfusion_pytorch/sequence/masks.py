"""Who sees whom: one interval of keys for every token.

A token sees the keys of its own sample from the first up to `end`, which is the end of its span, or just past itself
for text. The masks of every attention backend come from that.

n tokens, g samples of one length t, k keys.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Rows longer than this are attended in chunks of queries that see the keys up to their furthest `end` only. From about
# 1,000 tokens on that is faster than one masked call, and the mask stays small.
LONG_ROW = 512
QUERY_CHUNK = 256


class Chunk(NamedTuple):
    """Some queries of every sample in a run, the number of keys they need, and what of those each may see."""

    queries: slice
    num_keys: int
    is_causal: bool
    mask: Bool[Tensor, "#g 1 t k"] | None


class Run(NamedTuple):
    """Neighbouring samples of one length, which attention takes as a plain batch.

    `rows` are where they stand in a cache; without one, they are the `samples` again.
    """

    samples: slice
    rows: slice
    tokens: slice
    chunks: list[Chunk]


class RunTable(NamedTuple):
    """Runs as two tensors, which a compiled graph takes without being compiled for each batch anew.

    `numbers` has a line for each chunk (see `of`), on the CPU; `bits` are all masks behind each other. Both begin
    with a filling, a line of zeros and two bits: a graph would take a size of 0 or 1 for a constant.
    """

    numbers: Int[Tensor, "chunks 10"]
    bits: Bool[Tensor, " bits"]

    @classmethod
    def of(cls, runs: Iterable[Run], device: torch.device | str) -> "RunTable":
        bits = [torch.zeros(2, dtype=torch.bool, device=device)]
        numbers, offset = [(0,) * 10], len(bits[0])
        for run in runs:
            for queries, num_keys, is_causal, mask in run.chunks:
                where = (run.rows.start, run.rows.stop, run.tokens.start, run.tokens.stop, queries.start, queries.stop)
                masked_samples = 0 if mask is None else len(mask)
                numbers.append((*where, num_keys, is_causal, masked_samples, offset))
                if mask is not None:
                    bits.append(mask.flatten())
                    offset += mask.numel()
        return cls(torch.tensor(numbers), torch.cat(bits))

    def runs(self) -> list[Run]:
        """The runs again. Their samples are not known any more: they are the rows."""
        runs: list[Run] = []
        for first, last, start, stop, begin, end, num_keys, is_causal, masked, offset in self.numbers[1:].tolist():
            if not runs or runs[-1].tokens.start != start:
                runs.append(Run(slice(first, last), slice(first, last), slice(start, stop), []))
            shape = (masked, 1, end - begin, num_keys)
            mask = self.bits[offset : offset + prod(shape)].view(shape) if masked else None
            runs[-1].chunks.append(Chunk(slice(begin, end), num_keys, bool(is_causal), mask))
        return runs


@dataclass(frozen=True)
class Layout:
    """The intervals of a stream, and what the backends make of them.

    `end` counts keys in the sample, those in the cache (`past`) included. It stays on the CPU, where batches are laid
    out without waiting for a device; masks are made for the `device` that attends.
    """

    end: Int[Tensor, " n"]
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    device: torch.device | str = "cpu"

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The stream as plain batches, in order."""
        return self.runs_in(tuple(range(len(self.lengths))))

    @cached_property
    def table(self) -> RunTable:
        """The runs for a compiled graph."""
        return RunTable.of(self.runs, self.device)

    def runs_in(self, rows: tuple[int, ...]) -> tuple[Run, ...]:
        """The same where the samples stand in these rows of a cache: those of a batch are of one length, in
        neighbouring rows.
        """
        kinds = [(length, row - sample) for sample, (length, row) in enumerate(zip(self.lengths, rows, strict=True))]
        runs, sample, token = [], 0, 0
        for (length, _), group in groupby(kinds):
            count = len(list(group))
            samples, tokens = slice(sample, sample + count), slice(token, token + count * length)
            chunks = list(_chunks(self.end[tokens].view(count, length), self.device))
            runs.append(Run(samples, slice(rows[sample], rows[sample] + count), tokens, chunks))
            sample, token = samples.stop, tokens.stop
        return tuple(runs)

    def prepare(self, blocks: bool = False) -> "Layout":
        return self

    def to(self, device, non_blocking: bool = True) -> "Layout":
        return self if torch.device(device) == torch.device(self.device) else replace(self, device=device)

    def pin_memory(self) -> "Layout":
        return self

    @cached_property
    def start(self) -> Int[Tensor, " n"]:
        """The slot where each token's sample starts in the stream."""
        lengths = torch.tensor(self.lengths)
        return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)

    def mask_mod(self) -> Callable[..., Tensor]:
        """The intervals as flex attention wants them, over the whole packed stream (without a cache)."""
        return visible(self.start.to(self.device), (self.start + self.end).to(self.device))

    def dense(self) -> Bool[Tensor, "n n"]:
        """The whole stream's mask, made from the same definition that flex attention gets."""
        slot = torch.arange(len(self.end), device=self.device)
        return self.mask_mod()(None, None, slot[:, None], slot[None, :])


def visible(start: Int[Tensor, " n"], end: Int[Tensor, " n"]) -> Callable[..., Tensor]:
    """Token q sees keys `start[q] <= k < end[q]`: its sample up to the end of its span, or up to itself."""
    # A lambda, because flex attention counts arguments and the type checker hides those of any other function.
    return lambda batch, head, query, key: (key >= start[query]) & (key < end[query])


def _chunks(end: Int[Tensor, "g t"], device: torch.device | str) -> Iterator[Chunk]:
    length = end.shape[1]
    if torch.equal(end, torch.arange(1, length + 1).expand_as(end)):  # which leaves no room for a past
        yield Chunk(slice(0, length), length, True, None)
        return
    if (end == end[:1]).all():
        end = end[:1]  # one mask serves all samples of the run
    size = QUERY_CHUNK if length > LONG_ROW else length
    for start, stop in _edges(length, size):
        part = end[:, start:stop]
        num_keys = int(part.max())
        mask = None if int(part.min()) == num_keys else torch.arange(num_keys) < part[:, None, :, None]
        yield Chunk(slice(start, stop), num_keys, False, None if mask is None else mask.to(device, non_blocking=True))


def _edges(length: int, size: int) -> Iterator[tuple[int, int]]:
    edges = [0, *accumulate([size] * (length // size))]
    edges += [length] if edges[-1] < length else []
    return pairwise(edges)
