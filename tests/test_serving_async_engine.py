"""The asynchronous engine: clients in any threads and event loops get what they would get alone, or their own error."""

import asyncio
import gc
import logging
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_faults import CATALOG, shared_model
from generation_models import (
    GREEDY,
    IMAGE,
    LINE,
    VECTOR,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    fail,
    generators,
    latents,
    noise,
    text,
)
from torch import nn

from transfusion_pytorch import AsyncEngine as AsyncEngineOfThePackage
from transfusion_pytorch.generation.engine import Engine
from transfusion_pytorch.generation.events import (
    DrawingProgress,
    Ended,
    EndReason,
    ModalityDone,
    ModalityStarted,
    TextToken,
)
from transfusion_pytorch.serving import AsyncEngine, EngineClosed
from transfusion_pytorch.serving.mailbox import Mailbox

ENDLESS = dict(plan=[("text", 10**6)], max_length=2 * 10**6, text_temperature=0.0)
SHORT = GREEDY | dict(init_modality_noise=noise(), max_length=16)
SEEDED = dict(modality_steps=2, max_modality_tokens=4, max_length=26, cfg_scale=2.0)
PROMPTS = [None, text(1, 2), latents(VECTOR), [text(0), latents(LINE, 3), text(1)], latents(IMAGE, 2, 1), text(3)]
LETTERS = {TextToken: "t", ModalityStarted: "(", DrawingProgress: ".", ModalityDone: ")", Ended: "|"}


@pytest.fixture(autouse=True)
def quiet(caplog):
    """No thread is left, and asyncio has nothing to complain of (a task destroyed, an exception never retrieved)."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)  # of an engine that was forgotten
        assert not thread.is_alive()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def spelt(events) -> str:
    """One letter an event: `"tt(..)t|"`."""
    return "".join(LETTERS[type(event)] for event in events)


def all_but_drawings(events) -> list:
    return [event for event in events if isinstance(event, (TextToken, ModalityStarted))]


def seeded(seed: int) -> dict:
    return SEEDED | dict(generator=generators(seed)[0])


def expected_of(model) -> list:
    return [model.sample(prompt, **seeded(seed)) for seed, prompt in enumerate(PROMPTS)]


async def collect(stream, events: list | None = None) -> list:
    """All events; those that come before an error are in the list that was given."""
    events = [] if events is None else events
    async for event in stream:
        events.append(event)
    return events


class Gate:
    """A logits processor that stops the engine's thread until it is opened: what comes meanwhile comes in one go."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, ids, logits):
        self.reached.set()
        assert self.opened.wait(60)
        return logits

    async def closed(self, engine) -> asyncio.Task:
        """A request that has reached it."""
        task = asyncio.create_task(engine.sample(text(1), logits_processors=[self], **SHORT))
        await asyncio.to_thread(self.reached.wait, 60)
        return task


# what clients get


@pytest.mark.parametrize("most", [1, 2, 64])
def test_samples_are_those_of_the_model(most):
    model = build(seed=4)

    async def main():
        async with AsyncEngine(model, max_batch=most) as engine:
            return await asyncio.gather(*(engine.sample(it, **seeded(i)) for i, it in enumerate(PROMPTS)))

    for sample, expected in zip(asyncio.run(main()), expected_of(model), strict=True):
        assert_same(sample, expected)


@pytest.mark.parametrize("is_on", [True, False])
def test_the_autocast_of_its_creation_is_that_of_its_thread(is_on):
    model = build(seed=4, dtype=torch.float32)
    seen = []

    def watch(ids, logits):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return logits

    async def main():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            engine = AsyncEngine(model)
        async with engine:
            return await engine.sample(text(1), logits_processors=[watch], **SHORT)

    sample = asyncio.run(main())
    assert {on for on, _ in seen} == {is_on}
    assert not is_on or {dtype for _, dtype in seen} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
        assert_same(sample, model.sample(text(1), logits_processors=[watch], **SHORT), tolerance=1e-6)


def test_streams_tell_what_streams_of_the_model_tell():
    model = build(seed=4)

    async def main():
        async with AsyncEngine(model, max_batch=3) as engine:
            return await asyncio.gather(*(collect(engine.stream(it, **seeded(i))) for i, it in enumerate(PROMPTS)))

    seen = ""
    for i, events in enumerate(asyncio.run(main())):
        expected = list(model.sample_stream(PROMPTS[i], **seeded(i)))
        assert_same(events[-1].sample, expected[-1].sample)
        assert events[-1].reason is expected[-1].reason
        told, wanted = (
            [it for it in some if isinstance(it, (TextToken, ModalityStarted))] for some in (events, expected)
        )
        assert told == wanted
        # however slow the listener, it sees the last step of each drawing
        assert spelt(events).replace("..", ".") == spelt(expected).replace("..", ".")
        seen += spelt(events)
    assert "t(" in seen


def test_clients_in_many_threads_and_event_loops():
    model = build(seed=4)
    engine, expected = AsyncEngine(model, max_batch=4), expected_of(model)

    async def client(shift: int) -> None:
        for at in (shift, shift + 1):
            single, pair, events = await asyncio.gather(
                engine.sample(PROMPTS[at], **seeded(at)),
                asyncio.gather(*(engine.sample(PROMPTS[k], **seeded(k)) for k in (at, shift))),
                collect(engine.stream(PROMPTS[at], **seeded(at))),
            )
            for sample in (single, pair[0], events[-1].sample):
                assert_same(sample, expected[at])
            assert_same(pair[1], expected[shift])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda shift: asyncio.run(client(shift)), (0, 1, 3, 4)))
    asyncio.run(engine.aclose())


def test_requests_go_on_together():
    """A short request is served while a long one is under way, and streams of one loop take turns."""

    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:
            endless = engine.stream(text(1), **ENDLESS)
            heard = [await anext(endless)]
            short = await engine.sample(text(2), **SHORT)
            heard += [await anext(endless), await anext(endless)]
            await endless.aclose()
            return short, heard

    short, heard = asyncio.run(main())
    assert_same(short, build(push=WRITES).sample(text(2), **SHORT))
    ids = build(push=WRITES).sample(text(1), **ENDLESS | dict(max_length=5))[0].tolist()[2:]
    assert heard == [TextToken(token) for token in ids]


def test_only_one_thread_touches_the_engine(monkeypatch):
    threads, submit, step = set(), Engine.submit, Engine.step

    def note(function):
        return lambda *args, **options: threads.add(threading.current_thread()) or function(*args, **options)

    monkeypatch.setattr(Engine, "submit", note(submit))
    monkeypatch.setattr(Engine, "step", note(step))
    engine = AsyncEngine(build(push=WRITES))

    async def client(i):
        stream = engine.stream(text(1), **ENDLESS)
        await anext(stream)
        await engine.sample(text(i), **SHORT)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: asyncio.run(client(i)), range(3)))
    asyncio.run(engine.aclose())
    [thread] = threads
    assert thread.name == "AsyncEngine"


def test_a_stream_may_be_read_in_one_event_loop_after_another():
    model = build(seed=4)
    engine = AsyncEngine(model)
    stream = engine.stream(text(1), **seeded(1))  # and begun in none

    async def read():
        return await anext(stream)

    first = asyncio.run(read())
    rest = asyncio.run(collect(stream))
    assert_same(rest[-1].sample, model.sample(text(1), **seeded(1)))
    assert spelt([first, *rest]).endswith("|")
    asyncio.run(engine.aclose())


def test_previews_are_computed_by_the_engines_thread():
    threads = []

    class Decoder(torch.nn.Module):
        def forward(self, x):
            threads.append(threading.current_thread().name)
            assert not torch.is_grad_enabled()
            return 2 * x

    model = build(push=WRITES, modality_decoder=(None, Decoder(), None, None))

    async def main():
        async with AsyncEngine(model) as engine:
            async for event in engine.stream(text(1), plan=[(LINE, (2,))], max_length=16):
                if isinstance(event, DrawingProgress):
                    torch.testing.assert_close(await engine.preview(event), 2 * event.estimate)

    asyncio.run(main())
    assert set(threads) == {"AsyncEngine"}


def test_weights_that_change_are_made_known_before_the_next_request(monkeypatch):
    told, submit = [], Engine.submit
    monkeypatch.setattr(
        Engine, "weights_changed", lambda self: told.append(threading.current_thread().name), raising=False
    )
    monkeypatch.setattr(Engine, "submit", lambda self, *a, **o: told.append("submit") or submit(self, *a, **o))

    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:
            await engine.sample(text(1), **SHORT)
            engine.weights_changed()
            await engine.sample(text(1), **SHORT)

    asyncio.run(main())
    assert told == ["submit", "AsyncEngine", "submit"]


def test_stats_are_those_of_the_engine():
    model = build(push=WRITES)
    inner = model.create_engine()

    async def main():
        async with AsyncEngine(inner) as engine:
            assert engine.stats == inner.stats
            await engine.sample(text(1), **SHORT)
        return engine.stats

    assert asyncio.run(main()) == inner.stats
    assert inner.stats.tokens_written == 16 - 2


# clients that leave


async def cancel_a_task(engine):
    task = asyncio.create_task(engine.sample(text(1), **ENDLESS))
    await anext(engine.stream(text(2), **ENDLESS))  # by then it is under way, or waits for a place
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def give_up_waiting(engine):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(engine.sample(text(1), **ENDLESS), timeout=0.01)


async def close_a_stream(engine):
    stream = engine.stream(text(1), **ENDLESS)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_a_loop(engine):
    async for _ in engine.stream(text(1), **ENDLESS):
        break


async def leave_a_context(engine):
    async with engine.stream(text(1), **ENDLESS) as stream:
        await anext(stream)


async def forget_a_stream(engine):
    stream = engine.stream(text(1), **ENDLESS)
    await anext(stream)
    del stream


async def forget_a_stream_in_a_cycle(engine):
    cycle = [engine.stream(text(1), **ENDLESS)]
    cycle.append(cycle)
    await anext(cycle[0])
    del cycle
    gc.collect()


async def forget_a_stream_before_its_first_event(engine):
    engine.stream(text(1), **ENDLESS)


async def cancel_a_reader(engine):
    """Its stream is still known to somebody, as it would be to an asynchronous generator that nobody resumes."""
    stream = engine.stream(text(1), **ENDLESS)
    reader = asyncio.create_task(collect(stream))
    await anext(engine.stream(text(2), **ENDLESS))
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    engine.kept = stream


WAYS = [
    cancel_a_task,
    give_up_waiting,
    close_a_stream,
    leave_a_loop,
    leave_a_context,
    forget_a_stream,
    forget_a_stream_in_a_cycle,
    forget_a_stream_before_its_first_event,
    cancel_a_reader,
]


@pytest.mark.parametrize("leave", WAYS)
def test_a_client_that_leaves_frees_its_place(leave):
    """There is one place, and what it does would never end."""
    model = build(push=WRITES)
    inner = model.create_engine(max_batch=2 if leave in (cancel_a_task, cancel_a_reader) else 1)

    async def main():
        async with AsyncEngine(inner) as engine:
            await leave(engine)
            samples = await asyncio.gather(*(engine.sample(text(i), **SHORT) for i in range(3)))
            assert len(await collect(engine.stream(text(1), plan=[("text", 2)], max_length=9))) == 3
        return samples

    for i, sample in enumerate(asyncio.run(main())):
        assert_same(sample, model.sample(text(i), **SHORT))
    assert inner.is_idle
    assert_no_row_is_lost(inner)


def test_a_client_whose_event_loop_is_closed_frees_its_place():
    engine = AsyncEngine(build(push=WRITES), max_batch=1)
    gate, loop = Gate(), asyncio.new_event_loop()
    stream = engine.stream(text(1), logits_processors=[gate], **ENDLESS)
    task = loop.create_task(collect(stream))
    loop.run_until_complete(asyncio.sleep(0))  # the task waits for an event
    assert gate.reached.wait(60)
    task._log_destroy_pending = False  # this is what the test is about
    loop.close()
    gate.opened.set()
    assert asyncio.run(engine.sample(text(2), **SHORT))
    asyncio.run(engine.aclose())


def test_a_client_that_has_left_before_its_turn_is_never_served(monkeypatch):
    prompts, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, prompt, **o: prompts.append(prompt) or submit(self, prompt, **o))
    gate = Gate()

    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:
            first = await gate.closed(engine)
            engine.stream(text(2), **ENDLESS)  # forgotten at once
            tasks = [asyncio.create_task(engine.sample(text(i), **ENDLESS)) for i in range(3)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gate.opened.set()
            await first
            await engine.sample(text(3), **SHORT)

    asyncio.run(main())
    assert [prompt.tolist() for prompt in prompts] == [[1], [3]]


# slow listeners


@pytest.mark.parametrize("steps", [3, 40])
def test_a_listener_who_sleeps_through_a_drawing_gets_its_last_step(steps):
    model = build(push=WRITES)
    plan = [("text", 2), (LINE, (2,)), ("text", 1), (VECTOR, ())]

    async def main():
        async with AsyncEngine(model, max_batch=1) as engine:
            stream = engine.stream(text(1), plan=plan, modality_steps=steps, max_length=40)
            await engine.sample(text(2), **SHORT)  # which has its turn when the other is done
            return await collect(stream)

    events = asyncio.run(main())
    assert spelt(events) == "tt(.)t(.)|"
    assert [event.step for event in events if isinstance(event, DrawingProgress)] == [steps, steps]
    torch.testing.assert_close(events[3].latents, events[4].modality, atol=1e-12, rtol=0)


def progress(step: int) -> DrawingProgress:
    x = torch.zeros(1, 2)
    return DrawingProgress(0, step, 9, step / 9, x, x, lambda modality, latents: latents)


def test_a_mailbox_keeps_the_latest_step_of_each_drawing():
    box, done = Mailbox(), ModalityDone(0, torch.zeros(1, 2), 9)
    box.put([ModalityStarted(0, (1,)), progress(1), progress(2)])
    box.put([progress(3)])
    box.put([done, ModalityStarted(0, (1,)), progress(1)])
    box.put([progress(2), TextToken(1), TextToken(1)])
    box.close()

    async def read_all():
        events = []
        while (event := await box.get()) is not None:
            events.append(event)
        return events

    events = asyncio.run(read_all())
    assert spelt(events) == "(.)(.tt"
    assert [event.step for event in events if isinstance(event, DrawingProgress)] == [3, 2]


def test_a_thread_without_requests_sleeps(monkeypatch):
    looks, is_idle = [], Engine.is_idle
    monkeypatch.setattr(Engine, "is_idle", property(lambda self: looks.append(1) or is_idle.fget(self)))

    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:
            await engine.sample(text(1), **SHORT)
            await asyncio.sleep(0.1)
            before = len(looks)
            await asyncio.sleep(0.1)
            return before, len(looks)

    before, after = asyncio.run(main())
    assert 0 < before == after


# any clients at once


async def restless_client(engine, behaviour: str, index: int):
    """Its sample, or None if it did not wait for one."""
    recipe = CATALOG[index]
    if behaviour == "fails":
        with pytest.raises(ZeroDivisionError):
            await engine.sample(text(1), logits_processors=[fail(ZeroDivisionError(), at=2)], max_length=9)
    elif behaviour == "waits":
        return await engine.sample(recipe.prompt, **recipe.arguments())
    elif behaviour == "reads":
        return (await collect(engine.stream(recipe.prompt, **recipe.arguments())))[-1].sample
    elif behaviour == "reads slowly":
        stream = engine.stream(recipe.prompt, **recipe.arguments())
        events = [await anext(stream)]
        await asyncio.sleep(0.02)
        return (await collect(stream, events))[-1].sample
    elif behaviour == "forgets":
        async for _ in engine.stream(recipe.prompt, **recipe.arguments()):
            break
    else:
        task = asyncio.create_task(engine.sample(recipe.prompt, **ENDLESS))
        await asyncio.sleep(0.001 * (index % 5))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    return None


def test_clients_of_all_kinds_in_several_event_loops_do_not_disturb_each_other():
    model, alone = shared_model()
    inner = model.create_engine(max_batch=6)
    engine = AsyncEngine(inner)
    places = threading.Barrier(3)  # all event loops at once

    async def crowd(seed: int) -> None:
        chance = random.Random(seed)
        places.wait(60)
        kinds = ["fails", "waits", "reads", "reads slowly", "forgets", "is cancelled"]
        clients = [(chance.choice(kinds), chance.randrange(len(CATALOG))) for _ in range(20)]
        samples = await asyncio.gather(*(restless_client(engine, *client) for client in clients))
        for sample, (behaviour, index) in zip(samples, clients, strict=True):
            assert (sample is None) == (behaviour in ("fails", "forgets", "is cancelled"))
            if sample is not None:
                assert_same(sample, alone[index].sample)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda seed: asyncio.run(crowd(seed)), range(3)))
    asyncio.run(engine.aclose())
    assert_no_row_is_lost(inner)


# errors


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (text(99), {}, ValueError, "token id 99"),
        ("hello", {}, TypeError, "hello|str"),
        (text(1), dict(no_such_option=1), TypeError, "no_such_option"),
        (text(1), dict(max_length=0), ValueError, "max_length"),
        (text(1), dict(logits_processors=[fail(ZeroDivisionError("mine"), at=6)]), ZeroDivisionError, "mine"),
        (text(1), dict(logits_processors=[fail(StopIteration("mine"), at=6)]), RuntimeError, "StopIteration.*mine"),
        (text(1), dict(logits_processors=[fail(StopAsyncIteration("mine"), at=6)]), RuntimeError, "mine"),
    ],
)
def test_an_error_comes_out_where_its_request_is_awaited(prompt, options, error, message):
    model = build(push=WRITES)

    async def main():
        async with AsyncEngine(model) as engine:
            neighbour = engine.stream(text(2), **ENDLESS)
            await anext(neighbour)
            with pytest.raises(error, match=message):
                await engine.sample(prompt, **SHORT | options)
            events = []
            with pytest.raises(error, match=message):
                await collect(engine.stream(prompt, **SHORT | options), events)
            assert await anext(neighbour)
            return events, await engine.sample(text(3), **SHORT)

    events, sample = asyncio.run(main())
    assert_same(sample, model.sample(text(3), **SHORT))
    if "logits_processors" in options:
        assert spelt(events) == "tttt|"
        assert events[-1].reason is EndReason.ERROR


@pytest.mark.parametrize("error", [SystemExit("mine"), asyncio.CancelledError("mine"), KeyboardInterrupt("mine")])
def test_what_would_end_an_event_loop_is_an_error_of_the_request(error):
    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:
            with pytest.raises(RuntimeError, match=f"{type(error).__name__}.*mine") as caught:
                await engine.sample(text(1), logits_processors=[fail(error, at=4)], **SHORT)
            assert caught.value.__cause__ is error
            await engine.sample(text(3), **SHORT)

    asyncio.run(main())


class Picky(nn.Module):
    """A user's module that raises an error where it sees large numbers."""

    def __init__(self, error: BaseException, layer: nn.Module):
        super().__init__()
        self.error, self.layer = error, layer

    def forward(self, x):
        if x.device.type == "cpu" and (x.abs() > 1e3).any():
            raise self.error
        return self.layer(x)


def at_fault(place: str, error: BaseException):
    """A model, and the prompt and options of a request whose own code raises this in it."""
    large = dict(plan=[("text", 2), (LINE, (2,)), ("text", 2)], init_modality_noise=1e4 * torch.ones(4, 3))
    if place == "processor":
        return build(push=WRITES), text(1), dict(logits_processors=[fail(error, at=4)])
    if place == "decoder":
        return build(push=WRITES, modality_decoder=(None, Picky(error, nn.Identity()), None, None)), text(1), large
    pair = (Picky(error, nn.Linear(3, 8)), nn.Linear(8, 3))
    model = build(push=WRITES, pre_post_transformer_enc_dec=(None, pair, None, None))
    if place == "adapter, as it denoises":
        return model, text(1), large
    return model, [text(1), (LINE, torch.full((2, 3), 1e4, dtype=torch.float64))], dict(plan=["text"])


@pytest.mark.parametrize("error", [SystemExit("mine"), asyncio.CancelledError("mine"), KeyboardInterrupt("mine")])
@pytest.mark.parametrize("place", ["processor", "decoder", "adapter, as it reads", "adapter, as it denoises"])
def test_what_would_end_an_event_loop_is_no_matter_of_others(place, error):
    """Neighbours write and are drawn meanwhile, in the same forward passes and calls of a decoder."""
    model, prompt, options = at_fault(place, error)
    plan = [("text", 3), (LINE, (2,)), ("text", 6), (LINE, (2,)), ("text", 9)]
    beside = [SHORT | dict(plan=plan, cfg_scale=scale, max_length=60) for scale in (1.0, 2.0)]
    expected = [model.sample(text(2), **own) for own in beside]

    async def main():
        async with AsyncEngine(model) as engine:
            streams = [engine.stream(text(2), **own) for own in beside]
            for stream in streams:
                await anext(stream)
            with pytest.raises(RuntimeError, match=f"{type(error).__name__}.*mine"):
                await engine.sample(prompt, **SHORT | dict(max_length=40) | options)
            return [(await collect(stream))[-1] for stream in streams]

    for ended, sample in zip(asyncio.run(main()), expected, strict=True):
        assert ended.reason is EndReason.PLAN
        assert_same(ended.sample, sample)


def test_code_of_a_request_cannot_wait_for_its_own_engine():
    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:

            def ask(ids, logits):
                asyncio.run(engine.sample(text(1), **SHORT))

            with pytest.raises(RuntimeError, match="would wait for itself"):
                await engine.sample(text(1), logits_processors=[ask], **SHORT)

    asyncio.run(main())


def test_one_client_reads_a_stream():
    async def main():
        async with AsyncEngine(build(push=WRITES)) as engine:
            gate = Gate()
            stream = engine.stream(text(1), logits_processors=[gate], **SHORT)
            first = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="awaited already"):
                await anext(stream)
            gate.opened.set()
            assert spelt(await first).endswith("t|"), "it goes on all the same"

    asyncio.run(main())


def test_a_stream_that_was_closed_tells_nothing_more():
    """Neither events that lie there, nor an error."""

    async def main():
        async with AsyncEngine(build(push=WRITES), max_batch=1) as engine:
            wrong = dict(logits_processors=[fail(ZeroDivisionError(), at=5)])
            stream = engine.stream(text(1), **SHORT | wrong)
            await engine.sample(text(2), **SHORT)  # which has its turn when the other is done
            await stream.aclose()
            return await collect(stream)

    assert asyncio.run(main()) == []


def test_an_engine_that_exists_has_its_options():
    with pytest.raises(TypeError, match="exists already cannot be set: max_batch"):
        AsyncEngine(build().create_engine(), max_batch=3)


# a bug of the engine


@pytest.fixture
def crash(monkeypatch):
    """Once it is set, the next step of any engine raises this."""
    pending, step = [], Engine.step

    def crashing(self):
        if pending:
            raise pending.pop()
        step(self)

    monkeypatch.setattr(Engine, "step", crashing)
    return pending


def test_a_crash_of_the_engine_fails_all_who_wait_and_no_other(crash):
    model = build(push=WRITES)
    engine = AsyncEngine(model)
    started = threading.Barrier(4)

    async def wait():
        stream = engine.stream(text(1), **ENDLESS)
        await anext(stream)
        waiting = asyncio.gather(
            collect(stream), *(engine.sample(text(2), **ENDLESS) for _ in range(3)), return_exceptions=True
        )
        await asyncio.sleep(0)
        await asyncio.to_thread(started.wait, 60)
        return await waiting

    with ThreadPoolExecutor(3) as threads:
        results = [threads.submit(lambda: asyncio.run(wait())) for _ in range(3)]
        started.wait(60)
        crash.append(KeyError("a bug"))
        for result in results:
            assert [str(error) for error in result.result()] == ["'a bug'"] * 4
    assert_same(asyncio.run(engine.sample(text(3), **SHORT)), model.sample(text(3), **SHORT))
    asyncio.run(engine.aclose())


def test_an_engine_that_cannot_be_emptied_is_closed(monkeypatch, crash):
    async def main():
        engine = AsyncEngine(build(push=WRITES))
        stream = engine.stream(text(1), **ENDLESS)
        await anext(stream)
        monkeypatch.setattr(Engine, "is_idle", property(lambda self: False))
        crash.extend([KeyError("another bug"), KeyError("another bug"), KeyError("a bug")])
        with pytest.raises(KeyError, match="a bug"):
            await collect(stream)
        with pytest.raises(EngineClosed, match=r"because its engine failed: KeyError\('a bug'\)") as caught:
            await engine.sample(text(2), **SHORT)
        assert isinstance(caught.value.__cause__, KeyError)
        await engine.aclose()

    asyncio.run(main())


# the end


def test_closing_cancels_what_is_unfinished():
    inner = build(push=WRITES).create_engine(max_batch=2)

    async def main():
        engine = AsyncEngine(inner)
        streams = [engine.stream(text(i), **ENDLESS) for i in range(3)]  # one of them waits for a place
        await anext(streams[0])
        samples = [asyncio.create_task(engine.sample(text(i), **ENDLESS)) for i in range(3)]
        await asyncio.sleep(0)
        await asyncio.gather(engine.aclose(), engine.aclose())
        for stream in streams:
            *_, ended = await collect(stream)
            assert ended.reason is EndReason.CANCELLED
            assert ended.error is None
        for sample in samples:
            with pytest.raises(EngineClosed, match="AsyncEngine was closed before the sample was finished"):
                await sample
        with pytest.raises(EngineClosed, match="this AsyncEngine is closed"):
            engine.stream(text(1))
        with pytest.raises(EngineClosed, match="this AsyncEngine is closed"):
            await engine.sample(text(1))
        await engine.aclose()

    asyncio.run(main())
    assert inner.is_idle
    assert_no_row_is_lost(inner)


def test_requests_that_wait_for_the_thread_when_it_is_closed_are_cancelled():
    gate = Gate()

    async def main():
        engine = AsyncEngine(build(push=WRITES))
        first = await gate.closed(engine)
        stream = engine.stream(text(2), **SHORT)
        late = asyncio.create_task(engine.sample(text(2), **SHORT))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.aclose())
        await asyncio.sleep(0)
        gate.opened.set()
        await closing
        *_, ended = await collect(stream)
        assert ended.reason is EndReason.CANCELLED
        assert ended.error is None
        for task in (first, late):
            with pytest.raises(EngineClosed, match="was closed before the sample was finished"):
                await task

    asyncio.run(main())


def test_closing_that_is_cancelled_closes_all_the_same():
    gate = Gate()

    async def main():
        engine = AsyncEngine(build(push=WRITES))
        first = await gate.closed(engine)
        closing = asyncio.create_task(engine.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        gate.opened.set()
        with pytest.raises(EngineClosed):
            await first
        await engine.aclose()

    asyncio.run(main())


def test_clients_in_other_threads_are_told_of_the_end():
    engine = AsyncEngine(build(push=WRITES))
    started = threading.Barrier(4)

    async def client():
        stream = engine.stream(text(1), **ENDLESS)
        await anext(stream)
        waiting = asyncio.gather(collect(stream), engine.sample(text(1), **ENDLESS), return_exceptions=True)
        await asyncio.sleep(0)
        await asyncio.to_thread(started.wait, 60)
        return await waiting

    with ThreadPoolExecutor(3) as threads:
        results = [threads.submit(lambda: asyncio.run(client())) for _ in range(3)]
        started.wait(60)
        asyncio.run(engine.aclose())
        for result in results:
            events, error = result.result()
            assert events[-1].reason is EndReason.CANCELLED
            assert isinstance(error, EngineClosed)


def test_an_engine_that_is_forgotten_ends_its_thread():
    engine = AsyncEngine(build(push=WRITES))
    thread = engine._thread
    asyncio.run(engine.sample(text(1), **SHORT))
    del engine
    gc.collect()
    thread.join()


def test_an_engine_lives_as_long_as_its_clients():
    model = build(push=WRITES)

    async def main():
        stream = AsyncEngine(model).stream(text(1), **SHORT)
        gc.collect()
        sample = await AsyncEngine(model).sample(text(1), **SHORT)
        return (await collect(stream))[-1].sample, sample

    for sample in asyncio.run(main()):
        assert_same(sample, model.sample(text(1), **SHORT))


@pytest.mark.slow
def test_a_program_that_closes_nothing_ends():
    program = """if True:
        import asyncio, torch
        from transfusion_pytorch import AsyncEngine, Transfusion

        model = Transfusion(num_text_tokens=4, dim_latent=2, modality_num_dim=1, transformer=dict(dim=16, depth=1))
        engine = AsyncEngine(model)
        stream = engine.stream(torch.tensor([1]), plan=[("text", 10**6)], max_length=10**6)

        async def main():
            await anext(stream)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_in_the_package():
    assert AsyncEngineOfThePackage is AsyncEngine
