"""Compiled layers against the same layers uncompiled: numbers, gradients, samples, and that one graph serves all
batches of one number of tokens and of spans.

Most tests stop before code is generated (`aot_eager`): graphs and guards are what they are about.
"""

import copy
import io
import warnings
from inspect import signature

import pytest
import torch
from checks import TYPECHECK, compiles
from network_streams import perturb
from torch import nn

from transfusion_pytorch import Transfusion
from transfusion_pytorch.network.compile import compiled

# torch's own, while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
]
no_other_graph = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def graphs_of_each_test_alone():
    torch.compiler.reset()


def pair(backend="aot_eager", attention="dense", time="norms", **transformer):
    """A model, and a copy of it that is compiled."""
    torch.manual_seed(0)
    width = dict(dim=16, depth=2, heads=2, dim_head=8) | transformer
    shared = dict(num_text_tokens=16, dim_latent=4, modality_default_shape=(2, 2))
    plain = Transfusion(**shared, transformer=width, time_conditioning=time)
    perturb(plain, 0.1)
    compiled = copy.deepcopy(plain)
    compiled.transformer.attention = attention
    compiled.compile(backend=backend)
    return plain, compiled


# Lengths of text, axial shape and text: one number of tokens and two spans in each batch, and another layout. A shape
# is written in three characters, and a span has three markers, so that all that differs is listed here.
PADDED = [
    [((5,), (2, 3), (1,)), ((4,), (1, 4), (7,))],
    [((1,), (3, 2), (2,)), ((3,), (2, 2), (11,))],
    [((9,), (2, 2), (3,)), ((2,), (3, 2), (3,))],
]


def batch_of(which, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = lambda size: torch.randint(0, 16, size, generator=generator)  # noqa: E731
    return [
        [text(before), torch.randn(*shape, 4, generator=generator), text(after)]
        for before, shape, after in PADDED[which]
    ]


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(batch, **options)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def loss_of(model, batch):
    torch.manual_seed(1)
    return model(batch)


def check_training(plain, compiled, batch, **options):
    (loss, gradients), (other_loss, other_gradients) = (
        loss_and_gradients(model, batch, **options) for model in (plain, compiled)
    )
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


EVERYTHING = dict(
    kv_heads=1,
    use_value_residual=True,
    attn_laser=True,
    attn_kwargs=dict(softcap_value=3.0, gate_values=False),
    ff_kwargs=dict(activation="swiglu"),
)
OPTIONS = {"default": {}, "everything": EVERYTHING, "selective": dict(use_checkpoint="selective")}
SLOW_OPTIONS = {
    "plain heads": dict(qk_rmsnorm=False, unet_skips=False),
    "checkpoint": dict(use_checkpoint=True, dropout=0.0),
    "streams": dict(num_residual_streams=2),
    "fractions": dict(num_residual_fracs=2),
    "everything and selective": dict(EVERYTHING, use_checkpoint="selective", num_residual_streams=2),
}


@compiles
@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in OPTIONS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in SLOW_OPTIONS.items()),
    ],
)
def test_training_is_the_same_and_one_graph_serves_all_batches_of_one_size(options):
    plain, compiled = pair(**options)
    check_training(plain, compiled, batch_of(0))
    with no_other_graph:
        for which in (1, 2):
            check_training(plain, compiled, batch_of(which, seed=which))


@compiles
def test_all_layers_of_a_kind_share_a_graph():
    """The first half, the layer whose skip is what it reads anyway, and the other layers with a skip."""
    torch._dynamo.utils.counters.clear()
    _, compiled = pair(backend="eager", depth=6)
    loss_of(compiled, batch_of(0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@compiles
def test_text_alone_and_spans_alone_have_a_graph_each():
    plain, compiled = pair(backend="aot_eager", unet_skips=False, depth=1)
    check_training(plain, compiled, torch.randint(0, 16, (2, 6)))
    check_training(plain, compiled, torch.randn(2, 3, 4, 4), modality_type=0)
    with no_other_graph:
        check_training(plain, compiled, torch.randint(0, 16, (3, 4)))
        check_training(plain, compiled, torch.randn(2, 2, 6, 4), modality_type=0)


@compiles
@torch.no_grad()
def test_flex_attention_in_a_graph_serves_all_batches_of_one_size():
    """In inference: on a CPU torch has no backward of it."""
    plain, compiled = pair("eager", "flex", attn_kwargs=dict(softcap_value=3.0), kv_heads=1, depth=1)
    torch.testing.assert_close(loss_of(compiled, batch_of(0)), loss_of(plain, batch_of(0)))
    with no_other_graph:
        for which in (1, 2):
            torch.testing.assert_close(loss_of(compiled, batch_of(which)), loss_of(plain, batch_of(which)))


@compiles
@pytest.mark.parametrize(("norm", "time"), [("adaptive", "norms"), ("rms", "added")])
def test_steps_of_sampling_share_graphs_and_make_the_same_samples(norm, time):
    plain, compiled = pair(depth=4, norm=norm, time=time)
    prompts = [[torch.arange(1 + i % 4)] for i in range(3)]
    options = dict(modality_steps=2, cache_kv=True, max_length=20, cfg_scale=2.0)
    samples = []
    for model in (plain, compiled, compiled):
        torch.manual_seed(2)
        torch._dynamo.utils.counters.clear()
        samples.append(model.sample_many(prompts, plan=["text", (0, (2, 2)), ("text", 3)], **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0, "the third run needs no new graph"
    for sample, others in zip(samples[0], zip(*samples[1:], strict=True), strict=True):
        for other in others:
            for part, part_of_other in zip(sample, other, strict=True):
                torch.testing.assert_close(part_of_other, part, rtol=1e-4, atol=1e-4)


@compiles
def test_number_of_layers_adds_no_graphs_to_a_decode_step():
    counts = []
    for depth in (4, 8):
        torch.compiler.reset()
        _, compiled = pair(depth=depth)
        torch._dynamo.utils.counters.clear()
        compiled.sample([torch.arange(3)], plan=[("text", 6)], max_length=20)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0


@compiles
def test_autocast_reaches_into_the_graph():
    plain, compiled = pair()
    with torch.autocast("cpu", torch.bfloat16):
        (expected, _), (got, _) = (loss_and_gradients(model, batch_of(2)) for model in (plain, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    full, _ = loss_and_gradients(compiled, batch_of(2))
    assert not torch.equal(full, got)


@compiles
def test_copies_and_saved_models_stay_compiled_and_run_their_own_layers():
    plain, compiled = pair("eager")
    ema = compiled.create_ema()
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter += 0.1
    average = ema.ema_model
    assert average.transformer.compile_options == compiled.transformer.compile_options
    torch.testing.assert_close(loss_of(average, batch_of(1)), loss_of(plain, batch_of(1)))
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.transformer.compile_options == compiled.transformer.compile_options
    torch.testing.assert_close(loss_of(loaded, batch_of(1)), loss_of(compiled, batch_of(1)))
    assert list(compiled.state_dict()) == list(plain.state_dict())


@compiles
@pytest.mark.parametrize("attention", ["auto", "ragged"])
def test_on_a_cpu_it_says_that_there_is_nothing_to_gain_and_computes_as_before(attention):
    width = dict(dim=16, depth=1, heads=2, dim_head=8)
    model = Transfusion(num_text_tokens=16, dim_latent=4, transformer=width)
    model.transformer.attention = attention
    before = loss_of(model, batch_of(0))
    with pytest.warns(UserWarning, match="compile.. changes nothing on a CPU") as said:
        model.compile(backend="eager")
    assert len(said) == 1
    torch._dynamo.utils.counters.clear()
    assert torch.equal(loss_of(model, batch_of(0)), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@compiles
def test_nothing_of_dynamo_is_changed_for_others():
    config = torch._dynamo.config.get_config_copy()
    _, compiled = pair("eager", depth=1)
    loss_of(compiled, batch_of(0))
    changed = {name for name, value in torch._dynamo.config.get_config_copy().items() if value != config[name]}
    # older versions have a limit of graphs for the whole process only
    assert changed <= (set() if "recompile_limit" in signature(torch.compile).parameters else {"recompile_limit"})


def test_one_function_is_compiled_for_all_models_and_options():
    options = dict(backend="eager", fullgraph=True)
    function = lambda layer: layer  # noqa: E731
    assert compiled(function, options) is compiled(function, dict(reversed(options.items())))
    assert compiled(function, options) is not compiled(function, options | dict(dynamic=False))


def test_a_transformer_of_the_users_own_is_refused():
    own = nn.Linear(4, 4)
    own.dim = 4
    with pytest.raises(TypeError, match="this is a Linear"):
        Transfusion(num_text_tokens=4, transformer=own).compile()


@pytest.mark.skipif(not TYPECHECK, reason="only TYPECHECK=1 cannot be compiled")
def test_compiling_what_checks_types_is_refused():
    with pytest.raises(RuntimeError, match="compile without TYPECHECK=1"):
        pair()


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of the code generator
@pytest.mark.parametrize("options", [{}, dict(EVERYTHING, use_checkpoint="selective")], ids=["default", "everything"])
def test_generated_code_computes_the_same(options):
    plain, compiled = pair("inductor", **options)
    check_training(plain, compiled, batch_of(0))
    with no_other_graph:
        for which in (1, 2):
            check_training(plain, compiled, batch_of(which, seed=which))


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_generated_flex_attention_computes_the_same():
    plain, compiled = pair("inductor", "flex", heads=2, dim_head=16)
    for which in range(3):
        with no_other_graph if which else warnings.catch_warnings():
            torch.testing.assert_close(loss_of(compiled, batch_of(which)), loss_of(plain, batch_of(which)))
