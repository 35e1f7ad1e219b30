"""The matrix products of a run, and the time that they alone would take.

A `Recorder` sees every operator that a run calls, forward and backward. What is replayed of them is `torch.mm` and
`torch.bmm` on random operands that lie in memory as those of the run did: same shapes, same strides (a linear layer's
weight is transposed, a cache is a slice), and one buffer for each buffer of the run, in the run's order. So eight
layers have eight weights, and a decoding step has to fetch them all from memory again, as it really does. Biases,
activations, norms, copies, sampling and Python are what is left out: no way of doing the same products is faster, but
for fewer products. (If this library makes products that are not needed, they are in the limit as well.) Products with
reordered weights (`network/cpu/reordered.py`) are replayed as such.

Attention counts as the products of the pairs of queries and keys that see each other, two forward and five backward,
a rectangle of the same area where a mask cuts some off, in blocks of queries that fit into a processor's cache.

b samples, h heads, n queries, m keys, e channels of a head.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_pytorch.network.cpu.reordered import reordered_linear

PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1}  # where the two operands begin
REORDERED = "_linear_pointwise"  # of mkldnn
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
SUSPECT = ("mm", "matmul", "linear", "conv", "attention", "dot", "bilinear")  # names that might hide products
BLOCK = 2**21  # elements of one block of attention logits: 8 MiB
BUDGET = 4 * 2**30  # bytes of operands; beyond it buffers are shared


class Spec(NamedTuple):
    """A tensor without its values: how it lies in which memory."""

    buffer: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements of the buffer that it reaches over."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def contiguous(self) -> "Spec":
        strides = [prod(self.size[i + 1 :]) for i in range(len(self.size))]
        return self._replace(stride=tuple(strides), offset=0)


class Call(NamedTuple):
    """An operator, its arguments with a `Spec` in the place of every tensor, and the pairs that attention needs."""

    name: str
    op: Any
    args: tuple
    kwargs: dict
    pairs: float = 0.0


class Product(NamedTuple):
    """One product to time."""

    multiply: Callable
    left: Tensor
    right: Tensor

    @property
    def flop(self) -> int:
        return 2 * self.left.numel() * self.right.shape[0 if self.right.is_mkldnn else -1]


class Recorder(TorchDispatchMode):
    """Notes products and attention while it is active; `unknown` are names that may hide others."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1].rstrip("_")
        if name in PRODUCTS or name == REORDERED or name.startswith(ATTENTION):
            specs = [spec_of(arg) for arg in args], {key: spec_of(value) for key, value in kwargs.items()}
            pairs = visible_pairs(args, kwargs) if name.startswith(ATTENTION) else 0.0
            self.calls.append(Call(name, func, tuple(specs[0]), specs[1], pairs))
            return func(*args, **kwargs)
        with self:  # in inference mode composite operators arrive whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if any(part in name for part in SUSPECT):
            self.unknown.add(name)
        return func(*args, **kwargs)


def spec_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_mkldnn:  # opaque: (o, i), whatever the order of its numbers
        return Spec(id(value), value.dtype, 0, tuple(value.shape), (value.shape[1], 1))
    return Spec(
        value.untyped_storage().data_ptr(), value.dtype, value.storage_offset(), tuple(value.shape), value.stride()
    )


def visible_pairs(args: tuple, kwargs: dict) -> float:
    """Pairs of a query and a key that see each other, for the average sample and head."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    q, k = tensors[:2] if len(tensors) == 3 else tensors[1:3]  # backward: the gradient of the output comes first
    n, m = q.shape[-2], k.shape[-2]
    mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal") or any(arg is True for arg in args)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > float("-inf")
        return seen.expand(q.shape[0], q.shape[1], n, m).sum().item() / (q.shape[0] * q.shape[1])
    return sum(min(i + 1, m) for i in range(n)) if causal else n * m


class Arena:
    """Memory for specs: one random buffer for each buffer of the run."""

    def __init__(self, specs: Iterable[Spec]):
        sizes: dict[tuple[int, torch.dtype], int] = {}
        for spec in specs:
            key = (spec.buffer, spec.dtype)
            sizes[key] = max(sizes.get(key, 0), spec.extent)
        self.buffers, largest, used = {}, {}, 0
        for key, size in sorted(sizes.items(), key=lambda item: -item[1]):
            nbytes = size * key[1].itemsize
            if used + nbytes > BUDGET and key[1] in largest:
                self.buffers[key] = largest[key[1]]
                continue
            used += nbytes
            self.buffers[key] = fill(size, key[1])
            largest.setdefault(key[1], self.buffers[key])

    def tensor(self, spec: Spec) -> Tensor:
        return self.buffers[spec.buffer, spec.dtype].as_strided(spec.size, spec.stride, spec.offset)


def fill(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype).normal_(std=0.1) if dtype.is_floating_point else torch.ones(size, dtype=dtype)


def products_of(calls: list[Call]) -> list[Product]:
    """Every product of the calls, in order, with operands to multiply."""
    pairs = [(call.name == REORDERED, *pair) for call in calls for pair in operands(call)]
    arena = Arena(spec for _, *pair in pairs for spec in pair)
    reordered: dict[int, Tensor] = {}
    products = []
    for is_reordered, left, right in pairs:
        if is_reordered and right.buffer not in reordered:
            reordered[right.buffer] = torch.ops.mkldnn._reorder_linear_weight(arena.tensor(right), left.size[0])
        multiply = reordered_linear if is_reordered else torch.mm if len(left.size) == 2 else torch.bmm
        other = reordered[right.buffer] if is_reordered else arena.tensor(right)
        products.append(Product(multiply, arena.tensor(left), other))
    return products


def operands(call: Call) -> list[tuple[Spec, Spec]]:
    if call.name == REORDERED:
        return [(call.args[0], call.args[1])]
    if call.name in PRODUCTS:
        first = PRODUCTS[call.name]
        left, right = call.args[first : first + 2]
        return [(left, as_column(right) if len(right.size) == 1 else right)]
    tensors = [arg for arg in call.args if isinstance(arg, Spec)]
    if "backward" in call.name:
        grad, q, k, v = (flat_heads(spec) for spec in tensors[:4])
    else:
        grad, (q, k, v) = None, (flat_heads(spec) for spec in tensors[:3])
    n, m = q.size[1], max(1, round(call.pairs / q.size[1]))
    k, v = narrow(k, 0, m), narrow(v, 0, m)
    pairs = []
    step = max(1, BLOCK // (q.size[0] * m))
    for start in range(0, n, step):
        rows = min(step, n - start)
        logits = Spec(-1, q.dtype, 0, (q.size[0], rows, m), (rows * m, m, 1))  # one block is reused for all
        some_q = narrow(q, start, rows)
        pairs.append((some_q, transposed(k)))
        if grad is None:
            pairs.append((logits, v))
        else:
            some_grad = narrow(grad, start, rows)
            pairs += [(some_grad, transposed(v)), (transposed(logits), some_grad)]
            pairs += [(logits, k), (transposed(logits), some_q)]
    return pairs


def flat_heads(spec: Spec) -> Spec:
    """(b, h, n, e) as (b h, n, e): a view where memory allows, else a plain copy of it."""
    b, h, n, e = spec.size
    stride = spec.stride
    if b == 1:
        return spec._replace(size=(h, n, e), stride=stride[1:])
    if h == 1 or stride[0] == h * stride[1]:
        return spec._replace(size=(b * h, n, e), stride=(stride[0] if h == 1 else stride[1], *stride[2:]))
    return spec._replace(size=(b * h, n, e)).contiguous()


def narrow(spec: Spec, start: int, length: int) -> Spec:
    b, _, e = spec.size
    return spec._replace(size=(b, length, e), offset=spec.offset + start * spec.stride[1])


def transposed(spec: Spec) -> Spec:
    (b, n, e), (sb, sn, se) = spec.size, spec.stride
    return spec._replace(size=(b, e, n), stride=(sb, se, sn))


def as_column(spec: Spec) -> Spec:
    return spec._replace(size=(*spec.size, 1), stride=(*spec.stride, 1))


def attention_of(calls: list[Call]) -> list[Callable[[], Any]]:
    """The attention kernels themselves, on operands as in the run; batched products where it is made of those."""
    kernels = [call for call in calls if call.name.startswith(ATTENTION)]
    kernels = kernels or [call for call in calls if call.name in ("bmm", "baddbmm")]
    arena = Arena(spec for call in kernels for spec in (*call.args, *call.kwargs.values()) if isinstance(spec, Spec))
    real = lambda value: arena.tensor(value) if isinstance(value, Spec) else value  # noqa: E731
    return [
        partial(call.op, *map(real, call.args), **{key: real(value) for key, value in call.kwargs.items()})
        for call in kernels
    ]


def replay(work: list) -> float:
    """Seconds of all products, or of all kernels."""
    with torch.no_grad():
        start = time.perf_counter()
        for item in work:
            if isinstance(item, Product):
                item.multiply(item.left, item.right)
            else:
                item()
        return time.perf_counter() - start
