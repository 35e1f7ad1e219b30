"""Chat templates: the text that `transformers` renders, and what the assistant wrote in it."""

import re
from datetime import datetime

import pytest
from chats import CHATML, GENERATION, LLAMA3, NAMED, NEWLINES, TEMPLATES, VICUNA, byte_level, chat_tokenizer

from transfusion_pytorch.conversations import PLAIN_TEMPLATE
from transfusion_pytorch.conversations.templates import render

QUESTION = {"role": "user", "content": " What is this? "}
ANSWER = {"role": "assistant", "content": "It is red.\n"}
SYSTEM = {"role": "system", "content": "Be kind."}
CONVERSATIONS = {
    "question": [QUESTION],
    "answer": [QUESTION, ANSWER],
    "system": [SYSTEM, QUESTION, ANSWER],
    "turns": [SYSTEM, QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "<think>hm</think>Blue."}],
}


def as_parts(messages: list[dict]) -> list[dict]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.fixture(scope="module")
def oracle():
    transformers = pytest.importorskip("transformers", minversion="5")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMED)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompts", [True, False])
def test_text_and_ids_are_those_of_transformers(oracle, name, conversation, prompts):
    messages, template = CONVERSATIONS[conversation], TEMPLATES[name]
    messages = as_parts(messages) if name == "parts" else messages
    options = dict(chat_template=template, add_generation_prompt=prompts)
    ours = chat_tokenizer(template)
    text = ours.render(messages, add_generation_prompt=prompts).text
    assert text == oracle.apply_chat_template(messages, tokenize=False, **options)
    ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode(text).tolist() == list(ids)


def test_what_was_generated_is_what_transformers_masks(oracle):
    messages = CONVERSATIONS["turns"]
    found = oracle.apply_chat_template(
        messages, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    text, spans = chat_tokenizer(GENERATION).render(messages)
    assert [text[start:end] for start, end in spans] == ["It is red.\n<|im_end|>", "<think>hm</think>Blue.<|im_end|>"]
    learned = [
        token for token, is_learned in zip(found["input_ids"], found["assistant_masks"], strict=True) if is_learned
    ]
    assert oracle.decode(learned) == "".join(text[start:end] for start, end in spans)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}",
        "{{ messages | tojson }} {{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}",
        "{{ tools is none }} {{ documents is none }} {{ unknown is defined }} {{ bos_token }}",
        "{{ strftime_now('%Y') }}",
        "  {% if true %}\n  x\n  {% endif %}\n\n",
    ],
)
def test_the_language_is_that_of_transformers(oracle, template):
    messages = CONVERSATIONS["turns"]
    expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert chat_tokenizer(template).render(messages).text == expected


def test_the_present_time():
    assert render("{{ strftime_now('%Y') }}", [], {}).text == f"{datetime.now():%Y}"


def test_templates_cannot_reach_outside():
    with pytest.raises(ValueError, match="does not take these messages: access to attribute '__class__'"):
        render("{{ messages.__class__.__mro__ }}", [QUESTION], {})
    with pytest.raises(ValueError, match=r"does not take these messages: .*append"):
        render("{{ messages.append(1) }}", [QUESTION], {})


def test_refusals_are_the_templates_own():
    with pytest.raises(ValueError, match="the chat template does not take these messages: roles must alternate"):
        chat_tokenizer(VICUNA).render([ANSWER])
    with pytest.raises(ValueError, match=re.escape("can only concatenate str")):
        chat_tokenizer(NEWLINES).render([{"role": "user", "content": None}])


def test_what_is_no_template():
    with pytest.raises(ValueError, match="the chat template is no Jinja, line 2"):
        chat_tokenizer("{{ 1 }}\n{% for %}")
    with pytest.raises(ValueError, match="the tokenizer has no chat template: give it one"):
        chat_tokenizer(None).render([QUESTION])


def test_the_plain_template():
    text, spans = chat_tokenizer(PLAIN_TEMPLATE).render(CONVERSATIONS["system"])
    assert text == "system: Be kind.\nuser:  What is this? \nassistant: It is red.\n</s>\n"
    assert [text[start:end] for start, end in spans] == [" It is red.\n</s>"]
    prompt = chat_tokenizer(PLAIN_TEMPLATE).render(CONVERSATIONS["question"], add_generation_prompt=True).text
    assert prompt.endswith("\nassistant:")
    assert render(PLAIN_TEMPLATE, [ANSWER], {}).text == "assistant: It is red.\n\n"


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_messages_are_not_changed(template):
    messages = [dict(message) for message in CONVERSATIONS["turns"]]
    chat_tokenizer(template).render(messages)
    assert messages == CONVERSATIONS["turns"]
