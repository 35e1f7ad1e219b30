"""Text that is decoded while its ids come, without decoding all of it again for each."""

from typing import Any

import torch

from transfusion_pytorch.display.lines import decode

CONTEXT = 16  # ids before an id that its text may depend on: a space before a word, the bytes of a character
INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character, one or one for each byte
MOST_INCOMPLETE = 3  # bytes of a UTF-8 character before its last


class GrowingText:
    """Text that grows by ids. Each addition decodes the last ids only, at most twice `CONTEXT`, whatever the length.

    `ids` are all so far. The last of them, `window`, are decoded, and `shown` characters of their text were returned.
    """

    def __init__(self, decode_text: Any) -> None:
        self.decode_text = decode_text
        self.ids: list[int] = []
        self.window: list[int] = []
        self.shown = 0

    def add(self, id: int) -> str:
        """The characters that are new. What may still be a part of a character waits until that is whole."""
        self.ids.append(id)
        self.window.append(id)
        text = self._decoded()
        settled = max(len(text.rstrip(INCOMPLETE)), len(text) - MOST_INCOMPLETE)
        new, self.shown = text[self.shown : settled], max(self.shown, settled)
        if len(self.window) == 2 * CONTEXT:
            waiting = len(text) - self.shown
            self.window = self.window[CONTEXT:]
            self.shown = max(len(self._decoded()) - waiting, 0)
        return new

    def end(self) -> str:
        """The characters that waited. The next id starts another text."""
        rest = self._decoded()[self.shown :] if self.window else ""
        self.ids, self.window, self.shown = [], [], 0
        return rest

    def _decoded(self) -> str:
        return decode(torch.tensor(self.window, device="cpu"), self.decode_text)
