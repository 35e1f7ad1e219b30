"""`ChatTokenizer`: text as ids, special tokens, files; and how it travels with a model."""

import json
import pickle

import pytest
import torch
from chats import CHATML, LLAMA3, NAMED, TEMPLATES, byte_level, chat_tokenizer, model_of, with_spaces
from torch import tensor

from transfusion_pytorch import Transfusion
from transfusion_pytorch.conversations import ChatTokenizer
from transfusion_pytorch.data.text import TextCodec

MESSAGES = [{"role": "user", "content": "What is this?"}]


@pytest.mark.parametrize("make", [byte_level, with_spaces])
def test_it_is_a_codec(make):
    tokenizer = chat_tokenizer(make=make)
    assert isinstance(tokenizer, TextCodec)
    for text in ("It is a red square.", "Draw a blue circle."):
        ids = tokenizer.encode(text)
        assert ids.dtype == torch.long
        assert ids.max() < tokenizer.num_tokens
        assert tokenizer.decode(ids) == text


def test_special_tokens():
    tokenizer = ChatTokenizer(byte_level(), special_tokens=NAMED | {"pad_token": "<|eot_id|>"})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 4)
    assert chat_tokenizer().pad_id is None
    ids = tokenizer.encode("<s>Draw</s>")
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(ids) == "<s>Draw</s>"
    assert tokenizer.decode(ids, skip_special=True) == "Draw"
    assert {"<|im_end|>", "</s>"} <= tokenizer.special_texts


def test_special_tokens_around_a_text_are_added_on_demand():
    import tokenizers

    backend = byte_level()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = ChatTokenizer(backend)
    assert tokenizer.encode("a", add_special_tokens=True).tolist() == [0, *tokenizer.encode("a").tolist()]


def test_text_is_neither_cut_nor_filled_up():
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert chat_tokenizer(make=lambda: backend).encode("What is this?").equal(chat_tokenizer().encode("What is this?"))


def test_it_is_picklable():
    tokenizer = pickle.loads(pickle.dumps(chat_tokenizer()))
    assert tokenizer.render(MESSAGES) == chat_tokenizer().render(MESSAGES)
    assert repr(tokenizer) == f"ChatTokenizer({tokenizer.num_tokens:,} ids, with a chat template)"


def test_what_is_no_tokenizer():
    with pytest.raises(TypeError, match=r"must be a tokenizers\.Tokenizer or a fast tokenizer .*, got list"):
        ChatTokenizer([1])
    with pytest.raises(ValueError, match="the tokenizer has no token '<nothing>'"):
        ChatTokenizer(byte_level(), special_tokens={"eos_token": "<nothing>"})


# those of transformers


def fast(**options):
    transformers = pytest.importorskip("transformers", minversion="5")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMED, **options)


def test_a_fast_tokenizer_gives_its_template_and_special_tokens():
    theirs = fast()
    theirs.chat_template = LLAMA3
    tokenizer = ChatTokenizer(theirs)
    assert tokenizer.chat_template == LLAMA3
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.render(MESSAGES).text == theirs.apply_chat_template(MESSAGES, tokenize=False)
    assert ChatTokenizer(tokenizer, chat_template=CHATML).special_tokens == tokenizer.special_tokens
    theirs.chat_template = {"default": CHATML, "tools": LLAMA3}
    assert ChatTokenizer(theirs).chat_template == CHATML
    theirs.chat_template = {"tools": LLAMA3}
    tokenizer = ChatTokenizer(ChatTokenizer(theirs))
    with pytest.raises(ValueError, match="there are chat templates tools, and none is called default: choose one"):
        tokenizer.render(MESSAGES)
    chosen = ChatTokenizer(tokenizer, chat_template=tokenizer.named_templates["tools"])
    assert chosen.render(MESSAGES).text == ChatTokenizer(theirs, chat_template=LLAMA3).render(MESSAGES).text


def test_transformers_loads_what_is_saved_and_the_other_way_round(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    ours = chat_tokenizer(LLAMA3)
    ours.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == ours.render(MESSAGES).text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    theirs.save_pretrained(tmp_path / "theirs")
    again = ChatTokenizer.load(tmp_path / "theirs")
    assert (again.chat_template, again.special_tokens) == (ours.chat_template, ours.special_tokens)


# files


@pytest.mark.parametrize("name", TEMPLATES)
def test_files_give_the_same_tokenizer(tmp_path, name):
    ours = chat_tokenizer(TEMPLATES[name] + "\r\n{# é #}")
    ours.save(tmp_path)
    again = ChatTokenizer.load(tmp_path)
    assert (again.chat_template, again.special_tokens) == (ours.chat_template, ours.special_tokens)
    assert again.encode("It is <|im_end|> red").equal(ours.encode("It is <|im_end|> red"))
    ChatTokenizer(byte_level()).save(tmp_path)
    assert ChatTokenizer.load(tmp_path).chat_template is None


def test_older_files_have_the_template_in_their_configuration(tmp_path):
    chat_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    older = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None, "chat_template": LLAMA3}
    path.write_text(json.dumps(older))
    tokenizer = ChatTokenizer.load(tmp_path)
    assert (tokenizer.chat_template, tokenizer.special_tokens) == (LLAMA3, {"bos_token": "<s>"})
    path.write_text(json.dumps(older | {"chat_template": [{"name": "default", "template": CHATML}]}))
    assert ChatTokenizer.load(tmp_path).chat_template == CHATML


PAD = {"content": "<pad>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
TOOLS = [{"name": "tools", "template": LLAMA3}]


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({**NAMED, "pad_token": "<pad>", "image_token": "<image>"}, None),
        ({**NAMED, "pad_token": {"__type": "AddedToken", **PAD}}, None),
        ({**NAMED, "pad_token": "<pad>", "added_tokens_decoder": {"400": PAD, "399": PAD | {"content": "<a>"}}}, None),
        ({**NAMED, "pad_token": "", "extra_special_tokens": {"image_token": "<image>"}}, None),
        ({**NAMED, "eos_token": None, "additional_special_tokens": ["<a>", "<|im_end|>"]}, None),
        ({}, {**NAMED, "pad_token": PAD}),
        (None, NAMED),
        ({"eos_token": "<|im_end|>"}, NAMED),
        ({"eos_token": "<|im_end|>", "added_tokens_decoder": {"0": PAD | {"content": "<s>"}}}, NAMED),
        ({**NAMED, "chat_template": TOOLS}, None),
        ({**NAMED, "chat_template": "{% foo %}"}, None),
    ],
)
def test_folders_that_transformers_opens_have_the_same_special_tokens(tmp_path, config, special):
    """Those that `tokenizer.json` lacks are added behind all others, and a template that nobody wants may be any."""
    transformers = pytest.importorskip("transformers", minversion="5")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    of_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | of_class))
    if special is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = ChatTokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.num_tokens == len(theirs)
    text = "<s>It is<pad> a<image></s><a>"
    assert ours.encode(text).tolist() == theirs.encode(text)
    ours.save(tmp_path)
    again = ChatTokenizer.load(tmp_path)
    assert (again.special_tokens, again.encode(text).tolist()) == (ours.special_tokens, ours.encode(text).tolist())


def test_special_tokens_that_are_ordinary_in_the_file_become_special(tmp_path):
    vocabulary = {letter: i for i, letter in enumerate("ab</s>")}
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {"</s>": 9}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert ChatTokenizer.load(tmp_path).encode("ab</s>").tolist() == [0, 1, 9]


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
    chat_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": [1]}')
    with pytest.raises(ValueError, match=f"{tmp_path.name}: "):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is malformed: it must be a dict, got a list"):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not readable JSON"):
        ChatTokenizer.load(tmp_path)


# with a model


def test_it_travels_with_a_model(tmp_path):
    tokenizer = chat_tokenizer()
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path / "a")
    loaded = Transfusion.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")  # before anybody has asked for it
    for each in (loaded, Transfusion.from_pretrained(tmp_path / "b")):
        assert isinstance(each.tokenizer, ChatTokenizer)
        assert each.tokenizer.render(MESSAGES) == tokenizer.render(MESSAGES)
        assert each.tokenizer.eos_id == tokenizer.eos_id
    model.save_pretrained(tmp_path / "b", tokenizer=byte_level())  # a plain one takes its place
    assert not isinstance(Transfusion.from_pretrained(tmp_path / "b").tokenizer, ChatTokenizer)
    model.tokenizer = None
    model.save_pretrained(tmp_path / "a")
    assert not {"tokenizer.json", "chat_template.jinja", "tokenizer_config.json"} & {
        path.name for path in (tmp_path / "a").iterdir()
    }


def test_a_fast_tokenizer_travels_as_a_chat_tokenizer(tmp_path):
    theirs = fast()
    theirs.chat_template = CHATML
    model = model_of(chat_tokenizer())
    model.save_pretrained(tmp_path, tokenizer=theirs)
    loaded = Transfusion.from_pretrained(tmp_path).tokenizer
    assert (loaded.chat_template, loaded.special_tokens) == (CHATML, NAMED)


def test_a_saved_one_that_does_not_fit(tmp_path):
    model = model_of(chat_tokenizer())
    model.save_pretrained(tmp_path)
    tokenizer = byte_level()
    tokenizer.add_tokens(["one more"])
    ChatTokenizer(tokenizer, chat_template=CHATML).save(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json of .* ids, and the model num_text_tokens="):
        loaded.tokenizer  # noqa: B018


def test_commands_read_text_by_it():
    from transfusion_pytorch.commands.pictures import codec_of

    model = model_of(chat_tokenizer())
    assert codec_of(model) is model.tokenizer
    assert codec_of(model).decode(tensor([], dtype=torch.long)) == ""
