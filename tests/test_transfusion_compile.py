"""Compiled layers against the same layers uncompiled: numbers, gradients, samples, and that one graph serves all sizes.

Most tests stop before code is generated (`aot_eager`): graphs, operators and guards are what they are about.
"""

import copy
import io
import threading

import pytest
import torch
from checks import TYPECHECK, compiles
from network_streams import perturb
from torch import nn

from transfusion_pytorch import Transformer, Transfusion
from transfusion_pytorch.network.transformer import MOST_GRAPHS

# torch's own, while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
]


@pytest.fixture(autouse=True)
def graphs_of_each_test_alone():
    torch.compiler.reset()


def pair(backend="aot_eager", **transformer):
    """A model, and a copy of it that is compiled."""
    torch.manual_seed(0)
    width = dict(dim=16, depth=2, heads=2, dim_head=8) | transformer
    plain = Transfusion(num_text_tokens=16, dim_latent=4, modality_default_shape=(2, 2), transformer=width)
    perturb(plain, 0.1)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=backend)
    return plain, compiled


def mixed(seed):
    """One to four samples of text, a picture and text, all of different lengths; never the same twice."""
    generator = torch.Generator().manual_seed(seed)
    size = lambda high: int(torch.randint(1, high, (), generator=generator))  # noqa: E731
    return [
        [
            torch.randint(0, 16, (size(9),), generator=generator),
            torch.randn(size(4), size(4), 4, generator=generator),
            torch.randint(0, 16, (size(9),), generator=generator),
        ]
        for _ in range(size(5))
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


OPTIONS = {
    "default": {},
    "grouped": dict(kv_heads=1, use_value_residual=True, attn_laser=True),
    "softcap": dict(
        kv_heads=1, attn_kwargs=dict(softcap_value=3.0, gate_values=False), ff_kwargs=dict(activation="swiglu")
    ),
    "plain heads": dict(qk_rmsnorm=False, unet_skips=False),
    "checkpoint": dict(use_checkpoint=True),
}
SLOW_OPTIONS = {"streams": dict(num_residual_streams=2), "fractions": dict(num_residual_fracs=2)}


@compiles
@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in OPTIONS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in SLOW_OPTIONS.items()),
    ],
)
def test_training_is_the_same_and_one_graph_serves_all_sizes(options):
    plain, compiled = pair(**options)
    check_training(plain, compiled, mixed(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 5):
            check_training(plain, compiled, mixed(seed))


@compiles
def test_text_alone_and_spans_alone_have_a_graph_each():
    plain, compiled = pair()
    check_training(plain, compiled, torch.randint(0, 16, (2, 7)))
    check_training(plain, compiled, torch.randn(2, 3, 3, 4), modality_type=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((3, 9), (1, 5), (4, 16), (16, 4)):
            check_training(plain, compiled, torch.randint(0, 16, shape))
        for shape in ((4, 2, 3, 4), (8, 4, 2, 4), (2, 1, 9, 4)):
            check_training(plain, compiled, torch.randn(shape), modality_type=0)


@compiles
def test_samples_are_the_same_while_rows_and_cache_grow():
    plain, compiled = pair()
    prompts = [[torch.arange(1 + i % 4)] for i in range(9)]

    def both(prompts, **options):
        for model in (plain, compiled):
            torch.manual_seed(2)
            yield model.sample_many(prompts, modality_steps=2, cache_kv=True, cfg_scale=2.0, **options)

    first = list(both(prompts[:3], max_length=20))
    with torch.compiler.set_stance("fail_on_recompile"):
        second = list(both(prompts, max_length=90))
    for expected, got in (first, second):
        for sample, other in zip(expected, got, strict=True):
            assert len(sample) == len(other)
            for part, part_of_other in zip(sample, other, strict=True):
                torch.testing.assert_close(part_of_other, part, rtol=1e-4, atol=1e-4)


@compiles
def test_autocast_reaches_into_the_graph():
    plain, compiled = pair()
    with torch.autocast("cpu", torch.bfloat16):
        (expected, _), (got, _) = (loss_and_gradients(model, mixed(2)) for model in (plain, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    full, _ = loss_and_gradients(compiled, mixed(2))
    assert not torch.equal(full, got)


@compiles
def test_copies_and_saved_models_stay_compiled_and_run_their_own_layers():
    plain, compiled = pair()
    ema = compiled.create_ema()
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter += 0.1
    average = ema.ema_model
    assert average.transformer.compile_options == compiled.transformer.compile_options
    torch.testing.assert_close(loss_of(average, mixed(1)), loss_of(plain, mixed(1)))
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.transformer.compile_options == compiled.transformer.compile_options
    torch.testing.assert_close(loss_of(loaded, mixed(1)), loss_of(compiled, mixed(1)))
    assert list(compiled.state_dict()) == list(plain.state_dict())


class Doubled(Transformer):
    def run_layers(self, *inputs):
        return 2 * super().run_layers(*inputs)


@compiles
def test_layers_of_a_subclass_and_options_of_torch_arrive():
    torch.manual_seed(0)
    trunk = Doubled(16, depth=1, heads=2, dim_head=8)
    plain = Transfusion(num_text_tokens=16, transformer=trunk)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager", options={})
    batch = torch.randint(0, 16, (2, 5))
    expected, got, single = (model(batch, return_loss=False) for model in (plain, compiled, undoubled(plain)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, 2 * single, rtol=1e-5, atol=1e-5)


def undoubled(model):
    model = copy.deepcopy(model)
    model.transformer.__class__ = Transformer
    return model


@compiles
def test_other_threads_have_room_for_as_many_graphs():
    _, compiled = pair()
    limits = []

    def sample():
        compiled(torch.randint(0, 16, (1, 4)))
        limits.append(torch._dynamo.config.cache_size_limit)

    thread = threading.Thread(target=sample)
    thread.start()
    thread.join()
    assert limits
    assert limits[0] >= MOST_GRAPHS


def test_what_cannot_be_compiled_is_refused():
    width = dict(dim=16, depth=1, heads=2, dim_head=16)
    with pytest.raises(ValueError, match="one or the other"):
        Transfusion(num_text_tokens=4, transformer=width | dict(use_flex_attn=True)).compile()
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(ValueError, match="replays the work of an earlier batch"):
            Transfusion(num_text_tokens=4, transformer=width).compile(mode=mode)
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
def test_generated_code_computes_the_same():
    plain, compiled = pair("inductor")
    check_training(plain, compiled, mixed(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 4):
            check_training(plain, compiled, mixed(seed))
