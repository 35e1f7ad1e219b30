"""The architecture, held by reading the source: who may import whom, and how long things may get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

NAME = "transfusion_pytorch"
PACKAGE = Path(__file__).parents[1] / NAME

# The rooms in their order, and what each may import of those above it besides itself: a room, or one module of a room.
# A file beside the rooms is a room of its own; `transfusion` wires them, `__init__` is the front door of the package.
# A module that stands above its room has an entry too: sampling shows the bar of `display.progress`, and the rest of
# `display` shows what was generated; a model is saved with its `ChatTokenizer`, and other conversations need data.
ALLOWED = {
    "typecheck": [],
    "sequence": [],
    "evaluating": [],
    "failures": [],
    "saving.files": [],
    "saving.tokenizer": ["saving.files"],
    "conversations.templates": [],
    "conversations.tokenizer": ["conversations.templates", "saving.tokenizer"],
    "saving": ["conversations.tokenizer"],
    "flow": ["saving.components"],
    "network": ["evaluating", "sequence.masks", "sequence.positions", "sequence.blocks", "saving.components"],
    "mmdit": ["sequence.positions", "network", "saving"],
    "modalities": ["sequence", "flow", "network", "saving.components"],
    "display.terminal": [],
    "display.progress": [],
    "generation": [
        "sequence",
        "flow",
        "evaluating",
        "failures",
        "display.progress",
        "network.precision",
        "network.step_graph",
        "network.conditions",
        "network.cpu.reordered",
    ],
    "sampling": ["generation", "evaluating", "sequence"],
    "display": ["generation.events"],
    "serving": ["failures", "generation.engine", "generation.events", "generation.options", "sampling"],
    "data": ["sequence", "modalities", "saving"],
    "conversations": ["sequence", "modalities", "saving", "data", "generation"],
    "training": [
        "sequence",
        "display.terminal",
        "flow",
        "network",
        "modalities.latents",
        "evaluating",
        "saving",
        "data",
    ],
    "batching": ["sequence", "modalities"],
    "autoencoder": [
        "sequence.samples",
        "evaluating",
        "saving",
        "network",
        "modalities",
        "display.terminal",
        "data",
        "training",
    ],
    "forwarding": ["sequence", "flow", "modalities", "network"],
    "pretrained": ["network", "modalities", "saving", "conversations.tokenizer", "data.optional", "data.images"],
    "pretrained.autoencoders": ["pretrained.files", "modalities", "saving", "data.optional", "autoencoder.halves"],
}
ALLOWED["transfusion"] = list(ALLOWED)
ALLOWED["policy"] = [
    "sequence.samples",
    "flow",
    "evaluating",
    "network.precision",
    "saving",
    "mmdit",
    "display.terminal",
    "data",
    "training",
    "transfusion",
]
ALLOWED["examples"] = [
    "policy",
    "autoencoder",
    "data",
    "conversations",
    "modalities.unet",
    "pretrained",
    "saving.files",
    "saving.adapters",
    "saving.card",
    "sequence.samples",
    "training.config",
    "training.launch",
    "training.schedule",
    "transfusion",
]
ALLOWED["commands"] = [
    "display.terminal",
    "display.lines",
    "data",
    "modalities",
    "saving",
    "training.trainer",
    "transfusion",
]
ALLOWED["__main__"] = ["commands"]
ALLOWED["__init__"] = list(ALLOWED)

LONGEST_FILE = 450
LONGEST_NESTED_FUNCTION = 15


def imports(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import of the package by one of its files, wherever in the file it stands."""
    here = [NAME, *file.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        inside = [dotted.split(".")[1:] for dotted in found if dotted.split(".")[0] == NAME]
        yield from ((node.lineno, module) for module in sorted({longest_module(parts, package) for parts in inside}))


def longest_module(parts: list[str], package: Path) -> str:
    """The part of a dotted name that is a module: [network, attention, attend] -> network.attention."""
    while parts and not (package.joinpath(*parts).is_dir() or package.joinpath(*parts).with_suffix(".py").is_file()):
        parts = parts[:-1]
    return ".".join(parts) or "__init__"


def violations(package: Path) -> list[str]:
    """One line for each import that the rule forbids, and for each room that has no rule."""
    lines = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package)
        parts = name.with_suffix("").parts
        if parts[0] not in ALLOWED:
            lines.append(f"{name}: the room '{parts[0]}' has no rule; say in ALLOWED what it may import")
            continue
        dotted = ".".join(parts)
        room = dotted if dotted in ALLOWED else parts[0]
        may = [room, *ALLOWED[room]]
        for line, module in imports(file, package):
            if not any(f"{module}.".startswith(f"{entry}.") for entry in may):
                lines.append(f"{name}:{line} imports {module}; {room} may import only {', '.join(may)}")
    return lines


def nested_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for outer in ast.walk(tree):
        if isinstance(outer, functions):
            yield from (node for node in ast.walk(outer) if isinstance(node, functions) and node is not outer)


def excesses(package: Path) -> list[str]:
    """One line for each file or nested function that is too long, and for each `nonlocal`."""
    lines = []
    for file in sorted(package.rglob("*.py")):
        name, source = file.relative_to(package), file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        if (length := len(source.splitlines())) > LONGEST_FILE:
            lines.append(f"{name} has {length} lines; split it: at most {LONGEST_FILE}")
        for node in nested_functions(tree):
            if (length := node.end_lineno - node.lineno + 1) > LONGEST_NESTED_FUNCTION:
                limit = f"a nested function has at most {LONGEST_NESTED_FUNCTION}"
                lines.append(f"{name}:{node.lineno} {node.name} has {length} lines; {limit}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Nonlocal):
                lines.append(f"{name}:{node.lineno} nonlocal {', '.join(node.names)}; return it, or use an object")
    return lines


def plant(package: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    return package


ROOMS = {
    "__init__.py": "from .transfusion import Transfusion",
    "transfusion.py": f"from {NAME}.network.attention import attend\nfrom .sequence import stream",
    "sequence/__init__.py": "from .stream import TokenStream",
    "sequence/stream.py": "from . import masks\nimport torch",
    "sequence/masks.py": "",
    "flow/__init__.py": "",
    "flow/path.py": "",
    "typecheck.py": "",
    "network/__init__.py": "",
    "network/layer.py": f"from {NAME}.sequence.masks import Layout\nfrom {NAME}.sequence import masks",
}


def test_imports_go_one_way():
    assert not (found := violations(PACKAGE)), "\n".join(found)


def test_rule_names_only_rooms_above():
    rooms = list(ALLOWED)
    for place, room in enumerate(rooms):
        for entry in ALLOWED[room]:
            is_above = any(f"{entry}.".startswith(f"{above}.") for above in rooms[:place])
            assert is_above, f"{room} may not import {entry}: it does not stand above it"


def test_allowed_imports_pass(tmp_path):
    assert violations(plant(tmp_path, ROOMS)) == []


@pytest.mark.parametrize(
    ("file", "source", "line", "imported"),
    [
        ("network/layer.py", f"import torch\nfrom {NAME}.flow.path import interpolate", 2, "flow.path"),
        ("network/layer.py", "from ..flow import path", 1, "flow.path"),
        ("network/layer.py", "from .. import flow", 1, "flow"),
        ("network/layer.py", f"from {NAME}.flow.path import interpolate, estimate_clean", 1, "flow.path"),
        ("network/layer.py", f"import {NAME}.flow.path as path", 1, "flow.path"),
        ("network/layer.py", f"def late():\n    from {NAME}.flow import path", 2, "flow.path"),
        ("network/layer.py", f"from {NAME}.sequence import TokenStream", 1, "sequence"),
        ("network/layer.py", f"from {NAME}.sequence.stream import TokenStream", 1, "sequence.stream"),
        ("network/__init__.py", "from ..flow.path import interpolate", 1, "flow.path"),
        ("flow/path.py", f"from {NAME} import Transfusion", 1, "__init__"),
        ("flow/path.py", f"import {NAME}", 1, "__init__"),
        ("typecheck.py", "from .sequence import masks", 1, "sequence.masks"),
        ("transfusion.py", f"from {NAME} import __version__", 1, "__init__"),
    ],
)
def test_forbidden_import_is_caught(tmp_path, file, source, line, imported):
    (found,) = violations(plant(tmp_path, ROOMS | {file: source}))
    room = Path(file).parts[0].removesuffix(".py")
    assert found.startswith(f"{file}:{line} imports {imported}; {room} may import only {room}")


def test_room_without_a_rule_is_caught(tmp_path):
    (found,) = violations(plant(tmp_path, ROOMS | {"attic/boxes.py": ""}))
    assert found.startswith("attic/boxes.py: the room 'attic' has no rule")


def test_module_with_a_rule_of_its_own_is_held_to_it(tmp_path):
    files = {"display/lines.py": "", "display/progress.py": "from .lines import spell", "generation/engine.py": ""}
    (found,) = violations(plant(tmp_path, ROOMS | files))
    assert found == "display/progress.py:1 imports display.lines; display.progress may import only display.progress"
    files = {"display/lines.py": "from .progress import Bar", "display/progress.py": "import tqdm"}
    files["generation/engine.py"] = f"from {NAME}.display.progress import Bar\nfrom {NAME}.display import lines"
    (found,) = violations(plant(tmp_path, ROOMS | files))
    assert found.startswith("generation/engine.py:2 imports display.lines; generation may import only ")


def test_files_and_nested_functions_are_short():
    assert not (found := excesses(PACKAGE)), "\n".join(found)


def nest(lines: int) -> str:
    """A method with a function of that many lines inside."""
    return "class A:\n  def f(self):\n    def g():\n" + "      pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("fits", "exceeds", "message"),
    [
        ("pass\n" * LONGEST_FILE, "pass\n" * (LONGEST_FILE + 1), f"a.py has {LONGEST_FILE + 1} lines"),
        (nest(LONGEST_NESTED_FUNCTION), nest(LONGEST_NESTED_FUNCTION + 1), "a.py:3 g has 16 lines"),
        ("def f():\n  x = 1\n  return x\n", "def f():\n  x = 1\n  def g():\n    nonlocal x\n", "a.py:4 nonlocal x"),
    ],
)
def test_excess_is_caught(tmp_path, fits, exceeds, message):
    assert excesses(plant(tmp_path, {"a.py": fits})) == []
    (found,) = excesses(plant(tmp_path, {"a.py": exceeds}))
    assert found.startswith(message)
