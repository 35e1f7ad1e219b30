"""Failures in the middle of a change: whatever operation fails, and whenever Ctrl-C comes, every sample is exact."""

import sys
import threading
from functools import cache
from types import FrameType

import pytest
import torch
from checks import TYPECHECK
from generation_faults import OutOfMemory
from generation_models import (
    LINE,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    latents,
    options_over,
    text,
)

import transfusion_pytorch
from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.network.cache import KVCache

[PACKAGE] = transfusion_pytorch.__path__
SAMPLES = tuple(f"{PACKAGE}/{it}" for it in ("generation/", "network/cache", "network/inference", "sequence/grammar"))

options_with = options_over(max_length=150, modality_cfg_scale=1.5, modality_steps=2)


# an operation on the device that fails


def work():
    """Requests whose rows outgrow their blocks, and are exchanged as others begin and end."""
    writes = [dict(plan=[("text", n)], cfg_scale=1.0) for n in (9, 70, 8, 72)]
    draws = [dict(plan=[("text", n), (LINE, (2,)), ("text", 2)], cfg_scale=2.0) for n in (2, 3)]
    return [(text(i % 4), options_with(**own)) for i, own in enumerate([*writes, *draws])]


@cache
def made_alone():
    model = build(push=WRITES)
    return model, [model.sample(prompt, **options) for prompt, options in work()]


def check_write_that_fails(after: int) -> bool:
    """Whether there were so many operations that write in place. The next of them fails, once."""
    model, expected = made_alone()
    engine = model.create_engine()
    requests = [engine.submit(prompt, **options) for prompt, options in work()]
    with OutOfMemory(RuntimeError("device-side assert"), names={"copy_", "__setitem__"}, after=after) as moment:
        for _ in range(200):
            engine.step()
    assert engine.is_idle
    failed = [request for request in requests if request.reason is EndReason.ERROR]
    assert len(failed) <= 1
    for request, sample in zip(requests, expected, strict=True):
        if request not in failed:
            assert_same(request.result(), sample)
    assert_no_row_is_lost(engine)
    return moment.error is None


@pytest.mark.parametrize("first", range(2))
def test_a_write_that_fails_ends_one_request_at_most(first):
    """Rows that were being exchanged or moved are read again, and nobody goes on with those of another."""
    after = 10 * first
    while check_write_that_fails(after):
        after += 80 if TYPECHECK else 20
    assert after > 250


@pytest.mark.slow
def test_whatever_write_fails_ends_one_request_at_most():
    after = 0
    while check_write_that_fails(after):
        after += 1


def test_requests_whose_cache_breaks_again_and_again_end(monkeypatch):
    """Others, who need no such operation, go on."""

    def fails(self, *args):
        self.is_broken = True
        raise RuntimeError("device-side assert")

    model, expected = made_alone()
    monkeypatch.setattr(KVCache, "_move", fails)
    engine = model.create_engine()
    requests = [engine.submit(prompt, **options) for prompt, options in work()]
    for _ in range(200):
        engine.step()
    assert engine.is_idle
    for request, sample in zip(requests, expected, strict=True):
        if request.reason is EndReason.ERROR:
            with pytest.raises(RuntimeError, match=r"device-side assert|cache is broken"):
                request.result()
        else:
            assert_same(request.result(), sample)
    assert [requests[i].reason for i in (1, 3)] == [EndReason.ERROR] * 2, "those that outgrow their block"
    assert_no_row_is_lost(engine)
    monkeypatch.undo()
    assert_same(engine.sample_many([work()[1][0]], **work()[1][1])[0], expected[1])


# Ctrl-C


class Interruption:
    """Raises `KeyboardInterrupt` at one of the moments at which Python looks for signals: a function has been entered,
    or one that is not written in Python has returned. Counts them, of the files whose paths begin like `files`.
    """

    def __init__(self, at: int = -1, files: tuple[str, ...] = SAMPLES):
        self.at, self.files, self.count = at, files, 0

    def __enter__(self) -> "Interruption":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(self.files):
            self.count += 1
            if self.count - 1 == self.at:
                raise KeyboardInterrupt


def conversation(engine, requests) -> None:
    """All that a client does; it can be begun again."""
    for _ in range(200):
        requests[0].cancel()
        engine.step()
        for request in requests:
            request.new_events()
        if engine.is_idle:
            return
    pytest.fail("a request has no end")


PROMPTS = [text(3), text(0), text(1, 2), [text(2), latents(LINE, 2)], text(*[1] * 62)]
PLAN = [("text", 3), (LINE, (2,)), ("text", 4), (LINE, (3,)), ("text", 2)]


@cache
def moments() -> int:
    """How many there are, for who is interrupted at any of them."""
    model = build(push=WRITES)
    engine = model.create_engine()
    requests = [engine.submit(prompt, **options_with(plan=PLAN)) for prompt in PROMPTS]
    with Interruption() as never:
        conversation(engine, requests)
    return never.count


def check_interrupted(at: int, expected: list) -> None:
    engine = build(push=WRITES).create_engine()
    requests = [engine.submit(prompt, **options_with(plan=PLAN)) for prompt in PROMPTS]
    try:
        with Interruption(at):
            conversation(engine, requests)
    except KeyboardInterrupt:
        conversation(engine, requests)
    failed = [request for request in requests[1:] if request.reason is EndReason.ERROR]
    assert len(failed) <= 1
    for request, sample in zip(requests[1:], expected[1:], strict=True):
        if request not in failed:
            assert_same(request.result(), sample)
    engine.step()
    assert_no_row_is_lost(engine)


# what is raised while a generator is closed is shown, and goes no further
shown = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@shown
@pytest.mark.parametrize("first", range(4))
def test_ctrl_c_may_come_at_any_moment(first):
    """The request whose state is half changed ends, or none; what all others become is the same as without it."""
    model = build(push=WRITES)
    expected = [model.sample(prompt, **options_with(plan=PLAN)) for prompt in PROMPTS]
    stride = moments() // (6 if TYPECHECK else 24)
    for at in range(first * stride // 4, moments(), stride):
        check_interrupted(at, expected)


@shown
@pytest.mark.slow
def test_ctrl_c_may_come_at_any_of_many_moments():
    model = build(push=WRITES)
    expected = [model.sample(prompt, **options_with(plan=PLAN)) for prompt in PROMPTS]
    for at in range(0, moments(), 29):
        check_interrupted(at, expected)


@shown
@pytest.mark.parametrize("call", ["submit", "step", "cancel", "new_events", "reset"])
def test_whenever_a_call_is_interrupted_the_engine_is_free_for_the_next(call):
    model, files = build(push=WRITES), (f"{PACKAGE}/generation/engine", f"{PACKAGE}/generation/delivery")
    expected, interrupted = model.sample(text(1), **options_with(plan=PLAN)), True
    for at in range(2000):
        engine = model.create_engine()
        requests = [engine.submit(text(i), **options_with(plan=PLAN)) for i in range(2)]
        engine.step()
        calls = dict(submit=lambda: engine.submit(text(2), **options_with(plan=PLAN)), step=engine.step)  # noqa: B023
        calls |= dict(cancel=requests[0].cancel, new_events=requests[0].new_events, reset=engine.reset)
        try:
            with Interruption(at, files) as moment:
                calls[call]()
        except KeyboardInterrupt:
            pass
        thread = threading.Thread(target=engine.step)  # of which none is refused
        thread.start()
        thread.join()
        engine.run()
        if call != "reset":
            assert_same(requests[1].result(), expected)
        interrupted = moment.count > at
        if not interrupted:
            break
    assert at > 3
    assert not interrupted


# another thread, and another device


class Meanwhile(Interruption):
    """At such a moment, something else happens in another thread."""

    def __init__(self, what, at: int):
        super().__init__(at)
        self.what = what

    def _note(self, frame: FrameType, event: str, argument) -> None:
        try:
            super()._note(frame, event, argument)
        except KeyboardInterrupt:
            thread = threading.Thread(target=self.what)
            thread.start()
            thread.join()


def stepped(steps: int):
    """An engine with one request, whose row lies in a block of 64 slots, and then in one of 128."""
    engine = build(push=WRITES).create_engine()
    engine.submit(text(*[1] * 60), **options_with(plan=[("text", 9)], cfg_scale=1.0))
    for _ in range(steps):
        engine.step()
    return engine


def test_statistics_may_be_read_while_a_step_runs_in_another_thread():
    """Which may make a block of the cache, or free one, at whatever moment."""
    reserved = [stepped(steps).stats.cache_bytes for steps in range(1, 9)]
    last = reserved.count(reserved[0])  # step before the row moves
    assert last < len(reserved)
    for at in range(1000):
        engine = stepped(last)
        before = engine.stats
        with Meanwhile(engine.step, at) as moment:
            stats = engine.stats
        if moment.count <= at:
            break
        after = engine.stats
        assert after.cache_bytes > before.cache_bytes
        assert before.steps <= stats.steps <= after.steps
        assert 0 <= stats.cache_bytes <= before.cache_bytes + after.cache_bytes
    assert 4 < at < 999


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_model_on_another_device_is_read_by_anew(monkeypatch, steps):
    """The cache lies where the model has been. A move changes `.data`, which torch does not count."""
    made = []
    for cache_kv in (True, False):
        model = build(push=WRITES)
        engine = model.create_engine(cache_kv=cache_kv)
        requests = [engine.submit(prompt, **options_with(plan=PLAN)) for prompt in PROMPTS]
        for _ in range(steps):
            engine.step()
        read = engine.stats.tokens_read
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "device", property(lambda self: torch.device("cpu", 0)))  # is not "cpu"
            for parameter in model.parameters():
                parameter.data.mul_(1.1)  # to see whose results these are
            if not cache_kv:
                engine.weights_changed()
            engine.step()
            assert not cache_kv or engine.stats.tokens_read - read > len(PROMPTS[4])
            engine.run()
        made.append([request.result() for request in requests])
    for cached, again in zip(*made, strict=True):
        assert_same(cached, again)
