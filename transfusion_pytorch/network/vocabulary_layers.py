"""Embedding and logits of a vocabulary whose text comes from elsewhere: text and markers in tables of their own.

So the text of a pretrained language model can be frozen, or left out of a file of what was trained, while its markers
are learned; and the logits of text are the same product, to the bit, whatever markers there are.

n tokens, d model, v vocabulary.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.linear import Linear


class TextEmbedding(nn.Module):
    """Ids below `num_text` are rows of `text`, all others of `markers`."""

    def __init__(self, num_text: int, num_markers: int, dim: int):
        super().__init__()
        self.num_text = num_text
        self.text = nn.Embedding(num_text, dim)
        self.markers = nn.Embedding(num_markers, dim)

    def forward(self, ids: Int[Tensor, " n"]) -> Shaped[Tensor, "n d"]:
        text = self.text(ids.clamp(max=self.num_text - 1))
        markers = self.markers((ids - self.num_text).clamp(min=0))
        return torch.where((ids < self.num_text)[:, None], text, markers)


class TextLogits(nn.Module):
    """The logits of text, then those of the markers that can be written.

    With `tied`, the rows are those of this embedding, whose last marker (null) is only read.
    """

    def __init__(self, num_text: int, num_markers: int, dim: int, *, tied: TextEmbedding | None = None):
        super().__init__()
        self.out_features = num_text + num_markers
        self.text = Linear(dim, num_text, bias=False)
        self.markers = Linear(dim, num_markers if tied is None else num_markers + 1, bias=False)
        if tied is not None:
            self.text.weight, self.markers.weight = tied.text.weight, tied.markers.weight

    @property
    def weight(self) -> Tensor:
        """That of text: its device and type are those of the model."""
        return self.text.weight

    def forward(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... v"]:
        text = self.text(x)
        return torch.cat((text, self.markers(x)[..., : self.out_features - text.shape[-1]]), dim=-1)
