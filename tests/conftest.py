"""The suite runs offline, keeps its copies of remote code and its text vectors to itself, and uses one thread: on tiny
models more threads gain nothing, and cost much where other work shares the cores. Set before torch and transformers are
imported."""

import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDER = tempfile.mkdtemp(prefix="zs3_tests_")
os.environ["HF_HOME"] = os.path.join(FOLDER, "home")
os.environ["HF_MODULES_CACHE"] = os.path.join(FOLDER, "modules")


def pytest_unconfigure() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
