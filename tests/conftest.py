"""What every test gets: one thread and a fixed seed."""

import random

import pytest
import torch

# The tensors are tiny: a second thread only waits for the first, twenty times as long where the cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)
