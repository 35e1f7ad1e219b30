"""How many graphs `torch.compile` may make of a function that serves all models."""

from inspect import signature
from typing import Any

import torch

MOST_GRAPHS = 256  # of all models together: with gradients, skips, spans, ... or without; torch's own limit is 8


def many_graphs() -> dict[str, Any]:
    """The option of `torch.compile` for a function of all models. A function that is called in more ways than its limit
    is no longer compiled at all: attention would make all `n * n` logits, and a step of decoding run as it is.
    """
    if "recompile_limit" in signature(torch.compile).parameters:
        return {"recompile_limit": MOST_GRAPHS}
    config: Any = torch._dynamo.config  # of all functions of the process, in older versions
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    return {}
