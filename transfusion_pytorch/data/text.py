"""Text as ids: bytes, or any tokenizer of Hugging Face `tokenizers`; and files of text in windows.

n ids.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.saving.tokenizer import num_ids, without_limits

MARKERS = 2  # sos and eos, which frame every sample


@runtime_checkable
class TextCodec(Protocol):
    """Text to ids and back. `num_tokens` is the size of the vocabulary: a model's `num_text_tokens`."""

    @property
    def num_tokens(self) -> int: ...
    def encode(self, text: str) -> Int[Tensor, " n"]: ...
    def decode(self, ids: Int[Tensor, " n"]) -> str: ...


class ByteText:
    """Text as its UTF-8 bytes: 256 ids, nothing to train, any language."""

    num_tokens: int = 256

    def encode(self, text: str) -> Int[Tensor, " n"]:
        return as_bytes(text.encode()).long()

    def decode(self, ids: Int[Tensor, " n"]) -> str:
        """What is no UTF-8, as a model may write, becomes the replacement character."""
        return bytes(ids.tolist()).decode(errors="replace")

    def __repr__(self) -> str:
        return "ByteText()"


class TokenizerText:
    """Text by a `tokenizers.Tokenizer`, without special tokens: the model has markers of its own. Of a tokenizer that
    cuts text off or fills it up, a copy that does not.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = without_limits(tokenizer)

    @property
    def num_tokens(self) -> int:
        return num_ids(self.tokenizer)

    def encode(self, text: str) -> Int[Tensor, " n"]:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)

    def decode(self, ids: Int[Tensor, " n"]) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def __repr__(self) -> str:
        return f"TokenizerText({self.tokenizer.to_str()})"


def train_bpe(texts: Iterable[str], vocab_size: int) -> TokenizerText:
    """Trains byte-pair encoding over bytes (as GPT-2 has it): any text comes back as it was.

    The vocabulary has the 256 bytes, and pairs as often as the texts give any, up to `vocab_size` in all.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size is at least 256, one for each byte, got {vocab_size}")
    tokenizers = import_optional("tokenizers", extra="data")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TokenizerText(tokenizer)


def as_bytes(text: bytes) -> UInt8[Tensor, " n"]:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)


class TextWindows(Dataset):
    """Long texts, cut into windows of `length` ids that do not overlap; the last of a text may be shorter.

    `texts` are ids, or files: of bytes they are mapped into memory, not read; a `codec` encodes them as a whole. With
    `moves`, each window starts up to a window later, by a number from its generator, so that every epoch cuts anew.
    """

    def __init__(
        self,
        texts: Sequence[Integer[Tensor, " n"] | str | Path],
        length: int,
        *,
        codec: TextCodec | None = None,
        moves: bool = False,
    ):
        if length < 1:
            raise ValueError(f"length is at least 1, got {length}")
        self.texts = [text if isinstance(text, Tensor) else _ids_of(Path(text), codec) for text in texts]
        self.length, self.moves = length, moves
        self._starts = [(t, start) for t, text in enumerate(self.texts) for start in range(0, len(text), length)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[Tensor]:
        text, start = self._starts[index]
        return [self.texts[text][start : start + self.length].long()]

    def sample(self, index: int, generator: torch.Generator) -> list[Tensor]:
        if not self.moves:
            return self[index]
        text, start = self._starts[index]
        last = max(start, min(start + self.length - 1, len(self.texts[text]) - self.length))
        start += int(torch.randint(last - start + 1, (), generator=generator))
        return [self.texts[text][start : start + self.length].long()]

    def num_tokens(self, index: int) -> int:
        text, start = self._starts[index]
        return min(self.length, len(self.texts[text]) - start) + MARKERS


def _ids_of(file: Path, codec: TextCodec | None) -> Integer[Tensor, " n"]:
    if not file.is_file():
        raise FileNotFoundError(f"no text file {file}")
    if codec is not None and not isinstance(codec, ByteText):
        with file.open(encoding="utf-8", newline="") as opened:  # line ends as they are
            return codec.encode(opened.read()).int()
    size = file.stat().st_size
    return torch.from_file(str(file), size=size, dtype=torch.uint8) if size else as_bytes(b"")
