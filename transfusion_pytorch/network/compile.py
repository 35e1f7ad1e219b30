"""How a layer is called: as it is, computed again in the backward pass, compiled, or both.

One function is compiled for all layers, so that those of one kind share a graph: what differs between layers (weights)
and between batches (tokens, intervals, tables of blocks, modulation index) are inputs of the graph. Batches that are
padded to one number of tokens and of spans need no other graph. The compiled functions are kept here and not in the
modules, which can be copied and pickled.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transfusion_pytorch.network.attend import AttentionPlan, DenseAttention, FlexAttention

Checkpointing = bool | Literal["selective"]
LayerCall = Callable[..., tuple[Tensor, Tensor | None]]
MOST_GRAPHS = (
    256  # of one function for all models: with and without gradients, skips, spans, ... torch's own limit is 8
)

aten = torch.ops.aten
# what selective checkpoints keep: products, and what attention gives back
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def call(layer: torch.nn.Module, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    return layer(*inputs)


def call_with_checkpoint(layer: torch.nn.Module, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    return checkpoint(layer, *inputs, use_reentrant=False)


def call_with_selective_checkpoint(layer: torch.nn.Module, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=_selective_contexts)


CALLS: dict[Checkpointing, LayerCall] = {
    False: call,
    True: call_with_checkpoint,
    "selective": call_with_selective_checkpoint,
}


def compiles(plan: AttentionPlan) -> bool:
    """Whether compiled layers are made for a plan: those over whole streams by tensors alone."""
    return isinstance(plan, FlexAttention | DenseAttention)


def layer_call(checkpointing: Checkpointing, compile_options: Mapping[str, Any] | None) -> LayerCall:
    """What calls a layer; `compile_options` are those of `torch.compile`, None not to compile."""
    function = CALLS[checkpointing]
    if compile_options is None:
        return function
    key = checkpointing, repr(sorted(compile_options.items()))
    if key not in _COMPILED:
        limit = {"recompile_limit": MOST_GRAPHS} if "recompile_limit" in signature(torch.compile).parameters else {}
        _COMPILED[key] = torch.compile(function, **limit | dict(compile_options))
    return _COMPILED[key]


_COMPILED: dict[tuple[Checkpointing, str], LayerCall] = {}
