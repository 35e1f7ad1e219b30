"""The state of decode steps: one row for each request that writes text, as tensors on the device.

r rows, v vocabulary.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transfusion_pytorch.generation.sampler import SamplingColumns
from transfusion_pytorch.sequence.hashing import uniform
from transfusion_pytorch.sequence.masks import Layout
from transfusion_pytorch.sequence.stream import NO_SPANS, Past, TokenStream

STEPS_OF_NUMBERS = 64  # random numbers are made for so many steps at once


@dataclass(eq=False)
class BatchState:
    """A fixed set of rows. It is made anew when a request enters or leaves, or when the ids that it may write change.
    Otherwise each decode step advances it on the device, and nothing is uploaded.

    - `requests` and their `branches`, in the order of the rows of the cache, whose `stamp` says that they did not move
    - `view`: what attention sees of the cache, if there is one
    - `token`: the id to be read next; `position`: its rotary position
    - `forbidden`: the ids that may not come next, `(1, v)` where they are the same for all rows; `masks` are the ids
      that may, of each request when it was made
    - `columns`: the options of text; `seen`: ids to be penalised, of the first `num_text`: markers never are
    - `numbers`: random numbers of the next steps, of which `step` were used
    """

    requests: list[Any]
    branches: list[Any]
    stamp: Hashable
    view: Any
    token: Int[Tensor, " r"]
    position: Int[Tensor, " r"]
    forbidden: Bool[Tensor, "#r v"]
    masks: list[Bool[Tensor, " v"]]
    columns: SamplingColumns
    numbers: Float[Tensor, "r steps"]
    seen: Bool[Tensor, "r v"] | None
    num_text: int
    no_times: Float[Tensor, " none"]
    step: int = 0

    @classmethod
    def of(
        cls,
        requests: Sequence[Any],
        *,
        stamp: Hashable = None,
        view: Any = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "BatchState":
        """`requests` write text; `dtype` is that of the model's logits."""
        dtype = torch.promote_types(dtype, torch.float32)
        branches = [request.branch for request in requests]
        masks = [request.allowed for request in requests]
        same = all(mask is masks[0] for mask in masks)
        seen = None
        if any(request.seen is not None for request in requests):
            none = torch.zeros_like(masks[0])
            seen = _to(torch.stack([none if it.seen is None else it.seen for it in requests]), device)
        counters = torch.tensor([request.num_chosen for request in requests], device="cpu")
        steps = torch.arange(STEPS_OF_NUMBERS, device="cpu")
        seeds = torch.tensor([request.seed for request in requests], device="cpu")
        return cls(
            requests=list(requests),
            branches=branches,
            stamp=stamp,
            view=view,
            token=_to(torch.tensor([branch.ids[-1] if branch.ids else 0 for branch in branches], device="cpu"), device),
            position=_to(torch.tensor([branch.past.position for branch in branches], device="cpu"), device),
            forbidden=_to(~(masks[0][None] if same else torch.stack(masks)), device),
            masks=masks,
            columns=SamplingColumns.of([request.options for request in requests], device=device, dtype=dtype),
            numbers=uniform(seeds[:, None], counters[:, None] + steps, device).clamp(max=1 - 1e-7),
            seen=seen,
            num_text=requests[0].vocabulary.num_text,
            no_times=torch.empty(0, device=device, dtype=dtype),
        )

    @property
    def is_used_up(self) -> bool:
        """Whether it cannot serve another step: no random numbers are left, or the rows are full."""
        return self.step == STEPS_OF_NUMBERS or (self.view is not None and not self.view.num_steps)

    @property
    def uniform(self) -> Float[Tensor, " r"]:
        """The random number of every row for this step."""
        return self.numbers[:, self.step]

    def advance(self, tokens: Int[Tensor, " r"]) -> None:
        """To the next step, in which these ids are read."""
        self.token = tokens
        self.position += 1
        self.step += 1
        if self.view is not None:
            self.view.advance()
        if self.seen is not None:
            last = tokens.clamp(min=0)[:, None]  # a row without a choice ends
            self.seen.scatter_(1, last, self.seen.gather(1, last) | (last < self.num_text))

    def holds(self) -> bool:
        """Whether all requests still write text, and may write the same ids as when this was made."""
        return all(
            request.is_writing and request.allowed is mask
            for request, mask in zip(self.requests, self.masks, strict=True)
        )

    def stream(self) -> TokenStream:
        """The ids to be read as a stream of one token for each row. What only training asks for is left as it is."""
        past = tuple(Past(branch.past.length, branch.past.position) for branch in self.branches)
        lengths = (1,) * len(past)
        return TokenStream(
            token=self.token,
            sample=self.token,
            modulation_index=self.token,
            position=self.position,
            label=self.token,
            layout=Layout(
                end=self.token, lengths=lengths, past=tuple(row.length for row in past), device=self.token.device
            ),
            spans=NO_SPANS,
            placements={},
            lengths=lengths,
            past=past,
            ignore_index=-1,
        )


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
