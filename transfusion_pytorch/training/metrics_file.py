"""The figures of a run as a table: `metrics.csv`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from transfusion_pytorch.saving.files import whole_file

STEP = "step"

Row = dict[str, str]


class MetricsFile:
    """A CSV file with a row for each step that is logged, readable at any moment.

    Without `resumed_step` it starts anew. With it, rows of later steps are cut off, and columns that only those had:
    a resumed run then writes the file that an undisturbed one would have written.

    Raises `ValueError` where the file to go on with is something else.
    """

    def __init__(self, path: str | Path, *, resumed_step: int | None = None) -> None:
        self.path = Path(path)
        self.columns: list[str] = [STEP]
        rows = [] if resumed_step is None else self._read_until(resumed_step)
        self._rewrite(rows)

    def append(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Adds a row. A name that is new becomes a column, empty in the rows before; None is empty, too."""
        row = {STEP: str(step), **{name: _as_text(value) for name, value in values.items()}}
        if new := [name for name in row if name not in self.columns]:
            rows = self._read()
            self.columns += new
            self._rewrite([*rows, row])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_as_csv([_cells(row, self.columns)]))

    def _rewrite(self, rows: Sequence[Row]) -> None:
        with whole_file(self.path) as partial:
            lines = [self.columns, *(_cells(row, self.columns) for row in rows)]
            partial.write_text(_as_csv(lines), encoding="utf-8", newline="")

    def _read_until(self, step: int) -> list[Row]:
        if not self.path.exists():
            return []
        try:
            rows = [row for row in self._read() if int(row[STEP]) <= step]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is not the metrics of a run, which have a column of steps") from error
        used = {name for row in rows for name, value in row.items() if value}
        self.columns = [name for name in self.columns if name in used or name == STEP]
        return rows

    def _read(self) -> list[Row]:
        """All rows but those that a killed process or a full disk did not finish."""
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        self.columns = lines[0] if lines else [STEP]
        whole = [line for line in lines[1:] if len(line) == len(self.columns)]
        return [dict(zip(self.columns, line, strict=True)) for line in whole]


def _as_text(value: float | int | str | None) -> str:
    """Floats with all their digits, and texts on one line, as a row is one."""
    return "" if value is None else value.replace("\n", " ") if isinstance(value, str) else repr(value)


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [row.get(name, "") for name in columns]


def _as_csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
