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

from transfusion_pytorch.generation.sampler import SamplingTensors, sample_tokens, upload
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.hashing import content_key, uniform
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.samples import Modality, Piece, Text, as_text
from transfusion_pytorch.sequence.stream import Past

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


class BatchState:
    """The rows of decode steps: one for each request that generates text. It is made anew when a request enters or
    leaves. Otherwise each step advances it on the device, and nothing is uploaded but the mask of a row that may now
    write other ids (in the spelling of a shape).

    Tensors are changed in place and never replaced, and the host counts for itself: a step can be compiled, or captured
    in a CUDA graph.

    - `requests` and their `branches`, in the order of the rows of the cache, whose `stamp` says that they did not move
    - `view`: what attention sees of the cache, if there is one; `graph` runs the steps, if they can be captured;
      `reordered` are the weights that steps are made with, None for the model's own
    - `token`, `position`: the id of every row to be read next, `(r,)`, and where it stands; `layout`: a token a row
    - `forbidden`: the ids that may not come next, `(r, v)`; `masks` are the ids that may, of each request
    - `sampling`: the options of text; `seen`: ids of text to be penalised, `(r, v)`, None where no row has a penalty
    - `numbers`: random numbers of the next steps, `(steps, r)`, made of `seeds` and `counters`; `step`, `(1,)`, is the
      row of this step
    - `num_left`: steps for which it has random numbers, counted by the host
    """

    def __init__(
        self,
        requests: Sequence[Any],
        device: torch.device,
        dtype: torch.dtype,
        *,
        stamp: Hashable = None,
        view: Any = None,
        graph: Any = None,
        reordered: Any = None,
    ):
        self.requests, self.branches = list(requests), [request.branch for request in requests]
        self.stamp, self.view, self.graph, self.reordered = stamp, view, graph, reordered
        self.token = upload([branch.items[-1] for branch in self.branches], device)
        self.position = self.token if view is None else view.position
        past = tuple(branch.length for branch in self.branches)
        self.layout = Layout(end=self.token, lengths=(1,) * len(past), past=past, device=device)
        self.masks = [request.allowed for request in requests]
        self.forbidden = (~torch.stack(self.masks)).to(device, non_blocking=True)
        options = [request.options for request in requests]
        self.sampling = SamplingTensors.of(options, device=device, dtype=precise(dtype))
        self.has_processors = any(each.logits_processors for each in options)  # a user's code sees the logits first
        self.num_text: int = requests[0].vocabulary.num_text  # markers are never penalised
        self.seen = None if self.sampling.penalty is None else self._seen().to(device, non_blocking=True)
        self.seeds = upload([request.seed for request in requests], device)
        steps = torch.arange(STEPS_OF_NUMBERS, device="cpu")[:, None]
        first = torch.tensor([request.num_chosen for request in requests], device="cpu")
        self.counters = (first + steps).to(device, non_blocking=True)
        self.numbers = self._random_numbers()
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.num_left = STEPS_OF_NUMBERS

    @torch.inference_mode()
    def choose(self, logits: Shaped[Tensor, "r v"]) -> Int[Tensor, " r"]:
        """The next id of every row; they are the ones to be read next. On the device alone."""
        uniform = self.numbers.index_select(0, self.step)[0]
        tokens = sample_tokens(logits, self.forbidden, self.sampling, uniform, self.seen)
        self.token.copy_(tokens)
        self.step.add_(1)
        if self.view is not None:
            self.view.advance()
        if self.seen is not None:
            last = tokens.clamp(min=0)[:, None]  # a row without a choice ends
            self.seen.scatter_(1, last, self.seen.gather(1, last) | (last < self.num_text))
        return tokens

    def finish_step(self) -> None:
        """What the host keeps of a step: how many more there may be. New random numbers are made where they end."""
        self.num_left -= 1
        if self.view is not None:
            self.view.num_steps -= 1
        if not self.num_left:
            self.counters.add_(STEPS_OF_NUMBERS)
            self.numbers.copy_(self._random_numbers())
            self.step.zero_()
            self.num_left = STEPS_OF_NUMBERS

    def update_masks(self) -> None:
        """Uploads the masks of the rows that may now write other ids."""
        for i, request in enumerate(self.requests):
            mask = request.allowed
            if mask is not self.masks[i]:
                self.forbidden[i].copy_(~mask, non_blocking=True)
                self.masks[i] = mask

    def _seen(self) -> Bool[Tensor, "r v"]:
        seen = torch.zeros(len(self.masks), len(self.masks[0]), dtype=torch.bool, device="cpu")
        for row, branch in zip(seen, self.branches, strict=True):
            row[[item for item in branch.items if isinstance(item, int) and item < self.num_text]] = True
        return seen

    def _random_numbers(self) -> Float[Tensor, "steps r"]:
        return uniform(self.seeds, self.counters, self.counters.device).clamp(max=1 - 1e-7)
