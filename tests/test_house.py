"""Imports run one way, between files and between wings (the folders of zs3/). No function is longer than a screen.

The tests read the import statements of the code, also those inside functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.py"), *(ROOT / "zs3").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
LONGEST = 60  # lines of a function


def module_of(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path, modules: set[str], root: Path) -> Iterator[str]:
    """The modules of the repository that a file imports. `from zs3.data import check` imports zs3.data.check."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                if name in modules or base in modules:
                    yield name if name in modules else base


def arrows(files: list[Path], root: Path) -> dict[str, set[str]]:
    modules = {module_of(file, root) for file in files}
    return {module_of(file, root): set(imported(file, modules, root)) for file in files}


def between_wings(graph: dict[str, set[str]], wings: set[str]) -> dict[str, set[str]]:
    """The same imports, but each wing counts as one module."""

    def room(module: str) -> str:
        return next((wing for wing in wings if module == wing or module.startswith(f"{wing}.")), module)

    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others if room(other) != room(module))
    return rooms


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one import cycle, in order, or None. Modules that import no other module are removed first."""
    graph = {name: set(others) for name, others in graph.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    if not graph:
        return None
    path = [next(iter(graph))]
    while (after := min(graph[path[-1]] & graph.keys())) not in path:
        path.append(after)
    return path[path.index(after) :]


def test_imports_between_files_run_one_way():
    graph = arrows(FILES, ROOT)
    assert graph["zs3.__main__"] == {"zs3.command_line"} and "losses_zs3" in graph["modeling_zs3"]
    assert circle(graph) is None


def test_imports_between_wings_run_one_way():
    """The __init__.py of a wing belongs to the wing. It may import another wing, as zs3.evaluation does."""
    wings = {f"zs3.{folder.name}" for folder in (ROOT / "zs3").iterdir() if any(folder.glob("*.py"))}
    assert {"zs3.data", "zs3.training", "zs3.evaluation"} <= wings
    assert circle(between_wings(arrows(FILES, ROOT), wings)) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "import b", "b": "import c", "c": "x = 1"}, None),
        ({"a": "import b", "b": "def f():\n    from c import x", "c": "import a"}, {"a", "b", "c"}),
        ({"a": "try:\n    from .b import x\nexcept ImportError:\n    from b import x", "b": "import a"}, {"a", "b"}),
        ({"p/one": "from p import two", "p/two": "from p.one import x", "p/__init__": ""}, {"p.one", "p.two"}),
    ],
)
def test_a_circle_is_found(files, expected, tmp_path):
    paths = [tmp_path / f"{name}.py" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = circle(arrows(paths, tmp_path))
    assert (found if found is None else set(found)) == expected


def test_a_circle_of_wings_is_found():
    graph = {"p.a.one": {"p.b.one"}, "p.b.one": set(), "p.b.two": {"p.a.two"}, "p.a.two": set()}
    assert circle(graph) is None
    assert set(circle(between_wings(graph, {"p.a", "p.b"}))) == {"p.a", "p.b"}


def test_no_function_is_longer_than_a_screen():
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST
    ]
    assert long == []
