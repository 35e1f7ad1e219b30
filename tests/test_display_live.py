"""A sample while it comes, in a notebook and on a terminal: the events are made by hand, and so is IPython."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pages import TYPECHECK, Page, ids_of, letters, refused
from torch import Tensor, tensor

from transfusion_pytorch.display import describe_sample, live, render_image, watch
from transfusion_pytorch.generation.events import (
    DrawingProgress,
    Ended,
    EndReason,
    ModalityDone,
    ModalityStarted,
    TextToken,
)


class Stream:
    """An iterator as `sample_stream` makes them, that knows whether it was closed and what was decoded."""

    def __init__(self, events, error=None):
        self.closed, self.decoded = False, []
        self.events = self.run(events, error)

    def run(self, events, error):
        try:
            yield from events
            if error is not None:
                raise error
        finally:
            self.closed = True

    def decode(self, kind, latents):
        self.decoded.append(latents)
        return latents * 2 - 1


def drawing(stream: Stream, image: Tensor, steps: int, kind: int = 0) -> list:
    """The events of one drawing, that clears from black."""
    return [
        ModalityStarted(kind, (2, 2)),
        *(
            DrawingProgress(kind, step, steps, step / steps, image, image * step / steps, stream.decode)
            for step in range(1, steps + 1)
        ),
        ModalityDone(kind, image, 2 * steps),
    ]


def story(steps: int = 4, reason: EndReason = EndReason.EOS, **options) -> tuple[Stream, list]:
    """Text, a drawing, text, the end; and the sample that it ends with."""
    stream, image = Stream([], **options), torch.ones(2, 2, 1)
    sample = [ids_of("ab"), (0, image), ids_of("c")]
    events = [*map(TextToken, b"ab"), *drawing(stream, image, steps), TextToken(ord("c")), Ended(sample, reason)]
    stream.events = stream.run(events, options.get("error"))
    return stream, sample


class Screen:
    """Stands in for IPython in a kernel: `pages` are the HTML of the only output, one after another."""

    def __init__(self):
        self.pages, self.plain, self.handles = [], [], 0

    def display(self, data, *, raw, display_id):
        assert raw
        assert display_id
        self.handles += 1
        self.update(data, raw=raw)
        return self

    def update(self, data, *, raw):
        assert raw
        self.pages.append(Page(data["text/html"]))
        self.plain.append(data["text/plain"])


def plant_ipython(monkeypatch, shell) -> Screen:
    screen, package, module = Screen(), ModuleType("IPython"), ModuleType("IPython.display")
    package.get_ipython, package.display, module.display = (lambda: shell), module, screen.display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return screen


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(live, "TEXT_INTERVAL", 0.0)
    return plant_ipython(monkeypatch, SimpleNamespace(kernel=object()))


@pytest.fixture
def terminal(monkeypatch):
    plant_ipython(monkeypatch, None)


def test_a_notebook_has_a_kernel(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not live.in_notebook()
    for shell, found in [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=object()), True)]:
        plant_ipython(monkeypatch, shell)
        assert live.in_notebook() is found


def test_a_notebook_has_one_output_that_grows(notebook, capsys):
    stream, sample = story(steps=2)
    assert watch(stream.events, decode_text=letters, renderers=render_image()) is sample
    assert stream.closed
    assert notebook.handles == 1
    assert capsys.readouterr() == ("", "")
    shown = [
        [item if isinstance(item, str) else item.getpixel((0, 0)) for item in page.seen] for page in notebook.pages
    ]
    assert shown == [
        ["a"],
        ["ab"],
        ["ab", "modality 0 (2, 2)"],
        ["ab", 128, "modality 0, step 1 of 2"],
        ["ab", 255, "modality 0, step 2 of 2"],
        ["ab", 255],
        ["ab", 255, "c"],
        ["ab", 255, "c"],
    ]
    assert notebook.plain[-1].splitlines() == describe_sample([sample[0], sample[1], sample[2]])


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_previews_are_decoded_only_every_so_often(notebook, every, steps):
    stream, _ = story(steps=5)
    watch(stream.events, renderers=render_image(), every=every)
    assert [round(5 * decoded.mean().item()) for decoded in stream.decoded] == steps


def test_nothing_is_decoded_for_nobody(notebook):
    stream, _ = story(steps=2)
    watch(stream.events, renderers={1: render_image()})
    assert stream.decoded == []
    assert [text for page in notebook.pages for text in page.texts if "step" in text] == [
        "modality 0, step 1 of 2",
        "modality 0, step 2 of 2",
    ]


def test_text_is_shown_at_intervals_and_to_its_end(monkeypatch):
    screen = plant_ipython(monkeypatch, SimpleNamespace(kernel=object()))
    monkeypatch.setattr(live, "TEXT_INTERVAL", 3600.0)
    events = list(map(TextToken, b"quickly"))
    assert watch(iter(events), decode_text=letters) is None
    assert [page.texts for page in screen.pages] == [["q"], ["quickly"]]


@pytest.mark.parametrize(
    ("reason", "told"), [(EndReason.EOS, []), (EndReason.PLAN, []), (EndReason.LENGTH, ["ended: length"])]
)
def test_why_a_sample_ended_is_told_unless_it_is_the_usual(notebook, capsys, monkeypatch, reason, told):
    watch([TextToken(5), Ended([tensor([5])], reason)])
    assert notebook.pages[-1].texts == ["5", *told]
    plant_ipython(monkeypatch, None)
    watch([TextToken(5), Ended([tensor([5])], reason)])
    assert capsys.readouterr().out.splitlines() == ["5", *told]


def test_live_text_is_escaped(notebook):
    watch(map(TextToken, b"<b>&lt;"), decode_text=letters)
    assert notebook.pages[-1].texts == ["<b>&lt;"]


def test_a_terminal_prints_text_and_a_line_for_each_modality(terminal, capsys):
    stream, sample = story()
    assert watch(stream.events, decode_text=letters, renderers=render_image()) is sample
    assert stream.closed
    assert stream.decoded == []
    assert capsys.readouterr().out.splitlines() == ["ab", describe_sample(sample[1])[0], "c"]


def test_a_terminal_prints_ids_without_a_decoder(terminal, capsys):
    stream, sample = story()
    watch(stream.events)
    assert capsys.readouterr().out.splitlines() == ["97 98", describe_sample(sample[1])[0], "99"]


def test_a_terminal_has_a_bar_of_drawing_steps(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    stream, _ = story(steps=4)
    shown = []

    def spied():
        for event in stream.events:
            yield event
            shown.append((type(event).__name__, capsys.readouterr().err))

    monkeypatch.setattr("tqdm.std.time", iter(range(10**6)).__next__)  # every update is drawn
    watch(spied(), decode_text=letters)
    bars = [re.search(r"(\d+)/4 ", text.rpartition("\r")[2]) for name, text in shown if name == "DrawingProgress"]
    assert [int(found[1]) for found in bars] == [1, 2, 3, 4]
    assert all("modality 0 (2, 2)" in text for name, text in shown if name == "DrawingProgress")
    cleared = next(text for name, text in shown if name == "ModalityDone")
    assert cleared.endswith("\r")
    assert cleared.rstrip("\r").rpartition("\r")[2].strip() == ""


def test_a_log_has_no_bar(terminal, capsys):
    stream, _ = story()
    watch(stream.events)
    assert capsys.readouterr().err == ""


def test_text_is_printed_as_it_comes_and_never_half_a_character(terminal, capsys):
    def utf8(ids):
        return bytes(ids.tolist()).decode(errors="replace")

    shown = []

    def spied():
        for byte in "né€!".encode() + b"\xff":
            yield TextToken(byte)
            shown.append(capsys.readouterr().out)

    watch(spied(), decode_text=utf8)
    assert shown == ["n", "", "é", "", "", "€", "!", ""]
    assert capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
@pytest.mark.parametrize("place", ["stream", "decoder"])
@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_the_stream_is_closed_on_an_error(request, where, place, error):
    request.getfixturevalue(where)

    def fail(ids):
        raise error

    stream, _ = story(error=error if place == "stream" else None)
    with pytest.raises(type(error)):
        watch(stream.events, decode_text=fail if place == "decoder" else letters)
    assert stream.closed


class Bar:
    """Stands in for tqdm."""

    def __init__(self, **options):
        self.closed = False

    def close(self):
        self.closed = True


def test_an_interrupt_closes_the_bar_and_the_stream(terminal, monkeypatch):
    bar = Bar()
    monkeypatch.setattr(live, "load_tqdm", lambda: lambda **options: bar)
    stream = Stream([TextToken(97), ModalityStarted(0, (2, 2))], error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        watch(stream.events)
    assert bar.closed
    assert stream.closed


def test_an_error_is_told_below_the_text(terminal, capsys):
    with pytest.raises(KeyboardInterrupt):
        watch(Stream([TextToken(97)], error=KeyboardInterrupt()).events, decode_text=letters)
    assert capsys.readouterr().out == "a\n"


def test_an_error_of_a_renderer_comes_through_and_closes_the_stream(notebook):
    stream, _ = story()
    with pytest.raises(ValueError, match="expected an image"):
        watch(stream.events, renderers=render_image(channel_first=True))
    assert stream.closed


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_what_is_no_event_is_refused(request, where):
    request.getfixturevalue(where)
    stream = Stream([TextToken(1), "token"])
    with refused("expected TextToken, .* got str"):
        watch(stream.events)
    assert stream.closed
    with refused("events: expected what sample_stream gives, got int"):
        watch(3)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError)])
def test_every_is_a_count(every, error):
    with pytest.raises(error, match=None if TYPECHECK else "every: expected"):
        watch([], every=every)


def test_no_events_show_nothing(notebook, capsys):
    assert watch([]) is None
    assert notebook.pages == []
    assert capsys.readouterr() == ("", "")


def test_a_terminal_without_tqdm_is_told_the_extra_before_anything_is_drawn(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream, _ = story()
    next(stream.events)
    with pytest.raises(ImportError, match=r'pip install "transfusion-pytorch\[notebook\]"'):
        watch(stream.events)
    assert stream.closed
