"""Records of a JSON file, read one by one, each with its line for messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where a record is: its first byte, the byte behind its last, and its line, counted from 1."""

    start: int
    end: int
    line: int


class Records:
    """The objects of a JSON array, or of a file with one on each line (JSON Lines).

    The file is searched once; only places are kept, so that many records need little memory. Raises
    `FileNotFoundError`, and `ValueError` that names file and line where it is malformed: of an array when it is opened,
    of lines when they are read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        with self.path.open("rb") as file:
            is_array = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["
        places = list(self._in_array() if is_array else self._in_lines())
        self._places = torch.tensor(places, dtype=torch.int64, device="cpu")  # 24 bytes each
        if not places:
            raise ValueError(f"{self.path} has no records, expected a JSON array or a JSON object on each line")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self._place(index)
        with self.path.open("rb") as file:
            file.seek(place.start)
            data = file.read(place.end - place.start)
        try:
            record = json.loads(data.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{self.describe(index)} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.describe(index)}: expected a JSON object, got a {type(record).__name__}")
        return record

    def describe(self, index: int) -> str:
        return f"{self.path}, line {self._place(index).line}"

    def _place(self, index: int) -> Place:
        return Place(*self._places[index].tolist())

    def _in_lines(self) -> Iterator[Place]:
        start = 0
        with self.path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                end = start + len(data)
                if data.removeprefix(BYTE_ORDER_MARK).strip():
                    yield Place(start, end, line)
                start = end

    def _in_array(self) -> Iterator[Place]:
        data = self.path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8: {error}") from error
        decoder, byte, line, last = json.JSONDecoder(), 0, 1, 0
        position = text.index("[") + 1
        while (position := _after_white_space(text, position)) < len(text) and text[position] != "]":
            byte, line = byte + len(text[last:position].encode()), line + text.count("\n", last, position)
            try:
                _, end = decoder.raw_decode(text, position)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{self.path}, record that begins on line {line}: no JSON: {error}") from error
            length = len(text[position:end].encode())
            yield Place(byte, byte + length, line)
            byte, line, last = byte + length, line + text.count("\n", position, end), end
            position = _after_white_space(text, end)
            if text[position : position + 1] not in (",", "]"):
                self._refuse(line, "the array is cut off, expected a comma or a bracket")
            position += text[position] == ","
        if position == len(text):
            self._refuse(line, "the array is cut off, expected a record or a bracket")
        rest = _after_white_space(text, position + 1)
        if rest < len(text):
            line += text.count("\n", last, rest)
            self._refuse(
                line, f"{text[rest : rest + 40]!r} follows the array: a file has one, or an object on each line"
            )

    def _refuse(self, line: int, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}, line {line}: {problem}")


def _after_white_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
