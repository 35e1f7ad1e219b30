"""Workloads, for either package: what to build, what to run, and how to see that the work was done.

The two packages share most names. Where they differ, this file says so, and nothing else does:

- `modality_steps` are intervals here and points of time there, so the peer gets one more;
- axial positions are on here where the number of axes is known, and off there, so both are told to have them;
- width, depth, heads and their size are equal. All else is each package's own default, so the numbers of parameters
  differ (results give them): the peer projects its adaptive norms from a condition four times as wide, mixes all
  earlier layers before each layer, bounds attention logits with tanh, and has 128 characters to write shapes with.

Prompts, data and weights come from fixed seeds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Job:
    """A workload, ready to run. `check` says what the last run made, for both packages to agree on."""

    model: nn.Module
    run: Callable[[], Any]
    check: Callable[[], dict[str, Any]] | None = None
    note: str = ""


@dataclass(frozen=True)
class Library:
    """One of the two packages: `"ours"`, the same `"compiled"`, or `"peer"`; under autocast if `bf16`."""

    package: str
    bf16: bool = False

    @property
    def is_ours(self) -> bool:
        return self.package != "peer"

    def build(self, *, num_text: int, transformer: dict, latents=(), shapes=()) -> nn.Module:
        """A model of one modality for each of `latents` (channels) and `shapes` (default shapes)."""
        from transfusion_pytorch import Transfusion

        torch.manual_seed(0)
        modalities = dict(dim_latent=tuple(latents), modality_default_shape=tuple(shapes), add_pos_emb=True)
        model = Transfusion(num_text_tokens=num_text, transformer=transformer, **(modalities if latents else {}))
        if self.package == "compiled":
            model.compile()
        return model

    def precision(self) -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def steps(self, intervals: int) -> int:
        return intervals if self.is_ours else intervals + 1

    def logit_layer(self, model: nn.Module) -> nn.Linear:
        return model.to_logits if self.is_ours else model.to_text_logits

    def embedding(self, model: nn.Module) -> nn.Embedding:
        return model.text_embedding if self.is_ours else model.text_embed


def make_job(package: str, workload: str, *, quick: bool, bf16: bool) -> Job:
    """The workload of that name, with tiny sizes if `quick`, under autocast if `bf16`."""
    from generation_jobs import GENERATION
    from training_jobs import training_job

    torch.manual_seed(1)
    library = Library(package, bf16)
    if workload in GENERATION:
        return GENERATION[workload](library, quick)
    return training_job(library, workload, quick)


def studies() -> dict[str, Callable]:
    """What is measured by itself, not compared."""
    from growth import decode_growth
    from leak import leak

    return {"growth": decode_growth, "leak": leak}


def parts_of(sample: Any) -> list[Any]:
    """The parts of a returned sample: ids, or `(type, latents)`, whatever the package wraps them in."""
    return [part if isinstance(part, Tensor) else (int(part[0]), part[1]) for part in sample]
