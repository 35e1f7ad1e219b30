"""How the tokens of a span are told its time, where the norms of the transformer do not: as in language models.

t tokens, m spans, d model.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.linear import Linear

TimeConditioning = Literal["norms", "added", "token", "output"]
KINDS = ("norms", "added", "token", "output")


class Timing(nn.Module):
    """Takes the condition of each span, its time and type, to its tokens.

    - `"added"`: to the embedding of every token (Transfusion, arXiv 2408.11039)
    - `"token"`: as one more token in front of the span, which nothing is read from (OmniGen, arXiv 2409.11340)
    - `"output"`: as scale and shift of what the transformer makes of each token (the last layer of DiT, arXiv
      2212.09748); the transformer itself does not know the time

    "added" and "output" start by changing nothing.
    """

    def __init__(self, dim: int, kind: TimeConditioning):
        super().__init__()
        self.kind = kind
        self.layer = Linear(dim, 2 * dim if kind == "output" else dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.kind != "token":
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

    def token_shape(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return (prod(tokens) + 1,) if self.kind == "token" else tokens

    def embed(
        self, tokens: Shaped[Tensor, "t d"], counts: Sequence[int], condition: Shaped[Tensor, "m d"]
    ) -> Shaped[Tensor, "t_out d"]:
        """The tokens of all spans as the transformer reads them; `counts` are those of each span."""
        if self.kind == "output":
            return tokens
        made = self.layer(condition)
        if self.kind == "added":
            return tokens + for_tokens(made, counts)
        rows = zip(made.to(tokens.dtype).split(1), tokens.split(list(counts)), strict=True)
        return torch.cat([part for row in rows for part in row])

    def read(
        self, tokens: Shaped[Tensor, "t_out d"], counts: Sequence[int], condition: Shaped[Tensor, "m d"]
    ) -> Shaped[Tensor, "t d"]:
        """What the latents are read from."""
        if self.kind == "token":
            return torch.cat([part[1:] for part in tokens.split([count + 1 for count in counts])])
        if self.kind == "output":
            scale, shift = for_tokens(self.layer(condition), counts).chunk(2, dim=-1)
            return torch.addcmul(shift, tokens, 1 + scale)
        return tokens


def for_tokens(rows: Shaped[Tensor, "m f"], counts: Sequence[int]) -> Shaped[Tensor, "t f"]:
    """The row of its span for every token."""
    return torch.cat([row.expand(count, -1) for row, count in zip(rows.split(1), counts, strict=True)])
