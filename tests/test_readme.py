"""The README and the guides are run as they stand: examples, in order, and the README's file tree against the files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md", "docs/training.md", "docs/data.md"])
def test_every_example_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "readme"})


def test_the_file_tree_names_every_module():
    for folder in ("", "sequence", "flow", "network", "generation", "display", "training", "modalities", "data"):
        for file in (ROOT / "transfusion_pytorch" / folder).glob("*.py"):
            assert file.name == "__init__.py" or re.search(rf"^ +{file.name} ", README, flags=re.MULTILINE), file


def test_every_picture_is_there():
    for picture in re.findall(r"!\[[^]]*]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
