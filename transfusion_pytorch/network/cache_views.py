"""Views of the KV cache: where the new keys and values of a forward pass go, and what its queries may see.

Whatever is equal for all layers, or from one evaluation to the next, is computed once.

g rows, h key/value heads, s slots, e channels of a head, t new tokens of a row, n tokens of the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.network.cache import CacheBlock, CacheRow, KVCache
from transfusion_pytorch.sequence.masks import Chunk, Layout

KEYS_AT_ONCE = 64  # a view of a decode step serves until this many more are needed


class Stored(NamedTuple):
    """Keys or values of some rows of a block, for every layer.

    - `flat`: all slots of the block, `(g h s, e)`, to write to; `seen`: those of the rows, `(g, h, k, e)`, to attend to
    """

    flat: list[Shaped[Tensor, "g_h_s e"]]
    seen: list[Shaped[Tensor, "g h k e"]]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows: slice, num_keys: int) -> "Stored":
        return cls([it.view(-1, it.shape[-1]) for it in tensors], [it[rows, :, :num_keys] for it in tensors])

    def update(self, layer: int, slots: Int[Tensor, " n_h"], new: Shaped[Tensor, "n h e"]) -> Tensor:
        """Writes the new keys or values. Returns a view of all that may be seen."""
        flat = self.flat[layer]
        if new.dtype != flat.dtype:  # what is computed under autocast need not have its type
            new = new.to(flat.dtype)
        flat.index_copy_(0, slots, new.reshape(-1, flat.shape[-1]))
        return self.seen[layer]


class CacheRun(NamedTuple):
    """Neighbouring rows of a block that get the same number of new tokens.

    - `tokens`: their slots in the stream; `count`: how many rows these are
    - `slots`: where their keys and values go in the block, heads and slots flattened
    - `chunks`: which keys each query may see
    """

    tokens: slice
    count: int
    slots: Int[Tensor, " n_h"]
    keys: Stored
    values: Stored
    chunks: Sequence[Chunk]

    def batched(self, part: Shaped[Tensor, "n h e"]) -> Shaped[Tensor, "g h t e"]:
        return part.unflatten(0, (self.count, -1)).transpose(1, 2)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Shaped[Tensor, "g h k e"], Shaped[Tensor, "g h k e"]]:
        """Writes the new keys and values of its tokens. Returns views of all that its queries may see."""
        return self.keys.update(layer, self.slots, k), self.values.update(layer, self.slots, v)


class CacheView:
    """The rows that take part in a forward pass over a stream: sample i of the `layout` continues `rows[i]`.

    It may serve many passes, whose writes replace each other, until one of the rows moves. `prepared` are the layers as
    `inference.py` runs them, if it does.
    """

    def __init__(self, cache: KVCache, rows: Sequence[CacheRow], layout: Layout, *, prepared: Any = None):
        cache.reserve(rows, layout.lengths)
        self.prepared = prepared
        numbers = tuple(row.block.capacity << 32 | row.index for row in rows)  # no neighbours in different blocks
        self.runs: list[CacheRun] = []
        for run in layout.runs_in(numbers):
            members, length = rows[run.samples], layout.lengths[run.samples.start]
            block, first = members[0].block, members[0].index
            held = slice(first, first + len(members))
            most = max(chunk.num_keys for chunk in run.chunks)
            keys, values = (Stored.of(tensors, held, most) for tensors in (block.keys, block.values))
            slots = _slots(cache, members, length)
            self.runs.append(CacheRun(run.tokens, len(members), slots, keys, values, run.chunks))


@dataclass(eq=False)
class DecodeRun:
    """The first `count` rows of a block, each of which gets one token.

    - `tokens`: their slots in the stream
    - `slots`: where their keys and values go in the block, heads and slots flattened
    - `bias`: 0 for the keys that each row may see, -inf for the others; `newest`: those of the new tokens in it
    """

    tokens: slice
    count: int
    slots: Int[Tensor, " g_h"]
    bias: Float[Tensor, "g 1 1 k"]
    newest: Int[Tensor, " g"]
    keys: Stored
    values: Stored

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Shaped[Tensor, "g h k e"], Shaped[Tensor, "g h k e"]]:
        """Writes the new keys and values of its tokens. Returns views of all that its queries may see."""
        return self.keys.update(layer, self.slots, k), self.values.update(layer, self.slots, v)

    def advance(self) -> None:
        """To the next token of each row."""
        self.slots += 1
        self.newest += 1
        self.bias.view(-1).index_fill_(0, self.newest, 0.0)


class DecodeView:
    """The rows of decode steps, which get one token each. `rows` stand at the front of their blocks, in order.

    All shapes stay the same from step to step, and `advance` changes the tensors in place: a step can be compiled or
    captured in a graph. A view serves `num_steps` more, or until one of the rows moves. `is_fixed` views attend to all
    slots of their blocks; others leave out what no row will need soon.

    - `rotations`: the rotary phases of the next steps; `prepared`: see `CacheView`
    """

    def __init__(
        self,
        cache: KVCache,
        rows: Sequence[CacheRow],
        rotations: Shaped[Tensor, "steps r 1 f"],
        *,
        prepared: Any = None,
        is_fixed: bool = False,
    ):
        cache.reserve(rows, [1] * len(rows))
        self.rotations, self.prepared, self.step = rotations, prepared, 0
        self.runs: list[DecodeRun] = []
        self.num_steps = KEYS_AT_ONCE
        start = 0
        while start < len(rows):
            block = rows[start].block
            members = [row for row in rows[start:] if row.block is block]
            assert [row.index for row in members] == list(range(len(members))), "rows to decode are gathered first"
            longest = max(row.length for row in members)
            num_keys = block.capacity if is_fixed else KEYS_AT_ONCE * (longest // KEYS_AT_ONCE + 1)
            num_keys = min(num_keys, block.capacity)
            tokens = slice(start, start + len(members))
            self.runs.append(_decode_run(cache, block, members, tokens, num_keys))
            for row in members:  # all that later steps may write
                block.written[row.index] = max(block.written[row.index], num_keys)
            self.num_steps = min(self.num_steps, num_keys - longest)
            start = tokens.stop

    @property
    def rotation(self) -> Shaped[Tensor, "r 1 f"]:
        """The rotary phases of this step."""
        return self.rotations[self.step]

    def advance(self) -> None:
        """To the next token of each row."""
        self.num_steps -= 1
        self.step += 1
        if self.num_steps:
            for run in self.runs:
                run.advance()


def _decode_run(cache: KVCache, block: CacheBlock, rows: Sequence[CacheRow], tokens: slice, num_keys: int) -> DecodeRun:
    count, held = len(rows), slice(0, len(rows))
    past = torch.tensor([row.length for row in rows], device="cpu")
    is_seen = torch.arange(num_keys, device="cpu") <= past[:, None]
    bias = torch.zeros(is_seen.shape, dtype=cache.dtype, device="cpu").masked_fill_(~is_seen, float("-inf"))
    newest = past + torch.arange(count, device="cpu") * num_keys
    keys, values = (Stored.of(tensors, held, num_keys) for tensors in (block.keys, block.values))
    bias, newest = (it.to(cache.device, non_blocking=True) for it in (bias[:, None, None], newest))
    return DecodeRun(tokens, count, _slots(cache, rows, 1), bias, newest, keys, values)


def _slots(cache: KVCache, rows: Sequence[CacheRow], length: int) -> Int[Tensor, " g_t_h"]:
    """Where `length` new tokens of each of these rows go in the flattened block, token by token and head by head."""
    first = torch.tensor([row.index * cache.kv_heads for row in rows], device="cpu")
    past = torch.tensor([row.length for row in rows], device="cpu")
    heads, steps = torch.arange(cache.kv_heads, device="cpu"), torch.arange(length, device="cpu")
    slots = (first[:, None, None] + heads) * rows[0].block.capacity + (past[:, None] + steps)[:, :, None]
    return slots.flatten().to(cache.device, non_blocking=True)
