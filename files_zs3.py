"""Files: images opened, label maps saved, files written whole or not at all.

`open_image` opens only formats that Pillow decodes itself: EPS, for example, would start Ghostscript. `load_picture`
opens whatever the pipeline takes for an image. `save_map` writes a label map as a PNG of ids.

Axes: H W pixels.
"""

import base64
import codecs
import errno
import io
import os
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

try:
    from .configuration_zs3 import Refused, as_number, one_line, shortened
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import Refused, as_number, one_line, shortened

PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAP_FORMATS = ("PNG",)  # JPEG changes ids, GIF renumbers them
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
PARTIAL = r"\.[0-9a-f]{32}\.(?P<process>\d+)\.partial"  # names that `whole` gives
SMALLEST_PICTURE = 32  # bytes: a shorter text of base64 is taken for a path that does not exist
SECONDS = 60  # for the download of an address
MOST_FETCHED = 2**28  # bytes of a download
MAX_PIXELS = 2**27  # of an image: 0.5 GB decoded


# ---- reading -----------------------------------------------------------------------------------------------


@contextmanager
def decoding() -> Iterator[None]:
    """An error of a decoder within the block becomes Refused; its message is the reason.

    One guard for all readers: for a damaged file Pillow raises more kinds of errors than it documents. Where memory or
    open files run out, the file is not at fault, and the error stays as it is.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise Refused(one_line(error, 100)) from error


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error is not the file's fault: no more open files, no memory."""
    return getattr(error, "errno", None) in OF_THE_MACHINE


def open_image(source: str | Path | bytes, formats: Sequence[str] = PICTURE_FORMATS) -> Image.Image:
    """An image whose header has been read; decode it within `decoding`. Raises Refused; its message is the reason.

    source: a file, or its bytes. formats: the allowed formats of its content, whatever its name.
    """
    if not isinstance(source, bytes):
        check_regular(source)
    with decoding(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is MAX_PIXELS
        try:
            image = Image.open(_handle(source), formats=formats)
        except UnidentifiedImageError as error:
            raise Refused(_why_unidentified(source, formats)) from error
        except Image.DecompressionBombError as error:
            raise Refused(f"it has more than {MAX_PIXELS:,} pixels: make it smaller") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refused(f"it has {width:,} x {height:,} pixels, at most {MAX_PIXELS:,} are read: make it smaller")
    return image


def verify_checksums(png: bytes) -> None:
    """Raises Refused where a PNG's bytes have changed: many changed bits do not disturb the decoder."""
    image = open_image(png, ("PNG",))
    with decoding():
        image.verify()


def check_regular(path: str | Path) -> os.stat_result:
    """The system's facts about a file. Raises Refused where it is no file: a folder, a pipe or a device."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise Refused(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise Refused(f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, no file")
    return found


def _handle(source: str | Path | bytes) -> str | Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _why_unidentified(source: str | Path | bytes, formats: Sequence[str]) -> str:
    known = ", ".join(formats)
    try:
        with decoding(), Image.open(_handle(source), formats=PICTURE_FORMATS) as image:
            kind = image.format
    except Refused:
        return f"it is no image of a format that is read ({known}), or it is damaged"
    return f"it is a {kind} inside, and must be {known}: save it anew from the original"


def load_picture(image: str | Path | Image.Image | np.ndarray | Tensor, timeout: float | None = None) -> Image.Image:
    """An image in RGB, turned by its EXIF data. Raises Refused.

    image: a path, an address (http, https, data:image/), a text of base64, a PIL image, or an array or tensor of uint8,
        (H, W), (H, W, 3) or (H, W, 4).
    timeout: seconds for the download of an address; None: SECONDS.
    """
    try:
        with decoding():
            picture = _opened(image, timeout)
            if not (picture.width and picture.height):
                raise Refused(f"it has {picture.width} x {picture.height} pixels")
            if is_deep(picture):
                raise Refused(f"mode {picture.mode} holds more than 8 bits a channel; convert it to 8 first")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Refused as error:
        raise Refused(f"{shown_name(image)} cannot be read as an image: {error}") from error


def _opened(image: object, timeout: float | None) -> Image.Image:
    if isinstance(image, Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise Refused(f"an array must be uint8, (H, W), (H, W, 3) or (H, W, 4), not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return image
    if is_address(image):
        return open_image(_fetched(str(image), timeout))
    if isinstance(image, str) and not os.path.exists(image):
        content = _from_base64(image)
        if content is None or len(content) < SMALLEST_PICTURE:
            raise Refused("there is no such file, and it is no http(s) address")
        return open_image(content)
    if isinstance(image, str | Path):
        return open_image(image)
    raise Refused(_why_no_image(image))


def is_deep(picture: Image.Image) -> bool:
    """Whether it has more than 8 bits a channel: RGB would cut them off."""
    return picture.mode[0] in "IF"


def shown_name(image: object) -> str:
    """An image's name for a message: the end of its path, at most 45 characters."""
    if not isinstance(image, str | Path):
        return "the image"
    text = str(image)
    if not text.strip():
        return repr(text[:20])
    shown = repr(text[-60:])[1:-1]  # escapes invisible characters
    return shown if len(text) <= 60 and len(shown) <= 45 else f"...{shown[-42:]}"


def _why_no_image(value: object) -> str:
    it = f"it is of type {type(value).__name__[:30]}"
    if isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "read"):
        return f"{it}: open it first, PIL.Image.open(...), with io.BytesIO for bytes"
    if isinstance(value, Mapping) or hasattr(value, "column_names"):
        return f'{it}: give the image itself, row["image"], or a column of a dataset, dataset["image"]'
    return "none was given" if value is None else f"{it}, no image, path or address"


def _from_base64(text: str) -> bytes | None:
    """The bytes of a base64 text; None: it is no base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def is_leftover(name: str) -> bool:
    """Whether an operating system left this file: `._a.png` (macOS), .DS_Store, Thumbs.db, desktop.ini."""
    return name.startswith("._") or name.lower() in (".ds_store", "thumbs.db", "desktop.ini", ".directory")


def is_picture_name(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURE_SUFFIXES and not is_leftover(name)


def is_address(image: object) -> bool:
    return isinstance(image, str | Path) and str(image).startswith(("http://", "https://", "data:image/"))


def _fetched(address: str, timeout: float | None) -> bytes:
    if address.startswith("data:"):
        content = _from_base64(address.partition(",")[2])
        if content is None:
            raise Refused("what follows its comma is no base64")
        return content
    if constants.HF_HUB_OFFLINE:
        raise Refused("this process is offline (HF_HUB_OFFLINE): download it first")
    timeout = SECONDS if timeout is None else timeout
    content: Future[bytes] = Future()
    threading.Thread(target=_download, args=(address, timeout, content), daemon=True).start()
    try:
        return content.result(timeout)
    except TimeoutError as error:
        raise Refused(f"not all of it came within {timeout:g} seconds: give more, timeout=...") from error


def _download(address: str, timeout: float, content: Future) -> None:
    """Sets the content, or the error. Runs in its own thread, since a server may never end its answer."""
    try:
        found, end = bytearray(), time.monotonic() + timeout
        with get_session().stream("GET", address, follow_redirects=True, timeout=timeout) as answer:
            if answer.status_code >= 400:
                raise Refused(f"the server answers {answer.status_code} {answer.reason_phrase[:40]}")
            for part in answer.iter_bytes():
                found += part
                if len(found) > MOST_FETCHED:
                    raise Refused(f"it is more than {MOST_FETCHED:,} bytes")
                if time.monotonic() > end:  # `_fetched` has given up
                    return
        content.set_result(bytes(found))
    except Exception as error:
        content.set_exception(error)


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, or in the encoding of its byte order mark. Raises OSError, or ValueError where it is no
    text, or no file (a pipe or a device has no end)."""
    if os.path.exists(path):
        check_regular(path)
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends. Unlike `splitlines` it cuts at no separator inside a JSON string."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


# ---- writing -----------------------------------------------------------------------------------------------


class Unwanted(Exception):
    """Raised within `whole`: the file that was written is thrown away."""


@contextmanager
def whole(path: Path, synced: bool = True) -> Iterator[Path]:
    """A file beside `path` to write to. If the block ends without an error it gets the name `path`, else it is removed.
    Until then its name is as PARTIAL says, with the number of the writing process.

    synced: the content is on the disk before it gets the name. False: a power failure may leave a damaged file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid4().hex}.{os.getpid()}.partial")
    try:
        yield partial
        if synced:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except Unwanted:
        return
    finally:
        partial.unlink(missing_ok=True)


def ignored_id(num_classes: int) -> int:
    """The id for -1, no label, in saved label maps of so many classes: 255 in 8 bits, 65535 in 16."""
    if num_classes > 65535:
        raise Refused(f"a label map holds the ids of at most 65,535 classes, not of {num_classes:,}")
    return 255 if num_classes <= 255 else 65535


def map_png(label_map: Any, num_classes: int | None = None) -> bytes:
    """The bytes of a PNG: see `save_map`."""
    if num_classes is not None:
        num_classes = as_number("num_classes", num_classes, 1, whole=True)
    if isinstance(label_map, Tensor):
        label_map = label_map.numpy(force=True)
    ids = np.asarray(label_map)
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or not ids.size:
        raise Refused(f"a label map is (H, W) whole numbers, got {ids.dtype} of shape {ids.shape}")
    least, most = int(ids.min()), int(ids.max())
    if least < -1 or num_classes is not None and most >= num_classes:
        allowed = "-1 or more" if num_classes is None else f"-1 to {num_classes - 1}"
        raise Refused(f"ids of the label map must be {allowed}, got {least if least < -1 else most}")
    ignored = ignored_id(most + 1 if num_classes is None else num_classes)
    stored = np.where(ids == -1, ignored, ids).astype(np.uint8 if ignored == 255 else np.uint16)
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "PNG")
    return file.getvalue()


def save_map(label_map: Any, path: str | Path, num_classes: int | None = None) -> None:
    """Saves a label map as a PNG of ids, for this project's datasets and other tools. Written whole or not at all.

    8 bits, and 255 where the map has -1; for more than 255 classes 16 bits, and 65535.

    label_map: (H, W) integers, -1 where there is no label; or the pipeline's result with output="map".
    path: ends in .png.
    num_classes: of the label list. With it all maps of one list have the same bits. None: the result's own number, or
        the least number for the ids of this map.
    """
    if Path(path).suffix.lower() != ".png":
        raise Refused(f"a label map is saved as a PNG: {str(path)[-100:]} must end in .png")
    if isinstance(label_map, list) and label_map and isinstance(label_map[0], dict):
        raise Refused('these are masks, no label map: ask the pipeline for output="map"')
    if isinstance(label_map, dict):
        if not {"segmentation", "labels"} <= set(label_map):
            raise Refused('a result to save has "segmentation" and "labels": ask the pipeline for output="map"')
        num_classes = len(label_map["labels"]) if num_classes is None else num_classes
        label_map = label_map["segmentation"]
    content = map_png(label_map, num_classes)
    try:
        with whole(Path(path)) as partial:
            partial.write_bytes(content)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"cannot save {shortened(str(path), 100)} ({reason}): choose another place") from error


__all__ = ["load_picture", "map_png", "open_image", "save_map", "whole"]
