"""Cross-entropy in chunks against all logits at once, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfusion_pytorch import Transfusion
from transfusion_pytorch.network.cpu import products
from transfusion_pytorch.network.vocabulary_layers import TextEmbedding, TextLogits, TiedLogits
from transfusion_pytorch.training.cross_entropy import (
    cross_entropy_per_target,
    logits_at_once,
    summed_cross_entropy,
)

WORDS, DIM = 50, 6


def inputs(n: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, DIM, generator=generator, dtype=dtype).requires_grad_()
    to_logits = nn.Linear(DIM, WORDS, bias=False, dtype=dtype)
    return x, to_logits, torch.randint(0, WORDS, (n,), generator=generator)


@pytest.mark.parametrize("n", [1, 16, 17, 100])
@pytest.mark.parametrize("chunk", [1, 16 * WORDS, 30 * WORDS, 99 * WORDS])
def test_chunks_are_the_whole(n, chunk):
    x, to_logits, labels = inputs(n)
    whole = F.cross_entropy(to_logits(x), labels, reduction="sum")
    parts = summed_cross_entropy(x, to_logits, labels, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)
    expected, got = (torch.autograd.grad(2.5 * loss, (x, to_logits.weight)) for loss in (whole, parts))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 30 * WORDS, 999 * WORDS])
def test_each_target_has_its_weight(chunk):
    x, to_logits, labels = inputs(100)
    weights = torch.rand(100, dtype=torch.float64)
    whole = (F.cross_entropy(to_logits(x), labels, reduction="none") * weights).sum()
    ours = summed_cross_entropy(x, to_logits, labels, weights, chunk=chunk)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-11)
    expected, got = (torch.autograd.grad(2.5 * loss, (x, to_logits.weight)) for loss in (whole, ours))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 30 * WORDS])
def test_text_and_markers_in_tables_of_their_own(chunk, is_tied, is_frozen):
    x, _, labels = inputs(100)
    embedding = TextEmbedding(WORDS - 8, 9, DIM).double()
    to_logits = TiedLogits(embedding, 8) if is_tied else TextLogits(WORDS - 8, 8, DIM).double()
    module = embedding if is_tied else to_logits
    module.text.requires_grad_(not is_frozen)
    whole = F.cross_entropy(to_logits(x), labels, reduction="sum")
    ours = summed_cross_entropy(x, to_logits, labels, chunk=chunk)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-11)
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    assert len(leaves) == 2 + (not is_frozen)
    expected, got = (torch.autograd.grad(2.5 * loss, leaves) for loss in (whole, ours))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 30 * WORDS, 999 * WORDS])
def test_the_loss_of_each_target(chunk, bias):
    x, _, labels = inputs(100)
    to_logits = nn.Linear(DIM, WORDS, bias=bias).double()
    ours = cross_entropy_per_target(x, to_logits, labels, chunk=chunk)
    whole = F.cross_entropy(to_logits(x), labels, reduction="none")
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-11)
    grad, leaves = torch.randn(100, dtype=torch.float64), (x, *to_logits.parameters())
    expected, got = (torch.autograd.grad(losses, leaves, grad) for losses in (whole, ours))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", [summed_cross_entropy, cross_entropy_per_target])
def test_memory_is_bounded_and_evaluation_makes_no_gradients(loss, bias):
    x, _, labels = inputs(200)
    to_logits, sizes, products = nn.Linear(DIM, WORDS, bias=bias).double(), [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(made.numel() for made in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(made))
            products.append(function.name() in ("aten::mm", "aten::mm.out", "aten::addmm"))
            return out

    with Watch(), torch.no_grad():
        loss(x, to_logits, labels, chunk=20 * WORDS)
    assert sum(products) == 10
    with Watch():
        loss(x, to_logits, labels, chunk=20 * WORDS).sum().backward()
    assert max(sizes) <= max(20 * WORDS, 200 * DIM)


def test_chunks_are_larger_on_a_gpu():
    assert logits_at_once("cpu") == 2**23 < logits_at_once("cuda") == logits_at_once("mps")


def test_only_the_gradients_that_are_wanted_are_made():
    x, to_logits, labels = inputs(40)
    frozen = summed_cross_entropy(x, to_logits.requires_grad_(False), labels, chunk=16)
    (of_x,) = torch.autograd.grad(frozen, x)
    of_weight = torch.autograd.grad(
        summed_cross_entropy(x.detach(), to_logits.requires_grad_(), labels, chunk=16), to_logits.weight
    )
    expected = torch.autograd.grad(F.cross_entropy(to_logits(x), labels, reduction="sum"), (x, to_logits.weight))
    torch.testing.assert_close((of_x, *of_weight), expected, rtol=0, atol=1e-11)
    with torch.no_grad():
        assert not summed_cross_entropy(x, to_logits, labels, chunk=16).requires_grad


def test_no_tensor_of_all_logits_is_made():
    x, to_logits, labels = inputs(200)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(made.numel() for made in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(made))
            return out

    with Watch():
        summed_cross_entropy(x, to_logits, labels, chunk=16 * WORDS).backward()
    assert max(sizes) <= max(16 * WORDS, 200 * DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [True, False])
def test_autocast_rounds_the_logits_at_most(dtype, emulated, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", [dtype] if emulated else [])
    x, to_logits, labels = inputs(64, torch.float32)
    with torch.autocast("cpu", dtype):
        whole = F.cross_entropy(to_logits(x).float(), labels, reduction="sum")
        parts = summed_cross_entropy(x, to_logits, labels, chunk=16)
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=0)
    for got, expected in zip(
        *(torch.autograd.grad(loss, (x, to_logits.weight)) for loss in (parts, whole)), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.arange(WORDS)


@pytest.mark.parametrize("kind", [Shifted, lambda *args, **_: nn.Linear(*args, bias=True)])
def test_another_read_out_is_called_as_it_is(kind):
    x, _, labels = inputs(20)
    other = kind(DIM, WORDS, bias=False).double()
    expected = F.cross_entropy(other(x), labels, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(x, other, labels, chunk=1), expected)


def test_a_model_learns_the_same_in_chunks(monkeypatch):
    model = Transfusion(
        num_text_tokens=40, dim_latent=3, transformer=dict(dim=16, depth=1, heads=2, dim_head=8)
    ).double()
    batch = [[torch.randint(0, 40, (30,)), torch.randn(4, 3), torch.randint(0, 40, (20,))] for _ in range(3)]
    gradients = []
    for chunk in (2**30, 100):
        monkeypatch.setattr(summed_cross_entropy, "__kwdefaults__", dict(chunk=chunk))
        torch.manual_seed(0)
        model.zero_grad()
        model(batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_gradients_can_be_taken_again_where_the_graph_is_kept_and_else_it_is_said():
    x, layer, labels = inputs(40)
    loss = summed_cross_entropy(x, layer, labels, chunk=16)
    first, second, last = (
        torch.autograd.grad(3 * loss, (x, layer.weight), retain_graph=keep) for keep in (True, True, False)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, last, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="retain_graph=True to take them again"):
        torch.autograd.grad(loss, (x, layer.weight))
