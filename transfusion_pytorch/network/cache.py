"""Keys and values of what has been read already, preallocated and written in place.

r rows, h key/value heads, s slots in a row, d channels of a head, g samples of one length t.
"""

import heapq
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from transfusion_pytorch.sequence.masks import Layout, Run


class KVCache:
    """One tensor of keys and one of values per layer, each `(rows, heads, slots, channels)`.

    Writes are tentative: they go behind the committed prefix of their row, and the next write replaces them. Only
    `commit` moves the prefix, so the evaluations of an ODE solver leave no trace. `lengths` are the committed
    prefixes.

    A row is taken with `acquire` and given back with `release`. Rows and slots at least double when there are too few,
    so that copying costs a constant per token; slots never exceed `limit`.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        dim_head: int,
        device: torch.device,
        dtype: torch.dtype,
        rows: int = 1,
        slots: int = 64,
        limit: int | None = None,
    ):
        shape = (rows, kv_heads, slots, dim_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.lengths = [0] * rows
        self.limit = limit
        self._written = [0] * rows  # slots that may hold anything, committed or not
        self._free = list(range(rows))

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    @property
    def bytes_per_token(self) -> int:
        """What one token of one row takes."""
        return sum(2 * keys[0, :, 0].numel() * keys.element_size() for keys in self.keys)

    @property
    def num_bytes(self) -> int:
        """What all slots of all rows take."""
        return self.bytes_per_token * self.slots * len(self.lengths)

    def acquire(self) -> int:
        """The lowest free row, empty. Rows in use stay close together, where attention can take them as one batch."""
        if not self._free:
            self._grow(rows=2 * len(self.lengths), slots=self.slots)
        row = heapq.heappop(self._free)
        # A masked slot weighs nothing, but nothing times NaN is NaN: what a former tenant left there has to go.
        for tensor in (*self.keys, *self.values):
            tensor[row, :, : self._written[row]] = 0
        self.lengths[row] = self._written[row] = 0
        return row

    def release(self, row: int) -> None:
        heapq.heappush(self._free, row)

    def view(self, rows: Sequence[int], layout: Layout) -> "CacheView":
        """The cache as one forward pass sees it: sample i of the `layout` continues row `rows[i]`."""
        ends = [self.lengths[row] + length for row, length in zip(rows, layout.lengths, strict=True)]
        self._reserve(max(ends))
        for row, end in zip(rows, ends, strict=True):
            self._written[row] = max(self._written[row], end)
        return CacheView(self, rows, layout)

    def commit(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Makes the last write permanent: `lengths[i]` tokens more in `rows[i]`."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] += length

    def copy(self, source: int, rows: Sequence[int], length: int) -> None:
        """Gives each of `rows`, which are empty, the first `length` tokens of `source`."""
        self._reserve(length)
        index = torch.tensor(rows, device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor[index, :, :length] = tensor[source, :, :length]
        for row in rows:
            self.lengths[row] = self._written[row] = length

    def _reserve(self, slots: int) -> None:
        if slots <= self.slots:
            return
        roomy = 2 * self.slots if self.limit is None else min(2 * self.slots, self.limit)
        self._grow(rows=len(self.lengths), slots=max(slots, roomy))

    def _grow(self, *, rows: int, slots: int) -> None:
        """Copies what has been written only: memory that was never touched costs nothing on a CPU."""
        count, used = len(self.lengths), max(self._written)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros((rows, old.shape[1], slots, old.shape[3]))
                tensors[i][:count, :, :used] = old[:, :, :used]
        self._free += range(count, rows)  # larger than all others, so this stays a heap
        self.lengths += [0] * (rows - count)
        self._written += [0] * (rows - count)


class CacheView:
    """The rows of a cache that take part in one forward pass, and the slots where its tokens go."""

    def __init__(self, cache: KVCache, rows: Sequence[int], layout: Layout):
        self.cache, self.rows, self.layout = cache, tuple(rows), layout
        self.past = [cache.lengths[row] for row in rows]
        self.runs = layout.runs_in(self.rows)

    @cached_property
    def locations(self) -> list[slice | tuple[Int[Tensor, "g 1"], Int[Tensor, "g t"]]]:
        """Where each run writes: to the same slots of its rows, or to some of each."""
        return [self._locate(run) for run in self.runs]

    def _locate(self, run: Run) -> slice | tuple[Int[Tensor, "g 1"], Int[Tensor, "g t"]]:
        past, length = self.past[run.samples], self.layout.lengths[run.samples.start]
        if len(set(past)) == 1:
            return slice(past[0], past[0] + length)
        row_of = torch.arange(run.rows.start, run.rows.stop, device="cpu")[:, None]
        slot_of = torch.tensor(past, device="cpu")[:, None] + torch.arange(length, device="cpu")
        device = self.cache.keys[0].device
        return row_of.to(device, non_blocking=True), slot_of.to(device, non_blocking=True)

    def update(
        self, layer: int, run: int, keys: Shaped[Tensor, "g h t d"], values: Shaped[Tensor, "g h t d"]
    ) -> tuple[Shaped[Tensor, "g h k d"], Shaped[Tensor, "g h k d"]]:
        """Writes the new keys and values of a run, and returns all that it may see: views, nothing is copied."""
        num_keys = max(chunk.num_keys for chunk in self.runs[run].chunks)
        return (
            self._update(self.cache.keys[layer], run, keys)[:, :, :num_keys],
            self._update(self.cache.values[layer], run, values)[:, :, :num_keys],
        )

    def _update(self, stored: Tensor, run: int, new: Tensor) -> Tensor:
        rows, location = self.runs[run].rows, self.locations[run]
        if isinstance(location, slice):
            stored[rows, :, location] = new
        else:
            row_of, slot_of = location
            stored[row_of, :, slot_of] = new.transpose(1, 2).to(stored.dtype)
        return stored[rows]
