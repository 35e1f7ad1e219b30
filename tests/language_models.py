"""Small random language models of transformers, and models that begin with them."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from transfusion_pytorch import Transfusion

NUM_TEXT, EOS = 64, 5
SIZES = dict(
    vocab_size=NUM_TEXT,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=EOS,
)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, other heads": ("Llama", dict(head_dim=16, num_key_value_heads=3)),
    "llama, linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0))),
    "llama, llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama, yarn": ("Llama", dict(rope_parameters=YARN)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
}


def language_model(family: str = "llama", **overrides: Any) -> Any:
    """In evaluation mode. No norm or bias stays as it is built: all would be alike."""
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**(SIZES | options | overrides))
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model.eval()


def begun(language_model: Any, **options: Any) -> Transfusion:
    """Two modalities, of 2 axes and of 1."""
    torch.manual_seed(1)
    modalities = dict(dim_latent=(4, 3), modality_default_shape=((2, 3), (3,)))
    return Transfusion.from_pretrained_lm(language_model, **(modalities | options))


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids without the one that ends text."""
    return torch.randint(EOS + 1, NUM_TEXT, shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def write_gguf(theirs: Any, path: Path) -> None:
    """A Llama as llama.cpp writes it: other names, and queries and keys in another order."""
    gguf = pytest.importorskip("gguf")
    config, state = theirs.config, theirs.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(NUM_TEXT)
    writer.add_rope_freq_base(10_000.0)
    writer.add_eos_token_id(EOS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in state.items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Hub:
    """Stands in for the hub: a repository that is this folder, of which it gives what is asked for."""

    def __init__(self, repository, downloads, monkeypatch):
        self.repository, self.downloads = repository, downloads
        monkeypatch.setattr("huggingface_hub.snapshot_download", self)

    def __call__(self, name, allow_patterns, **options):
        self.downloads.mkdir(exist_ok=True)
        for file in self.repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.downloads)
        return str(self.downloads)

    @property
    def weights(self):
        return sorted(file.name for file in self.downloads.glob("*.safetensors"))
