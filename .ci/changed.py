"""Run the fast tests that belong to the changed files named on the command line.

A test file stands for itself; a file of a room (transfusion_pytorch/<room>/) is tested by
tests/test_<room>*.py and the architecture test. Whatever else has changed is tested by everything.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TEST_RAN = 5  # pytest's exit status where all that was selected is marked slow


def tests_of(changed: str, root: Path) -> set[str] | None:
    """The test files of one changed file, both relative to the root; None means all of them."""
    path = Path(changed)
    if path.parts[0] == "tests" and path.name.startswith("test_"):
        return {path.as_posix()}
    if path.parts[0] == "transfusion_pytorch" and len(path.parts) > 2:
        of_room = {file.relative_to(root).as_posix() for file in root.glob(f"tests/test_{path.parts[1]}*.py")}
        return of_room | {"tests/test_architecture.py"} if of_room else None
    return None


def select(changed: Iterable[str], root: Path = ROOT) -> list[str]:
    """The test files to hand to pytest; an empty list means the whole suite."""
    chosen = [tests_of(file, root) for file in changed]
    return [] if None in chosen else sorted(set().union(*chosen))


def main() -> int:
    status = subprocess.call([sys.executable, "-m", "pytest", "-q", *select(sys.argv[1:])], cwd=ROOT)
    return 0 if status == NO_TEST_RAN else status


if __name__ == "__main__":
    sys.exit(main())
