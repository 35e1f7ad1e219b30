"""Memory that is short, and memory that must not pile up."""

import gc
import warnings
import weakref
from contextlib import suppress
from itertools import pairwise
from math import log2

import pytest
import torch
from generation_faults import OutOfMemory
from generation_models import (
    IMAGE,
    LINE,
    VECTOR,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    cache_of,
    drawn,
    latents,
    options_over,
    text,
)
from torch import Tensor, nn

from transfusion_pytorch.generation import request as request_module
from transfusion_pytorch.generation.batch_state import BatchState
from transfusion_pytorch.generation.events import DrawingProgress, Ended, EndReason, ModalityDone, ModalityStarted
from transfusion_pytorch.generation.request import MOST_PROGRESS

PLAN = [("text", 3), (LINE, (2,)), ("text", 2)]
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("none left")]
OUT_OF_MEMORY += [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]


options_with = options_over(max_length=40)


# a forward pass that does not fit


class Tight:
    """A `forward_stream` for at most so many branches. What it makes before it fails is watched."""

    def __init__(self, model, most: int, error: Exception):
        self.run, self.most, self.error = model.forward_stream, most, error
        self.sizes: list[int] = []
        self.made: weakref.ref | None = None
        self.num_alive = 0

    def __call__(self, stream, *args, **options):
        self.num_alive += self.made is not None and self.made() is not None
        self.sizes.append(len(stream.lengths))
        activations = torch.zeros(1000)
        self.made = weakref.ref(activations)
        out = self.run(stream, *args, **options)
        if len(stream.lengths) > self.most:
            raise self.error
        return out


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_what_does_not_fit_is_run_in_halves_once_the_failed_run_is_gone(monkeypatch, error):
    model = build(push=WRITES)
    prompts = [text(*range(1 + i % 4)) for i in range(7)]
    options = options_with(plan=PLAN, cfg_scale=2.0, generator=None)
    expected = model.sample_many(prompts, **options)
    tight = Tight(model, 2, error)
    monkeypatch.setattr(model, "forward_stream", tight)
    engine = model.create_engine()
    with pytest.warns(UserWarning, match=r"did not fit .* and is run in halves") as caught:
        samples = engine.sample_many(prompts, **options)
    assert len(caught) == 1, "it is said once"
    assert max(tight.sizes) > 6
    assert tight.num_alive == 0, "the failed forward pass was alive when the next began"
    for sample, wanted in zip(samples, expected, strict=True):
        assert_same(sample, wanted)
    assert_no_row_is_lost(engine)


def test_where_warnings_are_errors_a_retry_is_none(monkeypatch):
    model, options = build(push=WRITES), options_with(plan=PLAN, cfg_scale=1.0)
    expected = model.sample_many([text(1), text(2)], **options)
    monkeypatch.setattr(model, "forward_stream", Tight(model, 1, OUT_OF_MEMORY[0]))
    for sample, wanted in zip(model.sample_many([text(1), text(2)], **options), expected, strict=True):
        assert_same(sample, wanted)


def test_what_does_not_fit_by_itself_ends_alone(monkeypatch):
    """And the memory that it held is there for others."""
    model = build(push=WRITES)
    run = model.forward_stream

    def forward(stream, *args, **options):
        if sum(stream.lengths) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(stream, *args, **options)

    expected = [model.sample(text(i), **options_with(plan=PLAN)) for i in (1, 2)]
    monkeypatch.setattr(model, "forward_stream", forward)
    engine = model.create_engine()
    prompts = [text(1), text(*[1] * 30), text(2)]
    requests = [engine.submit(prompt, **options_with(plan=PLAN)) for prompt in prompts]
    with pytest.warns(UserWarning, match="did not fit"):
        engine.run()
    assert requests[1].reason is EndReason.ERROR
    with pytest.raises(torch.OutOfMemoryError):
        requests[1].result()
    for request, wanted in zip(requests[::2], expected, strict=True):
        assert_same(request.result(), wanted)
    assert_no_row_is_lost(engine)


# a cache that cannot grow


def count_allocations(monkeypatch, fail_at: int | None = None) -> list:
    """Of the tensors of a cache; one of them fails."""
    seen, zeros = [], torch.zeros

    def allocate(*shape, **options):
        if len(shape) == 1 and isinstance(shape[0], tuple) and len(shape[0]) == 4:
            seen.append(shape[0])
            if len(seen) - 1 == fail_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", allocate)
    return seen


def grow(model, engine) -> list:
    prompts = [text(*[1, 2] * n) for n in (1, 30, 40, 3, 70)]
    plan = [("text", 3), (LINE, (4,)), ("text", 70)]
    engine.sample_many(prompts[:1], **options_with(plan=["text"], max_length=6))
    return engine.sample_many(prompts, **options_with(plan=plan, max_length=400, cfg_scale=2.0))


def test_a_cache_that_cannot_grow_stays_whole(monkeypatch):
    """Whichever of its allocations fails, once: every sample is what it would have been."""
    model = build(push=WRITES)
    expected = grow(model, model.create_engine())
    with monkeypatch.context() as patch:
        seen = count_allocations(patch)
        grow(model, model.create_engine())
    assert len(seen) > 40
    for fail_at in [
        *range(4, len(seen), len(seen) // 6),
        len(seen) - 1,
    ]:  # the first four are the row of the first call
        engine = model.create_engine()
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            count_allocations(patch, fail_at)
            try:
                samples = grow(model, engine)
            except torch.OutOfMemoryError:
                samples = None  # it came to a request that was alone in its step
        assert len(caught) <= 1
        if samples is not None:
            for sample, wanted in zip(samples, expected, strict=True):
                assert_same(sample, wanted)
        for sample, wanted in zip(grow(model, engine), expected, strict=True):
            assert_same(sample, wanted)
        assert_no_row_is_lost(engine)


def test_a_row_that_cannot_be_opened_ends_its_request_alone(monkeypatch):
    model = build(push=WRITES)
    expected = model.sample(text(1), **options_with(plan=PLAN))
    engine = model.create_engine()
    with monkeypatch.context() as patch:
        count_allocations(patch, fail_at=2)
        request = engine.submit(text(1), **options_with(plan=PLAN))
        engine.run()
    assert request.reason is EndReason.ERROR
    assert_no_row_is_lost(engine)
    again = engine.submit(text(1), **options_with(plan=PLAN))
    engine.run()
    assert_same(again.result(), expected)
    assert engine.stats.cache_bytes == 0


# what is decoded


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.shapes: list[tuple] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes += [tuple(x.shape)] if x.device.type == "cpu" else []
        return 2 * x


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.parametrize("ask", ["at the end", "step by step", "result alone"])
def test_every_modality_is_decoded_once_and_those_of_a_shape_together(listen, ask):
    decoder = Counting()
    model = build(push=WRITES, modality_decoder=(None, None, decoder, None))
    engine = model.create_engine()
    shapes = [(1, 2), (2, 2)]
    options = options_with(modality_steps=5)
    requests = [
        engine.submit(text(i % 4), listen=listen, **options | dict(plan=[(IMAGE, shapes[i % 2]), ("text", 2)]))
        for i in range(8)
    ]
    decoder.shapes.clear()  # those of dry runs
    events: list[list] = [[] for _ in requests]
    while not engine.is_idle:
        engine.step()
        if ask == "step by step":
            for request, heard in zip(requests, events, strict=True):
                heard += request.new_events()
    first = [request.result() for request in requests]
    if ask != "result alone":
        for request, heard in zip(requests, events, strict=True):
            heard += request.new_events()
    again = [request.result() for request in requests]
    assert sorted(decoder.shapes) == [(4, 1, 2, 1), (4, 2, 2, 1)]
    for request, one, other, heard in zip(requests, first, again, events, strict=True):
        assert_same(one, other, tolerance=0)
        [(_, raw)] = drawn(one)
        assert torch.equal(raw, 2 * request._request.modalities[0].tensor)
        if ask != "result alone":
            assert_same(heard[-1].sample, one, tolerance=0)
            finished = [it.modality for it in heard if isinstance(it, ModalityDone)]
            assert len(finished) == listen
            assert all(torch.equal(modality, raw) for modality in finished)


def test_samples_of_one_call_are_decoded_together():
    decoder = Counting()
    model = build(push=WRITES, modality_decoder=(None, None, decoder, None))
    decoder.shapes.clear()
    plan = [(IMAGE, (1, 2)), ("text", 2), (IMAGE, (1, 2))]
    model.sample_many([text(1), text(2), [text(1), latents(IMAGE, 1, 2)]], **options_with(plan=plan))
    assert decoder.shapes == [(6, 1, 2, 1)]
    decoder.shapes.clear()
    model.sample_many([text(i) for i in range(4)], max_batch=3, **options_with(plan=plan))
    assert decoder.shapes == [(3, 1, 2, 1)] * 2 + [(2, 1, 2, 1)], "as many as are drawn at once"


# what waits for a listener


@pytest.mark.parametrize("after", range(6))
def test_events_whose_making_fails_come_with_the_next_call(after):
    made: list[list] = []
    for error in (None, MemoryError("injected")):
        engine = build(push=WRITES).create_engine()
        request = engine.submit(text(1), **options_with(plan=[(LINE, (2,)), ("text", 3)]))
        engine.run()
        made.append([])
        with OutOfMemory(error, names={"clone"}, after=after), suppress(MemoryError):
            made[-1] += request.new_events()
        made[-1] += request.new_events()
    assert made[0] == made[1]
    assert isinstance(made[0][-1], Ended)


@pytest.mark.parametrize("num_steps", [3, 16, 17, 200])
def test_events_that_nobody_takes_are_bounded(num_steps):
    model = build(push=WRITES)
    engine, plan = model.create_engine(), [(VECTOR, ()), ("text", 2)]
    options = options_with(plan=plan, modality_steps=num_steps, odeint_kwargs=dict(method="euler"))
    request = engine.submit(text(1), **options)
    most = 0
    while not engine.is_idle:
        engine.step()
        most = max(most, len(request._request.events))
    assert most <= MOST_PROGRESS + 4  # opened, done, two ids
    events = request.new_events()
    steps = [event.step for event in events if isinstance(event, DrawingProgress)]
    assert steps == list(range(max(1, num_steps - MOST_PROGRESS + 1), num_steps + 1)), "the latest are kept"
    assert isinstance(events[0], ModalityStarted)
    assert isinstance(events[-1], Ended)


def test_a_preview_is_made_when_it_is_asked_for():
    decoder = Counting()
    model = build(push=WRITES, modality_decoder=(None, None, decoder, None))
    decoder.shapes.clear()
    events = list(model.sample_stream(text(1), **options_with(plan=[(IMAGE, (1, 2))], modality_steps=4)))
    assert len(decoder.shapes) == 1
    progress = [event for event in events if isinstance(event, DrawingProgress)]
    assert torch.equal(progress[1].preview(), 2 * progress[1].estimate)
    assert len(decoder.shapes) == 2


def test_a_dropped_request_is_forgotten():
    """An engine holds no request that is done and that nobody has."""
    model = build(push=WRITES)
    engine = model.create_engine()
    states = []
    for i in range(5):
        request = engine.submit(text(i % 4), **options_with(plan=PLAN))
        states.append(weakref.ref(request._request))
        del request
        engine.run()
    gc.collect()
    assert [state() for state in states] == [None] * 5
    assert cache_of(engine).reserved_tokens == 0


# latents that are not finite


@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5", "explicit_adams"])
@pytest.mark.parametrize("raw", [True, False])
def test_latents_that_are_not_finite_end_their_request(method, raw):
    model = build(push=WRITES)
    huge = torch.full((8, 3), 1e300, dtype=torch.float64)  # its square is infinite
    solver = dict(odeint_kwargs=dict(method=method, atol=1.0, rtol=1.0), return_unprocessed_modalities=raw)
    options = options_with(plan=PLAN, cfg_scale=1.0, **solver)
    engine = model.create_engine()
    requests = [
        engine.submit(text(i), **options | (dict(init_modality_noise=huge) if i == 1 else {})) for i in range(3)
    ]
    engine.run()
    assert requests[1].reason is EndReason.ERROR
    with pytest.raises(ValueError, match="not finite"):
        requests[1].result()
    *_, ended = requests[1].new_events()
    assert isinstance(ended, Ended)
    assert drawn(ended.sample) == [], "no picture of NaN"
    for i in (0, 2):
        assert_same(requests[i].result(), model.sample(text(i), **options))
    with pytest.raises(ValueError, match="not finite"):
        model.sample(text(1), **options | dict(init_modality_noise=huge))
    alone = dict(modality_type=LINE, fixed_modality_shape=(2,), odeint_kwargs=solver["odeint_kwargs"])
    with pytest.raises(ValueError, match="not finite"):
        model.generate_modality_only(2, init_modality_noise=huge, **alone)
    assert_no_row_is_lost(engine)


# processors


def test_a_processor_sees_all_ids_without_a_copy_of_them():
    """An id more costs the same wherever it stands: the ids are a growing view of memory that doubles."""
    model, seen, pointers = build(push=WRITES), [], []

    def look(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids.tolist())
        pointers.append((ids.data_ptr(), ids.untyped_storage().nbytes()))
        return logits

    options = options_with(max_length=460, logits_processors=[look], plan=[("text", 200), (LINE, (2,)), "text"])
    sample = model.sample([text(1), latents(LINE, 2), text(2)], **options)
    written = [token for part in sample if isinstance(part, Tensor) for token in part.tolist()]
    assert len(seen) > 400
    for ids in seen:
        assert ids == written[: len(ids)]
    sizes = sorted({size for _, size in pointers})
    assert len(set(pointers)) == len(sizes) <= log2(len(written) / 64) + 2
    assert all(other >= 2 * one for one, other in pairwise(sizes))


def test_an_error_of_a_processor_is_not_replaced_by_that_of_the_batch(monkeypatch):
    """The step that it spoils is run again for each half, one of which then has nobody left."""
    engine = build(push=WRITES).create_engine()

    def broken(ids, logits):
        raise ZeroDivisionError("of the processor")

    options = options_with(plan=[("text", 3)])
    first, second = engine.submit(text(1), **options), engine.submit(text(2), **options, logits_processors=[broken])
    interrupted = iter([MemoryError("once")])

    def choose(state, logits):
        for error in interrupted:
            raise error
        return real(state, logits)

    real = BatchState.choose
    monkeypatch.setattr(BatchState, "choose", choose)
    with pytest.warns(UserWarning, match="memory is short"):
        engine.run()
    assert first.reason is EndReason.PLAN
    with pytest.raises(ZeroDivisionError, match="of the processor"):
        second.result()


def test_a_plan_whose_next_modality_cannot_begin_leaks_no_row(monkeypatch):
    engine = build(push=WRITES).create_engine()
    prompt = [text(1), latents(LINE, 2), text(2)]
    options = options_with(plan=[(LINE, (2,)), (LINE, (3,))], modality_cfg_scale=2.0, cfg_scale=2.0)
    request = engine.submit(prompt, **options)
    while request._request.denoising is None or request._request.denoising.step == 0:
        engine.step()

    def no_memory(*args, **options):
        raise MemoryError("of the noise")

    monkeypatch.setattr(request_module, "initial_noise", no_memory)
    engine.run()
    assert request.reason is EndReason.ERROR
    assert_no_row_is_lost(engine)
