"""Whatever fails, at whatever moment: no request is lost, none suffers from another, and nothing of a fault stays."""

import warnings
from traceback import walk_tb

import pytest
import torch
from generation_fault_run import run_faults
from generation_faults import (
    CATALOG,
    COMMON,
    KINDS,
    OF_A_MOMENT,
    OF_A_REQUEST,
    Injected,
    Modules,
    OutOfMemory,
    fragile_model,
    shared_model,
)
from generation_models import assert_same

from transfusion_pytorch.generation.engine import Engine, Request
from transfusion_pytorch.generation.events import Ended, EndReason


def check(report) -> None:
    print(report)
    assert report.is_clean, f"\n{report}"


def test_without_faults_nothing_is_found():
    report = run_faults(requests=60, faults=0)
    check(report)
    assert report.reasons.total() == report.submitted == 60
    assert len(report.reasons) >= 3


def without_end(new_events):
    return lambda request: [event for event in new_events(request) if not isinstance(event, Ended)]


def shifted(result):
    """Latents that are off by little."""
    return lambda request: [(part[0], part[1] + 1e-6) if isinstance(part, tuple) else part for part in result(request)]


def failing(step):
    calls = iter(range(10**6))

    def step_or_fail(engine):
        step(engine)
        if next(calls) % 20 == 7:
            raise KeyError

    return step_or_fail


def leaking(submit):
    kept = []
    return lambda *args, **options: kept.append((torch.zeros(1), torch.zeros(1))) or submit(*args, **options)


@pytest.mark.parametrize(
    ("found", "owner", "method", "spoil"),
    [
        ("lost", Request, "new_events", without_end),
        ("wrong", Request, "result", shifted),
        ("escaped", Engine, "step", failing),
        ("unnoticed", Request, "cancel", lambda cancel: lambda request: None),
        ("grown", Engine, "submit", leaking),
    ],
)
def test_an_engine_that_is_at_fault_is_found_out(monkeypatch, found, owner, method, spoil):
    run_faults(requests=1, faults=0)  # what every request becomes alone is known before
    monkeypatch.setattr(owner, method, spoil(getattr(owner, method)))
    report = run_faults(["cancelled at once"], requests=60, faults=10, per_engine=60)
    assert getattr(report, found), report
    assert [name for name in report.LISTS if getattr(report, name)] == [found]


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_fault(kind):
    """Memory is needed for growth when an engine is young, so there are many of them."""
    requests, faults = (64, 32) if kind in OF_A_MOMENT else (36, 12)
    report = run_faults([kind], requests=requests, faults=faults, per_engine=8 if "growth" in kind else 48)
    check(report)
    assert report.planned == {kind: faults}
    if kind in OF_A_REQUEST:
        assert report.reasons["refused" if kind == "encoder raises" else "error"] == faults
    assert (report.struck > 0) == (kind in OF_A_MOMENT)


def test_faults_of_all_kinds():
    report = run_faults(requests=300, faults=50, per_engine=150, seed=0)
    check(report)
    assert set(report.planned) == set(KINDS)


def test_whatever_call_of_a_prefill_fails_all_or_nothing_is_read():
    """One after the other, every second call that makes or takes apart a tensor: whatever a request becomes is what it
    becomes alone, and the engine serves the same again.
    """
    model, alone = shared_model()
    names, numbers = {"tensor", "__getitem__"}, (9, 14, 33, 8)  # text and drawings, guided and not

    def submit(engine):
        return [engine.submit(CATALOG[number].prompt, **CATALOG[number].arguments()) for number in numbers]

    def check_each(requests, *, may_fail: bool) -> None:
        errors = [request.reason is EndReason.ERROR for request in requests]
        assert sum(errors) <= may_fail, "a fault ends the request that it came to alone, if it ends any"
        for number, request in zip(numbers, requests, strict=True):
            if request.reason is not EndReason.ERROR:
                assert request.reason is alone[number].reason
                assert_same(request.result(), alone[number].sample)

    def fails_at(call: int) -> bool:
        """Whether there was such a call, which failed."""
        engine = model.create_engine()
        requests, moment = submit(engine), OutOfMemory(MemoryError("injected"), names=names, after=call)
        with moment, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is run in halves")
            engine.step()
        engine.run()
        check_each(requests, may_fail=moment.error is None)
        again = submit(engine)
        engine.run()
        check_each(again, may_fail=False)
        return moment.error is None

    failures = next(call for call in range(0, 1000, 2) if not fails_at(call)) // 2
    assert 30 < failures < 499


@pytest.mark.parametrize("kind", ["module refuses a prompt", "module refuses a drawing"])
def test_an_error_keeps_no_activations(kind):
    """The traceback of an error holds the frames that it came through, and those the tensors that they worked on."""
    model = fragile_model()
    prompt, options = OF_A_REQUEST[kind](Modules.of(model), Injected(1, ValueError("injected 1;")))
    engine = model.create_engine()
    request = engine.submit(prompt, **COMMON | options)
    engine.run()
    with pytest.raises(ValueError, match="injected 1;") as caught:
        request.result()
    error, held = caught.value, []
    while error is not None:
        frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_filename != __file__]
        held += [name for frame in frames for name, it in frame.f_locals.items() if isinstance(it, torch.Tensor)]
        error = error.__cause__ or error.__context__
    assert held == []


@pytest.mark.slow
def test_a_thousand_faults_in_ten_thousand_requests():
    check(run_faults(requests=10_000, faults=1_000, per_engine=2_500))
