"""Freed memory is kept for the next step. In processes of their own: what a process has freed before counts too."""

import platform
import subprocess
import sys

import pytest

STEPS = """
{first}
import resource
import torch
from torch import nn

torch.set_num_threads(1)
layers = [layer for _ in range(4) for layer in (nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))]
model, x = nn.Sequential(*layers), torch.randn(512, 256)

def step():
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(4):
    step()
before = faults()
for _ in range(8):
    step()
print((faults() - before) / 8)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_a_step_finds_the_memory_that_the_last_one_has_freed():
    """Page faults of a step: some 2,500 (10 MiB) without."""
    command = [sys.executable, "-c", STEPS.format(first="import transfusion_pytorch.network.cpu")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(made) < 1000
