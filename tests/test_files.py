"""Files of other people: which are opened, what is said of the others, and where our own go."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from test_data import random_sample, write_folder

import files_zs3
from configuration_zs3 import Refused
from drawing_zs3 import draw
from files_zs3 import Unwanted, lines_of, load_picture, open_image, read_text, save_map, whole
from zs3.command_line import InputError, printable, run, try_output
from zs3.data.records import load_split
from zs3.files import (
    append_line,
    file_name,
    is_locked,
    lock_folder,
    write_json,
    writing,
    writing_folder,
)
from zs3.label_space import LabelSpace
from zs3.tables import csv_text, markdown, markdown_table

OTHERS = ("EPS", "ICO", "PCX", "SGI", "TGA", "DDS", "IM", "MSP", "SPIDER", "PDF", "XBM")  # that Pillow writes


def written(kind: str, mode: str = "RGB") -> bytes:
    """A picture in one of Pillow's formats."""
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, mode)
    file = io.BytesIO()
    Image.fromarray(random_sample(1)[0]).convert(mode).save(file, kind)
    return file.getvalue()


# ---- what is opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_by_every_door_and_start_no_program(kind, tmp_path, monkeypatch):
    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *words, **options: pytest.fail(f"{words} was started"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *words, **options: pytest.fail("Ghostscript"))
    path = tmp_path / "a.png"
    path.write_bytes(written(kind))
    with pytest.raises(Refused, match="no image of a format that is read"):
        load_picture(path)
    with pytest.raises(Refused):
        draw(path, {"segmentation": np.zeros((16, 16), int), "labels": ["a"]})
    write_folder(tmp_path / "data", {"a": random_sample(0)})
    (tmp_path / "data" / "train" / "images" / "a.png").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="a.png .it is no image of a format that is read"):
        load_split(tmp_path / "data", "train")[0]


@pytest.mark.parametrize("kind", [*files_zs3.PICTURE_FORMATS, "MPO"])
def test_pictures_of_the_list_are_read_as_pillow_reads_them(kind, tmp_path):
    (tmp_path / "picture").write_bytes(written(kind))
    picture = load_picture(tmp_path / "picture")
    np.testing.assert_array_equal(picture, Image.open(tmp_path / "picture").convert("RGB"))
    np.testing.assert_array_equal(open_image((tmp_path / "picture").read_bytes()).convert("RGB"), picture)


@pytest.fixture
def odd_places(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        yield tmp_path


@pytest.mark.parametrize("name", ["pipe", "folder", "dangling", "device", "socket"])
def test_what_is_no_file_is_refused_at_once(name, odd_places):
    with pytest.raises(Refused, match="it is a|No such file"):
        load_picture(odd_places / f"{name}.png")
    data = write_folder(odd_places / "data", {"a": random_sample(0)})
    for kind in ("images", "labels"):
        (data / "train" / kind / "a.png").unlink()
        (data / "train" / kind / "a.png").symlink_to(odd_places / f"{name}.png")
        if name != "folder":
            records = load_split(data, "train")
            for look in (lambda records=records: records[0], records.contents):
                with pytest.raises(InputError, match=r"a\.png"):
                    look()
        (data / "train" / kind / "a.png").unlink()
        Image.fromarray(random_sample(0)[0 if kind == "images" else 1]).save(data / "train" / kind / "a.png")


def test_no_damage_of_a_png_passes_for_other_values(tmp_path):
    """Cut anywhere, or any bit flipped: the record is the one that was written, or the file is refused."""
    image, label = random_sample(3)
    data = write_folder(tmp_path, {"a": (image, label)})
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        path = data / "train" / kind / "a.png"
        content = path.read_bytes()
        damaged = [content[:length] for length in range(0, len(content), 15)]
        for _ in range(200):
            spoiled = bytearray(content)
            spoiled[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(spoiled))
        refused = 0
        for spoiled in damaged:
            path.write_bytes(spoiled)
            try:
                record = load_split(data, "train")[0]
            except InputError as error:
                assert "a.png" in str(error) and "\n" not in str(error)
                refused += 1
            else:
                np.testing.assert_array_equal(record.image, image)
                np.testing.assert_array_equal(record.label, label)
        assert refused > 0.9 * len(damaged)
        path.write_bytes(content)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    side = 13_000
    Image.new("L", (side, side)).save(tmp_path / "big.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused, match="it has 13,000 x 13,000 pixels, at most 134,217,728 are read"):
        load_picture(tmp_path / "big.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    with pytest.raises(Refused, match="more than 134,217,728 pixels"):
        open_image(png_header(60_000, 60_000))


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends after its first chunk."""
    whole_png = written("PNG", "L")
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + whole_png[24:29]
    return whole_png[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole_png[33:]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_text(encoding, tmp_path):
    text = '{"name": "höhle \u2028 \x85", "x": 1}\r\n{"name": "\u2029"}\n'
    (tmp_path / "text").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "text") == text
    assert [json.loads(line)["name"] for line in lines_of(text)] == ["höhle \u2028 \x85", "\u2029"]
    assert lines_of("") == [] and lines_of("a\n\nb") == ["a", "", "b"]


# ---- label maps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "highest", "mode"),
    [(None, 254, "L"), (None, 255, "I;16"), (255, 254, "L"), (256, 3, "I;16"), (65535, 65534, "I;16"), (None, 0, "L")],
)
def test_a_label_map_is_read_back_as_it_was(num_classes, highest, mode, tmp_path):
    label_map = np.random.default_rng(0).integers(-1, highest + 1, (16, 16))
    label_map[0, :2] = -1, highest
    ignored = {"L": 255, "I;16": 65535}[mode]
    space = LabelSpace([str(place) for place in range(min(num_classes or highest + 1, 10_000))], [], ignored)
    path = tmp_path / "data" / "train" / "labels" / "a.png"
    save_map(torch.from_numpy(label_map), path, num_classes)
    assert Image.open(path).mode == mode
    stored = np.asarray(Image.open(path)).astype(int)
    np.testing.assert_array_equal(np.where(stored == ignored, -1, stored), label_map)
    if highest < len(space.class_names):
        (tmp_path / "data" / "train" / "images").mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / "train" / "images" / "a.png")
        label = load_split(tmp_path / "data", "train", space)[0].label
        np.testing.assert_array_equal(np.where(label == ignored, -1, label), label_map)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.png", tmp_path / ("n" * 300 + ".png")):
        with pytest.raises(ValueError, match="cannot save .*: choose another place"):
            save_map(np.zeros((2, 2), int), path)
    with pytest.raises(ValueError, match='output="map"'):
        save_map([{"label": "a", "mask": None}], tmp_path / "a.png")


def test_maps_of_one_list_are_alike(tmp_path):
    names = [f"name {place}" for place in range(300)]
    save_map({"segmentation": np.array([[0, -1]]), "labels": names}, tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 65535]]


@pytest.mark.parametrize(
    ("label_map", "options", "words"),
    [
        (np.zeros((2, 2)), {}, "whole numbers"),
        (np.zeros(4, int), {}, "whole numbers"),
        (np.zeros((0, 4), int), {}, "whole numbers"),
        (np.zeros((2, 2), bool), {}, "whole numbers"),
        (np.full((2, 2), -2), {}, "-1 or more, got -2"),
        (np.full((2, 2), 5), {"num_classes": 5}, "-1 to 4, got 5"),
        (np.full((2, 2), 65535), {}, "65,535 classes"),
    ],
)
def test_what_is_no_label_map_is_refused_and_nothing_written(label_map, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_map(label_map, tmp_path / "a.png", **options)
    with pytest.raises(ValueError, match="must end in .png"):
        save_map(np.zeros((2, 2), int), tmp_path / "a.jpg")
    assert [*tmp_path.iterdir()] == []


# ---- names of files ----------------------------------------------------------------------------------------

ids = st.text(max_size=300) | st.sampled_from(["..", ".", "a/b", "../../x", "/etc/passwd", "CON", "a\\b", "x.", " x"])


@given(ids)
def test_an_id_is_a_name_in_its_own_folder_whatever_it_is(image_id):
    name = file_name(image_id, ".png")
    assert Path("/home/x", name).resolve().parent == Path("/home/x") and os.path.basename(name) == name
    assert len(os.fsencode(name)) <= 200 and name.endswith(".png") and name.isprintable()


@given(ids, ids)
def test_two_ids_have_two_files(one, other):
    assert (file_name(one, "") == file_name(other, "")) == (one == other)


def test_an_id_that_looks_like_a_files_name_does_not_share_it():
    assert file_name(file_name("x/y", ""), "") != file_name("x/y", "")


@pytest.mark.parametrize("image_id", ["0001", "2007_000032", "camera1-0001", "a b", "größe", "a.b"])
def test_a_plain_id_is_its_own_name(image_id):
    assert file_name(image_id, ".png") == f"{image_id}.png"


# ---- whole, or not there -----------------------------------------------------------------------------------


def fork(work, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def write_and_die(path: Path) -> None:
    with whole(path) as partial:
        partial.write_text("new, and half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    process = fork(write_and_die, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL and path.read_text() == "old"


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    with writing(tmp_path / "a.txt") as partial:
        partial.write_text("thought better of")
        raise Unwanted
    assert [*tmp_path.iterdir()] == []


def fill(folder: Path, size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_json(folder / "result.json", {"x": "x" * size})
    except InputError as error:
        sys.exit(str(error))


def test_a_full_disk_names_the_file(tmp_path, capfd):
    process = fork(fill, tmp_path, 10_000)
    process.join()
    assert process.exitcode == 1 and "result.json" in capfd.readouterr().err and [*tmp_path.iterdir()] == []


def test_half_a_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, "1")
    path.write_bytes(path.read_bytes() + b'{"half')
    append_line(path, "2")
    append_line(path, "3")
    assert path.read_text() == '1\n{"half\n2\n3\n'


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    (tmp_path / "out.partial" / "old").mkdir(parents=True)
    with pytest.raises(RuntimeError), writing_folder(tmp_path / "out") as partial:
        raise RuntimeError
    assert [*tmp_path.iterdir()] == []
    with writing_folder(tmp_path / "out") as partial:
        assert [*partial.iterdir()] == []
        (partial / "a").write_text("a")
        with pytest.raises(InputError, match="another run writes"):
            _in_another_process(_make, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "a"]


def _make(folder: Path) -> None:
    with writing_folder(folder):
        pass


def _in_another_process(work, folder: Path) -> None:
    """Raises its InputError here."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(work, (folder,))


# ---- locks -------------------------------------------------------------------------------------------------


def hold(folder: Path, held: Path) -> None:
    with lock_folder(folder):
        held.touch()
        time.sleep(60)


def test_a_lock_ends_with_its_process_and_is_nobodys_afterwards(tmp_path):
    process = fork(hold, tmp_path / "run", tmp_path / "held")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert is_locked(tmp_path / "run")
    with pytest.raises(InputError, match="another run writes in .*run now"):
        lock_folder(tmp_path / "run")
    process.kill()
    process.join()
    assert not is_locked(tmp_path / "run")
    lock_folder(tmp_path / "run").close()


def test_a_lock_of_a_folder_that_is_gone_is_no_lock(tmp_path, monkeypatch):
    """Locked while the folder was renamed."""
    acquire = filelock.FileLock.acquire

    def acquire_and_move(lock, **options):
        held = acquire(lock, **options)
        (tmp_path / "a").rename(tmp_path / "b")
        return held

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire_and_move)
    with pytest.raises(InputError, match="another run writes"):
        lock_folder(tmp_path / "a")
    assert not is_locked(tmp_path / "b")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to_all_the_same(number, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path / "run"):
        assert not is_locked(tmp_path / "run")
    with writing_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


# ---- trials ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ("file/x.json", "file", "is a file, not a folder"),
        ("file/a/b", "folder", "is a file, not a folder"),
        ("folder", "file", "is a folder: choose a file"),
        ("file", "folder", "is a file: choose a folder"),
        ("n" * 300 + ".json", "file", "is longer than the 255 bytes"),
        ("n" * 245 + ".json", "file", "is longer than the 255 bytes"),  # with _images.npz
        ("a/" + "n" * 300, "folder", "is longer than the 255 bytes"),
        ("/dev/full", "file", "is a device"),
        ("/proc/nothing/x.json", "file", "cannot be written"),
        ("pipe", "file", "is a device or a pipe"),
        ("n/" * 3000 + "x", "file", "too long"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(place, kind, words, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"--output .*{words}"):
        try_output("--output", tmp_path / place, kind)
    for good in ("new.json", "a/b/new.json", "file"):
        try_output("--output", tmp_path / good, "file")
    for good in ("new", "a/b/new", "folder"):
        try_output("--output", tmp_path / good, "folder")
    assert sorted(tmp_path.rglob("*")) == before


# ---- names shown -------------------------------------------------------------------------------------------


def test_a_terminal_gets_nothing_to_obey():
    assert printable("a\x1b[31m\rb\x07\u202ec\u2066\udcff\ttab\n") == "a\\x1b[31m\\rb\\x07\\u202ec\\u2066\\udcff\ttab\n"
    assert printable("größe 天空 שמיים 👩‍🔬") == "größe 天空 שמיים 👩‍🔬"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_no_letter_is_a_fault_of_the_outputs_encoding(encoding, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, write_through=True))
    run(lambda: print("天空\x1b[31m", end=""))
    sky = "天空" if encoding == "utf-8" else "\\u5929\\u7a7a"
    assert printed.getvalue().decode() == f"{sky}\\x1b[31m"


def test_names_are_text_in_markdown_and_no_formulas_in_a_table():
    assert markdown("<b>|x`*_y_ stage_2\n# [a](b)") == r"\<b\>\|x\`\*\_y\_ stage_2 \# \[a\](b)"
    assert markdown_table(["a"], [[markdown("x|y")], ["x|y"]])[2:] == [r"| x\|y |", r"| x\|y |"]
    assert [csv_text(name) for name in ("=cmd|' /C calc'!A0", "+1", "-1", "@x", "\tx", "sky")] == [
        *("'=cmd|' /C calc'!A0", "'+1", "'-1", "'@x", "'\tx", "sky")
    ]
