"""`README.md` beside a saved model: what it is, how it was trained, how to use it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor

from transfusion_pytorch.saving.configuration import LIBRARY, needed_modules

CARD_FILE = "README.md"
MARK = "<!-- written by transfusion_pytorch: save_pretrained replaces this file as long as this line is in it -->"


@dataclass(frozen=True)
class ModelCard:
    """What a user says of a model. Everything may be left out.

    - `title`, `description`
    - `training_data`: what it was trained on, in words; `steps`: optimizer steps
    - `figures`: results by their name, `{"FID": 12.3, "bits per byte": 2.27}`
    - `license`: such as "mit"; `tags`, `datasets`, `language`: for the search on the hub
    - `pipeline_tag`: one of the hub's tasks
    - `how_to_use`: Markdown in place of the code that loads and samples
    """

    title: str = "Transfusion model"
    description: str = ""
    training_data: str = ""
    steps: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    pipeline_tag: str = "any-to-any"
    how_to_use: str | None = None

    def __post_init__(self):
        if not isinstance(self.figures, Mapping):
            raise TypeError(f"figures must be a dict of results by their name, got {type(self.figures).__name__}")
        for name in ("tags", "datasets", "language"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a list of strings, got the string {getattr(self, name)!r}")


def is_ours(path: Path) -> bool:
    """Whether a README may be replaced: there is none, or it is one of ours that nobody has made their own."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def render(card: ModelCard, config: Mapping[str, Any], *, source: str, num_parameters: int, example_call: str) -> str:
    """A card as Markdown with YAML in front. `source` is where the model can be loaded from, `example_call` a line of
    code that uses it.
    """
    data = huggingface_hub.ModelCardData(  # loaded here: it takes a quarter of a second
        library_name=LIBRARY,
        pipeline_tag=card.pipeline_tag,
        tags=list(dict.fromkeys(["transfusion", "flow-matching", *card.tags])),
        license=card.license,
        datasets=list(card.datasets) or None,
        language=list(card.language) or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# {card.title}",
        card.description,
        "## Model\n\n" + _table("", "", _facts(config["arguments"], num_parameters)),
        _training(card),
        "## Figures\n\n" + _table("figure", "value", card.figures) if card.figures else "",
        "## How to use it\n\n" + (_usage(config, source, example_call) if card.how_to_use is None else card.how_to_use),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _training(card: ModelCard) -> str:
    lines = [card.training_data, f"Optimizer steps: {card.steps:,}" if card.steps is not None else ""]
    text = "\n\n".join(line for line in lines if line)
    return f"## Training\n\n{text}" if text else ""


def _facts(arguments: Mapping[str, Any], num_parameters: int) -> dict[str, Any]:
    """What a reader wants to know of the configuration first."""
    facts: dict[str, Any] = {"parameters": f"{num_parameters:,}"}
    for name in ("num_text_tokens", "depth", "heads", "dim_modalities", "dim_outs"):
        if name in arguments:
            facts[name.removeprefix("num_").replace("_", " ")] = arguments[name]
    trunk = arguments.get("transformer")
    if isinstance(trunk, dict):
        built = trunk.get("arguments", {})
        facts["transformer"] = ", ".join(f"{name} {built[name]}" for name in ("dim", "depth", "heads") if name in built)
        facts["transformer"] = facts["transformer"] or trunk.get("module", "")
    channels: Any = arguments.get("dim_latent")
    shapes: Any = arguments.get("modality_default_shape")
    if isinstance(channels, list):
        is_one = shapes is None or all(isinstance(size, int) for size in shapes)  # of all modalities
        shapes = [shapes] * len(channels) if is_one else shapes
        for i, (count, shape) in enumerate(zip(channels, shapes, strict=True)):
            size = "" if shape is None else f", default shape {tuple(shape)}"
            facts[f"modality {i}"] = f"{count} channels{size}"
    return {name: fact for name, fact in facts.items() if fact is not None}


def _table(name: str, value: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |", "|---|---|", *(f"| {_cell(key)} | {_cell(rows[key])} |" for key in rows)]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, (bool, Integral)):
        value = f"{float(value):.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _usage(config: Mapping[str, Any], source: str, example_call: str) -> str:
    """Code that loads the model and calls it, with what has to be handed over."""
    needed = needed_modules(config["arguments"])
    names = dict.fromkeys(line.partition(" ")[0].rstrip(":") for line in needed)
    given = "".join(f", {name}=..." for name in names)
    hint = "".join(f"# - {line}\n" for line in needed)
    hint = f"# hand over, built as it was for training:\n{hint}" if needed else ""
    class_name = config["class"].rpartition(".")[2]
    lines = f"model = {class_name}.from_pretrained({source!r}{given})\n{example_call}"
    module = config["class"].rpartition(".")[0]
    if module.partition(".")[0] == LIBRARY:  # from where users import it
        is_at_top = hasattr(sys.modules[LIBRARY], class_name)
        module = LIBRARY if is_at_top else ".".join(module.split(".")[:2])
    return f"```python\nfrom {module} import {class_name}\n\n{hint}{lines}\n```"
