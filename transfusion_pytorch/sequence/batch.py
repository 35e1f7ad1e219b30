"""`Batch`: everything that the host knows of a batch, as plain tensors.

n tokens, b samples, m spans, t text targets, k latents of one modality, c channels, g instances of one shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.moving import Moving
from transfusion_pytorch.sequence.stream import TokenStream


@dataclass(frozen=True, eq=False)
class TextTargets(Moving):
    """Where an id is predicted, and which. What is padded or ignored is not listed.

    - `slot`: the slot of the stream whose output predicts
    - `label`: the id
    - `sample`: its sample
    - `is_droppable`: it leaves when its sample's text is dropped
    - `weight`: its sample's weight, 0 once dropped
    """

    slot: Int[Tensor, " t"]
    label: Int[Tensor, " t"]
    sample: Int[Tensor, " t"]
    is_droppable: Bool[Tensor, " t"]
    weight: Float[Tensor, " t"]

    def without(self, leaves: Bool[Tensor, " t"]) -> "TextTargets":
        """Removes targets. On other devices than a CPU their weight becomes 0: to filter them, the host would wait."""
        if self.slot.device.type != "cpu":
            return replace(self, weight=self.weight.masked_fill(leaves, 0))
        kept = (~leaves).nonzero().flatten()
        return TextTargets(*(getattr(self, field.name).index_select(0, kept) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class RawInstances(Moving):
    """Instances of one modality and one shape that its encoder has yet to see.

    `data` are stacked; `order` says which of the modality's spans each is, and `places` where it came from, for errors.
    """

    data: Float[Tensor, "g ..."]
    order: tuple[int, ...]
    places: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ModalityData(Moving):
    """The latents of one modality: flat where they are encoded, raw instances where they are not.

    - `latents`: those of the spans `order`, one behind the other; None where all are raw
    - `raw`: the others, stacked by shape
    - `channels`: of a latent
    - `decoded_size`: how many numbers each span's latents decode to; zeros unless there is a reconstruction loss
    """

    latents: Float[Tensor, "k c"] | None
    order: tuple[int, ...]
    raw: tuple[RawInstances, ...]
    decoded_size: Float[Tensor, " s"]
    channels: int


@dataclass(frozen=True, eq=False)
class Batch(Moving):
    """A packed batch: what `Packer` makes of samples, and `Transfusion` takes instead of them.

    - `stream`: tokens, who sees whom, and the span table
    - `data`: latents or raw instances of each modality that occurs, without repeating them for noised copies
    - `targets`: what the text loss predicts
    - `times`: the time of every span, NaN where it is to be drawn; `has_times` if the caller gave them
    - `span_weight`: the weight of the sample of every span
    - `is_droppable`: text that a learned modality follows, which classifier-free guidance may take away
    - `drop_text_number`: one uniform number for each sample, whose text is dropped where that is below `prob_uncond`
    - `clean_number`: one for each span: a captioned span is clean where that is below `prob_clean_captioned`
    - `time_number`, `noise`: of a batch that was packed with seeds: a uniform number for the time of each span, and the
      noise of each modality's latents `(k, c)`
    - `signature`: vocabulary and modalities of the models that it fits
    - `names`, `sources`: what the caller calls each sample, and where it comes from

    Picklable (unless a `Condition` carries gradients), so data workers can make it; `pin_memory()` and `to(device)`
    return moved copies.
    """

    stream: TokenStream
    data: Mapping[int, ModalityData]
    targets: TextTargets
    times: Float[Tensor, " m"]
    span_weight: Float[Tensor, " m"]
    is_droppable: Bool[Tensor, " n"]
    drop_text_number: Float[Tensor, " b"]
    clean_number: Float[Tensor, " m"]
    prob_uncond: float
    prob_clean_captioned: float
    signature: tuple[Any, ...]
    names: tuple[str | None, ...]
    sources: tuple[str | None, ...]
    has_times: bool = False
    time_number: Float[Tensor, " m"] | None = None
    noise: Mapping[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.stream.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return len(self.stream.token) - self.stream.num_padding

    def with_times(self, times: Float[Tensor, " m"]) -> "Batch":
        """The same at these times, NaN where one is to be drawn."""
        return replace(self, times=times.to(self.times), has_times=True).with_droppable()

    def with_droppable(self) -> "Batch":
        """Finds the text that guidance may take away: only what a learned modality follows conditions anything."""
        stream = self.stream
        first = torch.where(self.is_learned, stream.spans.first_slot, -1)
        last = first.new_full((len(self),), -1).scatter_reduce(0, stream.spans.sample, first, "amax")
        is_before = torch.arange(len(stream.token), device=first.device) < last[stream.sample]
        vocabulary = self.signature[0]
        is_droppable = stream.is_text & (stream.token < vocabulary.num_text) & is_before
        slot = self.targets.slot
        targets = replace(self.targets, is_droppable=is_droppable[slot] | is_droppable[slot + 1])
        return replace(self, targets=targets, is_droppable=is_droppable)

    @property
    def is_learned(self) -> Bool[Tensor, " m"]:
        """Which spans have a flow loss: neither a condition nor put at t = 1, where nothing is left to learn."""
        return self.stream.spans.is_learned & (self.times != 1)

    @property
    def loss_weight(self) -> Float[Tensor, " m"]:
        """The weight of the flow loss of every span."""
        return self.span_weight * self.is_learned

    def for_training(self, null: int, prob_uncond: float | None = None) -> "Batch":
        """As training sees it: without some text, and with some images clean that a caption follows."""
        is_clean = self.stream.spans.is_captioned & (self.clean_number < self.prob_clean_captioned)
        times = self.times.masked_fill(is_clean & self.times.isnan(), 1)
        return replace(self.drop_text(null, prob_uncond), times=times)

    def drop_text(self, null: int, probability: float | None = None) -> "Batch":
        """Text that conditions a modality becomes `null` in some samples, for classifier-free guidance (arXiv
        2207.12598). Neither a dropped token nor the one after it has a text loss.

        Which samples is settled by their `drop_text_number`, so the same batch drops the same text.
        """
        dropped = self.drop_text_number < (self.prob_uncond if probability is None else probability)
        goes = self.is_droppable & dropped[self.stream.sample]
        leaves = self.targets.is_droppable & dropped[self.targets.sample]
        return replace(
            self,
            stream=replace(self.stream, token=self.stream.token.masked_fill(goes, null)),
            targets=self.targets.without(leaves),
        )

    @property
    def counts(self) -> TargetCounts:
        """The targets that training on this batch has: without the text that it drops, and what it sees clean."""
        return self.for_training(0).count_targets()

    def count_targets(self) -> TargetCounts:
        """The targets of the batch as it is. Nothing is read back from a device."""
        weights = {kind: self.latent_weight(kind) for kind in self.data}
        nothing = self.span_weight.new_zeros(())
        latents = [
            weights[kind].sum() * self.data[kind].channels if kind in weights else nothing
            for kind in range(self.num_modalities)
        ]
        decoded = [
            (self.weight_of_spans(kind) * self.data[kind].decoded_size).sum() if kind in self.data else nothing
            for kind in range(self.num_modalities)
        ]
        return TargetCounts(self.targets.weight.sum(), torch.stack(latents), torch.stack(decoded))

    def latent_weight(self, modality: int) -> Float[Tensor, " k"]:
        """The weight of every latent of a type: that of its span."""
        return self.loss_weight.index_select(0, self.stream.placements[modality].span_of_latent)

    def weight_of_spans(self, modality: int) -> Float[Tensor, " s"]:
        """The weight of every span of a type."""
        return self.loss_weight.index_select(0, self.stream.placements[modality].spans)

    @property
    def num_modalities(self) -> int:
        """Of the model it was packed for."""
        return len(self.signature) - 1
