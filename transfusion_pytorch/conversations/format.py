"""`ConversationFormat`: conversations to samples and prompts, and what a model answers to messages.

n ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion_pytorch.conversations.messages import (
    ASSISTANT,
    ImagePart,
    Message,
    Messages,
    ModalityPart,
    errors_named,
    parse_learnable,
    parse_messages,
)
from transfusion_pytorch.conversations.pictures import Fetch, as_picture, load_image, shape_on_meta
from transfusion_pytorch.conversations.tokenizer import ChatTokenizer
from transfusion_pytorch.conversations.turns import Piece, TurnRenderer, pieces_of
from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.sequence.samples import Condition, Latents, Sample, is_typed

Slots = list[list[Any]]  # of every image or other modality of a conversation, what stands for it in a sample


@dataclass(frozen=True)
class ConversationFormat:
    """How conversations become samples. Picklable.

    - `tokenizer`: a `ChatTokenizer` with a chat template, or what one is made of
    - `images`: an `ImageReader`, or the side of squares in pixels; None where images come as tensors only
    - `modality_type`: of images that are drawn, and of those that are read
    - `vision_type`: images that are read come first as this modality, of a frozen vision encoder (BAGEL, arXiv
      2505.14683, has both branches); None for without. `vision_images` reads them, by default as `images` does
    - `variables`: further ones of the template, such as `{"enable_thinking": False}`
    - `fetch`: loads the bytes of an `http` address; without, such images are refused

    What the assistant writes and draws is learned, with the token that ends its turn. Everything else is a `Condition`:
    read, clean, not learned.

    Raises `TypeError` for another tokenizer or reader, and `ValueError` for types that are negative, or the same.
    """

    tokenizer: Any
    images: ImageReader | int | None = None
    modality_type: int = 0
    vision_type: int | None = None
    vision_images: ImageReader | int | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    fetch: Fetch | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, ChatTokenizer):
            object.__setattr__(self, "tokenizer", ChatTokenizer(self.tokenizer))
        for name in ("images", "vision_images"):
            if isinstance(reader := getattr(self, name), int):
                object.__setattr__(self, name, ImageReader(reader))
            elif reader is not None and not isinstance(reader, ImageReader):
                raise TypeError(f"{name} is an ImageReader or a side in pixels, got {type(reader).__name__}")
        for name in ("modality_type", "vision_type"):
            if (kind := getattr(self, name)) is not None and kind < 0:
                raise ValueError(f"{name} is the type of a modality, from 0, got {kind}")
        if self.vision_type is not None and self.vision_type == self.modality_type:
            raise ValueError(f"vision_type is a modality of its own, got {self.vision_type}, that of drawn images")

    @cached_property
    def renderer(self) -> TurnRenderer:
        return TurnRenderer(self.tokenizer, self.variables)

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a turn of the assistant: `stop_ids` of sampling."""
        end = self.renderer.end_token
        ids = {self.tokenizer.eos_id, None if end is None else self.tokenizer.backend_tokenizer.token_to_id(end)}
        return sorted(id for id in ids if id is not None)

    # to a model

    def sample_of(self, messages: Messages, *, root: Path | None = None, name: str | None = None) -> Sample:
        """A conversation to learn. Paths of images are relative to `root`.

        Raises `ValueError`, `TypeError` or `FileNotFoundError` that names the message and the part at fault, and
        `SkipSample` for a broken image.
        """
        parsed = parse_learnable(messages)
        return self.arrange(parsed, self.load(parsed, root=root), name=name)

    def prompt_of(self, messages: Messages, *, root: Path | None = None) -> list[Any]:
        """What a model is to answer: a prompt of `Transfusion.sample`, up to where the assistant begins. Its ids are
        those that a sample of the same conversation begins with. Errors are those of `sample_of`, and `ValueError` for
        a broken image: nobody skips a question.
        """
        parsed = parse_messages(messages)
        try:
            slots = self._shown(parsed, self.load(parsed, root=root))
        except SkipSample as reason:
            raise ValueError(str(reason)) from reason
        parts: list[Any] = []
        for _, group in groupby(pieces_of(self.renderer.prompt(parsed), self.tokenizer.encode), key=_slot_of):
            pieces = list(group)
            texts = [piece.ids for piece in pieces if piece.ids is not None]
            parts += [torch.cat(texts)] if texts else slots[pieces[0].slot]
        return parts

    def load(self, messages: Sequence[Message], *, root: Path | None = None, is_outline: bool = False) -> Slots:
        """The images and other modalities of parsed messages, in order; as an outline, their shapes on the `meta`
        device.
        """
        slots: Slots = []
        for i, message in enumerate(messages):
            for j, part in enumerate(message.parts):
                if isinstance(part, ModalityPart):
                    slots.append([part.data if isinstance(part.data, Latents) else (part.type, part.data)])
                elif isinstance(part, ImagePart):
                    with errors_named(f"message {i}, part {j}"):
                        slots.append(self._load_image(part, root, is_outline))
        return slots

    def arrange(self, messages: Sequence[Message], slots: Slots, *, name: str | None = None) -> Sample:
        """The sample of parsed messages whose images are loaded."""
        shown, parts = self._shown(messages, slots), []
        for piece in pieces_of(self.renderer.learned_turns(messages), self.tokenizer.encode):
            own = shown[piece.slot] if piece.ids is None else [piece.ids]
            parts += own if piece.is_learned else [Condition(part) for part in own]
        return Sample(parts, name=name)

    def _load_image(self, part: ImagePart, root: Path | None, is_outline: bool) -> list[Any]:
        """The image as its vision encoder takes it, if there is one, and as it is drawn."""
        image = load_image(part.source, root=root, fetch=self.fetch)
        drawn = (self.modality_type, _read(image, self.images, is_outline))
        if self.vision_type is None:
            return [drawn]
        return [(self.vision_type, _read(image, self.vision_images or self.images, is_outline)), drawn]

    def _shown(self, messages: Sequence[Message], slots: Slots) -> Slots:
        """What of each slot stands in the sample: images of the assistant are drawn, and have no vision branch."""
        roles = [message.role for message in messages for part in message.parts if not isinstance(part, str)]
        return [slot[-1:] if role == ASSISTANT else slot for role, slot in zip(roles, slots, strict=True)]

    # from a model

    def message_of(
        self,
        sample: Sequence[Any],
        *,
        num_text: int,
        prompt: Sequence[Any] = (),
        channels_first: Mapping[int, bool] | None = None,
    ) -> dict[str, Any]:
        """What a model added to a prompt, as a message: `{"role": "assistant", "content": [...]}`. Text is a part
        `{"type": "text", "text": ...}`, a picture `{"type": "image", "image": <Pillow image>}`, any other modality
        `{"type": "modality", "modality_type": ..., "data": ...}`. An answer of nothing has no parts.

        `num_text` is that of the model's vocabulary: ids from there on are markers. `channels_first` says it of
        modalities whose pictures may be read both ways.
        """
        given = [part for part in prompt if not is_typed(part) and not isinstance(part, Latents)]
        num_ids, num_modalities = sum(len(ids) for ids in given), len(prompt) - len(given)
        content: list[dict[str, Any]] = []
        for part in sample:
            if isinstance(part, Tensor):
                ids = part[part < num_text].cpu()
                text = self.tokenizer.decode(ids[num_ids:], skip_special=True) if len(ids) > num_ids else ""
                num_ids = max(0, num_ids - len(ids))
                content += [{"type": "text", "text": text}] if text else []
            elif num_modalities:
                num_modalities -= 1
            else:
                kind, data = part
                content.append(_answered(kind, data, (channels_first or {}).get(kind, False)))
        return {"role": ASSISTANT, "content": _trimmed(content)}


def _slot_of(piece: Piece) -> int:
    """The same for texts that follow each other."""
    return piece.slot


def _read(image: Any, reader: ImageReader | int | None, is_outline: bool) -> Tensor:
    if isinstance(image, Tensor):
        return torch.empty_like(image, device="meta") if is_outline else image
    if not isinstance(reader, ImageReader):
        raise ValueError("images are read from files by an ImageReader: give images=... to the ConversationFormat")
    return shape_on_meta(image, reader) if is_outline else reader(image)


def _answered(modality_type: int, data: Tensor, channels_first: bool) -> dict[str, Any]:
    picture = as_picture(data, channels_first=channels_first)
    if picture is None:
        return {"type": "modality", "modality_type": modality_type, "data": data.detach().cpu()}
    return {"type": "image", "image": picture}


def _trimmed(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the white space around an answer, which is the template's."""
    if content and content[0]["type"] == "text":
        content[0]["text"] = content[0]["text"].lstrip()
    if content and content[-1]["type"] == "text":
        content[-1]["text"] = content[-1]["text"].rstrip()
    return [part for part in content if part.get("text") != ""]
