"""Latents of several modalities in one tensor, one behind the other, and where they stand in a stream.

Denoisings that take a solver step together are one tensor `(u, w)`: its width w are their channels if all have as many,
else 1. A stream has them in another order, several times for guidance, and among others.

u rows of joined latents, v rows of what a stream makes of its spans, k latents of one type, c their channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.sequence.samples import Modality
from transfusion_pytorch.sequence.stream import TokenStream


@dataclass(frozen=True)
class JoinedSpans:
    """How joined latents become those of a stream, and its velocities joined ones.

    - `channels` of each type
    - `sources`: for each type, `(k)`: which rows of the joined latents its spans are, in order; None if they are all,
      as they are. Rows from u on are those of its `history`: its latents in the stream, those joined included
    - `results`: which rows of the stream's velocities are wanted, in which order; None if they are all, as they are
    """

    channels: Mapping[int, int]
    sources: Mapping[int, Tensor | None]
    results: Int[Tensor, " v"] | None
    history: Mapping[int, Tensor]

    @classmethod
    def of(
        cls,
        stream: TokenStream,
        spans: Sequence[int],
        owners: Sequence[int],
        joined: Sequence[Modality],
        history: Mapping[int, Tensor],
    ) -> "JoinedSpans":
        """`joined` are the latents in their order; `spans[i]` of the stream is `joined[owners[i]]`. The
        velocities are wanted in the order of `spans`.
        """
        device, channels = stream.token.device, {it.type: it.tensor.shape[-1] for it in joined}
        width = joined_width(it.tensor for it in joined)
        starts = [0, *accumulate(it.tensor.numel() // width for it in joined)]
        owner_of, sizes = dict(zip(spans, owners, strict=True)), stream.spans.sizes
        sources: dict[int, Tensor | None] = {}
        made: dict[int, tuple[int, int]] = {}  # rows of each span among the velocities
        end = 0
        for kind in sorted(channels):
            taken, seen = [], starts[-1]
            for span in stream.spans.of_type(kind):
                count = sizes[span] * channels[kind] // width
                first = starts[owner_of[span]] if span in owner_of else seen
                taken.append((first, first + count))
                made[span] = (end, end + count)
                seen, end = seen + count, end + count
            sources[kind] = _index(taken, starts[-1], device)
        return cls(channels, sources, _index([made[span] for span in spans], end, device), history)

    def latents(self, x: Float[Tensor, "u w"]) -> dict[int, Tensor]:
        """Those of the stream by type, `(k, c)`."""
        latents = dict(self.history)
        for kind, index in self.sources.items():
            picked = x
            if index is not None:
                before = self.history.get(kind)
                rows = x if before is None else torch.cat((x, before.reshape(-1, x.shape[1])))
                picked = rows.index_select(0, index)
            latents[kind] = picked if picked.shape[1] == self.channels[kind] else picked.view(-1, self.channels[kind])
        return latents

    def join(self, velocities: Mapping[int, Tensor], width: int) -> Float[Tensor, "v w"]:
        """What the stream made of its spans."""
        made = [velocities[kind] for kind in self.sources]
        made = [each if each.shape[1] == width else each.reshape(-1, width) for each in made]
        rows = made[0] if len(made) == 1 else torch.cat(made)
        return rows if self.results is None else rows.index_select(0, self.results)


def joined_width(latents: Iterable[Tensor]) -> int:
    """The columns of latents in one tensor: their channels if all have as many, else 1."""
    channels = {x.shape[-1] for x in latents}
    return channels.pop() if len(channels) == 1 else 1


def join(latents: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "u w"]:
    """One behind the other."""
    width = joined_width(latents)
    return torch.cat([x.reshape(-1, width) for x in latents])


def split(joined: Float[Tensor, "u w"], like: Sequence[Tensor]) -> list[Float[Tensor, "..."]]:
    """The inverse of `join`, as views of the shapes of `like`."""
    parts = joined.split([x.numel() // joined.shape[1] for x in like])
    return [part if part.shape == x.shape else part.view_as(x) for part, x in zip(parts, like, strict=True)]


def _index(parts: Sequence[tuple[int, int]], count: int, device: torch.device) -> Int[Tensor, " k"] | None:
    """All numbers from the start to the end of each part; None where these are the first `count`, in order."""
    index = torch.cat([torch.arange(start, end, device="cpu") for start, end in parts])
    is_all = len(index) == count and bool((index.diff() == 1).all()) and int(index[0]) == 0
    return None if is_all else index.to(device, non_blocking=True)
