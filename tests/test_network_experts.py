"""Untied weights: each token through the layers of its expert, one attention over all."""

import pytest
import torch
from checks import compiles, no_typecheck
from network_streams import STREAMS, stream
from torch import nn

from transfusion_pytorch import Transformer
from transfusion_pytorch.network import compile as compile_module
from transfusion_pytorch.network import experts as experts_module
from transfusion_pytorch.network.experts import Routing
from transfusion_pytorch.network.norms import Conditioning
from transfusion_pytorch.network.shortcuts import plain_formulas
from transfusion_pytorch.training.parameters import hidden_matrices

DIM = 16
PARTS = ("attention", "feedforward", "norms")
TRUNKS = {
    "plain": {},
    "rms": dict(norm="adaptive_rms"),
    "values": dict(use_value_residual=True, attn_laser=True),
    "streams": dict(num_residual_streams=2),
    "checkpointed": dict(use_checkpoint=True),
    "grouped": dict(kv_heads=1, qk_rmsnorm=False),
}


def make(untied=True, num_experts=3, **options):
    torch.manual_seed(0)
    arguments = dict(depth=3, heads=2, dim_head=8, untied=untied, num_experts=num_experts) | options
    model = Transformer(DIM, **arguments).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def read_as_letters(samples, num_experts=3):
    """A stream whose spans of A, B and C are of modality 0, 1 and 2; its tokens one by one; and its routing."""
    made, letters = stream(*samples), "".join(samples)
    slots = {i: torch.tensor([j for j, each in enumerate(letters) if each == letter]) for i, letter in enumerate("ABC")}
    slots = {i: each.long() for i, each in slots.items() if len(each)}
    routing = Routing.of(slots, len(letters), num_experts, device=torch.device("cpu"))
    return made, letters, routing


def run(model, samples, x, condition):
    made, _, routing = read_as_letters(samples, model.num_experts)
    return model(x, **made.arguments(condition if len(condition) else None), routing=routing)


def inputs(samples):
    generator = torch.Generator().manual_seed(3)
    made, letters, _ = read_as_letters(samples)
    x = torch.randn(len(letters), DIM, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(int(made.span.max()) + 1, DIM, generator=generator, dtype=torch.float64)


def as_tied(model, **options):
    """A tied transformer, and the untied one with its weights in every expert."""
    tied = make(untied=False, **options)
    weights = tied.state_dict()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parts = name.split(".")
            if "experts" in parts:
                at = parts.index("experts")
                name = ".".join(parts[:at] + parts[at + 2 :])
            elif parts[0] == "final_norm" and parts[1].isdigit():
                name = ".".join([parts[0], *parts[2:]])
            parameter.copy_(weights[name])
    return tied


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("untied", [True, ["attention"], ["feedforward"], ["norms"], ["attention", "norms"]])
def test_experts_of_equal_weights_are_a_tied_transformer(trunk, untied):
    model = make(untied, **TRUNKS[trunk])
    tied = as_tied(model, **TRUNKS[trunk])
    for samples in (["ttAAAtBBt", "t", "BBAA", "tttttt"], ["ttt"], ["AAA", "AAA"]):
        x, condition = inputs(samples)
        made = run(model, samples, x, condition)
        expected = tied(x, **stream(*samples).arguments(condition if len(condition) else None))
        torch.testing.assert_close(made, expected)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (made, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", STREAMS)
def test_every_token_goes_through_its_expert_alone(name):
    """By gradients: of what a token's own layers say of it, where nobody else sees it."""
    samples = STREAMS[name]
    model, (x, condition) = make(depth=1), inputs(samples)
    out = run(model, samples, x, condition)
    for expert, letters in enumerate(("t", "A", "BC")):
        own = torch.tensor([each in letters for each in "".join(samples)])
        weights = list(model.layers[0].experts[expert].ff.parameters())
        for chosen, is_used in ((own, True), (~own, False)):
            if not chosen.any():
                continue
            grads = torch.autograd.grad(out[chosen].square().sum(), weights, retain_graph=True, allow_unused=True)
            assert any(grad is not None and grad.abs().max() > 0 for grad in grads) == is_used


def test_attention_is_shared_by_all():
    """A token sees keys that another expert made, wherever the mask lets it."""
    samples = ["ttAAtB", "tA"]
    model, (x, condition) = make(depth=1), inputs(samples)
    made, letters, _ = read_as_letters(samples)
    out = run(model, samples, x, condition)
    for i in range(len(letters)):
        (grad,) = torch.autograd.grad(out[i].sum(), x, retain_graph=True)
        assert torch.equal(grad.abs().sum(dim=-1) > 1e-12, made.sees[i])


def test_only_what_is_untied_is_there_twice():
    sizes = {}
    for untied in (False, *([part] for part in PARTS), True):
        model = make(untied, num_experts=2)
        sizes[str(untied)] = sum(parameter.numel() for parameter in model.parameters())
    base = sizes["False"]
    assert base < sizes["['norms']"] < sizes["['attention']"] < sizes["['feedforward']"] < sizes["True"]
    # connections and skips are few; the rest adds up
    extra = sum(sizes[str([part])] - base for part in PARTS)
    assert sizes["True"] - base < extra


@pytest.mark.parametrize("untied", [True, ["attention", "norms"]])
def test_every_parameter_of_every_expert_learns(untied):
    model, samples = make(untied, use_value_residual=True), ["ttAAtBBt", "tBAt"]
    run(model, samples, *inputs(samples)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_experts_without_tokens_are_left_out_unless_all_take_part():
    model, (x, condition) = make(), inputs(["ttAA"])
    made, _, routing = read_as_letters(["ttAA"])
    model(x, **made.arguments(condition), routing=routing).sum().backward()
    absent = list(model.layers[0].experts[2].parameters())
    assert all(parameter.grad is None for parameter in absent)
    everybody = Routing.of({0: torch.tensor([2, 3])}, 4, 3, device=x.device, takes_all=True)
    out = model(x, **made.arguments(condition), routing=everybody)
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in absent)
    torch.testing.assert_close(out, model(x, **made.arguments(condition), routing=routing))


def test_spans_of_one_length_need_no_index():
    samples = ["AAA", "BBB", "AAA"]
    model, (x, condition) = make(), inputs(samples)
    made, _, routing = read_as_letters(samples)
    arguments = dict(position=made.position, layout=made.layout, routing=routing)
    alone = model(x, conditioning=Conditioning(condition, None), **arguments)
    torch.testing.assert_close(alone, model(x, conditioning=made.conditioning(condition), **arguments))


def test_later_modalities_share_the_last_expert():
    slots = {0: torch.tensor([1]), 1: torch.tensor([3]), 2: torch.tensor([4])}
    routing = Routing.of(slots, 6, 2, device=torch.device("cpu"))
    assert routing.counts == (3, 3)
    assert routing.order.tolist() == [0, 2, 5, 1, 3, 4]
    values = torch.arange(6.0)[:, None]
    assert torch.equal(routing.join(routing.split(values)), values)


@pytest.mark.parametrize("untied", [True, ["attention"]])
@pytest.mark.parametrize("samples", [["ttAAAtBBt", "tB", "AAtt"], ["BB", "tt"], ["A", "AAB"]])
def test_tokens_are_copied_by_runs_as_by_their_index(monkeypatch, samples, untied):
    """Forward and backward, to the bit; also where an expert has no tokens and takes part."""
    model, (x, condition) = make(untied), inputs(samples)
    made, letters, _ = read_as_letters(samples)
    slots = {i: torch.tensor([j for j, it in enumerate(letters) if it == "AB"[i]]).long() for i in range(2)}
    outputs = []
    for shortest in (0, len(letters) + 1):
        monkeypatch.setattr(experts_module, "SHORTEST_RUN", shortest)
        routing = Routing.of(slots, len(letters), 3, device=x.device, takes_all=True)
        assert (routing.runs is None) == (shortest > 0)
        out = model(x, **made.arguments(condition), routing=routing)
        outputs.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)])
    for by_run, by_index in zip(*outputs, strict=True):
        assert by_run is by_index or torch.equal(by_run, by_index)


def test_short_runs_are_copied_by_their_index():
    device, experts = torch.device("cpu"), experts_module
    long, short = experts.SHORTEST_RUN, experts.SHORTEST_RUN - 1
    for length, is_by_run in ((long, True), (short, False)):
        slots = {0: torch.arange(length, 2 * length)}
        assert (Routing.of(slots, 2 * length, 2, device=device).runs is not None) == is_by_run
    assert Routing.of({0: torch.arange(9)}, 20, 2, device=device).runs == ((1, 9), (0, 11))


@pytest.mark.parametrize("kind", ["dense", "flex"])
def test_all_kinds_of_attention_agree(kind):
    samples = ["ttAAAtBBt", "tB", "AAtt"]
    model, (x, condition) = make(), inputs(samples)
    with torch.no_grad():
        expected = run(model, samples, x, condition)
        model.attention = kind
        torch.testing.assert_close(run(model, samples, x, condition), expected)


def test_plain_formulas_have_second_derivatives():
    samples = ["tAAtB"]
    model, (x, condition) = make(depth=1), inputs(samples)
    with plain_formulas():
        assert torch.autograd.gradgradcheck(lambda y: run(model, samples, y, condition).square().sum(), (x,), atol=1e-3)


def test_gradients_of_modulations_are_added_up_by_segments_where_all_else_is():
    """As for tied layers on devices and in graphs where tokens cannot be added up one by one."""
    samples = ["ttAAAtA", "tAA"]  # nobody reads the third expert
    model, (x, condition) = make(), inputs(samples)
    made, _, routing = read_as_letters(samples)
    plain, cut = made.conditioning(condition), made.conditioning(condition).with_segments()
    assert [part is not None and part.segments is not None for part in routing.conditionings(plain)] == [False] * 3
    assert [part is not None and part.segments is not None for part in routing.conditionings(cut)] == [
        False,
        True,
        False,
    ]
    ragged = torch.autograd.grad(
        run(model, samples, x, condition).square().sum(), list(model.layers[0].experts[1].parameters())
    )
    model.attention = "dense"
    dense = torch.autograd.grad(
        run(model, samples, x, condition).square().sum(), list(model.layers[0].experts[1].parameters())
    )
    torch.testing.assert_close(dense, ragged)


@compiles
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")  # as well
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks while it traces
def test_untied_layers_compile():
    samples = ["ttAAAtBBt", "tB"]
    model, (x, condition) = make(depth=2), inputs(samples)
    expected = run(model, samples, x, condition)
    model.attention = "dense"
    model.compile(backend="aot_eager")
    compile_module._COMPILED.clear()
    made = run(model, samples, x, condition)
    assert len(compile_module._COMPILED) == 1
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (made, expected)))


def test_muon_gets_the_matrices_of_all_experts_once():
    model = make(["attention"])
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    assert len(hidden_matrices(model)) == len(linears)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(untied="attention"), "untied must be True, False or some of attention, feedforward, norms"),
        (dict(untied=["heads"]), "untied must be True, False or some of"),
        (dict(untied=True, num_experts=1), "num_experts of at least 2, got 1"),
        (dict(rotary_frequencies=[1.0]), "rotary_frequencies are 4, one for each pair of channels of a head, got 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(DIM, depth=1, heads=2, dim_head=8, **options)


@no_typecheck
def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="norm must be 'adaptive', 'rms' or 'adaptive_rms', got 'layer'"):
        Transformer(DIM, depth=1, heads=2, dim_head=8, norm="layer")
