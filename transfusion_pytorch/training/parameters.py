"""Parameters by what an optimizer should do with them, and their initial values."""

from typing import Any

from torch import nn


def hidden_matrices(trunk: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear layers of a trunk, for the Muon optimizer; the rest goes to AdamW."""
    weights = [module.weight for module in trunk.modules() if isinstance(module, nn.Linear)]
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters for AdamW: matrices and embeddings decay, biases, gains and gates (up to one axis) do not.

    Norms' gains are offsets from 1, and would decay towards it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = ((weight_decay, [p for p in trained if p.ndim > 1]), (0.0, [p for p in trained if p.ndim < 2]))
    return [{"params": members, "weight_decay": decay} for decay, members in groups if members]


def reset_parameters(model: nn.Module, *, but: set[nn.Module]) -> None:
    """Initial values for every module that can set its own, inner ones first; those in `but` are left alone."""
    skipped = {model} | {inner for module in but for inner in module.modules()}
    for module in reversed(list(model.modules())):
        if module not in skipped and callable(reset := getattr(module, "reset_parameters", None)):
            reset()
