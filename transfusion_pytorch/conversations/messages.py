"""Messages as OpenAI's chat interface has them, checked and parsed.

```python
{"role": "user", "content": [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},  # or the path of a file
    {"type": "image", "image": picture},                                       # Pillow, bytes, path or tensor
    {"type": "modality", "modality_type": 1, "data": tensor},                  # any other modality
]}
```
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transfusion_pytorch.conversations.templates import has_marks
from transfusion_pytorch.data.loading import SkipSample
from transfusion_pytorch.sequence.samples import Latents, is_int

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
PART_TYPES = ("text", "image_url", "image", "modality")
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ImagePart:
    """An image that has yet to be read. `source` is a path, a data URL, bytes, a Pillow image, or a tensor."""

    source: Any


@dataclass(frozen=True)
class ModalityPart:
    """An instance of any modality: raw data that its encoder takes, or `Latents`."""

    type: int
    data: Tensor | Latents


Part = str | ImagePart | ModalityPart


@dataclass(frozen=True)
class Message:
    """One turn. `is_learned`: it is the assistant's, and its `weight` is not 0."""

    role: str
    parts: tuple[Part, ...]
    is_learned: bool

    @property
    def is_empty(self) -> bool:
        return all(isinstance(part, str) and not part.strip() for part in self.parts)


def parse_messages(messages: Any) -> list[Message]:
    """Reads a conversation. Raises `ValueError` or `TypeError` that names the message and the part at fault."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"a conversation is a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("the conversation is empty, expected at least one message")
    return [_parse_message(message, f"message {i}") for i, message in enumerate(messages)]


def parse_learnable(messages: Any) -> list[Message]:
    """Reads a conversation of which something is to be learned. Raises `ValueError` where that is nothing."""
    parsed = parse_messages(messages)
    for i, message in enumerate(parsed):
        if message.is_learned and message.is_empty:
            raise ValueError(f"message {i} of the assistant is empty: there is nothing to learn; leave it out")
    if not any(message.is_learned for message in parsed):
        roles = ", ".join(message.role for message in parsed)
        raise ValueError(f"no message of the assistant is to be learned: the roles are {roles}")
    return parsed


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise TypeError(f'{where}: expected {{"role": ..., "content": ...}}, got {type(message).__name__}')
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise ValueError(f"{where}: tool calls cannot be learned or read; write them into the text of the message")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{where}: the weight of a message is 0 (not learned) or 1, got {weight!r}")
    parsed = Message(role, _parse_content(message.get("content"), where), role == ASSISTANT and weight == 1)
    if parsed.is_empty and role != ASSISTANT:
        raise ValueError(f"{where} of the {role} is empty, expected text or an image")
    return parsed


def _parse_content(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (_checked_text(content, where),)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise TypeError(f"{where}: content is a text or a list of parts, got {type(content).__name__}")
    return tuple(_parse_part(part, f"{where}, part {i}") for i, part in enumerate(content))


def _parse_part(part: Any, where: str) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        got = f"the type {kind!r}" if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"{where}: expected a part of type {', '.join(PART_TYPES)}, got {got}")
    if kind == "text":
        return _checked_text(part.get("text"), where)
    if kind == "modality":
        return _parse_modality(part, where)
    source = part.get(kind)
    if kind == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
    if source is None or (isinstance(source, str) and not source.strip()):
        raise ValueError(f'{where}: there is no image: expected {{"type": "{kind}", "{kind}": ...}}')
    return ImagePart(source)


def _parse_modality(part: Mapping[str, Any], where: str) -> ModalityPart:
    kind, data = part.get("modality_type"), part.get("data")
    if not is_int(kind) or not isinstance(data, (Tensor, Latents)):
        raise TypeError(
            f"{where}: a modality has an int as its modality_type and a tensor or Latents as its data, got "
            f"{type(kind).__name__} and {type(data).__name__}"
        )
    return ModalityPart(int(kind), data)  # type: ignore[arg-type]


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{where}: text is a string, got {type(text).__name__}")
    if has_marks(text):
        raise ValueError(f"{where}: the text has a character from U+FDD0 to U+FDEF, which Unicode keeps out of text")
    return text


@contextmanager
def errors_named(where: str) -> Iterator[None]:
    """Puts `where` in front of the message of what goes wrong: a record, or a part of one."""
    try:
        yield
    except SkipSample as reason:
        raise SkipSample(f"{where}: {reason}") from reason
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except OSError as error:  # a file that cannot be read
        raise OSError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
