"""Which characters of a rendered conversation are learned, and where its images stand.

A template is a program, so nothing is assumed of its text: renderings are compared.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.conversations.messages import ASSISTANT, Message
from transfusion_pytorch.conversations.templates import Rendering
from transfusion_pytorch.conversations.tokenizer import ChatTokenizer

# noncharacters, see `templates`
SLOT_START, SLOT_END = "\ufdd2", "\ufdd3"  # around the number of an image
SENTINEL = "\ufdd4\ufdd5"  # content that begins and ends with what no other content has
SLOT = re.compile(f"{SLOT_START}(\\d+){SLOT_END}")


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive)."""

    start: int
    end: int


class Turns(NamedTuple):
    """A rendered conversation: `text` has `SLOT_START number SLOT_END` where an image stands; `learned` spans of it."""

    text: str
    learned: list[Span]


class Piece(NamedTuple):
    """A stretch of a conversation: text as `ids`, or the image (or other modality) of number `slot`."""

    is_learned: bool
    ids: Int[Tensor, " n"] | None = None
    slot: int = -1


@dataclass(frozen=True)
class TurnRenderer:
    """Renders parsed messages by the template of a tokenizer; `variables` are further ones of the template."""

    tokenizer: ChatTokenizer
    variables: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, messages: Sequence[Message]) -> Turns:
        """A conversation up to where the assistant begins to write. Its earlier answers are those of `learned_turns`,
        so that it is tokenised as it was learned.
        """
        text = self._checked(messages, self._render(contents(messages), True)).text
        if not any(message.is_learned for message in messages):
            return Turns(text, [])
        earlier = self._turns(messages)
        return Turns(text, earlier.learned if text.startswith(earlier.text) else [])

    def learned_turns(self, messages: Sequence[Message]) -> Turns:
        """What the assistant wrote in those of its messages that are learned, each with the token that ends it, behind
        the prompt that it is asked for with. Where an answer stands is what the template has in `{% generation %}`
        blocks, or what renderings tell that differ in one message.

        A template may ask for an answer with more than it writes before one of the past (`<think>`). The last answer is
        then learned behind that prompt, and what follows it is left out; an earlier one, which must stand there as the
        past does, is only read, with a warning.

        Raises `ValueError` where the template shows an image twice or not at all.
        """
        turns = self._turns(messages)
        if len(turns.learned) < sum(message.is_learned for message in messages):
            warnings.warn(
                "the chat template asks for an answer in another way than it writes those of the past, so of several "
                "answers in a conversation the last is learned and earlier ones are only read. To learn these too, "
                "make a conversation of each that ends there, and give the assistant's other messages the weight 0",
                stacklevel=2,
            )
        return turns

    def _turns(self, messages: Sequence[Message]) -> Turns:
        written = contents(messages)
        rendering = self._checked(messages, self._render(written, False))
        shown = self._shown(written, rendering)
        learned = [i for i in shown if messages[i].is_learned]
        prompts = {i: self._prompt_before(written, i, rendering.text[: shown[i].start]) for i in learned}
        text, last = rendering.text, learned[-1]
        if not text.startswith(prompts[last]):
            text = prompts[last] + self._answer(written[last]["content"], text, shown[last], prompts[last])
            shown[last] = Span(len(prompts[last]), len(text))
        spans = [
            Span(len(prompts[i]), shown[i].end)
            for i in learned
            if text.startswith(prompts[i]) and (i == last or text.startswith(rendering.text[: shown[i].end]))
        ]
        return Turns(text, spans)

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes behind a message of the assistant, up to its first special token: `<|im_end|>`.
        Without one, all that it writes there; the end-of-sequence token where the template does not tell.
        """
        question, answer = {"role": "user", "content": "?"}, {"role": ASSISTANT, "content": SENTINEL}
        try:
            _, shown, rest = self._render([question, answer], False).text.rpartition(SENTINEL)
        except ValueError:  # it need not take this conversation
            shown = rest = ""
        if not shown or not rest:
            return self.tokenizer.special_tokens.get("eos_token", "")
        places = [(rest.find(token), token) for token in self.tokenizer.special_texts if token and token in rest]
        if not places:
            return rest
        place, token = min(places, key=lambda found: (found[0], -len(found[1])))
        return rest[: place + len(token)]

    @cached_property
    def end_token(self) -> str | None:
        """The special token that ends a message of the assistant, None where that is ended by ordinary text."""
        ends = [token for token in self.tokenizer.special_texts if token and self.end_of_turn.endswith(token)]
        return max(ends, key=len, default=None)

    def _checked(self, messages: Sequence[Message], rendering: Rendering) -> Rendering:
        expected = [str(slot) for slot in range(count_slots(messages))]
        if sorted(found := SLOT.findall(rendering.text), key=int) != expected:
            raise ValueError(
                f"the conversation has {len(expected)} images, and the chat template shows {len(found)} of them: it "
                "leaves messages out or repeats them"
            )
        return rendering

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template wants content as a list of parts, as those of many vision models do: it is shown a text
        first. Raises `ValueError` for one that shows neither.
        """
        shaped: list[Any] = [SENTINEL, [{"type": "text", "text": SENTINEL}]]
        refusals = []
        for content in shaped:
            try:
                rendered = self.tokenizer.render([{"role": "user", "content": content}], **self.variables)
            except ValueError as error:
                refusals.append(str(error))
                continue
            if SENTINEL in rendered.text:
                return not isinstance(content, str)
        reason = f": {refusals[0]}" if refusals else ""
        raise ValueError(f"the chat template does not show the content of a message of the user{reason}")

    def _shaped(self, content: str) -> Any:
        return [{"type": "text", "text": content}] if self._takes_parts else content

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Rendering:
        shaped = [{**message, "content": self._shaped(message["content"])} for message in messages] if messages else []
        return self.tokenizer.render(shaped, add_generation_prompt=add_generation_prompt, **self.variables)

    def _shown(self, written: Sequence[Mapping[str, Any]], rendering: Rendering) -> dict[int, Span]:
        """Where each message of the assistant stands in a rendering, to the token that ends it."""
        answers = [i for i, message in enumerate(written) if message["role"] == ASSISTANT]
        blocks = rendering.generated
        if blocks and len(blocks) != len(answers):
            raise ValueError(
                f"the chat template has {len(blocks)} generation blocks for {len(answers)} messages of the assistant"
            )
        spans = [Span(*block) for block in blocks] or [self._span(written, rendering.text, i) for i in answers]
        return dict(zip(answers, spans, strict=True))

    def _span(self, written: Sequence[Mapping[str, Any]], text: str, index: int) -> Span:
        other = self._render([*written[:index], {**written[index], "content": SENTINEL}, *written[index + 1 :]], False)
        start, end = difference(text, other.text)
        return Span(start, end + len(self.end_of_turn) * text.startswith(self.end_of_turn, end))

    def _prompt_before(self, written: Sequence[Mapping[str, Any]], index: int, otherwise: str) -> str:
        """What the model reads when it is to write message `index`. The template may write more before the content (a
        space, an empty chain of thought), which the model then has to write itself.
        """
        try:
            return self._render(written[:index], True).text
        except ValueError:  # a template need not take a conversation that ends there, or an empty one
            return otherwise

    def _answer(self, content: str, text: str, shown: Span, prompt: str) -> str:
        """A message behind a prompt that does not precede it in `text`: what the template shows of it, and the thoughts
        before that where it leaves those of the past out. What the prompt ends with already is not repeated.
        """
        visible = text[slice(*shown)]
        place = content.rfind(visible.removesuffix(self.end_of_turn).strip())
        thoughts = content[: max(place, 0)]
        if not thoughts.strip():
            return visible
        begun = next((k for k in range(len(thoughts), 0, -1) if prompt.endswith(thoughts[:k])), 0)
        return thoughts[begun:] + visible.lstrip()


def contents(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with texts for content, in which images are numbered slots."""
    found, slot = [], 0
    for message in messages:
        texts = []
        for part in message.parts:
            texts.append(part if isinstance(part, str) else f"{SLOT_START}{slot}{SLOT_END}")
            slot += not isinstance(part, str)
        found.append({"role": message.role, "content": "".join(texts)})
    return found


def count_slots(messages: Sequence[Message]) -> int:
    return sum(not isinstance(part, str) for message in messages for part in message.parts)


def difference(text: str, other: str) -> Span:
    """The stretch of `text` in which it differs from another: `a[bc]d` against `a[x]d` is (1, 3)."""
    limit = min(len(text), len(other))
    start = next((i for i in range(limit) if text[i] != other[i]), limit)
    rest = limit - start
    same = next((i for i in range(rest) if text[-1 - i] != other[-1 - i]), rest)
    return Span(start, len(text) - same)


def pieces_of(turns: Turns, encode: Callable[[str], Int[Tensor, " n"]]) -> list[Piece]:
    """A rendered conversation as text and slots, in order; text between two slots is tokenised as one where that agrees
    with where learning begins and ends.
    """
    pieces: list[Piece] = []
    start = 0
    for slot in [*SLOT.finditer(turns.text), None]:
        end = slot.start() if slot is not None else len(turns.text)
        pieces += _text_pieces(turns, Span(start, end), encode)
        if slot is not None:
            is_learned = any(span.start <= slot.start() < span.end for span in turns.learned)
            pieces.append(Piece(is_learned, slot=int(slot[1])))
            start = slot.end()
    return pieces


def _text_pieces(turns: Turns, part: Span, encode: Callable[[str], Int[Tensor, " n"]]) -> list[Piece]:
    """The pieces of a text without slots: `part` of the conversation."""
    if part.start == part.end:
        return []
    cuts = sorted({cut - part.start for span in turns.learned for cut in span if part.start < cut < part.end})
    starts = [part.start + cut for cut in (0, *cuts)]
    found = encode_pieces(encode, turns.text[part.start : part.end], cuts)
    learned = [any(span.start <= start < span.end for span in turns.learned) for start in starts]
    return [Piece(own, ids) for own, ids in zip(learned, found, strict=True) if len(ids)]


def encode_pieces(
    encode: Callable[[str], Int[Tensor, " n"]], text: str, cuts: Sequence[int]
) -> list[Int[Tensor, " n"]]:
    """The ids of a text between the `cuts`.

    They are those of the whole text wherever its beginning up to a cut has the same ids by itself: that is what the
    model reads when it is to go on there. Elsewhere the text is tokenised in two. Tokenising all pieces by themselves
    would be wrong for the tokenizers of Llama 2 and Vicuna, which place a space before each text.
    """
    whole, ends = encode(text), [0]
    for i, cut in enumerate(cuts):
        head = encode(text[:cut])
        if not whole[: len(head)].equal(head):
            rest = [later - cut for later in cuts[i + 1 :]]
            return encode_pieces(encode, text[:cut], cuts[:i]) + encode_pieces(encode, text[cut:], rest)
        ends.append(len(head))
    ends.append(len(whole))
    return [whole[start:end] for start, end in pairwise(ends)]
