"""Every weight is used through its module: hooks, adapters of fine-tuning and quantised weights are not passed by."""

import copy
import logging
import warnings

import pytest
import torch
from network_streams import perturb, stream
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from transfusion_pytorch.network.cpu import products
from transfusion_pytorch.network.linear import Linear
from transfusion_pytorch.network.norms import RMSNorm
from transfusion_pytorch.network.shortcuts import plain_formulas
from transfusion_pytorch.network.transformer import Transformer

DIM = 32
MADE = stream("ttAAtBB", "CCt", "t")


def make(**options) -> Transformer:
    torch.manual_seed(0)
    options = dict(depth=4, heads=2, dim_head=16, kv_heads=1, use_value_residual=True) | options
    return perturb(Transformer(DIM, **options), 0.1)


def run(model):
    torch.manual_seed(1)
    x, condition = torch.randn(len(MADE.span), DIM), torch.randn(3, DIM)
    return model(x, **MADE.arguments(condition))


def test_a_hook_on_any_module_is_called():
    model, called = make(), set()
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.add(names[module]))
    hooked = run(model)
    own = {name for module, name in names.items() if next(module.parameters(recurse=False), None) is not None}
    assert own - called == set()
    torch.testing.assert_close(hooked, run(make()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_on_all_modules_is_called(kind):
    model, called = make(), set()
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    with register(lambda module, *_: called.add(module)):
        hooked = run(model)
    assert {module for module in model.modules() if isinstance(module, Linear)} <= called
    torch.testing.assert_close(hooked, run(make()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Linear, RMSNorm])
def test_a_parametrised_weight_is_used(kind):
    """Here twice the weight that is stored."""
    model, doubled = make(), make()

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for module, other in zip(list(model.modules()), list(doubled.modules()), strict=True):
        if type(module) is kind:
            register_parametrization(module, "weight", Twice())
            other.weight.data *= 2
    torch.testing.assert_close(run(model), run(doubled), rtol=1e-4, atol=1e-4)


class LoRA(nn.Module):
    """A frozen layer and a correction of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base)
        merged.weight.data += self.up.weight.data @ self.down.weight.data
        return merged


def replace(model, kind, change):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind) and not isinstance(module, LoRA):
                setattr(module, name, change(child))
    return model


@pytest.mark.parametrize("emulated", [True, False])
def test_adapters_of_all_linear_layers_are_the_merged_model_and_learn(emulated, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", [torch.bfloat16] if emulated else [])
    model = replace(make(), nn.Linear, LoRA)
    out = run(model)
    out.square().sum().backward()
    corrections = [module for module in model.modules() if isinstance(module, LoRA)]
    assert len(corrections) == 4 * 7 + 3 + 2 + 1
    assert all(module.up.weight.grad.any() and module.down.weight.grad.any() for module in corrections)
    merged = replace(copy.deepcopy(model), LoRA, LoRA.merged)
    assert not any(isinstance(module, LoRA) for module in merged.modules())
    torch.testing.assert_close(out, run(merged), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (run(model) - out).norm() < 0.1 * out.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_peft_reaches_all_linear_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    model = make()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = peft.LoraConfig(r=2, target_modules=sorted(linear), init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    out = run(adapted)
    assert not torch.allclose(out, run(model), atol=1e-3)
    out.square().sum().backward()
    learns = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(learns) == 2 * len(linear)
    assert all(parameter.grad.any() for parameter in adapted.parameters() if parameter.requires_grad)
    torch.testing.assert_close(run(adapted.merge_and_unload()), out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantised_weights_are_those_that_they_stand_for(emulated, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", [torch.bfloat16] if emulated else [])
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    model = make().requires_grad_(False)
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    dense = copy.deepcopy(model)
    for ours, theirs in zip(dense.modules(), quantised.modules(), strict=True):
        if isinstance(ours, nn.Linear):
            assert type(theirs.weight) is not nn.Parameter
            ours.weight.data.copy_(theirs.weight.dequantize())
    torch.testing.assert_close(run(quantised), run(dense), rtol=1e-3, atol=1e-3)
    assert (run(quantised) - run(model)).abs().max() > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert (run(quantised) - run(dense)).norm() < 0.1 * run(dense).norm()


def test_plain_formulas_call_every_module_too():
    """And give what the short cuts give."""
    model = make()
    with plain_formulas():
        plain = run(model)
    torch.testing.assert_close(plain, run(model), rtol=1e-4, atol=1e-5)
