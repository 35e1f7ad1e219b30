"""How many operations a step dispatches: on a GPU, and for small models everywhere, that is what it costs.

A tighter limit than these is a gain: lower them. What torch calls inside of an operator is not counted: `rms_norm`
would be one here, and is nine on a CPU, where the layers have four in its place.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_pytorch import Transfusion

TEXT = dict(plan=[("text", 1000)])
IMAGE = dict(plan=[0], modality_steps=50, cfg_scale=3.0, odeint_kwargs=dict(method="euler"))
LIMITS = {  # per layer; besides; besides, for each row
    ("text", "adaptive"): (36, 36, 0),
    ("text", "rms"): (40, 35, 0),
    ("image", "adaptive"): (40, 31, 1),
}


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.counts[str(operation)] += 1
        return operation(*arguments, **(options or {}))


def operations_of_a_step(depth: int, rows: int, norm: str, options: dict) -> int:
    """Of the engine, views included."""
    torch.manual_seed(0)
    model = Transfusion(
        num_text_tokens=200,
        dim_latent=4,
        modality_default_shape=(4, 4),
        time_conditioning="norms" if norm == "adaptive" else "added",
        transformer=dict(dim=64, depth=depth, norm=norm),
    ).eval()
    engine = model.create_engine()
    requests = [
        engine.submit(torch.randint(0, 200, (5 + i,)), max_length=1000, listen=False, **options) for i in range(rows)
    ]
    for _ in range(6):
        engine.step()
    with CountOperations() as counter:
        engine.step()
    assert not any(request.is_done for request in requests)
    return sum(counter.counts.values())


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("kind", "norm"), LIMITS)
def test_step_dispatches_few_operations(kind, norm, rows):
    options = TEXT if kind == "text" else IMAGE
    shallow, deep = (operations_of_a_step(depth, rows, norm, options) for depth in (2, 4))
    per_layer = (deep - shallow) / 2
    besides = shallow - 2 * per_layer
    most_per_layer, most_besides, most_of_rows = LIMITS[kind, norm]
    assert 20 < per_layer <= most_per_layer
    assert 10 < besides <= most_besides + most_of_rows * rows
