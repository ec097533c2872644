"""What is installed: the tested versions lie within the bounds; all extras, and the packages of a page, go together."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if line.startswith("zs3[")]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if line not in OWN]
PAGE = "gradio>=6.31"  # of a page on the user's machine, which is planned; older ones bound other packages
TESTED = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def key(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_tested_versions_lie_within_the_bounds():
    tested = {key(name): version for name, version in TESTED}
    for requirement in map(Requirement, (*PROJECT["dependencies"], *EXTRAS)):
        assert requirement.specifier.contains(tested[key(requirement.name)]), requirement


def test_all_extras_and_the_packages_of_a_page_resolve_together(tmp_path):
    """pip reads the metadata of what it would install, and installs nothing. With the tested versions it finds those
    that are installed, PyTorch's, too."""
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
