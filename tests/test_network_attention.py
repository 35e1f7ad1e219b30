"""Attention against its definition, option by option, and the cache against no cache."""

from typing import Any, NamedTuple

import pytest
import torch
from checks import no_typecheck
from einops import rearrange
from network_streams import LONG, STREAMS, naive_attention, perturb, projections, stream

from transfusion_pytorch.network import attend as backends
from transfusion_pytorch.network.attend import plan_attention
from transfusion_pytorch.network.layer import LASER_LIMIT, Attention
from transfusion_pytorch.sequence.positions import rotary_phases, rotate

# attend


@pytest.mark.parametrize("samples", STREAMS.values(), ids=STREAMS)
def test_the_intervals_are_causal_or_of_one_span(samples):
    made = stream(*samples)
    assert torch.equal(made.dense, made.sees)


@pytest.mark.parametrize(("kv_heads", "softcap"), [(4, None), (2, None), (1, 3.0)])
@pytest.mark.parametrize("samples", STREAMS.values(), ids=STREAMS)
def test_sdpa_is_naive_attention_forward_and_backward(samples, kv_heads, softcap):
    made = stream(*samples)
    layout = made.layout
    inputs = projections(len(layout.end), kv_heads=kv_heads, requires_grad=True)
    ours = plan_attention(layout).attend(*inputs, softcap=softcap)
    theirs = naive_attention(*inputs, made.sees, softcap)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("samples", [[LONG], [LONG, LONG[::-1]]])
def test_long_rows_are_cut_into_queries_that_get_no_more_keys_than_they_see(samples):
    layout = stream(*samples).layout
    (run,) = layout.runs
    end = layout.end.view(len(samples), -1)
    assert len(run.chunks) == 3
    assert [chunk.num_keys for chunk in run.chunks] == [int(end[:, chunk.queries].max()) for chunk in run.chunks]


def test_text_needs_no_mask_and_equal_samples_share_one():
    (causal,) = stream("tttt", "tttt").layout.runs
    assert causal.chunks[0].is_causal
    assert causal.chunks[0].mask is None
    (everything,) = stream("AAAA", "BBBB").layout.runs
    assert not everything.chunks[0].is_causal
    assert everything.chunks[0].mask is None
    (shared,) = stream("tAAt", "tBBt").layout.runs
    assert shared.chunks[0].mask.shape == (1, 1, 4, 4)
    (own,) = stream("tAAt", "ttBB").layout.runs
    assert own.chunks[0].mask.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (9, 3)])  # the last are SmolLM's
@pytest.mark.parametrize("samples", [STREAMS["many masks"], STREAMS["ragged"], ["t" * 100 + "A" * 60, "B" * 9]])
@torch.no_grad()
def test_flex_is_sdpa(samples, heads, kv_heads, softcap, monkeypatch):
    calls, real = [], backends.flex_attention
    monkeypatch.setattr(backends, "flex_attention", lambda *args, **options: calls.append(1) or real(*args, **options))
    layout = stream(*samples).layout
    inputs = projections(len(layout.end), heads=heads, kv_heads=kv_heads, dim_head=16, dtype=torch.float32)
    flex, sdpa = (plan_attention(layout, kind=kind).attend(*inputs, softcap=softcap) for kind in ("flex", "ragged"))
    assert len(calls) == 1
    torch.testing.assert_close(flex, sdpa, rtol=0, atol=1e-5)


def test_flex_trains_through_sdpa_on_a_cpu_and_says_so_once():
    backends._say_flex_fallback.cache_clear()
    layout = stream("ttAAt", "tA").layout
    inputs = projections(7, requires_grad=True)
    with pytest.warns(UserWarning, match="torch has no backward of flex attention on this device") as said:
        flex = plan_attention(layout, kind="flex", trains=True)
    assert len(said) == 1
    again = plan_attention(layout, kind="flex", trains=True)  # a second warning would be an error
    outs = [plan.attend(*inputs) for plan in (flex, again, plan_attention(layout))]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=0, atol=0)


def test_softcap_bounds_the_logits():
    made = stream("tAAAt")
    plan, (q, k, v) = plan_attention(made.layout), projections(5)
    plain = plan.attend(q, k, v)
    assert not torch.allclose(plan.attend(q, k, v, softcap=0.5), plain, atol=1e-3)
    torch.testing.assert_close(plan.attend(q, k, v, softcap=1e6), plain, rtol=0, atol=1e-8)
    # capped to nothing, a token takes the mean of what it sees
    mean = torch.stack([v[seen].mean(dim=0) for seen in made.sees])
    torch.testing.assert_close(plan.attend(q, k, v, softcap=1e-12), mean, rtol=0, atol=1e-10)


# the module


def by_hand(attn, x, position, sees, *, first_values=None, theta=10_000.0):
    """`Attention` once more, from the papers: no fused kernel, no complex numbers."""
    h, k, e = attn.heads, attn.kv_heads, attn.dim_head
    q, k, v = (x @ attn.to_qkv.weight.T).split([h * e, k * e, k * e], dim=-1)
    q, k, v = (rearrange(part, "n (h e) -> n h e", e=e) for part in (q, k, v))
    if attn.q_norm is not None:
        q, k = (
            (1 + norm.weight) * part / (part.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            for norm, part in ((attn.q_norm, q), (attn.k_norm, k))
        )
    angle = position[:, None, None] * theta ** (-torch.arange(0, e, 2, dtype=x.dtype) / e)
    q, k = (
        torch.stack(
            (
                part[..., ::2] * angle.cos() - part[..., 1::2] * angle.sin(),
                part[..., ::2] * angle.sin() + part[..., 1::2] * angle.cos(),
            ),
            dim=-1,
        ).flatten(-2)
        for part in (q, k)
    )
    if first_values is not None:
        share = torch.sigmoid(x @ attn.to_value_mix.weight.T + attn.to_value_mix.bias)[..., None]
        v = (1 - share) * v + share * first_values
    if attn.laser:
        v = (LASER_LIMIT * (v / LASER_LIMIT).tanh()).exp()
    out = naive_attention(q, k, v, sees, attn.softcap)
    out = out.log() if attn.laser else out
    if attn.to_gates is not None:
        out = out * torch.sigmoid(x @ attn.to_gates.weight.T + attn.to_gates.bias)[..., None]
    return rearrange(out, "n h e -> n (h e)") @ attn.to_out.weight.T


def make(dim=12, *, dim_head=6, heads=4, **options):
    return perturb(Attention(dim, dim_head=dim_head, heads=heads, **options)).double()


def run(attn, x, made, **options):
    phases = rotary_phases(made.position, attn.dim_head, dtype=x.dtype)
    return attn(x, phases=phases, plan=plan_attention(made.layout), **options)[0]


MADE = stream("ttAAAtBt", "AAt", "t")
PLAIN = dict(qk_rmsnorm=False, gate_values=False)
OPTIONS = {
    "plain": PLAIN,
    "default": dict(),
    "grouped": dict(PLAIN, kv_heads=2),
    "norm": dict(PLAIN, qk_rmsnorm=True),
    "gates": dict(PLAIN, gate_values=True),
    "residual": dict(PLAIN, value_residual=True),
    "laser": dict(PLAIN, laser=True),
    "softcap": dict(PLAIN, softcap_value=0.7),
    "everything": dict(kv_heads=1, value_residual=True, laser=True, softcap_value=2.0),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_is_its_formula(options):
    attn, x = make(**options), torch.randn(12, 12, dtype=torch.float64)
    first = torch.randn(12, attn.kv_heads, 6, dtype=torch.float64) if options.get("value_residual") else None
    ours = run(attn, x, MADE, first_values=first)
    theirs = by_hand(attn, x, MADE.position, MADE.sees, first_values=first)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [options for name, options in OPTIONS.items() if name not in ("plain", "default")])
def test_no_option_is_ignored(options):
    torch.manual_seed(1)
    attn, x = make(**options), torch.randn(12, 12, dtype=torch.float64)
    plain = make(**PLAIN | {"kv_heads": options.get("kv_heads")})
    plain.load_state_dict(attn.state_dict(), strict=False)
    first = torch.randn(12, attn.kv_heads, 6, dtype=torch.float64)
    same = torch.allclose(run(attn, x, MADE, first_values=first), run(plain, x, MADE, first_values=first), atol=1e-3)
    assert same == (options == OPTIONS["grouped"])  # whose weights are all there is to it


def test_fewer_key_value_heads_are_full_heads_with_equal_weights():
    few, full = make(kv_heads=2, value_residual=True), make(value_residual=True)
    state = few.state_dict()
    q, k, v = rearrange(state["to_qkv.weight"], "(h e) d -> h e d", e=6).split([4, 2, 2])
    k, v = (part.repeat_interleave(2, dim=0) for part in (k, v))
    state["to_qkv.weight"] = rearrange(torch.cat((q, k, v)), "h e d -> (h e) d")
    for name in ("to_value_mix.weight", "to_value_mix.bias"):
        state[name] = state[name].repeat_interleave(2, dim=0)
    full.load_state_dict(state)
    x, first = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, 2, 6, dtype=torch.float64)
    ours = run(few, x, MADE, first_values=first)
    theirs = run(full, x, MADE, first_values=first.repeat_interleave(2, dim=1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_fewer_key_value_heads_have_fewer_parameters():
    sizes = [sum(p.numel() for p in make(kv_heads=kv_heads).parameters()) for kv_heads in (4, 2, 1)]
    per_head = 2 * 6 * 12  # a key and a value matrix
    assert [sizes[0] - size for size in sizes] == [0, 2 * per_head, 3 * per_head]
    assert sum(p.numel() for p in make(kv_heads=None).parameters()) == sizes[0]


def test_laser_stays_finite_for_huge_values():
    attn = make(laser=True, **PLAIN).float()
    for scale in (1.0, 1e3, 1e6):
        scaled = (scale * torch.randn(12, 12)).requires_grad_()
        out = run(attn, scaled, MADE)
        out.sum().backward()
        assert out.isfinite().all()
        assert scaled.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in attn.parameters())


def test_laser_gives_back_the_value_of_a_key_that_is_alone():
    attn, x = make(laser=True, **PLAIN), torch.randn(2, 12, dtype=torch.float64)
    made = stream("A", "B")
    values = rearrange(x @ attn.to_qkv.weight.T, "n (h e) -> n h e", e=6)[:, -4:]
    alone = (LASER_LIMIT * (values / LASER_LIMIT).tanh()).flatten(1) @ attn.to_out.weight.T
    torch.testing.assert_close(run(attn, x, made), alone, rtol=0, atol=1e-10)


class Seen(NamedTuple):
    """A plan that notes the types it is called with."""

    plan: Any
    dtypes: list

    def attend(self, *parts, **options):
        self.dtypes.extend(part.dtype for part in parts)
        return self.plan.attend(*parts, **options)


@no_typecheck
def test_kernels_get_one_type_whatever_autocast_makes_of_norms(monkeypatch):
    """As on a GPU, where it takes them to single precision; here double stands for that."""
    attn, seen, exp = make(laser=True).float(), Seen(plan_attention(MADE.layout), []), torch.exp
    rotated = attn._rotated
    monkeypatch.setattr(attn, "_rotated", lambda *args: tuple(part.double() for part in rotated(*args)))
    monkeypatch.setattr(torch, "exp", lambda x: exp(x).double())
    attn(torch.randn(12, 12), phases=rotary_phases(MADE.position, 6), plan=seen)
    assert seen.dtypes == [torch.float32] * 3


def test_normalised_queries_and_keys_have_no_scale():
    x = torch.randn(12, 12, dtype=torch.float64)
    for qk_rmsnorm in (True, False):
        attn = make(qk_rmsnorm=qk_rmsnorm)
        before = run(attn, x, MADE)
        attn.to_qkv.weight.data[: 8 * 6] *= 7  # queries and keys; values stay
        # but for the epsilon of the norm
        assert torch.allclose(run(attn, x, MADE), before, rtol=0, atol=1e-4) == qk_rmsnorm


def test_a_shut_gate_lets_nothing_through_and_an_open_one_everything():
    x = torch.randn(12, 12, dtype=torch.float64)
    gated, plain = make(gate_values=True), make(gate_values=False)
    plain.load_state_dict(gated.state_dict(), strict=False)
    gated.to_gates.weight.data.zero_()
    gated.to_gates.bias.data.fill_(60)
    torch.testing.assert_close(run(gated, x, MADE), run(plain, x, MADE), rtol=0, atol=1e-10)
    gated.to_gates.bias.data.fill_(-60)
    torch.testing.assert_close(run(gated, x, MADE), torch.zeros_like(x), rtol=0, atol=1e-10)


def test_the_value_residual_runs_from_own_values_to_those_of_the_first_layer():
    x, other = torch.randn(2, 12, 12, dtype=torch.float64).unbind()
    attn, plain = make(value_residual=True), make()
    plain.load_state_dict(attn.state_dict(), strict=False)
    phases = rotary_phases(MADE.position, 6, dtype=x.dtype)
    _, values = attn(other, phases=phases, plan=plan_attention(MADE.layout))
    assert torch.equal(values.flatten(1), other @ attn.to_qkv.weight[-24:].T)
    attn.to_value_mix.weight.data.zero_()
    attn.to_value_mix.bias.data.fill_(-60)
    torch.testing.assert_close(run(attn, x, MADE, first_values=values), run(plain, x, MADE), rtol=0, atol=1e-10)
    attn.to_value_mix.bias.data.fill_(60)
    ours = run(attn, x, MADE, first_values=values)
    torch.testing.assert_close(ours, with_values(plain, x, values), rtol=0, atol=1e-10)


def with_values(attn, x, values):
    """Attention whose values are given."""
    q, k, _ = rearrange(x @ attn.to_qkv.weight.T, "n (p h e) -> p n h e", p=3, e=6)
    weights = attn.to_gates(x).sigmoid()[..., None]
    phases = rotary_phases(MADE.position, 6, dtype=x.dtype)
    q, k = rotate(attn.q_norm(q), phases), rotate(attn.k_norm(k), phases)
    return (naive_attention(q, k, values, MADE.sees) * weights).flatten(1) @ attn.to_out.weight.T


def test_values_handed_on_are_the_layers_own():
    """Not the mixed ones, and not their exponentials."""
    x, first = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, 4, 6, dtype=torch.float64)
    attn = make(value_residual=True, laser=True)
    phases = rotary_phases(MADE.position, 6, dtype=x.dtype)
    _, values = attn(x, phases=phases, plan=plan_attention(MADE.layout), first_values=first)
    torch.testing.assert_close(values.flatten(1), x @ attn.to_qkv.weight[-24:].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=4, kv_heads=3), "heads must be a multiple of kv_heads, got 4 and 3"),
        (dict(heads=4, kv_heads=8), "heads must be a multiple of kv_heads, got 4 and 8"),
        (dict(kv_heads=0), "heads must be a multiple of kv_heads, got 8 and 0"),
        (dict(dim_head=7), "dim_head must be even for rotary positions, got 7"),
        (dict(softcap_value=0.0), "softcap_value must be positive, got 0.0"),
        (dict(softcap_value=-1.0), "softcap_value must be positive, got -1.0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(12, **options)
