"""Settings of the tests, made before torch and transformers are imported. The tests run offline. They keep copies of
remote code and text vectors in a temporary folder. They use one thread: with tiny models more threads are not faster,
and they slow down other work on the same cores."""

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
    """The result of a command: its exit code, and the texts that it printed to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The last line of stderr, which must be an error message."""
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
