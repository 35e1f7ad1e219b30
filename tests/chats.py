"""Small tokenizers and chat templates of the usual kinds, and pictures to talk about."""

import re
from base64 import b64encode
from io import BytesIO

import pytest
import torch
from torch import Tensor

from transfusion_pytorch import Condition, Transfusion
from transfusion_pytorch.conversations import LLAMA2_TEMPLATE, VICUNA_TEMPLATE, ChatTokenizer

tokenizers = pytest.importorskip("tokenizers")
Image = pytest.importorskip("PIL.Image")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|header|>", "<|end_header|>"]
CORPUS = [
    "system\n user\n assistant\n USER: ASSISTANT:",
    "What is this? It is a red square.",
    "Draw a blue circle.\n\n",
]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{% endif %}"
)
VICUNA = re.sub("A chat between .* questions. ", "A chat. ", VICUNA_TEMPLATE)
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# as Qwen3's: thoughts of all but the last answer are forgotten, and an answer without any has empty ones
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% set content = message['content'].split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>' + ('' if '</think>' not in message['content'] else "
    "message['content'].split('</think>')[0].split('<think>')[-1]) + '</think>' }}{% endif %}{{ content }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
# another word for the assistant; the end of a turn is not the end of the sequence
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<|header|>' + role + '\\n' + message['content'] | trim + '<|eot_id|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>model\\n' }}{% endif %}"
)
# as DeepSeek-R1's: an answer is asked for with the beginning of its thoughts, and past ones have none
THOUGHTFUL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|header|>' + message['content'] }}{% else %}"
    "{{ '<|end_header|>' + message['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|end_header|><think>\\n' }}{% endif %}"
)
NEWLINES = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
TEMPLATES = dict(
    chatml=CHATML,
    llama3=LLAMA3,
    vicuna=VICUNA,
    generation=GENERATION,
    parts=PARTS,
    thinking=THINKING,
    llama2=LLAMA2_TEMPLATE,
    gemma=GEMMA,
    newlines=NEWLINES,
)


def byte_level():
    """Any text, as those of Llama 3, Qwen and SmolLM2."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    return made


def with_spaces():
    """As those of Llama 2 and Vicuna: a space is placed before every text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", behavior="merged_with_next")  # no token spans words
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = sorted({letter for text in CORPUS for letter in text} | {"▁"})
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    return made


def chat_tokenizer(template: str = CHATML, make=byte_level) -> ChatTokenizer:
    return ChatTokenizer(make(), chat_template=template, special_tokens=NAMED)


def model_of(tokenizer: ChatTokenizer, **options) -> Transfusion:
    """A model of this tokenizer's text, and of colour images of 2 x 2 pixels."""
    built = dict(
        num_text_tokens=tokenizer.num_tokens,
        dim_latent=3,
        modality_default_shape=(2, 2),
        transformer=dict(dim=16, depth=1, heads=2, dim_head=8),
    )
    model = Transfusion(**(built | options))
    model.tokenizer = tokenizer
    return model.eval()


def picture(colour: str = "red", size: tuple[int, int] = (2, 2), mode: str = "RGB"):
    return Image.new(mode, size, colour)


def png(colour: str = "red", size: tuple[int, int] = (2, 2)) -> bytes:
    file = BytesIO()
    picture(colour, size).save(file, format="PNG")
    return file.getvalue()


def data_url(colour: str = "red") -> str:
    return f"data:image/png;base64,{b64encode(png(colour)).decode()}"


def shown(parts: list, tokenizer: ChatTokenizer) -> list[str]:
    """A sample for people: what is only read in brackets, images by their type and first pixel."""
    return [
        f"[{_shown(part.part, tokenizer)}]" if isinstance(part, Condition) else _shown(part, tokenizer)
        for part in parts
    ]


def _shown(part, tokenizer: ChatTokenizer) -> str:
    if isinstance(part, Tensor):
        return tokenizer.decode(part)
    return f"<{part[0]} {[round(value, 1) for value in part[1].flatten()[:3].tolist()]}>"


def all_ids(parts: list) -> Tensor:
    bare = [part.part if isinstance(part, Condition) else part for part in parts]
    return torch.cat([part for part in bare if isinstance(part, Tensor)])
