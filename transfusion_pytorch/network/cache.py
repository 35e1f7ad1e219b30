"""Keys and values of what has been read already, preallocated and written in place.

r rows, h key/value heads, s slots in a row, n new tokens, d channels of a head.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from transfusion_pytorch.sequence.masks import Layout


class KVCache:
    """One tensor of keys and one of values per layer, each `(rows, heads, slots, channels)`.

    Writes are tentative: they go behind the committed prefix of their row, and the next write replaces them. Only
    `commit` moves the prefix, so the evaluations of an ODE solver leave no trace. `lengths` are the committed
    prefixes.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        kv_heads: int,
        dim_head: int,
        device: torch.device,
        dtype: torch.dtype,
        slots: int = 64,
    ):
        shape = (rows, kv_heads, slots, dim_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.lengths = [0] * rows

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    @property
    def bytes_per_token(self) -> int:
        """What one token of one row takes."""
        return sum(2 * keys[0, :, 0].numel() * keys.element_size() for keys in self.keys)

    def view(self, rows: Sequence[int], layout: Layout) -> "CacheView":
        """The cache as one forward pass sees it: sample i of the `layout` continues row `rows[i]`."""
        self._reserve(max(self.lengths[row] + length for row, length in zip(rows, layout.lengths, strict=True)))
        return CacheView(self, rows, layout)

    def commit(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Makes the last write permanent: `lengths[i]` tokens more in `rows[i]`."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] += length

    def _reserve(self, slots: int) -> None:
        """Doubles until there are enough slots, so that the cost of copying is constant per token."""
        if slots <= self.slots:
            return
        extra = max(slots, 2 * self.slots) - self.slots
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = torch.nn.functional.pad(tensor, (0, 0, 0, extra))


class CacheView:
    """The rows of a cache that take part in one forward pass, and the slots where its tokens go."""

    def __init__(self, cache: KVCache, rows: Sequence[int], layout: Layout):
        device = cache.keys[0].device
        self.cache = cache
        self.rows = list(rows)
        lengths = torch.tensor(layout.lengths)
        past = torch.tensor([cache.lengths[row] for row in rows])
        first = (lengths.cumsum(0) - lengths - past).repeat_interleave(lengths)
        self.row_of_token: Int[Tensor, " n"] = torch.tensor(self.rows).repeat_interleave(lengths).to(device)
        self.slot_of_token: Int[Tensor, " n"] = (torch.arange(len(first)) - first).to(device)

    def write(self, layer: int, keys: Shaped[Tensor, "n h d"], values: Shaped[Tensor, "n h d"]) -> None:
        where = (self.row_of_token, slice(None), self.slot_of_token)
        self.cache.keys[layer][where] = keys.to(self.cache.keys[layer].dtype)
        self.cache.values[layer][where] = values.to(self.cache.values[layer].dtype)

    def read(self, layer: int, samples: slice, num_keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values `(g, h, num_keys, d)` of some samples: a view where their rows are neighbours."""
        rows = self.rows[samples]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            block = slice(rows[0], rows[0] + len(rows))
            return keys[block, :, :num_keys], values[block, :, :num_keys]
        index = torch.tensor(rows, device=keys.device)
        return keys[:, :, :num_keys].index_select(0, index), values[:, :, :num_keys].index_select(0, index)
