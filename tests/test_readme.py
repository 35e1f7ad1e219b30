"""The README is run as it stands: its examples, in order, and its file tree against the files."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})


def test_the_file_tree_names_every_module():
    for folder in ("", "sequence", "flow", "network", "generation", "training"):
        for file in (ROOT / "transfusion_pytorch" / folder).glob("*.py"):
            assert file.name == "__init__.py" or re.search(rf"^ +{file.name} ", README, flags=re.MULTILINE), file


def test_every_picture_is_there():
    for picture in re.findall(r"!\[[^]]*]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
