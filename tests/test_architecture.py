"""Imports go down the floors of the house, never up, and never from one method to another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# What everybody may use, whatever the floor. `foveate.methods` itself is the registry (the rooms are below it in the
# tree and above it in the house): it imports no room until one is asked for.
GROUND = {
    "foveate",
    "foveate._auto",
    "foveate.checkpoints",
    "foveate.data.samples",
    "foveate.errors",
    "foveate.files",
    "foveate.methods",
    "foveate.processes",
}
FLOORS = ["ops", "language", "vision", "metrics", "data", "world", "training", "methods", "serving", "cli"]
MODULES = sorted((SOURCE / "foveate").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at any depth, except those that only type checkers see."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(other, path)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from foveate.methods import dynrefer` names a module, `from foveate.methods import load` does not.
                inner = SOURCE.joinpath(*origin.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield node.lineno, f"{origin}.{alias.name}" if is_module else origin
        else:
            yield from imports(node, path)


def height(module: str) -> int:
    """0 is the ground; a method's room is on the floor of the methods, whichever it is."""
    return 0 if module in GROUND else 1 + FLOORS.index(module.split(".")[1])


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["methods"] and len(parts) > 2 else None


def faults(source: str, path: Path) -> list[str]:
    importer = module_name(path)
    found = []
    for line, imported in imports(ast.parse(source), path):
        if imported.split(".")[0] != "foveate":
            continue
        where = f"{path.relative_to(SOURCE)}:{line}: {importer} imports {imported}"
        if height(imported) > height(importer):
            found.append(f"{where}, which is a floor above it")
        elif room(imported) and room(importer) and room(imported) != room(importer):
            found.append(f"{where}, which is another method's room")
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"), path)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("ops/boxes.py", "from foveate.vision import images", "a floor above"),
        ("data/coco.py", "from foveate.world.scenes import render_scene", "a floor above"),
        ("world/export.py", "from foveate.data import check_format", None),
        ("ops/boxes.py", "def f():\n    import foveate.training.runner", "a floor above"),
        ("data/visual_genome.py", "from ..training import recipes", "a floor above"),
        ("vision/images.py", "from foveate.methods.dynrefer.modeling import X", "a floor above"),
        ("methods/hired/modeling.py", "from foveate.methods.dynrefer.modeling import X", "another method"),
        ("methods/hired/modeling.py", "from ..dynrefer import modeling", "another method"),
        ("methods/hired/modeling.py", "from .configuration import X\nfrom foveate.ops import boxes", None),
        ("training/recipes.py", "def f():\n    from foveate.methods import method_module", None),
        ("cli/describe.py", "if TYPE_CHECKING:\n    from foveate.cli import x", None),
    ],
)
def test_the_check_itself_sees_a_fault(module: str, source: str, fault: str | None) -> None:
    found = faults(source, SOURCE / "foveate" / module)
    assert bool(found) == bool(fault)
    assert fault is None or fault in found[0]
