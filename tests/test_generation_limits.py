"""What an engine may do at once, and for how long: queue, time, cache, tokens of a prefill and of a joint step."""

import time
import warnings

import pytest
import torch
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
    generators,
    latents,
    noise,
    options_over,
    slots_of,
    text,
    to_pieces,
)

from transfusion_pytorch.generation import runner
from transfusion_pytorch.generation.delivery import sample_of
from transfusion_pytorch.generation.engine import QueueFull
from transfusion_pytorch.generation.events import Ended, EndReason
from transfusion_pytorch.generation.options import SamplingOptions

PLAN = [("text", 4), (LINE, (2,)), ("text", 3)]


options_with = options_over(max_length=40)


# prompts longer than max_length


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(it.message) for it in caught]


def test_a_long_prompt_is_told_once_for_all_of_a_call():
    model, options = build(push=WRITES), options_with(max_length=10)
    long, short = text(*[1] * 10), text(*[1] * 9)
    engine = model.create_engine()
    told = "prompt {} has 11 tokens with its markers, more than max_length=10{}: the model writes nothing behind it"
    for call, expected in (
        (lambda: model.sample(long, **options), [told.format(0, "")]),
        (lambda: model.sample_many([short, long, long, long], **options), [told.format(1, ", and 2 more like it")]),
        (lambda: engine.submit(long, **options), [told.format(0, "")]),
        (lambda: model.sample_stream(long, **options), [told.format(0, "")]),
        (lambda: model.sample_many([short, None], **options), []),
    ):
        assert warnings_of(call) == expected


def test_what_a_plan_replaces_does_not_count():
    """Nor does what is forced."""
    model, options = build(push=WRITES), options_with(max_length=10)
    opened = text(*[1] * 8, *model.vocabulary.opening(LINE, (2,)).tolist())
    told = ["prompt 0 has 12 tokens with its markers, more than max_length=10: the model writes nothing behind it"]
    assert warnings_of(lambda: model.sample(opened, **options)) == told
    assert warnings_of(lambda: model.sample(opened, **options | dict(plan=[(LINE, (3,))]))) == []
    assert warnings_of(lambda: model.sample(opened, **options | dict(force_modality_at_start=(LINE, (3,))))) == []


@pytest.mark.filterwarnings("ignore:prompt .* has")
@pytest.mark.parametrize("cache_kv", [True, False])
def test_a_long_prompt_comes_back_as_it_is(cache_kv):
    model = build(push=dict(meta=9.0, eos=-9.0))
    prompts = [[text(1, 2), latents(IMAGE, 3, 3), text(3)], text(*[2] * 30), text(1), text(1, 2, 3, 6, 19)]
    options = options_with(max_length=6)
    samples = model.sample_many(prompts, cache_kv=cache_kv, **options)
    assert [sample.reason for sample in samples] == [EndReason.LENGTH] * 4
    opening = model.vocabulary.opening(IMAGE, (3, 3)).tolist()
    assert samples[0][0].tolist() == [model.sos_id, 1, 2, *opening]
    assert torch.equal(samples[0][1][1], prompts[0][1][1])
    assert samples[0][2].tolist() == [model.eom_ids[IMAGE], 3]
    assert samples[1][0].tolist() == [model.sos_id, *[2] * 30]
    assert samples[3][0].tolist() == [model.sos_id, 1, 2, 3, 6, 19], "with an opening that is not finished"
    assert_same(samples[2], model.sample(text(1), **options))


# time


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("steps", range(10))
def test_a_request_whose_time_is_over_ends_with_what_there_is(clock, steps):
    model = build(push=WRITES)
    engine = model.create_engine()
    request = engine.submit(text(1), timeout=5, **options_with(plan=PLAN, modality_steps=4))
    beside = engine.submit(text(2), timeout=50, **options_with(plan=PLAN, modality_steps=4))
    for _ in range(steps):
        engine.step()
    clock[0] += 4.999
    assert not request.is_done
    engine.decode_modalities_of(request._request)
    so_far = slots_of(model, sample_of(request._request))
    clock[0] += 0.001
    engine.step()
    assert request.is_done
    assert request.reason is EndReason.TIMEOUT
    assert slots_of(model, request.result()) == so_far
    assert request.result().reason is EndReason.TIMEOUT
    *_, ended = request.new_events()
    assert isinstance(ended, Ended)
    assert ended.reason is EndReason.TIMEOUT
    assert ended.error is None
    assert len(engine.scheduler.active) == 1, "its row is free"
    engine.run()
    assert_same(beside.result(), model.sample(text(2), **options_with(plan=PLAN, modality_steps=4)))
    assert_no_row_is_lost(engine)


def test_time_runs_in_the_queue_too(clock):
    model = build(push=WRITES)
    engine = model.create_engine(max_batch=1)
    first, second, third = (
        engine.submit(text(i), timeout=given, **options_with()) for i, given in ((1, None), (2, 3), (3, 9))
    )
    engine.step()
    clock[0] += 3
    engine.step()
    assert second.reason is EndReason.TIMEOUT
    assert slots_of(model, second.result()) == [model.sos_id, 2]
    engine.run()
    assert first.reason is third.reason is EndReason.LENGTH
    assert_same(third.result(), model.sample(text(3), **options_with()))


def test_no_time_is_no_work(monkeypatch):
    model = build()
    monkeypatch.setattr(model, "forward_stream", lambda *args, **options: pytest.fail("something was computed"))
    engine = model.create_engine()
    request = engine.submit(text(1), timeout=0, **options_with())
    engine.run()
    assert request.reason is EndReason.TIMEOUT


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), ("3", TypeError), (True, TypeError)]
)
def test_a_time_that_is_none_is_refused(timeout, error):
    engine = build().create_engine()
    with pytest.raises(error, match="timeout"):
        engine.submit(text(1), timeout=timeout)
    assert engine.is_idle


# the queue


def test_a_full_queue_takes_no_more():
    model = build(push=WRITES)
    engine, source = model.create_engine(max_batch=1, max_waiting=2), torch.Generator().manual_seed(3)
    # there is room for the first, so it does not count
    first, second, last = (engine.submit(text(i), **options_with(plan=PLAN)) for i in (1, 2, 0))
    state = source.get_state()
    with pytest.raises(QueueFull, match="2 requests wait already, and max_waiting is 2"):
        engine.submit(text(3), generator=source, **options_with(plan=PLAN))
    assert torch.equal(source.get_state(), state), "a refused request takes no seed"
    engine.step()  # the first enters
    with pytest.raises(QueueFull):
        engine.submit(text(3), generator=source, **options_with(plan=PLAN))
    last.cancel()
    third = engine.submit(text(3), generator=source, **options_with(plan=PLAN))
    assert issubclass(QueueFull, RuntimeError)
    second.cancel()
    engine.submit(text(0), **options_with(plan=PLAN)).cancel()
    engine.run()
    for i, request in ((1, first), (3, third)):
        assert_same(request.result(), model.sample(text(i), **options_with(plan=PLAN)))
    many = engine.sample_many([text(i) for i in range(4)], **options_with(plan=PLAN))  # those wait by themselves
    assert len(many) == 4


@pytest.mark.parametrize(
    "name", ["max_batch", "max_waiting", "max_cache_tokens", "max_prefill_tokens", "max_denoising_tokens"]
)
def test_limits_are_checked(name):
    for value, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(error, match=name):
            build().create_engine(**{name: value})


# the cache


def taken(engine) -> int:
    return sum(row.block.capacity for row in cache_of(engine).rows)


@pytest.mark.parametrize(("scale", "at_once"), [(1.0, 3), (2.0, 1)])
def test_a_request_enters_when_the_cache_has_room_for_it(scale, at_once):
    """64 tokens each here, and twice as many with guidance; of 192."""
    model = build(push=WRITES)
    engine = model.create_engine(max_cache_tokens=192)
    options = options_with(plan=PLAN, cfg_scale=scale)
    requests = [engine.submit(text(i % 4), **options) for i in range(8)]
    most = []
    while not engine.is_idle:
        engine.step()
        most.append(len(engine.scheduler.active))
        assert taken(engine) <= 192
    assert max(most) == at_once
    for i, request in enumerate(requests):
        assert_same(request.result(), model.sample(text(i % 4), **options))
    assert_no_row_is_lost(engine)


def test_order_is_kept_while_a_large_request_waits_for_room():
    model = build(push=WRITES)
    engine = model.create_engine(max_cache_tokens=256)
    options = options_with(plan=PLAN, cfg_scale=1.0)
    small = engine.submit(text(1), **options)
    engine.step()
    large = engine.submit(text(2), **options | dict(max_length=200, plan=["text"]))
    later = engine.submit(text(3), **options)
    engine.step()
    assert (engine.stats.active, engine.stats.waiting) == (1, 2), "the small one behind it does not overtake"
    engine.run()
    assert small.is_done
    assert large.is_done
    assert_same(later.result(), model.sample(text(3), **options))


def test_what_can_never_enter_is_refused():
    model = build(push=WRITES)
    engine = model.create_engine(max_cache_tokens=100)
    engine.submit(text(1), **options_with(cfg_scale=1.0))
    message = r"may come to \d+ tokens of the cache, and max_cache_tokens is 100; ask for a smaller max_length"
    for options in (
        dict(cfg_scale=2.0),
        dict(max_length=65),
        dict(modality_cfg_scale=2.0),
        dict(plan=[(IMAGE, (8, 8))]),
    ):
        with pytest.raises(ValueError, match=f"prompt 0 {message}"):
            engine.submit(text(1), **options_with(**dict(cfg_scale=1.0) | options))
    with pytest.raises(ValueError, match=f"prompt 1 {message}"):
        engine.sample_many([text(1), text(*[1] * 70)], **options_with(cfg_scale=1.0))
    assert engine.stats.waiting == 1
    engine.run()
    assert_no_row_is_lost(engine)


def test_plain_samples_that_can_never_enter_are_refused():
    """And a modality alone needs no room for text."""
    engine = build().create_engine(max_cache_tokens=100)
    with pytest.raises(ValueError, match=r"text 0 may come to 128 tokens of the cache, and max_cache_tokens is 100"):
        engine.write_only(torch.tensor([[1, 2]]), SamplingOptions(max_length=65))
    assert engine.is_idle
    assert engine.write_only(torch.tensor([[1, 2]]), SamplingOptions(max_length=8)).shape == (1, 6)
    [drawn] = engine.draw_only(1, LINE, SamplingOptions(fixed_modality_shape=(2,), modality_steps=1))
    assert drawn.shape == (2, 3)


BOUNDS = {
    "free text": dict(),
    "guided": dict(cfg_scale=2.0),
    "guided twice": dict(cfg_scale=1.0, modality_cfg_scale=2.0, plan=[(LINE, (3,)), ("text", 2), (LINE, (30,))]),
    "negative": dict(cfg_scale=2.0, negative_prompt=text(*[1] * 70), plan=["text", (LINE, (3,)), "text"]),
    "text, then a modality beyond": dict(plan=["text", (LINE, (40,)), "text", (IMAGE, (8, 9))]),
    "little text, then a modality": dict(plan=[("text", 3), (LINE, (40,))]),
    "a modality beyond": dict(plan=[(IMAGE, (9, 9)), "text"]),
    "forced": dict(force_modality_at_start=(LINE, (61,))),
    "a modality at its end": dict(plan=[("text", 50), (VECTOR, ())], max_length=60),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_no_request_outgrows_what_it_was_admitted_with(name):
    """At no time do its branches hold more than was foreseen when it came, and what is foreseen never grows."""
    model = build(push=WRITES)
    engine = model.create_engine(max_cache_tokens=4096)
    options = options_with(**dict(cfg_scale=1.0, init_modality_noise=noise(100)) | BOUNDS[name])
    state = engine.submit(text(1), **options)._request
    bounds, longest = list(state.max_lengths), [0] * len(state.max_lengths)
    while not engine.is_idle:
        engine.step()
        if not state.is_done:
            assert engine.scheduler.runner.cache_tokens(state.max_lengths) <= engine.scheduler.runner.cache_tokens(
                bounds
            )
            lengths = [branch.past.length for branch in state.branches]
            ends = [] if state.denoising is None else [len(state.denoising.x)] * len(lengths)
            for i, length in enumerate(map(sum, zip(lengths, ends or [0] * len(lengths), strict=True))):
                longest[i] = max(longest[i], length)
    assert all(length <= bound for length, bound in zip(longest, bounds, strict=True)), (longest, bounds)
    engine.decode_modalities_of(state)
    whole = len(slots_of(model, sample_of(state)))
    assert whole <= bounds[0] <= max(whole, options["max_length"]) + 2, "no more is asked for than it may need"


# prefill in pieces


def reads_of(monkeypatch, model) -> list:
    """Every prefill from now on: the lengths of its rows, and the sizes of its spans."""
    seen, run = [], model.forward_stream

    def forward(stream, *others, **options):
        if sum(stream.lengths) > len(stream.lengths):
            seen.append((tuple(stream.lengths), tuple(stream.spans.sizes)))
        return run(stream, *others, **options)

    monkeypatch.setattr(model, "forward_stream", forward)
    return seen


@pytest.mark.parametrize("most", [1, 3, 8, 64])
def test_a_long_prompt_is_read_in_pieces_while_others_go_on(monkeypatch, most):
    model = build(push=WRITES)
    long = [text(*[0, 1, 2] * 6), latents(IMAGE, 3, 4), text(*[3, 1] * 5), latents(LINE, 2), text(2)]
    options = options_with(plan=[("text", 2), (LINE, (2,)), ("text", 2)], max_length=200)
    expected = model.sample(long, **options)
    writer = dict(options, plan=[("text", 90)])
    beside = model.sample(text(1), **writer)
    engine = model.create_engine(max_prefill_tokens=most)
    first = engine.submit(text(1), **writer)
    engine.step()
    seen = reads_of(monkeypatch, model)
    second = engine.submit(long, **options)
    steps = 0
    while not second.is_done:
        before = first._request.length
        engine.step()
        steps += 1
        assert first.is_done or first._request.length == before + 1, "the running text stood still"
    reads = [lengths for lengths, _ in seen]
    sizes = [size for _, spans in seen for size in spans if size > 2]
    assert sizes.count(12) >= 1
    assert set(sizes) <= {12}, "no span is read in part"
    assert max(map(sum, reads)) <= max(most, 12)
    if most <= 8:
        assert steps >= 30 // most
    engine.run()
    assert_same(second.result(), expected)
    assert_same(first.result(), beside)
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize(("at_once", "sizes"), [(8192, [30]), (12, [12, 12, 6])])
def test_a_prompt_by_itself_is_read_at_once(monkeypatch, at_once, sizes):
    """If it is not so long that whoever comes or cancels would wait for it; its last id is decoded."""
    monkeypatch.setattr(runner, "READ_AT_ONCE", at_once)
    model = build(push=WRITES)
    engine = model.create_engine(max_prefill_tokens=4)
    request = engine.submit(text(*[1] * 30), **options_with())
    seen = reads_of(monkeypatch, model)
    for _ in sizes:
        assert engine.stats.tokens_written == 0
        engine.step()
    assert [lengths for lengths, _ in seen] == [(size,) for size in sizes]
    assert engine.stats.tokens_written == 1
    engine.run()
    assert_same(request.result(), model.sample(text(*[1] * 30), **options_with()))


def test_several_long_prompts_share_what_is_read_in_a_step(monkeypatch):
    model = build(push=WRITES)
    prompts = [text(*[i, 1] * 12) for i in range(3)]
    options = options_with(plan=[("text", 3)], max_length=90)
    engine = model.create_engine(max_prefill_tokens=10)
    engine.submit(text(3), **options | dict(plan=[("text", 60)]))
    engine.step()
    seen = reads_of(monkeypatch, model)
    requests = [engine.submit(prompt, **options) for prompt in [*prompts, prompts[0]]]
    while not all(request.is_done for request in requests):
        count = len(seen)
        engine.step()
        assert sum(sum(lengths) for lengths, _ in seen[count:]) <= 10
    for request, prompt in zip(requests, [*prompts, prompts[0]], strict=True):
        assert_same(request.result(), model.sample(prompt, **options))


# joint steps


@pytest.mark.parametrize("most", [1, 6, 13, 10_000])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_joint_step_is_split_without_changing_anything(monkeypatch, most, scale):
    model = build(push=WRITES)
    plans = [[(LINE, (3,))], [(IMAGE, (2, 3))], [(VECTOR, ())], [(LINE, (2,)), ("text", 1)]]
    options = options_with(cfg_scale=scale, modality_steps=3)
    expected = [model.sample(text(1), **options | dict(plan=plan)) for plan in plans]
    evaluated, evaluate = [], model.velocities

    def velocities(hidden, stream, x_t, t):
        evaluated.append(stream.spans.sizes)
        return evaluate(hidden, stream, x_t, t)

    monkeypatch.setattr(model, "velocities", velocities)
    engine = model.create_engine(max_denoising_tokens=most)
    requests = [engine.submit(text(1), **options | dict(plan=plan)) for plan in plans]
    engine.run()
    for request, wanted in zip(requests, expected, strict=True):
        assert_same(request.result(), wanted)
    branches = 1 if scale == 1 else 2
    for sizes in evaluated:
        assert sum(sizes) <= most or len(sizes) == branches, "more than one denoising beyond the bound"
    assert max(map(sum, evaluated)) == {1: 6 * branches, 6: 6 * branches, 13: 12, 10_000: 12 * branches}[most]


# log-probabilities


def assert_log_probabilities(model, sample, given: int) -> int:
    """Those of one forward pass over the whole sample, as in training. Returns how many the model chose."""
    pieces = to_pieces(sample)
    stream, values = model.pack_stream([pieces]), model.latents_by_type([pieces])
    with torch.no_grad():
        times = torch.ones(len(stream.spans), dtype=torch.float64)
        logits = model.logits(model.forward_stream(stream, values, times).hidden)
    expected, slots, chosen, slot = logits.log_softmax(-1), slots_of(model, sample), 0, 0
    assert len(sample.log_probabilities) == len(sample)
    for part, own in zip(sample, sample.log_probabilities, strict=True):
        if isinstance(part, tuple):
            assert own is None
            slot += len(slots_of(model, [part]))
            continue
        assert own.shape == part.shape
        for token, log_p in zip(part.tolist(), own.tolist(), strict=True):
            is_marker = token in model.eom_ids
            if slot < given or is_marker:
                assert log_p != log_p, f"slot {slot} of {slots}: nobody chose it"
            elif log_p == log_p:
                assert log_p == pytest.approx(expected[slot - 1, token].item(), abs=1e-6)
                chosen += 1
            slot += 1
    return chosen


@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(text_temperature=0.0),
        dict(text_temperature=2.0, text_top_k=3, text_repetition_penalty=1.5),
        dict(text_temperature=0.5, text_min_p=0.3, text_top_p=0.8, logits_processors=[lambda ids, logits: 3 * logits]),
    ],
    ids=["greedy", "cut", "processed"],
)
def test_log_probabilities_are_those_of_the_model_itself(options, cache_kv):
    """Before temperature, cuts and processors, and over all ids."""
    model, chosen = build(seed=3), 0
    prompts = [None, text(1, 2), [text(0), latents(LINE, 2), text(3)]]
    asked = options_with(log_probabilities=True, modality_steps=1) | options
    samples = model.sample_many(prompts, cache_kv=cache_kv, generator=generators(1, 2, 3), **asked)
    for sample, given in zip(samples, (1, 3, 9), strict=True):
        chosen += assert_log_probabilities(model, sample, given)
        total = sum(int((~own.isnan()).sum()) for own in sample.log_probabilities if own is not None)
        written = [slot for slot in slots_of(model, sample)[given:] if slot >= 0 and slot not in model.eom_ids]
        assert total == len(written), "every id that the model wrote has one"
    assert chosen > 20
    without = model.sample_many(prompts, generator=generators(1, 2, 3), **asked | dict(log_probabilities=False))
    for sample, other in zip(samples, without, strict=True):
        assert_same(sample, other)
        assert other.log_probabilities is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ids_and_log_probabilities_come_in_one_copy(monkeypatch, dtype):
    engine, copies, to_list = build(push=WRITES, dtype=dtype).create_engine(), [], torch.Tensor.tolist
    for i in range(3):
        engine.submit(text(i), **options_with(log_probabilities=True))
    for _ in range(2):
        engine.step()

    def copied(tensor):
        copies.append(tensor.untyped_storage().data_ptr())
        return tensor

    def listed(tensor):
        assert tensor.untyped_storage().data_ptr() in copies, "read from the device"
        return to_list(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", copied)
        patch.setattr(torch.Tensor, "tolist", listed)
        engine.step()
    assert len(copies) == 1


def test_events_tell_log_probabilities():
    model = build(push=WRITES)
    asked = options_with(plan=PLAN, log_probabilities=True)
    *events, ended = model.sample_stream(text(1), **asked)
    told = [event.log_probability for event in events if hasattr(event, "log_probability")]
    kept = [own for own in ended.sample.log_probabilities if own is not None]
    assert len(told) == 7
    assert told == pytest.approx([log_p for own in kept for log_p in own.tolist() if log_p == log_p], abs=1e-6)
    plain = [event for event in model.sample_stream(text(1), **options_with(plan=PLAN)) if hasattr(event, "id")]
    assert {event.log_probability for event in plain} == {None}
    assert drawn(ended.sample)


def test_log_probabilities_beside_a_request_that_wants_none():
    model = build(push=WRITES)
    engine = model.create_engine()
    one, other = (engine.submit(text(i), **options_with(plan=PLAN, log_probabilities=i == 1)) for i in (1, 2))
    engine.run()
    assert assert_log_probabilities(model, one.result(), 2) == 7
    assert other.result().log_probabilities is None
