"""The engine: requests come and go, none notices another, and nothing of them stays."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from generation_models import (
    IMAGE,
    LINE,
    VECTOR,
    VIDEO,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    cache_of,
    drawn,
    fail,
    generators,
    latents,
    noise,
    num_given,
    options_over,
    script,
    shapes_of,
    slots_of,
    text,
    turns_of,
)
from torch import nn

from transfusion_pytorch.display.progress import SampleProgress
from transfusion_pytorch.generation import runner
from transfusion_pytorch.generation.engine import EngineStats
from transfusion_pytorch.generation.events import DrawingProgress, Ended, EndReason, ModalityDone, TextToken
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.scheduler import Scheduler
from transfusion_pytorch.network.cache import KVCache
from transfusion_pytorch.network.cache_views import CacheView, DecodeView
from transfusion_pytorch.sequence.samples import Text
from transfusion_pytorch.sequence.stream import Past, pack

PROMPTS = [
    None,
    text(1, 2),
    torch.tensor(3),
    latents(VECTOR),
    latents(IMAGE, 2, 2),
    [text(0), latents(LINE, 3), text(1)],
    [latents(VIDEO, 1, 2, 1), latents(VECTOR), text(2)],
]
SEEDED = dict(modality_steps=2, max_modality_tokens=4, max_length=30, cfg_scale=2.0)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
HUGE = 1e300 * torch.ones(8, 3, dtype=torch.float64)  # noise whose square is infinite: latents become NaN


options_with = options_over(max_length=24)


def alone(model, prompt, **options):
    return model.create_engine().sample_many([prompt], **options)[0]


# continuous batching


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("cache_kv", "sizes"), [(True, (1, 2, 3, 100)), (False, (2,))])
def test_samples_are_the_same_in_batches_of_any_size(cache_kv, sizes, dtype):
    model, seeds = build(seed=4, dtype=dtype), range(len(PROMPTS))
    one_by_one = [
        model.sample(prompt, generator=generators(seed), **SEEDED) for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert len({len(slots_of(model, sample)) for sample in one_by_one}) > 2
    assert {part[0] for sample in one_by_one for part in drawn(sample)} == {VECTOR, LINE, IMAGE, VIDEO}
    for most in sizes:
        samples = model.sample_many(PROMPTS, max_batch=most, cache_kv=cache_kv, generator=generators(*seeds), **SEEDED)
        for sample, single in zip(samples, one_by_one, strict=True):
            assert_same(sample, single, TOLERANCES[dtype])


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_no_more_than_max_batch_are_worked_on(monkeypatch, most):
    at_work, decode = [], Scheduler._decode
    monkeypatch.setattr(Scheduler, "_decode", lambda self: at_work.append(len(self.active)) or decode(self))
    build(seed=4).sample_many(PROMPTS, max_batch=most, **options_with(max_length=24))
    assert max(at_work) == min(most, len(PROMPTS))


@pytest.mark.parametrize("most", [1, 2, 3, 20])
def test_nothing_waits_for_the_slowest(most):
    """One turn a token: a long text and many short ones take as long as a queue before `most` counters."""
    engine = build(push=WRITES).create_engine(max_batch=most)
    lengths = [12, 2, 1, 3, 1, 5, 2, 4, 1, 1]
    requests = [engine.submit(text(i % 4), **options_with(plan=[("text", n)])) for i, n in enumerate(lengths)]
    while engine.scheduler.waiting:
        engine.step()
        ended = sum(request.is_done for request in requests)
        assert len(requests) - ended - len(engine.scheduler.waiting) <= most
        assert len(engine.scheduler.active) + min(len(engine.scheduler.waiting), most) >= min(
            most, len(requests) - ended
        )
    engine.run()
    assert engine.stats.steps == turns_of(lengths, most)
    assert [len(request.result()[0]) for request in requests] == [3 + n for n in lengths]  # sos, the prompt, eos


def test_drawings_leave_and_enter_like_texts():
    """One turn a step: a modality and the text behind it take as many turns as they have steps and tokens."""
    model, lengths = build(push=WRITES), []
    engine = model.create_engine(max_batch=2)
    for steps, words in ((5, 1), (1, 1), (2, 3), (1, 6), (3, 1)):
        plan = [(LINE, (2,)), ("text", words)]
        engine.submit(text(1), **options_with(plan=plan, modality_steps=steps))
        lengths.append(steps + words)
    engine.run()
    assert engine.stats.steps == turns_of(lengths, 2)
    assert engine.stats.drawings == len(lengths)
    assert engine.stats.tokens_written == 12


def test_a_request_enters_in_the_turn_after_one_has_left():
    engine = build(push=WRITES).create_engine(max_batch=1)
    first, second = (engine.submit(text(i), **options_with(plan=[("text", 2)])) for i in (1, 2))
    told = []
    for _ in range(4):
        engine.step()
        told.append([sum(isinstance(event, TextToken) for event in it.new_events()) for it in (first, second)])
    assert told == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert engine.is_idle


def test_rows_that_write_and_rows_that_draw_go_on_in_the_same_turn():
    engine = build(push=WRITES).create_engine()
    writer = engine.submit(text(1), **options_with(plan=[("text", 4)]))
    painter = engine.submit(text(2), **options_with(plan=[(LINE, (2,))], modality_steps=4))
    for step in range(1, 5):
        engine.step()
        assert [type(event) for event in writer.new_events()][:1] == [TextToken]
        assert [it.step for it in painter.new_events() if isinstance(it, DrawingProgress)] == [step]
    assert writer.is_done
    assert painter.is_done


REQUESTS = [
    (text(1), dict(cfg_scale=2.0)),
    (None, dict(text_temperature=1.0, generator=generators(3), max_length=25)),
    ([text(0), latents(LINE, 3)], dict(cfg_scale=3.0, cfg_interval=(0.2, 0.8), modality_steps=3)),
    (latents(IMAGE, 1, 2), dict(odeint_kwargs=dict(method="rk4"), time_shift=3.0, modality_cfg_scale=1.5)),
    (text(2, 2), dict(plan=[(IMAGE, (2, 1)), ("text", 3)], cfg_rescale=0.5, text_repetition_penalty=1.3)),
    (text(3), dict(odeint_kwargs=dict(method="dopri5", atol=1.0, rtol=1.0), force_modality_at_start=(LINE, (2,)))),
    (text(3), dict(logits_processors=[script(2, 2, 2, given=2)], stop_ids=[1], allowed_modalities=[VECTOR])),
]


def fresh_options(options):
    """With a source of random numbers that nobody has used."""
    return options_with(**options | (dict(generator=generators(3)) if "generator" in options else {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("most", [2, 10])
def test_requests_that_come_while_others_run_become_what_they_are_alone(most, dtype):
    model = build(seed=3, dtype=dtype)
    engine, requests = model.create_engine(max_batch=most), []
    for i, (prompt, options) in enumerate(REQUESTS):
        requests.append(engine.submit(prompt, **fresh_options(options)))
        for _ in range(i + 1):
            engine.step()
    assert not engine.is_idle
    engine.run()
    for request, (prompt, options) in zip(requests, REQUESTS, strict=True):
        assert_same(request.result(), alone(model, prompt, **fresh_options(options)), TOLERANCES[dtype])
    assert_no_row_is_lost(engine)


def test_a_submitted_prompt_takes_its_generator_as_sample_does():
    model = build(seed=3)
    engine = model.create_engine()
    request = engine.submit(text(1), generator=generators(7)[0], **SEEDED)
    engine.run()
    assert_same(request.result(), model.sample(text(1), generator=generators(7)[0], **SEEDED), tolerance=0)


def test_samples_asked_for_while_others_run_are_those_of_a_quiet_engine():
    model = build(seed=3)
    engine = model.create_engine(max_batch=2)
    request = engine.submit(text(1, 2), **options_with(cfg_scale=2.0))
    engine.step()
    samples = engine.sample_many(PROMPTS[3:], **options_with(max_length=30))
    for sample, prompt in zip(samples, PROMPTS[3:], strict=True):
        assert_same(sample, alone(model, prompt, **options_with(max_length=30)))
    engine.run()
    assert_same(request.result(), alone(model, text(1, 2), **options_with(cfg_scale=2.0)))


def test_what_is_drawn_or_written_alone_does_not_mind_requests_beside_it():
    model, ids = build(seed=3), torch.tensor([[1, 2], [0, 3]])
    engine = model.create_engine()
    request = engine.submit(text(1), **options_with(force_modality_at_start=(LINE, (2,)), modality_steps=6))
    engine.step()
    drawing = SamplingOptions(fixed_modality_shape=(3,), modality_steps=2, init_modality_noise=noise())
    writing = SamplingOptions(max_length=9, text_temperature=0.0)
    expected = model.create_engine().draw_only(2, LINE, drawing), model.create_engine().write_only(ids, writing)
    for made, wanted in zip(engine.draw_only(2, LINE, drawing), expected[0], strict=True):
        torch.testing.assert_close(made, wanted, atol=1e-9, rtol=0)
    assert torch.equal(engine.write_only(ids, writing), expected[1])
    engine.run()
    options = options_with(force_modality_at_start=(LINE, (2,)), modality_steps=6)
    assert_same(request.result(), alone(model, text(1), **options))


def test_two_engines_do_not_disturb_each_other():
    models = build(seed=3), build(seed=5)
    engines = [models[0].create_engine(), models[0].create_engine(max_batch=1), models[1].create_engine()]
    served = (models[0], models[0], models[1])
    requests = [engine.submit(prompt, **options_with()) for engine in engines for prompt in (text(1), latents(LINE, 2))]
    while not all(engine.is_idle for engine in engines):
        for engine in engines:
            engine.step()
    for i, request in enumerate(requests):
        prompt = (text(1), latents(LINE, 2))[i % 2]
        assert_same(request.result(), alone(served[i // 2], prompt, **options_with()))


@pytest.mark.parametrize("guided", [1.0, 2.0])
def test_a_used_engine_gives_what_a_new_one_gives(guided):
    """Also where a request has left NaN in the rows that the next one takes, in a block that others keep alive."""
    model, options = build(seed=3, push=dict(eos=-9.0)), options_with(max_length=28, cfg_scale=guided)
    engine, words = model.create_engine(max_batch=4), options_with(plan=[("text", 55)], max_length=60)
    for prompt in PROMPTS[1::2]:
        beside = [engine.submit(text(i), **words) for i in range(2)]
        spoilt = engine.submit(
            text(1), **options | dict(init_modality_noise=HUGE, force_modality_at_start=(LINE, (2,)))
        )
        while not spoilt.is_done:
            engine.step()
        assert spoilt.reason is EndReason.ERROR
        assert cache_of(engine).blocks[64].keys[1].isnan().any(), "there has to be something to clear"
        [sample] = engine.sample_many([prompt], **options)
        assert_same(sample, alone(model, prompt, **options))
        engine.run()
        for i in range(2):
            assert_same(beside[i].result(), alone(model, text(i), **words))
    assert_no_row_is_lost(engine)


def test_a_row_of_nan_ends_alone():
    model, options = build(seed=3), options_with(max_length=28)
    engine = model.create_engine()
    forced = dict(force_modality_at_start=(LINE, (2,)))
    prompts = [text(1), text(2), text(3)]
    requests = [
        engine.submit(prompt, **options | forced | (dict(init_modality_noise=HUGE) if i == 1 else {}))
        for i, prompt in enumerate(prompts)
    ]
    engine.run()
    with pytest.raises(ValueError, match="prompt 0: the latents of modality 1 are not finite"):
        requests[1].result()
    for i in (0, 2):
        assert_same(requests[i].result(), alone(model, prompts[i], **options | forced))


# errors


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("hello", {}, TypeError),
        (text(99), {}, ValueError),
        (text(1), dict(max_length=0), ValueError),
        (text(1), dict(plan=[(LINE, (60, 1))]), ValueError),
        (text(1), dict(force_modality_at_start=(IMAGE, (2,))), ValueError),
        (text(1), dict(stop_ids=[4]), ValueError),
        (text(1), dict(cfg_interval=(0.5, 0.2)), ValueError),
        (text(1), dict(no_such_option=1), TypeError),
    ],
)
def test_a_bad_request_is_refused_and_harms_no_other(prompt, options, error):
    model = build(push=WRITES)
    engine = model.create_engine()
    request = engine.submit(text(1), **options_with(max_length=12))
    engine.step()
    with pytest.raises(error):
        engine.submit(prompt, **options_with(**options))
    with pytest.raises(error):
        engine.sample_many([text(2), prompt], **options_with(**options))
    assert len(engine.scheduler.active) == 1
    assert not engine.scheduler.waiting
    engine.run()
    assert_same(request.result(), alone(model, text(1), **options_with(max_length=12)))
    assert model.training is False


@pytest.mark.parametrize("length", [3, 4, 8])
def test_a_prompt_longer_than_max_length_comes_back_with_a_warning(length):
    engine = build().create_engine()
    prompt = [text(1), latents(LINE, 2), text(2)]
    needed = num_given(engine.model, prompt)
    with pytest.warns(UserWarning, match=f"prompt 0 has {needed} tokens with its markers, more than max_length"):
        request = engine.submit(prompt, max_length=length)
    assert engine.is_idle
    assert request.reason is EndReason.LENGTH
    assert len(slots_of(engine.model, request.result())) == needed


def test_one_warning_for_all_long_prompts_and_the_others_go_on():
    model = build()
    prompts = [text(1), text(*[2] * 30), None, text(*[3] * 30)]
    with pytest.warns(UserWarning, match="prompt 1 has 31 tokens.*max_length=24, and 1 more like it") as warned:
        samples = model.sample_many(prompts, **options_with())
    assert len(warned) == 1
    for i in (0, 2):
        assert_same(samples[i], model.sample(prompts[i], **options_with()))
    assert shapes_of(samples[3]) == [[model.sos_id, *[3] * 30]]


def parser(written: str) -> tuple[int, ...]:
    return tuple(int(size) // (int(size) - 3) for size in written.split(","))  # "3" divides by nothing


class Fragile(nn.Module):
    """A decoder that cannot take two latents at once, or anything at all for the `after`-th time."""

    def __init__(self, after: int = 99):
        super().__init__()
        self.calls, self.after = 0, after

    def forward(self, x):
        self.calls += 1
        if x.shape[1] == 2 or self.calls > self.after:
            raise RuntimeError("this is too much")
        return x


def faulty(name):
    """A model, and the options of a request that fails in it."""
    if name == "processor":
        return (
            build(seed=3),
            dict(logits_processors=[fail(ZeroDivisionError("mine"), at=6)]),
            (ZeroDivisionError, "mine"),
        )
    if name == "processor of another shape":
        return build(seed=3), dict(logits_processors=[lambda ids, x: x[1:]]), (ValueError, "must return logits")
    if name == "shape":
        model = build(seed=1, to_modality_shape_fn=parser)
        ids = [model.meta_id, *model.char_tokenizer("3").tolist(), model.som_ids[LINE]]
        return model, dict(logits_processors=[script(*ids, given=2)]), (ZeroDivisionError, "zero")
    model = build(seed=3, modality_decoder=(None, Fragile(), None, None))
    return model, dict(force_modality_at_start=(LINE, (2,))), (ValueError, "this is too much")


@pytest.mark.parametrize("name", ["processor", "processor of another shape", "shape", "decoder"])
def test_what_the_user_gave_ends_its_own_request_alone(name):
    model, options, (error, message) = faulty(name)
    engine = model.create_engine()
    prompts = [text(1), text(1), text(2)]
    requests = [
        engine.submit(prompt, **options_with(**(options if i == 1 else {}))) for i, prompt in enumerate(prompts)
    ]
    engine.run()
    with pytest.raises(error, match=message):
        requests[1].result()
    for i in (0, 2):
        requests[i].result()  # modalities are decoded as they are asked for
    assert [request.reason is EndReason.ERROR for request in requests] == [False, True, False]
    for i in (0, 2):
        assert_same(requests[i].result(), alone(model, prompts[i], **options_with()))
    *_, ended = requests[1].new_events()
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, error)
    assert ended.sample[0][:2].tolist() == [model.sos_id, 1], "what there was of it"
    with pytest.raises(error, match=message):
        engine.sample_many(prompts, **options_with(**options))
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize(("listen", "after"), [(True, 0), (True, 1), (False, 0), (False, 1)])
def test_a_decoder_that_fails_ends_its_request_with_an_event(listen, after):
    """Whenever it fails: on the first modality or the second, as they are finished or when the sample is delivered."""
    engine = build(modality_decoder=(None, Fragile(after), None, None)).create_engine()
    request = engine.submit(text(1), listen=listen, **options_with(plan=[(LINE, (1,)), (LINE, (3,))]))
    if listen:
        while not request.is_done:
            engine.step()
            *_, ended = request.new_events() or [None]
    else:
        engine.run()
        *_, ended = request.new_events()
    assert isinstance(ended, Ended)
    assert ended.reason is request.reason is EndReason.ERROR
    assert isinstance(ended.error, ValueError)
    with pytest.raises(ValueError, match="this is too much"):
        request.result()
    assert request.new_events() == []
    assert_no_row_is_lost(engine)


def test_what_has_not_ended_has_no_result():
    engine = build(push=WRITES).create_engine()
    request = engine.submit(text(1), **options_with())
    with pytest.raises(RuntimeError, match=r"not done yet: call step\(\) of its engine"):
        request.result()


INTERRUPTIONS = ["in a processor", "while reading", "while drawing"]


def interrupted(monkeypatch, model, engine, place, error):
    """`sample_many`, which `error` comes out of."""
    options = options_with(force_modality_at_start=(LINE, (3,)), modality_steps=3)
    run = model.forward_stream
    if place == "in a processor":
        options["logits_processors"] = [fail(error, at=9)]
    else:
        countdown = iter([1, 0] if place == "while reading" else [1, 1, 1, 0])

        def stumble(*args, **given):
            if not next(countdown, 0):  # and again, when it is tried for each of them
                raise error
            return run(*args, **given)

        monkeypatch.setattr(model, "forward_stream", stumble)
    with pytest.raises(type(error)):
        engine.sample_many([text(2), text(3), text(0)], **options)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("place", "error"),
    [
        *((place, KeyboardInterrupt()) for place in INTERRUPTIONS),
        *((place, MemoryError()) for place in INTERRUPTIONS[1:]),
    ],
)
def test_an_interrupted_call_leaves_the_engine_as_it_was(monkeypatch, place, error):
    model = build(seed=3)
    engine = model.create_engine(max_batch=2)
    interrupted(monkeypatch, model, engine, place, error)
    assert_no_row_is_lost(engine)
    for sample, prompt in zip(engine.sample_many(PROMPTS[:3], **options_with()), PROMPTS[:3], strict=True):
        assert_same(sample, alone(model, prompt, **options_with()))


@pytest.mark.parametrize("place", INTERRUPTIONS)
def test_requests_beside_an_interrupted_call_go_on(monkeypatch, place):
    model, prompts = build(seed=3), [text(1, 2), latents(LINE, 2), None]
    engine = model.create_engine()
    requests = [engine.submit(prompt, **options_with()) for prompt in prompts]
    engine.step()
    interrupted(monkeypatch, model, engine, place, KeyboardInterrupt())
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert_same(request.result(), alone(model, prompt, **options_with()))
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize("listen", [True, False])
def test_a_modality_is_decoded_once(listen):
    """For its event, for the last event, and for the result, however often they are asked for."""
    decoder = Fragile(after=2)
    engine = build(modality_decoder=(None, decoder, None, None)).create_engine()
    request = engine.submit(text(1), listen=listen, **options_with(plan=[(LINE, (1,)), (LINE, (3,))]))
    events = []
    while not request.is_done:
        engine.step()
        events += request.new_events() if listen else []
    samples = [request.result(), request.result(), [*events, *request.new_events()][-1].sample]
    assert decoder.calls == 2
    assert_same(samples[0], samples[1], tolerance=0)
    assert_same(samples[0], samples[2], tolerance=0)


class Batches(nn.Module):
    """A decoder that notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return -x


@pytest.mark.parametrize("way", ["sample_many", "results", "events"])
def test_modalities_of_many_requests_are_decoded_together(way):
    decoder = Batches()
    model, count = build(modality_decoder=(None, decoder, None, None)), 8
    engine, options = model.create_engine(), options_with(plan=[(LINE, (2,))])
    if way == "sample_many":
        samples = engine.sample_many([text(i % 4) for i in range(count)], **options)
    else:
        requests = [engine.submit(text(i % 4), listen=way == "events", **options) for i in range(count)]
        engine.run()
        samples = [it.new_events()[-1].sample if way == "events" else it.result() for it in requests]
    assert decoder.shapes == [(count, 2, 3)]
    for i, sample in enumerate(samples):
        raw = model.sample(text(i % 4), **options | dict(return_unprocessed_modalities=True))
        torch.testing.assert_close(drawn(sample)[0][1], -drawn(raw)[0][1], atol=1e-9, rtol=0)


class Startled(nn.Module):
    """A decoder during whose first call somebody presses Ctrl-C."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt
        return x


def test_a_modality_that_was_interrupted_as_it_was_shown_is_finished_later():
    plan = dict(plan=[(LINE, (1,)), ("text", 2)], modality_cfg_scale=2.0)
    startled, plain = (build(modality_decoder=(None, it, None, None)) for it in (Startled(), None))
    engine, prompt = startled.create_engine(), latents(VECTOR)
    request = engine.submit(prompt, **options_with(**plan))
    engine.run()
    with pytest.raises(KeyboardInterrupt):
        request.result()
    assert_same(request.result(), alone(plain, prompt, **options_with(**plan)))
    assert_no_row_is_lost(engine)


def test_a_step_that_was_interrupted_may_be_tried_again(monkeypatch):
    model = build(seed=3)
    engine, run = model.create_engine(), model.forward_stream
    request, turn = engine.submit(text(1), **options_with(cfg_scale=2.0)), iter(range(10_000))

    def stumble(*args, **given):
        if next(turn) % 3 == 1:
            raise KeyboardInterrupt
        return run(*args, **given)

    monkeypatch.setattr(model, "forward_stream", stumble)
    failures = 0
    while not request.is_done:
        try:
            engine.step()
        except KeyboardInterrupt:
            failures += 1
    monkeypatch.undo()
    assert failures > 3
    assert_same(request.result(), alone(model, text(1), **options_with(cfg_scale=2.0)))


def test_a_forward_that_fails_for_many_is_tried_for_each(monkeypatch):
    """As where the memory does not suffice; only a prompt that is too much by itself ends for that."""
    model, options = build(seed=3), options_with(cfg_scale=1.0)
    prompts = [text(1), [text(2), latents(LINE, 2)], text(3, 3, 3, 3, 3, 3, 3), None]
    expected = [alone(model, prompt, **options) for prompt in prompts]
    engine, run = model.create_engine(), model.forward_stream

    def too_much(stream, *args, **given):
        if len(stream.lengths) > 1 or (stream.token[:7] == 3).sum() > 5:
            raise MemoryError("too much")
        return run(stream, *args, **given)

    monkeypatch.setattr(model, "forward_stream", too_much)
    requests = [engine.submit(prompt, **options) for prompt in prompts]
    engine.run()
    for request, sample in zip(requests[:2] + requests[3:], expected[:2] + expected[3:], strict=True):
        assert_same(request.result(), sample)
    assert requests[2].reason is EndReason.ERROR
    with pytest.raises(MemoryError, match="too much"):
        requests[2].result()
    assert_no_row_is_lost(engine)


WISHES = {"nines": "9", "ones and commas": "1,", "all but nines": "0123456,", "commas": ","}


@pytest.mark.parametrize(
    ("name", "num_dims"), [*((name, (None,) * 4) for name in WISHES), ("ones and commas", (0, 1, 2, 3))]
)
def test_a_model_that_writes_garbage_for_shapes_stays_small_and_ends(name, num_dims):
    """It would write 99999,99999: nothing hangs, little is allocated, and the others end as they do alone."""
    model = build(seed=3, modality_num_dim=num_dims)
    wished = model.char_tokenizer(WISHES[name])
    garbage = dict(logits_processors=[lambda ids, logits: logits.index_fill(0, wished, 9.0) + 0.1 * logits])
    opened = script(model.meta_id, given=2)
    garbage["logits_processors"].insert(0, opened)
    limits = dict(max_length=70, max_modality_tokens=4096, modality_steps=1)
    engine = model.create_engine()
    wild = [engine.submit(text(i), **options_with(**limits, **garbage)) for i in range(3)]
    tame = engine.submit(text(1), **options_with())
    reserved = []
    for _ in range(100):
        engine.step()
        reserved.append(cache_of(engine).reserved_tokens)
    assert engine.is_idle
    assert all(request.reason in (EndReason.EOS, EndReason.LENGTH) for request in wild)
    assert all(len(slots_of(model, request.result())) <= 70 for request in wild)
    assert_same(tame.result(), alone(model, text(1), **options_with()))
    assert max(reserved) <= 8 * (64 + 128)  # rows for 4, which may be guided, of 70 tokens, and those they grew out of


# the cache, and what is read


def tokens_reserved(engine) -> list[int]:
    """What the cache has memory for, as often as that changes."""
    seen = [0]
    while not engine.is_idle:
        engine.step()
        reserved = cache_of(engine).reserved_tokens
        seen += [reserved] if reserved != seen[-1] else []
    return seen[1:]


@pytest.mark.parametrize(
    ("most", "reserved"), [(20, [64]), (64, [64]), (67, [64, 128]), (135, [64, 128, 256]), (257, [64, 128, 256])]
)
def test_a_row_moves_to_the_next_block_when_it_outgrows_its_own(most, reserved):
    model = build(push=WRITES)
    engine = model.create_engine()
    request = engine.submit(text(1), **options_with(max_length=most))
    assert tokens_reserved(engine) == [*reserved, 0]
    assert_same(request.result(), model.sample(text(1), cache_kv=False, **options_with(max_length=most)))


def test_a_long_request_does_not_inflate_the_short_ones():
    engine = build(push=WRITES).create_engine()
    long = engine.submit(text(*[1] * 1000), **options_with(max_length=1050))
    for i in range(32):
        engine.submit(text(i % 4), **options_with(max_length=40 + i % 3))
    reserved = tokens_reserved(engine)
    assert max(reserved) == 32 * 64 + 2048
    assert reserved[-2] == 2048
    assert len(slots_of(engine.model, long.result())) == 1050


@pytest.mark.parametrize(("most", "scale", "rows"), [(1, 1.0, 1), (3, 1.0, 4), (8, 1.0, 8), (1, 2.0, 2), (3, 2.0, 8)])
def test_rows_double_as_far_as_max_batch(most, scale, rows):
    engine = build(push=dict(eos=-9.0)).create_engine(max_batch=most)
    plan = [(LINE, (1,)), ("text", 1)]
    for i in range(9):
        options = options_with(plan=plan, cfg_scale=scale, modality_steps=2)
        engine.submit([text(i % 4), latents(VECTOR, seed=i)], **options)
    assert max(tokens_reserved(engine)) == 64 * rows
    assert_no_row_is_lost(engine)


def test_memory_follows_the_requests_at_work():
    """Rows come and go at every step, and what is reserved stays within four times what is needed."""
    engine = build(push=WRITES).create_engine(max_batch=8)
    for i in range(40):
        engine.submit(text(i % 4), **options_with(plan=[("text", 1 + 7 * i % 23)], max_length=60))
    while not engine.is_idle:
        engine.step()
        stats, rows = engine.stats, len(cache_of(engine).rows)
        assert rows == stats.active
        assert stats.cache_bytes <= 4 * 64 * rows * stats.bytes_per_token
        assert stats.used_bytes == sum(row.length for row in cache_of(engine).rows) * stats.bytes_per_token
    assert engine.stats.cache_bytes == engine.stats.used_bytes == 0


def test_stats_say_what_the_tensors_take():
    model = build(transformer=dict(kv_heads=1, depth=3))
    engine, most = model.create_engine(), 0
    requests = [engine.submit(prompt, **options_with()) for prompt in PROMPTS]
    while not engine.is_idle:
        engine.step()
        blocks, stats = cache_of(engine).blocks.values(), engine.stats
        taken = [tensor.numel() * tensor.element_size() for block in blocks for tensor in block.tensors()]
        assert stats.cache_bytes == sum(taken)
        most = max(most, stats.cache_bytes)
        assert stats.bytes_per_token == 3 * 2 * 1 * 4 * 8  # layers, keys and values, heads, channels, bytes
        assert stats.active + stats.waiting == sum(not request.is_done for request in requests)
    assert most >= 64 * len(PROMPTS) * stats.bytes_per_token
    without = model.create_engine(cache_kv=False)
    assert without.stats == EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    without.sample_many([None], **options_with())
    assert without.stats.cache_bytes == without.stats.bytes_per_token == 0
    assert without.stats.tokens_read > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copied_event_is_the_event_without_its_model(copied):
    request = build().create_engine().submit(text(1), **options_with(plan=[(LINE, (2,))], modality_steps=2))
    events = [*request.events()]
    progress = next(event for event in events if isinstance(event, DrawingProgress))
    copies = [copied(event) for event in events]
    assert copies == events
    progress.preview()
    with pytest.raises(RuntimeError, match=r"take the preview\(\) before"):
        copies[events.index(progress)].preview()


def test_memory_of_text_goes_while_others_are_drawn():
    """With the block of the cancelled row, whose state no step of text replaces."""
    engine = build(push=WRITES).create_engine()
    long = engine.submit(text(*[1] * 500), **options_with(max_length=900, plan=["text"]))
    engine.submit(text(1), **options_with(plan=[(LINE, (2,))], modality_steps=90))
    for _ in range(3):
        engine.step()
    keys = [weakref.ref(tensor) for tensor in cache_of(engine).blocks[512].keys]
    long.cancel()
    engine.step()
    gc.collect()
    assert [ref() for ref in keys] == [None] * len(keys)


def test_stats_count_steps_tokens_and_drawings():
    engine = build(push=WRITES).create_engine()
    plan = [("text", 3), (LINE, (2,)), (VECTOR, ()), ("text", 2)]
    for count in (1, 2):
        engine.sample_many([text(1)], **options_with(plan=plan, cfg_scale=1.0, modality_steps=3))
        assert engine.stats.steps == count * (3 + 3 + 3 + 2)
        assert engine.stats.tokens_written == count * 5
        assert engine.stats.drawings == count * 2
        assert engine.stats.evaluations == count * 2 * 3 * 2  # drawings, steps, midpoint
        # sos 1, three words, meta 2 som x x eom, meta som x eom, and all but the last word and eos
        assert engine.stats.tokens_read == count * (2 + 3 + 6 + 4 + 1)


def unshared(monkeypatch):
    monkeypatch.setattr(runner, "fingerprint", lambda pieces: object())


LONG = [text(0, 1, 2, 3), latents(LINE, 3), text(1)]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_samples_of_one_prompt_read_it_once(monkeypatch, most):
    """Also those that enter later, as long as one is there that begins with it."""
    model = build(push=WRITES)
    given, lengths = num_given(model, LONG), [9, 2, 2, 3, 4]
    engine = model.create_engine(max_batch=most)
    requests = [
        engine.submit(LONG, generator=generators(i), **options_with(plan=[("text", n)], text_temperature=1.0))
        for i, n in enumerate(lengths)
    ]
    engine.run()
    apart = sum(given + n - 1 for n in lengths)
    assert engine.stats.tokens_read == apart - (len(lengths) - 1) * (given - 1) * (most > 1)
    shared = [request.result() for request in requests]
    assert len({tuple(map(str, shapes_of(sample))) for sample in shared}) > 2

    unshared(monkeypatch)
    engine = model.create_engine(max_batch=most)
    for i, n in enumerate(lengths):
        options = options_with(plan=[("text", n)], text_temperature=1.0)
        [sample] = engine.sample_many([LONG], generator=generators(i), **options)
        assert_same(shared[i], sample, tolerance=0)
    assert engine.stats.tokens_read == apart


def test_a_prompt_is_not_read_again_while_any_sample_begins_with_it():
    """The first to read it may have left."""
    engine = build(push=WRITES).create_engine(max_batch=2)
    lengths = [2, 5, 5, 5]  # each but the first enters while another is there
    for n in lengths:
        engine.submit(LONG, **options_with(plan=[("text", n)]))
    engine.run()
    assert engine.stats.tokens_read == num_given(engine.model, LONG) - 1 + sum(lengths)


def test_sharing_changes_nothing(monkeypatch):
    model = build(seed=3)
    prompts = [LONG, LONG, text(1), LONG, text(1), text(1, 2), text(1)]
    options = SEEDED | dict(max_length=36, modality_cfg_scale=1.5, force_modality_at_start=(IMAGE, (1, 2)))

    def read(**engine):
        engine = model.create_engine(**engine)
        return engine.sample_many(prompts, generator=generators(*range(len(prompts))), **options), engine.stats

    shared = [read(), read(max_batch=2), read(max_batch=3)]
    unshared(monkeypatch)
    plain, stats = read()
    for samples, fewer in shared:
        assert fewer.tokens_read < stats.tokens_read
        for sample, expected in zip(samples, plain, strict=True):
            assert_same(sample, expected)
    assert len({str(drawn(plain[i])) for i in (2, 4, 6)}) == 3, "samples of one prompt are not one sample"


def test_histories_without_text_are_read_once_for_all_that_have_as_much_of_it():
    model = build()
    prompts, plan = [text(0, 1), text(1, 2), text(2, 3)], [(LINE, (2,))]
    read = {}
    for scale in (1.0, 2.0):
        engine = model.create_engine()
        engine.sample_many(prompts, **options_with(plan=plan, cfg_scale=scale))
        read[scale] = engine.stats.tokens_read
    assert read == {1.0: 3 * 6, 2.0: 3 * 6 + 6}  # [sos 0 1 meta 2 som], and once [sos null null meta 2 som]


def test_histories_without_modalities_are_read_once_too():
    model = build()
    prompts = [[latents(LINE, 2, seed=seed), text(seed)] for seed in (1, 2)]
    engine = model.create_engine()
    engine.sample_many(prompts, **options_with(plan=[(VECTOR, ())], modality_cfg_scale=2.0, cfg_scale=1.0))
    given = num_given(model, prompts[0]) + 2  # [meta som]
    assert engine.stats.tokens_read == 2 * (given + given) + 4  # with and without text, and [sos null meta som]


def flipped(x):
    """Its last bit is another."""
    out = x.clone()
    out.view(torch.int64).flatten()[-1] ^= 1
    return out


def test_prompts_that_differ_in_one_bit_are_not_shared():
    model, (modality, x) = build(), latents(IMAGE, 2, 2)
    zero, below = torch.zeros(2, dtype=torch.float64), -torch.zeros(2, dtype=torch.float64)
    for one, other, shares in [
        ((modality, x), (modality, x.clone()), True),
        ((modality, x), (modality, flipped(x)), False),
        ((VECTOR, zero), (VECTOR, below), False),
        ((VIDEO, zero.view(1, 1, 1, 2)), (VECTOR, zero), False),
        ([(modality, x), text(1)], [(modality, x), text(2)], True),  # but for its last id, which is decoded
        ([(modality, x), text(1, 3)], [(modality, x), text(2, 3)], False),
        (text(1, 2), [text(1), text(2)], True),
    ]:
        engine = model.create_engine()
        engine.sample_many([one, other], **options_with(plan=[("text", 1)]))
        sizes = [num_given(model, prompt) for prompt in (one, other)]
        assert engine.stats.tokens_read == (sizes[0] + 1 if shares else sum(sizes))


def finish(engine, request):
    engine.run()


def cancel_it(engine, request):
    request.cancel()
    request.cancel()


def cancel_while_drawing(engine, request):
    while engine.scheduler.denoiser.evaluations < 3:
        engine.step()
    request.cancel()


def leave_stream(engine, request):
    for event in request.events():
        if isinstance(event, DrawingProgress):
            break


def close_stream(engine, request):
    stream = request.events()
    next(stream)
    stream.close()


@pytest.mark.parametrize("leave", [finish, cancel_it, cancel_while_drawing, leave_stream, close_stream])
@pytest.mark.parametrize("waiting", [0, 3])
def test_no_row_is_lost(leave, waiting):
    model = build(seed=3, push=dict(eos=-9.0))
    engine = model.create_engine(max_batch=2)
    options = options_with(
        max_length=30, plan=["text", (IMAGE, (2, 1)), "text"], modality_cfg_scale=1.5, cfg_scale=2.0, modality_steps=3
    )
    prompt = [text(1), latents(LINE, 2)]
    others = [engine.submit([text(i), latents(LINE, 2)], **options) for i in range(waiting)]
    for _ in range(4):
        request = engine.submit(prompt, **options)
        leave(engine, request)
        assert request.is_done
    engine.run()
    assert_no_row_is_lost(engine)
    for i, other in enumerate(others):
        assert_same(other.result(), alone(model, [text(i), latents(LINE, 2)], **options))


@pytest.mark.parametrize("prompt", [text(1, 2), [text(1), latents(LINE, 1)]])
def test_a_prompt_that_is_done_already_leaves_the_engine_idle(prompt):
    model = build()
    options = options_with(max_length=num_given(model, prompt))
    engine = model.create_engine()
    samples = engine.sample_many([prompt] * 3, **options)
    assert engine.is_idle
    request = engine.submit(prompt, **options)
    assert request.is_done
    assert_same(request.result(), samples[0])
    assert [type(event) for event in request.events()] == [Ended]
    assert_no_row_is_lost(engine)
    assert engine.stats.tokens_read == 0


@pytest.mark.parametrize("writes", [True, False])
def test_a_processor_may_cancel_requests(writes):
    """Its own, and another that writes or draws its last step at that moment."""
    model = build(seed=3, push=dict(eos=-9.0))
    engine = model.create_engine()
    other = engine.submit(text(2), **options_with(plan=[("text", 5) if writes else (LINE, (2,))], modality_steps=1))
    own = []

    def stop(ids, logits):
        other.cancel()
        if len(ids) > 5:
            own[0].cancel()
        return logits

    bystander = engine.submit(text(3), **options_with(max_length=20))
    own.append(engine.submit(text(1), logits_processors=[stop], **options_with()))
    engine.step()
    assert other.is_done
    assert other.reason is EndReason.CANCELLED
    engine.run()
    assert own[0].reason is EndReason.CANCELLED
    assert_same(bystander.result(), alone(model, text(3), **options_with(max_length=20)))
    assert_no_row_is_lost(engine)


def test_a_processor_may_submit_requests():
    model = build(seed=3, push=WRITES)
    engine, more = model.create_engine(max_batch=1), []

    def follow_up(ids, logits):
        if not more:
            more.append(engine.submit(text(3), **options_with(max_length=9)))
        return logits

    first = engine.submit(text(1), logits_processors=[follow_up], **options_with(max_length=8))
    engine.run()
    assert_same(first.result(), alone(model, text(1), **options_with(max_length=8)))
    assert_same(more[0].result(), alone(model, text(3), **options_with(max_length=9)))


def test_results_are_copies():
    model = build(seed=3)
    for raw in (True, False):
        engine = model.create_engine()
        options = options_with(force_modality_at_start=(LINE, (2,)), return_unprocessed_modalities=raw)
        prompt = [latents(LINE, 2), text(1)]
        request = engine.submit(prompt, **options)
        engine.run()
        for part in request.result():
            (part[1] if isinstance(part, tuple) else part).zero_()
        assert_same(request.result(), alone(model, prompt, **options))
        torch.testing.assert_close(prompt[0][1], latents(LINE, 2)[1])


def test_progress_counts_this_call_alone(monkeypatch):
    told, update = [], SampleProgress.update
    monkeypatch.setattr(SampleProgress, "update", lambda self, **counts: told.append(counts) or update(self, **counts))
    engine = build(push=WRITES).create_engine()
    for _ in range(2):
        engine.sample_many([text(1)], **options_with(plan=[("text", 3), (VECTOR, ())], modality_steps=1))
        assert told[-1] == dict(finished=1, tokens=3, steps=2)


def test_memory_of_what_was_given_is_its_owners(monkeypatch):
    model, picture, ids = build(seed=3), latents(IMAGE, 2, 2)[1], text(1, 2)
    options = options_with(init_modality=(IMAGE, picture), strength=0.5)
    expected = model.sample([ids.clone(), (LINE, picture[0].repeat(1, 3))], **options)
    line = picture[0].repeat(1, 3)
    request = (engine := model.create_engine()).submit([ids, (LINE, line)], **options)
    for given in (ids, line, picture):
        given.zero_()
    engine.run()
    assert_same(request.result(), expected)


def test_what_is_drawn_holds_the_memory_of_nothing_else():
    model = build(push=dict(eos=-9.0))
    requests = [(engine := model.create_engine()).submit(text(1), plan=[(LINE, (2,)), "text"], max_length=20)]
    requests += [engine.submit(text(i), plan=[(LINE, (2,)), "text"], max_length=20) for i in range(3)]
    while not any(isinstance(event, ModalityDone) for event in requests[0].new_events()):
        engine.step()
    [piece] = requests[0]._request.modalities
    assert piece.tensor.untyped_storage().nbytes() == piece.tensor.numel() * piece.tensor.element_size()


def test_a_generator_serves_one_request():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="one is given twice"):
        build().sample_many([None, None], generator=[generator, generator])


def test_a_trunk_without_a_cache_reads_again(monkeypatch):
    model = build(seed=3)
    expected = model.sample(text(1), **options_with())
    monkeypatch.delattr(type(model.transformer), "create_cache")
    assert_same(model.sample(text(1), **options_with()), expected)


def test_masks_are_made_where_the_cache_is():
    """On a device that is not the CPU; `meta` stands in for it."""
    cache = KVCache(layers=1, kv_heads=1, dim_head=2, device=torch.device("meta"), dtype=torch.float32)
    rows = [cache.acquire() for _ in range(2)]
    cache.commit(rows, [3, 5])
    stream = pack([[Text(text(1, 2))], [Text(text(3, 4))]], past=[Past(3, 3), Past(5, 5)]).to("meta")
    for run in CacheView(cache, rows, stream.layout).runs:
        assert {chunk.mask.device.type for chunk in run.chunks} == {run.slots.device.type} == {"meta"}
    view = DecodeView(cache, rows, [3, 5], torch.zeros(64, 1, 2, device="meta"))
    [run] = view.runs
    assert {it.device.type for it in (run.bias(), run.slots, run.newest, view.position)} == {"meta"}


def test_long_prompts_are_read_a_part_at_a_time(monkeypatch):
    model, options = build(seed=3), options_with()
    prompts = [text(*[i % 4] * (3 + i)) for i in range(6)]
    expected, sizes, run = model.sample_many(prompts, **options), [], model.forward_stream
    monkeypatch.setattr(runner, "READ_AT_ONCE", 12)

    def watch(stream, *args, **options):
        sizes.append(len(stream.token) if len(stream.lengths) > 1 and not args[0] else 0)  # several texts
        return run(stream, *args, **options)

    monkeypatch.setattr(model, "forward_stream", watch)
    for sample, other in zip(model.sample_many(prompts, **options), expected, strict=True):
        assert_same(sample, other)
    assert max(sizes) <= 12
