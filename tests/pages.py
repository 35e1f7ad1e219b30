"""What tests of the display share: HTML as a browser would see it, and text whose ids are characters."""

from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy
import pytest
import torch
from checks import TYPECHECK
from torch import Tensor, tensor

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")


def refused(message: str):
    """A `TypeError` with this message, or with that of the type checker, which is faster."""
    return pytest.raises(TypeError, match=None if TYPECHECK else message)


def letters(ids: Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


def ids_of(text: str) -> Tensor:
    return tensor([ord(letter) for letter in text])


class Page(HTMLParser):
    """What a browser would make of HTML: `seen` has texts and images in their order. Unbalanced tags are an error."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.seen, self.images, self.tags = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
            self.seen.append(self.picture(-1))
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.seen.append(data)

    def picture(self, index):
        kind, data = self.images[index]["src"].split(",")
        assert kind == "data:image/png;base64"
        return Image.open(BytesIO(b64decode(data, validate=True)))

    def pixels(self, index=0) -> Tensor:
        """(h, w) or (h, w, c)."""
        return torch.from_numpy(numpy.array(self.picture(index)))

    @property
    def texts(self):
        return [item for item in self.seen if isinstance(item, str)]

    def first_pixels(self):
        """Texts as they are, and of each image the pixel at its upper left."""
        return [item if isinstance(item, str) else item.getpixel((0, 0)) for item in self.seen]
