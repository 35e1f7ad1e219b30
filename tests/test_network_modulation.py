"""The three kinds of modulation against each other, and the sums that a GPU makes by segments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from network_streams import perturb, stream
from torch import nn

from transfusion_pytorch.network.attend import (
    CachedAttention,
    DecodeAttention,
    DenseAttention,
    FlexAttention,
    RaggedAttention,
    choose_attention,
    plan_attention,
)
from transfusion_pytorch.network.cache import KVCache
from transfusion_pytorch.network.cache_views import CacheView, DecodeView
from transfusion_pytorch.network.conditions import ConditionTable
from transfusion_pytorch.network.lookup import SEGMENT, Segments, look_up, sum_segments
from transfusion_pytorch.network.norms import (
    AdaptiveNorm,
    Conditioning,
    IndexedModulation,
    SpanModulation,
    TextModulation,
)
from transfusion_pytorch.network.shortcuts import plain_formulas
from transfusion_pytorch.network.transformer import Transformer

DIM = 6
QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def modulate(norm, conditioning, x, out):
    modulation = norm.modulation(conditioning)
    return modulation, (modulation.normed(x), modulation.gated(out), modulation.add_gated(x, out))


@pytest.mark.parametrize("samples", [["tt", "ttt"], ["AAA", "BBB"], ["tAAt", "BB"]])
def test_each_kind_is_the_looked_up_one(samples):
    norm, made = perturb(AdaptiveNorm(DIM, DIM)).double(), stream(*samples)
    x, out = torch.randn(2, len(made.span), DIM, dtype=torch.float64).requires_grad_().unbind()
    condition = torch.randn(int(made.span.max()) + 1, DIM, dtype=torch.float64)
    looked_up = Conditioning(condition, made.span + 1)
    special = {"tt": None, "AAA": Conditioning(condition, None), "tAAt": looked_up.with_segments()}[samples[0]]
    kind = {"tt": TextModulation, "AAA": SpanModulation, "tAAt": IndexedModulation}[samples[0]]
    modulation, ours = modulate(norm, special, x, out)
    assert isinstance(modulation, kind)
    _, theirs = modulate(norm, looked_up, x, out)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    parameters = [*norm.parameters()]
    gradients = [
        torch.autograd.grad(sum(part.square().sum() for part in parts), parameters, materialize_grads=True)
        for parts in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


STRETCHES = st.lists(st.tuples(st.booleans(), st.integers(1, 3 * SEGMENT)), min_size=1, max_size=8)


def index_of(stretches):
    """Text where a stretch is one, else the next span."""
    spans, parts = 0, []
    for is_text, size in stretches:
        spans += not is_text
        parts.append(torch.full((size,), 0 if is_text else spans))
    return torch.cat(parts), spans + 1


@QUICK
@given(stretches=STRETCHES, padding=st.integers(0, 100))
def test_segments_cover_the_stream_and_their_number_depends_on_its_size_only(stretches, padding):
    index, count = index_of([*stretches, (True, padding)])
    edges, belongs = Segments.of(index, count)
    assert len(edges) == len(index) // SEGMENT + 2 * count + 1
    assert edges[0] == 0
    assert edges[-1] == len(index)
    sizes = edges.diff()
    assert sizes.min() >= 0
    assert sizes.max() <= SEGMENT
    assert torch.equal(belongs.long().argmax(dim=0).repeat_interleave(sizes), index)
    assert (belongs.sum(dim=0) == 1).all()


@QUICK
@given(stretches=STRETCHES)
def test_segments_add_up_to_the_tokens_of_each_index(stretches):
    index, count = index_of(stretches)
    values = torch.randn(len(index), DIM, dtype=torch.float64)
    sums = sum_segments(values, Segments.of(index, count))
    torch.testing.assert_close(sums, F.one_hot(index, count).T.double() @ values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_looked_up_table_has_the_gradient_of_its_tokens(dtype):
    """4,096 ones: added one by one, halves would stay at 2,048, and bfloat16 at 256."""
    index = torch.cat((torch.zeros(4096), torch.ones(100))).long()
    table = torch.randn(3, DIM, dtype=dtype, requires_grad=True)
    out = look_up(table, index, Segments.of(index, 3))
    assert torch.equal(out, table[index])
    with torch.autocast("cpu", torch.bfloat16):
        out.backward(torch.ones_like(out))
    assert table.grad.dtype == dtype
    assert torch.equal(table.grad, torch.tensor([4096, 100, 0]).to(dtype)[:, None].expand(3, DIM))


# which attention where


@pytest.mark.parametrize(
    ("device", "auto", "flex", "ragged"),
    [("cpu", "ragged", "flex", "ragged"), ("cuda", "flex", "flex", "dense"), ("mps", "dense", "dense", "dense")],
)
def test_attention_is_chosen_by_the_device(device, auto, flex, ragged):
    expected = dict(auto=auto, flex=flex, ragged=ragged, dense="dense")
    for kind, made in expected.items():
        assert choose_attention(kind, device, trains=False) == made
        if (kind, device) != ("flex", "cpu"):
            assert choose_attention(kind, device, trains=True) == made
        with plain_formulas():
            assert choose_attention(kind, device, trains=True) == "dense"


def test_plans_are_types():
    layout = stream("tAAt").layout
    cache = KVCache(layers=1, kv_heads=1, dim_head=4, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(plan_attention(layout), RaggedAttention)
    assert isinstance(plan_attention(layout, kind="flex"), FlexAttention)
    assert isinstance(plan_attention(layout, kind="dense"), DenseAttention)
    row = cache.acquire()
    views = CacheView(cache, [row], layout), DecodeView(cache, [row], [0], torch.zeros(64, 2, 2))
    for view, kind in zip(views, (CachedAttention, DecodeAttention), strict=True):
        assert isinstance(plan_attention(layout, view, kind="flex"), kind)


# a table of many times


def trunk_of(norm_type=AdaptiveNorm) -> Transformer:
    trunk = Transformer(DIM, depth=2, dim_head=2, heads=1)
    trunk.layers[1].ff_norm = norm_type(DIM, DIM)
    return perturb(trunk).double()


@pytest.mark.parametrize("rows", [[2, 2], [0, 3], [3, 1]])
@pytest.mark.parametrize("is_equal", [True, False])
@torch.no_grad()
def test_rows_of_a_table_are_what_norms_make_of_their_conditions(rows, is_equal):
    """Of spans of one length, which need no index, and of others."""
    trunk, made = trunk_of(), stream("AAA", "BBB" if is_equal else "BB")
    x, out = torch.randn(2, len(made.span), DIM, dtype=torch.float64).unbind()
    conditions = torch.randn(4, DIM, dtype=torch.float64)
    index = None if is_equal else made.span + 1
    ours = ConditionTable(trunk, "abcd", conditions).conditioning(["abcd"[row] for row in rows], index)
    plain = Conditioning(conditions[rows], made.span + 1)
    assert torch.equal(ours.spans, plain.spans)
    assert len(ours.modulations) == 5
    for norm in [*ours.modulations]:
        kept, expected = norm.modulation(ours), norm.modulation(plain)
        torch.testing.assert_close(kept.normed(x), expected.normed(x), rtol=0, atol=1e-12)
        if norm.text_gate is not None:
            torch.testing.assert_close(kept.add_gated(x, out), expected.add_gated(x, out), rtol=0, atol=1e-12)


class Doubled(AdaptiveNorm):
    """A norm of somebody else, which does as it likes."""

    def modulation(self, conditioning):
        return super().modulation(conditioning._replace(spans=2 * conditioning.spans))


@pytest.mark.parametrize("trunk", [trunk_of(Doubled), nn.ModuleList([AdaptiveNorm(DIM, DIM)]).double()])
def test_a_table_leaves_norms_and_trunks_of_others_alone(trunk):
    conditions = torch.randn(3, DIM, dtype=torch.float64)
    made = ConditionTable(trunk, range(3), conditions).conditioning([1, 2], None)
    assert made.modulations is None
    assert torch.equal(made.spans, conditions[1:])
