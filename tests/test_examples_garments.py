"""Conversations about garments: true, balanced, and the same for the same number."""

import re
from collections import Counter

import pytest
import torch
from chats import chat_tokenizer, model_of, shown

from transfusion_pytorch import Condition, ImageReader
from transfusion_pytorch.conversations import ConversationFormat
from transfusion_pytorch.examples.data import FASHION_CLASSES, LabelledImages, load_images
from transfusion_pytorch.examples.garments import (
    DIGITS,
    FASHION,
    SHADES,
    TASKS,
    GarmentCaptions,
    GarmentConversations,
    load_garments,
    named_class,
    named_shade,
    said_yes,
    score_answers,
    shade_of,
    text_of,
)

COUNT = 300


def garments(count: int = COUNT) -> LabelledImages:
    """A square in the middle, of any brightness."""
    images = torch.full((count, 1, 8, 8), -1.0)
    images[:, :, 2:6, 2:6] = torch.linspace(-0.7, 1, count)[:, None, None, None]
    return LabelledImages(images, torch.arange(count) % len(FASHION_CLASSES))


def conversations(wording=FASHION, **options) -> GarmentConversations:
    return GarmentConversations(garments(), ConversationFormat(chat_tokenizer()), wording=wording, **options)


def asked_and_answered(data: GarmentConversations, seed: int = 0) -> list[tuple[int, str, str]]:
    """The index, the first question and the first answer of every conversation."""
    found = []
    for index in range(len(data)):
        asked, answer, *_ = data.messages(index, torch.Generator().manual_seed(seed * COUNT + index))
        found.append((index, text_of(asked), text_of(answer)))
    return found


@pytest.mark.parametrize("wording", [FASHION, DIGITS])
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_true(wording, task):
    if task == "shade" and not wording.has_shades:
        with pytest.raises(ValueError, match="expected at least one of name, yes_no, describe, draw"):
            conversations(wording, tasks=[task])
        return
    data = conversations(wording, tasks=[task])
    for index, question, answer in asked_and_answered(data):
        if task == "shade":
            assert named_shade(answer) == data.words(index)["shade"]
        else:
            assert named_class(answer, wording.names) == data.labels[index]
        if named_shade(answer):
            assert named_shade(answer) == shade_of(data.labelled.images[index])
        if task == "yes_no":
            assert said_yes(answer) == is_true(question, data.labels[index], wording)


def is_true(question: str, label: int, wording) -> bool:
    if wording.group in question:
        return label in wording.members
    return named_class(question, wording.names) == label


def test_yes_and_no_are_balanced():
    data = conversations(tasks=["yes_no"])
    answers = [said_yes(answer) for seed in range(10) for _, _, answer in asked_and_answered(data, seed)]
    assert abs(sum(answers) / len(answers) - 0.5) < 0.04  # three deviations are 0.027
    groups = [
        said_yes(answer)
        for seed in range(10)
        for _, question, answer in asked_and_answered(data, seed)
        if FASHION.group in question
    ]
    assert 200 < len(groups) < 600
    assert {True, False} == set(groups)


def test_requests_to_draw_say_what_is_drawn():
    data = conversations(tasks=["draw"])
    for index, question, _ in asked_and_answered(data):
        assert named_class(question) == data.labels[index]
        assert named_shade(question) in (None, data.words(index)["shade"])
    parts = data[3].parts
    drawn = [part for part in parts if isinstance(part, tuple)]
    assert [(kind, image.shape) for kind, image in drawn] == [(0, (8, 8, 1))]
    assert drawn[0][1].movedim(-1, 0).equal(data.labelled.images[3])


def test_several_questions_about_one_image():
    data = conversations(questions=3)
    found = Counter()
    for index in range(100):
        messages = data.messages(index, torch.Generator().manual_seed(index))
        found[len(messages)] += 1
        images = [
            part for each in messages for part in each["content"] if isinstance(part, dict) and part["type"] == "image"
        ]
        assert len(images) == 1
        assert len({text_of(message) for message in messages[::2]}) == len(messages) // 2
    assert found.keys() == {2, 6}
    assert 5 < found[2] < 40  # one in five is drawn


def test_all_tasks_occur_as_often():
    data = conversations()
    kinds = Counter()
    for seed in range(4):
        for index in range(COUNT):
            asked, answer = data.messages(index, torch.Generator().manual_seed(seed * COUNT + index))
            is_drawn = isinstance(asked["content"], str)
            kinds["draw" if is_drawn else "shade" if named_class(text_of(answer)) is None else "other"] += 1
    assert abs(kinds["draw"] - 240) < 45
    assert abs(kinds["shade"] - 240) < 45


def test_samples_depend_on_the_index_alone():
    data = conversations()
    tokenizer = data.format.tokenizer
    seen = [shown(data[index].parts, tokenizer) for index in range(30)]
    assert seen == [shown(conversations()[index].parts, tokenizer) for index in range(30)]
    assert len({str(parts) for parts in seen}) > 20
    assert data.fingerprint() == conversations().fingerprint()


def test_images_go_through_a_reader():
    read = GarmentConversations(garments(20), ConversationFormat(chat_tokenizer(), ImageReader(4)), tasks=["name"])
    image = next(part.part for part in read[19].parts if isinstance(part, Condition) and isinstance(part.part, tuple))
    assert image[1].shape == (4, 4, 3)
    plain = GarmentConversations(
        garments(20), ConversationFormat(chat_tokenizer(), ImageReader(8, mode="L")), tasks=["name"]
    )
    image = next(part.part for part in plain[19].parts if isinstance(part, Condition) and isinstance(part.part, tuple))
    assert torch.allclose(image[1].movedim(-1, 0), garments(20).images[19], atol=1 / 255 + 1e-6)


def test_a_model_learns_from_them():
    data = conversations()
    model = model_of(data.format.tokenizer, dim_latent=1, modality_default_shape=(8, 8))
    loss = model([data[index] for index in range(8)])
    assert loss.isfinite()


def test_captions():
    data = conversations()
    for index in (0, 150, 299):
        for caption in data.captions(index):
            assert named_class(caption) == data.labels[index]
            assert named_shade(caption) in (None, data.words(index)["shade"])
    assert data.captions(299)[0] == "a photo of a light ankle boot"
    assert conversations(DIGITS).captions(7) == [
        "a photo of the digit seven",
        "the digit seven",
        "a picture of the digit seven on black",
    ]


def test_images_behind_captions_alone():
    """The caption is read and not learned; the image is that of the conversations, and drawn."""
    form = ConversationFormat(chat_tokenizer(), ImageReader(8, mode="L"))
    data = GarmentConversations(garments(20), form, tasks=["draw"])
    captions = GarmentCaptions(data)
    assert len(captions) == len(data)
    written = set()
    for seed in range(20):
        caption, image = captions.sample(19, torch.Generator().manual_seed(seed)).parts
        assert isinstance(caption, Condition)
        written.add(form.tokenizer.decode(caption.part))
        assert torch.allclose(image[1].movedim(-1, 0), garments(20).images[19], atol=1 / 255 + 1e-6)
    assert written == set(data.captions(19))
    with pytest.raises(ValueError, match="the format of these conversations does not read any"):
        GarmentCaptions(conversations())


def test_shades_are_of_what_is_shown():
    image = torch.full((1, 8, 8), -1.0)
    assert shade_of(image) == "dark"
    for level, shade in ((0.3, "dark"), (0.6, "grey"), (0.9, "light")):
        image[0, 2, 2] = 2 * level - 1
        assert shade_of(image) == shade


def test_unknown_tasks():
    with pytest.raises(ValueError, match="tasks are name, yes_no, shade, describe, draw, got 'sing'"):
        conversations(tasks=["sing"])
    with pytest.raises(ValueError, match="and one question, got 0"):
        conversations(questions=0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is a SNEAKER.", "sneaker"),
        ("Two sneakers", "sneaker"),
        ("a T-shirt", "t-shirt"),
        ("a shirt", "shirt"),
        ("ankle boots", "ankle boot"),
        ("dresses", "dress"),
        ("trousers", "trouser"),
        ("a shirt or a coat", None),
        ("a boot", None),
        ("shirty", None),
        ("", None),
    ],
)
def test_which_garment_an_answer_names(answer, expected):
    found = named_class(answer)
    assert (None if found is None else FASHION.names[found]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("Yes, it is.", True), (" no", False), ("Nobody", None), ("It is", None)]
)
def test_yes_or_no(answer, expected):
    assert said_yes(answer) is expected


def test_shades_of_answers():
    assert [named_shade(text) for text in ("It is dark.", "Grey!", "light or dark", "darker", "lightly")] == [
        "dark",
        "grey",
        None,
        None,
        None,
    ]
    assert named_class("the digit seven", DIGITS.names) == 7


class Oracle:
    """Answers truly, all questions but those of one kind."""

    def __init__(self, data: GarmentConversations, fails: str):
        self.data, self.fails = data, fails

    def chat_many(self, conversations, *, format, text_temperature, **options):
        assert format is self.data.format
        assert text_temperature == 0.0
        return [
            {"role": "assistant", "content": [{"type": "text", "text": self.answer(*each)}]} for each in conversations
        ]

    def answer(self, asked: dict) -> str:
        image = asked["content"][0]["image"]()
        index = int((self.data.labelled.images - image.movedim(-1, 0)).flatten(1).abs().sum(1).argmin())
        question, label = text_of(asked), self.data.labels[index]
        if question.startswith(("Is it", "Is this", "Does")) and "dark" not in question:
            return "No." if self.fails == "yes_no" else "Yes." if is_true(question, label, FASHION) else "No."
        if "dark" in question or "bright" in question:
            return self.data.words(index)["shade"]
        return (
            "a shirt"
            if self.fails == "name" and "Describe" not in question and "caption" not in question
            else FASHION.names[label]
        )


@pytest.mark.parametrize("fails", ["", "yes_no", "name"])
def test_scores_of_answers(fails):
    data = conversations(tasks=("name", "yes_no", "shade", "describe", "draw"))
    scores = score_answers(Oracle(data, fails), data, count=200)
    assert scores.keys() == set(TASKS)
    expected = dict(name=(1.0, 0.1)[fails == "name"], yes_no=(1.0, 0.5)[fails == "yes_no"], shade=1.0, describe=1.0)
    for task, score in expected.items():
        assert abs(scores[task] - score) <= (0.1 if score == 0.5 else 0.0), task


def test_digits_where_fashion_is_not_installed(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("transfusion_pytorch.examples.data.FASHION_FOLDER", str(tmp_path / "nothing"))
    with pytest.warns(UserWarning, match="fashion could not be loaded .* using digits, 8x8, instead"):
        data, wording = load_garments()
    assert wording is DIGITS
    assert re.search("because fashion could not be loaded", data.source)
    found = GarmentConversations(
        data.test, ConversationFormat(chat_tokenizer()), wording=wording, tasks=["name", "yes_no"]
    )
    for index, question, answer in asked_and_answered(found)[:50]:
        assert named_class(answer, wording.names) == data.test.labels[index]
        assert question
    with pytest.raises(FileNotFoundError):
        load_garments(tmp_path)
    assert load_images("digits").name == "digits"
    assert set(SHADES) == {"dark", "grey", "light"}
