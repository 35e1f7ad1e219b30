"""The scripts at the root, run as a user runs them. What they must reach is what the README says they do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", script, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


def percentage(pattern: str, output: str) -> float:
    return float(re.search(pattern, output).group(1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_common_options(script):
    output = run(script, "--help")
    assert all(option in output for option in ("--steps", "--seed", "--device", "--results"))


@pytest.mark.slow
def test_toy_lowers_every_loss(tmp_path):
    output = run("train_toy.py", "--steps", 150, "--results", tmp_path)
    falls = re.findall(r": ([\d.]+) over the first tenth of the steps, ([\d.]+) over the last", output)
    assert len(falls) == 3
    assert all(float(last) < 0.7 * float(first) for first, last in falls)
    assert len(list(tmp_path.glob("toy-*/losses.png"))) == 1


@pytest.mark.slow
def test_text_learns_something(tmp_path):
    output = run("train_text_only.py", "--steps", 60, "--results", tmp_path, "--write", 20)
    assert percentage(r"validation: ([\d.]+) bits per byte", output) < 5


@pytest.mark.slow
def test_digits_are_drawn_as_asked_and_named_correctly(tmp_path):
    output = run("train_mnist.py", "--results", tmp_path)
    assert percentage(r"judge: recognises ([\d.]+)%", output) >= 98
    assert percentage(r"drawing: ([\d.]+)%", output) >= 98
    assert percentage(r"captioning: ([\d.]+)%", output) >= 95
    assert len(list(tmp_path.glob("digits-both-*/drawings.png"))) == 1
