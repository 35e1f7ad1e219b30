"""From samples to a `Batch`: parsed, checked, framed by markers and laid out, on the CPU and without parameters.

n tokens, b samples, m spans, s spans of one modality.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.sequence.batch import Batch, ModalityData, RawInstances, TextTargets
from transfusion_pytorch.sequence.checks import check_int
from transfusion_pytorch.sequence.copies import with_noised_copies
from transfusion_pytorch.sequence.moving import on_cpu
from transfusion_pytorch.sequence.prompts import split_unfinished_modality
from transfusion_pytorch.sequence.randomness import StateNumbers, seeded_numbers
from transfusion_pytorch.sequence.samples import (
    Modality,
    ModalitySpec,
    Piece,
    Sample,
    Shape,
    Text,
    check_finite,
    check_ids,
    is_int,
    is_integer,
    is_typed,
    mark,
    parse_batch,
    parse_samples,
)
from transfusion_pytorch.sequence.span_times import times_of_spans
from transfusion_pytorch.sequence.stream import TokenStream, pack, pad_stream
from transfusion_pytorch.sequence.vocabulary import Vocabulary

IGNORED = -100  # what Hugging Face and torch call a label that is no target
TOKENS_PER_SPAN = 64  # of a padded batch: its span table is filled up to so many rows


@runtime_checkable
class ModalityShapes(Protocol):
    """What packing must know of a modality. Found without its parameters, and picklable."""

    spec: ModalitySpec

    @property
    def has_encoder(self) -> bool: ...
    @property
    def signature(self) -> tuple[Any, ...]: ...
    def latent_shape(self, raw: Shape, where: str) -> Shape: ...
    def token_shape(self, shape: Shape) -> Shape: ...
    def decoded_size(self, shape: Shape) -> int: ...


@dataclass
class Packer:
    """`pack(samples)` is a `Batch`. Made by `Transfusion.packer()`; a collate function that data workers can pickle.

    - `dtype`: of latents
    - `ignore_index`: the label that is no target, beside -100
    - `prob_uncond`: how often text that conditions a modality is dropped in training
    - `prob_clean_captioned`: how often a modality that is captioned is clean in training (see `TimePolicy`)
    - `token_budget`: batches are padded to so many tokens, for graphs of fixed shapes; more are refused
    - `span_budget`: the span table of a padded batch is filled up to so many rows; more are refused. By default one row
      for 64 tokens, at least 8, doubled for a batch that has more, which is then of another shape
    - `finds_blocks`: whether the tables of flex attention are made too
    - `checks_devices`: latents on these kinds of device are searched for NaN; None for all, which waits for a GPU
    - `adds_markers`: samples get sos, eos and the markers of modalities; without, each is one part: plain text, or a
      plain modality, as batches `(b, ...)` are
    - `takes_tuples`: a sample may be a tuple of parts, as datasets give it
    - `live_device`: that of the model, where it packs for itself: its random state settles which text is dropped
    - `numbers`: where the random numbers of batches without seeds come from
    """

    vocabulary: Vocabulary
    modalities: tuple[ModalityShapes, ...]
    dtype: torch.dtype = torch.float32
    ignore_index: int = -1
    prob_uncond: float = 0.0
    prob_clean_captioned: float = 0.0
    token_budget: int | None = None
    span_budget: int | None = None
    finds_blocks: bool = False
    checks_devices: tuple[str, ...] | None = ("cpu",)
    adds_markers: bool = True
    takes_tuples: bool = True
    live_device: torch.device | None = None
    numbers: StateNumbers = field(default_factory=StateNumbers)

    def __post_init__(self) -> None:
        for name in ("token_budget", "span_budget"):
            if getattr(self, name) is not None:
                check_int(getattr(self, name), name)
        if self.span_budget is not None and self.token_budget is None:
            raise ValueError(
                "span_budget goes with a token_budget: only a batch that is padded has a span table to fill"
            )

    def __call__(
        self,
        samples: Any,
        *,
        modality_type: Any = None,
        labels: Any = None,
        times: Any = None,
        sample_weights: Any = None,
        names: Sequence[str | None] | None = None,
        sources: Sequence[str | None] | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[Any] | None = None,
        refuses_gradients: bool = True,
    ) -> Batch:
        """Packs a list of samples, ids `(b, n)`, or floats `(b, ...)` of one `modality_type`. Rows of ids may be padded
        at their end with `ignore_index`.

        `labels` replace ids as targets (see `Transfusion.forward`), `times` are those of the modalities, and
        `sample_weights` `(b,)`, `names` and `sources` override those of each `Sample`. With `seeds`, one for each
        sample, everything random of training (dropped text, times, noise) is settled here: a sample gets the same in
        whatever batch and process. Latents with a flow loss that require gradients are an error unless
        `refuses_gradients` is False. Raises `TypeError` or `ValueError` that names the sample and part at fault.
        """
        with on_cpu():
            samples, described = _described(samples, self.takes_tuples)
            pieces = self._pieces(samples, modality_type, labels)
            pieces, places = self._shaped(pieces, refuses_gradients)
            if not isinstance(samples, Tensor):
                pieces = self._framed(pieces)
            stream = pack(pieces, ignore_index=self.ignore_index, token_shape=self._token_shape)
            weights = _weights(sample_weights, [sample.weight for sample in described], len(pieces))
            batch = self._batch(stream, pieces, places, weights)
            batch = replace(
                batch,
                names=_texts("names", names, [sample.name for sample in described]),
                sources=_texts("sources", sources, [sample.source for sample in described]),
            )
            if times is None:
                batch = batch.with_droppable()
            else:
                batch = batch.with_times(times_of_spans(times, stream.spans, len(pieces)))
            batch = self._with_numbers(batch, generator) if seeds is None else self._seeded(batch, seeds)
            instances = [piece for sample in pieces for piece in sample if isinstance(piece, Modality)]
            copied = [span for span, instance in enumerate(instances) if instance.has_clean_copy]
            return self._padded(with_noised_copies(batch, copied))

    def num_tokens(self, sample: Any) -> int:
        """The tokens that a sample takes in a batch, with markers and noised copies, from its shapes alone: modalities
        may be on the `meta` device. Raises `TypeError` or `ValueError` as packing does.
        """
        with on_cpu():
            samples, _ = _described([sample], takes_tuples=True)
            (pieces,) = self._pieces(samples, None, None)
            pieces = [
                piece if isinstance(piece, Text) else piece._replace(axes=self._axes(piece, f"sample 0, part {i}"))
                for i, piece in enumerate(pieces)
            ]
            return sum(map(self._num_tokens, self._framed([pieces])[0]))

    def _num_tokens(self, piece: Piece) -> int:
        if isinstance(piece, Text):
            return len(piece.ids)
        return prod(self._token_shape(piece.type, piece.shape)) * (2 if piece.has_clean_copy else 1)

    def _axes(self, piece: Modality, where: str) -> Shape:
        """The axial shape of the latents of an instance."""
        shapes = self.modalities[piece.type]
        if shapes.has_encoder and not piece.is_encoded:
            return shapes.latent_shape(tuple(piece.tensor.shape), where)
        axes = tuple(shapes.spec.to_channel_last(piece.tensor, where).shape[:-1])
        _check_tokens(shapes, axes, where)
        return axes

    def _framed(self, samples: list[list[Piece]]) -> list[list[Piece]]:
        if self.adds_markers:
            return [mark(sample, self.vocabulary) for sample in samples]
        for i, sample in enumerate(samples):
            if len(sample) != 1:
                raise ValueError(f"sample {i} has {len(sample)} parts; without markers a sample is one part")
        return samples

    def _pieces(self, samples: Any, modality_type: Any, labels: Any) -> list[list[Piece]]:
        """Parsed, without markers."""
        vocabulary, count = self.vocabulary, len(self.modalities)
        if modality_type is not None:
            check_modality_type(samples, modality_type)
        if labels is not None:
            return self._labelled(samples, labels)
        if isinstance(samples, Tensor):
            return parse_batch(samples, int(modality_type or 0), count, vocabulary.num_text, self.ignore_index)
        parsed = parse_samples(samples, count)
        return [without_markers(sample, vocabulary, f"sample {i}") for i, sample in enumerate(parsed)]

    def _labelled(self, samples: Any, labels: Any) -> list[list[Piece]]:
        if not isinstance(samples, Tensor) or samples.is_floating_point():
            raise TypeError(
                f"labels go with a batch of ids (b, n), got {type(samples).__name__}; use Condition in lists"
            )
        parsed = parse_batch(samples, 0, len(self.modalities), self.vocabulary.num_text, self.ignore_index)
        if not isinstance(labels, Tensor) or not is_integer(labels) or labels.shape != samples.shape:
            came = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels are ids of the shape of the batch, {tuple(samples.shape)}, got {came}")
        labels = labels.detach().to("cpu", torch.long)
        ignored = (labels == self.ignore_index) | (labels == IGNORED)
        check_ids(labels.masked_fill(ignored, 0), self.vocabulary.num_logits, "labels of sample")
        rows = labels.masked_fill(ignored, self.ignore_index)
        texts = [piece for [piece] in parsed if isinstance(piece, Text)]
        lengths = [len(text.ids) for text in texts]
        for i, (length, is_ignored) in enumerate(zip(lengths, ignored, strict=True)):
            if not is_ignored[length:].all():
                raise ValueError(
                    f"labels of sample {i}: its ids are padding from position {length} on, where labels must "
                    f"be {self.ignore_index} or {IGNORED}"
                )
        return [[text._replace(labels=row[:length])] for text, row, length in zip(texts, rows, lengths, strict=True)]

    def _shaped(self, samples: list[list[Piece]], refuses_gradients: bool) -> tuple[list[list[Piece]], list[str]]:
        """Checks every instance, puts its channels last, and finds the axial shape of what is raw. Also says where each
        instance came from, for errors.
        """
        shaped = [list(sample) for sample in samples]
        data: list[Tensor] = []
        places: list[str] = []
        for i, sample in enumerate(samples):
            for j, piece in enumerate(sample):
                if isinstance(piece, Text):
                    continue
                where = f"sample {i}, part {j}"
                shapes, tensor = self.modalities[piece.type], piece.tensor
                if piece.is_learned and refuses_gradients and tensor.requires_grad:
                    raise ValueError(
                        f"{where}: modality {piece.type} has a flow loss and requires gradients: what made it would "
                        "learn latents that are easy to denoise; detach() it, or wrap it in a Condition"
                    )
                if piece.is_learned and refuses_gradients:
                    tensor = tensor.detach()
                tensor = tensor.to(self.dtype)
                if shapes.has_encoder and not piece.is_encoded:
                    shaped[i][j] = piece._replace(tensor=tensor, axes=shapes.latent_shape(tuple(tensor.shape), where))
                else:
                    latents = shapes.spec.to_channel_last(tensor, where)
                    _check_tokens(shapes, tuple(latents.shape[:-1]), where)
                    shaped[i][j] = piece._replace(tensor=latents)
                data.append(tensor)
                places.append(where)
        check_finite(data, places, devices=self.checks_devices)
        return shaped, places

    def _token_shape(self, modality: int, shape: Shape) -> Shape:
        return self.modalities[modality].token_shape(shape)

    def _batch(
        self,
        stream: TokenStream,
        samples: Sequence[Sequence[Piece]],
        places: Sequence[str],
        weights: Float[Tensor, " b"],
    ) -> Batch:
        spans, none = stream.spans, torch.zeros_like(stream.token, dtype=torch.bool)
        slot = (stream.label != self.ignore_index).nonzero().flatten()
        sample = stream.sample[slot]
        targets = TextTargets(
            slot=slot,
            label=stream.label[slot],
            sample=sample,
            is_droppable=none[slot],
            weight=weights[sample],
        )
        return Batch(
            stream=stream,
            data=self._data(stream, samples, places),
            targets=targets,
            times=torch.full((len(spans),), torch.nan, dtype=self.dtype).masked_fill(~spans.is_learned, 1.0),
            span_weight=weights[spans.sample],
            is_droppable=none,
            drop_text_number=torch.ones(len(samples)),
            clean_number=torch.ones(len(spans)),
            prob_uncond=self.prob_uncond,
            prob_clean_captioned=self.prob_clean_captioned,
            signature=self.signature,
            names=(),
            sources=(),
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """What batches depend on of the model they are packed for."""
        return self.vocabulary, *(shapes.signature for shapes in self.modalities)

    def _with_numbers(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        """What settles which text is dropped and which captioned modality is clean."""
        spans = batch.stream.spans
        if not (batch.is_droppable.any() or spans.is_captioned.any()):
            return batch
        numbers = self.numbers.draw(len(batch) + len(spans), generator, self.live_device)
        of_samples, of_spans = numbers.split([len(batch), len(spans)])
        return replace(batch, drop_text_number=of_samples, clean_number=of_spans)

    def _seeded(self, batch: Batch, seeds: Sequence[Any]) -> Batch:
        """Settles everything random, from a seed for each sample."""
        numbers = seeded_numbers(seeds, batch.stream, {kind: data.channels for kind, data in batch.data.items()})
        return replace(
            batch,
            drop_text_number=numbers.drop_text,
            clean_number=numbers.clean,
            time_number=numbers.time,
            noise=numbers.noise,
        )

    def _data(
        self, stream: TokenStream, samples: Sequence[Sequence[Piece]], places: Sequence[str]
    ) -> dict[int, ModalityData]:
        """The latents of every modality, and what is still raw, in the order of the span table."""
        instances: dict[int, list[tuple[Modality, str]]] = defaultdict(list)
        pieces = [piece for sample in samples for piece in sample if isinstance(piece, Modality)]
        for piece, where in zip(pieces, places, strict=True):
            instances[piece.type].append((piece, where))
        return {kind: self._data_of(kind, instances[kind], at.shapes) for kind, at in stream.placements.items()}

    def _data_of(self, kind: int, instances: list[tuple[Modality, str]], shapes: Sequence[Shape]) -> ModalityData:
        is_raw = self.modalities[kind].has_encoder
        encoded = [i for i, (piece, _) in enumerate(instances) if piece.is_encoded or not is_raw]
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, (piece, _) in enumerate(instances):
            if is_raw and not piece.is_encoded:
                tensor = piece.tensor
                groups[tuple(tensor.shape), tensor.device, tensor.requires_grad].append(i)
        raw = tuple(
            RawInstances(
                torch.stack([instances[i][0].tensor for i in rows]), tuple(rows), tuple(instances[i][1] for i in rows)
            )
            for rows in groups.values()
        )
        flat = [instances[i][0].tensor.reshape(-1, instances[i][0].tensor.shape[-1]) for i in encoded]
        device = next((part.device for part in flat if part.device.type != "cpu"), None)
        latents = torch.cat(flat if device is None else [part.to(device) for part in flat]) if flat else None
        sizes = [self.modalities[kind].decoded_size(shape) for shape in shapes]
        channels = self.modalities[kind].spec.dim_latent
        return ModalityData(latents, tuple(encoded), raw, torch.tensor(sizes, dtype=torch.float32), channels)

    def _padded(self, batch: Batch) -> Batch:
        stream, budget = batch.stream, self.token_budget
        if budget is not None:
            rows = self.span_budget or max(budget // TOKENS_PER_SPAN, 8)
            if self.span_budget is not None and rows < len(stream.spans):
                raise ValueError(f"the batch has {len(stream.spans)} modalities, more than the span budget of {rows}")
            while rows < len(stream.spans):  # an unusual batch: twice as many, so that few graphs are made
                rows *= 2
            stream = pad_stream(stream, budget, num_modulations=rows)
        stream = replace(stream, layout=stream.layout.prepare(blocks=self.finds_blocks))
        missing = stream.num_padding
        is_droppable = torch.cat((batch.is_droppable, batch.is_droppable.new_zeros(missing)))
        return replace(batch, stream=stream, is_droppable=is_droppable)


def without_markers(sample: list[Piece], vocabulary: Vocabulary, where: str) -> list[Piece]:
    """A bare sample. One that begins with sos has been sampled: its markers are dropped, to be placed anew, with those
    that open a modality which was never drawn. In all others ids beyond the text are refused, but for a language model,
    whose samples need not begin with sos.
    """
    first = sample[0]
    is_sampled = isinstance(first, Text) and (int(first.ids[0]) == vocabulary.sos or not vocabulary.is_framed)
    for j, piece in enumerate(sample):
        if isinstance(piece, Text):
            check_ids(piece.ids, vocabulary.num_logits if is_sampled else vocabulary.num_text, f"{where}, part {j}")
    return split_unfinished_modality(sample, vocabulary, where).pieces if is_sampled else sample


def check_modality_type(batch: Any, modality_type: Any) -> None:
    """Raises `TypeError` unless this is the type of a float batch."""
    if not is_int(modality_type):
        raise TypeError(f"modality_type must be an int, got {type(modality_type).__name__}")
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        came = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"modality_type goes with a float batch (b, ...), got {came}; in a list write (type, tensor)")


def _check_tokens(shapes: ModalityShapes, axes: Shape, where: str) -> None:
    try:
        shapes.token_shape(axes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _described(samples: Any, takes_tuples: bool) -> tuple[Any, list[Sample]]:
    """Samples as lists of parts, and what is said of each."""
    if not isinstance(samples, (list, tuple)):
        rows = len(samples) if isinstance(samples, Tensor) and samples.ndim else 0
        return samples, [Sample(None)] * rows
    described = [sample if isinstance(sample, Sample) else Sample(sample) for sample in samples]
    return [_parts(sample.parts, takes_tuples) for sample in described], described


def _parts(parts: Any, takes_tuples: bool) -> Any:
    return list(parts) if takes_tuples and isinstance(parts, tuple) and not is_typed(parts) else parts


def _weights(given: Any, own: Sequence[float], num_samples: int) -> Float[Tensor, " b"]:
    try:
        weights = torch.as_tensor(own if given is None else given, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"sample_weights must be numbers, got {type(given).__name__}: {error}") from error
    if weights.shape != (num_samples,) or not weights.isfinite().all() or (weights < 0).any():
        raise ValueError(
            f"sample_weights are {num_samples} numbers of at least 0, one for each sample, got {weights.tolist()}"
        )
    return weights


def _texts(name: str, given: Sequence[str | None] | None, own: Sequence[str | None]) -> tuple[str | None, ...]:
    if given is not None and len(given) != len(own):
        raise ValueError(f"{name}: expected one for each of {len(own)} samples, got {len(given)}")
    return tuple(own if given is None else given)
