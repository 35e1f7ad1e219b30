"""Samples as users write them, parsed into pieces: text and modalities.

A sample is a list. An integer tensor is text, a floating point tensor is modality 0, and `(type, tensor)` is any
modality. `Latents` are a modality that has been encoded already, a `Condition` is read but not learned, and a modality
`WithCleanCopy` is learned, and read clean by what follows it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.sequence.vocabulary import Vocabulary

Shape = tuple[int, ...]
MAX_AXES = 3


@dataclass(frozen=True)
class Condition:
    """A part that is read and not learned: a prompt, a source image, an observation.

    `part` is what a sample may contain: text, a modality, `(type, tensor)` or `Latents`. Its text, the markers that
    open its modality and the marker that follows it are no targets. Its modality is clean (t = 1) and has no flow loss.
    Gradients flow into its tensor, so a trainable encoder may stand in front of the model.
    """

    part: Any


@dataclass(frozen=True)
class WithCleanCopy:
    """A modality that is learned, and that later parts of its sample see clean, as in sampling (arXiv 2505.14683).

    `part` is a modality, `(type, tensor)` or `Latents`. Its tokens stand in the stream twice: clean (t = 1), and as a
    noised copy, which is learned and which nothing else sees. In a prompt it is a plain part.
    """

    part: Any


@dataclass(frozen=True)
class Latents:
    """An instance of modality `type` that is encoded already (cached latents): its encoder is not called.

    `latents` are `(*axes, c)`, or `(c, *axes)` with `channel_first_latent`.
    """

    type: int
    latents: Tensor


@dataclass(frozen=True)
class Sample:
    """A sample that has a name, comes from a source, or weighs more or less than others.

    `parts` are a list, as a sample is otherwise. `weight` multiplies its losses and counts.
    """

    parts: Any
    name: str | None = None
    source: str | None = None
    weight: float = 1.0


class TypedModality(NamedTuple):
    """A modality as users see it, beside its type: the `(type, modality)` of returned samples, with names.

    It is a tuple, and a part of a sample like any other `(type, tensor)`.
    """

    modality_type: int
    tensor: Float[Tensor, "..."]


class UnprocessedModality(TypedModality):
    """Latents in a returned sample. As a part of a sample they are `Latents`: their encoder is not called."""

    __slots__ = ()


class Text(NamedTuple):
    """Ids of text or of markers, on the CPU.

    `is_learned` says whether they are targets of the text loss. `labels`, of the length of `ids`, replace them as
    targets.
    """

    ids: Int[Tensor, " n"]
    is_learned: bool = True
    labels: Int[Tensor, " n"] | None = None


class Modality(NamedTuple):
    """One instance of a modality: raw data first, channel-last latents `(*axes, c)` once encoded.

    - `is_captioned`: text follows it in its sample, sees it as it is noised, and none stands before
    - `is_learned`: it is noised and has a flow loss
    - `has_clean_copy`: not the instance itself is noised then, but a copy of it
    - `is_encoded`: `tensor` are latents although the modality has an encoder
    - `axes`: the axial shape of the latents while `tensor` is raw data
    - `key`: equal for equal data, where it was made while that was on the CPU (`hashing.content_key`)
    """

    type: int
    tensor: Float[Tensor, "..."]
    is_captioned: bool = False
    is_learned: bool = True
    is_encoded: bool = False
    axes: Shape | None = None
    key: bytes | None = None
    has_clean_copy: bool = False

    @property
    def shape(self) -> Shape:
        """The axial shape of the latents."""
        return tuple(self.tensor.shape[:-1]) if self.axes is None else self.axes


Piece = Text | Modality


def as_text(ids: Sequence[int]) -> list[Piece]:
    """Ids as a piece, or no piece where there are none."""
    return [Text(as_ids(ids))] if ids else []


def as_ids(ids: Sequence[int]) -> Int[Tensor, " n"]:
    """On the CPU, whatever the default device is: batches are laid out there."""
    return torch.tensor(ids, dtype=torch.long, device="cpu")


@dataclass(frozen=True)
class ModalitySpec:
    """What the latents of a modality look like.

    `num_dim` is the number of axes, None where any from 0 to 3 will do. `parse_shape` turns what the model wrote into
    an axial shape, or None.
    """

    type: int
    dim_latent: int
    num_dim: int | None
    default_shape: Shape | None
    channel_first: bool
    parse_shape: Callable[[str], Shape | None]

    def to_channel_last(self, latents: Float[Tensor, "..."], where: str) -> Float[Tensor, "..."]:
        """Checks the axes and channels of one instance and puts its channels last."""
        axes = latents.ndim - 1
        expected = f"{self.num_dim}" if self.num_dim is not None else f"0 to {MAX_AXES}"
        if axes < 0 or axes > MAX_AXES or (self.num_dim is not None and axes != self.num_dim):
            raise ValueError(
                f"{where}: modality {self.type} takes latents of {expected} axes and one of channels, "
                f"got shape {tuple(latents.shape)}; a batch is a list of samples, without a batch axis"
            )
        channel_axis = 0 if self.channel_first else -1
        if latents.shape[channel_axis] != self.dim_latent:
            place, other = ("first", "False") if self.channel_first else ("last", "True")
            raise ValueError(
                f"{where}: modality {self.type} takes latents of {self.dim_latent} channels, {place}, "
                f"got shape {tuple(latents.shape)}; set channel_first_latent={other} if they stand at the other end"
            )
        return latents.movedim(channel_axis, -1)

    def from_channel_last(self, latents: Float[Tensor, "..."], batched: bool = False) -> Float[Tensor, "..."]:
        """Puts the channels back where the user has them."""
        return latents.movedim(-1, 1 if batched else 0) if self.channel_first else latents


def parse_samples(samples: Any, num_modalities: int) -> list[list[Piece]]:
    """Reads a batch. Raises `TypeError` or `ValueError` that names the sample and part at fault."""
    if not isinstance(samples, (list, tuple)):
        raise TypeError(f"a batch is a list of samples, got {type(samples).__name__}")
    if not samples:
        raise ValueError("the batch is empty, expected at least one sample")
    parsed = [parse_sample(sample, num_modalities, f"sample {i}") for i, sample in enumerate(samples)]
    lone = {
        type(sample[0])
        for sample, given in zip(parsed, samples, strict=True)
        if not isinstance(given, list) or is_typed(given)
    }
    if len(lone) > 1:
        raise TypeError(
            "text and modalities stand side by side in the batch; the parts of a sample go in a list: [[...]]"
        )
    return parsed


def parse_sample(sample: Any, num_modalities: int, where: str) -> list[Piece]:
    """Reads one sample; a lone part counts as a sample of one part."""
    parts = parts_of(sample)
    if not parts:
        raise ValueError(f"{where} is empty, expected at least one part")
    return [parse_part(part, num_modalities, f"{where}, part {i}") for i, part in enumerate(parts)]


def parts_of(sample: Any) -> list[Any]:
    """The parts of a sample: those of a list, or the sample itself where it is a lone part."""
    return sample if isinstance(sample, list) and not is_typed(sample) else [sample]


def is_sequence(value: Any) -> bool:
    """A tuple, a list, or what configurations have instead (`torch.Size`, `ListConfig`)."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_int(value: Any) -> bool:
    """A whole number, numpy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_typed(part: Any) -> bool:
    """Whether this is `(type, tensor)`. A list counts too: `pin_memory` of older data loaders makes lists of tuples."""
    return isinstance(part, (tuple, list)) and len(part) == 2 and isinstance(part[0], Integral)


def parse_part(part: Any, num_modalities: int, where: str) -> Piece:
    if isinstance(part, (Condition, WithCleanCopy)):
        if isinstance(part.part, (Condition, WithCleanCopy)):
            raise TypeError(f"{where}: a {_name_of(part)} holds one part, got a {_name_of(part.part)}")
        piece = parse_part(part.part, num_modalities, where)
        if isinstance(part, WithCleanCopy) and isinstance(piece, Text):
            raise TypeError(f"{where}: WithCleanCopy is for modalities, got text, which is never noised")
        return piece._replace(is_learned=False) if isinstance(part, Condition) else piece._replace(has_clean_copy=True)
    if isinstance(part, UnprocessedModality):
        part = Latents(*part)
    if isinstance(part, Latents):
        if not isinstance(part.type, Integral):
            raise TypeError(f"{where}: Latents have an int for their type, got {type(part.type).__name__}")
        piece = parse_part((part.type, part.latents), num_modalities, where)
        assert isinstance(piece, Modality)
        return piece._replace(is_encoded=True)
    is_pair = (isinstance(part, tuple) and len(part) == 2) or is_typed(part)
    modality, tensor = part if is_pair else (None, part)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{where}: expected an integer tensor (text), a floating point tensor (modality 0) or (type, tensor), "
            f"got {_name_of(part)}"
        )
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{where}: text is int64 and modalities are float32 or the like, got {tensor.dtype}")
    if not tensor.numel():
        raise ValueError(f"{where}: the tensor is empty, of shape {tuple(tensor.shape)}; leave the part out instead")
    if modality is None and not tensor.is_floating_point():
        return parse_text(tensor, where)
    modality = 0 if modality is None else modality
    if not is_int(modality):
        raise TypeError(
            f"{where}: a pair is (type, tensor) with an int for its type, got {_name_of(part)}; the parts of a sample "
            "stand in a list"
        )
    if not 0 <= int(modality) < num_modalities:
        raise ValueError(f"{where}: unknown modality type {modality}, this model has {num_modalities} (from 0)")
    if not tensor.is_floating_point():
        raise TypeError(f"{where}: modality {modality} must be floating point, got {tensor.dtype}; text has no type")
    return Modality(int(modality), tensor)


def parse_text(ids: Tensor, where: str) -> Text:
    """Ids of one axis; a lone id has none, and a batch of one text `(1, n)` is that text."""
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise ValueError(
            f"{where}: text is (n,), (1, n), or a single id without axes, got shape {tuple(ids.shape)}; "
            "modalities are floating point"
        )
    return Text(ids.detach().reshape(-1).to("cpu", torch.long))


def check_ids(ids: Int[Tensor, "*b n"], limit: int, where: str) -> None:
    """Raises `ValueError` where an id lies outside `[0, limit)`. `where` names the ids; for a batch `(b, n)` it is what
    a row is called, such as `"sample"`, and the error adds which row, and the position in it.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
        place = ((ids < 0) | (ids >= limit)).nonzero()[0].tolist()
        expected = f"expected 0 to {limit - 1}" if limit else "which has no text"
        where = f"{where} {place[0]}, position {place[1]}" if len(place) == 2 else where
        raise ValueError(f"{where}: token id {ids[tuple(place)].item()} is outside the vocabulary, {expected}")


def mark(pieces: Sequence[Piece], vocabulary: Vocabulary, *, complete: bool = True) -> list[Piece]:
    """Frames a bare sample with its markers: sos, what opens and closes each modality, and eos if it is `complete`.

    The text of a language model has no sos in front, and no eos behind its own.
    """
    begins = vocabulary.is_framed or not pieces or not isinstance(pieces[0], Text)
    marked: list[Piece] = [Text(as_ids([vocabulary.sos]))] if begins else []
    is_learned = True
    texts = [i for i, piece in enumerate(pieces) if isinstance(piece, Text) and piece.ids.tolist() != [vocabulary.eos]]
    for i, piece in enumerate(pieces):
        is_learned = piece.is_learned
        if isinstance(piece, Text):
            marked.append(piece)
            continue
        opening = Text(vocabulary.opening(piece.type, piece.shape), is_learned)
        closing = Text(vocabulary.closing(piece.type), is_learned)
        is_captioned = bool(texts) and i < texts[0] and not piece.has_clean_copy
        marked += [opening, piece._replace(is_captioned=is_captioned), closing]
    last = marked[-1]
    ends = not vocabulary.is_framed and isinstance(last, Text) and int(last.ids[-1]) == vocabulary.eos
    # behind a condition nobody asked the model to stop
    return [*marked, Text(as_ids([vocabulary.eos]), is_learned)] if complete and not ends else marked


def strip_markers(pieces: Sequence[Piece], vocabulary: Vocabulary) -> list[Piece]:
    """The inverse of `mark`, forgiving: markers may be there or not, and modalities opened without being drawn.

    sos and eos are removed everywhere (but for the eos of a language model, which is text), and the closing marker of a
    modality behind it. So is every opening, whatever follows: the markers of a modality come from the modality itself,
    and an opening without one says nothing. Only an opening at the end of the sample stays, since its modality may be
    drawn next. All other ids are left alone.

    With `4` and `,` for characters of a shape and `x` for a modality:

    - `sos 1 meta 4 som x eom 2 eos` -> `1 x 2`
    - `1 meta 4 , 2`, `1 meta 4 som 2` and `1 som 2` -> `1 2`
    - `1 meta 4 som` stays
    """
    bare: list[Piece] = []
    pieces = merge_texts(pieces)
    frames = (vocabulary.sos, vocabulary.eos) if vocabulary.is_framed else (vocabulary.sos,)
    for i, piece in enumerate(pieces):
        if isinstance(piece, Modality):
            bare.append(piece)
            continue
        ids = [token for token in piece.ids.tolist() if token not in frames]
        began_from_nothing = not i and not vocabulary.is_framed and int(piece.ids[0]) == vocabulary.sos
        if began_from_nothing and ids and ids[0] < vocabulary.num_text:
            ids = [vocabulary.sos, *ids]
        before = pieces[i - 1] if i else None
        if isinstance(before, Modality) and ids[:1] == [vocabulary.eom[before.type]]:
            ids = ids[1:]
        ids = _without_openings(ids, vocabulary, keeps_last=i + 1 == len(pieces))
        if ids:
            bare.append(Text(as_ids(ids), piece.is_learned))
    return bare


def find_openings(ids: Sequence[int], vocabulary: Vocabulary) -> Iterator[slice]:
    """Where ids open a modality: `meta`, the characters of a shape and `som`, as far as they go, or `som` alone."""
    start = 0
    while start < len(ids):
        end = start
        if ids[end] == vocabulary.meta:
            end += 1
            while end < len(ids) and vocabulary.is_char(ids[end]):
                end += 1
        if end < len(ids) and ids[end] in vocabulary.som:
            end += 1
        if end > start:
            yield slice(start, end)
        start = max(end, start + 1)


def _without_openings(ids: list[int], vocabulary: Vocabulary, *, keeps_last: bool) -> list[int]:
    """Ids without their openings, but for one that ends them if it `keeps_last`."""
    kept = list(ids)
    for opening in reversed(list(find_openings(ids, vocabulary))):
        if not (keeps_last and opening.stop == len(ids)):
            del kept[opening]
    return kept


def merge_texts(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins texts that follow each other and are both learned or both not: `[a] [b] image -> [a b] image`."""
    merged: list[Piece] = []
    for (is_text, is_learned), group in groupby(pieces, key=lambda piece: (isinstance(piece, Text), piece.is_learned)):
        members = list(group)
        texts = [piece.ids for piece in members if isinstance(piece, Text)]
        merged += [Text(torch.cat(texts), is_learned)] if is_text else members
    return merged


def check_finite(
    data: Sequence[Float[Tensor, "..."]], places: Sequence[str], *, devices: Sequence[str] | None = ("cpu",)
) -> None:
    """Raises `ValueError` for NaN or infinity. Tensors on devices other than these are not waited for (None: all)."""
    chosen = [i for i, instance in enumerate(data) if devices is None or instance.device.type in devices]
    data, places = [data[i] for i in chosen], [places[i] for i in chosen]
    if not data:
        return
    finite = torch.stack([instance.isfinite().all().cpu() for instance in data])
    if not finite.all():
        raise ValueError(f"{places[int(finite.int().argmin())]}: the tensor contains NaN or infinity")


def parse_batch(
    batch: Tensor, modality: int, num_modalities: int, num_text: int, ignore_index: int = -1
) -> list[list[Piece]]:
    """Reads a batch of one kind: ids `(b, n)` as text, or floats `(b, ...)` as one modality. Samples stay without
    markers. Rows of ids may be padded at their end with `ignore_index`, which is left out: `[1 2 -1]` -> `[1 2]`.
    """
    if batch.is_floating_point():
        if batch.ndim < 2 or not batch.numel():
            raise ValueError(f"a float batch is (b, ...), one instance in each row, got shape {tuple(batch.shape)}")
        return [[parse_part((modality, row), num_modalities, f"sample {i}")] for i, row in enumerate(batch.unbind())]
    check_text_shape(batch)
    ids = batch.detach().to("cpu", torch.long)
    lengths = _lengths_without_padding(ids, ignore_index)
    check_ids(ids.masked_fill(torch.arange(ids.shape[1], device="cpu") >= lengths[:, None], 0), num_text, "sample")
    return [[Text(row[:length])] for row, length in zip(ids, lengths.tolist(), strict=True)]


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex())


def _lengths_without_padding(ids: Int[Tensor, "b n"], ignore_index: int) -> Int[Tensor, " b"]:
    """How long each row is without the `ignore_index` at its end: `[[1 2 3] [1 -1 -1]]` -> `[3 1]`.

    Raises `ValueError` for one that has nothing else, and for padding in front of ids.
    """
    is_id = ids != ignore_index
    lengths = (is_id * torch.arange(1, ids.shape[1] + 1, device="cpu")).amax(1)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"sample {row} is empty: all of its ids are {ignore_index}, which is padding; leave it out")
    if not torch.equal(is_id.sum(1), lengths):
        is_inside = ~is_id & (torch.arange(ids.shape[1], device="cpu") < lengths[:, None])
        row, position = is_inside.nonzero()[0].tolist()
        raise ValueError(
            f"sample {row}, position {position}: {ignore_index} (ignore_index) is padding, which stands only at the "
            "end of a row; for what is read and not learned give labels, or lists with Condition"
        )
    return lengths


def check_text_batch(ids: Any, num_text: int, name: str = "sample") -> None:
    """Raises `TypeError` or `ValueError` unless this is a batch of text `(b, n)`; `name` is what a row is called."""
    check_text_shape(ids)
    check_ids(ids.long(), num_text, name)


def check_text_shape(ids: Any) -> None:
    """Raises `TypeError` or `ValueError` unless this is an integer tensor `(b, n)`."""
    if not isinstance(ids, Tensor) or not is_integer(ids):
        raise TypeError(f"a batch of text is an integer tensor (b, n), got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"a batch of text is (b, n), got shape {tuple(ids.shape)}; wrap ragged text in lists")


def _name_of(part: Any) -> str:
    """What came, for errors: `(0, 3.0)` is `(int, float)`."""
    return f"({', '.join(map(_name_of, part))})" if isinstance(part, tuple) else type(part).__name__
