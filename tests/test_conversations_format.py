"""Conversations as samples and prompts: what is learned, where images stand, and answers as messages."""

import pickle
import re
from random import Random

import pytest
import torch
from chats import (
    CHATML,
    GENERATION,
    LLAMA3,
    NEWLINES,
    TEMPLATES,
    THINKING,
    THOUGHTFUL,
    VICUNA,
    all_ids,
    chat_tokenizer,
    data_url,
    model_of,
    picture,
    png,
    shown,
    with_spaces,
)
from torch import Tensor, tensor

from transfusion_pytorch import Condition, ImageReader, Latents
from transfusion_pytorch.conversations import PLAIN_TEMPLATE, ChatTokenizer, ConversationFormat
from transfusion_pytorch.conversations.messages import parse_messages
from transfusion_pytorch.conversations.turns import SLOT, TurnRenderer, difference, encode_pieces

RED, BLUE = "<0 [1.0, -1.0, -1.0]>", "<0 [-1.0, -1.0, 1.0]>"
SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = {"role": "user", "content": [{"type": "image", "image": png("red")}, {"type": "text", "text": "What is this?"}]}
TOLD = {"role": "assistant", "content": "It is red."}
WISHED = {"role": "user", "content": "Draw a blue one."}
DRAWN = {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": data_url("blue")}}]}
BOTH = {
    "role": "assistant",
    "content": [{"type": "text", "text": "Here: "}, *DRAWN["content"], {"type": "text", "text": "!"}],
}
TURNS = [ASKED, TOLD, WISHED, DRAWN]


def format_of(template: str = CHATML, make=None, **options) -> ConversationFormat:
    tokenizer = chat_tokenizer(template) if make is None else chat_tokenizer(template, make)
    return ConversationFormat(tokenizer, **({"images": 2} | options))


def see(template: str, messages: list[dict], **options) -> list[str]:
    made = format_of(template, **options)
    return shown(made.sample_of(messages).parts, made.tokenizer)


# what is learned


def test_turns_of_the_assistant_are_learned_with_what_ends_them():
    assert see(CHATML, [SYSTEM, *TURNS]) == [
        "[<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n]",
        f"[{RED}]",
        "[What is this?<|im_end|>\n<|im_start|>assistant\n]",
        "It is red.<|im_end|>",
        "[\n<|im_start|>user\nDraw a blue one.<|im_end|>\n<|im_start|>assistant\n]",
        BLUE,
        "<|im_end|>",
        "[\n]",
    ]


EXPECTED = {
    "chatml": ["It is red.<|im_end|>", BLUE, "<|im_end|>"],
    "llama3": ["It is red.<|eot_id|>", BLUE, "<|eot_id|>"],
    "vicuna": [" It is red.</s>", " ", BLUE, "</s>"],
    "generation": ["It is red.<|im_end|>", BLUE, "<|im_end|>"],
    "parts": ["It is red.<|im_end|>", BLUE, "<|im_end|>"],
    "thinking": ["It is red.<|im_end|>", "<think></think>", BLUE, "<|im_end|>"],
    "llama2": [" It is red. </s>", " ", BLUE, " </s>"],
    "gemma": ["It is red.<|eot_id|>", BLUE, "<|eot_id|>"],
    "newlines": ["assistant: It is red.\n", "assistant: ", BLUE, "\n"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_by_any_template(name):
    assert [part for part in see(TEMPLATES[name], TURNS) if not part.startswith("[")] == EXPECTED[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_nothing_is_lost(name, system):
    """A sample is the rendered text. Its ids are those of the whole text too, unless the end of a prompt by itself is
    other ids than in front of an answer: two newlines in front of a letter are two tokens.
    """
    made = format_of(TEMPLATES[name])
    messages = [*system, WISHED, TOLD, WISHED, TOLD]
    text, ids = made.renderer.learned_turns(parse_messages(messages)).text, all_ids(made.sample_of(messages).parts)
    assert made.tokenizer.decode(ids) == text
    assert ids.equal(made.tokenizer.encode(text)) == (name != "llama3")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), THOUGHTFUL])
@pytest.mark.parametrize("make", [None, with_spaces])
def test_a_prompt_is_how_a_sample_begins(template, make):
    """What is learned first is what a model goes on with after the prompt."""
    made = format_of(template, make)
    sample, prompt = made.sample_of([ASKED, TOLD]).parts, made.prompt_of([ASKED])
    first = next(i for i, part in enumerate(sample) if not isinstance(part, Condition))
    assert len(prompt) == first
    for read, part in zip(sample, prompt, strict=False):
        for given, expected in zip(
            *((each if isinstance(each, tuple) else (each,)) for each in (part, read.part)), strict=True
        ):
            assert given.equal(expected) if isinstance(given, Tensor) else given == expected


def test_a_later_prompt_has_the_pictures_that_were_drawn():
    made = format_of()
    prompt = made.prompt_of([WISHED, BOTH, ASKED])
    assert shown(prompt, made.tokenizer) == [
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nDraw a blue one.<|im_end|>\n"
        "<|im_start|>assistant\nHere: ",
        BLUE,
        "!<|im_end|>\n<|im_start|>user\n",
        RED,
        "What is this?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_later_prompt_is_tokenised_as_it_was_learned():
    """Where a boundary cut tokens, it does so in the prompts of all later turns."""
    odd = TOLD | {"content": "\n\nIt is red."}
    for template in (CHATML, GENERATION):
        made = format_of(template)
        ids, sample = (
            made.prompt_of([WISHED, odd, WISHED])[0],
            all_ids(made.sample_of([WISHED, odd, WISHED, TOLD]).parts),
        )
        assert ids.equal(sample[: len(ids)])


def test_a_turn_of_weight_zero_is_only_read():
    parts = see(GENERATION, [ASKED, TOLD | {"weight": 0}, WISHED, DRAWN])
    assert [part for part in parts if not part.startswith("[")] == [BLUE, "<|im_end|>"]
    parts = see(CHATML, [ASKED, TOLD, WISHED, DRAWN | {"weight": 0}])
    assert [part for part in parts if not part.startswith("[")] == ["It is red.<|im_end|>"]


def test_text_and_pictures_of_one_turn():
    assert see(CHATML, [WISHED, BOTH])[1:] == ["Here: ", BLUE, "!<|im_end|>", "[\n]"]


def test_answers_that_are_equal_or_inside_the_question():
    same = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "red"}] * 3
    for template in (CHATML, LLAMA3, VICUNA):
        learned = [part for part in see(template, same) if not part.startswith("[")]
        assert len(learned) == 3
        assert len(set(learned)) == 1
        assert "red" in learned[0]


def test_white_space_that_a_template_takes_away():
    padded = [WISHED, TOLD | {"content": "  It is red.\n "}]
    assert see(LLAMA3, padded)[1:] == ["It is red.<|eot_id|>"]
    assert see(CHATML, padded)[1:-1] == ["  It is red.\n <|im_end|>"]


def test_thoughts_that_are_forgotten():
    thought = TOLD | {"content": "<think>hm</think>It is red."}
    learned = [part for part in see(THINKING, [WISHED, thought, WISHED, thought]) if not part.startswith("[")]
    assert learned == ["It is red.<|im_end|>", "<think>hm</think>It is red.<|im_end|>"]
    quiet = see(THINKING, [WISHED, TOLD], variables={"enable_thinking": False})
    assert quiet[1:] == ["It is red.<|im_end|>", "[\n]"]


@pytest.mark.parametrize("thoughts", ["", "hm</think>", "<think>\nhm</think>\n\n"])
def test_an_answer_is_learned_behind_what_it_is_asked_for_with(thoughts):
    """Also where a template writes more there than before an answer of the past, and leaves its thoughts out."""
    told = TOLD | {"content": f"{thoughts}It is red."}
    parts = see(THOUGHTFUL, [ASKED, told, WISHED])
    assert parts[-2:] == [
        "[What is this?<|end_header|><think>\n]",
        f"{told['content'].removeprefix('<think>')}</s>".lstrip(),
    ]


def test_an_answer_of_thoughts_alone_is_learned():
    parts = see(THOUGHTFUL, [ASKED, TOLD | {"content": "<think>\nhm</think>"}])
    assert parts[-2:] == ["[What is this?<|end_header|><think>\n]", "hm</think></s>"]


def test_answers_of_the_past_that_are_asked_for_in_another_way_are_only_read():
    """Their context would be another one when they are asked for, or that of the last one would."""
    quiet = dict(variables={"enable_thinking": False})
    for template, options, ending in ((THOUGHTFUL, {}, "<think>\n]"), (THINKING, quiet, "<think></think>]")):
        made = format_of(template, **options)
        with pytest.warns(UserWarning, match="the last is learned and earlier ones are only read"):
            sample = made.sample_of([WISHED, TOLD, ASKED, TOLD]).parts
        parts = shown(sample, made.tokenizer)
        learned = [part for part in parts if not part.startswith("[")]
        assert learned[0].startswith("It is red.")
        assert len(learned) == 1
        assert parts[parts.index(learned[0]) - 1].endswith(ending)
        prompt = all_ids(made.prompt_of([WISHED, TOLD, ASKED, TOLD, WISHED]))
        with pytest.warns(UserWarning, match="the last is learned"):
            ids = all_ids(made.sample_of([WISHED, TOLD, ASKED, TOLD, WISHED, TOLD]).parts)
        assert prompt.equal(ids[: len(prompt)])
        made.sample_of([WISHED, TOLD | {"weight": 0}, ASKED, TOLD])  # as the warning says


def test_a_conversation_may_begin_with_the_assistant():
    assert see(LLAMA3, [TOLD, WISHED, TOLD])[:2] == [
        "[<s><|header|>assistant<|end_header|>\n\n]",
        "It is red.<|eot_id|>",
    ]


def test_tokens_that_would_span_a_boundary_are_cut():
    made = format_of(CHATML)
    newlines = [WISHED, TOLD | {"content": "\n\nIt is red."}]
    sample = made.sample_of(newlines).parts
    assert made.tokenizer.encode("\n\n\n").tolist() != [*made.tokenizer.encode("\n"), *made.tokenizer.encode("\n\n")]
    assert sample[0].part.equal(made.prompt_of([WISHED])[0])
    assert made.tokenizer.decode(sample[1]) == "\n\nIt is red.<|im_end|>"


@pytest.mark.parametrize("make", [None, with_spaces])
def test_pieces_are_the_whole(make):
    tokenizer = chat_tokenizer(CHATML) if make is None else chat_tokenizer(CHATML, make)
    text = "USER: What is this? ASSISTANT: It is a red square.</s>USER: Draw"
    for cuts in ([], [30], [30, 54], [3, 30, 54], list(range(1, len(text)))):
        pieces = encode_pieces(tokenizer.encode, text, cuts)
        assert len(pieces) == len(cuts) + 1
    assert torch.cat(encode_pieces(tokenizer.encode, text, [30, 54])).equal(tokenizer.encode(text))
    starts = [0, 30, 54, len(text)]
    for piece, start, end in zip(encode_pieces(tokenizer.encode, text, [30, 54]), starts, starts[1:], strict=False):
        assert tokenizer.decode(piece).strip() == text[start:end].strip()


BITS = ["<|im_end|>", "assistant\n", "user", "\n", "\n\n", "  ", "red", "é", "日本", "🎈", "</s>", "[INST]", "{{ x }}"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("make", [None, with_spaces])
def test_any_text_in_any_template(name, make):
    """Nothing is lost, and prompts are the beginning of samples, whatever people write."""
    made, random = format_of(TEMPLATES[name], make), Random(0)
    for _ in range(12):
        messages = []
        for role in ("user", "assistant") * random.randint(1, 3):
            text = [{"type": "text", "text": "a" + "".join(random.choices(BITS, k=random.randint(1, 6)))}]
            messages.append({"role": role, "content": text + ASKED["content"][:1] * (random.random() < 0.3)})
        sample = made.sample_of(messages).parts
        if make is None:
            expected = SLOT.sub("", made.renderer.learned_turns(parse_messages(messages)).text)
            assert made.tokenizer.decode(all_ids(sample)) == expected
        prompt = all_ids(made.prompt_of(messages[:-1]))
        assert prompt.equal(all_ids(sample)[: len(prompt)])


@pytest.mark.parametrize(
    ("text", "other", "span"),
    [("abcd", "axd", (1, 3)), ("ab", "ab", (2, 2)), ("aa", "a", (1, 2)), ("aXa", "aa", (1, 2)), ("", "x", (0, 0))],
)
def test_where_texts_differ(text, other, span):
    assert difference(text, other) == span


# the end of a turn


@pytest.mark.parametrize(
    ("name", "end", "stop"),
    [
        ("chatml", "<|im_end|>", ["</s>", "<|im_end|>"]),
        ("llama3", "<|eot_id|>", ["</s>", "<|eot_id|>"]),
        ("vicuna", "</s>", ["</s>"]),
        ("generation", "<|im_end|>", ["</s>", "<|im_end|>"]),
        ("llama2", " </s>", ["</s>"]),
        ("gemma", "<|eot_id|>", ["</s>", "<|eot_id|>"]),
        ("newlines", "\n", ["</s>"]),
    ],
)
def test_what_ends_a_turn(name, end, stop):
    made = format_of(TEMPLATES[name])
    assert made.renderer.end_of_turn == end
    assert [made.tokenizer.decode(tensor([token])) for token in made.stop_ids] == stop


def test_a_template_that_does_not_tell_how_turns_end():
    refuses = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0]['content'] }}"
    assert TurnRenderer(chat_tokenizer(refuses)).end_of_turn == "</s>"
    deaf = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}<|eot_id|>{% endfor %}"
    assert TurnRenderer(chat_tokenizer(deaf)).end_of_turn == "</s>"
    silent = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert TurnRenderer(chat_tokenizer(silent)).end_of_turn == "</s>"


# images and other modalities


def test_images_of_every_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    made = format_of()
    for source in ("a.png", tmp_path / "a.png", png("red"), data_url("red"), picture("red", (8, 4))):
        content = [{"type": "text", "text": "What?"}, {"type": "image", "image": source}]
        sample = made.sample_of([{"role": "user", "content": content}, TOLD], root=tmp_path, name="a")
        assert shown(sample.parts, made.tokenizer)[1] == f"[{RED}]"
        assert sample.parts[1].part[1].shape == (2, 2, 3)
        assert sample.name == "a"


def test_tensors_and_latents_go_as_they_are():
    made = format_of(images=None)
    pixels, latents, sound = torch.rand(4, 4, 3), Latents(0, torch.rand(2, 3)), torch.rand(5, 2)
    content = [
        {"type": "image", "image": pixels},
        {"type": "modality", "modality_type": 0, "data": latents},
        {"type": "modality", "modality_type": 1, "data": sound},
    ]
    parts = made.sample_of([{"role": "user", "content": content}, {"role": "assistant", "content": content[1:]}]).parts
    assert [part.part for part in parts[1:4]] == [(0, pixels), latents, (1, sound)]
    assert parts[5:7] == [latents, (1, sound)]


def test_the_two_branches_of_an_image_that_is_read():
    made = format_of(vision_type=1, vision_images=ImageReader(4, mode="L"))
    parts = made.sample_of(TURNS).parts
    kinds = [part.part[0] if isinstance(part, Condition) else part[0] for part in parts if _is_image(part)]
    assert kinds == [1, 0, 0]  # what is drawn has no vision branch
    assert [part.part[1].shape for part in parts[1:3]] == [(4, 4, 1), (2, 2, 3)]
    assert [part[0] for part in made.prompt_of(TURNS[:3]) if isinstance(part, tuple)] == [1, 0]
    assert ConversationFormat(made.tokenizer, 2, vision_type=1).sample_of(TURNS).parts[1].part[1].shape == (2, 2, 3)


def _is_image(part) -> bool:
    return isinstance(part.part if isinstance(part, Condition) else part, tuple)


def test_errors_name_the_part(tmp_path):
    made = format_of()
    missing = [{"type": "text", "text": "a"}, {"type": "image", "image": "b.png"}]
    with pytest.raises(FileNotFoundError, match=r"message 1, part 1: there is no image file .*b\.png"):
        made.sample_of([SYSTEM, {"role": "user", "content": missing}, TOLD], root=tmp_path)
    with pytest.raises(
        ValueError, match="message 0, part 0: images are read from files by an ImageReader: give images="
    ):
        format_of(images=None).sample_of(TURNS)
    with pytest.raises(ValueError, match="message 0, part 1: the image https"):
        made.sample_of([{"role": "user", "content": [missing[0], {"type": "image", "image": "https://a.b/c"}]}, TOLD])
    bare = {"type": "image_url", "image_url": {"url": data_url("red").partition(",")[2] * 20}}
    with pytest.raises(ValueError, match=r'an image as base64 stands behind "data:image/png;base64,".*') as error:
        made.sample_of([{"role": "user", "content": [bare]}, TOLD])
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match="no message of the assistant is to be learned"):
        made.sample_of([ASKED])
    with pytest.raises(ValueError, match="vision_type is a modality of its own, got 0"):
        format_of(vision_type=0)
    with pytest.raises(TypeError, match=re.escape("tokenizer must be a tokenizers.Tokenizer")):
        ConversationFormat("gpt2")


def test_templates_that_lose_or_repeat_messages():
    last = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="the conversation has 1 images, and the chat template shows 0 of them"):
        format_of(last).sample_of([ASKED, TOLD])
    with pytest.raises(ValueError, match="the conversation has 1 images, and the chat template shows 2 of them"):
        format_of(CHATML * 2).sample_of([ASKED, TOLD])
    with pytest.raises(ValueError, match="does not show the content of a message of the user"):
        format_of("hello").sample_of([ASKED, TOLD])
    with pytest.raises(ValueError, match=r"does not show the content of a message of the user: .*never"):
        format_of("{{ raise_exception('never') }}").sample_of([ASKED, TOLD])
    once = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}x{% endgeneration %}"
    with pytest.raises(ValueError, match="has 1 generation blocks for 2 messages of the assistant"):
        format_of(once).sample_of([ASKED, TOLD, WISHED, TOLD])


def test_formats_are_picklable():
    made = format_of(GENERATION, vision_type=1)
    made.sample_of(TURNS)  # which remembers what it found out of the template
    again = pickle.loads(pickle.dumps(made))
    assert shown(again.sample_of(TURNS).parts, made.tokenizer) == shown(made.sample_of(TURNS).parts, made.tokenizer)


def test_the_plain_template_needs_no_special_tokens_but_one():
    import tokenizers

    bare = chat_tokenizer().backend_tokenizer
    assert isinstance(bare, tokenizers.Tokenizer)
    made = ConversationFormat(
        ChatTokenizer(bare, chat_template=PLAIN_TEMPLATE, special_tokens={"eos_token": "</s>"}), 2
    )
    assert shown(made.sample_of(TURNS[:2]).parts, made.tokenizer)[-2:] == [" It is red.</s>", "[\n]"]


# with a model


def test_only_what_is_learned_has_a_loss():
    """Ids of answers and the latents of drawn images are targets, and nothing else is."""
    made = format_of()
    model = model_of(made.tokenizer)
    sample = made.sample_of(TURNS)
    counts = model.count_targets([sample])
    learned = [part for part in sample.parts if isinstance(part, Tensor)]
    opening = 5  # of the drawn image: meta, "2", ",", "2", som; what closes it follows latents, and is no target
    assert int(counts.text) == sum(map(len, learned)) + opening
    assert counts.latents.tolist() == [12.0]
    loss = model([sample])
    assert loss.isfinite()


# answers


def test_answers_are_messages():
    made = format_of()
    model = model_of(made.tokenizer)
    num_text = made.tokenizer.num_tokens
    prompt = made.prompt_of([ASKED])
    answer = [
        made.tokenizer.encode("Here: "),
        (0, torch.full((2, 2, 3), 2.0)),
        made.tokenizer.encode(" so. <|im_end|>"),
    ]
    sample = [
        torch.cat((tensor([model.sos_id]), prompt[0], model.vocabulary.opening(0, (2, 2)))),
        prompt[1],
        torch.cat((model.vocabulary.closing(0), prompt[2], answer[0], model.vocabulary.opening(0, (2, 2)))),
        answer[1],
        torch.cat((model.vocabulary.closing(0), answer[2], tensor([model.eos_id]))),
    ]
    message = made.message_of(sample, num_text=num_text, prompt=prompt)
    assert message["role"] == "assistant"
    text, image, end = message["content"]
    assert (text, end) == ({"type": "text", "text": "Here: "}, {"type": "text", "text": " so."})
    assert image["type"] == "image"
    assert (image["image"].mode, image["image"].size) == ("RGB", (2, 2))
    made.prompt_of([ASKED, message, ASKED])
    made.sample_of([ASKED, message])


def test_an_answer_of_nothing_has_no_parts():
    made = format_of()
    prompt = made.prompt_of([WISHED])
    sample = [torch.cat((tensor([500]), prompt[0], tensor([3, 501])))]
    answer = made.message_of(sample, num_text=400, prompt=prompt)
    assert answer == {"role": "assistant", "content": []}
    assert len(made.prompt_of([WISHED, answer, WISHED])) == 1


def test_modalities_that_are_no_pictures_come_as_tensors():
    made = format_of()
    latents = torch.rand(4, 2)
    message = made.message_of([tensor([500]), (1, latents), tensor([501])], num_text=400)
    (part,) = message["content"]
    assert part["data"].equal(latents)
    assert {key: part[key] for key in ("type", "modality_type")} == {"type": "modality", "modality_type": 1}
    assert made.sample_of([WISHED, message]).parts[1][1].equal(latents)


def test_space_before_an_answer_is_the_templates():
    made = format_of(VICUNA, with_spaces)
    prompt = made.prompt_of([WISHED])
    sample = [torch.cat((prompt[0], made.tokenizer.encode("It is red.</s>")))]
    answer = made.message_of(sample, num_text=made.tokenizer.num_tokens, prompt=prompt)
    assert answer["content"] == [{"type": "text", "text": "It is red."}]
    learned = made.sample_of([WISHED, answer]).parts[-1]
    assert made.tokenizer.decode(learned, skip_special=True).strip() == "It is red."


def test_newlines_end_no_sample():
    assert format_of(NEWLINES).stop_ids == [1]
