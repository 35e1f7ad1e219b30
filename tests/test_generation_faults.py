"""Whatever fails, at whatever moment: no request is lost, none suffers from another, and nothing of a fault stays."""

from traceback import walk_tb

import pytest
import torch
from generation_fault_run import run_faults
from generation_faults import COMMON, KINDS, OF_A_MOMENT, OF_A_REQUEST, Injected, Modules, fragile_model


def check(report) -> None:
    print(report)
    assert report.is_clean, f"\n{report}"


def test_without_faults_nothing_is_found():
    report = run_faults(requests=60, faults=0)
    check(report)
    assert report.reasons.total() == report.submitted == 60
    assert len(report.reasons) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_fault(kind):
    """Memory is needed for growth when an engine is young, so there are many of them."""
    report = run_faults([kind], requests=48, faults=16, per_engine=8 if kind == "no memory for growth" else 48)
    check(report)
    assert report.planned == {kind: 16}
    if kind in OF_A_REQUEST:
        assert report.reasons["refused" if kind == "encoder raises" else "error"] == 16
    assert (report.struck > 0) == (kind in OF_A_MOMENT)


@pytest.mark.parametrize("seed", range(2))
def test_faults_of_all_kinds(seed):
    report = run_faults(requests=300, faults=50, per_engine=150, seed=seed)
    check(report)
    assert set(report.planned) == set(KINDS)


@pytest.mark.parametrize("kind", ["module refuses a prompt", "module refuses a drawing", "processor raises"])
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
