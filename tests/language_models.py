"""Small random language models of transformers, and models that begin with them."""

from typing import Any

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
