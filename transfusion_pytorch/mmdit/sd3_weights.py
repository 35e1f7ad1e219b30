"""The weights of a `diffusers.SD3Transformer2DModel` under the names of an `SD3MMDiT`, and the sizes of that.

What has to be put in another order:

| diffusers | here |
|---|---|
| `to_q`, `to_k`, `to_v` are layers of their own | one layer makes all three |
| the last norm, and that of the last text block: (scale, shift) | (shift, scale) |
| times: cosines, then sines | sines, then cosines |
| root mean square norms multiply by `weight` | by `1 + weight` |
| the last text block makes queries that nobody uses | it makes none |
"""

from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

IMAGE, TEXT = "modalities.0", "modalities.1"
DIM_HEAD = 64  # of all SD3 models so far
NORM_OF = {"to_q": "norm_q", "to_k": "norm_k", "add_q_proj": "norm_added_q", "add_k_proj": "norm_added_k"}


class Weights:
    """A state that notes what was taken from it."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state, self.taken = state, set[str]()

    def take(self, name: str) -> Tensor:
        if name not in self.state:
            expected = "expected the names of a diffusers.SD3Transformer2DModel"
            raise ValueError(f"the state has no {name}: {expected}, got {_some(self.state)}")
        self.taken.add(name)
        return self.state[name].detach()

    def layer(self, name: str) -> dict[str, Tensor]:
        return {part: self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def check_all_taken(self) -> None:
        if left := [name for name in self.state if name not in self.taken]:
            raise ValueError(f"the state has weights that an SD3 transformer has not: {_some(left)}")


def with_norm_weights(state: Mapping[str, Tensor], dim_head: int | None, qk_norm: str | None) -> Mapping[str, Tensor]:
    """The state with weights for norms of queries and keys that have none: with ones and zeros a layer norm is the
    same as without. `qk_norm` is that of diffusers. Raises `ValueError` for a norm that SD3 does not have.
    """
    if qk_norm not in (None, "rms_norm", "layer_norm", "fp32_layer_norm"):
        raise ValueError(f"qk_norm must be rms_norm, layer_norm or fp32_layer_norm, or left out, got {qk_norm!r}")
    if qk_norm != "fp32_layer_norm":
        return state
    norms = {}
    for name, weight in state.items():
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        if norm := NORM_OF.get(layer):
            norms[f"{parent}.{norm}.weight"] = weight.new_ones(dim_head or DIM_HEAD)
            norms[f"{parent}.{norm}.bias"] = weight.new_zeros(dim_head or DIM_HEAD)
    if known := [name for name in norms if name in state]:
        raise ValueError(f"qk_norm: fp32_layer_norm has no weights, and the state has {known[0]}; leave qk_norm out")
    return {**state, **norms}


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sizes_of(state: Mapping[str, Tensor], dim_head: int | None) -> dict[str, Any]:
    """The arguments of the `SD3MMDiT` that has these weights."""
    weights = Weights(state)
    shape = {
        name: tuple(weights.take(f"{name}.weight").shape)
        for name in (
            "pos_embed.proj",
            "context_embedder",
            "proj_out",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.text_embedder.linear_1",
            "transformer_blocks.0.ff.net.0.proj",
        )
    }
    dim, channels, patch_size, _ = shape["pos_embed.proj"]
    norm = "transformer_blocks.0.attn.norm_q"
    qk_norm = "none" if f"{norm}.weight" not in state else "layer" if f"{norm}.bias" in state else "rms"
    if dim_head is None:
        dim_head = DIM_HEAD if qk_norm == "none" else len(state[f"{norm}.weight"])
    if dim % dim_head:
        raise ValueError(f"dim_head: heads of {dim_head} channels do not divide the width {dim}; give dim_head")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    return dict(
        depth=depth,
        dim_head=dim_head,
        heads=dim // dim_head,
        channels=channels,
        out_channels=shape["proj_out"][0] // patch_size**2,
        patch_size=patch_size,
        dim_text=shape["context_embedder"][1],
        dim_pooled=shape["time_text_embed.text_embedder.linear_1"][1],
        table_size=isqrt(weights.take("pos_embed.pos_embed").shape[1]),
        ff_mult=shape["transformer_blocks.0.ff.net.0.proj"][0] / dim,
        timestep_embed_dim=shape["time_text_embed.timestep_embedder.linear_1"][1],
        qk_norm=qk_norm,
        dual_attention_layers=[i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in state],
    )


def converted(state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of all weights, in our order and under our names."""
    weights, depth = Weights(state), sizes["depth"]
    ours = dict(_outside_of_blocks(weights))
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for name, tensor in _block(weights, block, is_last=i == depth - 1, is_dual=i in sizes["dual_attention_layers"]):
            ours[f"mmdit.blocks.{i}.{name}"] = tensor
    weights.check_all_taken()
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in ours.items()}


def _outside_of_blocks(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    table = weights.take("pos_embed.pos_embed")[0]
    yield "position_table", table.unflatten(0, (isqrt(len(table)), -1))
    yield from _named("to_patches", weights.layer("pos_embed.proj"))
    yield from _named("to_text", weights.layer("context_embedder"))
    times, pooled = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
    first = weights.layer(f"{times}.linear_1")
    first["weight"] = first["weight"].roll(first["weight"].shape[1] // 2, dims=1)
    yield from _named("mmdit.embed_times.0.layers.0", first)
    yield from _named("mmdit.embed_times.0.layers.2", weights.layer(f"{times}.linear_2"))
    yield from _named("mmdit.embed_pooled.0", weights.layer(f"{pooled}.linear_1"))
    yield from _named("mmdit.embed_pooled.2", weights.layer(f"{pooled}.linear_2"))
    yield from _named("mmdit.finals.0.norm.to_modulation", _shift_first(weights.layer("norm_out.linear")))
    yield from _named("mmdit.finals.0.to_out", weights.layer("proj_out"))


def _block(weights: Weights, name: str, *, is_last: bool, is_dual: bool) -> Iterator[tuple[str, Tensor]]:
    attn = f"{name}.attn"
    yield from _heads(weights, f"attn.{IMAGE}", [f"{attn}.to_{part}" for part in "qkv"], f"{attn}.norm_")
    yield from _named(f"attn.{IMAGE}.to_out", weights.layer(f"{attn}.to_out.0"))
    text = [f"{attn}.add_{part}_proj" for part in "qkv"]
    yield from _heads(weights, f"attn.{TEXT}", text, f"{attn}.norm_added_", is_pre_only=is_last)
    yield from _named(f"{IMAGE}.to_modulation", weights.layer(f"{name}.norm1.linear"))
    yield from _feedforward(weights, f"{IMAGE}.ff", f"{name}.ff")
    if is_dual:
        dual = f"{IMAGE}.dual_attn.modalities.0"
        yield from _heads(weights, dual, [f"{name}.attn2.to_{part}" for part in "qkv"], f"{name}.attn2.norm_")
        yield from _named(f"{dual}.to_out", weights.layer(f"{name}.attn2.to_out.0"))
    norm = weights.layer(f"{name}.norm1_context.linear")
    if is_last:
        yield from _named(f"{TEXT}.to_modulation", _shift_first(norm))
        return
    yield from _named(f"attn.{TEXT}.to_out", weights.layer(f"{attn}.to_add_out"))
    yield from _named(f"{TEXT}.to_modulation", norm)
    yield from _feedforward(weights, f"{TEXT}.ff", f"{name}.ff_context")


def _heads(
    weights: Weights, ours: str, layers: list[str], norm: str, *, is_pre_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Projections and norms of queries, keys and values; where `is_pre_only`, queries are taken and dropped."""
    parts = [weights.layer(layer) for layer in layers][int(is_pre_only) :]
    for part in ("weight", "bias"):
        yield f"{ours}.to_qkv.{part}", torch.cat([layer[part] for layer in parts])
    for which in "qk":
        name = f"{norm}{which}"
        if f"{name}.weight" not in weights.state:
            continue
        is_rms = f"{name}.bias" not in weights.state
        tensors = {"weight": weights.take(f"{name}.weight") - 1} if is_rms else weights.layer(name)
        if not (is_pre_only and which == "q"):
            yield from _named(f"{ours}.{which}_norm", tensors)


def _feedforward(weights: Weights, ours: str, name: str) -> Iterator[tuple[str, Tensor]]:
    yield from _named(f"{ours}.to_hidden", weights.layer(f"{name}.net.0.proj"))
    yield from _named(f"{ours}.to_out", weights.layer(f"{name}.net.2"))


def _shift_first(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """(scale, shift) as (shift, scale)."""
    return {part: tensor.roll(len(tensor) // 2, dims=0) for part, tensor in layer.items()}


def _named(name: str, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"{name}.{part}", tensor) for part, tensor in parts.items())
