"""What the tests of the network share: streams written as strings, what attends over them, parameters without zeros.

`stream("ttAAt", "B")` is two samples: text, text, a span of two tokens, text; and a span of one. The masks are written
here once more, from their definition and token by token, so that the package has something to be compared with.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn

from transfusion_pytorch.network.norms import Conditioning
from transfusion_pytorch.sequence.masks import Layout

LONG = "t" * 230 + "A" * 200 + "t" * 90  # more than 512, taken in chunks of queries; the span crosses their edges
STREAMS = {
    "text": ["tttt", "tttt"],
    "one mask": ["ttAAAt", "ttBBBt", "ttCCCt"],
    "many masks": ["ttAAAt", "tttAAA", "AABBtt"],
    "ragged": ["ttAAAtBBt", "t", "AAtt", "tA", "BBAA", "tttttt"],
    "one span": ["AAAAA"],
    "spans of one": ["ABAtBA"],
    "long": [LONG],
    "long, many masks": [LONG, LONG[::-1], "tAAt"],
    "long text": ["t" * 520],
}


class Stream(NamedTuple):
    """A packed stream: its layout, and for each token its rotary position, its span (-1 for text) and its sample."""

    layout: Layout
    position: Tensor
    span: Tensor
    sample: Tensor

    @property
    def is_text(self) -> Tensor:
        return self.span < 0

    @property
    def sees(self) -> Tensor:
        """From the definition: earlier tokens of the sample and itself, and all of its own span."""
        index = torch.arange(len(self.span))
        same_sample = self.sample[:, None] == self.sample
        same_span = (self.span[:, None] == self.span) & ~self.is_text
        return same_sample & ((index <= index[:, None]) | same_span)

    @property
    def dense(self) -> Tensor:
        """The mask of the package."""
        return self.layout.prepare().intervals.dense()

    def conditioning(self, condition: Tensor) -> Conditioning:
        return Conditioning(condition, self.span + 1)

    def arguments(self, condition: Tensor | None = None) -> dict:
        """What `Transformer.forward` takes beside the tokens."""
        conditioning = None if condition is None else self.conditioning(condition)
        return dict(position=self.position, layout=self.layout, conditioning=conditioning)


def stream(*samples: str, start: Sequence[int] | None = None, stop: Sequence[int] | None = None) -> Stream:
    """Lays out samples, or of each only the tokens from `start` on and up to `stop`."""
    start = start or [0] * len(samples)
    stop = stop or [len(sample) for sample in samples]
    rows, spans = [], 0
    for i, sample in enumerate(samples):
        row, position = [], 0
        for letter, group in groupby(sample):
            size = len(list(group))
            for k in range(size):
                is_text = letter == "t"
                end = len(row) + 1 if is_text else len(row) - k + size
                row.append((end, position + k if is_text else position, -1 if is_text else spans, i))
            position += size if letter == "t" else 1
            spans += letter != "t"
        rows += row[start[i] : stop[i]]
    end, position, span, sample = torch.tensor(rows).T
    lengths = tuple(b - a for a, b in zip(start, stop, strict=True))
    return Stream(Layout(end, lengths, tuple(start)), position, span, sample)


def cuts(sample: str) -> list[int]:
    """Where reading may stop: anywhere but inside a span. `tAAt -> [1 3]`"""
    return [i for i in range(1, len(sample)) if sample[i] == "t" or sample[i] != sample[i - 1]]


def perturb(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Breaks everything that starts at zero, or tests would pass because nothing happens."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def projections(n, *, heads=4, kv_heads=4, dim_head=6, dtype=torch.float64, requires_grad=False):
    """Queries, keys and values."""
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(n, h, dim_head, dtype=dtype, requires_grad=requires_grad) for h in shapes]


def naive_attention(q, k, v, sees, softcap=None):
    """Attention as it is written in books, over the whole stream at once."""
    k, v = (repeat(x, "n k e -> n (k r) e", r=q.shape[1] // k.shape[1]) for x in (k, v))
    logits = torch.einsum("q h e, k h e -> h q k", q, k) / q.shape[-1] ** 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.einsum("h q k, k h e -> q h e", logits.masked_fill(~sees, -torch.inf).softmax(dim=-1), v)
