"""Streams: what is told is what happens, in order, and whoever stops listening stops the work."""

import gc
import inspect
from dataclasses import fields

import pytest
import torch
from generation_models import (
    CHANNELS,
    IMAGE,
    LINE,
    MODELS,
    VECTOR,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    drawn,
    fail,
    generators,
    latents,
    noise,
    num_given,
    options_over,
    shapes_of,
    slots_of,
    text,
)
from torch import nn

from transfusion_pytorch.generation.events import (
    DrawingProgress,
    Ended,
    EndReason,
    ModalityDone,
    ModalityStarted,
    TextToken,
)
from transfusion_pytorch.generation.options import SamplingOptions

LETTERS = {TextToken: "t", ModalityStarted: "(", DrawingProgress: ".", ModalityDone: ")", Ended: "|"}
PROMPTS = [None, text(1, 2), latents(IMAGE, 2, 1), [text(0), latents(LINE, 2), text(3)]]


options_with = options_over(max_length=24)


def spelt(events) -> str:
    """One letter an event: `"tt(..)t|"`."""
    return "".join(LETTERS[type(event)] for event in events)


def told(events) -> list:
    """What a listener knows of the sample: ids of text, and types with shapes."""
    return [
        event.id if isinstance(event, TextToken) else (event.type, tuple(event.modality.shape))
        for event in events
        if isinstance(event, (TextToken, ModalityDone))
    ]


def written(model, sample, given: int) -> list:
    """The same of what a sample has behind the first `given` slots, without markers."""
    out, slot = [], 0
    for part in sample:
        size = len(slots_of(model, [part]))
        if isinstance(part, tuple):
            out += [(part[0], tuple(part[1].shape))] if slot >= given else []
        else:
            ids = part.tolist()[max(0, given - slot) :]
            out += [token for token in ids if token < model.vocabulary.num_text]
        slot += size
    return out


def listen(stream, events: list) -> None:
    for event in stream:
        events.append(event)


def assert_grammar(events, steps: int) -> None:
    """`TextToken* (ModalityStarted DrawingProgress* ModalityDone TextToken*)* Ended`, with all steps told in order."""
    spelling = spelt(events)
    assert spelling.endswith("|")
    assert spelling.count("|") == 1
    first, *rest = spelling[:-1].split("(")
    assert set(first) <= {"t"}
    for part in rest:
        assert part.startswith("." * steps + ")"), spelling
        assert set(part[steps + 1 :]) <= {"t"}, spelling


def assert_drawings_agree(events, model, times) -> None:
    """Every drawing is of the type and shape that was opened, and ends where its last step stood."""
    started, steps, last = None, 0, None
    for event in events:
        if isinstance(event, ModalityStarted):
            started, steps, last = event, 0, None
        elif isinstance(event, DrawingProgress):
            steps += 1
            assert (event.type, event.step, event.num_steps) == (started.type, steps, len(times) - 1)
            assert event.time == pytest.approx(times[steps], abs=1e-12)
            assert event.latents.shape == event.estimate.shape == (*started.shape, CHANNELS[event.type])
            last = event
        elif isinstance(event, ModalityDone):
            assert (event.type, event.modality.shape[:-1]) == (started.type, started.shape)
            torch.testing.assert_close(event.modality, last.latents, atol=1e-12, rtol=0)
            torch.testing.assert_close(last.estimate, last.latents, atol=1e-12, rtol=0)
            torch.testing.assert_close(last.preview(), event.modality, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "cache_kv"), [("plain", True), ("plain", False), ("frac-connections", True), ("clean", True)]
)
def test_events_tell_the_sample(name, cache_kv):
    model, seen = build(seed=3, **MODELS[name]), ""
    options = dict(modality_steps=2, max_modality_tokens=4, max_length=26, cfg_scale=2.0)
    for seed, prompt in enumerate(PROMPTS):
        events = list(model.sample_stream(prompt, cache_kv=cache_kv, generator=generators(seed)[0], **options))
        ended = events[-1]
        assert ended.error is None
        assert_same(ended.sample, model.sample(prompt, generator=generators(seed)[0], **options))
        assert told(events) == written(model, ended.sample, num_given(model, prompt))
        assert_grammar(events, steps=2)
        assert_drawings_agree(events, model, [0, 0.5, 1])
        finished = [event.modality for event in events if isinstance(event, ModalityDone)]
        for x, (_, expected) in zip(finished[::-1], drawn(ended.sample)[::-1], strict=False):
            torch.testing.assert_close(x, expected, atol=1e-12, rtol=0)
        seen += spelt(events)
    assert "(" in seen
    assert "t" in seen


@pytest.mark.parametrize(
    "options",
    [
        dict(force_modality_at_start=(LINE, (2,))),
        dict(plan=[(LINE, (2,)), ("text", 2), (VECTOR, ()), (IMAGE, (1, 2))]),
        dict(init_modality=latents(LINE, 3), strength=0.5),
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_modality_right_behind_the_prompt_is_told_from_its_start(options):
    model, options = build(push=dict(eos=-9.0)), options_with(**options)
    events = list(model.sample_stream(text(1), **options))
    assert spelt(events).startswith("(..)")
    assert isinstance(events[0], ModalityStarted)
    assert (events[0].type, events[0].shape) == (LINE, drawn(events[-1].sample)[0][1].shape[:-1])
    assert_grammar(events, steps=2)


def test_a_modality_that_the_prompt_has_opened_is_told_from_its_start():
    model = build()
    opened = text(1, *model.vocabulary.opening(IMAGE, (1, 2)).tolist())
    events = list(model.sample_stream(opened, **options_with()))
    assert events[0] == ModalityStarted(IMAGE, (1, 2))
    assert_grammar(events, steps=2)


def test_ids_of_the_prompt_are_no_news():
    model = build(push=WRITES)
    events = list(model.sample_stream([text(0, 1, 2), latents(LINE, 2), text(3)], **options_with(plan=[("text", 3)])))
    assert spelt(events) == "ttt|"
    assert [event.id for event in events[:3]] == events[-1].sample[-1].tolist()[-4:-1]


@pytest.mark.parametrize(("start", "shift"), [(0.0, 1.0), (0.0, 3.0), (0.75, 2.0)])
def test_times_are_those_of_the_solver(start, shift):
    model = build(push=WRITES)
    steps, options = 4, dict(time_shift=shift, plan=[(LINE, (3,))], modality_steps=4)
    if start:
        options |= dict(init_modality=latents(LINE, 3), strength=1 - start)
    events = list(model.sample_stream(text(1), **options_with(**options)))
    uniform = [i / steps for i in range(steps + 1)]
    times = [start + (1 - start) * u / (u + shift * (1 - u)) for u in uniform]
    assert [event.time for event in events if isinstance(event, DrawingProgress)] == pytest.approx(times[1:])


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_estimate_goes_straight_on(method, scale):
    """A step of these methods is a straight line, so where it leads can be told from its two ends."""
    model, steps = build(push=WRITES), 5
    options = options_with(
        plan=[(LINE, (3,))], modality_steps=steps, cfg_scale=scale, odeint_kwargs=dict(method=method)
    )
    progress = [it for it in model.sample_stream(text(1), **options) if isinstance(it, DrawingProgress)]
    before, time = noise()[:3], 0.0
    assert len(progress) == steps
    for event in progress:
        velocity = (event.latents - before) / (event.time - time)
        straight = event.latents + (1 - event.time) * velocity
        torch.testing.assert_close(event.estimate, straight, atol=1e-9, rtol=0)
        before, time = event.latents, event.time
    assert (progress[1].estimate - progress[-1].latents).abs().max() > 1e-3


def test_a_solver_that_takes_its_own_steps_tells_the_last():
    model, solver = build(push=WRITES), dict(method="dopri5", atol=1.0, rtol=1.0)
    events = list(model.sample_stream(text(1), **options_with(plan=[(LINE, (2,))], odeint_kwargs=solver)))
    assert spelt(events)[-3:] == ".)|"
    [progress] = [event for event in events if isinstance(event, DrawingProgress)]
    assert (progress.step, progress.num_steps, progress.time) == (2, 2, 1.0)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_evaluations_are_counted(method):
    model = build(push=WRITES)
    plan = dict(plan=[(LINE, (2,)), (VECTOR, ())], modality_steps=3, odeint_kwargs=dict(method=method), cfg_scale=2.0)
    counts = [it.num_evaluations for it in model.sample_stream(text(1), **options_with(**plan)) if spelt([it]) == ")"]
    assert counts == [3 * dict(euler=1, midpoint=2, rk4=4)[method]] * 2


class Brighten(nn.Module):
    """A decoder from latents to something of another number of channels."""

    def forward(self, x):
        return torch.cat([2 * x, x.sum(dim=1, keepdim=True)], dim=1)


@pytest.mark.parametrize("raw", [True, False])
def test_what_is_shown_is_decoded_and_has_channels_where_the_user_has_them(raw):
    model = build(
        channel_first_latent=(False, False, True, False), modality_decoder=(None, None, Brighten(), None), push=WRITES
    )
    options = options_with(plan=[(IMAGE, (2, 3))], return_unprocessed_modalities=raw, modality_steps=3)
    events = list(model.sample_stream(text(1), **options))
    for event in events:
        if isinstance(event, DrawingProgress):
            assert event.latents.shape == event.estimate.shape == (2, 3, 1), "channels last, whatever the user has"
            first = event.estimate.movedim(-1, 0)
            expected = first if raw else Brighten()(first[None])[0]
            torch.testing.assert_close(event.preview(), expected, atol=0, rtol=0)
            assert event.preview().shape == ((1 if raw else 2), 2, 3)
    *_, last, done, ended = events
    torch.testing.assert_close(done.modality, last.preview(), atol=1e-12, rtol=0)
    torch.testing.assert_close(done.modality, drawn(ended.sample)[0][1], atol=1e-12, rtol=0)


def test_listeners_may_do_what_they_like_with_what_they_are_told():
    """In place, too: nothing of it is what the engine works on."""
    for options in (dict(), dict(return_unprocessed_modalities=True)):
        model, options = build(seed=3), options_with(force_modality_at_start=(LINE, (2,)), **options)
        for event in model.sample_stream(text(1), **options):
            if isinstance(event, DrawingProgress):
                for x in (event.preview(), event.latents, event.estimate):
                    x.fill_(7.0)
            elif isinstance(event, ModalityDone):
                event.modality.fill_(7.0)
        assert isinstance(event, Ended)
        assert_same(event.sample, model.sample(text(1), **options))


# those who stop listening


def count_runs(model) -> list:
    runs: list[int] = []
    model.transformer.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("enough", [1, 3, 6])
@pytest.mark.parametrize("how", ["close", "break", "forget"])
def test_whoever_stops_listening_stops_the_work(enough, how):
    model = build(push=WRITES)
    engine, runs = model.create_engine(max_batch=1), count_runs(model)
    options = options_with(plan=[("text", 2), (LINE, (2,)), ("text", 5)], modality_steps=9)
    request, after = (engine.submit(text(i), **options) for i in (1, 2))
    stream = request.events()
    if how == "close":
        for _ in range(enough):
            next(stream)
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
    elif how == "break":
        for i, _ in enumerate(stream, start=1):
            if i == enough:
                break
        stream.close()
    else:
        for _ in range(enough):
            next(stream)
        del stream
        gc.collect()
    assert request.reason is EndReason.CANCELLED
    # the prompt and a word take one each, the first step of a drawing three (it reads what comes before), others two
    assert len(runs) == {1: 2, 3: 3, 6: 10}[enough]
    assert len(engine.scheduler.active) == 0
    assert [type(event) for event in request.new_events()] in ([Ended], [])
    engine.run()
    assert_same(after.result(), model.sample(text(2), **options))
    assert_no_row_is_lost(engine)


def test_a_stream_of_a_model_works_only_as_far_as_it_is_heard():
    model = build(push=WRITES)
    runs = count_runs(model)
    stream = model.sample_stream(text(1), **options_with(max_length=1000))
    assert runs == [], "nothing is computed before anybody listens"
    for wanted in (1, 2, 3):
        assert isinstance(next(stream), TextToken)
        assert len(runs) == 1 + wanted, "the prompt, and each id"
    stream.close()
    assert len(runs) == 4


def test_a_stream_refuses_bad_input_at_once():
    model = build()
    with pytest.raises(ValueError, match="prompt 0, part 0: token id 99"):
        model.sample_stream(text(99))
    with pytest.raises(TypeError, match="max_length"):
        model.sample_stream(text(1), max_length="long")


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 30])
def test_a_request_can_be_cancelled_before_during_and_after(turns):
    """What there is so far is its result, which can be continued."""
    model = build(push=WRITES)
    engine = model.create_engine()
    options = options_with(plan=[("text", 2), (LINE, (2,)), ("text", 3)], modality_steps=3)
    request = engine.submit(text(1), **options)
    for _ in range(turns):
        engine.step()
    request.cancel()
    assert request.is_done
    assert engine.is_idle
    whole = model.sample(text(1), **options)
    assert request.reason is (EndReason.PLAN if turns == 30 else EndReason.CANCELLED)
    so_far = slots_of(model, request.result())
    assert so_far == slots_of(model, whole)[: len(so_far)]
    # sos 1, words, and with the second the opening [meta 2 som]
    assert len(so_far) == {0: 2, 1: 3, 2: 7, 3: 7, 4: 7, 30: len(slots_of(model, whole))}[turns]
    *_, ended = request.new_events()
    assert_same(ended.sample, request.result())
    assert ended.reason is request.reason
    assert request.new_events() == []
    on = model.sample(request.result(), **options_with(max_length=len(so_far) + 3)) if turns < 30 else whole
    assert slots_of(model, on)[: len(so_far)] == so_far


def test_cancelling_inside_of_the_loop_ends_it():
    engine = build(push=WRITES).create_engine()
    request = engine.submit(text(1), **options_with())
    events = []
    for event in request.events():
        events.append(event)
        if len(events) == 3:
            request.cancel()
    assert spelt(events) == "ttt|"
    assert events[-1].reason is EndReason.CANCELLED
    assert len(events[-1].sample[0]) == 2 + 3


def test_an_error_comes_after_all_that_was_told():
    model = build(push=WRITES)
    stream = model.sample_stream(text(1), **options_with(logits_processors=[fail(ZeroDivisionError("mine"), at=5)]))
    events = []
    with pytest.raises(ZeroDivisionError, match="mine"):
        listen(stream, events)
    assert spelt(events) == "ttt|"
    assert events[-1].reason is EndReason.ERROR
    assert isinstance(events[-1].error, ZeroDivisionError)
    assert len(events[-1].sample[0]) == 5


# several listeners


@pytest.mark.parametrize("most", [2, 9])
def test_listeners_of_one_engine_hear_their_own_request_only(most):
    model = build(seed=3)
    engine = model.create_engine(max_batch=most)
    requests = [engine.submit(prompt, **options_with(modality_steps=i + 1)) for i, prompt in enumerate(PROMPTS)]
    heard = [[] for _ in requests]
    while not engine.is_idle:
        engine.step()
        for events, request in zip(heard, requests, strict=True):
            events += request.new_events()
    for i, (events, prompt) in enumerate(zip(heard, PROMPTS, strict=True)):
        expected = list(model.sample_stream(prompt, **options_with(modality_steps=i + 1)))
        assert spelt(events) == spelt(expected)
        assert told(events) == told(expected)
        assert_same(events[-1].sample, expected[-1].sample)
    assert len({str(told(events)) for events in heard}) == len(PROMPTS)


def test_streams_of_one_engine_may_be_heard_in_turns():
    """Whoever listens sets the whole engine to work; the others find their events waiting."""
    model = build(seed=3)
    engine = model.create_engine()
    requests = [engine.submit(prompt, **options_with()) for prompt in PROMPTS]
    streams, heard = [request.events() for request in requests], [[] for _ in requests]
    for turn in range(10_000):
        stream = streams[(place := turn % len(streams))]
        heard[place] += [event] if (event := next(stream, None)) is not None else []
        if engine.is_idle:
            break
    for events, stream, prompt in zip(heard, streams, PROMPTS, strict=True):
        events += stream
        assert spelt(events) == spelt(model.sample_stream(prompt, **options_with()))
        assert_same(events[-1].sample, model.sample(prompt, **options_with()))
    assert_no_row_is_lost(engine)


def test_without_a_listener_there_is_no_event_but_the_last():
    model = build(seed=3)
    engine = model.create_engine()
    request, other = (engine.submit(PROMPTS[3], listen=listen, **options_with()) for listen in (False, True))
    events, others = [], []
    while not engine.is_idle:
        engine.step()
        events += request.new_events()
        others += other.new_events()
    assert spelt(events) == "|"
    assert len(others) > 3
    assert_same(events[0].sample, others[-1].sample)
    assert spelt(engine.submit(None, listen=False, **options_with()).events()) == "|"


# the model between two events


def test_between_two_events_the_model_is_the_listeners():
    """They may train it: modes and gradients are what they were, dropout of the model is none of the sampler's."""
    model = build(transformer=dict(dropout=0.5))
    expected = model.sample(text(1, 2), **options_with(force_modality_at_start=(LINE, (2,))))
    model.train()
    model.transformer.layers[0].eval()
    modes = [module.training for module in model.modules()]
    stream = model.sample_stream(text(1, 2), **options_with(force_modality_at_start=(LINE, (2,))))
    for event in stream:
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        loss = model([[text(1, 2), latents(LINE, 2)]])
        loss.backward()
        assert loss.requires_grad
        if isinstance(event, DrawingProgress):
            assert not event.latents.requires_grad
            assert not event.preview().requires_grad
    assert_same(event.sample, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_listener_may_train_on_what_was_drawn():
    model = build(push=WRITES).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for event in model.sample_stream(text(1), **options_with(plan=[(LINE, (2,)), ("text", 2)])):
        if isinstance(event, (DrawingProgress, ModalityDone)):
            x = event.latents if isinstance(event, DrawingProgress) else event.modality
            loss = model([[text(1), (LINE, x)]])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == 3
    assert shapes_of(event.sample)[1] == (LINE, (2, 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_listener_without_gradients_hears_the_same(mode):
    model = build(seed=3)
    expected = spelt(model.sample_stream(text(1), **options_with()))
    with mode():
        events = []
        for event in model.sample_stream(text(1), **options_with()):
            assert not torch.is_grad_enabled()
            events.append(event)
    assert spelt(events) == expected


def test_the_average_of_a_model_streams_and_serves():
    model = build(seed=3)
    ema = model.create_ema(beta=0.5)
    expected = list(model.sample_stream(text(1), **options_with()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    events = list(ema.sample_stream(text(1), **options_with()))
    assert spelt(events) == spelt(expected)
    assert_same(events[-1].sample, expected[-1].sample)
    engine = ema.create_engine(max_batch=2)
    [sample] = engine.sample_many([text(1)], **options_with())
    assert_same(sample, expected[-1].sample)
    request = engine.submit(text(1), **options_with())
    assert spelt(request.events()) == spelt(expected)


def test_editors_see_every_option():
    model = build()
    for method in (model.sample, model.sample_many, model.sample_stream):
        shown = inspect.signature(method).parameters
        assert all(field.name in shown for field in fields(SamplingOptions))
        assert not any(it.kind is inspect.Parameter.VAR_KEYWORD for it in shown.values())
    assert list(inspect.signature(model.sample_stream).parameters)[:3] == ["prompt", "max_length", "cache_kv"]
