"""`ChatTokenizer`: the tokenizer of a language model, with its special tokens and its chat template.

n ids.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transfusion_pytorch.conversations.templates import Rendering, compiled_template, render
from transfusion_pytorch.saving.tokenizer import (
    TokenizerFiles,
    load_tokenizer,
    num_ids,
    read_tokenizer_files,
    write_tokenizer_files,
)
from transfusion_pytorch.saving.tokenizer import without_limits as _without_limits


class ChatTokenizer:
    """Text as ids and conversations as text. A `TextCodec`, picklable.

    - `tokenizer`: a `tokenizers.Tokenizer`; or a fast tokenizer of `transformers`, whose chat template and special
      tokens are taken over; or another `ChatTokenizer`
    - `chat_template`: Jinja, in place of the tokenizer's own
    - `special_tokens`: `{"eos_token": "</s>", ...}`, beside or in place of the tokenizer's own

    A tokenizer may have several named templates: the one that is called default is its `chat_template`, and all are
    `named_templates`.

    Raises `TypeError` for another tokenizer, and `ValueError` for special tokens that it does not know and for a
    `chat_template` that is no Jinja; the tokenizer's own may be any until it is rendered.
    """

    def __init__(
        self, tokenizer: Any, *, chat_template: str | None = None, special_tokens: Mapping[str, str] | None = None
    ):
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not callable(getattr(backend, "token_to_id", None)):
            raise TypeError(
                "tokenizer must be a tokenizers.Tokenizer or a fast tokenizer of transformers, got "
                f"{type(tokenizer).__name__}"
            )
        own = getattr(tokenizer, "special_tokens", None) or getattr(tokenizer, "special_tokens_map", None) or {}
        self.backend_tokenizer = _without_limits(backend)
        self.special_tokens = {name: str(token) for name, token in own.items() if not isinstance(token, (list, tuple))}
        self.special_tokens |= special_tokens or {}
        of_tokenizer = getattr(tokenizer, "named_templates", None) or getattr(tokenizer, "chat_template", None)
        self._take_templates(of_tokenizer if chat_template is None else chat_template)
        if lost := [token for token in self.special_tokens.values() if backend.token_to_id(token) is None]:
            raise ValueError(f"the tokenizer has no token {lost[0]!r}; special tokens are tokens of its vocabulary")
        if chat_template is not None:
            compiled_template(chat_template)

    def _take_templates(self, templates: Any) -> None:
        """One template, or several by their names: a dict, or a list of `{"name", "template"}` in older files."""
        if isinstance(templates, (list, tuple)):
            templates = {each["name"]: each["template"] for each in templates}
        named = templates if isinstance(templates, Mapping) else {} if templates is None else {"default": templates}
        self.named_templates: dict[str, str] = dict(named)
        self.chat_template = self.named_templates.get("default")

    # text

    @property
    def num_tokens(self) -> int:
        """The highest id, and one. A model's vocabulary may be larger."""
        return num_ids(self.backend_tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Int[Tensor, " n"]:
        """Special tokens that are written in the text become their ids. With `add_special_tokens`, those are added that
        the tokenizer itself places around a text (its post-processor): for Llama and Vicuna `bos_token`, for Qwen none.
        Chat templates write theirs.
        """
        return torch.tensor(
            self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, dtype=torch.long
        )

    def decode(self, ids: Int[Tensor, " n"], *, skip_special: bool = False) -> str:
        return self.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=skip_special)

    # special tokens

    @property
    def bos_id(self) -> int | None:
        return self.id_of("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self.id_of("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self.id_of("pad_token")

    def id_of(self, name: str) -> int | None:
        """The id of the special token of this name, such as `"eos_token"`; None where there is none."""
        token = self.special_tokens.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """All special tokens as they are written, named or not."""
        added = self.backend_tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special) | frozenset(self.special_tokens.values())

    # conversations

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> Rendering:
        """The text of messages, whose `content` is as the template takes it. With `add_generation_prompt` it ends where
        the assistant begins to write. `variables` are further ones of the template (`enable_thinking=False`).

        Raises `ValueError` where there is no template, and where it does not take the messages.
        """
        if self.chat_template is None and self.named_templates:
            raise ValueError(
                f"there are chat templates {', '.join(self.named_templates)}, and none is called default: choose one, "
                "ChatTokenizer(tokenizer, chat_template=tokenizer.named_templates[...])"
            )
        if self.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: give it one, ChatTokenizer(tokenizer, chat_template=...), such as "
                "PLAIN_TEMPLATE of transfusion_pytorch.conversations"
            )
        known = dict(self.special_tokens, add_generation_prompt=add_generation_prompt)
        return render(self.chat_template, messages, known | variables)

    # files

    def files(self) -> TokenizerFiles:
        """What is written: `tokenizer.json`, `chat_template.jinja` and `tokenizer_config.json`, as `transformers` has
        them.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        return TokenizerFiles(self.backend_tokenizer.to_str(pretty=True), self.chat_template, config)

    @classmethod
    def of_files(
        cls, files: TokenizerFiles, where: str | Path, *, num_text_tokens: int | None = None
    ) -> "ChatTokenizer":
        """The inverse of `files`; also of what `transformers` saves. `where` is named in errors, which are those of
        `load_tokenizer`.
        """
        backend = load_tokenizer(files.tokenizer, num_text_tokens, where)
        config = files.config or {}
        named = {name: _content(token) for name, token in config.items() if name.endswith("_token")}
        special = {name: token for name, token in named.items() if isinstance(token, str) and token}
        try:
            _add_tokens(backend, config)
            made = cls(backend, special_tokens=special)
            made._take_templates(files.chat_template or config.get("chat_template"))
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # of what is malformed
            raise ValueError(f"{where}: {error}") from error
        return made

    def save(self, folder: str | Path) -> None:
        """Writes the three files into a folder, which is made if need be. `transformers.AutoTokenizer` loads it too."""
        write_tokenizer_files(Path(folder), self.files())

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTokenizer":
        """What `save`, or `save_pretrained` of `transformers`, wrote into a folder. Raises `FileNotFoundError` where
        there is no `tokenizer.json`, and `ValueError` for files that are none.
        """
        files = read_tokenizer_files(Path(folder))
        if files is None:
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        return cls.of_files(files, folder)

    def __repr__(self) -> str:
        template = "no chat template" if self.chat_template is None else "with a chat template"
        return f"ChatTokenizer({self.num_tokens:,} ids, {template})"


def _add_tokens(backend: Any, config: Mapping[str, Any]) -> None:
    """Adds the tokens that a configuration has and `tokenizer.json` has not, or not as added ones, as `transformers`
    does: by the order of their ids where it says them, special ones by their names.
    """
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder") or {}
    special = [token for name, token in config.items() if name.endswith("_token")]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        others = config.get(name) or ()
        special += others.values() if isinstance(others, Mapping) else others
    described = [listed[number] for number in sorted(listed, key=int)]
    described += [dict(token if isinstance(token, Mapping) else {"content": token}, special=True) for token in special]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for each in described:
        if isinstance(content := each.get("content"), str) and content and content not in known:
            known.add(content)
            backend.add_tokens([AddedToken(**{key: value for key, value in each.items() if key != "__type"})])


def _content(token: Any) -> Any:
    """`{"content": "</s>", ...}` of older files is `"</s>"`."""
    return token.get("content") if isinstance(token, Mapping) else token
