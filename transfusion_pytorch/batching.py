"""From what a user hands over to a `Batch` at a caller's times, on the model's device.

b samples, m modalities of a sample.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.modalities.shapes import LatentShapeFunction, ShapeFinder
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.checks import check_probability, per_modality
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.span_times import times_of_spans


class BatchingMethods:
    """What a model offers for packing batches. Mixed into `Transfusion`."""

    vocabulary: Any
    modalities: Any
    objective: Any
    ignore_index: int
    prob_uncond: float
    time_policy: Any
    precision: torch.dtype
    device: torch.device
    training: bool
    _live_shapes: tuple[ShapeFinder, ...]

    def packer(
        self,
        *,
        token_budget: int | None = None,
        span_budget: int | None = None,
        prob_uncond: float | None = None,
        latent_shape_fn: LatentShapeFunction | Sequence[LatentShapeFunction | None] | None = None,
        checks_devices: tuple[str, ...] | None = ("cpu",),
        adds_markers: bool = True,
    ) -> Packer:
        """Packs samples for this model without its parameters: `model(packer(samples))` is `model(samples)`.

        A collate function that can be pickled, for data workers. Batches are padded to `token_budget` tokens and
        `span_budget` modalities (by default a 64th of that), so that they have one shape. Make it after the model is on
        its device: for CUDA it also makes the tables of flex attention.

        Shapes behind encoders and adapters are found by dry runs of copies on the `meta` device; for those that do not
        run there, `latent_shape_fn` takes the shape of raw data to the axial shape of their latents (one, or one for
        each modality). Without `adds_markers`, samples are plain text or plain modalities, as `(b, ...)` is. See
        `Packer` for the rest.
        """
        functions = per_modality(latent_shape_fn, len(self.modalities), "latent_shape_fn")
        packer = self._packer(self._shape_finders(functions), prob_uncond)
        return replace(
            packer,
            token_budget=token_budget,
            span_budget=span_budget,
            checks_devices=checks_devices,
            adds_markers=adds_markers,
        )

    def count_targets(self, samples: Any, *, prob_uncond: float | None = None, **options: Any) -> TargetCounts:
        """The targets of a batch, as `forward` in the present mode would count them. `options` are those of `Packer`.

        For gradient accumulation: `counts = sum(map(model.count_targets, batches))`, under DDP `counts.all_reduce()`,
        then `model(batch, counts=counts)` for each. The losses then add up to that of one large batch. Pack
        lists once, before: a list that is counted here and packed by `forward` later may drop other text.
        """
        check_probability(self.prob_uncond if prob_uncond is None else prob_uncond, "prob_uncond")
        times, times_fn = (options.pop(name, None) for name in ("times", "num_modalities_to_times_fn"))
        batch = self._as_batch(samples, **options)
        return self._settled(batch, times, times_fn, prob_uncond).count_targets()

    def _shape_finders(
        self, functions: Sequence[Any] | None = None, *, is_live: bool = False
    ) -> tuple[ShapeFinder, ...]:
        functions = functions or [None] * len(self.modalities)
        return tuple(
            ShapeFinder(io, measures_decoded=weight != 0, latent_shape_fn=function, is_live=is_live)
            for io, function, weight in zip(self.modalities, functions, self.objective.weights.recon, strict=True)
        )

    def _packer(
        self,
        shapes: tuple[ShapeFinder, ...],
        prob_uncond: float | None = None,
        *,
        is_live: bool = False,
    ) -> Packer:
        return Packer(
            vocabulary=self.vocabulary,
            modalities=shapes,
            dtype=self.precision,
            ignore_index=self.ignore_index,
            prob_uncond=check_probability(self.prob_uncond if prob_uncond is None else prob_uncond, "prob_uncond"),
            prob_clean_captioned=self.time_policy.prob_clean,
            finds_blocks=self.device.type == "cuda",
            takes_tuples=not is_live,
            live_device=self.device if is_live else None,
        )

    def _as_batch(self, samples: Any, has_loss: bool = True, **options: Any) -> Batch:
        """Packed, unless it is already, on this model's device."""
        packer = self._packer(self._live_shapes, is_live=True)
        if isinstance(samples, Batch):
            given = [name for name, value in options.items() if value is not None and name != "generator"]
            if given:
                raise ValueError(f"a Batch has its {', '.join(given)}; give them to the packer instead")
            if samples.signature != packer.signature:
                raise ValueError(
                    f"the Batch was packed for another model: its vocabulary and modalities are {samples.signature}, "
                    f"those of this one {packer.signature}"
                )
            batch = samples
        else:
            batch = packer(samples, refuses_gradients=has_loss and torch.is_grad_enabled(), **options)
        if self.training and has_loss:  # before they move: on a CPU nothing is waited for
            for kind, data in batch.data.items():
                self.modalities[kind].check_scale(data.latents)
        return batch.to(self.device)

    def _settled(self, batch: Batch, times: Any, times_fn: Any, prob_uncond: float | None) -> Batch:
        """A batch whose targets are settled: at the caller's times; in training without the text that is dropped, and
        with some captioned modalities clean. Times that are NaN after this have yet to be drawn.
        """
        times = self._times_of_spans(batch, times, times_fn)
        batch = batch if times is None else batch.with_times(times)
        return batch.for_training(self.vocabulary.null, prob_uncond) if self.training else batch

    def _times_of_spans(self, batch: Batch, times: Any, times_fn: Any) -> Float[Tensor, " m"] | None:
        """The caller's times, given or from a function of the number of modalities."""
        if times is not None and times_fn is not None:
            raise ValueError("give times or num_modalities_to_times_fn, not both")
        if times_fn is not None and not callable(times_fn):
            raise TypeError(f"num_modalities_to_times_fn must be a function, got {type(times_fn).__name__}")
        spans = batch.stream.spans
        if times_fn is not None and len(spans):
            zeros = spans.index.new_zeros(len(batch))
            times = times_fn(zeros.scatter_reduce(0, spans.sample, spans.index + 1, "amax"))
            if times is None:
                raise TypeError("num_modalities_to_times_fn: times must be a number or a tensor of them, got None")
        return None if times is None else times_of_spans(times, spans, len(batch))
