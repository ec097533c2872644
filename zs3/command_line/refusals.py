"""How a command refuses: one clear line, and exit code 2."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from configuration_zs3 import Refused, one_line

LONGEST_LINE = 200  # characters of a refusal
SHORTEST_WORD = 40  # characters that are kept of a long path or name
NO_SPACE = {
    errno.ENOSPC: "no space left on the disk for {}; free some and start again",
    errno.EDQUOT: "no space left in the disk quota for {}; free some and start again",
    errno.EFBIG: "a limit on the size of files is too low for {}; raise it (ulimit -f) and start again",
}
# Reasons why the system cannot read or write a file: no bugs of this project.
OF_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EMFILE, errno.EBUSY),
)
# Characters that move a cursor, ring a bell or reverse the reading direction.
UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


class InputError(ValueError):
    """Bad input. The message is one line of at most 200 characters. It says what is wrong and what to do.

    Long paths and names are shortened. A message from a DataLoader worker arrives inside a traceback.
    """

    def __init__(self, message: object = ""):
        text = str(message).strip()
        if text.startswith("Caught "):
            text = text.splitlines()[-1].split("InputError: ", 1)[-1]
        super().__init__(refusal_line(text))


@contextmanager
def in_one_line(thing: str) -> Iterator[None]:
    """Turns a refusal of the model or the processor into an InputError. thing: what was given, for the message."""
    try:
        yield
    except Refused as error:
        raise InputError(f"{thing}: {one_line(error)}") from error


# ---- texts for people ------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with escapes in place of control characters and invisible ones. Line ends and tabs stay."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def refusal_line(text: str) -> str:
    """One line of at most 200 characters. Long words, such as paths, lose their middle first, then the line."""
    words = printable(text).replace("\n", "\\n").split(" ")
    for place in sorted(range(len(words)), key=lambda place: len(words[place]), reverse=True):
        word, over = words[place], len(" ".join(words)) - LONGEST_LINE
        length = max(len(word) - over, SHORTEST_WORD)
        if over > 0 and len(word) > length:
            words[place] = f"{word[:10]}...{word[13 - length :]}"
    line = " ".join(words)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[5 - LONGEST_LINE // 2 :]}"


def shown(path: str | Path, length: int = 60) -> str:
    """A path for a message. A long path is cut at its start."""
    text = printable(str(path))
    return text if len(text) <= length else f"...{text[3 - length :]}"


def did_you_mean(name: str, names: list[str], prefix: str = "") -> str:
    closest = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{closest[0]}?" if closest else "see --help"


class _PrintableStream:
    """A stream that writes `printable` text, with escapes for letters that its encoding lacks."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# ---- a command's run -------------------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Calls main. Bad input and a full disk become one line and exit code 2; Ctrl-C becomes exit code 130.

    Any other exception is a bug and keeps its traceback. Printed text is made `printable`.
    """
    try:
        with redirect_stdout(_PrintableStream(sys.stdout)):
            main()
    except InputError as error:
        _refuse(error)
    except Exception as error:
        # Each writer has its own exception for a full disk: Python OSError, safetensors and torch theirs.
        thing = shown(getattr(error, "of_file", None) or getattr(error, "filename", None) or "a file", 150)
        reasons = [text.format(thing) for code, text in NO_SPACE.items() if _is_of_code(error, code)]
        if isinstance(error, OSError) and thing != "a file" and error.errno in OF_THE_SYSTEM:
            reasons.append(f"{thing}: {error.strerror}; give another place, or mend this one")
        if not reasons:
            raise
        _refuse(InputError(reasons[0]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _refuse(error: InputError) -> NoReturn:
    print(f"error: {error}", file=_PrintableStream(sys.stderr))
    sys.exit(2)


def _is_of_code(error: Exception, code: int) -> bool:
    return getattr(error, "errno", None) == code or os.strerror(code) in str(error)
