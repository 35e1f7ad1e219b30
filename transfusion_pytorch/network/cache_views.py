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
    - `target`: the slots to write to, where they are the same in all rows
    """

    flat: list[Shaped[Tensor, "g_h_s e"]]
    seen: list[Shaped[Tensor, "g h k e"]]
    target: list[Shaped[Tensor, "g t h e"]] | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows: slice, num_keys: int, target: slice | None = None) -> "Stored":
        flat, seen = [it.view(-1, it.shape[-1]) for it in tensors], [it[rows, :, :num_keys] for it in tensors]
        return cls(flat, seen, None if target is None else [it[rows, :, target].transpose(1, 2) for it in tensors])

    def update(self, layer: int, slots: Int[Tensor, " n_h"] | None, new: Shaped[Tensor, "n h e"]) -> Tensor:
        """Writes the new keys or values. Returns a view of all that may be seen."""
        if self.target is not None:
            target = self.target[layer]
            target.copy_(new.view(target.shape))
            return self.seen[layer]
        assert slots is not None
        flat = self.flat[layer]
        if new.dtype != flat.dtype:  # what is computed under autocast need not have its type
            new = new.to(flat.dtype)
        flat.index_copy_(0, slots, new.reshape(-1, flat.shape[-1]))
        return self.seen[layer]


class CacheRun(NamedTuple):
    """Neighbouring rows of a block that get the same number of new tokens.

    - `tokens`: their slots in the stream; `count`: how many rows these are
    - `slots`: where their keys and values go in the block, heads and slots flattened; None where there is a `target`
    - `chunks`: which keys each query may see
    """

    tokens: slice
    count: int
    slots: Int[Tensor, " n_h"] | None
    keys: Stored
    values: Stored
    chunks: Sequence[Chunk]

    def batched(self, part: Shaped[Tensor, "n h e"]) -> Shaped[Tensor, "g h t e"]:
        return part.view(self.count, -1, *part.shape[1:]).transpose(1, 2)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Shaped[Tensor, "g h k e"], Shaped[Tensor, "g h k e"]]:
        """Writes the new keys and values of its tokens. Returns views of all that its queries may see."""
        return self.keys.update(layer, self.slots, k), self.values.update(layer, self.slots, v)


class CacheView:
    """The rows that take part in a forward pass over a stream: sample i of the `layout` continues `rows[i]`.

    It may serve many passes over the stream, whose writes replace each other, until one of the rows moves. `prepared`
    are the layers of each expert as `inference.py` runs them, if it does, and `phases` the rotary phases: the first
    pass makes both.
    """

    def __init__(self, cache: KVCache, rows: Sequence[CacheRow], layout: Layout, *, prepared: Any = None):
        cache.reserve(rows, layout.lengths)
        self.prepared = prepared
        self.phases: Tensor | None = None
        numbers = tuple(row.block.capacity << 32 | row.index for row in rows)  # no neighbours in different blocks
        self.runs: list[CacheRun] = []
        for run in layout.runs_in(numbers):
            members, length = rows[run.samples], layout.lengths[run.samples.start]
            block, first = members[0].block, members[0].index
            held = slice(first, first + len(members))
            most = max(chunk.num_keys for chunk in run.chunks)
            past = {row.length for row in members}
            target = slice(min(past), min(past) + length) if len(past) == 1 else None
            keys, values = (Stored.of(tensors, held, most, target) for tensors in (block.keys, block.values))
            slots = None if target is not None else _slots(cache, members, length)
            self.runs.append(CacheRun(run.tokens, len(members), slots, keys, values, run.chunks))


@dataclass(eq=False)
class DecodeRun:
    """The first `count` rows of a block, each of which gets one token.

    - `tokens`: their slots in the stream
    - `slots`: where their keys and values go in the block, heads and slots flattened
    - `newest`: the slot of the new token in its row; `numbers` are those of all slots that are attended to
    - `zero`: of the type of the keys
    """

    tokens: slice
    count: int
    slots: Int[Tensor, " g_h"]
    newest: Int[Tensor, "g 1 1 1"]
    numbers: Int[Tensor, " k"]
    zero: Float[Tensor, ""]
    keys: Stored
    values: Stored

    def bias(self) -> Float[Tensor, "g 1 1 k"]:
        """0 for the keys that each row may see, -inf for the others. All layers share it."""
        return self.zero.masked_fill(self.numbers > self.newest, float("-inf"))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Shaped[Tensor, "g h k e"], Shaped[Tensor, "g h k e"]]:
        """Writes the new keys and values of its tokens. Returns views of all that its queries may see."""
        return self.keys.update(layer, self.slots, k), self.values.update(layer, self.slots, v)


class DecodeView:
    """The rows of decode steps, which get one token each. `rows` stand at the front of their blocks, in order.

    All shapes stay the same from step to step, and what changes are tensors on the device, in place: a step can be
    compiled, or captured in a CUDA graph. A view serves `num_steps` more, which the host counts, or until one of the
    rows moves. `is_fixed` views attend to all slots of their blocks; others leave out what no row will need soon.

    - `position`: the rotary position of each row's next token; `phases`: those of all positions that may come
    - `prepared`: see `CacheView`
    """

    def __init__(
        self,
        cache: KVCache,
        rows: Sequence[CacheRow],
        positions: Sequence[int],
        phases: Float[Tensor, "p f 2"],
        *,
        prepared: Any = None,
        is_fixed: bool = False,
    ):
        cache.reserve(rows, [1] * len(rows))
        self.position = torch.tensor(positions, device="cpu").to(cache.device, non_blocking=True)
        self.phases, self.prepared = phases, prepared
        self.runs: list[DecodeRun] = []
        self.num_steps = len(phases) - max(positions)
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

    def rotation(self) -> Float[Tensor, "r f 2"]:
        """The rotary phases of this step."""
        return self.phases.index_select(0, self.position)

    def advance(self) -> None:
        """To the next token of each row, on the device alone: `num_steps` is counted by whoever takes the step."""
        self.position.add_(1)
        for run in self.runs:
            run.slots.add_(1)
            run.newest.add_(1)


def _decode_run(cache: KVCache, block: CacheBlock, rows: Sequence[CacheRow], tokens: slice, num_keys: int) -> DecodeRun:
    count, held = len(rows), slice(0, len(rows))
    newest = torch.tensor([row.length for row in rows], device="cpu")[:, None, None, None]
    keys, values = (Stored.of(tensors, held, num_keys) for tensors in (block.keys, block.values))
    return DecodeRun(
        tokens=tokens,
        count=count,
        slots=_slots(cache, rows, 1),
        newest=newest.to(cache.device, non_blocking=True),
        numbers=torch.arange(num_keys, device=cache.device),
        zero=torch.zeros((), device=cache.device, dtype=cache.dtype),
        keys=keys,
        values=values,
    )


def _slots(cache: KVCache, rows: Sequence[CacheRow], length: int) -> Int[Tensor, " g_t_h"]:
    """Where `length` new tokens of each of these rows go in the flattened block, token by token and head by head."""
    first = torch.tensor([row.index * cache.kv_heads for row in rows], device="cpu")
    past = torch.tensor([row.length for row in rows], device="cpu")
    heads, steps = torch.arange(cache.kv_heads, device="cpu"), torch.arange(length, device="cpu")
    slots = (first[:, None, None] + heads) * rows[0].block.capacity + (past[:, None] + steps)[:, :, None]
    return slots.flatten().to(cache.device, non_blocking=True)
