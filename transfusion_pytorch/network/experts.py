"""Untied weights: text and modalities each have layers of their own, and one attention over the whole stream.

Mixture of transformers (arXiv 2411.04996), LMFusion (arXiv 2412.15188). Tokens are sorted by expert once for a forward
pass, and stay in one tensor for each expert, so that every product is one plain product. Only attention brings them
into the order of the stream and back.

n tokens of the stream, h heads, e channels of a head.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transfusion_pytorch.network.attend import AttentionPlan
from transfusion_pytorch.network.layer import Layer
from transfusion_pytorch.network.norms import Conditioning, Reads
from transfusion_pytorch.network.shortcuts import forces_plain_formulas

TEXT = 0  # the expert of text
PARTS = ("attention", "feedforward", "norms")


class Routing(NamedTuple):
    """Which expert reads which token.

    - `counts`: how many tokens each expert has; the host knows them
    - `order`: the slots of the stream sorted by expert; `place`: the inverse, where each slot went. None where all
      tokens have one expert
    - `taken`: the experts that take part
    """

    counts: tuple[int, ...]
    taken: tuple[int, ...]
    order: Int[Tensor, " n"] | None = None
    place: Int[Tensor, " n"] | None = None

    @classmethod
    def of(
        cls,
        slots: Mapping[int, Int[Tensor, " _"]],
        num_tokens: int,
        num_experts: int,
        *,
        device: torch.device,
        takes_all: bool = False,
    ) -> "Routing":
        """`slots` are those of the tokens of each modality; all others are text. Modality i has expert i + 1, or the
        last one. With `takes_all`, experts without tokens take part as well, as several processes need it, whose
        parameters must all have gradients. Nothing is read from the device.
        """
        counts = [num_tokens, *[0] * (num_experts - 1)]
        for modality, own in slots.items():
            counts[TEXT] -= len(own)
            counts[expert_of(modality, num_experts)] += len(own)
        taken = tuple(i for i, count in enumerate(counts) if count or takes_all)
        if len(taken) == 1:
            return cls(tuple(counts), taken)
        expert = torch.zeros(num_tokens, dtype=torch.long, device=device)
        for modality, own in slots.items():
            expert.index_fill_(0, own, expert_of(modality, num_experts))
        order = expert.argsort(stable=True)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(num_tokens, device=device))
        return cls(tuple(counts), taken, order, place)

    @property
    def only(self) -> int | None:
        """The expert of all tokens, if they have one."""
        return self.taken[0] if self.order is None else None

    def split(self, x: Shaped[Tensor, "n ..."]) -> tuple[Shaped[Tensor, "_ ..."], ...]:
        """The tokens of each expert."""
        return self.to_experts(x).split(self.counts)

    def join(self, parts: Sequence[Shaped[Tensor, "_ ..."]]) -> Shaped[Tensor, "n ..."]:
        """The inverse of `split`."""
        return self.to_stream(torch.cat(tuple(parts)))

    def to_experts(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Tokens in the order of the stream, sorted by expert."""
        order, place = self._orders
        return permuted(x, order, place)

    def to_stream(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """The inverse of `to_experts`."""
        order, place = self._orders
        return permuted(x, place, order)

    def conditionings(self, conditioning: Conditioning) -> tuple[Conditioning | None, ...]:
        """What the tokens of each expert look up; None for those of text."""
        spans, index = conditioning.spans, conditioning.modulation_index
        if index is None:  # spans of one length, one behind the other
            index = torch.arange(1, len(spans) + 1, device=spans.device)
            index = index.repeat_interleave(sum(self.counts) // len(spans), output_size=sum(self.counts))
        indices = index.index_select(0, self._orders[0]).split(self.counts)
        made = [Conditioning(spans, each) for each in indices[1:]]
        if conditioning.segments is not None:  # those of its own tokens
            made = [each.with_segments() if count else each for each, count in zip(made, self.counts[1:], strict=True)]
        return (None, *made)

    @property
    def _orders(self) -> tuple[Tensor, Tensor]:
        assert self.order is not None
        assert self.place is not None
        return self.order, self.place


def expert_of(modality: int, num_experts: int) -> int:
    return min(modality + 1, num_experts - 1)


class RoutedAttention(NamedTuple):
    """Attention of a stream whose tokens come sorted by expert."""

    plan: AttentionPlan
    routing: Routing

    def attend(
        self,
        q: Shaped[Tensor, "n h e"],
        k: Shaped[Tensor, "n k e"],
        v: Shaped[Tensor, "n k e"],
        *,
        layer: int = 0,
        softcap: float | None = None,
    ) -> Shaped[Tensor, "n h e"]:
        q, k, v = (self.routing.to_stream(part) for part in (q, k, v))
        return self.routing.to_experts(self.plan.attend(q, k, v, layer=layer, softcap=softcap))


class UntiedLayer(nn.Module):
    """A layer for each expert; what they share are the same modules."""

    def __init__(self, experts: Sequence[Layer]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    @property
    def skip(self) -> Any:
        """Of the first expert: all have one, or none."""
        return self.experts[0].skip

    def forward(
        self,
        x: Any,
        skipped: Any,
        first_values: Any,
        conditioning: Any,
        phases: Any,
        plan: Any,
        expert: int | None = None,
    ) -> tuple[Any, Any]:
        """As `Layer.forward`: of a stream that one `expert` reads, or with a part for each expert in place of a tensor.

        All calls come through here, where FSDP waits for them.
        """
        if expert is not None:
            return self.experts[expert](x, skipped, first_values, conditioning, phases, plan)
        taken: Sequence[int] = plan.routing.taken
        layers: list[Any] = [self.experts[i] for i in taken]
        skips = [None] * len(x) if skipped is None else skipped
        values = [None] * len(x) if first_values is None else first_values
        begun = [
            layer.begin(x[i], skips[i], values[i], conditioning[i], phases[i])
            for i, layer in zip(taken, layers, strict=True)
        ]
        q, k, v = (torch.cat(parts) for parts in zip(*((it.q, it.k, it.v) for it in begun), strict=True))
        out = plan.attend(q, k, v, layer=layers[0].index, softcap=layers[0].attn.softcap)
        made, kept = list(x), [None] * len(x)
        for i, layer, it, part in zip(taken, layers, begun, out.split([len(it.q) for it in begun]), strict=True):
            made[i], kept[i] = layer.end(it, part, conditioning[i]), it.own_values
        return tuple(made), tuple(kept) if layers[0].keeps_values else None


def untied_parts(untied: bool | Sequence[str]) -> tuple[str, ...]:
    """What is untied: `PARTS`, or some of them. Raises `ValueError` for another."""
    parts = (PARTS if untied else ()) if isinstance(untied, bool) else tuple(untied)
    if isinstance(untied, str) or any(part not in PARTS for part in parts):
        raise ValueError(f"untied must be True, False or some of {', '.join(PARTS)}, got {untied!r}")
    return tuple(part for part in PARTS if part in parts)


def readers_of(untied: Sequence[str], num_experts: int) -> list[Reads]:
    """Whose norms the experts need: where those are untied, the first reads text, and all others spans."""
    return ["text", *["spans"] * (num_experts - 1)] if "norms" in untied else ["both"] * num_experts  # type: ignore[return-value]


def untied_layer(experts: Sequence[Layer], untied: Sequence[str]) -> UntiedLayer:
    """The first expert's modules are those of all, but for what is untied."""
    modules = dict(attention=("attn",), feedforward=("ff",), norms=("attn_norm", "ff_norm"))
    for part, names in modules.items():
        for name in names if part not in untied else ():
            for expert in experts[1:]:
                setattr(expert, name, getattr(experts[0], name))
    return UntiedLayer(experts)


def permuted(x: Shaped[Tensor, "n ..."], order: Int[Tensor, " n"], inverse: Int[Tensor, " n"]) -> Tensor:
    """`x[order]`, where no row comes twice: its gradient is another permutation, not a sum."""
    if torch.compiler.is_compiling() or forces_plain_formulas() or not torch.is_grad_enabled():
        return x.index_select(0, order)
    return Permutation.apply(x, order, inverse)  # type: ignore[return-value]


class Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
