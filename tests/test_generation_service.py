"""The engine in service: queues, deadlines, memory, threads, events that nobody takes, and weights that change."""

import gc
import threading
import time
import weakref

import pytest
import torch
from generation_models import (
    IMAGE,
    LINE,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    cache_of,
    drawn,
    generators,
    latents,
    num_given,
    options_over,
    shapes_of,
    slots_of,
    text,
)
from torch import nn

from transfusion_pytorch.evaluating import watch_weights, weights_changed
from transfusion_pytorch.generation.engine import QueueFull
from transfusion_pytorch.generation.events import DrawingProgress, Ended, EndReason, ModalityDone, ModalityStarted
from transfusion_pytorch.generation.options import SamplingOptions

options_with = options_over(max_length=24)


def alone(model, prompt, **options):
    return model.create_engine().sample_many([prompt], **options)[0]


# queues, deadlines and memory


def test_a_full_queue_refuses_what_comes():
    engine = build(push=WRITES).create_engine(max_batch=1, max_waiting=2)
    first, *_ = [engine.submit(text(i), **options_with()) for i in range(2)]
    engine.step()
    engine.submit(text(2), **options_with())
    with pytest.raises(QueueFull, match="2 requests wait already, and max_waiting is 2"):
        engine.submit(text(3), **options_with())
    while not first.is_done:
        engine.step()
    engine.step()
    engine.submit(text(3), **options_with())
    engine.run()
    assert_no_row_is_lost(engine)


def test_a_request_ends_when_its_time_is_over(monkeypatch):
    """While it waits, while it writes and while it denoises; with what there is of it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    model = build(push=WRITES)
    engine = model.create_engine(max_batch=2)
    writer = engine.submit(text(1), timeout=5, **options_with())
    painter = engine.submit(text(2), timeout=5.0, **options_with(plan=[(LINE, (2,))], modality_steps=50))
    waiting = engine.submit(text(3), timeout=5, **options_with())
    unhurried = engine.submit(text(3), **options_with())
    for _ in range(3):
        engine.step()
    now[0] += 4.9
    engine.step()
    assert not any(it.is_done for it in (writer, painter, waiting))
    now[0] += 0.2
    engine.step()
    for request in (writer, painter, waiting):
        assert request.reason is EndReason.TIMEOUT
        assert isinstance(request.new_events()[-1], Ended)
    assert shapes_of(writer.result())[0][:2] == [model.sos_id, 1]
    assert len(writer.result()[0]) == 2 + 4
    assert len(slots_of(model, painter.result())) == 2 + 3
    engine.run()
    assert_same(unhurried.result(), alone(model, text(3), **options_with()))
    assert_no_row_is_lost(engine)


def test_requests_enter_when_the_cache_has_room_for_what_they_may_become():
    model = build(push=WRITES)
    engine = model.create_engine(max_cache_tokens=256)
    requests = [engine.submit(text(i % 4), **options_with(max_length=60, cfg_scale=1.0)) for i in range(5)]
    large = engine.submit(text(1), **options_with(max_length=200, cfg_scale=1.0))
    small = engine.submit(text(1), **options_with(max_length=10, cfg_scale=1.0))
    while not engine.is_idle:
        engine.step()
        assert cache_of(engine).reserved_tokens <= 256
        assert small.is_done <= large.is_done, "in order"
    for i, request in enumerate(requests):
        assert_same(request.result(), alone(model, text(i % 4), **options_with(max_length=60)))
    assert len(slots_of(model, large.result())) == 200


@pytest.mark.parametrize("more", [dict(max_length=200, cfg_scale=2.0), dict(max_length=300, cfg_scale=1.0)])
def test_a_request_that_could_never_enter_is_refused(more):
    engine = build().create_engine(max_cache_tokens=256)
    with pytest.raises(ValueError, match="prompt 0 may come to 512 tokens of the cache, and max_cache_tokens is 256"):
        engine.submit(text(1), **options_with(**more))
    assert engine.is_idle


def test_a_reset_engine_is_a_new_one():
    model = build(push=WRITES)
    engine = model.create_engine(max_batch=1)
    requests = [engine.submit(text(i), **options_with()) for i in range(2)]
    engine.step()
    engine.reset()
    assert [request.reason for request in requests] == [EndReason.CANCELLED] * 2
    assert_no_row_is_lost(engine)
    assert_same(engine.sample_many([text(1)], **options_with())[0], alone(model, text(1), **options_with()))


def largest_tensor() -> int:
    """Bytes of the largest storage that anything holds."""
    gc.collect()
    tensors = [it for it in gc.get_objects() if type(it) is torch.Tensor]
    return max(it.untyped_storage().nbytes() for it in tensors)


def test_memory_of_a_drawing_goes_with_its_row():
    """Also while others write on: what was laid out for it holds no memory that the cache has freed."""
    engine = build(push=WRITES).create_engine()
    writer = engine.submit(text(1), **options_with(max_length=60))
    for _ in range(2):
        engine.step()
    before = largest_tensor()
    painter = engine.submit(text(2), **options_with(plan=[(LINE, (5000,))], init_modality_noise=None, max_length=9000))
    while not painter.is_done:
        engine.step()
    assert largest_tensor() > 8 * before
    painter.result()
    del painter
    engine.step()
    assert not writer.is_done
    assert largest_tensor() <= 2 * before


@pytest.mark.parametrize("allowed", range(6))
def test_a_failed_allocation_breaks_nothing(monkeypatch, allowed):
    """Wherever it fails: those that do not fit are run in halves or end, and the engine goes on."""
    model = build(seed=3)
    engine, zeros, left = model.create_engine(), torch.zeros, iter(range(allowed))
    monkeypatch.setattr(
        torch, "zeros", lambda *size, **given: zeros(*size, **given) if next(left, None) is not None else no_memory()
    )
    prompts, options = [text(1), text(2, 3), latents(LINE, 2)], options_with(cfg_scale=2.0)
    requests = [engine.submit(prompt, **options) for prompt in prompts]
    with pytest.warns(UserWarning, match="memory is short: what was run for a batch of"):
        engine.run()
    monkeypatch.undo()
    for request, prompt in zip(requests, prompts, strict=True):
        if request.reason is EndReason.ERROR:
            with pytest.raises(torch.OutOfMemoryError):
                request.result()
        else:
            assert_same(request.result(), alone(model, prompt, **options))
    assert_no_row_is_lost(engine)
    for sample, prompt in zip(engine.sample_many(prompts, **options), prompts, strict=True):
        assert_same(sample, alone(model, prompt, **options))


def no_memory():
    raise torch.OutOfMemoryError("no memory")


def test_nothing_keeps_the_tensors_of_a_failure_alive(monkeypatch):
    """Neither the error of the request nor a retry: the activations of the failed pass are gone."""
    model, alive = build(seed=3), []
    engine, run = model.create_engine(), model.forward_stream

    def fail(stream, *args, **given):
        activations = torch.zeros(1000)
        alive.append(weakref.ref(activations))
        raise LookupError("in the middle")

    monkeypatch.setattr(model, "forward_stream", fail)
    requests = [engine.submit(text(i), **options_with()) for i in range(3)]
    engine.step()
    monkeypatch.setattr(model, "forward_stream", run)
    assert all(request.reason is EndReason.ERROR for request in requests)
    gc.collect()
    assert len(alive) == 5
    assert all(ref() is None for ref in alive)


# events


def test_of_progress_that_nobody_takes_the_latest_is_kept():
    model = build(push=dict(eos=-9.0))
    engine = model.create_engine()
    plan = [("text", 3), (LINE, (2,)), ("text", 2), (IMAGE, (1, 2))]
    request = engine.submit(text(1), **options_with(plan=plan, modality_steps=40))
    engine.run()
    events = request.new_events()
    progress = [it for it in events if isinstance(it, DrawingProgress)]
    assert len(progress) == 16
    assert [it.step for it in progress] == [*range(25, 41)]
    assert {it.type for it in progress} == {IMAGE}
    kinds = [type(it) for it in events if not isinstance(it, DrawingProgress)]
    assert kinds.count(ModalityStarted) == kinds.count(ModalityDone) == 2
    assert kinds[-1] is Ended
    assert request.new_events() == []


def test_a_listener_gets_every_step():
    engine = build().create_engine()
    request = engine.submit(text(1), **options_with(plan=[(LINE, (2,))], modality_steps=40))
    steps = [it.step for it in request.events() if isinstance(it, DrawingProgress)]
    assert steps == [*range(1, 41)]


def test_without_listening_there_is_the_end_alone():
    engine = build().create_engine()
    request = engine.submit(text(1), listen=False, **options_with(plan=[(LINE, (2,)), ("text", 2)]))
    engine.run()
    assert [type(event) for event in request.new_events()] == [Ended]


def test_events_that_are_dropped_before_the_first_cancel_the_request():
    engine = build(push=WRITES).create_engine()
    request = engine.submit(text(1), **options_with())
    events = request.events()
    del events
    gc.collect()
    assert request.reason is EndReason.CANCELLED
    assert_no_row_is_lost(engine)


def test_events_are_compared_by_value():
    made = []
    for _ in range(2):
        engine = build(seed=3).create_engine()
        request = engine.submit(text(1), **options_with(plan=[(LINE, (2,)), ("text", 2)]))
        made.append([it for it in request.events() if not isinstance(it, DrawingProgress)])
    assert made[0] == made[1]
    done = next(it for it in made[0] if isinstance(it, ModalityDone))
    assert done != ModalityDone(done.type, done.modality + 1, done.num_evaluations)
    assert done != ModalityDone(done.type, done.modality, done.num_evaluations + 1)


# one thread at a time


def calls_of(engine, request):
    return {
        "step": engine.step,
        "run": engine.run,
        "reset": engine.reset,
        "sample_many": lambda: engine.sample_many([text(1)], **options_with()),
        "write_only": lambda: engine.write_only(torch.tensor([[1]]), SamplingOptions(max_length=4)),
        "draw_only": lambda: engine.draw_only(1, LINE, SamplingOptions(fixed_modality_shape=(2,))),
        "new_events": request.new_events,
    }


CALLS = ["step", "run", "reset", "sample_many", "write_only", "draw_only", "new_events"]


@pytest.mark.parametrize("name", CALLS)
def test_an_engine_cannot_be_called_from_inside_of_a_step(name):
    """But for `submit` and `cancel`. The request whose processor tries ends alone."""
    model = build(push=WRITES)
    engine, held = model.create_engine(), []
    other = engine.submit(text(2), **options_with())

    def reenter(ids, logits):
        calls_of(engine, held[0])[name]()
        return logits

    held.append(engine.submit(text(1), logits_processors=[reenter], **options_with()))
    engine.run()
    with pytest.raises(RuntimeError, match="in a step, from inside of which only submit and cancel may be called"):
        held[0].result()
    assert_same(other.result(), alone(model, text(2), **options_with()))
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize("name", [*CALLS, "submit"])
def test_an_engine_in_use_refuses_other_threads(name):
    model = build(push=WRITES)
    engine, errors = model.create_engine(), []

    def call_it():
        calls = calls_of(engine, idle) | dict(submit=lambda: engine.submit(text(1), **options_with()))
        try:
            calls[name]()
        except RuntimeError as error:
            errors.append(error)

    def from_another_thread(ids, logits):
        if not errors:
            thread = threading.Thread(target=call_it)
            thread.start()
            thread.join(timeout=60)
        return logits

    idle = engine.submit(text(2), **options_with())
    request = engine.submit(text(1), logits_processors=[from_another_thread], **options_with())
    engine.run()
    [error] = errors
    assert "in use by another thread" in str(error)
    assert_same(request.result(), alone(model, text(1), **options_with()))


def test_another_thread_may_cancel():
    model = build(push=WRITES)
    engine = model.create_engine()
    other = engine.submit(text(2), **options_with())

    def cancel(ids, logits):
        thread = threading.Thread(target=other.cancel)
        thread.start()
        thread.join(timeout=60)
        return logits

    request = engine.submit(text(1), logits_processors=[cancel], **options_with())
    engine.step()
    assert other.reason is EndReason.CANCELLED
    engine.run()
    assert_same(request.result(), alone(model, text(1), **options_with()))
    assert_no_row_is_lost(engine)


def test_threads_may_use_an_engine_one_after_another():
    model = build(seed=3)
    engine, samples = model.create_engine(), []
    for i in range(3):
        thread = threading.Thread(target=lambda i=i: samples.extend(engine.sample_many([text(i)], **options_with())))
        thread.start()
        thread.join(timeout=60)
    for i, sample in enumerate(samples):
        assert_same(sample, alone(model, text(i), **options_with()))
    assert len(samples) == 3


# random numbers


def test_a_generator_means_the_same_however_it_is_given():
    model, options = build(seed=3), options_with(text_temperature=1.0, init_modality_noise=None)
    first = model.sample(text(1), generator=generators(7)[0], **options)
    engine = model.create_engine()
    request = engine.submit(text(1), generator=generators(7)[0], **options)
    engine.run()
    for other in (
        request.result(),
        model.sample_many([text(1)], generator=generators(7)[0], **options)[0],
        model.sample_many([text(1)], generator=generators(7), **options)[0],
        model.sample_many([text(1), text(2)], generator=generators(7)[0], **options)[0],
        model.sample(text(1), cache_kv=False, generator=generators(7), **options),
    ):
        assert_same(other, first)


def test_a_generator_of_a_live_request_is_refused():
    engine, generator = build(push=WRITES).create_engine(), torch.Generator()
    engine.submit(text(1), generator=generator, **options_with())
    for again in (generator, [generator]):
        with pytest.raises(ValueError, match="generator: it is that of a request which is not done yet"):
            engine.submit(text(2), generator=again, **options_with())
        with pytest.raises(ValueError, match="generator: it is that of a request which is not done yet"):
            engine.sample_many([text(2)], generator=again, **options_with())
    engine.run()
    engine.submit(text(2), generator=generator, **options_with())
    engine.run()


# weights that change


def negate(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)


def negate_in_secret(model) -> None:
    """As a fused optimizer does, which torch does not count."""
    for parameter in model.parameters():
        parameter.data = -0.5 * parameter.data


CHANGES = {
    "counted": lambda model, engine: negate(model),
    "by the engine": lambda model, engine: (negate_in_secret(model), engine.weights_changed()),
    "by the model": lambda model, engine: (negate_in_secret(model), weights_changed(model)),
}


@pytest.mark.parametrize("guided", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("name", CHANGES)
def test_requests_at_work_are_read_again_when_weights_change(name, steps, guided):
    """Whether they write or denoise: what is written from then on is what the new weights make of what there is."""
    model = build(seed=3, push=dict(eos=-9.0))
    plan = [("text", 4), (LINE, (2,)), ("text", 4)]
    options = options_with(plan=plan, cfg_scale=guided, modality_steps=3, max_length=60)
    outcomes = []
    for cache_kv in (True, False):
        model = build(seed=3, push=dict(eos=-9.0))
        engine = model.create_engine(cache_kv=cache_kv)
        requests = [engine.submit(prompt, **options) for prompt in (text(1), text(1), [text(2), latents(LINE, 2)])]
        for _ in range(steps):
            engine.step()
        CHANGES[name](model, engine)
        late = engine.submit(text(1), **options)
        engine.run()
        outcomes.append([request.result() for request in (*requests, late)])
        assert_same(late.result(), alone(model, text(1), **options))
    for cached, again in zip(*outcomes, strict=True):
        assert_same(cached, again)
    old = alone(build(seed=3, push=dict(eos=-9.0)), text(1), **options)
    assert not torch.allclose(drawn(outcomes[0][0])[0][1], drawn(old)[0][1]) or shapes_of(old) != shapes_of(
        outcomes[0][0]
    )


def test_weights_that_stay_are_read_once():
    model = build(push=WRITES)
    engine = model.create_engine()
    request = engine.submit(text(1, 2, 3), **options_with(max_length=12))
    engine.run()
    assert engine.stats.tokens_read == num_given(model, text(1, 2, 3)) + 7
    model.train()
    assert (
        engine.sample_many([text(1, 2, 3)], **options_with(max_length=12))[0][0].tolist()
        == request.result()[0].tolist()
    )
    assert engine.stats.tokens_read == 2 * (num_given(model, text(1, 2, 3)) + 7)


@pytest.mark.parametrize("started", [False, True])
def test_requests_of_an_average_follow_it(started):
    """While it is a copy of its model, and once it is an average."""
    outcomes = []
    for cache_kv in (True, False):
        model = build(seed=3, push=WRITES)
        ema = model.create_ema(beta=0.5, update_after_step=0 if started else 100, update_every=1)
        for _ in range(3):
            ema.update()
        engine = ema.ema_model.create_engine(cache_kv=cache_kv)
        request = engine.submit(text(1), **options_with())
        for _ in range(4):
            engine.step()
        negate(model)
        ema.update()
        engine.run()
        outcomes.append(request.result())
        assert_same(engine.sample_many([text(1)], **options_with())[0], alone(ema.ema_model, text(1), **options_with()))
    assert_same(*outcomes)
    assert shapes_of(outcomes[0]) != shapes_of(alone(build(seed=3, push=WRITES), text(1), **options_with()))


def test_an_average_that_becomes_the_model_is_news_to_both():
    model, heard, watchers = build(), [], []
    ema = model.create_ema(beta=0.5, update_after_step=0, update_every=1)
    for name, it in (("model", model), ("average", ema.ema_model)):
        watchers.append(watcher := Watcher(heard, name))
        watch_weights(it, watcher)
    ema.copy_params_from_ema_to_model()
    assert heard == ["model"]
    ema.copy_params_from_model_to_ema()
    assert heard == ["model", "average"]
    ema.update_model_with_ema(0.5)
    assert heard == ["model", "average", "model"]


class Watcher:
    def __init__(self, heard: list, name: str):
        self.heard, self.name = heard, name

    def weights_changed(self) -> None:
        self.heard.append(self.name)


def test_an_engine_whose_parameters_have_no_versions_goes_on():
    with torch.inference_mode():
        model = build(push=WRITES)
        engine = model.create_engine()
        request = engine.submit(text(1), **options_with(max_length=8))
        engine.run()
    assert_same(request.result(), build(push=WRITES).sample(text(1), **options_with(max_length=8)))


def test_dropout_is_off_in_an_engine_of_a_model_that_trains():
    model = build(transformer=dict(dropout=0.5)).train()
    engine = model.create_engine()
    assert any(isinstance(module, nn.Dropout) or getattr(module, "dropout", 0) for module in model.modules())
    first, second = (engine.sample_many([text(1)], **options_with())[0] for _ in range(2))
    assert_same(first, second, tolerance=0)
    assert_same(first, alone(model.eval(), text(1), **options_with()))
