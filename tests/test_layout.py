"""Which room may call which: the import rules of docs/ARCHITECTURE.md, read from the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"passes", "ir"},
    "search": {"search", "passes", "ir", "backends.base", "backends.target"},
    "backends": {"backends", "ir"},
    "tools": {"tools", "search", "passes", "backends", "ir"},
}


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, as dotted names below the root."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names.add(".".join((*base, *(node.module or "").split("."))).strip("."))
            if not node.module:
                names.update(".".join((*base, alias.name)) for alias in node.names)
    return {name for name in names if name and name != "__version__"}  # the version stands at the root


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_only_run_downward(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        for name in imported(path):
            allowed = any(name == rule or name.startswith(f"{rule}.") for rule in MAY_IMPORT[room])
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_root_holds_exactly_what_the_design_says():
    tracked = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "__init__.py"}
    files = {p.name for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert files == tracked
