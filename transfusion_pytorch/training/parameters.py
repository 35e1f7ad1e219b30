"""Parameters by what an optimizer should do with them, and their initial values."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def hidden_matrices(trunk: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear layers of a trunk, for the Muon optimizer; the rest goes to AdamW."""
    weights = [module.weight for module in trunk.modules() if isinstance(module, nn.Linear)]
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def parameter_groups(
    model: nn.Module, *, weight_decay: float, experts: Sequence[Sequence[nn.Parameter]] = ()
) -> list[dict[str, Any]]:
    """Trained parameters for AdamW: matrices and embeddings decay, biases, gains and gates (up to one axis) do not.

    Norms' gains are offsets from 1, and would decay towards it. With the parameters of each of the `experts`, every
    group is of one expert, whose number is its `expert`, or of what they share (None).
    """
    owners = {parameter: i for i, own in enumerate(experts) for parameter in own}
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        groups.setdefault((owners.get(parameter), parameter.ndim > 1), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] is not None, key[0], not key[1]))
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0}
        | ({"expert": key[0]} if experts else {})
        for key in order
    ]


def reset_parameters(model: nn.Module, *, but: set[nn.Module]) -> None:
    """Initial values for every module that can set its own, inner ones first; those in `but` are left alone."""
    skipped = {model} | {inner for module in but for inner in module.modules()}
    for module in reversed(list(model.modules())):
        if module not in skipped and callable(reset := getattr(module, "reset_parameters", None)):
            reset()
