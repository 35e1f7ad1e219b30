"""The page of the GPU benchmark: sections of rows, written again after every row, so that a run that is cut off keeps
what it has.
"""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRACEBACK_LINES = 30


@dataclass
class Section:
    """A heading, what its figures mean, and a table whose columns are the keys of its rows."""

    title: str
    lead: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def markdown(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [f"## {self.title}", "", self.lead, ""]
        if self.rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


@dataclass
class Page:
    """`gpu.md` and `gpu.json` in a folder, and copies in `$OUT` if that is set."""

    folder: Path
    started: float = field(default_factory=time.monotonic)
    sections: list[Section] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)

    def section(self, title: str, lead: str) -> Section:
        """Begins a section, or finds the one of that title."""
        for section in self.sections:
            if section.title == title:
                return section
        self.sections.append(Section(title, lead))
        return self.sections[-1]

    def add(self, section: Section, **row: Any) -> None:
        section.rows.append(row)
        figures = ", ".join(f"{key} {cell(value)}" for key, value in row.items() if value is not None)
        print(f"[{time.monotonic() - self.started:5.0f} s] {section.title}: {figures}", flush=True)
        self.write()

    def add_quietly(self, section: Section, rows: list[dict[str, Any]]) -> None:
        """Rows that are on the page, and not printed."""
        section.rows += rows
        self.write()

    def attempt(self, what: str, work: Callable[[], Any]) -> tuple[Any, str | None]:
        """What `work` returns, or one line that says why it failed. The traceback goes to the end of the page."""
        try:
            return work(), None
        except Exception as error:
            text = "".join(traceback.format_exception(error)).replace(f"{ROOT}/", "")
            tail = "\n".join(text.splitlines()[-TRACEBACK_LINES:])
            self.tracebacks.append(f"{what}\n{tail}")
            return None, error_line(error)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "# On a GPU\n\n" + "\n".join(section.markdown() for section in self.sections)
        if self.tracebacks:
            text += "\n## Tracebacks\n\n" + "\n".join(f"```\n{each}\n```\n" for each in self.tracebacks)
        (self.folder / "gpu.md").write_text(text)
        sections = {section.title: section.rows for section in self.sections}
        everything = dict(sections=sections, tracebacks=self.tracebacks)
        (self.folder / "gpu.json").write_text(json.dumps(everything, indent=1, default=str) + "\n")
        self.copy_out("gpu.md", "gpu.json")

    def copy_out(self, *names: str) -> None:
        """Copies files of the folder to `$OUT`."""
        out = os.environ.get("OUT")
        for name in names if out else ():
            if (target := Path(out) / name) != self.folder / name:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, target)


def error_line(error: BaseException) -> str:
    """The last line of a traceback (the first of its message), and the innermost place in this repository."""
    message = traceback.format_exception_only(error)[-1] if not str(error) else f"{type(error).__name__}: {error}"
    line = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "transfusion_pytorch" in frame.filename]
    place = f" ({short_path(ours[-1].filename)}:{ours[-1].lineno})" if ours else ""
    return line[:200] + place


def short_path(path: str) -> str:
    """Without what comes before the package: no names of users and folders on a page."""
    for root in ("transfusion_pytorch/", "benchmarks/", "torch/"):
        if root in path:
            return root + path.split(root, 1)[1]
    return Path(path).name


def cell(value: Any) -> str:
    """A figure with three digits that count; what has no figure is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if value != 0 and not 1e-3 <= abs(value) < 1e6:
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
