"""Printing text that a model wrote, or a user named, on terminals that cannot show every character."""

import sys
from typing import Any


def print_text(text: str = "", *, end: str = "\n", file: Any = None, flush: bool = False) -> None:
    """`print`, but characters that the stream cannot encode become question marks instead of an error.

    Windows consoles and pipes (cp1252) and the C locale (ascii) raise `UnicodeEncodeError` for them. `file` is the
    standard output by default.
    """
    stream = sys.stdout if file is None else file
    print(printable(text, stream), end=end, file=stream, flush=flush)


def printable(text: str, stream: Any) -> str:
    """`text` as `stream` can write it: unchanged where its encoding and error handler take it all, or where it has no
    encoding (`io.StringIO`).
    """
    encoding = getattr(stream, "encoding", None)
    if encoding is None:
        return text
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
    except UnicodeEncodeError:
        return text.encode(encoding, "replace").decode(encoding)
    return text
