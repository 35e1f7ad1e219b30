"""Samples in a notebook: text and pictures in the order in which they are read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral
from typing import Any

from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.display.images import rendered_html
from transfusion_pytorch.display.lines import (
    Part,
    check_count,
    check_decode_text,
    decode,
    describe_part,
    parse_parts,
)

DecodeText = Callable[[Tensor], str]
Renderer = Callable[[Tensor], Any]
Renderers = Mapping[int, Renderer] | Renderer

# Colours come from the page, so that light and dark themes both read well.
SAMPLE = "display:flex;flex-direction:column;align-items:flex-start;gap:6px;line-height:1.4"
GRID = "display:flex;flex-wrap:wrap;align-items:flex-start;gap:12px"
CARD = "border:1px solid rgba(128,128,128,.4);border-radius:4px;padding:8px;max-width:100%;box-sizing:border-box"
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"
DATA = f"{TEXT};font-family:monospace;font-size:90%"
NOTE = "opacity:.65;font-size:85%"


@dataclass(frozen=True)
class PartWriter:
    """How parts become HTML: the options of `show_sample`, checked."""

    decode_text: DecodeText | None = None
    renderers: Renderers | None = None
    num_text: int | None = None
    max_text: int | None = None
    smallest: int = 128

    def __post_init__(self) -> None:
        check_decode_text(self.decode_text)
        check_renderers(self.renderers)
        check_count("smallest", self.smallest, least=1)
        for name, value in (("num_text", self.num_text), ("max_text", self.max_text)):
            if value is not None:
                check_count(name, value, least=1)

    def sample(self, parts: Iterable[Part]) -> str:
        return column(self.part(part) for part in parts)

    def part(self, part: Part) -> str:
        """HTML of one part; nothing at all for text of which every id is hidden."""
        return self.text(part.tensor) if part.type is None else self.modality(part.type, part.tensor)

    def text(self, ids: Tensor) -> str:
        ids = ids.reshape(-1)
        ids = ids if self.num_text is None else ids[ids < self.num_text]
        return self.decoded(decode(ids, self.decode_text)) if len(ids) else ""

    def decoded(self, whole: str) -> str:
        """HTML of text that is decoded already."""
        shown = whole[: self.max_text]
        more = len(whole) - len(shown)
        rest = f'<span style="{NOTE}"> … {more:,} characters more</span>' if more else ""
        return f'<div dir="auto" style="{DATA if self.decode_text is None else TEXT}">{escape(shown)}{rest}</div>'

    def modality(self, modality: int, tensor: Tensor) -> str:
        if (renderer := self.renderer(modality)) is None:
            return f'<div style="{DATA}">{escape(describe_part(Part(modality, tensor)))}</div>'
        caption = f"modality {modality} {tuple(tensor.shape)}"
        return rendered_html(renderer(tensor), caption=caption, smallest=self.smallest)

    def renderer(self, modality: int) -> Renderer | None:
        return self.renderers.get(modality) if isinstance(self.renderers, Mapping) else self.renderers


def check_renderers(renderers: Any) -> None:
    expected = "expected a function, or a dict from types (int) to functions"
    if not isinstance(renderers, Mapping):
        if renderers is not None and not callable(renderers):
            raise TypeError(f"renderers: {expected}, got {type(renderers).__name__}")
        return
    for modality, renderer in renderers.items():
        if isinstance(modality, bool) or not isinstance(modality, Integral):
            raise TypeError(f"renderers: {expected}, got the key {modality!r}")
        if not callable(renderer):
            raise TypeError(f"renderers: {expected}, got {type(renderer).__name__} for type {modality}")


def column(blocks: Iterable[str]) -> str:
    """Blocks of HTML below each other, without the empty ones."""
    return f'<div style="{SAMPLE}">{"".join(blocks) or note("nothing to show")}</div>'


def note(text: str) -> str:
    return f'<div style="{NOTE}">{escape(text)}</div>'


@dataclass(frozen=True, repr=False, eq=False)
class SampleView:
    """A sample that shows itself: text and pictures in a notebook, the lines of `describe_sample` elsewhere."""

    parts: list[Part]
    writer: PartWriter

    def __repr__(self) -> str:
        return "\n".join(map(describe_part, self.parts))

    def _repr_html_(self) -> str:
        return self.writer.sample(self.parts)


@dataclass(frozen=True, repr=False, eq=False)
class SamplesView:
    """Samples that show themselves: cards side by side in a notebook, lines under their labels elsewhere."""

    samples: list[list[Part]]
    labels: list[str]
    writer: PartWriter

    def __repr__(self) -> str:
        lines = []
        for label, parts in zip(self.labels, self.samples, strict=True):
            lines += [label, *(f"  {describe_part(part)}" for part in parts)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cards = (
            f'<div style="{CARD}">{note(label)}{self.writer.sample(parts)}</div>'
            for label, parts in zip(self.labels, self.samples, strict=True)
        )
        return f'<div style="{GRID}">{"".join(cards)}</div>'


def show_sample(
    sample: Any,
    *,
    decode_text: DecodeText | None = None,
    renderers: Renderers | None = None,
    num_text: int | None = None,
    max_text: int | None = 2000,
    smallest: int = 128,
) -> SampleView:
    """A view of one sample, which a notebook shows as text and pictures. Nothing is rendered before that.

    - `sample`: a list of parts as `sample` returns them, or a single part: text (n), or a modality or (type, modality)
    - `decode_text`: from ids (n), on the CPU, to a str; without it the ids are shown
    - `renderers`: for each type, or for all of them, a function from the tensor of a modality to a PIL image, the bytes
      of a PNG, pixels (h, w) or (h, w, 1, 3 or 4) in uint8 or floats from 0 to 1, a str, or any object with
      `_repr_html_`, whose HTML is taken as it is. `render_image` makes one. A type without one is shown as a line
    - `num_text`: hides the ids from there on, the markers (`num_text_tokens` of the model); they are shown otherwise,
      and `decode_text` gets them too
    - `max_text`: how many characters of a part are shown at most, None for all
    - `smallest`: small images are enlarged a whole number of times, to at least that many pixels

    Raises `TypeError` or `ValueError` for what is no sample or no such option. What a renderer raises, or returns
    amiss, comes when the view is shown.
    """
    writer = PartWriter(decode_text, renderers, num_text, max_text, smallest)
    return SampleView(parse_parts(sample), writer)


def show_samples(
    samples: Any,
    *,
    labels: Sequence[object] | Int[Tensor, " n"] | None = None,
    decode_text: DecodeText | None = None,
    renderers: Renderers | None = None,
    num_text: int | None = None,
    max_text: int | None = 2000,
    smallest: int = 128,
) -> SamplesView:
    """A view of several samples, as `sample_many` returns them, side by side, each under its label or its number.

    The other options and the errors are those of `show_sample`.
    """
    if not isinstance(samples, (list, tuple)) or not all(isinstance(sample, list) for sample in samples):
        raise TypeError("samples: expected a list of samples, each a list of parts; a single one is for show_sample")
    names = [f"sample {index}" for index in range(len(samples))] if labels is None else label_names(labels)
    if len(names) != len(samples):
        raise ValueError(f"labels: expected one for each of {len(samples)} samples, got {len(names)}")
    writer = PartWriter(decode_text, renderers, num_text, max_text, smallest)
    return SamplesView([parse_parts(sample) for sample in samples], names, writer)


def label_names(labels: Any) -> list[str]:
    try:
        return [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    except TypeError as error:
        raise TypeError(f"labels: expected a sequence, one for each sample, got {type(labels).__name__}") from error
