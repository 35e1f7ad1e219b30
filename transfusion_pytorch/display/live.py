"""A sample while it comes: an output that changes in a notebook, text and a bar on a terminal."""

import importlib
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from transfusion_pytorch.display.growing import GrowingText
from transfusion_pytorch.display.lines import Part, check_count, describe_part
from transfusion_pytorch.display.progress import load_tqdm
from transfusion_pytorch.display.terminal import print_text
from transfusion_pytorch.display.view import DecodeText, PartWriter, Renderers, column, note
from transfusion_pytorch.generation.events import (
    DrawingProgress,
    Ended,
    EndReason,
    Event,
    ModalityDone,
    ModalityStarted,
    TextToken,
)

TEXT_INTERVAL = 0.1  # seconds between two updates of a notebook while text is written
COMPLETE = (EndReason.EOS, EndReason.PLAN)  # any other end is told


def watch(
    events: Iterable[Event],
    *,
    decode_text: DecodeText | None = None,
    renderers: Renderers | None = None,
    every: int = 1,
    max_text: int | None = 2000,
    smallest: int = 128,
) -> list[Any] | None:
    """Shows a sample while it comes, and returns it; None if the events run out before it is finished.

    - `events`: what `model.sample_stream(...)` gives. It is closed at the end, also on an error or an interrupt
    - `every`: in a notebook a modality that has a renderer is decoded and shown at every so many steps of its drawing

    A notebook has one output with what was written and drawn, in the order of the sample, but neither the prompt nor
    markers. A terminal gets the text as it comes, a bar while something is drawn, and a line for each modality. The
    other options are those of `show_sample`; a terminal needs only `decode_text`.

    Raises `TypeError` or `ValueError` for what is no event or no such option, and `ImportError` on a terminal without
    tqdm. What a decoder or a renderer raises comes through.
    """
    writer = PartWriter(decode_text, renderers, None, max_text, smallest)
    check_count("every", every, least=1)
    try:
        stream = iter(events)
    except TypeError as error:
        raise TypeError(f"events: expected what sample_stream gives, got {type(events).__name__}") from error
    sample = None
    with ExitStack() as cleanup:
        if (close := getattr(stream, "close", None)) is not None:
            cleanup.callback(close)
        screen = Notebook(writer, every) if in_notebook() else Terminal(decode_text)
        cleanup.callback(screen.close)
        for event in stream:
            screen.show(event)
            sample = event.sample if isinstance(event, Ended) else sample
        screen.finish()
    return sample


def in_notebook() -> bool:
    """Whether this Python is the kernel of a notebook, whose shell has a kernel; that of a terminal has none."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)  # a kernel has imported IPython itself
    return get_shell is not None and getattr(get_shell(), "kernel", None) is not None


def not_an_event(event: Any) -> TypeError:
    return TypeError(
        "events: expected TextToken, ModalityStarted, DrawingProgress, ModalityDone and Ended of "
        f"transfusion_pytorch.generation.events, got {type(event).__name__}"
    )


class Notebook:
    """One output of a cell, written anew when something changes.

    `blocks` and `lines` are the finished parts as HTML and as text, `text` decodes the one that is being written,
    `written` is what it shows of that, and `footer` the HTML of what is being drawn, or why the sample ended.
    """

    def __init__(self, writer: PartWriter, every: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.writer, self.every, self.clock = writer, every, clock
        self.display = importlib.import_module("IPython.display").display
        self.handle: Any = None
        self.updated = -TEXT_INTERVAL
        self.blocks: list[str] = []
        self.lines: list[str] = []
        self.text = GrowingText(writer.decode_text)
        self.written: list[str] = []
        self.footer = ""

    def show(self, event: Event) -> None:
        match event:
            case TextToken(id):
                self.written.append(self.text.add(id))
                if self.clock() - self.updated < TEXT_INTERVAL:
                    return  # the next update will have it
            case ModalityStarted(type, shape):
                self.end_text()
                self.footer = note(f"modality {type} {tuple(shape)}")
            case DrawingProgress():
                if event.step % self.every and event.step != event.num_steps:
                    return
                self.footer = self.preview(event)
            case ModalityDone(type, modality):
                self.footer = ""
                self.add(Part(type, modality.detach()))
            case Ended(_, reason):
                self.end_text()
                self.footer = "" if reason in COMPLETE else note(f"ended: {reason.value}")
            case _:
                raise not_an_event(event)
        self.update()

    def preview(self, event: DrawingProgress) -> str:
        progress = note(f"modality {event.type}, step {event.step} of {event.num_steps}")
        if self.writer.renderer(event.type) is None:
            return progress
        return self.writer.part(Part(event.type, event.preview().detach())) + progress

    def end_text(self) -> None:
        if self.text.ids:
            self.add(Part(None, torch.tensor(self.text.ids, device="cpu")))
            self.text, self.written = GrowingText(self.writer.decode_text), []

    def add(self, part: Part) -> None:
        self.blocks.append(self.writer.part(part))
        self.lines.append(describe_part(part))

    def update(self) -> None:
        current = self.writer.decoded("".join(self.written)) if self.text.ids else ""
        # Made here rather than by an object with _repr_html_, of which IPython would swallow the errors.
        data = {
            "text/html": column([*self.blocks, current, self.footer]),
            "text/plain": "\n".join(self.lines),
        }
        if self.handle is None:
            self.handle = self.display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)
        self.updated = self.clock()

    def finish(self) -> None:
        """Shows text that waited for an update, if the events ran out before `Ended`."""
        if self.text.ids:
            self.end_text()
            self.update()

    def close(self) -> None:
        """Nothing is open: the output stays as it is."""


class Terminal:
    """Text on the standard output as it is written, and a bar on the standard error while something is drawn."""

    def __init__(self, decode_text: DecodeText | None) -> None:
        self.make_bar = load_tqdm()
        self.text = GrowingText(decode_text)
        self.bar: Any = None

    def show(self, event: Event) -> None:
        match event:
            case TextToken(id):
                print_text(self.text.add(id), end="", flush=True)
            case ModalityStarted(type, shape):
                self.end_line()
                label = f"modality {type} {tuple(shape)}"
                # miniters=0: by time alone; disable=None: no bar in a log, only on a terminal
                options = dict(unit="step", leave=False, dynamic_ncols=True, miniters=0, disable=None)
                self.bar = self.make_bar(desc=label, **options)
            case DrawingProgress():
                self.advance(event.step, event.num_steps)
            case ModalityDone(type, modality):
                self.close_bar()
                print_text(describe_part(Part(type, modality.detach())), flush=True)
            case Ended(_, reason):
                self.end_line()
                if reason not in COMPLETE:
                    print_text(f"ended: {reason.value}", flush=True)
            case _:
                raise not_an_event(event)

    def advance(self, step: int, num_steps: int) -> None:
        if self.bar is not None:
            self.bar.total = num_steps
            self.bar.update(step - self.bar.n)

    def end_line(self) -> None:
        if self.text.ids:
            print_text(self.text.end(), flush=True)

    def finish(self) -> None:
        self.end_line()

    def close(self) -> None:
        self.close_bar()
        if self.text.ids:
            print_text(flush=True)  # an error is told on a line of its own

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
