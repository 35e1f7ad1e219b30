"""The state of decode steps: one row for each request that writes text, as tensors on the device.

r rows, v vocabulary.
"""

from collections.abc import Hashable, Iterable, Sequence
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
from transfusion_pytorch.sequence.samples import Modality, Piece, Text, as_text
from transfusion_pytorch.sequence.stream import NO_SPANS, Past, TokenStream

Item = int | Modality  # an id of text or of a marker, or a modality
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

    - `items`: its ids and modalities, markers included; of these the first `num_read`, `length` tokens, are read
    - `is_decoding`: the model chooses an id next, so the last item is read by a decode step and not by a prefill
    - `row`: its row in the cache; `prefix_key`: the fingerprint of its prompt, until that is read
    """

    items: list[Item] = field(default_factory=list)
    num_read: int = 0
    length: int = 0
    is_decoding: bool = False
    row: Any = None
    prefix_key: Hashable = None

    @property
    def past(self) -> Past:
        """What is read, in tokens and in positions: a modality takes one position, as an id does."""
        return Past(self.length, self.num_read)

    @property
    def prefill_items(self) -> list[Item]:
        """What a prefill reads."""
        return self.items[self.num_read : len(self.items) - self.is_decoding]

    @property
    def needs_prefill(self) -> bool:
        return len(self.items) - self.num_read > self.is_decoding

    def mark_read(self, num_items: int, length: int) -> None:
        """Notes that the next `num_items`, which are `length` tokens, are read. This cannot fail."""
        self.num_read, self.length = self.num_read + num_items, self.length + length  # both, or none

    def rewind(self) -> None:
        """Everything is to be read again."""
        self.num_read, self.length, self.prefix_key = 0, 0, None


def as_pieces(items: Iterable[Item]) -> list[Piece]:
    """Neighbouring ids become one text."""
    pieces: list[Piece] = []
    for is_id, group in groupby(items, key=lambda item: isinstance(item, int)):
        members: list[Any] = list(group)
        pieces += as_text(members) if is_id else members
    return pieces


def as_items(pieces: Iterable[Piece]) -> list[Item]:
    """The inverse of `as_pieces`."""
    return [item for piece in pieces for item in (piece.ids.tolist() if isinstance(piece, Text) else [piece])]


def fingerprint(items: Iterable[Item]) -> Hashable:
    """Equal for equal items, to the bit. Latents without a `key` are read back from their device."""
    return tuple(
        item if isinstance(item, int) else (item.type, item.shape, item.key or content_key(item.tensor))
        for item in items
    )


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
        num_text, seen = requests[0].vocabulary.num_text, None
        if any(request.options.text_repetition_penalty != 1 for request in requests):
            seen = torch.zeros(len(requests), len(masks[0]), dtype=torch.bool, device="cpu")
            for row, branch in zip(seen, branches, strict=True):
                row[[item for item in branch.items if isinstance(item, int) and item < num_text]] = True
            seen = _to(seen, device)
        first = torch.tensor([request.num_chosen for request in requests], device="cpu")
        counters = _to(first + torch.arange(STEPS_OF_NUMBERS, device="cpu")[:, None], device)
        seeds = _to(torch.tensor([request.seed for request in requests], device="cpu"), device)
        token = _to(torch.tensor([it.items[-1] for it in branches], device="cpu"), device)
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
            num_text=num_text,
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
