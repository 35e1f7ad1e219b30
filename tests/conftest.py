"""What every test gets: a fixed number of threads and a fixed seed."""

import os
import random

import pytest
import torch

# Under pytest-xdist the workers share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)
