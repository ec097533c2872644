"""The wall: what is copied beside the weights runs with torch, transformers and itself alone, read from the source.
And what is installed, and that nothing needs a module which only some systems have."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HUB_HALF = tuple(sorted(path.stem for path in ROOT.glob("*_zs3.py")))
ALLOWED = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
OPTIONAL = {"scipy"}
MODULES = [
    *HUB_HALF,
    "train",
    "eval",
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "zs3").rglob("*.py"))),
]
IMPORT_ALL = """
import importlib, sys
import accelerate, datasets, evaluate, filelock, huggingface_hub, PIL.Image, psutil, torch, transformers.pipelines

for name in ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        print(name, "imported")
    except ImportError as error:
        print(name, error)
"""


def imports(tree: ast.AST, inside_try: bool = False):
    """(module, level, inside_try) of every import statement, wherever it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, inside_try) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.level, inside_try
        if isinstance(node, ast.Try):
            for part in node.body:
                yield from imports(ast.Module([part], []), inside_try=True)
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                yield from imports(ast.Module([part], []), inside_try)
        else:
            yield from imports(node, inside_try)


def offences(source: str) -> list[str]:
    """What a Hub-half file may not import, in words."""
    found = []
    tree = ast.parse(source)
    in_handlers = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        for name, level, _ in imports(node)
        if level == 0
    }
    for module, level, inside_try in imports(tree):
        if level:  # transformers copies `from .module import name` and nothing else
            if level != 1 or module not in HUB_HALF:
                found.append(f"relative import of {'.' * level}{module}")
            elif not inside_try:
                found.append(f"relative import of .{module} outside try")
            continue
        top = module.split(".")[0]
        if top in OPTIONAL and not inside_try:
            found.append(f"{module} outside try")
        elif top in HUB_HALF and module not in in_handlers:
            found.append(f"absolute import of {module} outside except ImportError")
        elif top not in ALLOWED | OPTIONAL | set(HUB_HALF):
            found.append(module)
    return found


@pytest.mark.parametrize("name", HUB_HALF)
def test_a_hub_half_file_imports_only_what_a_stranger_has(name):
    assert offences((ROOT / f"{name}.py").read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import scipy",
        "from scipy.optimize import linear_sum_assignment",
        "def f():\n    import datasets",
        "try:\n    import torchvision\nexcept ImportError:\n    pass",
        "from zs3.data import load_split",
        "import train",
        "from . import losses_zs3",
        "from .zs3.data import load_split",
        "from .losses_zs3 import class_loss",
        "from losses_zs3 import class_loss",
        "try:\n    pass\nexcept ImportError:\n    import yaml",
    ],
)
def test_the_wall_sees_an_offence(source):
    assert len(offences(source)) == 1


@pytest.mark.parametrize("name", HUB_HALF)
def test_every_relative_import_is_code(name):
    """transformers finds relative imports by a regex over the raw text: a docstring's line would be one too."""
    source = (ROOT / f"{name}.py").read_text()
    by_regex = re.findall(r"^\s*from\s+\.(\S*)\s+import|^\s*import\s+\.(\S+)", source, flags=re.MULTILINE)
    by_syntax = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    assert sorted(first or second for first, second in by_regex) == sorted(by_syntax)
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    assert not [text for text in strings if isinstance(text, str) and re.search(r"^\s*from\s+\.", text, re.MULTILINE)]


def test_transformers_copies_every_hub_half_file_with_the_model():
    from transformers.dynamic_module_utils import get_relative_import_files

    copied = {Path(file).stem for file in get_relative_import_files(str(ROOT / "modeling_zs3.py"))}
    assert copied | {"modeling_zs3"} == set(HUB_HALF)


def test_what_is_installed_is_the_hub_half():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["py-modules"] == list(HUB_HALF)


# ---- systems -----------------------------------------------------------------------------------------------


def test_every_module_can_be_imported_where_unix_only_modules_are_missing():
    """Other people's packages are imported before: on other systems they are other files."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "zs3.files imported" in done.stdout
    assert [line for line in done.stdout.splitlines() if not line.endswith(" imported")] == []
