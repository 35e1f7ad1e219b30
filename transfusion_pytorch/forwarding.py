"""The way of a packed stream through the network: embedded, transformed, and read as logits and velocities.

n tokens of the stream, m spans, d model, v vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.flow.path import velocity_towards
from transfusion_pytorch.modalities.latents import LatentsByType, latent_times
from transfusion_pytorch.network.cache_views import CacheView, DecodeView
from transfusion_pytorch.network.experts import Routing
from transfusion_pytorch.network.norms import Conditioning
from transfusion_pytorch.sequence.stream import TokenStream


class StreamOutput(NamedTuple):
    """What the transformer made of a stream, and what the adapters need again to read it.

    - `hidden`: of every token
    - `condition`: of every span
    - `adapter_state`: what each modality's adapter kept
    """

    hidden: Shaped[Tensor, "n d"]
    condition: Shaped[Tensor, "m d"]
    adapter_state: dict[int, Any]


class StreamMethods:
    """What forward passes and sampling are made of. Mixed into `Transfusion`."""

    transformer: Any
    text_embedding: Any
    to_logits: Any
    time_embedding: Any
    type_embedding: Any
    modalities: Any
    model_output_clean: bool
    device: torch.device
    dtype: torch.dtype
    precision: torch.dtype
    _processes: Callable[[], Any]

    def with_positions(self, stream: TokenStream) -> TokenStream:
        """The same stream with its `position_embeddings`."""
        embedded = {
            modality: self.modalities[modality].embed_positions(
                placement.shapes, device=self.device, dtype=self.precision
            )
            for modality, placement in stream.placements.items()
        }
        made = {modality: each for modality, each in embedded.items() if each is not None}
        return replace(stream, position_embeddings=made)

    def forward_stream(
        self,
        stream: TokenStream,
        latents: LatentsByType,
        t: Float[Tensor, " m"],
        cache: CacheView | DecodeView | None = None,
        conditioning: Conditioning | None = None,
        hidden_states: dict[int, Any] | None = None,
    ) -> StreamOutput:
        """Embeds a stream, whose latents stand at the times `t`, and runs the transformer over it. `conditioning` is
        what follows from these times, where that was made before. `hidden_states`: see `Transformer.forward`.
        """
        condition = self._condition(stream, t) if conditioning is None else conditioning.spans
        conditioning = self._conditioning(stream, condition) if conditioning is None else conditioning
        adapter_state = {}
        x = None if self._is_one_modality(stream) else self.text_embedding(stream.token)
        for modality, values in latents.items():
            placement = stream.placements[modality]
            tokens, adapter_state[modality] = self.modalities[modality].embed(
                values.to(self.dtype),
                placement.shapes,
                condition if x is None else condition.index_select(0, placement.spans),
                (stream.position_embeddings or {}).get(modality),
            )
            x = tokens.to(self.dtype) if x is None else x.index_copy(0, placement.slots, tokens.to(x.dtype))
        assert x is not None
        hidden = self.transformer(
            x,
            position=stream.position,
            layout=stream.layout,
            conditioning=conditioning,
            cache=cache,
            **self._routing(stream),
            **({} if hidden_states is None else dict(hidden_states=hidden_states)),
        )
        return StreamOutput(hidden, condition, adapter_state)

    def _is_one_modality(self, stream: TokenStream) -> bool:
        """Whether tokens and spans are those of one modality, in its order, and need not be looked up. In training they
        are, so that text embeddings have a gradient.
        """
        return len(stream.placements) == 1 and stream.has_equal_spans and not torch.is_grad_enabled()

    def _condition(self, stream: TokenStream, t: Float[Tensor, " m"]) -> Shaped[Tensor, "m d"]:
        """The vector that modulates each span: its time and its type."""
        if not len(t) and self._processes() is None:
            return self.type_embedding.weight[:0]  # a decode step has no spans, and no time for operations on none
        return self.condition(stream.spans.modality.to(t.device), t)

    def condition(self, modality: Int[Tensor, " m"], t: Float[Tensor, " m"]) -> Shaped[Tensor, "m d"]:
        """The vector that modulates a span, for any types and times."""
        return self.time_embedding(t) + self.type_embedding(modality)

    def _conditioning(self, stream: TokenStream, condition: Shaped[Tensor, "m d"]) -> Conditioning | None:
        """What spans tell their tokens; None for text alone. A padded batch has rows for more spans. With several
        processes there is at least one, and text is looked up too, so that all parameters take part in every step.
        """
        is_shared = self._processes() is not None
        rows = stream.num_modulations or int(is_shared)
        if len(condition) < rows:
            condition = F.pad(condition, (0, 0, 0, rows - len(condition)))
        elif not len(condition):
            return None
        return Conditioning(condition, None if stream.has_equal_spans and not is_shared else stream.modulation_index)

    def _routing(self, stream: TokenStream) -> dict[str, Routing]:
        """Which expert reads which token, for a transformer of untied weights."""
        if not getattr(self.transformer, "untied", ()):
            return {}
        slots = {modality: placement.slots for modality, placement in stream.placements.items()}
        takes_all = self._processes() is not None
        count, num_tokens = self.transformer.num_experts, len(stream.token)
        return dict(routing=Routing.of(slots, num_tokens, count, device=self.device, takes_all=takes_all))

    def logits(self, hidden: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "n v"]:
        """Of the next id, for every id that can be written."""
        return self.to_logits(hidden)

    def velocities(
        self, output: StreamOutput, stream: TokenStream, x_t: LatentsByType, t: Float[Tensor, " m"]
    ) -> LatentsByType:
        """The velocity of every latent; predictions of the clean latent are converted."""
        velocities = {}
        for modality, values in x_t.items():
            placement, is_all = stream.placements[modality], self._is_one_modality(stream)
            predicted = self.modalities[modality].read(
                output.hidden if is_all else output.hidden.index_select(0, placement.slots),
                placement.shapes,
                output.condition if is_all else output.condition.index_select(0, placement.spans),
                output.adapter_state[modality],
            )
            predicted = predicted.to(values.dtype)
            if self.model_output_clean:
                predicted = velocity_towards(predicted, values, latent_times(stream, modality, t.to(values.dtype)))
            velocities[modality] = predicted
        return velocities
