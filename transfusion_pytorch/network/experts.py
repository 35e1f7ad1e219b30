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
SHORTEST_RUN = 8  # tokens of a run, on average, from which on runs are copied faster than single rows


class Routing(NamedTuple):
    """Which expert reads which token.

    - `counts`: how many tokens each expert has; the host knows them
    - `order`: the slots of the stream sorted by expert; `place`: the inverse, where each slot went. None where all
      tokens have one expert
    - `taken`: the experts that take part
    - `runs`: on a CPU, neighbours in the stream that one expert reads: which one, as a number among those `taken`, and
      how many tokens. Whole runs are copied faster than rows by their index. None where they are too short for that
    """

    counts: tuple[int, ...]
    taken: tuple[int, ...]
    order: Int[Tensor, " n"] | None = None
    place: Int[Tensor, " n"] | None = None
    runs: tuple[tuple[int, int], ...] | None = None

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
        parameters must all have gradients. Nothing is read from a device other than the CPU.
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
        return cls(tuple(counts), taken, order, place, _runs_of(expert, taken) if device.type == "cpu" else None)

    @property
    def only(self) -> int | None:
        """The expert of all tokens, if they have one."""
        return self.taken[0] if self.order is None else None

    def split(self, x: Shaped[Tensor, "n ..."]) -> tuple[Shaped[Tensor, "_ ..."], ...]:
        """The tokens of each expert, in the order of the stream."""
        order, place = self._orders
        if torch.compiler.is_compiling() or self.runs is None:
            return permuted(x, order, place).split(self.counts)
        parts: list[list[Tensor]] = [[] for _ in self.taken]
        for (i, _), part in zip(self.runs, x.split([length for _, length in self.runs]), strict=True):
            parts[i].append(part)
        made = dict(zip(self.taken, parts, strict=True))
        return tuple(torch.cat(made[i]) if made.get(i) else x[:0] for i in range(len(self.counts)))

    def join(self, parts: Sequence[Shaped[Tensor, "_ ..."]]) -> Shaped[Tensor, "n ..."]:
        """The inverse of `split`, of the parts of the experts that take part."""
        order, place = self._orders
        if torch.compiler.is_compiling() or self.runs is None:
            return permuted(torch.cat(tuple(parts)), place, order)
        lengths = [[length for i, length in self.runs if i == own] for own in range(len(parts))]
        pieces = [iter(part.split(own)) for part, own in zip(parts, lengths, strict=True)]
        empty = (part for part in parts if not len(part))  # through which their experts get gradients of zero
        return torch.cat([*(next(pieces[i]) for i, _ in self.runs), *empty])

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


def _runs_of(expert: Int[Tensor, " n"], taken: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """Of each run of neighbours with the same expert: which of those `taken` that is, and how many there are."""
    experts, lengths = torch.unique_consecutive(expert, return_counts=True)
    if len(experts) * SHORTEST_RUN > len(expert):
        return None
    numbers = {expert: i for i, expert in enumerate(taken)}
    return tuple(zip((numbers[i] for i in experts.tolist()), lengths.tolist(), strict=True))


def expert_of(modality: int, num_experts: int) -> int:
    return min(modality + 1, num_experts - 1)


class RoutedAttention(NamedTuple):
    """Attention of a stream whose tokens come in a part for each expert that takes part."""

    plan: AttentionPlan
    routing: Routing

    def attend(
        self,
        q: Sequence[Shaped[Tensor, "_ h e"]],
        k: Sequence[Shaped[Tensor, "_ k e"]],
        v: Sequence[Shaped[Tensor, "_ k e"]],
        *,
        layer: int = 0,
        softcap: float | None = None,
    ) -> list[Shaped[Tensor, "_ h e"]]:
        whole = (self.routing.join(parts) for parts in (q, k, v))
        parts = self.routing.split(self.plan.attend(*whole, layer=layer, softcap=softcap))
        return [parts[i] for i in self.routing.taken]


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
        q, k, v = zip(*((it.q, it.k, it.v) for it in begun), strict=True)
        out = plan.attend(q, k, v, layer=layers[0].index, softcap=layers[0].attn.softcap)
        made, kept = list(x), [None] * len(x)
        for i, layer, it, part in zip(taken, layers, begun, out, strict=True):
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
