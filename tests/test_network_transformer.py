"""The trunk: who sees whom, how a span is told its time, and each option by what it claims."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from checks import no_typecheck
from network_streams import Stream, cuts, perturb, stream
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_pytorch.network import attend
from transfusion_pytorch.network.attend import plan_attention
from transfusion_pytorch.network.cache_views import CacheView
from transfusion_pytorch.network.layer import FeedForward
from transfusion_pytorch.network.norms import AdaptiveNorm
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.sequence import masks
from transfusion_pytorch.sequence.positions import rotary_phases
from transfusion_pytorch.training.parameters import hidden_matrices

DIM = 12
EVERYTHING = dict(
    kv_heads=1,
    attn_laser=True,
    use_value_residual=True,
    num_residual_streams=2,
    num_residual_fracs=2,
    use_checkpoint=True,
    attn_kwargs=dict(softcap_value=5.0),
    ff_kwargs=dict(activation="swiglu"),
)
OPTIONS = {
    "default": dict(),
    "no skips": dict(unet_skips=False),
    "grouped": dict(kv_heads=1),
    "no norm": dict(qk_rmsnorm=False),
    "no gates": dict(attn_kwargs=dict(gate_values=False)),
    "laser": dict(attn_laser=True),
    "value residual": dict(use_value_residual=True),
    "streams": dict(num_residual_streams=3),
    "fracs": dict(num_residual_fracs=3),
    "checkpoint": dict(use_checkpoint=True),
    "everything": EVERYTHING,
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

SAMPLES = ["ttAAtBB", "CCt", "t"]
MADE = stream(*SAMPLES)
NUM_SPANS = 3


def fresh(*, depth=3, seed=0, **options) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(DIM, depth=depth, heads=2, dim_head=4, **options)


def make(**options) -> Transformer:
    """In double precision, and without the zeros it starts with."""
    return perturb(fresh(**options)).double()


def inputs(made: Stream = MADE, *, dtype=torch.float64, seed=1) -> tuple[Tensor, Tensor]:
    """Tokens, and a condition for every span."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(made.span), DIM), (int(made.span.max()) + 1, DIM)
    return tuple(torch.randn(size, dtype=dtype, generator=generator, requires_grad=True) for size in sizes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# who sees whom


@each_option
def test_a_slot_depends_on_exactly_the_slots_it_sees(options):
    model, (x, condition) = make(**options), inputs()
    out = model(x, **MADE.arguments(condition))
    weight = torch.randn_like(out)
    spans_seen = torch.stack([(MADE.sees & (MADE.span == span)).any(dim=1) for span in range(NUM_SPANS)], dim=1)
    for slot in range(len(x)):
        of_x, of_condition = torch.autograd.grad(out[slot] @ weight[slot], (x, condition), retain_graph=True)
        assert torch.equal(of_x.abs().sum(dim=1) > 0, MADE.sees[slot])
        assert torch.equal(of_condition.abs().sum(dim=1) > 0, spans_seen[slot])


@each_option
def test_packed_is_one_by_one(options):
    model, (x, condition) = make(**options), inputs()
    packed = model(x, **MADE.arguments(condition)).split(MADE.layout.lengths)
    spans = iter(condition.split([2, 1]))
    for sample, tokens, together in zip(SAMPLES, x.split(MADE.layout.lengths), packed, strict=True):
        alone = model(tokens, **stream(sample).arguments(next(spans) if sample != "t" else None))
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-10)


@each_option
@torch.no_grad()
def test_cached_is_uncached_wherever_reading_stops(options):
    model, (x, condition) = make(**options), inputs()
    whole = model(x, **MADE.arguments(condition))
    places = [cuts(sample) or [1] for sample in SAMPLES]
    first = torch.tensor([0, 7, 10])
    for turn in range(max(map(len, places))):
        cut = [place[turn % len(place)] for place in places]
        cache = model.create_cache(device=x.device, dtype=x.dtype)
        every = [cache.acquire() for _ in range(4)]
        rows = [every[i] for i in (3, 0, 2)]
        for start, stop in (([0, 0, 0], cut), (cut, [7, 3, 1])):
            active = [i for i in range(3) if stop[i] > start[i]]
            slots = torch.cat([torch.arange(first[i] + start[i], first[i] + stop[i]) for i in active])
            part = stream(*SAMPLES, start=start, stop=stop)
            layout = type(part.layout)(
                part.layout.end, tuple(stop[i] - start[i] for i in active), tuple(start[i] for i in active)
            )
            view = CacheView(cache, [rows[i] for i in active], layout)
            arguments = part._replace(layout=layout).arguments(condition)
            out = model(x[slots], **arguments, cache=view)
            cache.commit([rows[i] for i in active], layout.lengths)
            torch.testing.assert_close(out, whole[slots], rtol=0, atol=1e-10)


@each_option
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_decode_steps_are_one_forward_pass(options, dtype, tolerance):
    """Prefill up to somewhere, then a token at a time, in as few views as there can be."""
    samples, cut = ["t" * 9, "tt" + "A" * 3 + "t" * 4, "t" * 9], [3, 6, 1]
    model, made = make(**options).to(dtype), stream(*samples)
    x, condition = torch.randn(27, DIM, dtype=dtype), torch.randn(1, DIM, dtype=dtype)
    whole = model(x, **made.arguments(condition)).view(3, 9, DIM)
    cache = model.create_cache(device=x.device, dtype=dtype)
    rows = [cache.acquire() for _ in samples]
    part = stream(*samples, stop=cut)
    slots = torch.cat([torch.arange(9 * i, 9 * i + stop) for i, stop in enumerate(cut)])
    read = model(x[slots], **part.arguments(condition), cache=CacheView(cache, rows, part.layout))
    torch.testing.assert_close(read, whole.flatten(0, 1)[slots], rtol=0, atol=tolerance)
    cache.commit(rows, cut)
    served = None
    while active := [i for i in range(3) if rows[i].length < 9]:
        if served is None or set(served) != set(active):
            cache.gather([rows[i] for i in active])
            served = sorted(active, key=lambda i: rows[i].index)
            positions = [int(made.position[9 * i + rows[i].length]) for i in served]
            view = model.decode_view(cache, [rows[i] for i in served], positions)
        mine, at = [rows[i] for i in served], [rows[i].length for i in served]
        slots = [9 * i + length for i, length in zip(served, at, strict=True)]
        layout = stream(*["t" * 9 for _ in at], start=at, stop=[length + 1 for length in at]).layout
        out = model(x[slots], position=made.position[slots], layout=layout, cache=view)
        torch.testing.assert_close(out, whole.flatten(0, 1)[slots], rtol=0, atol=tolerance)
        cache.commit(mine, [1] * len(mine))
        view.advance()


def test_only_distances_between_positions_matter():
    model, (x, condition) = make(), inputs()
    arguments = MADE.arguments(condition)
    near = model(x, **arguments)
    far = model(x, **arguments | dict(position=MADE.position + 1000))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)
    assert not torch.allclose(near, model(x, **arguments | dict(position=2 * MADE.position)), atol=1e-3)


@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_rotary_theta_sets_the_phases(theta):
    seen = []
    model, (x, condition) = make(rotary_theta=theta), inputs()
    model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    model(x, **MADE.arguments(condition))
    angle = MADE.position[:, None] * theta ** -torch.tensor([0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(seen[0], torch.stack((angle.cos(), angle.sin()), dim=-1), rtol=0, atol=1e-12)


# the condition


def test_a_condition_costs_per_span_and_not_per_token():
    model, (x, condition) = make(), inputs()
    rows = []
    for module in model.modules():
        if isinstance(module, AdaptiveNorm):
            module.to_modulation.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model(x, **MADE.arguments(condition))
    assert rows == [NUM_SPANS] * (2 * model.depth + 1)
    rows.clear()
    model(x, **MADE.arguments())
    assert rows == []


@pytest.mark.parametrize(("streams", "fracs"), [(1, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 3)])
def test_a_new_layer_leaves_latents_as_they_are_and_works_on_text(streams, fracs):
    model = fresh(unet_skips=False, num_residual_streams=streams, num_residual_fracs=fracs).double()
    x, condition = inputs()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    model(x, **MADE.arguments(condition))
    is_text = MADE.is_text.repeat_interleave(streams)
    for before, after in seen:
        assert torch.equal(after[~is_text], before[~is_text])
        assert ((after - before)[is_text].abs().amax(dim=-1) > 1e-3).all()
    assert len(seen) == 3


# the options


def test_feedforward_is_a_gated_linear_unit():
    x = inputs()[0]
    for activation, activate in (("geglu", F.gelu), ("swiglu", F.silu)):
        ff = perturb(FeedForward(DIM, activation=activation)).double()
        value, gate = (x @ ff.to_hidden.weight.T + ff.to_hidden.bias).chunk(2, dim=-1)
        by_hand = (value * activate(gate)) @ ff.to_out.weight.T + ff.to_out.bias
        torch.testing.assert_close(ff(x), by_hand, rtol=0, atol=1e-10)
    assert Transformer(DIM, depth=1).layers[0].ff.activation == "geglu"


@pytest.mark.parametrize("factor", [1, 2.5, 4])
def test_a_gated_feedforward_costs_what_a_plain_one_of_its_expansion_does(factor):
    layer = Transformer(96, depth=1, ff_expansion_factor=factor).layers[0]
    matrices = layer.ff.to_hidden.weight.numel() + layer.ff.to_out.weight.numel()
    assert matrices == pytest.approx(2 * 96 * 96 * factor, rel=0.02)


@pytest.mark.parametrize(
    ("dim", "factor", "hidden"), [(96, 4, 256), (100, 4, 272), (12, 4, 32), (5, 1, 16), (720, 1.1, 528)]
)
def test_a_gated_feedforward_is_two_thirds_as_wide_rounded_up_to_16(dim, factor, hidden):
    ff = FeedForward(dim, expansion_factor=factor)
    assert ff.to_hidden.weight.shape == (2 * hidden, dim)
    assert ff.to_out.weight.shape == (dim, hidden)


def test_a_layer_is_two_branches_each_behind_a_norm_and_in_front_of_a_gate():
    model, (x, condition) = make(unet_skips=False), inputs()
    _, results = record_layers(model)
    model(x, **MADE.arguments(condition))
    phases = rotary_phases(MADE.position, 4, dtype=x.dtype)
    for layer, (out, _) in zip(model.layers, results, strict=True):
        modulation = layer.attn_norm.modulation(MADE.conditioning(condition))
        attended, _ = layer.attn(layer.attn_norm(x, modulation), phases=phases, plan=plan_attention(MADE.layout))
        x = x + modulation.gate[modulation.index] * attended
        modulation = layer.ff_norm.modulation(MADE.conditioning(condition))
        x = x + modulation.gate[modulation.index] * layer.ff(layer.ff_norm(x, modulation))
        torch.testing.assert_close(out, x, rtol=0, atol=1e-10)


def test_a_cache_has_no_more_than_the_key_and_value_heads():
    for kv_heads, expected in ((None, 2), (1, 1)):
        cache = fresh(kv_heads=kv_heads).create_cache(device=torch.device("cpu"), dtype=torch.float32)
        block = cache.acquire(100).block
        assert {tuple(tensor.shape) for tensor in block.tensors()} == {(1, expected, 128, 4)}
        assert len(block.keys) == len(block.values) == 3
        assert cache.bytes_per_token == 3 * 2 * expected * 4 * 4


def test_attn_kwargs_and_ff_kwargs_arrive():
    model = fresh(attn_kwargs=dict(gate_values=False, softcap_value=3.0), ff_kwargs=dict(activation="swiglu"))
    for layer in model.layers:
        assert layer.attn.to_gates is None
        assert layer.attn.softcap == 3.0
        assert layer.ff.activation == "swiglu"


def record_layers(model: Transformer) -> tuple[list, list]:
    """The arguments and results of every layer, as the model runs."""
    arguments, results = [], []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: arguments.append(args))
        layer.register_forward_hook(lambda module, args, out: results.append(out))
    return arguments, results


@pytest.mark.parametrize(
    ("depth", "sources"),
    [(1, [None]), (2, [None, 0]), (3, [None, None, 0]), (4, [None, None, 1, 0]), (5, [None, None, None, 1, 0])],
)
def test_skips_lead_from_the_first_half_to_the_second_innermost_first(depth, sources):
    model, (x, condition) = make(depth=depth), inputs()
    arguments, results = record_layers(model)
    out = model(x, **MADE.arguments(condition))
    for (_, skipped, *_), source in zip(arguments, sources, strict=True):
        assert skipped is (None if source is None else results[source][0])
    assert [layer.skip is not None for layer in model.layers] == [source is not None for source in sources]

    without = make(depth=depth, unet_skips=False)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if ".skip." not in k})
    plain = without(x, **MADE.arguments(condition))
    assert torch.allclose(out, plain, atol=1e-3) == (depth == 1)
    for layer in model.layers[(depth + 1) // 2 :]:
        layer.skip.weight.data.zero_()
    torch.testing.assert_close(model(x, **MADE.arguments(condition)), plain, rtol=0, atol=1e-10)


def test_a_skip_adds_a_linear_map_of_both():
    model = fresh(depth=2).double()  # whose layers leave latents as they are, but for the skip
    made = stream("AAAA", "BB")
    x, condition = inputs(made)
    _, results = record_layers(model)
    model(x, **made.arguments(condition))
    here, there = model.layers[1].skip.weight.split(DIM, dim=1)
    torch.testing.assert_close(results[1][0], x + x @ here.T + x @ there.T, rtol=0, atol=1e-10)


def test_the_value_residual_mixes_with_the_first_layers_values():
    model, (x, condition) = make(use_value_residual=True, depth=4), inputs()
    seen, values = [], []
    for layer in model.layers:
        layer.attn.register_forward_pre_hook(
            lambda module, args, options: seen.append(options["first_values"]), with_kwargs=True
        )
        layer.attn.register_forward_hook(lambda module, args, out: values.append(out[1]))
    out = model(x, **MADE.arguments(condition))
    assert seen[0] is None
    assert all(first is values[0] for first in seen[1:])
    assert [layer.attn.to_value_mix is not None for layer in model.layers] == [False, True, True, True]

    without = make(depth=4)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "value_mix" not in k})
    plain = without(x, **MADE.arguments(condition))
    assert not torch.allclose(out, plain, atol=1e-3)
    for layer in model.layers[1:]:
        layer.attn.to_value_mix.weight.data.zero_()
        layer.attn.to_value_mix.bias.data.fill_(-60)  # nothing of the first layer's
    torch.testing.assert_close(model(x, **MADE.arguments(condition)), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("streams", "fracs"), [(4, 1), (1, 4), (2, 2)])
def test_residual_connections_are_learned_and_used(streams, fracs):
    plain, connected = fresh(), fresh(num_residual_streams=streams, num_residual_fracs=fracs)
    assert count(connected) > count(plain)
    connected.load_state_dict(plain.state_dict(), strict=False)
    x, condition = inputs(dtype=torch.float32)
    arguments = MADE.arguments(condition)
    if fracs == 1:  # all streams start equal, so that nothing changes but the size, which the last norm takes away
        torch.testing.assert_close(connected(x, **arguments), plain(x, **arguments), rtol=0, atol=1e-4)
    added = [parameter for name, parameter in connected.named_parameters() if "connection" in name]
    assert count(connected) - count(plain) == sum(parameter.numel() for parameter in added)
    before = connected(x, **arguments)
    with torch.no_grad():
        for parameter in added:
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(connected(x, **arguments), before, atol=1e-3)


@pytest.mark.parametrize("options", [OPTIONS["streams"], OPTIONS["fracs"], OPTIONS["everything"]])
def test_training_lowers_a_loss(options):
    model, (x, condition) = fresh(**options), inputs(dtype=torch.float32)
    target = torch.randn(len(x), DIM)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(12):
        loss = F.mse_loss(model(x.detach(), **MADE.arguments(condition.detach())), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# dropout


def test_dropout_acts_in_training_alone_and_by_the_seed():
    (x, condition), plain = inputs(), make()
    model = make(dropout=0.5)
    arguments = MADE.arguments(condition)
    without = plain(x, **arguments)
    assert torch.equal(model.eval()(x, **arguments), without)
    model.train()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(x, **arguments))
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2], atol=1e-3)
    assert not torch.allclose(outs[0], without, atol=1e-3)


def test_dropout_inside_a_feedforward_is_called_where_somebody_would_notice():
    """With all but dropout in evaluation, as for the uncertainty of answers; and when it has a hook, or is replaced."""
    ff, x = FeedForward(16, dropout=0.5).eval(), torch.randn(64, 16)
    quiet = ff(x)
    ff.dropout.train()
    assert not torch.equal(ff(x), quiet)
    calls = []
    handle = ff.dropout.eval().register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(ff(x), quiet)
    assert calls == [1]
    handle.remove()
    ff.dropout = torch.nn.Softplus()
    assert not torch.equal(ff(x), quiet)


def test_dropout_of_everything_leaves_the_residual():
    model, (x, condition) = make(dropout=1.0, unet_skips=False), inputs()
    final = model.final_norm
    expected = final(x, final.modulation(MADE.conditioning(condition)))
    torch.testing.assert_close(model(x, **MADE.arguments(condition)), expected, rtol=0, atol=1e-12)
    for layer in model.layers:
        assert torch.equal(layer.ff(x), layer.ff.to_out.bias.expand_as(x))


# checkpoints


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("options", [dict(), dict(dropout=0.3), dict(EVERYTHING, dropout=0.3)])
def test_computing_layers_again_gives_the_same_loss_and_gradients(options, how):
    gradients = []
    for use_checkpoint in (False, how):
        model, leaves = make(**options | dict(use_checkpoint=use_checkpoint)), inputs()
        torch.manual_seed(3)
        loss = model(leaves[0], **MADE.arguments(leaves[1])).square().sum()
        gradients.append((loss, *torch.autograd.grad(loss, [*leaves, *model.parameters()])))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_computing_layers_again_saves_memory():
    every_layer, again = (numbers_saved(make(depth=8, use_checkpoint=flag)) for flag in (False, True))
    between = 8 * MADE.span.numel() * DIM  # what goes into each layer is kept as well, but not by a hook
    assert again + between < every_layer / 5


def test_selective_checkpoints_keep_products_and_attention_and_make_nothing_else_again():
    """Of attention and feedforward: one forward and one backward of each kernel, as without checkpoints."""
    counts = []
    for how in (False, "selective", True):
        model, (x, condition) = make(depth=4, use_checkpoint=how), inputs()
        with Products() as products:
            model(x, **MADE.arguments(condition)).sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1] < counts[2]


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kernels = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
        self.count += function.name() in kernels
        return function(*args, **(kwargs or {}))


@no_typecheck
def test_other_kinds_of_checkpoints_are_refused():
    with pytest.raises(ValueError, match="use_checkpoint must be True, False or 'selective', got 'all'"):
        make(use_checkpoint="all")


def test_checkpoints_are_turned_on_and_off_as_in_other_libraries():
    model = make()
    assert model.use_checkpoint is False
    model.gradient_checkpointing_enable()
    assert model.use_checkpoint is True
    model.gradient_checkpointing_enable("selective")
    assert model.use_checkpoint == "selective"
    model.gradient_checkpointing_disable()
    assert model.use_checkpoint is False


def numbers_saved(model: Transformer) -> int:
    """How many numbers the forward pass keeps for the backward pass, those of parameters left out."""
    (x, condition), saved = inputs(), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, **MADE.arguments(condition))
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(tensor.numel() for pointer, tensor in saved.items() if pointer not in parameters)


# gradients and precision


def test_every_parameter_learns():
    model, (x, condition) = make(**EVERYTHING), inputs()
    model(x, **MADE.arguments(condition)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_text_alone_teaches_everything_but_the_modulation_of_spans():
    model, made = make(), stream("tttt", "tt")
    model(torch.randn(6, DIM, dtype=torch.float64), **made.arguments()).square().sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == [name for name, _ in model.named_parameters() if "to_modulation" in name]


@each_option
@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_bfloat16_is_close_to_single_precision_forward_and_backward(options, how):
    model, leaves = perturb(fresh(**options), 0.1), inputs(dtype=torch.float32)
    exact = model(leaves[0], **MADE.arguments(leaves[1]))
    exact_gradients = torch.autograd.grad(exact.square().mean(), leaves)
    if how == "parameters":
        model, leaves = model.bfloat16(), [leaf.bfloat16().detach().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = model(leaves[0], **MADE.arguments(leaves[1]))
    loss = out.float().square().mean()
    gradients = torch.autograd.grad(loss, [*leaves, *model.parameters()], allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    for ours, theirs in zip((out, *gradients), (exact, *exact_gradients), strict=False):
        assert (ours.float() - theirs).norm() < 0.1 * theirs.norm()


@torch.no_grad()
def test_flex_serves_under_autocast(monkeypatch):
    model, (x, condition) = make(use_flex_attn=True, depth=1).float(), inputs(dtype=torch.float32)
    monkeypatch.setattr(attend, "RaggedAttention", None)  # which must not be called
    exact = model(x, **MADE.arguments(condition))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, **MADE.arguments(condition))
    assert (rounded - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "made"), [("flex", "block_tables"), ("dense", "visible")])
def test_layers_share_one_plan(kind, made, monkeypatch):
    calls, real = [], getattr(masks, made)
    monkeypatch.setattr(masks, made, lambda *args, **options: calls.append(1) or real(*args, **options))
    model, (x, condition) = make().float(), inputs(dtype=torch.float32)
    model.attention = kind
    model(x, **MADE.arguments(condition))
    assert len(calls) == 1


def test_gradients_of_inputs_need_no_flex_attention_of_a_frozen_model():
    """As where an adapter in front of it is trained: on a CPU flex attention has no backward."""
    attend._say_flex_fallback.cache_clear()
    flex, plain = (make(use_flex_attn=flag).requires_grad_(False) for flag in (True, False))
    leaves = inputs()
    with pytest.warns(UserWarning, match="torch has no backward of flex attention on this device"):
        out = flex(leaves[0], **MADE.arguments(leaves[1]))
    outs = out, plain(leaves[0], **MADE.arguments(leaves[1]))
    gradients = [torch.autograd.grad(made.square().sum(), leaves) for made in outs]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# what holds the model


def test_muon_gets_the_matrices_of_all_linear_layers_once_each():
    model = make(**EVERYTHING)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for parameter in hidden_matrices(model)]
    linear = ["attn.to_qkv", "attn.to_gates", "attn.to_out", "attn_norm.to_modulation", "ff.to_hidden", "ff.to_out"]
    linear += ["ff_norm.to_modulation"]
    expected = [f"layers.{i}.{name}.weight" for i in range(3) for name in linear]
    expected += [f"layers.{i}.attn.to_value_mix.weight" for i in (1, 2)] + [
        "layers.2.skip.weight",
        "final_norm.to_modulation.weight",
    ]
    assert sorted(found) == sorted(expected)
    assert all(parameter.ndim == 2 for parameter in hidden_matrices(model))


@each_option
def test_a_model_survives_copying_and_saving(options):
    model, (x, condition) = make(**options), inputs()
    expected = model(x, **MADE.arguments(condition))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    reloaded = torch.load(file, weights_only=False)
    filled = make(**options, seed=5)
    filled.load_state_dict(model.state_dict())
    for again in (copy.deepcopy(model), reloaded, filled):
        assert torch.equal(again(x, **MADE.arguments(condition)), expected)


def test_a_copy_is_independent():
    model, (x, condition) = make(**EVERYTHING), inputs()
    before = model(x, **MADE.arguments(condition))
    perturb(copy.deepcopy(model))
    assert torch.equal(model(x, **MADE.arguments(condition)), before)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored(name):
    """Each makes another function of the same inputs, but for checkpoints, which must not."""
    x, condition = inputs()
    plain, model = make(), make(**OPTIONS[name])
    for module in (plain, model):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.6, parameter.numel()).reshape(parameter.shape))
    same = torch.allclose(model(x, **MADE.arguments(condition)), plain(x, **MADE.arguments(condition)), atol=1e-6)
    assert same == (name in ("default", "checkpoint"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=0), "dim must be positive, got 0"),
        (dict(depth=0), "depth must be positive, got 0"),
        (dict(heads=0), "heads must be positive, got 0"),
        (dict(dim_head=-2), "dim_head must be positive, got -2"),
        (dict(dim_head=5), "dim_head must be even for rotary positions, got 5"),
        (dict(kv_heads=3), "heads must be a multiple of kv_heads, got 8 and 3"),
        (dict(num_residual_streams=0), "num_residual_streams and num_residual_fracs must be positive"),
        (dict(num_residual_fracs=0), "num_residual_streams and num_residual_fracs must be positive"),
        (dict(num_residual_fracs=5), "dim a multiple of the latter, got 12, 1 and 5"),
        (dict(ff_kwargs=dict(activation="relu")), "activation must be one of geglu, swiglu, got 'relu'"),
        (dict(ff_expansion_factor=0), "expansion_factor"),
        (dict(dropout=1.5), "dropout"),
        (dict(attn_kwargs=dict(softcap_value=-1)), "softcap_value must be positive, got -1"),
        (
            dict(attn_kwargs=dict(kv_heads=2)),
            "attn_kwargs takes gate_values, softcap_value, .*, got kv_heads",
        ),
        (
            dict(attn_kwargs=dict(laser=True)),
            "attn_kwargs takes gate_values, softcap_value, .*, got laser",
        ),
        (dict(ff_kwargs=dict(dropout=0.1)), "ff_kwargs takes activation, dim_hidden, bias, got dropout"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**dict(dim=DIM, depth=1) | options)
