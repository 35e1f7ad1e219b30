"""Embedding and logits of a vocabulary whose text comes from elsewhere: text and markers in tables of their own.

So the text of a pretrained language model can be frozen, or left out of a file of what was trained, while its markers
are learned; and the logits of text are the same product, to the bit, whatever markers there are.

n tokens, d model, v vocabulary.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.cpu.products import linear
from transfusion_pytorch.network.linear import Linear, is_plain_linear
from transfusion_pytorch.network.shortcuts import is_plain, uses_cpu_kernels


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
    """The logits of text, then those of the markers that can be written."""

    def __init__(self, num_text: int, num_markers: int, dim: int):
        super().__init__()
        self.out_features = num_text + num_markers
        self.text = Linear(dim, num_text, bias=False)
        self.markers = Linear(dim, num_markers, bias=False)

    @property
    def weight(self) -> Tensor:
        """That of text: its device and type are those of the model."""
        return self.text.weight

    @property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """The rows of text and of markers, if logits are products with them and nothing else."""
        layers = (self.text, self.markers)
        return (layers[0].weight, layers[1].weight) if all(map(is_plain_linear, layers)) else None

    def forward(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... v"]:
        return torch.cat((self.text(x), self.markers(x)), dim=-1)


class TiedLogits(nn.Module):
    """The same with the rows of an embedding, whose last marker (null) is only read; without parameters of its own."""

    def __init__(self, embedding: TextEmbedding, num_markers: int):
        super().__init__()
        self.num_markers, self.out_features = num_markers, embedding.num_text + num_markers
        self._embedding = (embedding,)  # in a tuple it is no module of this one, and its parameters have one name

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].text.weight

    @property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        tables = self.weight, self._embedding[0].markers.weight[: self.num_markers]
        return tables if is_plain(self.weight) else None

    def forward(self, x: Shaped[Tensor, "... d"]) -> Shaped[Tensor, "... v"]:
        product = linear if uses_cpu_kernels(x) else torch.nn.functional.linear
        rows = self.weight, self._embedding[0].markers.weight[: self.num_markers]
        return torch.cat([product(x, weight) for weight in rows], dim=-1)
