"""Whatever a user's own code raises ends its own request, and nothing of the failure stays."""

import gc
import threading
import traceback
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
    fail,
    latents,
    options_over,
    script,
    shapes_of,
    text,
)
from torch import Tensor, nn

from transfusion_pytorch.generation.events import Ended, EndReason

FAR = 1e4  # where a picky module fails


class NobodyExpectsThis(Exception):
    """Of no kind that a list of errors could have."""


ERRORS = [KeyError("lost"), NobodyExpectsThis("lost"), StopIteration("lost"), AttributeError("lost"), ZeroDivisionError]


class Picky(nn.Module):
    """Multiplies by `factor`, but fails over what is far from zero."""

    def __init__(self, error: Exception | type[Exception], inner: nn.Module | None = None):
        super().__init__()
        self.error, self.inner = error, inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and (x.abs() > FAR / 2).any():
            raise self.error
        return self.inner(x)


options_with = options_over(max_length=24)


def far(*shape: int) -> tuple[int, Tensor]:
    return LINE, torch.full((*shape, 3), FAR, dtype=torch.float64)


def adapted(error) -> dict:
    pair = (Picky(error, nn.Linear(3, 8)), nn.Linear(8, 3))
    return dict(dim_latent=(2, 3, 1, 2), pre_post_transformer_enc_dec=(None, pair, None, None))


def parser(written: str):
    if written == "3":
        raise NobodyExpectsThis("lost")
    return tuple(map(int, written.split(",")))


def faulty(place: str, error):
    """A model, and the prompt and options of a request that fails in it."""
    draws = dict(plan=[(LINE, (2,)), ("text", 2)])
    if place == "adapter, as it reads":
        return build(seed=3, **adapted(error)), [text(1), far(2), text(2)], dict(plan=[("text", 2)])
    if place == "adapter, as it denoises":
        return build(seed=3, **adapted(error)), text(1), draws | dict(init_modality_noise=FAR * torch.ones(4, 3))
    if place == "decoder":
        model = build(seed=3, modality_decoder=(None, Picky(error), None, None))
        return model, text(1), draws | dict(init_modality_noise=FAR * torch.ones(4, 3))
    if place == "processor":
        return build(seed=3), text(1), dict(logits_processors=[fail(error, at=5)])
    model = build(seed=3, to_modality_shape_fn=parser)
    ids = [model.meta_id, *model.char_tokenizer("3").tolist(), model.som_ids[LINE]]
    return model, text(1), dict(logits_processors=[script(*ids, given=2)])


PLACES = ["adapter, as it reads", "adapter, as it denoises", "decoder", "processor"]


@pytest.mark.parametrize(
    ("place", "error", "cache_kv"),
    [
        *((place, error, True) for place in PLACES for error in ERRORS),
        *((place, ERRORS[0], False) for place in PLACES),
        ("parser", NobodyExpectsThis, True),
    ],
)
def test_any_error_ends_its_own_request_and_no_other(place, error, cache_kv):
    model, prompt, options = faulty(place, error)
    kind = error if isinstance(error, type) else type(error)
    engine = model.create_engine(cache_kv=cache_kv)
    beside = [text(1), [text(2), latents(LINE, 2)], None]
    plans = [dict(plan=["text", (LINE, (2,)), ("text", 3)]), dict(plan=[(IMAGE, (1, 2)), ("text", 2)]), dict()]
    others = [engine.submit(it, **options_with(**own)) for it, own in zip(beside[:2], plans, strict=False)]
    failing = engine.submit(prompt, **options_with(**options))
    others.append(engine.submit(beside[2], **options_with()))
    engine.run()
    *_, ended = failing.new_events()
    assert isinstance(ended, Ended)
    assert failing.reason is ended.reason is EndReason.ERROR
    assert isinstance(ended.error, kind)
    with pytest.raises(kind, match=r"lost|^$") as caught:
        failing.result()
    assert caught.value is ended.error
    assert shapes_of(ended.sample)[0][:1] == [model.sos_id]
    for request, it, own in zip(others, beside, plans, strict=True):
        assert_same(request.result(), model.sample(it, cache_kv=cache_kv, **options_with(**own)))
    assert engine.is_idle
    if cache_kv:
        assert_no_row_is_lost(engine)


@pytest.mark.parametrize("place", ["adapter, as it reads", "adapter, as it denoises", "decoder", "processor"])
def test_a_call_raises_the_error_of_its_prompt(place):
    model, prompt, options = faulty(place, KeyError("lost"))
    engine = model.create_engine()
    waiting = engine.submit(text(3), **options_with())
    with pytest.raises(KeyError, match="lost"):
        engine.sample_many([prompt], **options_with(**options))
    with pytest.raises(KeyError, match="lost"):
        model.sample(prompt, **options_with(**options))
    engine.run()
    assert_same(waiting.result(), model.sample(text(3), **options_with()))
    assert_no_row_is_lost(engine)


def test_an_encoder_that_fails_refuses_its_prompt():
    model = build(modality_encoder=(None, Picky(KeyError("lost")), None, None), channel_first_latent=False)
    engine = model.create_engine()
    other = engine.submit(text(1), **options_with())
    engine.step()
    with pytest.raises(KeyError, match="lost"):
        engine.submit([text(1), far(2)], **options_with())
    engine.run()
    assert_same(other.result(), model.sample(text(1), **options_with()))
    assert_no_row_is_lost(engine)


def test_a_request_whose_parser_is_interrupted_ends_alone():
    """Its neighbour goes on as if nothing had happened."""
    countdown = iter([1, 2])

    def parser(written: str):
        if next(countdown, None) == 1:
            raise KeyboardInterrupt
        return tuple(map(int, written.split(",")))

    model, options = build(seed=3), options_with()
    ids = [model.meta_id, *model.char_tokenizer("2").tolist(), model.som_ids[LINE]]
    options |= dict(logits_processors=[script(*ids, given=2)])
    beside = options_with(plan=["text", (IMAGE, (1, 2)), ("text", 3)])
    expected = model.sample(text(2), **beside)
    engine = build(seed=3, to_modality_shape_fn=parser).create_engine()
    requests = [engine.submit(text(1), **options), engine.submit(text(2), **beside)]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    assert_same(requests[1].result(), expected)
    with pytest.raises(RuntimeError, match="prompt 0: it was interrupted by KeyboardInterrupt"):
        requests[0].result()
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whoever_interrupts_is_heard_and_the_engine_goes_on(stop):
    """These are no errors of a request. What was at work can go on."""
    model, calls = build(push=WRITES), []
    engine = model.create_engine()

    def once(ids, logits):
        if len(ids) == 4 and not calls:
            calls.append(1)
            raise stop
        return logits

    requests = [engine.submit(text(i), **options_with(logits_processors=[once])) for i in (1, 2)]
    with pytest.raises(stop):
        engine.run()
    assert not engine.is_idle
    engine.run()
    for i, request in zip((1, 2), requests, strict=True):
        assert_same(request.result(), model.sample(text(i), **options_with()))


# what an error keeps


def tensors_made(monkeypatch, model) -> list[weakref.ref]:
    """All that the transformer and the read-out of text return from now on."""
    made: list[weakref.ref] = []
    for name in ("forward_stream", "logits"):
        run = getattr(model, name)

        def remember(*args, run=run, **options):
            out = run(*args, **options)
            made.append(weakref.ref(out if isinstance(out, Tensor) else out.hidden))
            return out

        monkeypatch.setattr(model, name, remember)
    return made


@pytest.mark.parametrize("place", PLACES)
def test_a_stored_error_keeps_no_tensor(monkeypatch, place):
    """Neither through the frames of its traceback, nor through what called them."""
    model, prompt, options = faulty(place, KeyError("lost"))
    made = tensors_made(monkeypatch, model)
    engine = model.create_engine()
    request = engine.submit(prompt, **options_with(**options))
    engine.submit(text(2), **options_with(plan=[("text", 3)]))
    engine.run()
    *_, ended = request.new_events()
    assert isinstance(ended.error, KeyError)
    own = {x.untyped_storage().data_ptr() for x in held_by(request._request)}
    assert len(made) > 2
    alive = [tensor for ref in made if (tensor := ref()) is not None]
    assert [x for x in alive if x.untyped_storage().data_ptr() not in own] == []
    assert held_by(ended.error) == []
    assert "raise " in str(ended.error.__cause__), "where it was raised is still told"
    assert "KeyError: 'lost'" in str(ended.error.__cause__)


def held_by(start) -> list[Tensor]:
    """Every tensor that is reached from here, through frames too, but not through modules, classes and functions."""
    seen, found, todo = {id(start)}, [], [start]
    while todo:
        for each in gc.get_referents(todo.pop()):
            if id(each) in seen or isinstance(each, type(gc)) or callable(each):
                continue
            seen.add(id(each))
            found += [each] if isinstance(each, Tensor) else []
            todo.append(each)
    return found


def test_an_error_keeps_none_of_those_who_have_asked_for_it():
    """Each `result` raises the same object, whose traceback would otherwise grow by its callers."""
    engine = build(push=WRITES).create_engine()
    request = engine.submit(text(1), **options_with(logits_processors=[fail(KeyError("lost"), at=3)]))
    engine.run()
    depths = []
    for _ in range(3):
        with pytest.raises(KeyError) as caught:
            request.result()
        depths.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
    assert len(set(depths)) == 1


def test_a_stream_that_finds_the_engine_in_use_keeps_its_request():
    engine = build(push=WRITES).create_engine()
    events = engine.submit(text(1), **options_with(plan=[("text", 4)])).events()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with engine.exclusive():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="in use by another thread"):
        next(events)
    leave.set()
    thread.join()
    assert [*events][-1].reason is EndReason.PLAN


def test_processors_are_those_that_were_submitted():
    engine, processors = build(push=WRITES).create_engine(), []
    request = engine.submit(text(1), **options_with(logits_processors=processors))
    processors.append(fail(KeyError("lost"), at=3))
    engine.run()
    assert request.reason is not EndReason.ERROR
