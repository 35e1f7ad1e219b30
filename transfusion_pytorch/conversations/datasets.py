"""Conversations, captions and edits out of files, as samples for `Trainer`, `DataPlan` and `create_dataloader`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from transfusion_pytorch.conversations.dropout import ConditionDropout
from transfusion_pytorch.conversations.format import ConversationFormat, Slots
from transfusion_pytorch.conversations.messages import ImagePart, Message, Messages, errors_named, parse_learnable
from transfusion_pytorch.conversations.pictures import file_of
from transfusion_pytorch.conversations.records import Records
from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.data.order import generator_of
from transfusion_pytorch.data.pairs import ImageCaptionPairs, stamp_of
from transfusion_pytorch.sequence.samples import Sample

Transform = Callable[[Sample, torch.Generator], Sample]
IMAGE_PLACEHOLDER = "<image>"  # of LLaVA
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class ConversationDataset(Dataset, ABC):
    """Samples out of conversations. A subclass says what the messages are; `root` is the folder of their images.

    `transform` takes a sample and the generator of its visit, such as `ConditionDropout`. Which choices a visit makes
    depends on a sample's position in the stream (`dataset[i]`: on `i`). Broken images are left out and reported
    (`SkipSample`); anything else that is wrong is an error that names the record.
    """

    root: Path | None = None

    def __init__(self, format: ConversationFormat, *, transform: Transform | None = None):
        self.format = format
        is_dropout = isinstance(transform, ConditionDropout)  # which drops each branch of the format on its own
        self.transform = transform.for_vision_type(format.vision_type) if is_dropout else transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def messages(self, index: int, generator: torch.Generator) -> Messages:
        """The conversation of a visit. Its images are the same, in the same order, on every visit."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where a conversation comes from, for messages."""

    @abstractmethod
    def data_key(self) -> Any:
        """What changes when the records or their images do, as JSON."""

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} conversations, got index {index}")
        index %= len(self)
        return self.sample(index, generator_of(0, index))

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        return self.arrange(index, self.modalities(index), generator)

    def modalities(self, index: int) -> list[Any]:
        """The images as they are on every visit, in order: what `cache_latents` keeps."""
        return self._modalities(index, is_outline=False)

    def arrange(self, index: int, modalities: Sequence[Any], generator: torch.Generator) -> Sample:
        """The sample of one visit, with these images."""
        messages = self._parsed(index, generator)
        with errors_named(self.describe(index)):
            sample = self.format.arrange(messages, self._slots(messages, modalities), name=self.describe(index))
        return sample if self.transform is None else self.transform(sample, generator)

    def outline(self, index: int, generator: torch.Generator) -> Sample:
        """The sample with its images on the `meta` device, whose shapes the headers of the files say."""
        return self.arrange(index, self._modalities(index, is_outline=True), generator)

    def fingerprint(self) -> str:
        """Changes with the records, the images and how they are read."""
        readers = [self.format.images, self.format.vision_images]
        settings = [reader.settings() if isinstance(reader, ImageReader) else None for reader in readers]
        types = self.format.modality_type, self.format.vision_type
        return blake2b(repr((self.data_key(), settings, types)).encode(), digest_size=16).hexdigest()

    def _modalities(self, index: int, *, is_outline: bool) -> list[Any]:
        messages = self._parsed(index, generator_of(0, index))
        with errors_named(self.describe(index)):
            slots = self.format.load(messages, root=self.root, is_outline=is_outline)
        return [part for slot in slots for part in slot]

    def _parsed(self, index: int, generator: torch.Generator) -> list[Message]:
        messages = self.messages(index, generator)  # whose errors name the record
        with errors_named(self.describe(index)):
            return parse_learnable(messages)

    def _slots(self, messages: Sequence[Message], modalities: Sequence[Any]) -> Slots:
        """What `load` gave, flat, by the slots of the conversation."""
        rest, branches = iter(modalities), 1 if self.format.vision_type is None else 2
        parts = [part for message in messages for part in message.parts if not isinstance(part, str)]
        return [[next(rest) for _ in range(branches if isinstance(part, ImagePart) else 1)] for part in parts]


class RecordDataset(ConversationDataset):
    """Conversations out of a JSON array or JSON Lines. Paths of images are relative to `root`, by default the folder of
    the file. A subclass says what a record means.
    """

    def __init__(
        self,
        file: str | Path,
        format: ConversationFormat,
        *,
        root: str | Path | None = None,
        transform: Transform | None = None,
    ):
        super().__init__(format, transform=transform)
        self.records = Records(file)
        self.root: Path = self.records.path.parent if root is None else Path(root)

    @abstractmethod
    def messages_of(self, record: dict[str, Any]) -> Messages:
        """Raises `ValueError` for a record that is none of this kind."""

    def __len__(self) -> int:
        return len(self.records)

    def messages(self, index: int, generator: torch.Generator) -> Messages:
        record = self.records[index]
        with errors_named(self.describe(index)):
            return self.messages_of(record)

    def describe(self, index: int) -> str:
        return self.records.describe(index)

    def data_key(self) -> Any:
        """Name, size and time of change of the file, and of all images that it names."""
        stamps = [self._stamps(index) for index in range(len(self))]
        return [type(self).__name__, self.records.path.name, *stamp_of(self.records.path), stamps]

    def _stamps(self, index: int) -> list[Any]:
        """Sizes and times of change of the image files of a conversation."""
        parts = [part for message in self._parsed(index, generator_of(0, index)) for part in message.parts]
        named = [part.source for part in parts if isinstance(part, ImagePart) and isinstance(part.source, (str, Path))]
        files = [file_of(str(name), self.root) for name in named]
        return [stamp_of(file) for file in files if file is not None]


class OpenAIConversations(RecordDataset):
    """`{"messages": [{"role": "user", "content": ...}, ...]}` on each line, see `conversations.messages`."""

    def messages_of(self, record: dict[str, Any]) -> Messages:
        if "messages" not in record:
            raise ValueError(f"expected the key messages, got {', '.join(record) or 'no key'}")
        return record["messages"]


class LlavaConversations(RecordDataset):
    """`{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}`.

    `image` may be a list, or null for none. Each `<image>`, in order, is one of them.
    """

    def messages_of(self, record: dict[str, Any]) -> Messages:
        turns = record.get("conversations")
        if not isinstance(turns, list):
            raise ValueError(f"expected a list of conversations, got the keys {', '.join(record) or 'none'}")
        given = record.get("image")
        files = given if isinstance(given, list) else [] if given is None else [given]
        images = iter(files)
        expected = sum(str(turn.get("value")).count(IMAGE_PLACEHOLDER) for turn in turns if isinstance(turn, dict))
        if len(files) != expected:
            raise ValueError(
                f"{expected} {IMAGE_PLACEHOLDER} in the conversation and {len(files)} images: each image stands where "
                f"its {IMAGE_PLACEHOLDER} is"
            )
        return [self._message(turn, i, images) for i, turn in enumerate(turns)]

    def _message(self, turn: Any, index: int, images: Any) -> dict[str, Any]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f'message {index}: expected {{"from": ..., "value": <text>}}, got {turn!r:.80}')
        if turn.get("from") not in LLAVA_ROLES:
            raise ValueError(f"message {index}: from is one of {', '.join(LLAVA_ROLES)}, got {turn.get('from')!r}")
        first, *rest = turn["value"].split(IMAGE_PLACEHOLDER)
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image", "image": next(images)}, {"type": "text", "text": text}]
        return {"role": LLAVA_ROLES[turn["from"]], "content": [part for part in parts if part.get("text") != ""]}


class EditTriples(RecordDataset):
    """`{"source": "before.png", "instruction": "make it grey", "target": "after.png"}`: the source is read, clean, and
    the target is drawn.
    """

    def messages_of(self, record: dict[str, Any]) -> Messages:
        if lost := [name for name in ("source", "instruction", "target") if not isinstance(record.get(name), str)]:
            raise ValueError(f"expected source, instruction and target as texts; there is no {', '.join(lost)}")
        source, target = ({"type": "image", "image": record[name]} for name in ("source", "target"))
        asked = [source, {"type": "text", "text": record["instruction"]}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": [target]}]


class CaptionConversations(ConversationDataset):
    """Images with captions (`CaptionedImages`, `WebDatasetTars`, `HuggingFaceImages`) as conversations in both
    directions: to describe an image, or to draw what a caption says.

    - `prob_describe`: how often an image is described: 0 is only to draw, 1 only to describe
    - `describe`, `draw`: instructions, one of which is taken on each visit; those to draw have `{caption}` in them

    Files are read by the format's `images`, not by those of the pairs. Images without caption are left out.
    """

    def __init__(
        self,
        pairs: ImageCaptionPairs,
        format: ConversationFormat,
        *,
        prob_describe: float = 0.5,
        describe: Sequence[str] = ("Describe the image.",),
        draw: Sequence[str] = ("Draw {caption}",),
        transform: Transform | None = None,
    ):
        super().__init__(format, transform=transform)
        if not 0 <= prob_describe <= 1:
            raise ValueError(f"prob_describe is a probability, got {prob_describe}")
        if bad := [instruction for instruction in draw if "{caption}" not in instruction]:
            raise ValueError(f"an instruction to draw has {{caption}} in it, got {bad[0]!r}")
        if not describe or not draw:
            raise ValueError("describe and draw have at least one instruction each")
        self.pairs, self.prob_describe = pairs, prob_describe
        self.instructions = {"describe": tuple(describe), "draw": tuple(draw)}

    def __len__(self) -> int:
        return len(self.pairs)

    def messages(self, index: int, generator: torch.Generator) -> Messages:
        captions = self.pairs.captions(index)
        if not captions:
            raise SkipSample(f"{self.describe(index)}: no caption")
        order, *numbers = torch.rand(3, generator=generator).tolist()
        image = {"type": "image", "image": partial(self.pairs.read_image, index)}  # cached latents need no file
        caption = captions[int(numbers[0] * len(captions))]
        given = self.instructions["describe" if order < self.prob_describe else "draw"]
        instruction = given[int(numbers[1] * len(given))]
        if order < self.prob_describe:
            asked: Any = [image, {"type": "text", "text": instruction}]
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": caption}]
        asked = instruction.replace("{caption}", caption)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": [image]}]

    def describe(self, index: int) -> str:
        return self.pairs.describe(index)

    def data_key(self) -> Any:
        return self.pairs.fingerprint()
