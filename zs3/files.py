"""How commands write files: names, complete files and folders, locks. (`files_zs3` reads files.)

A file or folder gets its final name when it is complete and on the disk. A command locks its output folder while it
runs. (`command_line.flags.try_outputs` tests the output places before the work.)
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unicodedata import normalize

import filelock
import psutil

from configuration_zs3 import one_line
from files_zs3 import PARTIAL, whole
from zs3.command_line import NO_SPACE, InputError, shown

PACKAGE = Path(__file__).parent
LOCK = "run.lock"
DIGEST = re.compile(r"-[0-9a-f]{16}$")  # the end of a name that `file_name` made from an unsuitable id
LEFT = re.compile(rf"{PARTIAL}|.+\.partial")  # unfinished files of `whole` or of older versions
LONGEST_NAME = 120  # bytes of an image id in a file name; file systems allow 255
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # errors of a file system without locks
NO_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # reserved for devices on Windows


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the project's own files -----------------------------------------------------------------------------------


def project_folder(name: str) -> Path:
    """The folder recipes/ or hub_cards/ of the repository. An installed package has its own copy."""
    folder = PACKAGE.parent / name
    return folder if (PACKAGE.parent / "train.py").exists() else PACKAGE / name


def check_here(file: str | Path) -> None:
    """Raises InputError if `file`, a part of the repository such as train.py, is missing."""
    if not Path(file).exists():
        raise InputError(f"{file} is not here: start this command from the root of the repository")


# ---- names -------------------------------------------------------------------------------------------------


def file_name(image_id: str, suffix: str) -> str:
    """A file name for an image: its id, if every file system accepts it as a name.

    Otherwise the name has the allowed letters of the id and a digest. Two ids never share a file.
    """
    letters = "".join(letter if letter.isprintable() and letter not in '/\\:*?"<>|' else "_" for letter in image_id)
    plain = (
        letters == normalize("NFC", image_id) == image_id
        and not DIGEST.search(image_id)
        and not image_id.startswith(".")
        and image_id.strip(" .") == image_id
    )
    if plain and image_id and len(image_id.encode()) <= LONGEST_NAME and not NO_NAMES.fullmatch(image_id):
        return image_id + suffix
    begin = letters.replace(".", "_").strip().encode("utf-8", "replace")[: LONGEST_NAME // 2].decode("utf-8", "ignore")
    return f"{begin}-{hashlib.sha256(image_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}{suffix}"


# ---- writing -----------------------------------------------------------------------------------------------


@contextmanager
def naming(thing: str | Path) -> Iterator[None]:
    """Adds the file name to an error without one, such as a full disk. `command_line.run` shows it."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "filename", None) and not hasattr(error, "of_file"):
            error.of_file = str(thing)  # not `filename`: an OSError would lose its own words
        raise


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As `whole`, but raises InputError if the file cannot be written."""
    try:
        with naming(path), whole(path) as partial:
            yield partial
    except OSError as error:
        if is_within(error, path.parent):
            raise cannot_write(path, error) from error
        raise


def is_within(error: OSError, folder: Path) -> bool:
    """Whether an error comes from writing to a folder, and not from another file or from the network."""
    if error.filename is None:  # an error while bytes are written
        return error.errno is not None
    return os.path.abspath(error.filename).startswith(os.path.abspath(folder))


def cannot_write(path: Path, error: OSError) -> InputError:
    if error.errno in NO_SPACE:
        return InputError(NO_SPACE[error.errno].format(shown(path)))
    return InputError(f"cannot write {shown(path)} ({error.strerror or one_line(error)}): choose another place")


def write_text(path: Path, text: str) -> None:
    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(result: dict[str, Any]) -> str:
    """The result as JSON. NaN and infinity become null, because JSON lacks them."""
    return json.dumps(finite_or_none(result), indent=2) + "\n"


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json_text(result))


def write_report(path: Path, result: dict[str, Any], text: str) -> None:
    """Writes the result as JSON, and the printed text beside it as .md."""
    write_json(path, result)
    write_text(path.with_suffix(".md"), text)


def finite_or_none(value: Any) -> Any:
    """The value with None in place of every NaN and infinity."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path: Path, line: str) -> None:
    """Appends a line and waits for the disk. An incomplete last line, left by a killed process, is ended first."""
    with naming(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write((line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def rename(partial: Path, final: Path) -> None:
    """Renames a folder after all its files are on the disk."""
    for path in [*partial.rglob("*"), partial]:
        _to_disk(path)
    os.replace(partial, final)
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill. It gets its name at the end of the block.

    Only one process at a time can fill it. The unfinished folder of a killed process is removed. The caller checks
    first that no folder has this name.
    """
    partial, lock = folder.with_name(folder.name + ".partial"), folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock_file(lock, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    with held, naming(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            rename(partial, folder)
        except OSError as error:
            if is_within(error, partial):
                raise cannot_write(folder, error) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)  # a process that opened it meanwhile notices that it is gone


# ---- locks -------------------------------------------------------------------------------------------------


def lock_folder(folder: Path) -> ExitStack:
    """Locks the folder. A missing folder is made.

    The lock ends when the returned stack is closed or the process ends.
    Unfinished files of a killed process are removed.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{shown(folder)} is a file: choose a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / LOCK, folder) as held:
            for left in folder.iterdir():
                match = LEFT.fullmatch(left.name)
                if match and left.is_file() and not (match["process"] and _lives(int(match["process"]))):
                    left.unlink()
            return held.pop_all()
    except OSError as error:
        raise cannot_write(folder, error) from error


def _lives(process: int) -> bool:
    """Whether a process with this number runs here. (An unfinished file of another machine may stay longer.)"""
    return process < 2**31 and psutil.pid_exists(process)


def lock_file(path: Path, folder: Path) -> ExitStack:
    """Locks a file. Closing the result or ending the process ends the lock, even if child processes live on.

    folder: the folder that the lock protects. On a file system without locks nothing is locked.
    """
    held = ExitStack()
    try:
        # The library's fallback is a file in place of a lock. That file would outlive a killed process.
        held.enter_context(filelock.FileLock(path, fallback_to_soft=False).acquire(timeout=0))
    except filelock.Timeout as error:
        raise _taken(folder) from error
    except OSError as error:
        if error.errno in NO_LOCKS:
            return held
        raise
    if not path.exists():  # the folder was moved after the file was opened
        held.close()
        raise _taken(folder)
    return held


def _taken(folder: Path) -> InputError:
    return InputError(f"another run writes in {folder} now: let it end, or choose another folder")


def is_locked(folder: Path) -> bool:
    """Whether a run writes in the folder now."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open() as file:
        try:
            return not filelock.lock_descriptor(file.fileno(), blocking=False)
        except OSError:  # a file system without locks, or NFS, which locks only what is open for writing
            return False
