"""`MMDiT` and `InContextMMDiT` as wholes: zero at the start, times, who sees whom, precision, compilation, errors."""

import copy
import io

import pytest
import torch
from checks import compiles
from mmdit_models import DIMS, OUTS, SIZES, awake, in_context, influence, mmdit, reachable, refused, tokens
from torch import randn

from transfusion_pytorch import InContextMMDiT, MMDiT, plain_formulas
from transfusion_pytorch.mmdit import AdaptiveLayerNorm, TimestepEmbedding, imitation_mask
from transfusion_pytorch.mmdit.blocks import AdaptiveModality

T = torch.tensor([0.2, 0.7]).double()
KINDS = {
    "adaptive": (mmdit, (T,)),
    "in context": (in_context, ()),
}
both = pytest.mark.parametrize(("make", "time"), KINDS.values(), ids=KINDS)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def total(outs):
    return sum(out.square().sum() for out in outs if out is not None)


# at the start


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_output_is_zero(depth, count):
    sizes = dict(dim_modalities=DIMS[:count], dim_outs=OUTS[:count]) | SIZES
    inputs = tuple(x.float() for x in tokens(count))
    for model, time in ((MMDiT(depth=depth, dim_cond=16, **sizes), (0.5,)), (InContextMMDiT(depth=depth, **sizes), ())):
        outs = model(inputs, *time)
        assert [out.shape for out in outs] == [(*x.shape[:2], dim) for x, dim in zip(inputs, OUTS, strict=False)]
        assert all(torch.equal(out, torch.zeros_like(out)) for out in outs)


def test_adaptive_blocks_start_as_the_identity_in_a_model():
    model = MMDiT(depth=3, dim_modalities=DIMS, dim_outs=OUTS, num_registers=2, **SIZES)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, outs: seen.append((inputs[0], outs)))
    model(tuple(x.float() for x in tokens(3)), 0.3)
    assert len(seen) == 3
    assert all(torch.equal(x, out) for inputs, outs in seen for x, out in zip(inputs, outs, strict=True))


def test_four_modalities_and_one_width_of_output_for_all():
    model = MMDiT(depth=1, dim_modalities=(4, 5, 6, 7), dim_outs=3, dim_cond=8, **SIZES)
    outs = awake(model)(tuple(randn(2, 3, dim).double() for dim in (4, 5, 6, 7)), 0.1)
    assert [out.shape for out in outs] == [(2, 3, 3)] * 4


def test_the_default_widths_are_those_of_the_field():
    model = MMDiT(depth=1, dim_modalities=(32,), dim_outs=8)
    (block,) = model.blocks
    assert model.embed_times[0].layers[0].weight.shape == (1024, 256)
    assert block.attn.modalities[0].to_qkv.weight.shape == (3 * 8 * 64, 32)
    assert block.modalities[0].ff.to_out.weight.shape == (32, 128)
    names = {name for name, _ in block.named_parameters() if name.endswith("bias")}
    assert all(name.endswith("to_modulation.bias") for name in names)


@both
def test_everything_learns(make, time):
    model = make(num_registers=1)
    total(model(tokens(), *time)).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_reset_parameters_makes_a_model_new():
    for model, time in ((mmdit(num_registers=2), (0.5,)), (in_context(num_registers=2), ())):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.reset_parameters()
        after = model.state_dict()
        assert not any(torch.equal(before[name], after[name]) for name in before)
        assert all(torch.equal(out, torch.zeros_like(out)) for out in model(tokens(), *time))


# who sees whom


@both
@pytest.mark.parametrize("count", [1, 2, 3])
def test_without_a_mask_every_output_depends_on_every_token(make, time, count):
    model = make(count)
    assert influence(lambda given: model(given, *time), tokens(count)).all()


@both
def test_with_a_mask_outputs_depend_on_what_can_reach_them(make, time):
    model, mask = make(depth=2), (torch.rand(7, 7) < 0.2)
    assert torch.equal(influence(lambda given: model(given, *time, mask), tokens()), reachable(mask, 2))


def test_an_imitation_mask_hides_actions_from_observations_and_later_ones_from_earlier_ones():
    mask = imitation_mask(2, 3)
    assert mask.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    model = in_context(depth=3)
    seen = influence(lambda given: model(given, imitation_mask(4, 3)), tokens())
    assert torch.equal(seen, imitation_mask(4, 3))


def test_time_tokens_before_the_actions_tell_a_model_in_context_the_time():
    model, embed = in_context(), awake(TimestepEmbedding(8, timestep_embed_dim=4))
    observations, actions = tokens()

    def velocity(t):
        time = embed(torch.full((2, 1), t).double())
        return model((observations, torch.cat((time, actions), dim=1)), imitation_mask(4, 4))[1][:, 1:]

    assert velocity(0.1).shape == (2, 3, 5)
    assert not torch.allclose(velocity(0.1), velocity(0.9), atol=1e-4)


@both
def test_samples_do_not_know_each_other(make, time):
    model, inputs = make(), tokens()
    together = model(inputs, *time)
    for i in range(2):
        alone = model(tuple(x[i : i + 1] for x in inputs), *(t[i : i + 1] for t in time))
        close(tuple(x[i : i + 1] for x in together), alone)


@both
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_batch_dimensions_are_free(make, time, batch):
    model, inputs = make(num_registers=(1, 0)), tokens(batch=batch)
    times = (torch.rand(batch).double(),) if time else ()
    outs = model(inputs, *times)
    assert [out.shape for out in outs] == [(*x.shape[:-1], dim) for x, dim in zip(inputs, OUTS, strict=False)]
    flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in inputs)
    again = model(flat, *(t.reshape(-1) for t in times))
    close(outs, tuple(out.reshape(now.shape) for out, now in zip(again, outs, strict=True)))


@both
def test_a_modality_without_output_comes_back_as_none(make, time):
    full, less = make(), make(dim_outs=(3, None))
    state = {name: tensor for name, tensor in full.state_dict().items() if name in less.state_dict()}
    last = "blocks.1.attn.modalities.1.to_qkv.weight"
    state[last] = state[last][16:]
    if time:
        norm = "blocks.1.modalities.1.to_modulation"
        for part in ("weight", "bias"):
            state[f"{norm}.{part}"] = state[f"{norm}.{part}"][:16]
    less.load_state_dict(state)
    inputs = tokens()
    mask = (torch.rand(7, 7) < 0.5) | torch.eye(7, dtype=torch.bool)
    for given in ((), (mask,)):
        image, nothing = less(inputs, *time, *given)
        assert nothing is None
        close(image, full(inputs, *time, *given)[0])
    assert all(parameter.requires_grad for parameter in less.parameters())
    total(less(inputs, *time)).backward()
    assert all(parameter.grad is not None for parameter in less.parameters())


# times


def test_one_time_for_all_for_samples_and_for_tokens_agree():
    model, inputs = mmdit(), tokens()
    expected = model(inputs, 0.3)
    for shape in ((), (2,), (2, 7)):
        close(model(inputs, torch.full(shape, 0.3, dtype=torch.float64)), expected)
    assert not torch.allclose(model(inputs, 0.4)[0], expected[0], atol=1e-3)


def test_a_token_has_its_own_time():
    model, inputs = mmdit(depth=1), tokens()
    time = torch.rand(2, 7).double().requires_grad_()
    outs = model(inputs, time, torch.eye(7, dtype=torch.bool))
    outs[1][:, 2].square().sum().backward()
    assert time.grad.ne(0).any(dim=0).tolist() == [*[False] * 6, True]


def test_several_conditioning_variables_are_summed():
    model, inputs = mmdit(timestep_embed_dim=(8, 4)), tokens()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0]))
    r = torch.rand(2, 7).double()
    model(inputs, (T, r))
    t_embedded, r_embedded = model.embed_times[0](T), model.embed_times[1](r)
    close(seen[0], torch.nn.functional.silu(t_embedded[:, None] + r_embedded)[:, :4])
    assert not torch.allclose(model(inputs, (T, 0.1))[0], model(inputs, (T, 0.9))[0], atol=1e-3)


def test_a_number_of_numpy_is_a_time():
    np = pytest.importorskip("numpy")
    model, inputs = mmdit(), tokens()
    close(model(inputs, np.float32(0.5)), model(inputs, 0.5), atol=0)


def test_a_pooled_vector_joins_the_condition():
    model, inputs = mmdit(dim_pooled=6), tokens()
    pooled = [randn(2, 6).double() for _ in range(2)]
    outs = [model(inputs, T, pooled=each)[0] for each in pooled]
    assert not torch.allclose(*outs, atol=1e-3)
    with pytest.raises(ValueError, match=r"pooled: expected a vector for each sample, of shape \(2, 6\), got nothing"):
        model(inputs, T)
    with pytest.raises(ValueError, match=r"pooled: expected .* of shape \(2, 6\), got \(2, 5\)"):
        model(inputs, T, pooled=randn(2, 5))
    with refused(TypeError, r"pooled must be a tensor of shape \(2, 6\), got list", is_type=True):
        model(inputs, T, pooled=pooled[0].tolist())
    with pytest.raises(ValueError, match="pooled: this model was built without dim_pooled"):
        mmdit()(inputs, T, pooled=pooled[0])


@pytest.mark.parametrize(
    ("embed", "time", "message"),
    [
        (8, None, r"timestep is missing: expected a number, or a tensor of shape \(2,\) .* or \(2, 7\)"),
        (8, (0.1, 0.2), r"timestep: expected 1 in a tuple, .* got 2"),
        ((8, 8), 0.1, r"timestep: expected 2 in a tuple, one for each conditioning variable .* got 1"),
        ((8, 8), None, "timestep is missing: .* 2 of them in a tuple"),
        (8, torch.rand(3), r"timestep: expected a number, or the shape \(2,\) .* or \(2, 7\) .* got \(3,\)"),
        ((8, 8), (0.1, torch.rand(2, 6)), r"timestep 1: expected a number, or the shape .* got \(2, 6\)"),
    ],
)
def test_wrong_times_are_refused(embed, time, message):
    with pytest.raises(ValueError, match=message):
        mmdit(timestep_embed_dim=embed)(tokens(), time)


def test_times_of_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match=r"timestep must be a number or a tensor of numbers, got torch\.bool"):
        mmdit()(tokens(), torch.tensor([True, False]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch does itself
def test_forward_mode_gives_the_derivative_by_the_time():
    """Mean flow needs it (arXiv 2505.13447)."""
    model, inputs, step = mmdit(), tokens(), 1e-5
    with plain_formulas():
        _, slope = torch.func.jvp(lambda t: model(inputs, t)[0], (T,), (torch.ones_like(T),))
    close(slope, (model(inputs, T + step)[0] - model(inputs, T - step)[0]) / (2 * step), atol=1e-6)


# options and positions


@pytest.mark.parametrize(
    ("make", "time", "options"),
    [
        (mmdit, (T,), dict(timestep_scale=1000.0)),
        (mmdit, (T,), dict(norm_eps=0.1)),
        (mmdit, (T,), dict(rotary_theta=10.0)),
        (in_context, (), dict(rotary_theta=10.0)),
    ],
)
def test_no_option_is_ignored(make, time, options):
    model, other, inputs = make(), make(**options), tokens()
    other.load_state_dict(model.state_dict())
    for out, changed in zip(model(inputs, *time), other(inputs, *time), strict=True):
        assert not torch.allclose(out, changed, atol=1e-4)


def test_the_epsilon_of_norms_reaches_blocks_and_last_layers():
    norms = [
        module for module in mmdit(norm_eps=0.1).modules() if isinstance(module, AdaptiveModality | AdaptiveLayerNorm)
    ]
    assert [norm.eps for norm in norms] == [0.1] * (2 * 2 + 2)


@both
def test_positions_reach_the_blocks(make, time):
    model, inputs = make(), tokens()
    counted = [torch.arange(x.shape[1])[:, None] for x in inputs]
    close(model(inputs, *time, positions=counted), model(inputs, *time))
    spread = model(inputs, *time, positions=[9 * each for each in counted])
    assert not torch.allclose(spread[0], model(inputs, *time)[0], atol=1e-4)
    with refused(
        TypeError, r"positions of modality 0: expected None, a tuple of sizes such as .* got int", is_type=True
    ):
        model(inputs, *time, positions=(2, 2))


# precision, memory, graphs


@both
def test_plain_formulas_agree(make, time):
    model, inputs = make(num_registers=1), tokens()
    leaves = list(model.parameters())
    fast = model(inputs, *time)
    with plain_formulas():
        plain = model(inputs, *time)
    close(fast, plain)
    close(*(torch.autograd.grad(total(outs), leaves) for outs in (fast, plain)))


@both
def test_checkpoints_change_nothing_but_memory(make, time):
    model, inputs = make(), tokens()
    leaves = list(model.parameters())
    expected = torch.autograd.grad(total(model(inputs, *time)), leaves)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(total(model(inputs, *time)), leaves)
    assert len(calls) == 2
    close(found, expected, atol=0)
    model.gradient_checkpointing_disable()
    total(model(inputs, *time)).backward()
    assert len(calls) == 3


@both
@pytest.mark.parametrize("options", [{}, dict(qk_norm="layer"), dict(rope_axes=0, activation="gelu", attn_bias=True)])
def test_autocast_is_near_single_precision(make, time, options):
    model = awake(make(**options), std=0.1).float()
    inputs = tuple(x.float() for x in tokens())
    exact = model(inputs, *time)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(inputs, *time)
        total(rounded).backward()
    for near, far in zip(rounded, exact, strict=True):
        assert (near - far).abs().max() < 0.05 * far.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@both
def test_models_in_bfloat16_stay_in_it(make, time):
    model = awake(make(num_registers=1), std=0.1)
    inputs = tokens()
    exact = model(inputs, *time)
    outs = model.bfloat16()(tuple(x.bfloat16() for x in inputs), *time)
    for near, far in zip(outs, exact, strict=True):
        assert near.dtype == torch.bfloat16
        assert (near - far).abs().max() < 0.1 * far.abs().max()


@compiles
@both
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_model_compiles_whole(make, time, has_mask):
    torch._dynamo.reset()
    model, inputs = make(depth=1), tokens()
    given = (torch.ones(7, 7, dtype=torch.bool).tril(),) if has_mask else ()
    leaves = list(model.parameters())
    expected = model(inputs, *time, *given)
    if has_mask:
        model.attention = "flex"  # which trains through SDPA on a CPU, in a graph too
    outs = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs, *time, *given), expected
    close(*outs)
    close(*(torch.autograd.grad(total(each), leaves) for each in outs))


@both
def test_the_meta_device_is_enough_for_shapes_and_gradients(make, time):
    model = make().to("meta")
    outs = model(tuple(x.to("meta") for x in tokens()), *(t.to("meta") for t in time))
    total(outs).backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())


@both
def test_models_can_be_copied_and_pickled(make, time):
    model, inputs = make(num_registers=1), tokens()
    expected = model(inputs, *time)
    close(copy.deepcopy(model)(inputs, *time), expected, atol=0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(inputs, *time), expected, atol=0)


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim_modalities=()), "dim_modalities is empty: there must be at least one modality"),
        (dict(dim_outs=(1, 2, 3)), "dim_outs: expected one for each of 2 modalities, or one for all, got 3"),
        (dict(dim_outs=(None, None)), "dim_outs: at least one modality must have an output, all are None"),
        (dict(dim_outs=(3, 0)), "dim_outs must be positive, got 0"),
        (dict(dim_cond=0), "dim_cond must be positive, got 0"),
        (dict(depth=0), "depth must be positive, got 0"),
        (dict(num_registers=(1,)), "num_registers: expected one for each of 2 modalities, or one for all, got 1"),
        (dict(num_registers=-1), r"num_registers must not be negative, got \(-1, -1\)"),
        (dict(timestep_embed_dim=()), "timestep_embed_dim is empty: there must be at least one conditioning variable"),
        (dict(dual_attention_layers=(2,)), "dual_attention_layers: expected numbers from 0 to 1, got 2"),
        (
            dict(dual_attention_layers=(0,), dual_attention_modalities=(2,)),
            "dual_attention_modalities: expected numbers from 0 to 1, got 2",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mmdit(**options)


def test_an_unknown_backend_is_refused():
    with refused(ValueError, "attention must be 'sdpa' or 'flex', got 'xformers'", is_type=True):
        in_context(attention="xformers")
    with refused(ValueError, "attention must be 'sdpa' or 'flex', got 'flexx'", is_type=True):
        in_context().attention = "flexx"


@both
def test_wrong_tokens_are_refused_by_name(make, time):
    model, (image, text) = make(), tokens()
    with pytest.raises(ValueError, match=r"modality_tokens: expected 2 modalities of widths \(12, 8\), got 1"):
        model((image,), *time)
    with pytest.raises(ValueError, match=r"modality 1: expected .* \(\*batch, tokens, 8\), got \(2, 4, 12\)"):
        model((image, image), *time)
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape \(7, 7\) or \(2, 7, 7\)"):
        model((image, text), *time, torch.ones(6, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask must be bool"):
        model((image, text), *time, torch.ones(7, 7))
