"""Messages: what they may be, and what is said of the others."""

import re

import pytest
import torch
from chats import data_url, picture, png
from torch import tensor

from transfusion_pytorch import Latents
from transfusion_pytorch.conversations.messages import ImagePart, Message, ModalityPart, parse_learnable, parse_messages
from transfusion_pytorch.conversations.pictures import as_picture, load_image

ASKED = {"role": "user", "content": "What is this?"}


def test_messages_are_parsed():
    image, latents = picture(), Latents(1, torch.zeros(2, 3))
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "b.png"},
        {"type": "image", "image": image},
        {"type": "modality", "modality_type": 1, "data": latents},
    ]
    parsed = parse_messages([{"role": "user", "content": content}, {"role": "assistant", "content": "b", "weight": 0}])
    parts = ("a", ImagePart("a.png"), ImagePart("b.png"), ImagePart(image), ModalityPart(1, latents))
    assert parsed == [Message("user", parts, False), Message("assistant", ("b",), False)]
    assert parse_messages([{"role": "assistant", "content": []}])[0].is_learned


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("hello", TypeError, "a conversation is a list of messages, got str"),
        ({"role": "user"}, TypeError, "a conversation is a list of messages, got dict"),
        ([], ValueError, "the conversation is empty"),
        ([ASKED, "hello"], TypeError, 'message 1: expected {"role": ..., "content": ...}, got str'),
        ([{"role": "human", "content": "a"}], ValueError, "message 0: unknown role 'human', expected one of system,"),
        ([{"content": "a"}], ValueError, "message 0: unknown role None"),
        ([{"role": "user", "content": " "}], ValueError, "message 0 of the user is empty, expected text or an image"),
        ([{"role": "user", "content": []}], ValueError, "message 0 of the user is empty"),
        ([{"role": "user"}], TypeError, "message 0: content is a text or a list of parts, got NoneType"),
        ([ASKED | {"tool_calls": [1]}], ValueError, "message 0: tool calls cannot be learned"),
        ([ASKED | {"weight": 0.5}], ValueError, "message 0: the weight of a message is 0 (not learned) or 1, got 0.5"),
        ([ASKED | {"content": ["a"]}], ValueError, "message 0, part 0: expected a part of type text, image_url, image"),
        (
            [ASKED, ASKED | {"content": [{"type": "text", "text": "a"}, {"type": "audio"}]}],
            ValueError,
            "message 1, part 1: expected a part of type text, image_url, image, modality, got the type 'audio'",
        ),
        (
            [ASKED | {"content": [{"type": "text", "text": 3}]}],
            TypeError,
            "message 0, part 0: text is a string, got int",
        ),
        ([ASKED | {"content": [{"type": "image_url", "image_url": {}}]}], ValueError, "part 0: there is no image"),
        ([ASKED | {"content": [{"type": "image", "image": ""}]}], ValueError, "part 0: there is no image"),
        (
            [ASKED | {"content": [{"type": "modality", "modality_type": "x", "data": tensor(1.0)}]}],
            TypeError,
            "part 0: a modality has an int as its modality_type and a tensor or Latents as its data, got str",
        ),
        ([ASKED | {"content": "a\ufdd2b"}], ValueError, "message 0: the text has a character from U+FDD0 to U+FDEF"),
    ],
)
def test_others_are_refused(messages, error, message):
    with pytest.raises(error, match=re.escape(message)):
        parse_messages(messages)


def test_what_can_be_learned():
    with pytest.raises(ValueError, match="no message of the assistant is to be learned: the roles are user"):
        parse_learnable([ASKED])
    with pytest.raises(ValueError, match="message 1 of the assistant is empty"):
        parse_learnable([ASKED, {"role": "assistant", "content": ""}])
    assert parse_learnable([{"role": "assistant", "content": "a"}])[0].is_learned


# images


def test_sources_of_images(tmp_path):
    from chats import data_url

    file = tmp_path / "a b.png"
    file.write_bytes(png())
    for source in (file, str(file), file.as_uri(), png(), bytearray(png()), data_url(), png):
        assert load_image(source) == png()
    assert load_image("a b.png", root=tmp_path) == png()
    assert load_image(str(file), root=tmp_path / "elsewhere") == png()
    assert load_image("https://a.org/b.png", fetch=lambda address: address.encode()) == b"https://a.org/b.png"
    image, pixels = picture(), torch.zeros(2, 2, 3)
    assert load_image(image) is image
    assert load_image(pixels) is pixels


def test_data_urls_of_every_usual_kind_are_read():
    header, _, digits = data_url().partition(",")
    for address in (
        f"{header},{digits[:20]}\n{digits[20:60]}\r\n{digits[60:]}\n",
        f"{header}, {digits}",
        f" {header},{digits}",
        f"{header.upper()},{digits}",
        f"{header},{digits.rstrip('=')}",
        f"{header},{digits.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        f"{header},{digits.replace('+', '-').replace('/', '_')}",
        f"data:image/png;charset=utf-8;base64,{digits}",
    ):
        assert load_image(address) == png(), address


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("https://a.org/b.png", ValueError, "the image https://a.org/b.png is on the internet, and nothing is loaded"),
        ("ftp://a.org/b.png", ValueError, "expected a path, a file: or a data: URL, got ftp:"),
        ("data:image/png,abc", ValueError, 'expected "data:image/png;base64,...", got data:image/png,abc'),
        ("data:image/png;base64,!", ValueError, "the data URL data:image/png;base64 is no base64"),
        ("missing.png", FileNotFoundError, "there is no image file missing.png"),
        (torch.zeros(2, dtype=torch.uint8), TypeError, "in floating point, got torch.uint8"),
        (3, TypeError, "an image is a path, a data URL, bytes, a Pillow image or a tensor, got int"),
    ],
)
def test_what_is_no_source(source, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load_image(source)


@pytest.mark.parametrize(
    ("shape", "first", "mode", "size"),
    [
        ((2, 5, 3), False, "RGB", (5, 2)),
        ((2, 5, 1), False, "L", (5, 2)),
        ((3, 2, 5), True, "RGB", (5, 2)),
        ((3, 2, 5), False, "RGB", (5, 2)),  # only its first axis can be channels
        ((3, 2, 1), True, "RGB", (1, 2)),
        ((3, 2, 1), False, "L", (2, 3)),
    ],
)
def test_tensors_as_pictures(shape, first, mode, size):
    image = as_picture(torch.full(shape, 2.0), channels_first=first)
    assert (image.mode, image.size) == (mode, size)
    assert set(image.tobytes()) == {255}


def test_pixels_of_pictures():
    values = tensor([-1.0, 0.0, 1.0, -3.0, float("nan"), 0.5]).reshape(1, 2, 3)
    assert list(as_picture(values).tobytes()) == [0, 128, 255, 0, 128, 191]
    assert list(as_picture(values.movedim(-1, 0), channels_first=True).tobytes()) == [0, 128, 255, 0, 128, 191]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 4), (1, 2, 2, 3), (0, 2, 3)])
def test_other_tensors_are_no_pictures(shape):
    assert as_picture(torch.zeros(shape)) is None
