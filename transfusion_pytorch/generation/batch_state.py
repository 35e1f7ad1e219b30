"""The state of decode steps: one row for each request that writes text, as tensors on the device.

r rows, v vocabulary.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.generation.sampler import SamplingColumns, sample_tokens
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.hashing import content_key, uniform
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.samples import Piece, Text, as_text
from transfusion_pytorch.sequence.stream import NO_SPANS, Past, TokenStream

STEPS_OF_NUMBERS = 64  # random numbers are made for so many steps at once


class Decoded(NamedTuple):
    """What a decode step makes, on the device. `tokens` are the ids that were chosen, None where that is still to be
    done.
    """

    logits: Shaped[Tensor, "r v"]
    tokens: Int[Tensor, " r"] | None


@dataclass(eq=False)
class Branch:
    """One sequence that the transformer reads for a request: the sample itself, or a version of it for guidance.

    - `pieces`, `ids`: pending, in this order
    - `is_written`: the model writes an id next, so the last one that is pending is left to a decode step
    - `read`: pieces and single ids that were read, in order; `past`: how many tokens and positions those are
    - `row`: its row in the cache; `prefix_key`: the fingerprint of its prompt, until that is read
    """

    pieces: list[Piece] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    is_written: bool = False
    read: list[Piece | int] = field(default_factory=list)
    past: Past = field(default_factory=Past)
    row: Any = None
    prefix_key: Hashable = None

    def append(self, piece: Piece) -> None:
        if isinstance(piece, Text):
            self.ids += piece.ids.tolist()
        else:
            self.pieces = [*self.pending, piece]
            self.ids = []

    @property
    def pending(self) -> list[Piece]:
        return [*self.pieces, *as_text(self.ids)]

    @property
    def needs_prefill(self) -> bool:
        """Whether more is pending than the single id of a decode step."""
        return bool(self.pieces) or len(self.ids) > self.is_written

    def share(self, most: int | None = None, num_tokens: Callable[[Piece], int] | None = None) -> "Share":
        """What a prefill reads; with `most` the first pieces of it, of at most so many tokens, but at least one id or
        span. Text may be split, a span is not. `num_tokens` counts the tokens of a piece. Nothing changes yet.
        """
        count = len(self.ids) - self.is_written
        taken: list[Piece] = []
        rest, left = [*self.pieces, *as_text(self.ids[:count])], self.ids[count:]
        if most is None or num_tokens is None:
            return Share(rest, [], left)
        while rest:
            piece, size = rest[0], num_tokens(rest[0])
            if size <= most or (not taken and not isinstance(piece, Text)):
                taken.append(rest.pop(0))
                most = max(0, most - size)
                continue
            if isinstance(piece, Text) and (most or not taken):
                cut = max(1, most)
                taken.append(Text(piece.ids[:cut]))
                rest[0] = Text(piece.ids[cut:])
            break
        pieces, ids = _with_last_ids(rest)
        return Share(taken, pieces, [*ids, *left])

    def mark_read(self, share: "Share", length: int) -> None:
        """Notes that a share, `length` tokens, is read. A span takes one position. This cannot fail."""
        positions = sum(len(piece.ids) if isinstance(piece, Text) else 1 for piece in share.taken)
        past, read = Past(self.past.length + length, self.past.position + positions), [*self.read, *share.taken]
        self.pieces, self.ids, self.read, self.past = share.pieces, share.ids, read, past  # all, or none

    def mark_id_read(self) -> None:
        """A decode step has read the first id that is pending, and chosen those behind it."""
        self.read.append(self.ids.pop(0))
        self.past = Past(self.past.length + 1, self.past.position + 1)

    def everything(self) -> list[Piece]:
        """What was read, as pieces."""
        pieces: list[Piece] = []
        for is_id, group in groupby(self.read, key=lambda each: isinstance(each, int)):
            members: list[Any] = list(group)
            pieces += as_text(members) if is_id else members
        return pieces

    def rewind(self) -> None:
        """Makes everything pending again."""
        pieces, ids = _with_last_ids([*self.everything(), *self.pending])
        self.pieces, self.ids, self.read, self.past, self.prefix_key = pieces, ids, [], Past(), None


class Share(NamedTuple):
    """What is read of a branch at once, `taken`, and what is then pending: `pieces`, and `ids` behind them."""

    taken: list[Piece]
    pieces: list[Piece]
    ids: list[int]


def fingerprint(pieces: Iterable[Piece]) -> Hashable:
    """Equal for equal pieces, to the bit. Latents without a `key` are read back from their device."""
    return tuple(
        tuple(piece.ids.tolist())
        if isinstance(piece, Text)
        else (piece.type, piece.shape, piece.key or content_key(piece.tensor))
        for piece in pieces
    )


def _with_last_ids(pieces: Sequence[Piece]) -> tuple[list[Piece], list[int]]:
    """Pieces up to the last span, neighbouring text joined, and the ids behind it."""
    joined: list[Piece] = []
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, Text):
            ids = ids + piece.ids.tolist()
        else:
            joined += [*as_text(ids), piece]
            ids = []
    return joined, ids


@dataclass(eq=False)
class BatchState:
    """A fixed set of rows. It is made anew when a request enters or leaves. Otherwise each decode step advances it on
    the device, and nothing is uploaded but the mask of a row that may now write other ids (in the spelling of a shape).

    Tensors are changed in place and never replaced, and the host counts for itself: a step can be compiled, or captured
    in a CUDA graph.

    - `requests` and their `branches`, in the order of the rows of the cache, whose `stamp` says that they did not move
    - `view`: what attention sees of the cache, if there is one; `graph` runs the steps, if they can be captured;
      `reordered` are the weights that steps are made with, None for the model's own
    - `stream`: the id of every row to be read next, and its position
    - `forbidden`: the ids that may not come next; `masks` are the ids that may, of each request
    - `columns`: the options of text; `seen`: ids to be penalised, of the first `num_text`: markers never are
    - `numbers`: random numbers of the next steps, made of `seeds` and `counters`; `step` is the row of this step
    - `num_left`: steps for which it has random numbers, counted by the host
    """

    requests: list[Any]
    branches: list[Any]
    stamp: Hashable
    view: Any
    graph: Any
    stream: TokenStream
    forbidden: Bool[Tensor, "r v"]
    masks: list[Bool[Tensor, " v"]]
    columns: SamplingColumns
    seeds: Int[Tensor, " r"]
    counters: Int[Tensor, "steps r"]
    numbers: Float[Tensor, "steps r"]
    step: Int[Tensor, " 1"]
    seen: Bool[Tensor, "r v"] | None
    num_text: int
    reordered: Any = None
    num_left: int = STEPS_OF_NUMBERS

    @classmethod
    def of(
        cls,
        requests: Sequence[Any],
        *,
        stamp: Hashable = None,
        view: Any = None,
        graph: Any = None,
        reordered: Any = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "BatchState":
        """`requests` write text; `dtype` is that of the model's logits."""
        dtype = precise(dtype)
        branches = [request.branch for request in requests]
        masks = [request.allowed for request in requests]
        seen = None
        if any(request.seen is not None for request in requests):
            none = torch.zeros_like(masks[0])
            seen = _to(torch.stack([none if it.seen is None else it.seen for it in requests]), device)
        first = torch.tensor([request.num_chosen for request in requests], device="cpu")
        counters = _to(first + torch.arange(STEPS_OF_NUMBERS, device="cpu")[:, None], device)
        seeds = _to(torch.tensor([request.seed for request in requests], device="cpu"), device)
        token = _to(torch.tensor([it.ids[-1] for it in branches], device="cpu"), device)
        return cls(
            requests=list(requests),
            branches=branches,
            stamp=stamp,
            view=view,
            graph=graph,
            stream=_stream(token, token if view is None else view.position, [it.past for it in branches]),
            forbidden=_to(~torch.stack(masks), device),
            masks=masks,
            columns=SamplingColumns.of([request.options for request in requests], device=device, dtype=dtype),
            seeds=seeds,
            counters=counters,
            numbers=_numbers(seeds, counters),
            step=torch.zeros(1, dtype=torch.long, device=device),
            seen=seen,
            num_text=requests[0].vocabulary.num_text,
            reordered=reordered,
        )

    @property
    def is_used_up(self) -> bool:
        """Whether it cannot serve another step, because a row of the cache is full."""
        return self.view is not None and not self.view.num_steps

    @property
    def has_processors(self) -> bool:
        """Whether a user's code sees the logits before an id is chosen."""
        return any(request.options.logits_processors for request in self.requests)

    @torch.inference_mode()
    def choose(self, logits: Shaped[Tensor, "r v"]) -> Int[Tensor, " r"]:
        """The next id of every row; they are the ones to be read next. On the device alone."""
        uniform = self.numbers.index_select(0, self.step)[0]
        tokens = sample_tokens(logits, self.forbidden, self.columns, uniform, self.seen)
        self.stream.token.copy_(tokens)
        self.step.add_(1)
        if self.view is not None:
            self.view.advance()
        if self.seen is not None:
            last = tokens.clamp(min=0)[:, None]  # a row without a choice ends
            self.seen.scatter_(1, last, self.seen.gather(1, last) | (last < self.num_text))
        return tokens

    def count_step(self) -> None:
        """What the host keeps of a step: how many more there may be. New random numbers are made where they end."""
        self.num_left -= 1
        if self.view is not None:
            self.view.num_steps -= 1
        if not self.num_left:
            self.counters.add_(STEPS_OF_NUMBERS)
            self.numbers.copy_(_numbers(self.seeds, self.counters))
            self.step.zero_()
            self.num_left = STEPS_OF_NUMBERS

    def follow(self) -> bool:
        """Whether all requests still write text; what they may write now is then brought up to date."""
        if not all(request.is_writing for request in self.requests):
            return False
        for i, request in enumerate(self.requests):
            mask = request.allowed
            if mask is not self.masks[i]:
                self.forbidden[i].copy_(~mask, non_blocking=True)
                self.masks[i] = mask
        return True


def _stream(token: Int[Tensor, " r"], position: Int[Tensor, " r"], past: Sequence[Past]) -> TokenStream:
    """One token for each row. It serves all steps, whose ids and positions are written into it; the rest, which only
    training and prefill ask for, is left as it is.
    """
    lengths = (1,) * len(past)
    return TokenStream(
        token=token,
        sample=token,
        modulation_index=token,
        position=position,
        label=token,
        layout=Layout(end=token, lengths=lengths, past=tuple(row.length for row in past), device=token.device),
        spans=NO_SPANS,
        placements={},
        lengths=lengths,
        past=tuple(past),
        ignore_index=-1,
    )


def _numbers(seeds: Int[Tensor, " r"], counters: Int[Tensor, "steps r"]) -> Float[Tensor, "steps r"]:
    return uniform(seeds, counters, counters.device).clamp(max=1 - 1e-7)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
