"""Where every source of random numbers stands, as tensors and JSON."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def random_states(**generators: torch.Generator) -> dict[str, Any]:
    """The states of Python's `random`, NumPy (if it is imported), torch on the CPU, all CUDA devices and MPS, and of
    `generators` by their names. Tensors and JSON, no pickle; see `set_random_states`.
    """
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    states["generators"] = {name: generator.get_state() for name, generator in generators.items()}
    return states


def set_random_states(states: Mapping[str, Any], **generators: torch.Generator) -> None:
    """Puts every source where `random_states` found it.

    Sources that this machine lacks (CUDA, MPS) are left out: a run that moves to another kind of device draws other
    numbers there anyway. Raises `ValueError` for a generator without a state.
    """
    if missing := generators.keys() - states["generators"].keys():
        raise ValueError(f"no random state was saved for {', '.join(sorted(missing))}")
    python = states["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].cpu())
    for name, generator in generators.items():
        generator.set_state(states["generators"][name].cpu())
