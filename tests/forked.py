"""Commands in processes of their own. Each is forked from a process that has imported everything, so that a start
costs a fraction of a second, and not the seconds that the imports take."""

import multiprocessing
import os
import pkgutil
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from zs3.command_line import run

FOLDER = Path(__file__).parent
IMPORTED = ["train", "eval", "zs3.pseudo_labels", "zs3.convert.__main__", "test_run_folder"]


def begin(function: Callable[..., None], *args: object) -> BaseProcess:
    """Starts a function in a process of its own.

    Python has one fork server for each process. One that a benchmark started has not imported IMPORTED: it is replaced.
    """
    server = forkserver._forkserver
    if server._preload_modules != IMPORTED:
        server._stop()
        server.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (FOLDER, FOLDER.parent))))  # where the server finds them
        server.ensure_running()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def start(
    command: str, arguments: list[object], log: Path, *changes: Callable[[], None], **environment: str
) -> BaseProcess:
    """Starts the function `main` of the module `command`. Its output goes to log.

    changes: functions that its process calls first.
    """
    environment = {"ACCELERATE_USE_CPU": "true", **environment}
    return begin(run_in_process, [command, *map(str, arguments)], log, changes, environment)


def run_in_process(words: list[str], log: Path, changes: tuple, environment: dict[str, str]) -> None:
    os.setsid()  # a process group of its own, with its loader's workers
    multiprocessing.set_start_method("fork", force=True)  # of those workers, as in a run from the command line
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    for change in changes:
        change()
    sys.argv = words
    run(pkgutil.resolve_name(f"{words[0]}:main"))


def start_two(
    command: str, arguments: list[object], log: Path, *changes: Callable[[], None], **environment: str
) -> list[BaseProcess]:
    """Starts a group of two processes, as torchrun does: the store in which they meet is not their own.

    A free port that is looked up here and opened there can be taken by another process in between.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", **environment}
    two = [start(command, arguments, log, *changes, RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]
    for process in two:
        process.store = store  # lives as long as they do
    return two


def ended(process: BaseProcess) -> int:
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    return process.exitcode


def wait_for(happened: Callable[[], bool], process: BaseProcess) -> None:
    while not happened():
        assert process.is_alive(), "the run ended too early"
        time.sleep(0.005)
