"""Conversations about Fashion-MNIST in sentences: a set to train understanding and drawing on, without a download.

h height, w width. Pixels are in [-1, 1].
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from transfusion_pytorch.conversations import ConversationDataset, ConversationFormat
from transfusion_pytorch.conversations.pictures import as_picture
from transfusion_pytorch.data.order import generator_of
from transfusion_pytorch.data.pairs import ImageCaptionPairs
from transfusion_pytorch.sequence.samples import Condition, Sample

from .captions import class_words, png_of
from .data import FASHION_CLASSES, ImageData, LabelledImages, load_images

# What stands for what in the templates: {kind} garment, {a} an ankle boot, {shaded} a dark ankle boot, {shade} dark,
# {subject} what a yes-or-no question is about
CAPTIONS = ("a photo of {shaded}", "{shaded}", "a picture of {shaded} on black", "a photo of {a}")
NAME_QUESTIONS = ("Which {kind} is this?", "What is in the picture?", "Name the {kind}.", "What do you see?")
NAME_ANSWERS = ("It is {a}.", "This is {a}.", "The picture shows {a}.", "I see {a}.")
YES_NO_QUESTIONS = ("Is it {subject}?", "Is this {subject}?", "Does the picture show {subject}?")
SHADE_QUESTIONS = ("Is it dark, grey or light?", "How bright is it?")
SHADE_ANSWERS = ("It is {shade}.",)
DESCRIBE_QUESTIONS = ("Describe the picture.", "Write a caption.")
DRAW_REQUESTS = ("Draw {shaded}.", "Please draw {shaded}.", "Show me {a}.", "I would like a photo of {shaded}.")

TASKS = ("name", "yes_no", "shade", "describe")  # of an image that is read; "draw" is for one that is drawn
SHADES = ("dark", "grey", "light")
SHADE_BOUNDS = (0.5, 0.7)  # of the mean brightness of what is not background, from 0 to 1
BACKGROUND = 0.1


@dataclass(frozen=True)
class Wording:
    """The words for the classes of a data set.

    - `kind`: what all of them are; `names`: each of them
    - `group`: a word for the classes `members`, to ask about: `"a shoe"`
    - `has_shades`: whether it says how bright a thing is
    """

    kind: str
    names: tuple[str, ...]
    group: str
    members: frozenset[int]
    has_shades: bool

    def article(self, label: int, shade: str = "") -> str:
        """`an ankle boot`, `a dark ankle boot`; `the digit seven`."""
        if not self.has_shades:
            return f"the {self.kind} {self.names[label]}"
        words = f"{shade} {self.names[label]}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


FASHION = Wording("garment", FASHION_CLASSES, "a shoe", frozenset((5, 7, 9)), has_shades=True)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = Wording("digit", NUMBERS, "an even number", frozenset((0, 2, 4, 6, 8)), has_shades=False)


class GarmentData(NamedTuple):
    """Images, their classes, and the words for them."""

    data: ImageData
    wording: Wording


def load_garments(folder: str | Path | None = None) -> GarmentData:
    """Fashion-MNIST; where it is not installed, the digits of scikit-learn, with a warning that says so. `data.source`
    says which it is. Errors are those of `load_images`.
    """
    data = load_images("fashion", folder)
    return GarmentData(data, FASHION if class_words(data) == FASHION.names else DIGITS)


def shade_of(image: Float[Tensor, "1 h w"]) -> str:
    """`dark`, `grey` or `light`: by the mean brightness of the pixels that are not black."""
    levels = (image + 1) / 2
    shown = levels[levels > BACKGROUND]
    brightness = float(shown.mean()) if len(shown) else 0.0
    return SHADES[sum(brightness >= bound for bound in SHADE_BOUNDS)]


class Question(NamedTuple):
    """What is asked about an image, and what is true of it."""

    asked: str
    answer: str


class GarmentConversations(ConversationDataset):
    """Conversations about labelled images, as the fixed templates above have them.

    - `tasks`: `"name"`, `"yes_no"` (as often yes as no), `"shade"` (where the words have shades) and `"describe"` of an
      image that is read, and `"draw"`; one of them begins each conversation
    - `questions`: how many are asked of an image that is read, each of another task
    - `format`: images go through its `ImageReader`; without one they are tensors `(h, w, 1)`

    Which are asked depends on the generator of a visit; `dataset[i]` on `i` alone.
    """

    def __init__(
        self,
        labelled: LabelledImages,
        format: ConversationFormat,
        *,
        wording: Wording = FASHION,
        tasks: Sequence[str] = (*TASKS, "draw"),
        questions: int = 1,
        **options: Any,
    ):
        super().__init__(format, **options)
        known = [task for task in (*TASKS, "draw") if wording.has_shades or task != "shade"]
        if unknown := [task for task in tasks if task not in (*TASKS, "draw")]:
            raise ValueError(f"tasks are {', '.join(known)}, got {unknown[0]!r}")
        self.labelled, self.wording = labelled, wording
        self.tasks = [task for task in tasks if task in known]
        if not self.tasks or questions < 1:
            raise ValueError(f"expected at least one of {', '.join(known)}, and one question, got {questions}")
        self.questions = questions
        self.labels: list[int] = labelled.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def messages(self, index: int, generator: Generator) -> list[dict[str, Any]]:
        order = torch.randperm(len(self.tasks), generator=generator).tolist()
        tasks = [self.tasks[place] for place in order]
        image = {"type": "image", "image": partial(self._image, index)}
        words = self.words(index)
        if tasks[0] == "draw":
            asked = choose(DRAW_REQUESTS, generator).format(**words)
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": [image]}]
        messages: list[dict[str, Any]] = []
        for task in [task for task in tasks if task != "draw"][: self.questions]:
            question = self._question(task, index, words, generator)
            text = {"type": "text", "text": question.asked}
            messages.append({"role": "user", "content": [text] if messages else [image, text]})
            messages.append({"role": "assistant", "content": question.answer})
        return messages

    def words(self, index: int) -> dict[str, str]:
        """What is true of an image, for templates."""
        label = self.labels[index]
        shade = shade_of(self.labelled.images[index]) if self.wording.has_shades else ""
        return {
            "kind": self.wording.kind,
            "a": self.wording.article(label),
            "shaded": self.wording.article(label, shade),
            "shade": shade,
        }

    def captions(self, index: int) -> list[str]:
        """A caption by each template."""
        return list(dict.fromkeys(template.format(**self.words(index)) for template in CAPTIONS))

    def describe(self, index: int) -> str:
        return f"image {index}"

    def data_key(self) -> Any:
        pixels = self.labelled.images.contiguous().numpy().tobytes()
        return ["garments", self.wording.kind, self.labels, blake2b(pixels, digest_size=16).hexdigest()]

    def _question(self, task: str, index: int, words: dict[str, str], generator: Generator) -> Question:
        if task == "yes_no":
            return self._yes_or_no(index, words, generator)
        questions, answers = {
            "name": (NAME_QUESTIONS, NAME_ANSWERS),
            "shade": (SHADE_QUESTIONS, SHADE_ANSWERS),
            "describe": (DESCRIBE_QUESTIONS, CAPTIONS),
        }[task]
        return Question(choose(questions, generator).format(**words), choose(answers, generator).format(**words))

    def _yes_or_no(self, index: int, words: dict[str, str], generator: Generator) -> Question:
        """As often yes as no: the answer is chosen first, and then what to ask. One question in four is about the group
        where that fits the answer.
        """
        label, wording = self.labels[index], self.wording
        is_yes, asks_group = (torch.rand(2, generator=generator) < torch.tensor([0.5, 0.25])).tolist()
        others = [other for other in range(len(wording.names)) if other != label]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        subject = wording.article(label if is_yes else other)
        if asks_group and (label in wording.members) == is_yes:
            subject = wording.group
        asked = choose(YES_NO_QUESTIONS, generator).format(subject=subject)
        return Question(asked, f"{'Yes' if is_yes else 'No'}, it is {words['a']}.")

    def _image(self, index: int) -> Any:
        image = self.labelled.images[index]
        return image.movedim(0, -1) if self.format.images is None else as_picture(image, channels_first=True)


class GarmentCaptions(ImageCaptionPairs):
    """The images behind captions, to be drawn: 18 tokens where a conversation around the same image has 55. Captions
    are read and not learned.

    `conversations` have the images and the words for them, and say how both are read.
    """

    def __init__(self, conversations: GarmentConversations):
        form = conversations.format
        if form.images is None:
            raise ValueError("captions go with image files, and the format of these conversations does not read any")
        super().__init__(images=form.images, text=form.tokenizer, modality_type=form.modality_type)
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def read_image(self, index: int) -> bytes:
        return png_of(self.conversations.labelled.images[index])

    def captions(self, index: int) -> Sequence[str]:
        return self.conversations.captions(index)

    def arrange(self, index: int, modalities: list[Any], generator: Generator) -> Sample:
        sample = super().arrange(index, modalities, generator)
        caption, *images = sample.parts
        return replace(sample, parts=[Condition(caption), *images])

    def describe(self, index: int) -> str:
        return self.conversations.describe(index)

    def data_key(self) -> Any:
        return self.conversations.data_key()


def choose(templates: Sequence[str], generator: Generator) -> str:
    return templates[int(torch.randint(len(templates), (), generator=generator))]


# judging answers


def named_class(answer: str, names: Sequence[str] = FASHION.names) -> int | None:
    """The class that an answer names, in singular or plural; None for none or several. "t-shirt" is no "shirt"."""
    lowered = answer.lower()
    found = [i for i, name in enumerate(names) if re.search(rf"(?<![\w-]){re.escape(name)}(?:e?s)?(?![\w-])", lowered)]
    return found[0] if len(found) == 1 else None


def said_yes(answer: str) -> bool | None:
    """Whether an answer begins with yes or no; None for neither."""
    found = re.match(r"\W*(yes|no)\b", answer.lower())
    return None if found is None else found[1] == "yes"


def named_shade(answer: str) -> str | None:
    """The shade that an answer names; None for none or several."""
    found = [shade for shade in SHADES if re.search(rf"\b{shade}\b", answer.lower())]
    return found[0] if len(found) == 1 else None


def is_right(answer: str, task: str, index: int, data: GarmentConversations, *, truth: str) -> bool:
    """Whether an answer about image `index` says what the true one says, in whatever words."""
    if task == "yes_no":
        return said_yes(answer) == said_yes(truth)
    if task == "shade":
        return named_shade(answer) == named_shade(truth)
    return named_class(answer, data.wording.names) == data.labels[index]


def score_answers(
    model: Any, data: GarmentConversations, *, count: int = 500, seed: int = 0, **options: Any
) -> dict[str, float]:
    """The share of right answers to one question of each task about the first `count` images. `options` are those of
    `model.chat_many`; text is greedy by default.
    """
    scores = {}
    for task in [task for task in data.tasks if task != "draw"]:
        single = GarmentConversations(data.labelled, data.format, wording=data.wording, tasks=[task])
        indices = range(min(count, len(data)))
        asked = [single.messages(index, generator_of(seed, task, index)) for index in indices]
        given = dict(format=data.format, text_temperature=0.0, allowed_modalities=(), max_new_tokens=32) | options
        answers = model.chat_many([messages[:1] for messages in asked], **given)
        right = [
            is_right(text_of(answer), task, index, single, truth=text_of(messages[1]))
            for index, answer, messages in zip(indices, answers, asked, strict=True)
        ]
        scores[task] = sum(right) / len(right)
    return scores


def text_of(message: dict[str, Any]) -> str:
    """The text of a message: of an answer of `model.chat`."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
