"""Installation: the tested versions fit the bounds, all extras fit together, a wheel works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if line.startswith("zs3[")]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if line not in OWN]
PAGE = "gradio>=6.31"  # for a planned page on the user's machine; older versions restrict other packages
TESTED = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def key(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_tested_versions_lie_within_the_bounds():
    tested = {key(name): version for name, version in TESTED}
    for requirement in map(Requirement, (*PROJECT["dependencies"], *EXTRAS)):
        assert requirement.specifier.contains(tested[key(requirement.name)]), requirement


def test_all_extras_and_the_packages_of_a_page_resolve_together(tmp_path):
    """pip reads the metadata of the packages that it would install, and installs nothing. The constraints are the
    tested versions, so pip also finds the installed packages, such as PyTorch."""
    assert all(set(Requirement(line).extras) <= set(PROJECT["optional-dependencies"]) for line in OWN)
    (tmp_path / "all.txt").write_text("\n".join([*PROJECT["dependencies"], *EXTRAS, PAGE]))
    ended = pip("-r", tmp_path / "all.txt", "-c", ROOT / "constraints.txt")
    if ended.returncode and (alone := pip("--no-deps", "--ignore-installed", PAGE)).returncode:
        pytest.skip(f"no package index can be reached: {alone.stderr.strip().splitlines()[-1]}")
    assert ended.returncode == 0, ended.stderr[-3000:]


def pip(*arguments: str | Path) -> subprocess.CompletedProcess:
    options = ["--dry-run", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *arguments], capture_output=True, text=True
    )


# ---- a wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of an unpacked wheel of the project. The wheel is built from a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for file in (*ROOT.glob("*_zs3.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        shutil.copy(file, source)
    for name in ("zs3", "recipes", "hub_cards"):
        ignored = shutil.ignore_patterns("__pycache__", "zs3-scenes")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    ZipFile(wheel).extractall(target)
    return target


def run_installed(code: str, installed: Path, place: Path) -> subprocess.CompletedProcess:
    """Runs code outside the repository. It imports the installed project, not the repository."""
    environment = dict(os.environ, PYTHONPATH=str(installed))
    return subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True)


SEVERAL = """
import sys
from zs3.__main__ import main
for words in {commands}:
    sys.argv = ["zs3", *words.split()]
    print("#", words, flush=True)
    try:
        main()
    except SystemExit as ended:
        print("# exit code", ended.code, flush=True)
import zs3.files
for file in ("recipes/scenes_stage1.yaml", "recipes/accelerate/fsdp2.yaml", "hub_cards/scenes.md"):
    folder, name = file.split("/", 1)
    print(zs3.files.project_folder(folder) / name, (zs3.files.project_folder(folder) / name).is_file())
"""


def test_a_wheel_works_outside_the_repository(installed, tmp_path):
    commands = ["", "release --help", "scenes --output x --num_train 2 --num_validation 1", "demo", "ablation table5"]
    ended = run_installed(SEVERAL.format(commands=commands), installed, tmp_path)
    shown, refused = ended.stdout, [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 0, ended.stderr
    assert "tiny_encoders" in shown and "usage: zs3 release " in shown
    assert sorted(path.name for path in (tmp_path / "x" / "train" / "images").iterdir()) == ["00000.png", "00001.png"]
    assert refused == 2 * ["error: train.py is not here: start this command from the root of the repository"]
    places = [line.split() for line in shown.splitlines() if line.startswith("/")]
    assert len(places) == 3 and all(
        place.startswith(f"{installed}/zs3/") and is_file == "True" for place, is_file in places
    )


def test_all_packages_are_named():
    """A wheel lacks every folder of zs3/ that pyproject.toml does not name."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {f"zs3.{file.parent.name}" for file in ROOT.glob("zs3/*/__init__.py")}
    assert {*setuptools["packages"]} == {"zs3", *folders, *setuptools["package-dir"]}
    assert {*setuptools["py-modules"]} == {file.stem for file in ROOT.glob("*_zs3.py")}
