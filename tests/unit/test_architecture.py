"""The order of the rooms, and what may be imported on the rescue path (docs/architecture.md)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crashkernel

PACKAGE = "crashkernel"
ROOT = Path(crashkernel.__file__).parent

# From the ground up. A module imports from its own storey and from lower ones, never from a higher one.
STOREYS = (
    ("errors",),
    ("memory",),
    ("formats",),
    ("machine",),
    ("placement",),
    ("purgatory",),
    ("loader", "quarantine", "vmcore", "target"),
    ("capture",),
    ("dump", "report"),
    ("drill",),
    ("bench", "campaign"),
    ("cli", "__main__"),
)
HEIGHT = {room: height for height, rooms in enumerate(STOREYS) for room in rooms}

# Everything else starts on a bare Python in an initramfs, but that a capture has numpy: it is imported when one begins.
ENGINEERS_ROOMS = {"drill", "bench", "campaign"}
FOREIGN = {room: {"numpy"} for room in ("vmcore", "capture", "dump")} | {"target": set()}

MODULES = {
    ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", MODULES)


def room_of(module: str) -> str:
    """The room of a module of ours; the package itself, which holds the version, is ''."""
    return module.partition(".")[2].partition(".")[0]


def statements(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that `tree` imports; `from crashkernel import memory` counts as that module."""
    parents = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            name = ".".join((*base, *([node.module] if node.module else [])))
            if name == PACKAGE:
                yield from (f"{name}.{alias.name}" for alias in node.names)
            else:
                yield name


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions and of `if TYPE_CHECKING`: what runs on import."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.copy_location(ast.Pass(), node)

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):
            self.generic_visit(node)
            checking = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            return node.orelse or ast.copy_location(ast.Pass(), node) if checking else node

    return Strip().visit(tree)


def parse(module: str) -> ast.Module:
    path = MODULES[module]
    return ast.parse(path.read_text(), filename=str(path))


@every_module
def test_has_a_place_in_the_house(module):
    assert not room_of(module) or room_of(module) in HEIGHT, f"give {room_of(module)} a storey"


@every_module
def test_imports_only_from_its_own_storey_or_below(module):
    height = HEIGHT.get(room_of(module), -1)
    imported = {name for name in statements(module, parse(module)) if name.split(".")[0] == PACKAGE}
    rooms = {room_of(name) for name in imported} - {"", "__version__"}
    above = {room for room in rooms if HEIGHT[room] > height}
    assert not above, f"{module} imports from {', '.join(sorted(above))}"


@pytest.mark.parametrize("module", [each for each in MODULES if room_of(each) not in ENGINEERS_ROOMS])
def test_starts_on_a_bare_python(module):
    imported = {name.split(".")[0] for name in statements(module, module_level(parse(module)))}
    foreign = imported - sys.stdlib_module_names - {PACKAGE} - FOREIGN.get(room_of(module), set())
    assert not foreign, f"{module} imports {', '.join(sorted(foreign))} at module level"


@pytest.mark.parametrize("module", [each for each in MODULES if room_of(each) not in ENGINEERS_ROOMS | set(FOREIGN)])
def test_does_not_bring_numpy_along(module):
    imported = {room_of(name) for name in statements(module, module_level(parse(module))) if name.startswith(f"{PACKAGE}.")}
    assert not imported & set(FOREIGN), f"{module} imports {', '.join(sorted(imported))} at module level"


@pytest.mark.parametrize(
    ("source", "everywhere", "on_import"),
    [
        ("import crashkernel.drill.twin as t", {"crashkernel.drill.twin"}, {"crashkernel.drill.twin"}),
        (
            "from crashkernel import cli, errors",
            {"crashkernel.cli", "crashkernel.errors"},
            {"crashkernel.cli", "crashkernel.errors"},
        ),
        ("from crashkernel.formats import elf", {"crashkernel.formats"}, {"crashkernel.formats"}),
        ("from . import fdt", {"crashkernel.formats"}, {"crashkernel.formats"}),
        ("from ..memory import Range", {"crashkernel.memory"}, {"crashkernel.memory"}),
        ("def f():\n import numpy", {"numpy"}, set()),
        ("class C:\n async def f(self):\n  import numpy", {"numpy"}, set()),
        ("try:\n import numpy\nexcept ImportError:\n pass", {"numpy"}, {"numpy"}),
        ("if TYPE_CHECKING:\n import numpy\nelse:\n import array", {"numpy", "array"}, {"array"}),
    ],
)
def test_the_test_sees_every_kind_of_import(source, everywhere, on_import):
    module = f"{PACKAGE}.formats.elf"
    assert set(statements(module, ast.parse(source))) == everywhere
    assert set(statements(module, module_level(ast.parse(source)))) == on_import
