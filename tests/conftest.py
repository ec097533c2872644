"""The suite runs offline, keeps its copies of remote code and its text vectors to itself, and uses one thread: on tiny
models more threads gain nothing, and cost much where other work shares the cores. Set before torch and transformers are
imported."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDER = tempfile.mkdtemp(prefix="zs3_tests_")
os.environ["HF_HOME"] = os.path.join(FOLDER, "home")
os.environ["HF_MODULES_CACHE"] = os.path.join(FOLDER, "modules")


def pytest_unconfigure() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)


class Ended(NamedTuple):
    """A command that has ended. code: its exit code; the rest: what it printed."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The line with which it refused."""
        line = (self.err.strip().splitlines() or [""])[-1]
        assert self.code == 2 and line.startswith("error: "), self
        return line


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., Ended]:
    """call(main, *words) runs a command in this process."""

    def call(main: Callable[[], None], *words: object) -> Ended:
        from zs3.command_line import run

        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        code = 0
        try:
            run(main)
        except SystemExit as stopped:
            code = stopped.code
        return Ended(code, *capsys.readouterr())

    return call
