"""Versions: the oldest that are tested are the lower bounds of pyproject.toml, and the newest are within them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REQUIREMENT = re.compile(r'"([a-z-]+)>=([\d.]+)"')
PINNED = re.compile(r"([a-z-]+)==([\d.]+)")
# tools; trackio and what the extra `pretrained` adds need a newer huggingface-hub than the oldest environment has; the
# environment of `train_policy.py` has no other release
NOT_IN_THE_OLDEST = {"hatchling", "pytest-xdist", "ruff", "pyright", "pre-commit", "trackio"}
NOT_IN_THE_OLDEST |= {"transformers", "diffusers", "gguf", "gym-pusht"}


def pinned(file: str) -> dict[str, tuple[int, ...]]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {found[1]: numbers(found[2]) for line in lines if (found := PINNED.match(line.lower()))}


def bounds() -> dict[str, tuple[int, ...]]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = [(name, numbers(version)) for name, version in REQUIREMENT.findall(text)]
    assert len(set(found)) == len(dict(found)), "a package has one lower bound, wherever it is named"
    return dict(found)


def numbers(version: str) -> tuple[int, ...]:
    """ "0.30" -> (0, 30, 0)"""
    parts = tuple(map(int, version.split(".")))
    return parts + (0,) * (3 - len(parts))


def test_every_lower_bound_is_tested():
    oldest, lowest = pinned("constraints-oldest.txt"), bounds()
    assert {"torch", "einops", "pytest", "accelerate"} <= set(lowest)
    assert {name: oldest.get(name) for name in lowest if name not in NOT_IN_THE_OLDEST} == {
        name: version for name, version in lowest.items() if name not in NOT_IN_THE_OLDEST
    }


@pytest.mark.parametrize("name", sorted(bounds()))
def test_what_was_last_tested_is_allowed(name):
    newest = pinned("constraints.txt")
    if name != "hatchling":  # builds the package, and is installed by pip
        assert newest[name] >= bounds()[name]
