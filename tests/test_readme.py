"""The README and the guides are run as they stand: examples, in order, and the list of files against the files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README, FILES = ((ROOT / page).read_text() for page in ("README.md", "docs/files.md"))


PAGES = [
    "README.md",
    "docs/generation.md",
    "docs/training.md",
    "docs/saving.md",
    "docs/data.md",
    "docs/conversations.md",
    "docs/mmdit.md",
    "docs/policy.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_every_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "readme"})


def test_the_file_tree_names_every_module():
    package = ROOT / "transfusion_pytorch"
    rooms = [file.parent for file in package.glob("*/__init__.py") if file.parent.name != "examples"]
    for folder in [package, *rooms]:
        for file in folder.glob("*.py"):
            assert file.name == "__init__.py" or re.search(rf"^ +{file.name} ", FILES, flags=re.MULTILINE), file


def test_every_picture_is_there():
    for picture in re.findall(r"!\[[^]]*]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
