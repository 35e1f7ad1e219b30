"""A decode step is one function of fixed shape on the device: captured in a CUDA graph (which is recorded here, since
no GPU is at hand), compiled, and run where no number can be read.
"""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from checks import compiles
from cuda_graphs import RecordedCapture, RecordedGraph
from generation_models import LINE, VECTOR, assert_same, build, text
from torch._dynamo.utils import counters

from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.network.step_graph import STEPS_BEFORE_CAPTURE

SAMPLED = dict(text_temperature=1.0, text_top_p=0.9, text_repetition_penalty=1.1, text_top_k=6)


@pytest.fixture(autouse=True)
def recorded_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", RecordedCapture)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    RecordedGraph.replays = 0


def engine_of(model, *, graphs: bool):
    engine = model.create_engine()
    engine.scheduler.runner.graphs.is_used = graphs
    return engine


def submit(engine, *prompts, **options):
    options = dict(max_length=220, log_probabilities=True) | options
    return [
        engine.submit(prompt, generator=torch.Generator().manual_seed(seed), **options)._request
        for seed, prompt in enumerate(prompts)
    ]


def outcome(requests):
    assert [request.error for request in requests] == [None] * len(requests)
    return [request.branch.items for request in requests]


PROMPTS = text(1), text(2, 3, 0, 1, 2), text(*[3] * 70)


def run(engine, *prompts, **options):
    requests = submit(engine, *(prompts or PROMPTS), **options)
    engine.run()
    return requests


@pytest.mark.parametrize("transformer", [dict(), dict(kv_heads=1), dict(ff_kwargs=dict(activation="swiglu"), depth=3)])
@pytest.mark.parametrize("options", [dict(text_temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_replayed_steps_are_eager_steps(transformer, options):
    """Over more steps than there are random numbers, rows in several blocks that grow, and rows that end early."""
    model = build(transformer=transformer, push=dict(eos=-3.0, meta=-9.0))
    plain, captured = (run(engine_of(model, graphs=graphs), **options) for graphs in (False, True))
    assert outcome(captured) == outcome(plain)
    assert max(len(request.branch.items) for request in captured) > 150
    assert RecordedGraph.replays > 100
    for one, other in zip(captured, plain, strict=True):
        wanted = torch.tensor(other.log_probabilities)
        torch.testing.assert_close(torch.tensor(one.log_probabilities), wanted, atol=1e-9, rtol=0, equal_nan=True)


def test_rows_that_come_and_go_find_their_own_graph():
    model = build(push=dict(eos=-9.0, meta=-9.0))

    def grown(graphs: bool):
        engine = engine_of(model, graphs=graphs)
        requests = submit(engine, text(1), text(2, 3), **SAMPLED)
        for _ in range(20):
            engine.step()
        requests += submit(engine, text(0, 0, 1), text(3), max_length=60, **SAMPLED)
        engine.run()
        return outcome(requests)

    assert grown(True) == grown(False)
    assert RecordedGraph.replays > 100


def test_text_goes_on_behind_a_modality_that_is_drawn_in_between():
    model = build(push=dict(eos=-9.0, meta=-9.0))
    plan = [("text", 30), (LINE, (3,)), ("text", 30), (VECTOR, ()), ("text", 20)]
    options = dict(plan=plan, modality_steps=2, cfg_scale=2.0, max_length=220)

    def sampled(graphs: bool):
        seeds = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        return engine_of(model, graphs=graphs).sample_many(PROMPTS, generator=seeds, **options)

    for drawn, expected in zip(sampled(True), sampled(False), strict=True):
        assert_same(drawn, expected)
    assert RecordedGraph.replays > 30


def test_processors_see_the_logits_outside_of_the_graph():
    calls = []

    def never_one(ids, logits):
        calls.append(len(ids))
        logits[1] = float("-inf")
        return logits

    model = build(push=dict(eos=-9.0, meta=-9.0))
    options = dict(logits_processors=[never_one], max_length=60)
    plain, captured = (run(engine_of(model, graphs=graphs), *PROMPTS[:2], **options) for graphs in (False, True))
    assert outcome(captured) == outcome(plain)
    assert RecordedGraph.replays > 30
    assert len(calls) == 2 * sum(len(ids) - start for ids, start in zip(outcome(plain), (2, 6), strict=True))


def test_capture_that_fails_is_said_once_and_changes_nothing(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no graph today")

    model = build(push=dict(eos=-9.0, meta=-9.0))
    expected = outcome(run(engine_of(model, graphs=False), **SAMPLED))
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    engine = engine_of(model, graphs=True)
    with pytest.warns(UserWarning, match="could not be captured in a CUDA graph.*no graph today") as caught:
        assert outcome(run(engine, **SAMPLED)) == expected
    assert len(caught) == 1
    assert not engine.scheduler.runner.graphs.is_used
    assert outcome(run(engine_of(model, graphs=True), **SAMPLED)) == expected  # the warning as an error


def test_step_that_reads_a_number_is_not_captured():
    """The stand-in refuses it, as CUDA does."""
    model = build(push=dict(eos=-9.0, meta=-9.0))
    logits = model.to_logits.forward
    model.to_logits.forward = lambda x: logits(x) + 0 * x.sum().item()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        outcome(run(engine_of(model, graphs=True), *PROMPTS[:2], max_length=60))
    assert RecordedGraph.replays == 0


def test_model_with_hooks_is_run_and_not_replayed():
    model, calls = build(push=dict(eos=-9.0, meta=-9.0)), []
    model.to_logits.register_forward_hook(lambda *_: calls.append(1))
    run(engine_of(model, graphs=False))
    expected, calls[:] = len(calls), []
    run(engine_of(model, graphs=True))
    assert len(calls) == expected
    assert RecordedGraph.replays == 0


def test_graph_goes_with_its_state_and_with_the_weights():
    model = build(push=dict(eos=-9.0, meta=-9.0))
    engine = engine_of(model, graphs=True)
    submit(engine, text(1), text(2))
    for _ in range(STEPS_BEFORE_CAPTURE + 3):
        engine.step()
    graph = weakref.ref(engine.scheduler._state.graph._graph)
    assert graph() is not None
    engine.step()
    assert engine.scheduler._state.graph._graph is graph()
    engine.weights_changed()
    engine.step()
    gc.collect()
    assert graph() is None
    engine.reset()
    assert engine.scheduler._state is None


@compiles
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_step_is_one_compiled_graph_for_all_steps(backend, monkeypatch):
    """Without any break, and without another graph while the rows stay the same."""
    torch.compiler.reset()
    counters.clear()
    model = build(push=dict(eos=-9.0, meta=-9.0), transformer=dict(kv_heads=1))
    expected = outcome(run(engine_of(model, graphs=False), *PROMPTS[:2], max_length=60, **SAMPLED))
    engine = engine_of(model, graphs=False)
    compiled = torch.compile(engine.scheduler.runner._step, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(engine.scheduler.runner, "_step", compiled)
    requests = submit(engine, *PROMPTS[:2], max_length=60, **SAMPLED)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(50):
            engine.step()
    monkeypatch.undo()
    engine.run()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert outcome(requests) == expected


def on_meta(**options):
    """An engine whose model holds no numbers, and a request whose prompt was read."""
    model = build(dtype=torch.float32).to("meta")
    engine = model.create_engine()
    [request] = submit(engine, text(1, 2, 3), log_probabilities=False, modality_steps=3, **options)
    engine.scheduler._admit()
    engine.scheduler._prefill()
    assert request.error is None
    return engine.scheduler, request


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(text_temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_decode_step_reads_nothing_from_the_device(options):
    """On the meta device whatever would wait for a GPU raises."""
    scheduler, request = on_meta(**options)
    request.accept(2)
    state = scheduler.runner.batch_state([request])
    for _ in range(3):
        decoded = scheduler.runner.decode(state)
        assert decoded.tokens is not None
        assert decoded.tokens.is_meta
        state.finish_step()
    assert not request.is_done
    assert request.reason is not EndReason.ERROR


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_drawing_reads_nothing_from_the_device(method, cfg_scale):
    scheduler, request = on_meta(plan=[(LINE, (3,))], cfg_scale=cfg_scale, odeint_kwargs=dict(method=method))
    for _ in range(3):
        assert scheduler.denoiser.step([request.denoising]) == []
    assert request.denoising.is_done
    assert request.denoising.x.is_meta
