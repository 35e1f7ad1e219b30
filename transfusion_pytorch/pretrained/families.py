"""Which language models can be the trunk, and how theirs is said in the arguments and the parameters of `Transformer`.

Llama (with Vicuna and SmolLM), Qwen2 and Qwen3 differ in three points: biases of queries, keys and values, norms of
queries and keys, and the width of a head.

d model, h query heads, k key heads, e channels of a head, f hidden.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

ROTARY_KINDS = ("default", "linear", "llama3", "yarn")
# what changes frequencies in samples of more positions than the configuration says under this name
ROTARY_BOUNDS = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
SILU = ("silu", "swish")


class Family(NamedTuple):
    """What sets a family apart: biases of attention, by its configuration, and norms of queries and keys."""

    qkv_bias: Callable[[Any], bool]
    out_bias: Callable[[Any], bool]
    has_head_norms: bool


FAMILIES = {
    "llama": Family(lambda it: it.attention_bias, lambda it: it.attention_bias, has_head_norms=False),
    "qwen2": Family(lambda it: True, lambda it: False, has_head_norms=False),
    "qwen3": Family(lambda it: it.attention_bias, lambda it: it.attention_bias, has_head_norms=True),
}


def family_of(config: Any) -> Family:
    """The family of a configuration of `transformers`. Raises `ValueError` for one that is not supported."""
    name = getattr(config, "model_type", None)
    if name not in FAMILIES:
        raise ValueError(
            f"language models of type {name!r} cannot be the trunk; supported are {', '.join(FAMILIES)} (Llama, "
            "Vicuna, SmolLM, Qwen2, Qwen3)"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the language model is quantised; load it with its weights as they are, or dequantised")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError("language models with sliding windows are not supported: every token must see its whole past")
    if config.hidden_act not in SILU:
        raise ValueError(f"feedforward layers must be of SwiGLU (hidden_act 'silu'), got {config.hidden_act!r}")
    return FAMILIES[name]


def transformer_arguments(config: Any) -> dict[str, Any]:
    """The arguments of the `Transformer` that is this language model."""
    family, dim_head = family_of(config), head_width(config)
    frequencies, amplitude = rotary_frequencies(config)
    return dict(
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim_head=dim_head,
        attn_kwargs=dict(gate_values=False, qkv_bias=family.qkv_bias(config), out_bias=family.out_bias(config)),
        ff_kwargs=dict(
            activation="swiglu", dim_hidden=config.intermediate_size, bias=bool(getattr(config, "mlp_bias", False))
        ),
        qk_rmsnorm=family.has_head_norms,
        unet_skips=False,
        norm="rms",
        norm_eps=config.rms_norm_eps,
        rotary_frequencies=frequencies,
        rotary_amplitude=amplitude,
    )


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_frequencies(config: Any) -> tuple[list[float], float]:
    """Radians per position of each pair of channels, and the amplitude, scaling included; of a scaling that begins at
    a certain length (`rotary_bound`) those before. Raises `ValueError` for a kind that is not supported.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in (*ROTARY_KINDS, *ROTARY_BOUNDS):
        raise ValueError(
            f"rotary positions of type {kind!r} are not supported, only {', '.join((*ROTARY_KINDS, *ROTARY_BOUNDS))}"
        )
    if kind == "default":
        dim_head = head_width(config)
        exponent = torch.arange(0, dim_head, 2, dtype=torch.int64).float() / dim_head
        return (1.0 / parameters["rope_theta"] ** exponent).tolist(), 1.0
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.tolist(), float(amplitude)


def rotary_bound(config: Any) -> int | None:
    """The most positions of a sample in which rotary frequencies are those of `rotary_frequencies`; None for any."""
    parameters = config.rope_parameters
    name = ROTARY_BOUNDS.get(parameters.get("rope_type", "default"))
    return None if name is None else parameters.get(name) or getattr(config, name)


# weights


class Part(NamedTuple):
    """Where one tensor of the language model goes: into these rows of a parameter, `change` applied."""

    source: str
    rows: slice
    change: Callable[[Tensor], Tensor]


def trunk_weights(config: Any) -> Iterator[tuple[str, list[Part]]]:
    """For every parameter of the `Transformer` the tensors that make it, in the order of the layers."""
    family, width = family_of(config), head_width(config)
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    rows = [0, heads * width, (heads + kv_heads) * width, (heads + 2 * kv_heads) * width]
    q, k, v = (slice(*pair) for pair in pairwise(rows))
    paired = _Paired(width)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        kinds = {"weight": True, "bias": family.qkv_bias(config)}
        for kind in (kind for kind, is_there in kinds.items() if is_there):
            yield (
                f"{ours}.attn.to_qkv.{kind}",
                [
                    Part(f"{attention}.q_proj.{kind}", q, paired),
                    Part(f"{attention}.k_proj.{kind}", k, paired),
                    Part(f"{attention}.v_proj.{kind}", v, _as_it_is),
                ],
            )
        yield from _whole(f"{ours}.attn.to_out", f"{attention}.o_proj", bias=family.out_bias(config))
        if family.has_head_norms:
            for norm in ("q_norm", "k_norm"):
                yield f"{ours}.attn.{norm}.weight", [Part(f"{attention}.{norm}.weight", slice(None), paired)]
        has_bias = bool(getattr(config, "mlp_bias", False))
        for kind in ("weight", "bias")[: 1 + has_bias]:
            yield (
                f"{ours}.ff.to_hidden.{kind}",
                [
                    Part(f"{theirs}.mlp.up_proj.{kind}", slice(0, hidden), _as_it_is),
                    Part(f"{theirs}.mlp.gate_proj.{kind}", slice(hidden, 2 * hidden), _as_it_is),
                ],
            )
        yield from _whole(f"{ours}.ff.to_out", f"{theirs}.mlp.down_proj", bias=has_bias)
        yield from _whole(f"{ours}.attn_norm", f"{theirs}.input_layernorm")
        yield from _whole(f"{ours}.ff_norm", f"{theirs}.post_attention_layernorm")
    yield from _whole("final_norm", "model.norm")


def _whole(ours: str, theirs: str, *, bias: bool = False) -> Iterator[tuple[str, list[Part]]]:
    for kind in ("weight", "bias")[: 1 + bias]:
        yield f"{ours}.{kind}", [Part(f"{theirs}.{kind}", slice(None), _as_it_is)]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Paired(NamedTuple):
    """Channels of a head whose pairs lie half a head apart, as neighbours: that is how the `Transformer` rotates them.

    Queries and keys are changed alike, so that their products stay the same.
    """

    width: int

    def __call__(self, rows: Shaped[Tensor, "h_e ..."]) -> Shaped[Tensor, "h_e ..."]:
        return rows.unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten(0, 2)
