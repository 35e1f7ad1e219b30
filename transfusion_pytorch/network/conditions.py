"""Conditions of spans for many times at once, and what every norm makes of them.

The times of a solver with fixed steps are known before it starts. Time embeddings and modulations depend on nothing
else, so those of all steps are computed together: their weights are read once, and an evaluation looks up its rows.

r rows of the table, m spans, n tokens, p parts (scale, shift and gate of every norm), c condition, d model.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from transfusion_pytorch.evaluating import class_of, module_of
from transfusion_pytorch.network.norms import AdaptiveNorm, Conditioning, IndexedModulation, SpanModulation
from transfusion_pytorch.network.transformer import Transformer


class ConditionTable:
    """The `conditions` of some times, one a row, and the modulations of all norms of a trunk.

    `rows` are found by whatever the caller names them. A trunk that is not our `Transformer`, or has norms of others,
    may do as it likes with a condition: there are no modulations then.
    """

    def __init__(self, trunk: nn.Module, keys: Sequence[Hashable], conditions: Shaped[Tensor, "r c"]):
        self.rows: Mapping[Hashable, int] = {key: row for row, key in enumerate(keys)}
        self.conditions = conditions
        norms = [norm for norm in trunk.modules() if isinstance(norm, AdaptiveNorm)]
        self._norms = [norm for norm in norms if norm.reads != "text"]
        self._parts: Shaped[Tensor, "p r 1 d"] | None = None
        is_ours = class_of(trunk) is Transformer and all(class_of(norm) is AdaptiveNorm for norm in self._norms)
        if is_ours and self._norms:
            made = [norm.modulation(Conditioning(conditions, None)) for norm in self._norms]
            self._parts = torch.stack([part for each in made for part in each[:3] if isinstance(part, Tensor)])

    def has(self, keys: Iterable[Hashable]) -> bool:
        return all(key in self.rows for key in keys)

    def conditioning(self, keys: Sequence[Hashable], modulation_index: Int[Tensor, " n"] | None) -> Conditioning:
        """For spans that have these keys. See `Conditioning` for `modulation_index`."""
        rows = [self.rows[key] for key in keys]
        if len(set(rows)) == 1:  # views: nothing is uploaded
            row = slice(rows[0], rows[0] + 1)
            spans = self.conditions[row].expand(len(rows), -1)
            parts = None if self._parts is None else self._parts[:, row]
            return Conditioning(spans, modulation_index, None, self._modulations(parts, None))
        index = torch.tensor(rows, device="cpu").to(self.conditions.device, non_blocking=True)
        parts = None if self._parts is None else self._parts.index_select(1, index)
        of_token = None if modulation_index is None else modulation_index - 1
        spans = self.conditions.index_select(0, index)
        return Conditioning(spans, modulation_index, None, self._modulations(parts, of_token))

    def _modulations(
        self, parts: Shaped[Tensor, "p m 1 d"] | None, of_token: Int[Tensor, " n"] | None
    ) -> Mapping[nn.Module, SpanModulation | IndexedModulation] | None:
        if parts is None:
            return None
        each = iter((parts if of_token is None else parts[:, :, 0]).unbind())
        made: dict[nn.Module, SpanModulation | IndexedModulation] = {}
        for norm in self._norms:
            scale, shift, gate = next(each), next(each), next(each) if norm.has_gate else None
            made[module_of(norm)] = (
                SpanModulation(scale, shift, gate)
                if of_token is None
                else IndexedModulation(scale, shift, gate, of_token)
            )
        return made
