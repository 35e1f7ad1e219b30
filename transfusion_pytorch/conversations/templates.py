"""Chat templates: Jinja that turns a list of messages into one text, rendered as `transformers` renders it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Characters that Unicode keeps out of all text that is passed on (noncharacters): they mark places in a rendering.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"
FIRST_MARK, LAST_MARK = "\ufdd0", "\ufdef"

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'assistant:' }}{% generation %}{{ ' ' + message['content'] + (eos_token or '') }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""For a language model that was never tuned to a chat: `user: ...`, `assistant: ...` and its end-of-text token."""

VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
    "{% set turns = messages[1:] %}{% else %}{{ 'A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}"
    "{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Vicuna 1.1 and 1.5, and LLaVA 1.5, whose files have none."""

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2 Chat; the system message stands inside of the first question."""


class Rendering(NamedTuple):
    """A rendered conversation.

    - `text`
    - `generated`: the spans of characters that stood in `{% generation %}` blocks; none where the template has none
    """

    text: str
    generated: list[tuple[int, int]]


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Rendering:
    """Renders messages. `variables` are what the template may use besides: special tokens, `add_generation_prompt`.

    Raises `ValueError` for a template that is no Jinja, and with the template's own message where it refuses the
    messages.
    """
    compiled = compiled_template(template)
    try:
        marked = compiled.render(messages=list(messages), **({"tools": None, "documents": None} | dict(variables)))
    except (TemplateError, SecurityError, TypeError) as error:  # a TypeError where it adds what is no text
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return _without_marks(marked)


@lru_cache(maxsize=32)
def compiled_template(template: str) -> Template:
    """Raises `ValueError` that names the line for what is no Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja, line {error.lineno}: {error}") from error


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes. The rendering has marks around it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _without_marks(marked: str) -> Rendering:
    """Blocks do not nest: `a\\ufdd0b\\ufdd1c` -> `abc` with the span (1, 2)."""
    pieces = re.split(f"[{GENERATION_START}{GENERATION_END}]", marked)
    ends, length = [], 0
    for piece in pieces:
        length += len(piece)
        ends.append(length)
    generated = [(ends[i], ends[i + 1]) for i in range(0, len(pieces) - 1, 2)]
    return Rendering("".join(pieces), generated)


def has_marks(text: str) -> bool:
    """Whether a text has one of the characters that mark places."""
    return any(FIRST_MARK <= character <= LAST_MARK for character in text)
