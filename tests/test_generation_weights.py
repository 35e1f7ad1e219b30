"""Weights that change under an engine that is alive, and a model that is trained beside it."""

import gc
import threading
import weakref

import pytest
import torch
from generation_faults import OutOfMemory
from generation_models import (
    IMAGE,
    LINE,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    latents,
    options_over,
    slots_of,
    text,
)
from tiny import CHANNELS, tiny
from torch import nn
from torch.nn.utils import parametrize

from transfusion_pytorch import TrainConfig, Trainer
from transfusion_pytorch.evaluating import WeightVersions, watch_weights, weights_changed
from transfusion_pytorch.generation.batch_state import Branch
from transfusion_pytorch.generation.delivery import sample_of
from transfusion_pytorch.generation.events import EndReason

PLAN = [("text", 4), (LINE, (2,)), ("text", 4), (IMAGE, (1, 2)), ("text", 3)]


options_with = options_over(max_length=60, cfg_scale=2.0, modality_cfg_scale=1.5)


def move(model, *, secretly: bool) -> None:
    """Other weights, in place: as an optimizer writes them, or where torch does not count."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            change = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            (parameter.data if secretly else parameter).add_(change)


def by_hand(model, engine):
    engine.weights_changed()


def for_all(model, engine):
    weights_changed(model)


def not_at_all(model, engine):
    pass


WAYS = [(True, by_hand), (True, for_all), (False, not_at_all)]


@pytest.mark.parametrize(("secretly", "tell"), WAYS)
def test_what_others_read_with_old_weights_is_not_used(secretly, tell):
    """A prompt that a live request has begun with, too."""
    model = build(push=WRITES)
    engine, prompt = model.create_engine(), [text(1, 2, 3), latents(LINE, 2), text(0)]
    first = engine.submit(prompt, **options_with(plan=PLAN))
    for _ in range(3):
        engine.step()
    move(model, secretly=secretly)
    tell(model, engine)
    second = engine.submit(prompt, **options_with(plan=PLAN))
    engine.run()
    assert_same(second.result(), model.sample(prompt, **options_with(plan=PLAN)))
    assert first.reason is EndReason.PLAN
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize(("secretly", "tell"), WAYS)
@pytest.mark.parametrize("steps", range(1, 16, 2))
def test_live_requests_are_read_again(secretly, tell, steps):
    """From there on they are what a sampler makes of them that keeps nothing it has read."""
    made = []
    for cache_kv in (True, False):
        model = build(push=WRITES)
        engine = model.create_engine(cache_kv=cache_kv)
        requests = [
            engine.submit(prompt, **options_with(plan=PLAN, modality_steps=3))
            for prompt in (text(1), [text(2), latents(LINE, 2), text(0)])
        ]
        for _ in range(steps):
            engine.step()
        move(model, secretly=secretly)
        if cache_kv:
            tell(model, engine)
        else:
            engine.weights_changed()
        engine.run()
        made.append([request.result() for request in requests])
    for cached, again in zip(*made, strict=True):
        assert_same(cached, again)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_fault_while_requests_are_read_again_ends_them_or_changes_nothing(after):
    """None goes on with what was read with the old weights."""
    made = []
    for error in (None, MemoryError("injected")):
        model = build(push=WRITES)
        engine = model.create_engine()
        prompts = [[text(i), latents(LINE, 2), text(0, i)] for i in range(3)]
        requests = [engine.submit(prompt, **options_with(plan=["text"], cfg_scale=1.0)) for prompt in prompts]
        for _ in range(4):
            engine.step()
        move(model, secretly=False)
        with OutOfMemory(error, names={"tensor"}, after=after):
            engine.step()
        engine.run()
        made.append(requests)
    plain, struck = made
    for request, other in zip(plain, struck, strict=True):
        if other.reason is not EndReason.ERROR:
            assert_same(other.result(), request.result())


def interrupted(monkeypatch, owner, name: str, error: BaseException, *, at: int) -> None:
    """One call of a method raises an error, after so many others."""
    method, calls = getattr(owner, name), []

    def once(*args, **options):
        calls.append(name)
        if len(calls) == at + 1:
            raise error
        return method(*args, **options)

    monkeypatch.setattr(owner, name, once)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(("part", "error"), [("cache", MemoryError), ("branch", KeyboardInterrupt)])
def test_a_rewind_that_is_interrupted_is_made_again(monkeypatch, part, error, at):
    """Whatever comes out of the step, and whoever raises it: the weights that are noticed once stay noticed."""
    model = build(push=WRITES)
    engine, options = model.create_engine(), options_with(plan=["text"], cfg_scale=1.0)
    requests = [engine.submit(text(i, 2), **options) for i in range(3)]
    for _ in range(4):
        engine.step()
    move(model, secretly=False)
    if part == "cache":
        interrupted(monkeypatch, model.transformer, "create_cache", error("injected"), at=0)
    else:
        interrupted(monkeypatch, Branch, "rewind", error("injected"), at=at)
    with pytest.raises(error, match="injected"):
        engine.step()
    monkeypatch.undo()
    engine.run()
    again = build(push=WRITES)
    other = again.create_engine(cache_kv=False)
    expected = [other.submit(text(i, 2), **options) for i in range(3)]
    for _ in range(4):
        other.step()
    move(again, secretly=False)
    other.run()
    for request, sample in zip(requests, expected, strict=True):
        assert_same(request.result(), sample.result())


class Scaled(nn.Module):
    """A linear layer whose output is twice as large."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class WithBuffer(nn.Module):
    """A linear layer whose weight is a buffer, as that of quantised layers."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.register_buffer("matrix", inner.weight.detach().clone())

    def forward(self, x):
        return x @ self.matrix.t()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def wrap(attn):
    attn.to_out = Scaled(attn.to_out)


def parametrize_it(attn):
    parametrize.register_parametrization(attn.to_qkv, "weight", Doubled())


def change_buffer(attn):
    attn.to_out.matrix.mul_(2)


def double(module, args, output=None):
    """A hook that doubles what a module takes, or what it makes."""
    return (2 * args[0], *args[1:]) if output is None else 2 * output


def hook(attn):
    attn.to_out.register_forward_hook(double)


def hook_before(attn):
    attn.to_out.register_forward_pre_hook(double)


def unhook(attn):
    attn.to_out._forward_hooks.clear()


def replace_hook(attn):
    unhook(attn)
    attn.to_out.register_forward_hook(lambda module, args, output: 3 * output)


@pytest.mark.parametrize("change", [wrap, parametrize_it, change_buffer, hook, hook_before, unhook, replace_hook])
@pytest.mark.parametrize("is_idle", [False, True])
def test_modules_and_buffers_that_change_are_noticed(change, is_idle):
    """Under live requests, which are read again, and under an engine that waits. So are hooks."""
    made = []
    for cache_kv in (True, False):
        model = build(push=WRITES)
        attn = model.transformer.layers[0].attn
        if change is change_buffer:
            attn.to_out = WithBuffer(attn.to_out)
        if change in (unhook, replace_hook):
            hook(attn)
        engine, options = model.create_engine(cache_kv=cache_kv), options_with(plan=PLAN, modality_steps=3)
        requests = [engine.submit(text(i), **options) for i in range(2)]
        for _ in range(3):
            engine.step()
        if is_idle:
            engine.run()
        with torch.no_grad():
            change(attn)
        requests.append(engine.submit(text(0, 1), **options))
        engine.run()
        made.append([it.result() for it in requests])
    for cached, again in zip(*made, strict=True):
        assert_same(cached, again)


scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # users still have them


@scripts
def test_weights_of_scripted_modules_are_noticed():
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    weights = WeightVersions(model)
    assert not weights.have_changed()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert weights.have_changed()
    assert not weights.have_changed()


@scripts
def test_scripted_adapters_serve_sampling():
    samples = []
    for script in (nn.Sequential, torch.jit.script):
        torch.manual_seed(0)
        pair = tuple(script(nn.Linear(*sizes)) for sizes in ((3, 8), (8, 3)))
        model = build(push=WRITES, pre_post_transformer_enc_dec=(None, pair, None, None))
        samples.append(model.sample(text(1), **options_with(plan=PLAN)))
    assert_same(*samples)


def test_parameters_that_change_places_are_noticed():
    model = build()
    weights, layers = WeightVersions(model), model.transformer.layers
    assert not weights.have_changed()
    first, second = (layer.attn.to_qkv for layer in layers[:2])
    first.weight, second.weight = second.weight, first.weight
    assert weights.have_changed()
    assert not weights.have_changed()


def test_parameters_that_are_replaced_under_live_requests_are_noticed():
    made = []
    for cache_kv in (True, False):
        model = build(push=WRITES)
        engine = model.create_engine(cache_kv=cache_kv)
        request = engine.submit(text(1), **options_with(plan=["text"]))
        for _ in range(3):
            engine.step()
        other = build(push=WRITES)
        move(other, secretly=False)
        model.load_state_dict(other.state_dict(), assign=True)
        engine.run()
        made.append(request.result())
    assert_same(*made)


def test_an_engine_would_not_notice_by_itself():
    """What the tests above rest on: weights are changed where torch does not count."""
    made = []
    for tell in (by_hand, not_at_all):
        model = build(push=WRITES)
        engine = model.create_engine()
        request = engine.submit(text(1), **options_with(plan=["text"], max_length=40))
        for _ in range(3):
            engine.step()
        move(model, secretly=True)
        tell(model, engine)
        engine.run()
        made.append(slots_of(model, request.result()))
    assert made[0] != made[1]


def test_an_engine_that_is_gone_is_not_told():
    model = build()
    engine = model.create_engine()
    told, gone = [], weakref.ref(engine)

    class Spy:
        def weights_changed(self):
            told.append(1)

    spy = Spy()
    watch_weights(model, spy)
    del engine
    gc.collect()
    assert gone() is None
    weights_changed(model)
    weights_changed(build())
    assert told == [1]


@pytest.mark.parametrize("steps", [0, 1, 4, 6])
def test_a_reset_engine_is_a_new_one(steps):
    model = build(push=WRITES)
    engine = model.create_engine(max_batch=2)
    requests = [engine.submit(text(i), **options_with(plan=PLAN)) for i in range(4)]
    for _ in range(steps):
        engine.step()
    so_far = [slots_of(model, sample_of(request._request)) for request in requests] if steps < 5 else None
    engine.reset()
    assert engine.is_idle
    assert (engine.stats.cache_bytes, engine.stats.active, engine.stats.waiting) == (0, 0, 0)
    for i, request in enumerate(requests):
        assert request.reason is EndReason.CANCELLED
        whole = slots_of(model, model.sample(text(i), **options_with(plan=PLAN)))
        slots = slots_of(model, request.result())
        assert slots == whole[: len(slots)]
        assert so_far is None or slots == so_far[i]
    move(model, secretly=True)
    [sample] = engine.sample_many([text(1)], **options_with(plan=PLAN))
    assert_same(sample, model.sample(text(1), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


# those who change them


class Spy:
    def __init__(self, model):
        self.calls = 0
        watch_weights(model, self)

    def weights_changed(self) -> None:
        self.calls += 1


def test_a_moving_average_tells_its_engines(monkeypatch):
    model = build(push=WRITES)
    ema = model.create_ema(beta=0.5, update_every=1, update_after_step=0)
    engine = ema.create_engine()
    request = engine.submit(text(1), **options_with(plan=["text"]))
    spy, other = Spy(ema.ema_model), Spy(model)
    for i in range(6):
        move(model, secretly=True)
        before = [parameter.clone() for parameter in ema.ema_model.parameters()]
        ema.update()
        assert any(not torch.equal(one, two) for one, two in zip(before, ema.ema_model.parameters(), strict=True))
        assert spy.calls == i + 1
        following = engine.submit(text(1), **options_with(plan=PLAN))
        engine.step()
        expected = ema.sample(text(1), **options_with(plan=PLAN))
        while not following.is_done:
            engine.step()
        assert_same(following.result(), expected)
    assert other.calls == 0
    engine.run()
    assert request.is_done
    ema.copy_params_from_ema_to_model()
    assert other.calls == 1
    ema.update_model_with_ema(0.5)
    assert other.calls == 2


def test_a_moving_average_that_does_not_move_tells_nobody():
    model = build()
    ema = model.create_ema(update_every=10, update_after_step=0)
    ema.update()
    spy = Spy(ema.ema_model)
    for _ in range(9):
        ema.update()
    assert spy.calls == 0


@pytest.mark.parametrize("ema_beta", [0.9, None])
def test_a_trainer_tells_engines_after_each_step(tmp_path, ema_beta):
    torch.manual_seed(1)
    model = tiny()
    spy = Spy(model)
    data = [[torch.tensor([1, 2, 3]), torch.randn(2, CHANNELS[0])] for _ in range(8)]
    config = TrainConfig(steps=3, batch_size=2, device="cpu", ema_beta=ema_beta, ema_every=1, ema_start=0)
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = Trainer(model, data, config, folder=tmp_path)
    average = None if trainer.ema is None else Spy(trainer.ema.ema_model)
    trainer.fit()
    assert any(not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert spy.calls == 3
    assert average is None or average.calls == 3


# modes


def test_samplers_that_overlap_leave_the_model_in_training_mode():
    model = build(transformer=dict(dropout=0.5))
    options = options_with(plan=PLAN)
    expected = [model.sample(text(i), **options) for i in (1, 2)]
    model.train()
    model.transformer.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (model.sample_stream(text(i), **options) for i in (1, 2))
    for _ in range(3):
        next(first)
        assert [module.training for module in model.modules()] == modes
        next(second)
        assert [module.training for module in model.modules()] == modes
    for stream, wanted in ((first, expected[0]), (second, expected[1])):  # the first to begin is the first to end
        *_, ended = stream
        assert_same(ended.sample, wanted)
        assert [module.training for module in model.modules()] == modes
    sample = [[text(1, 2), latents(LINE, 2)]]
    torch.manual_seed(1)
    losses = {model(sample).item() for _ in range(3)}
    assert len(losses) == 3, "dropout is still on"


def test_samplers_in_threads_beside_a_trainer_do_not_disturb_each_other():
    model = build(transformer=dict(dropout=0.5))
    options = options_with(plan=PLAN)
    expected = [model.sample(text(i), **options) for i in (1, 2)]
    model.train()
    modes, made, stop = [module.training for module in model.modules()], {1: [], 2: []}, threading.Event()

    def serve(i: int) -> None:
        while not stop.is_set():
            made[i].append(model.sample(text(i), **options))

    threads = [threading.Thread(target=serve, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    wrong = 0
    while not all(len(samples) >= 3 for samples in made.values()) and any(it.is_alive() for it in threads):
        model([[text(1, 2), latents(LINE, 2)]]).backward()
        wrong += [module.training for module in model.modules()] != modes
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [module.training for module in model.modules()] == modes
    for i, wanted in zip((1, 2), expected, strict=True):
        assert len(made[i]) >= 3
        for sample in made[i]:
            assert_same(sample, wanted)
