"""A view of a module in evaluation mode: the same module, whose mode is nobody's business."""

import copy
import threading

import pytest
import torch
from checks import no_typecheck
from generation_models import GREEDY, LINE, assert_same, build, noise, text
from torch import nn
from torch.nn.utils import parametrize

from transfusion_pytorch import Transfusion
from transfusion_pytorch.evaluating import class_of, evaluation_view, watch_weights, weights_changed

MODES = [True, False]


class Branching(nn.Module):
    """What modules have: containers, a shared child, a plain attribute, a buffer, a property, and dropout."""

    kind = "branching"

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), shared])
        self.by_name = nn.ModuleDict(dict(shared=shared, norm=nn.BatchNorm1d(4)))
        self.register_buffer("scale", torch.tensor(2.0))
        self.calls, self.nothing = 0, None

    @property
    def width(self) -> int:
        return self.layers[0][0].in_features

    def forward(self, x):
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return self.by_name["norm"](self.by_name["shared"](x)) * self.scale


def modes(module: nn.Module) -> list[bool]:
    return [child.training for child in module.modules()]


def expected_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(module).eval()(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_view_runs_in_evaluation_mode_whatever_the_mode(mode):
    module, x = Branching().train(mode), torch.randn(8, 4)
    expected, before = expected_of(module, x), modes(module)
    view = evaluation_view(module)
    for _ in range(3):
        assert torch.equal(view(x), expected)
        assert not any(modes(view))
        assert modes(module) == before
    assert torch.equal(module.by_name["norm"].running_mean, torch.zeros(4)), "statistics are not collected"


def test_modes_set_on_a_view_change_nothing():
    module = Branching()
    module.layers[0].eval()
    before, view = modes(module), evaluation_view(module)
    view.train()
    view.eval()
    view.layers.train()
    view.training = True
    view.layers[0].training = True
    assert not any(modes(view))
    assert modes(module) == before
    module.eval()
    module.train()
    assert all(modes(module))
    assert not any(modes(view))


def test_a_view_and_its_module_share_everything_else():
    module = Branching()
    view = evaluation_view(module)
    assert isinstance(view, Branching)
    assert isinstance(view.layers, nn.ModuleList)
    assert (view.kind, view.width, view.nothing) == ("branching", 4, None)
    assert class_of(view) is class_of(module) is Branching
    assert type(view).__name__ == "Branching"
    for (name, mine), (other, theirs) in zip(view.named_parameters(), module.named_parameters(), strict=True):
        assert name == other
        assert mine is theirs
    assert list(view.state_dict()) == list(module.state_dict())
    assert [type(it).__name__ for it in view.modules()] == [type(it).__name__ for it in module.modules()]
    view(torch.zeros(2, 4))
    view.calls += 1
    view.new = 5
    assert (module.calls, module.new) == (2, 5)
    module.calls = 7
    assert view.calls == 7
    module.scale = torch.tensor(3.0)
    assert view.scale is module.scale
    del view.new
    assert not hasattr(module, "new")
    assert torch.equal(view.scale, module.scale)
    with pytest.raises(AttributeError, match="no_such"):
        view.no_such  # noqa: B018


def test_a_child_has_one_view_wherever_it_stands():
    view = evaluation_view(Branching())
    assert view.layers is view.layers
    assert view.layers[1] is view.layers[1] is view.by_name["shared"]
    assert len(list(view.named_modules())) == len(list(Branching().named_modules()))


def test_slices_of_containers_are_in_evaluation_mode_too():
    layers = nn.ModuleList(nn.Sequential(nn.Dropout(0.5), nn.Identity()) for _ in range(3)).train()
    view = evaluation_view(layers)
    x = torch.ones(100)
    for layer in view[1:]:
        assert torch.equal(layer(x), x)
        assert torch.equal(layer[:1](x), x)
    assert len(view[1:]) == 2
    assert type(view[1:]) is nn.ModuleList
    assert all(module.training for module in layers.modules())


def test_a_view_of_a_view_is_itself():
    view = evaluation_view(Branching())
    assert evaluation_view(view) is view


def test_submodules_that_are_replaced_or_added_are_seen():
    module, x = Branching(), torch.randn(8, 4)
    view = evaluation_view(module)
    view(x)
    module.layers[1] = nn.Dropout(0.9)
    module.layers.append(nn.Linear(4, 4))
    module.by_name["shared"] = nn.Identity()
    assert torch.equal(view(x), expected_of(module, x))
    view.layers[1] = nn.Identity()
    assert isinstance(module.layers[1], nn.Identity)


def test_hooks_act_in_both():
    module, seen = Branching(), []
    module.layers[0].register_forward_hook(lambda it, args, out: seen.append(it.training))
    module(torch.zeros(2, 4))
    evaluation_view(module)(torch.zeros(2, 4))
    assert seen == [True, False]


def test_a_view_follows_its_module_to_another_type():
    module = Branching().eval()
    view = evaluation_view(module)
    module.double()
    assert view(torch.zeros(2, 4, dtype=torch.float64)).dtype == torch.float64


@no_typecheck
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_scripted_modules_stay_themselves_and_compiled_ones_are_taken_uncompiled():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    scripted = torch.jit.script(nn.Linear(4, 4))
    module, x = nn.Sequential(torch.compile(inner), scripted), torch.randn(2, 4)
    expected = scripted(inner.eval()(x))
    inner.train()
    view = evaluation_view(module)
    assert view[1] is scripted
    assert torch.equal(view(x), expected)
    assert view[0] is view[0]
    assert torch.equal(evaluation_view(torch.compile(inner))(x), inner[0](x))
    assert all(modes(inner))


def test_slots_and_own_getattr_of_a_class_are_kept():
    class Own(nn.Module):
        def __getattr__(self, name):
            if name == "magic":
                return 42
            return super().__getattr__(name)

    module = Own()
    module.child = nn.Dropout(0.5)
    view = evaluation_view(module)
    assert view.magic == 42
    assert view.child.training is False
    assert module.child.training is True


# with a model


@pytest.mark.parametrize("mode", MODES)
def test_sampling_beside_training_changes_no_mode(mode):
    model = build(transformer=dict(dropout=0.5)).train(mode)
    before, options = modes(model), GREEDY | dict(init_modality_noise=noise(), max_length=20)
    engines = [model.create_engine() for _ in range(2)]
    requests = [engine.submit(text(1), **options) for engine in engines]
    engines[0].step()
    model([[torch.tensor([1, 2]), (LINE, torch.randn(2, 3, dtype=torch.float64))]]).backward()
    engines[1].step()
    assert modes(model) == before
    model.train(not mode)
    for engine in engines:
        engine.run()
    assert set(modes(model)) == {not mode}
    for request in requests:
        assert_same(request.result(), model.eval().sample(text(1), **options))


def test_threads_sample_while_another_trains():
    """Dropout is off in each of them, and on where the model trains."""
    model = build(transformer=dict(dropout=0.5)).train()
    options = GREEDY | dict(init_modality_noise=noise(), max_length=16)
    expected = copy.deepcopy(model).eval().sample(text(1), **options)
    batch = [[torch.tensor([1, 2]), (LINE, torch.randn(2, 3, dtype=torch.float64))]]
    samples, losses, errors, done = [], [], [], threading.Event()

    def sample():
        try:
            for _ in range(3):
                samples.append(model.sample(text(1), **options))
        except BaseException as error:
            errors.append(error)

    def train():
        try:
            while not done.is_set():
                losses.append(float(model(batch).detach()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=sample) for _ in range(2)]
    trainer = threading.Thread(target=train)
    for thread in (*threads, trainer):
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    done.set()
    trainer.join(timeout=60)
    assert not errors
    assert len(samples) == 6
    for each in samples:
        assert_same(each, expected)
    assert all(modes(model))
    assert len(set(losses)) > 1


def test_watchers_hear_of_changed_weights_as_long_as_they_live():
    class Watcher:
        heard = 0

        def weights_changed(self) -> None:
            self.heard += 1

    model, other, watcher = nn.Linear(2, 2), nn.Linear(2, 2), Watcher()
    weights_changed(model)  # nobody listens
    watch_weights(model, watcher)
    watch_weights(model, watcher)
    weights_changed(model)
    weights_changed(other)
    assert watcher.heard == 1
    del watcher
    weights_changed(model)


def test_a_view_is_no_copy():
    model = Transfusion(num_text_tokens=4, transformer=dict(dim=8, depth=1), dim_latent=3, modality_num_dim=1)
    view = evaluation_view(model)
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in view.buffers()} == {id(b) for b in model.buffers()}


def test_a_copy_of_a_view_is_the_view_of_a_copy():
    module = Branching()
    view = copy.deepcopy(evaluation_view(module))
    assert not view.training
    assert class_of(view) is Branching
    x = torch.randn(3, 4)
    torch.testing.assert_close(view(x), evaluation_view(module)(x))
    with torch.no_grad():
        module.layers[1].weight.zero_()
    assert view.layers[1].weight.abs().max() > 0


def test_a_view_follows_a_parametrization():
    module, x = Branching(), torch.randn(3, 4)
    view = evaluation_view(module)
    view(x)
    weight = module.layers[1].weight.detach().clone()
    parametrize.register_parametrization(module.layers[1], "weight", nn.Tanh())
    torch.testing.assert_close(view.layers[1].weight, weight.tanh())
    view(x)
    parametrize.remove_parametrizations(module.layers[1], "weight", leave_parametrized=False)
    torch.testing.assert_close(view.layers[1].weight, weight)
