"""The pipeline beside transformers' image-segmentation pipeline, on one checkpoint.

What that takes ours takes, with the same label map; what that refuses ours refuses at once, in one short line, but for
a few things that only ours takes.
"""

import base64
import copy
import dataclasses
import io
import multiprocessing
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from tiny import CLASS_NAMES, save_checkpoint
from torch.utils.data import Dataset, IterableDataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((56, 40 + 8 * seed))
    for seed in range(3)
]


def png(image: Image.Image = IMAGES[0]) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


TEXT = base64.b64encode(png()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, seed=1)
    return str(path)


@pytest.fixture(scope="module")
def ours(folder):
    return pipeline(model=folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def stock(folder):
    return pipeline("image-segmentation", model=folder, trust_remote_code=True)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Files in the working folder, under the names that the tables below give."""
    path = tmp_path_factory.mktemp("files")
    for row, image in enumerate(IMAGES):
        image.save(path / f"{row}.png")
    (path / "empty.png").write_bytes(b"")
    (path / "text.png").write_text("no picture")
    (path / "half.png").write_bytes(png()[:200])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


class Rows(Dataset):
    """A dataset whose rows never end: only its length says how many there are."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row % len(self.rows)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class WithoutLength(Dataset):
    def __getitem__(self, row):
        return IMAGES[row]


class Iterable:
    def __iter__(self):
        return iter(IMAGES)


class Sequence:
    def __len__(self):
        return 3

    def __getitem__(self, row):
        return IMAGES[row]


class AsText(str):
    pass


def table():
    """A table of `datasets`."""
    import datasets

    rows = {"image": [f"{row}.png" for row in range(3)]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def segments(result: list[dict]) -> list[tuple[str, bytes]]:
    return [(entry["label"], entry["mask"].tobytes()) for entry in result]


BOTH = {
    "image": lambda: IMAGES[0],
    "path": lambda: "0.png",
    "text of a class of its own": lambda: AsText("0.png"),
    "base64": lambda: TEXT,
    "base64 in lines": lambda: base64.encodebytes(png()).decode(),
    "data address": lambda: f"data:image/png;base64,{TEXT}",
    "data address with parameters": lambda: f"data:image/png;charset=utf-8;base64,{TEXT}",
    "grey": lambda: IMAGES[0].convert("L"),
    "palette": lambda: IMAGES[0].convert("P"),
    "one bit": lambda: IMAGES[0].convert("1"),
    "grey and alpha": lambda: IMAGES[0].convert("LA"),
    "CMYK": lambda: IMAGES[0].convert("CMYK"),
}
BOTH_SEVERAL = {
    "list": lambda: list(IMAGES),
    "list of paths": lambda: ["0.png", "1.png", "2.png"],
    "list of all kinds": lambda: [IMAGES[0], "1.png", base64.b64encode(png(IMAGES[2])).decode()],
    "generator": lambda: (image for image in IMAGES),
    "dataset": lambda: Rows(IMAGES),
    "dataset without a length": WithoutLength,
    "column of a dataset": lambda: KeyDataset(Rows([{"x": image} for image in IMAGES]), "x"),
    "column of a table": lambda: KeyDataset(table(), "image"),
    "stream": Stream,
}
OURS = {
    "Path": lambda: Path("0.png"),
    "array": lambda: np.asarray(IMAGES[0]),
    "tensor": lambda: torch.tensor(np.asarray(IMAGES[0])),
}
OURS_SEVERAL = {
    "tuple": lambda: tuple(IMAGES),
    "iterator": lambda: iter(IMAGES),
    "map": lambda: map(Image.Image.copy, IMAGES),
    "iterable": Iterable,
    "array of paths": lambda: np.array(["0.png", "1.png", "2.png"]),
    "column": lambda: table()["image"],
    "column of a stream": lambda: table().to_iterable_dataset()["image"],
}
NEITHER = {
    "nothing": lambda: None,
    "number": lambda: 5,
    "truth": lambda: True,
    "bytes": png,
    "bytearray": lambda: bytearray(png()),
    "memory": lambda: memoryview(png()),
    "BytesIO": lambda: io.BytesIO(png()),
    "open file": lambda: open("0.png", "rb"),  # noqa: SIM115
    "dict": lambda: {"image": IMAGES[0]},
    "large dict": lambda: {"x" * 20_000: "y" * 20_000},
    "dict of datasets": lambda: {"bytes": png(), "path": None},
    "set": lambda: {"0.png"},
    "table": table,
    "stream of a table": lambda: table().to_iterable_dataset(),
    "row of a table": lambda: table()[0],
    "sequence": Sequence,
    "list in a list": lambda: [IMAGES[:2], IMAGES[2:]],
    "empty list in a list": lambda: [[]],
    "list of nothing": lambda: [None],
    "list of bytes": lambda: [png()],
    "dataset of dicts": lambda: Rows([{"image": IMAGES[0]}]),
    "dataset of bytes": lambda: Rows([png()]),
    "generator of lists": lambda: (IMAGES for _ in range(2)),
    "no dimensions": lambda: np.array("0.png"),
    "floats": lambda: np.zeros((4, 4, 3)),
    "no path": lambda: "",
    "blank path": lambda: " ",
    "missing": lambda: "missing.png",
    "missing, without a suffix": lambda: "photos/cat1",
    "missing, a long path": lambda: "a/" * 2500 + "x.png",
    "missing, among others": lambda: [IMAGES[0], "missing.png"],
    "path with a zero": lambda: "a\0b.png",
    "zeros": lambda: "\0" * 300,
    "letters that are not shown, among others": lambda: [IMAGES[0], "\ue000" * 300],
    "a long path, among others": lambda: [IMAGES[0], "a" * 5000],
    "folder in a list": lambda: ["."],
    "class of a long name": lambda: type("C" * 300, (), {})(),
    "empty file": lambda: "empty.png",
    "text file": lambda: "text.png",
    "half a file": lambda: "half.png",
    "base64 of no image": lambda: base64.b64encode(b"no picture" * 2000).decode(),
    "almost base64": lambda: "!" * 20_000,
    "data address without data": lambda: "data:image/png;base64,",
    "data address of no image": lambda: "data:image/png;base64," + "!" * 20_000,
    "without pixels": lambda: Image.new("RGB", (0, 0)),
    "without rows": lambda: Image.new("RGB", (5, 0)),
    "without columns": lambda: np.zeros((5, 0, 3), np.uint8),
    "other address": lambda: "ftp://example.org/a.png",
    "address of a file": lambda: "file:///a.png",
}


@pytest.mark.parametrize("kind", BOTH)
def test_one_image_is_taken_as_transformers_takes_it(kind, ours, stock):
    assert segments(ours(BOTH[kind]())) == segments(stock(BOTH[kind]()))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", BOTH_SEVERAL)
def test_several_images_are_taken_as_transformers_takes_them(kind, batch_size, ours, stock):
    expected = [segments(result) for result in stock(BOTH_SEVERAL[kind]())]
    results = islice(ours(BOTH_SEVERAL[kind](), batch_size=batch_size), 10)
    assert [segments(result) for result in results] == expected and len(expected) == 3


@pytest.mark.parametrize("kind", [*OURS, *OURS_SEVERAL])
def test_some_things_only_this_pipeline_takes(kind, ours, stock):
    with pytest.raises(TypeError):
        list(stock((OURS | OURS_SEVERAL)[kind]()))
    if kind in OURS:
        assert segments(ours(OURS[kind]())) == segments(ours(IMAGES[0]))
    else:
        results = [segments(result) for result in ours(OURS_SEVERAL[kind]())]
        assert results == [segments(result) for result in ours(IMAGES)]


@pytest.mark.parametrize("kind", NEITHER)
def test_what_transformers_refuses_is_refused_in_one_short_line(kind, ours, stock):
    with pytest.raises(Exception):  # noqa: B017 - of all kinds
        list(stock(NEITHER[kind]()))
    with pytest.raises(ValueError) as error:
        list(islice(ours(NEITHER[kind]()), 10))
    assert len(str(error.value)) <= 200 and "\n" not in str(error.value)
    assert "read as an image: " in str(error.value)


def test_both_names_of_the_first_argument_are_known_and_the_subtask(ours):
    expected = segments(ours(IMAGES[0]))
    assert segments(ours(inputs=IMAGES[0])) == segments(ours(images=IMAGES[0])) == expected
    assert segments(ours(IMAGES[0], subtask="semantic")) == expected


# ------------------------------------------------------------------------------------------------ several results


@pytest.mark.parametrize("kind", ["dataset", "column of a dataset", "column of a table", "column"])
def test_results_have_the_length_of_their_dataset_and_can_be_had_again(kind, ours):
    results = ours((BOTH_SEVERAL | OURS_SEVERAL)[kind]())
    assert len(results) == 3 and len(list(results)) == len(list(results)) == 3
    with pytest.raises(TypeError, match="len"):
        len(ours(iter(IMAGES)))


class Broken(Rows):
    def __getitem__(self, row):
        if row == 1:
            raise IndexError("its own")
        return super().__getitem__(row)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_workers": 1}])
def test_an_error_of_the_dataset_itself_is_no_end_and_costs_no_other_image(options, ours):
    expected = [segments(result) for result in ours(IMAGES)]
    results = ours(Broken(IMAGES), **options)
    assert segments(next(results)) == expected[0]
    with pytest.raises(IndexError, match="its own") as error:
        next(results)
    assert "images[1]" in error.value.__notes__[0]
    assert segments(next(results)) == expected[2] and next(results, None) is None


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"num_workers": 1}])
@pytest.mark.parametrize("kind", ["column of a dataset", "column"])
def test_a_bad_picture_of_a_table_is_named_and_costs_no_other(kind, options, ours):
    import datasets

    rows = datasets.Dataset.from_dict({"image": ["0.png", "text.png", "2.png"]})
    column = rows.cast_column("image", datasets.Image())
    results = ours(KeyDataset(column, "image") if kind == "column of a dataset" else column["image"], **options)
    found = [next(results)]
    with pytest.raises(ValueError, match=r"^images\[1\]: it cannot be read as an image: "):
        next(results)
    found.append(next(results))
    assert [segments(result) for result in found] == [segments(result) for result in ours([IMAGES[0], IMAGES[2]])]


def test_results_go_through_a_loader_and_to_other_processes(ours):
    expected = [segments(result) for result in ours(IMAGES)]
    loader = torch.utils.data.DataLoader(ours(Rows(IMAGES)), batch_size=None, collate_fn=list)
    assert [segments(result) for result in loader] == expected
    results = ours(Rows(IMAGES))
    next(results)
    assert [segments(result) for result in pickle.loads(pickle.dumps(results))] == expected


def test_the_refusal_of_some_images_can_be_sent_to_another_process(ours):
    with pytest.raises(ValueError) as error:
        ours([IMAGES[0], "missing.png"])
    for twin in (copy.deepcopy(error.value), pickle.loads(pickle.dumps(error.value))):
        assert str(twin) == str(error.value) and len(twin.results) == 2 and twin.results[1] is None


def test_a_bad_image_costs_none_of_the_others_and_is_named(ours, place):
    images = [IMAGES[0], "half.png", IMAGES[1], "missing.png", IMAGES[2]]
    expected = [segments(result) for result in ours(IMAGES)]
    with pytest.raises(ValueError, match=r"^images\[1\]: half.png .*\(2 of 5; error.results") as error:
        ours(images, batch_size=2)
    kept = error.value.results
    assert [segments(kept[row]) for row in (0, 2, 4)] == expected and kept[1] is None and kept[3] is None
    for given in (iter(images), Rows(images)):
        results, found, lost = ours(given, batch_size=3), [], []
        for _ in images:
            try:
                found.append(segments(next(results)))
            except ValueError as problem:
                lost.append(str(problem))
        assert found == expected and [line[:10] for line in lost] == ["images[1]:", "images[3]:"]
        assert next(results, None) is None


def test_processes_that_load_the_images_change_nothing(ours):
    expected = [segments(result) for result in ours(IMAGES)]
    assert [segments(result) for result in ours(Rows(IMAGES), num_workers=2)] == expected


# ------------------------------------------------------------------------------------------------ addresses


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 - its name
        status = int(self.path[1:4])
        while self.path.endswith("heads") and not self.server.ended.wait(0.05):
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" if not self.headers.get("begun") else b"X-A: b\r\n")
                self.headers["begun"] = "yes"
            except OSError:
                return
        self.send_response(302 if self.path.endswith("round") else status)
        if self.path.endswith("round"):
            self.send_header("Location", self.path)
        if self.path.endswith("drops"):
            self.send_header("Content-Length", "100000")
        self.end_headers()
        if self.path.endswith("drops"):
            while not self.server.ended.wait(0.05):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        if status == 200 and self.path.endswith("png"):
            self.wfile.write(png())

    def log_message(self, *words):
        """Nothing on the screen."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.ended = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("timeout", [None, 20, np.float32(20)])
def test_an_address_is_taken_as_transformers_takes_it(timeout, server, ours, stock):
    expected = segments(stock(f"{server}/200.png"))
    assert segments(ours(f"{server}/200.png", timeout=timeout)) == expected


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("404.png", "the server answers 404 Not Found"),
        ("500.png", "the server answers 500 Internal Server Error"),
        ("200", "it is no image of a format"),
        ("302round", "redirects"),
        ("200drops", "not all of it came within 0.5 seconds"),
        ("200heads", "not all of it came within 0.5 seconds"),
    ],
)
def test_an_address_that_gives_no_image_is_named_with_the_reason(path, reason, server, ours):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=reason) as error:
        ours(f"{server}/{path}", timeout=0.5)
    assert f"/{path} cannot be read" in str(error.value) and len(str(error.value)) <= 200
    assert time.monotonic() - begun < 10, "it ends long before the server does"


def test_a_server_that_says_nothing_is_left_when_the_time_is_up(server, ours):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="0.2 seconds|timed out"):
        ours(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png", timeout=0.2)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_time_that_is_none_is_refused(timeout, ours):
    with pytest.raises(ValueError, match="timeout must be "):
        ours(IMAGES[0], timeout=timeout)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", True),
        ("batch_size", 2.5),
        ("batch_size", 0),
        ("batch_size", "2"),
        ("num_workers", -1),
        ("num_workers", np.bool_(True)),
        ("window", np.float64(24)),
        ("window", True),
        ("overlap", -1),
        ("threshold", float("nan")),
        ("threshold", np.bool_(True)),
        ("threshold", torch.tensor(0.5)),
        ("ensemble_weight", float("nan")),
        ("ensemble_weight", True),
    ],
)
def test_what_is_no_number_is_refused(name, value, ours):
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        ours(IMAGES, **{"background": "reject", name: value})
    assert len(str(error.value)) <= 200


def test_numbers_of_numpy_are_numbers(ours):
    options = {"background": "reject", "threshold": 0.5, "window": 32, "overlap": 8, "batch_size": 2}
    of_numpy = {"threshold": np.float32(0.5), "window": np.int64(32), "overlap": np.uint8(8), "batch_size": np.int32(2)}
    assert segments(ours(IMAGES[0], **{**options, **of_numpy})) == segments(ours(IMAGES[0], **options))


@pytest.mark.parametrize("name", ["output", "synonyms", "confidence", "ensemble", "background", "subtask"])
@pytest.mark.parametrize("value", [True, 5, "x" * 10_000, np.array([1, 2])], ids=["truth", "number", "text", "array"])
def test_choices_are_refused_in_one_short_line(name, value, ours):
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        ours(IMAGES[0], candidate_labels=CLASS_NAMES, **{name: value})
    assert len(str(error.value)) <= 200


def test_proposals_of_another_checkpoint_are_refused_in_one_short_line(ours, tmp_path):
    save_checkpoint(tmp_path, seed=2)
    other = pipeline(model=str(tmp_path), trust_remote_code=True)
    for proposals in (other.propose(IMAGES[0]), [ours.propose(IMAGES[0]), other.propose(IMAGES[0])]):
        with pytest.raises(ValueError, match="another checkpoint made these proposals") as error:
            ours(proposals)
        assert len(str(error.value)) <= 200
    again = pickle.loads(pickle.dumps(ours.propose(IMAGES[0])))
    assert segments(ours(again)) == segments(ours(IMAGES[0]))


# ------------------------------------------------------------------------------------------------ copies, processes


def answer(segment, image: Image.Image) -> list:
    torch.set_num_threads(1)
    return segments(segment(image, candidate_labels=["sky", "zebra"]))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda segment: pickle.loads(pickle.dumps(segment))])
def test_a_copy_is_as_good_as_the_pipeline(duplicate, ours):
    expected = answer(ours, IMAGES[0])
    twin = duplicate(ours)
    assert answer(twin, IMAGES[0]) == expected
    assert twin.lint_labels(["sky", "zebra"]).class_names == ["sky", "zebra"]


def test_another_process_is_given_the_pipeline(ours):
    expected = [answer(ours, image) for image in IMAGES]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(answer, [(ours, image) for image in IMAGES]) == expected


def test_joblib_is_given_the_pipeline(ours):
    joblib = pytest.importorskip("joblib")
    expected = [answer(ours, image) for image in IMAGES]
    for backend in ("loky", "threading"):
        jobs = (joblib.delayed(answer)(ours, image) for image in IMAGES)
        assert joblib.Parallel(2, backend=backend)(jobs) == expected


def test_threads_share_pipelines_one_cache_and_the_linter(ours, monkeypatch):
    """A tokenizer cuts and pads as the last call told it: two calls at once disturb each other, now and then."""
    twin = copy.copy(ours)  # the same model, processor and cache
    lists = [["sky", f"a thing called {'very ' * row}odd"] for row in range(12)]
    expected = [(segments(ours(IMAGES[0], candidate_labels=labels)), str(ours.lint_labels(labels))) for labels in lists]
    tokenizer, inside, together = type(ours.processor.tokenizer), [], []
    call = tokenizer.__call__

    def watched(self, *words, **options):
        inside.append(None)
        try:
            time.sleep(0.001)
            together.append(len(inside))
            return call(self, *words, **options)
        finally:
            inside.pop()

    def work(row: int) -> bool:
        segment, place = (ours, twin)[row % 2], row % len(lists)
        if row % 7 == 0:
            ours.text_cache._vectors.clear()
        if row % 3:
            return str(segment.lint_labels(lists[place])) == expected[place][1]
        return segments(segment(IMAGES[0], candidate_labels=lists[place])) == expected[place][0]

    monkeypatch.setattr(tokenizer, "__call__", watched)
    monkeypatch.setattr(ours.text_cache, "folder", None)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(240)))
    assert len(together) > 240 and max(together) == 1


def test_an_iterator_whose_first_result_was_taken_loses_none(ours):
    images = [*IMAGES, *IMAGES]
    expected = [segments(result) for result in ours(images)]
    results = ours(iter(images), batch_size=4)
    assert [segments(next(results)), *(segments(result) for result in results)] == expected


def test_proposals_serve_the_same_checkpoint_in_another_precision_and_where_weights_cannot_be_read(ours, folder):
    proposals = ours.propose(IMAGES[0])
    for dtype in (torch.bfloat16, torch.float16):
        half = pipeline(model=folder, trust_remote_code=True, dtype=dtype)
        assert half(proposals) and ours(half.propose(IMAGES[0]))
    quantised = copy.copy(ours)
    quantised.model = torch.ao.quantization.quantize_dynamic(ours.model, {torch.nn.Linear})
    assert set(quantised.propose(IMAGES[0]).checkpoint) < set(proposals.checkpoint)
    assert ours(quantised.propose(IMAGES[0])) and quantised(proposals)
    with pytest.raises(ValueError, match="another checkpoint"):
        ours(dataclasses.replace(proposals, outputs=[{"class_embeds": torch.zeros(1, 5, 99)}], checkpoint={}))


def test_a_pipeline_whose_weights_are_brought_one_layer_at_a_time(ours):
    accelerate = pytest.importorskip("accelerate")
    labels = ["sky", "zebra", "red square"]
    expected, report = segments(ours(IMAGES[0], candidate_labels=labels)), str(ours.lint_labels(labels))
    offloaded = copy.deepcopy(ours)
    accelerate.cpu_offload(offloaded.model, execution_device=torch.device("cpu"))
    assert segments(offloaded(IMAGES[0], candidate_labels=labels)) == expected
    assert segments(ours(offloaded.propose(IMAGES[0]), candidate_labels=labels)) == expected
    assert str(offloaded.lint_labels(labels)) == report
