"""How a layer is called: as it is, computed again in the backward pass, compiled, or both.

One function is compiled for all layers, so that those of one kind share a graph: what differs between layers (weights)
and between batches (tokens, intervals, tables of blocks, modulation index) are inputs of the graph. Batches that are
padded to one number of tokens and of spans need no other graph. The compiled functions are kept here and not in the
modules, which can be copied and pickled.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transfusion_pytorch.network.attend import AttentionPlan, DenseAttention, FlexAttention
from transfusion_pytorch.network.experts import RoutedAttention
from transfusion_pytorch.network.graphs import many_graphs
from transfusion_pytorch.network.shortcuts import forces_plain_formulas

Checkpointing = bool | Literal["selective"]

aten = torch.ops.aten
ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
# what selective checkpoints keep: products, and what attention gives back
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    torch.ops.higher_order.flex_attention,
    *(getattr(aten, f"_scaled_dot_product_{name}").default for name in ATTENTION),
}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


LayerCall = Callable[..., tuple[Any, Any]]  # the residual streams and values of a layer, in parts if it is untied


def layer_caller(
    plan: AttentionPlan | RoutedAttention, checkpointing: Checkpointing, compile_options: Mapping[str, Any] | None
) -> LayerCall:
    """A function of a layer and its inputs. `compile_options` are those of `torch.compile`, None not to compile.

    Compiled are layers whose plan covers the whole stream by tensors alone.
    """
    plain = forces_plain_formulas()
    call: LayerCall = _call_layer
    shared = plan.plan if isinstance(plan, RoutedAttention) else plan
    if compile_options is not None and isinstance(shared, FlexAttention | DenseAttention) and not plain:
        call = compiled(_call_layer, compile_options)
    return partial(call, torch.is_grad_enabled() and not plain and checkpointing)


def _call_layer(checkpointing: Checkpointing, layer: nn.Module, *inputs: Any) -> tuple[Any, Any]:
    if not checkpointing:
        return layer(*inputs)
    contexts: dict[str, Any] = dict(context_fn=_selective_contexts) if checkpointing == "selective" else {}
    return checkpoint(layer, *inputs, use_reentrant=False, **contexts)


def compiled(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` of a layer compiled once, for all layers of all models with the same `options`."""
    key = function, repr(sorted(options.items()))
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(function, **(many_graphs() | dict(options)))
    return _COMPILED[key]


_COMPILED: dict[Any, Callable[..., Any]] = {}
