"""Adapters of PEFT around a model, which are saved by themselves."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

INSIDE = "base_model.model."  # where a PeftModel keeps the model that it adapts


def is_adapted(model: Any) -> bool:
    """Whether a model is a `PeftModel`."""
    peft = sys.modules.get("peft")  # whoever has made one has imported it
    return peft is not None and isinstance(model, peft.PeftModel)


def inner_model(model: Any) -> Any:
    """The `Transfusion` that a `PeftModel` adapts, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def save_adapter(
    model: Any, folder: str | Path, state: Mapping[str, Tensor], *, is_main: bool = True, **options: Any
) -> None:
    """Saves the adapter of a `PeftModel` with the numbers of `state`, the whole `state_dict` of a model inside of it,
    such as its average. What PEFT saves with an adapter (rows of new tokens, `modules_to_save`) comes from there too.
    Only the main process writes.

    Raises `TypeError` for any options: an adapter has neither card nor tokenizer of ours.
    """
    if options:
        raise TypeError(
            f"an adapter is saved without {', '.join(options)}: these belong to the model that it adapts. Save that "
            "with save_pretrained, or merge the adapter into it first (merge_and_unload)"
        )
    if not is_main:
        return
    named = {INSIDE + name: tensor for name, tensor in state.items()}
    # PEFT would look for embeddings of transformers that were resized, on the hub if need be
    model.save_pretrained(str(folder), state_dict=named, save_embedding_layers=False)
