"""An engine is used by one at a time: others are refused, and what they may do from inside or beside is safe."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_models import (
    LINE,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    options_over,
    slots_of,
    text,
)

from transfusion_pytorch.generation.events import DrawingProgress, Ended, EndReason, ModalityDone, TextToken

PLAN = [("text", 3), (LINE, (2,)), ("text", 3)]


options_with = options_over(max_length=40)


class Gate:
    """A logits processor that stops in the middle of a step, once, until it is opened."""

    def __init__(self, at: int):
        self.at, self.is_inside, self.may_go = at, threading.Event(), threading.Event()

    def __call__(self, ids, logits):
        if len(ids) == self.at and not self.is_inside.is_set():
            self.is_inside.set()
            assert self.may_go.wait(30)
        return logits


CALLS = {
    "step": lambda engine, request: engine.step(),
    "run": lambda engine, request: engine.run(),
    "submit": lambda engine, request: engine.submit(text(3), **options_with()),
    "sample_many": lambda engine, request: engine.sample_many([text(3)], **options_with()),
    "reset": lambda engine, request: engine.reset(),
    "new_events": lambda engine, request: request.new_events(),
    "events": lambda engine, request: next(request.events()),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_thread_is_refused_while_a_step_is_made(name):
    model, gate = build(push=WRITES), Gate(at=4)
    engine = model.create_engine()
    request = engine.submit(text(1), **options_with(plan=PLAN, logits_processors=[gate]))
    other = engine.submit(text(2), **options_with(plan=PLAN))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.run)
        try:
            assert gate.is_inside.wait(30)
            with pytest.raises(RuntimeError, match=r"in use by another thread.*one thread at a time.*AsyncEngine"):
                CALLS[name](engine, other)
        finally:
            gate.may_go.set()
        running.result(30)
    for i, it in ((1, request), (2, other)):
        if name == "events" and i == 2:
            assert it.reason is EndReason.CANCELLED  # whoever listens and fails stops listening
            continue
        assert_same(it.result(), model.sample(text(i), **options_with(plan=PLAN)))
    CALLS[name](engine, other)  # when the engine is free there is no complaint
    engine.run()
    assert_no_row_is_lost(engine)


def test_another_thread_may_cancel_while_a_step_is_made():
    model, gate = build(push=WRITES), Gate(at=4)
    engine = model.create_engine()
    request = engine.submit(text(1), **options_with(plan=PLAN, logits_processors=[gate]))
    other = engine.submit(text(2), **options_with(plan=PLAN))
    waiting = engine.submit(text(3), **options_with(plan=PLAN))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.run)
        assert gate.is_inside.wait(30)
        other.cancel()
        waiting.cancel()
        assert not other.is_done, "the step is at work on it"
        gate.may_go.set()
        running.result(30)
    assert other.reason is waiting.reason is EndReason.CANCELLED
    assert slots_of(model, other.result())[:2] == [model.sos_id, 2]
    assert_same(request.result(), model.sample(text(1), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


def test_a_step_waits_for_another_thread_that_cancels(monkeypatch):
    """It frees the rows of a request meanwhile, and refuses nobody for that."""
    model, gate = build(push=WRITES), Gate(at=0)
    engine = model.create_engine()
    requests = [engine.submit(text(i), **options_with(plan=PLAN)) for i in (1, 2)]
    engine.step()
    cancel = engine.scheduler.cancel

    def slowly(cancelled):
        gate((), None)
        cancel(cancelled)

    monkeypatch.setattr(engine.scheduler, "cancel", slowly)
    with ThreadPoolExecutor(2) as pool:
        cancelling = pool.submit(requests[0].cancel)
        assert gate.is_inside.wait(30)
        stepping = pool.submit(engine.step)
        with pytest.raises(TimeoutError):
            stepping.result(0.1)
        gate.may_go.set()
        cancelling.result(30)
        stepping.result(30)
    engine.run()
    assert [request.reason for request in requests] == [EndReason.CANCELLED, EndReason.PLAN]
    assert_same(requests[1].result(), model.sample(text(2), **options_with(plan=PLAN)))


@pytest.mark.parametrize("steps", [1, 6])
def test_steps_in_inference_mode_and_outside_of_it_may_be_mixed(steps):
    model = build(push=WRITES)
    engine = model.create_engine()
    with torch.inference_mode():
        requests = [engine.submit(text(i), **options_with(plan=PLAN)) for i in range(3)]
        for _ in range(steps):
            engine.step()
    requests[0].cancel()
    engine.run()
    for i, request in enumerate(requests[1:], start=1):
        assert_same(request.result(), model.sample(text(i), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


def test_threads_may_take_turns():
    model = build(push=WRITES)
    engine = model.create_engine(max_batch=3)
    lock, prompts = threading.Lock(), [text(i % 4, i // 4) for i in range(12)]

    def serve(prompt):
        with lock:
            request = engine.submit(prompt, **options_with(plan=PLAN))
        while True:
            with lock:
                if request.is_done:
                    return request.result()
                engine.step()

    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(serve, prompts))
    for prompt, sample in zip(prompts, samples, strict=True):
        assert_same(sample, model.sample(prompt, **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize("name", ["step", "run", "sample_many", "reset", "new_events", "events"])
def test_a_call_from_inside_of_a_step_is_refused(name):
    model, errors = build(push=WRITES), []
    engine = model.create_engine()

    def call(ids, logits):
        if len(ids) == 4 and not errors:
            try:
                CALLS[name](engine, other)
            except RuntimeError as error:
                errors.append(str(error))
        return logits

    other = engine.submit(text(2), **options_with(plan=PLAN))
    request = engine.submit(text(1), **options_with(plan=PLAN, logits_processors=[call]))
    engine.run()
    assert errors == ["this engine is in a step, from inside of which only submit and cancel may be called"]
    assert_same(request.result(), model.sample(text(1), **options_with(plan=PLAN)))
    if name != "events":
        assert_same(other.result(), model.sample(text(2), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


def test_submit_and_cancel_are_allowed_inside_of_a_step():
    model, made = build(push=WRITES), []
    engine = model.create_engine()

    def call(ids, logits):
        if len(ids) == 4 and not made:
            made.append(engine.submit(text(3), **options_with(plan=PLAN)))
            made.append(engine.submit(text(0), **options_with(plan=PLAN)))
            made[1].cancel()
            other.cancel()
        return logits

    other = engine.submit(text(2), **options_with(plan=PLAN))
    request = engine.submit(text(1), **options_with(plan=PLAN, logits_processors=[call]))
    engine.run()
    for i, it in ((1, request), (3, made[0])):
        assert_same(it.result(), model.sample(text(i), **options_with(plan=PLAN)))
    assert other.reason is made[1].reason is EndReason.CANCELLED
    assert_no_row_is_lost(engine)


def test_a_request_may_cancel_itself_inside_of_a_step():
    model, requests = build(push=WRITES), []
    engine = model.create_engine()

    def call(ids, logits):
        if len(ids) == 4:
            requests[0].cancel()
        return logits

    requests.append(engine.submit(text(1), **options_with(plan=PLAN, logits_processors=[call])))
    beside = engine.submit(text(2), **options_with(plan=PLAN))
    engine.run()
    assert requests[0].reason is EndReason.CANCELLED
    assert_same(beside.result(), model.sample(text(2), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


# listeners that leave


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_stream_that_is_dropped_cancels_its_request(taken):
    """Before its first event, too."""
    model = build(push=WRITES)
    engine = model.create_engine(max_batch=1)
    request, after = (engine.submit(text(i), **options_with(plan=PLAN)) for i in (1, 2))
    stream = request.events()
    for _ in range(taken):
        assert isinstance(next(stream), TextToken)
    del stream
    gc.collect()
    assert request.is_done
    assert request.reason is EndReason.CANCELLED
    engine.run()
    assert_same(after.result(), model.sample(text(2), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


def test_a_stream_that_is_dropped_inside_of_a_step_cancels_its_request():
    model, streams = build(push=WRITES), []
    engine = model.create_engine()
    listened = engine.submit(text(1), **options_with(plan=PLAN))
    streams.append(listened.events())

    def drop(ids, logits):
        streams.clear()
        return logits

    request = engine.submit(text(2), **options_with(plan=PLAN, logits_processors=[drop]))
    engine.run()
    assert listened.reason is EndReason.CANCELLED
    assert_same(request.result(), model.sample(text(2), **options_with(plan=PLAN)))
    assert_no_row_is_lost(engine)


def test_a_finished_stream_that_is_dropped_cancels_nothing():
    model = build(push=WRITES)
    engine = model.create_engine()
    request = engine.submit(text(1), **options_with(plan=PLAN))
    events = list(request.events())
    gc.collect()
    assert isinstance(events[-1], Ended)
    assert request.reason is EndReason.PLAN


# events compare


def test_events_with_tensors_compare_by_value():
    x = torch.arange(6.0).reshape(2, 3)
    done = ModalityDone(1, x, 4)
    assert done == ModalityDone(1, x.clone(), 4)
    assert done != ModalityDone(1, x + 1, 4)
    assert done != ModalityDone(1, x[:1], 4)
    assert done != ModalityDone(2, x.clone(), 4)
    assert done != ModalityDone(1, x.clone(), 5)
    assert done != TextToken(1)
    with pytest.raises(TypeError, match="unhashable"):
        hash(done)
    assert Ended([text(1), (1, x)], EndReason.EOS) == Ended([text(1), (1, x.clone())], EndReason.EOS)
    assert Ended([text(1), (1, x)], EndReason.EOS) != Ended([text(1), (1, x + 1)], EndReason.EOS)
    assert Ended([text(1)], EndReason.EOS) != Ended([text(1)], EndReason.STOP)


def test_two_streams_of_the_same_request_compare():
    model = build(push=WRITES)
    one, two, other = (list(model.sample_stream(text(i), **options_with(plan=PLAN))) for i in (1, 1, 2))
    assert [type(event) for event in one] == [type(event) for event in two]
    finished = [[event for event in events if isinstance(event, ModalityDone)] for events in (one, two, other)]
    assert finished[0] == finished[1] != finished[2]
    assert one[-1] == two[-1] != other[-1]
    assert done_in(one) in two


def done_in(events) -> ModalityDone:
    return next(event for event in events if isinstance(event, ModalityDone))


def test_progress_compares_too():
    model = build(push=WRITES)
    one, two, other = (
        [it for it in model.sample_stream(text(i), **options_with(plan=PLAN)) if isinstance(it, DrawingProgress)]
        for i in (1, 1, 2)
    )
    assert one == two
    assert one != other
    assert one[0] != one[1]
