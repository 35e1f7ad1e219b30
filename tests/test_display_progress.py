"""The bar of many samples: what it counts, where it is silent, and what it does without tqdm or widgets."""

import re
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from transfusion_pytorch.display.progress import SampleProgress, load_tqdm

tqdm = pytest.importorskip("tqdm")


@pytest.fixture
def at_once(monkeypatch):
    """Every update is drawn."""
    monkeypatch.setattr("tqdm.std.time", iter(range(10**6)).__next__)


def last(text: str) -> str:
    return text.rstrip("\n").rpartition("\r")[2]


def test_counts_are_since_the_start(capsys, at_once):
    shown = []
    with SampleProgress(total=5) as progress:
        for finished, tokens, steps in [(0, 3, 0), (2, 10, 16), (2, 12, 32), (5, 40, 48)]:
            progress.update(finished=finished, tokens=tokens, steps=steps)
            shown.append(last(capsys.readouterr().err))
    found = [re.search(r"(\d)/5 .*tokens=(\d+), steps=(\d+)", line) for line in shown]
    assert all(found), shown
    assert [tuple(map(int, match.groups())) for match in found] == [(0, 3, 0), (2, 10, 16), (2, 12, 32), (5, 40, 48)]


def test_the_bar_is_closed_on_an_error(capsys):
    with pytest.raises(KeyboardInterrupt), SampleProgress(total=5) as progress:
        raise KeyboardInterrupt
    assert progress.bar.disable  # what tqdm says of a closed one
    assert capsys.readouterr().err.endswith("\n")


def test_it_is_silent_when_off_and_needs_no_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with SampleProgress(total=5, show=False) as progress:
        progress.update(finished=1, tokens=2, steps=3)
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'pip install "transfusion-pytorch\[notebook\]"'):
        SampleProgress(total=5)


def test_a_notebook_without_widgets_gets_a_bar_of_text_and_no_warning(monkeypatch):
    kernel, ipython = ModuleType("ipykernel.zmqshell"), ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})  # what older releases of tqdm look at
    for name, module in [("ipykernel.zmqshell", kernel), ("IPython", ipython), ("ipywidgets", None)]:
        monkeypatch.setitem(sys.modules, name, module)

    def forget():
        for name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import tqdm.auto

    assert any(issubclass(warning.category, tqdm.TqdmWarning) for warning in caught)
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert issubclass(load_tqdm(), tqdm.std.tqdm)
    assert caught == []
