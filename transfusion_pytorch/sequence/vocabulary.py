"""The ids of text and of the markers that give a mixed sample its structure."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

ALPHABET = "0123456789,"


@dataclass(frozen=True)
class Vocabulary:
    """Text ids first, then the markers that frame sentences and modalities.

    With `num_text = 10` and one modality: text 0-9, sos 10, eos 11, meta 12, som 13, eom 14, characters 15-25, null 26.
    An image of 4 x 6 latents is written `meta "4" "," "6" som <24 latents> eom`.

    `null` stands for text that classifier-free guidance took away. It is read but never written, so it comes last and
    logits end before it.

    With an `eos_id` the text is that of a language model, whose own id ends it (`num_text + 1` is then nobody's). Such
    samples begin as they come, and with sos only where there is no text to begin with.
    """

    num_text: int
    num_modalities: int
    eos_id: int | None = None

    @property
    def is_framed(self) -> bool:
        """Whether every sample stands between sos and eos."""
        return self.eos_id is None

    @property
    def sos(self) -> int:
        return self.num_text

    @property
    def eos(self) -> int:
        return self.num_text + 1 if self.eos_id is None else self.eos_id

    @property
    def meta(self) -> int:
        return self.num_text + 2

    @property
    def som(self) -> tuple[int, ...]:
        first = self.num_text + 3
        return tuple(range(first, first + self.num_modalities))

    @property
    def eom(self) -> tuple[int, ...]:
        first = self.num_text + 3 + self.num_modalities
        return tuple(range(first, first + self.num_modalities))

    @property
    def first_char(self) -> int:
        return self.num_text + 3 + 2 * self.num_modalities

    @property
    def num_logits(self) -> int:
        """How many ids can be written."""
        return self.first_char + len(ALPHABET)

    @property
    def null(self) -> int:
        return self.num_logits

    @property
    def size(self) -> int:
        """How many ids can be read."""
        return self.num_logits + 1

    def is_char(self, token: int) -> bool:
        return self.first_char <= token < self.num_logits

    def encode_chars(self, text: str) -> Int[Tensor, " n"]:
        """`"4,6"` to the ids that spell it. Raises `ValueError` for anything but digits and commas."""
        unknown = sorted(set(text) - set(ALPHABET))
        if unknown:
            raise ValueError(f"shape metadata is written with the characters {ALPHABET!r}, got {unknown} in {text!r}")
        return torch.tensor([self.first_char + ALPHABET.index(char) for char in text], dtype=torch.long, device="cpu")

    def decode_chars(self, ids: Int[Tensor, " n"]) -> str:
        """The inverse of `encode_chars`. Raises `ValueError` for an id that is no character."""
        return "".join(self.char(token) for token in ids.tolist())

    def char(self, token: int) -> str:
        if not self.is_char(token):
            raise ValueError(f"id {token} is no character: those are {self.first_char} to {self.num_logits - 1}")
        return ALPHABET[token - self.first_char]

    def opening(self, modality: int, shape: tuple[int, ...]) -> Int[Tensor, " n"]:
        """What stands before the latents of a modality: `meta`, its shape, `som`."""
        chars = self.encode_chars(format_shape(shape)).tolist()
        return torch.tensor([self.meta, *chars, self.som[modality]], dtype=torch.long, device="cpu")

    def closing(self, modality: int) -> Int[Tensor, " n"]:
        """What stands after the latents of a modality."""
        return torch.tensor([self.eom[modality]], dtype=torch.long, device="cpu")


def format_shape(shape: tuple[int, ...]) -> str:
    """`(4, 6)` is written `"4,6"`, and `()` is written as nothing at all."""
    return ",".join(map(str, shape))


def parse_shape(text: str) -> tuple[int, ...] | None:
    """The inverse of `format_shape`, or None where the text is no shape."""
    if not text:
        return ()
    axes = text.split(",")
    if not all(axis.isascii() and axis.isdigit() and int(axis) > 0 for axis in axes):
        return None
    return tuple(map(int, axes))


class MarkerIds:
    """The ids of the markers, and shapes as ids. Mixed into a model, whose `vocabulary` says them."""

    vocabulary: Vocabulary
    device: torch.device

    @property
    def sos_id(self) -> int:
        return self.vocabulary.sos

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos

    @property
    def meta_id(self) -> int:
        return self.vocabulary.meta

    @property
    def som_ids(self) -> list[int]:
        return list(self.vocabulary.som)

    @property
    def eom_ids(self) -> list[int]:
        return list(self.vocabulary.eom)

    def char_tokenizer(self, text: str) -> Int[Tensor, " n"]:
        """The ids that spell a shape: `"4,4"`."""
        return self.vocabulary.encode_chars(text).to(self.device)

    def decode_chars(self, ids: Int[Tensor, " n"]) -> str:
        """The inverse of `char_tokenizer`."""
        return self.vocabulary.decode_chars(ids)
