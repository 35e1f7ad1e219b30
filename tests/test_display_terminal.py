"""Text on terminals that cannot show all of it, and text that comes id by id."""

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, tensor

from transfusion_pytorch import TrainConfig, Trainer, Transfusion
from transfusion_pytorch.commands import sample as sample_command
from transfusion_pytorch.display import live, print_modality_sample, watch
from transfusion_pytorch.display.growing import CONTEXT, GrowingText
from transfusion_pytorch.display.lines import decode
from transfusion_pytorch.display.terminal import print_text, printable
from transfusion_pytorch.generation.events import Ended, EndReason, ModalityDone, ModalityStarted, TextToken
from transfusion_pytorch.training.reporting import ProgressReporter

STORY = "né€ 猫 🐈 \u0301 \ufffd end"
SHOWN = {"cp1252": "né€ ? ? ? ? end", "ascii": "n?? ? ? ? ? end", "utf-8": STORY}


class Stream(TextIOWrapper):
    """A strict stream of an encoding, and what was written to it."""

    def __init__(self, encoding: str, errors: str = "strict"):
        self.bytes = BytesIO()
        super().__init__(self.bytes, encoding=encoding, errors=errors, newline="\n")

    def text(self) -> str:
        self.flush()
        return self.bytes.getvalue().decode(self.encoding)


def printed(encoding: str, action: Callable, *arguments, **options) -> str:
    """What an action writes to a standard output of this encoding."""
    stream = Stream(encoding)
    with redirect_stdout(stream):
        action(*arguments, **options)
    return stream.text()


in_every_encoding = pytest.mark.parametrize("encoding", SHOWN)


def utf8(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode(errors="replace")


def told(text: str) -> list:
    return [*map(TextToken, text.encode()), Ended([tensor([1])], EndReason.EOS)]


@in_every_encoding
def test_a_stream_gets_what_it_can_show(encoding):
    assert printed(encoding, print_text, STORY) == SHOWN[encoding] + "\n"
    assert printed(encoding, print_text, STORY, end="!") == SHOWN[encoding] + "!"
    if encoding != "utf-8":
        with pytest.raises(UnicodeEncodeError):
            printed(encoding, print, STORY)


def test_without_an_encoding_everything_is_shown():
    stream = StringIO()
    print_text(STORY, file=stream)
    assert stream.getvalue() == STORY + "\n"
    assert printable(STORY, None) == STORY


def test_a_stream_that_has_its_own_way_of_showing_keeps_it():
    stream = Stream("ascii", "backslashreplace")
    print_text("n€", file=stream)
    assert stream.text() == "n\\u20ac\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_no_error(encoding, errors):
    """As names of files and arguments come, that have lone surrogates."""
    stream = Stream(encoding, errors)
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    print_text("€" + name, file=stream)
    stream.flush()
    written = stream.bytes.getvalue()
    assert written.endswith((b"caf\xe9\n", b"caf?\n"))
    assert (b"\xe9" in written) == (errors == "surrogateescape" and encoding != "ascii")


@in_every_encoding
def test_watch_prints_what_the_terminal_can_show(encoding):
    assert printed(encoding, watch, told(STORY), decode_text=utf8) == SHOWN[encoding] + "\n"


@in_every_encoding
def test_watch_prints_modalities_and_ends(encoding):
    events = [ModalityStarted(0, (2,)), ModalityDone(0, torch.ones(2, 1), 3), Ended([tensor([1])], EndReason.LENGTH)]
    assert (
        printed(encoding, watch, events, decode_text=utf8)
        == "modality 0  (2, 1)  mean 1.000  std 0.000\nended: length\n"
    )


@in_every_encoding
def test_a_sample_is_printed(encoding):
    text = printed(encoding, print_modality_sample, [tensor([1, 2]), torch.zeros(2, 3)])
    assert text == "text  (2,)  1 2\nmodality 0  (2, 3)  mean 0.000  std 0.000\n"


@in_every_encoding
def test_the_lines_of_a_run_are_printed(encoding, tmp_path):
    model = Transfusion(num_text_tokens=4, transformer=dict(dim=8, depth=1, dim_head=4, heads=2))
    trainer = Trainer(model, [tensor([1, 2])], TrainConfig(steps=1, batch_size=1, device="cpu"), folder=tmp_path)
    assert printed(encoding, trainer.say, STORY) == SHOWN[encoding] + "\n"


@pytest.mark.parametrize("is_terminal", [False, True])
@in_every_encoding
def test_progress_is_written(encoding, is_terminal):
    stream = Stream(encoding)
    stream.isatty = lambda: is_terminal
    with ProgressReporter(3, file=stream) as progress:
        progress.write(STORY)
    assert SHOWN[encoding] in stream.text()


@in_every_encoding
def test_samples_of_the_command_are_printed(encoding, monkeypatch, tmp_path):
    monkeypatch.setattr(sample_command.Transfusion, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(sample_command, "PictureModel", lambda model: model)
    monkeypatch.setattr(sample_command, "samples", lambda *_: iter([("", STORY, None)]))
    folder = tmp_path / "猫"
    arguments = Namespace(num=1, prompts=[], image=[], device="cpu", model="", out=folder)
    lines = printed(encoding, sample_command.run, arguments).splitlines()
    assert lines == [SHOWN[encoding], f"written to {folder}" if encoding == "utf-8" else f"written to {tmp_path / '?'}"]
    assert (folder / "samples.txt").read_text(encoding="utf-8") == STORY + "\n"


# text that grows


def grow(ids, decode_text) -> tuple[list[str], str]:
    """What every id adds, and what is left at the end."""
    text = GrowingText(decode_text)
    return [text.add(id) for id in ids], text.end()


CYCLE = "The cat — 猫 — sat; né € 🐈‍⬛\n" * 9


@pytest.mark.parametrize(
    "content",
    [
        CYCLE.encode(),
        b"\xff" * 100,
        b"\xf0\x9f\x90" * 40 + "🐈".encode(),
        b"a" * (2 * CONTEXT - 2) + "🐈".encode() + b"b" * 40,
        b"a" * (2 * CONTEXT - 1) + b"\xe7\x8c",
        b"a\x00\x00b\r\nc\r",
    ],
    ids=["characters", "no text", "halves", "at the edge", "cut off", "control characters"],
)
def test_what_is_shown_is_the_whole_but_for_a_character_that_comes(content):
    text, shown = GrowingText(utf8), ""
    for place, byte in enumerate(content, 1):
        shown += text.add(byte)
        whole = decode(tensor(list(content[:place])), utf8)
        assert whole.startswith(shown)
        assert whole[len(shown) :] == "\ufffd" * (len(whole) - len(shown))
        assert len(whole) - len(shown) <= 3
    assert shown + text.end() == whole


@pytest.mark.parametrize("character", "aé猫🐈")
@pytest.mark.parametrize("before", range(2 * CONTEXT + 2))
def test_a_character_is_shown_with_its_last_byte(character, before):
    content = character.encode()
    pieces, rest = grow(b"x" * before + content, utf8)
    assert pieces == ["x"] * before + [""] * (len(content) - 1) + [character]
    assert rest == ""


def one_replacement_for_each_byte(ids: Tensor) -> str:
    """As byte-level tokenizers decode what is no UTF-8."""
    try:
        return bytes(ids.tolist()).decode()
    except UnicodeDecodeError as error:
        head = bytes(ids.tolist())
        return head[: error.start].decode() + "\ufffd" * (len(head) - error.start)


def test_bytes_that_wait_may_be_shown_one_by_one():
    pieces, rest = grow("a猫🐈b".encode(), one_replacement_for_each_byte)
    assert pieces == ["a", "", "", "猫", "", "", "", "🐈", "b"]
    assert rest == ""


WORDS = ["▁the", "▁cat", "s", "▁sat", "."]


def words(ids: Tensor) -> str:
    """As sentencepiece decodes: the space before the first word is left out."""
    return "".join(WORDS[id] for id in ids.tolist()).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize("decode_text", [words, None])
def test_the_text_of_an_id_may_depend_on_those_before_it(decode_text):
    ids = [0, 1, 2, 3, 4] * 20
    pieces, rest = grow(ids, decode_text)
    assert "".join(pieces) + rest == (decode_text or (lambda ids: " ".join(map(str, ids.tolist()))))(tensor(ids))


class Counting:
    """A decoder that counts its calls, the ids that it gets and the most at once."""

    def __init__(self):
        self.calls = self.ids = self.most = 0

    def __call__(self, ids: Tensor) -> str:
        self.calls, self.ids, self.most = self.calls + 1, self.ids + len(ids), max(self.most, len(ids))
        return utf8(ids)


@pytest.mark.parametrize("content", [b"x", b"\xff", "猫".encode()], ids=["letters", "no text", "characters"])
def test_the_work_for_an_id_does_not_grow_with_the_text(content):
    counts = {}
    for length in (300, 3000):
        counts[length] = Counting()
        grow((content * length)[:length], counts[length])
    assert counts[3000].most == counts[300].most <= 2 * CONTEXT
    assert counts[3000].calls < 1.2 * 3000
    assert counts[3000].ids / counts[300].ids == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_watch_decodes_a_text_once_and_not_for_every_id(where, monkeypatch):
    pages = []
    monkeypatch.setattr(live, "in_notebook", lambda: where == "notebook")
    monkeypatch.setattr(live, "TEXT_INTERVAL", 0.0)  # a notebook is brought up to date with every id
    display = SimpleNamespace(display=lambda data, **_: pages.append(data) or handle)
    handle = SimpleNamespace(update=lambda data, **_: pages.append(data))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    decode, length = Counting(), 1000
    watch(told("x" * length), decode_text=decode)
    assert decode.ids < length * 2 * CONTEXT + 2 * length
    assert len(pages) == (length + 1) * (where == "notebook")
