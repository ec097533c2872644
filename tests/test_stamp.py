"""A run resumes only with its first inputs, and its record of seen classes never shrinks."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint
from tiny_run import RECIPE, write_data
from transformers import CLIPTokenizer

from train import main
from zs3.command_line import InputError, run
from zs3.convert.nouns import write_nouns
from zs3.data.contents import contents_of
from zs3.data.records import load_split, stream_split
from zs3.label_space import LabelSpace, load_label_space
from zs3.pseudo_labels import write_shard
from zs3.scenes.render import CLASS_NAMES, UNSEEN
from zs3.training.arguments import TrainArgs
from zs3.training.stamp import (
    SeenRecord,
    check_not_unseen,
    joined,
    label_space_change,
    read_stamp,
    stamped_space,
)

IMAGE_IDS = [f"{index:05d}" for index in range(6)]
SEEN = [name for name in CLASS_NAMES if name not in UNSEEN]
COMMON = {"max_steps": "4", "checkpointing_steps": "2", "unseen_labels": "none"}
VECTORS = {"config": "recipe.yaml", "dataset": "scenes", "text_embeds": "text.npy"}
START = {"config": "plain.yaml", "dataset": "scenes", "init_from": "start"}
RUNS = {
    "folder": VECTORS,
    "label_space": {**VECTORS, "label_space": "classes.json"},
    "stream": {**VECTORS, "streaming": "true"},
    "parquet": {**VECTORS, "dataset": "parquet", "label_space": "classes.json"},
    "parquet_stream": {**VECTORS, "dataset": "parquet", "label_space": "classes.json", "streaming": "true"},
    "pseudo": {**VECTORS, "unseen_labels": "scores"},
    "start": START,
    "captions": {**START, "caption_nouns": "nouns"},
}


def command(name: str) -> list[str]:
    values = {**COMMON, **RUNS[name], "output_dir": f"runs/{name}"}
    return ["train.py", *(word for flag, value in values.items() for word in (f"--{flag}", value))]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with data, and runs that were stopped after two of their four steps."""
    folder = tmp_path_factory.mktemp("begun")
    write_data(folder)
    shutil.copy(folder / "scenes" / "classes.json", folder / "classes.json")
    (folder / "plain.yaml").write_text(yaml.safe_dump({n: RECIPE[n] for n in RECIPE if hasattr(TrainArgs(), n)}))
    write_parquet(folder / "parquet")
    write_scores(folder / "scores", seed=0)
    write_captions(folder / "nouns", said=0)
    save_checkpoint(folder / "start", seen_class_names=SEEN[:3], unseen_labels="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in RUNS:
            patch.setattr(sys, "argv", command(name))
            main()
            shutil.rmtree(folder / "runs" / name / "final")
            shutil.rmtree(folder / "runs" / name / "checkpoints" / "step_00000004")
    return folder


@pytest.fixture
def here(begun, tmp_path, monkeypatch) -> Path:
    """A copy of it as the working folder."""
    folder = shutil.copytree(begun, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


def write_parquet(folder: Path, one_map: bool = False) -> None:
    """The scenes in one shard; one_map: that of the first picture for all."""
    scenes, rows = folder.parent / "scenes" / "train", []
    for image_id in IMAGE_IDS:
        image, label = (scenes / kind / f"{image_id}.png" for kind in ("images", "labels"))
        rows.append([{"bytes": file.read_bytes(), "path": file.name} for file in (image, label)])
        rows[-1][1] = rows[0][1] if one_map else rows[-1][1]
    images, labels = zip(*rows, strict=True)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": images, "label": labels, "image_id": IMAGE_IDS})
    pyarrow.parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")


def write_scores(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    scores = np.random.default_rng(seed).random((6, len(UNSEEN))).astype(np.float32)
    write_shard(folder / "scores-00000-of-00001.parquet", IMAGE_IDS, scores, UNSEEN, b"")


def write_captions(folder: Path, said: int) -> None:
    folder.mkdir(exist_ok=True)
    write_nouns(folder / "nouns-train.parquet", IMAGE_IDS, [[said]] * 6)
    settings = {"label_space": "scenes", "label_space_sha256": load_label_space(folder.parent / "scenes").sha256}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "classes.json").write_text(json.dumps({"classes": [*SEEN, "lawn"], "unseen": [], "ignore_label": 255}))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_here(monkeypatch, name: str) -> None:
    """Starts or resumes a run of RUNS in this process."""
    monkeypatch.setattr(sys, "argv", command(name))
    main()


@pytest.fixture
def refusal(here, monkeypatch, capsys) -> Callable[..., str]:
    """A function: the one line with which a run is refused. Nothing in the run's folder changes, unless it may."""

    def refusal(name: str = "folder", may_change: bool = False) -> str:
        before = files(Path("runs") / name)
        monkeypatch.setattr(sys, "argv", command(name))
        with pytest.raises(SystemExit) as stopped:
            run(main)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2 and len(line) <= 200
        assert may_change or files(Path("runs") / name) == before
        return line

    return refusal


@pytest.fixture
def finished(here, monkeypatch) -> Path:
    """The run "folder" with its final model, and without checkpoints."""
    train_here(monkeypatch, "folder")
    shutil.rmtree("runs/folder/checkpoints")
    return Path("runs/folder")


# ---- what has changed --------------------------------------------------------------------------------------


def edited(file: str, **changes: object) -> Callable[[], None]:
    """An edit of a JSON file. A value that is a function makes the new value of the old one."""

    def edit() -> None:
        content = json.loads(Path(file).read_text())
        for name, value in changes.items():
            content[name] = value(content[name]) if callable(value) else value
        Path(file).write_text(json.dumps(content))

    return edit


classes = partial(edited, "scenes/classes.json")


def swapped(names: list[str]) -> list[str]:
    return [names[1], names[0], *names[2:]]


def change_record(change: Callable[[Path], object]) -> None:
    """Changes a picture and its label map."""
    for kind in ("images", "labels"):
        change(Path(f"scenes/train/{kind}/00003.png"))


remove_picture = partial(change_record, Path.unlink)
rename_picture = partial(change_record, lambda file: file.rename(file.with_name("other.png")))


def replace(kind: str, same_size: bool = False) -> Callable[[], None]:
    """Another picture or label map of the same name; of the same size, only a few of its bytes are others."""

    def edit() -> None:
        path = Path(f"scenes/train/{kind}/00002.png")
        size = path.stat().st_size
        if same_size:
            content = bytearray(path.read_bytes())
            content[size // 2] ^= 1
            path.write_bytes(content)
        else:
            Image.fromarray(np.asarray(Image.open(path))[::-1].copy() * 0).save(path)
        assert (path.stat().st_size == size) == same_size

    return edit


def other_weights() -> None:
    weights = load_file("start/model.safetensors")
    name = "class_projection.0.weight"
    save_file({**weights, name: weights[name] + 1}, "start/model.safetensors", {"format": "pt"})


def other_tokenizer() -> None:
    tokenizer = CLIPTokenizer.from_pretrained("start")
    letters = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    letters[0:512] = letters[511::-1]
    other = CLIPTokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    other.model_max_length = 77
    other.save_pretrained("start")


other_table = partial(write_parquet, Path("parquet"), one_map=True)

CASES = {
    "a seen class is unseen": ("folder", classes(unseen=[*UNSEEN, "sand"]), "'sand' was seen, is unseen now"),
    "an unseen class is seen": ("folder", classes(unseen=UNSEEN[1:]), f"{UNSEEN[0]!r} was unseen, is seen now"),
    "it is so in a stream": ("stream", classes(unseen=[*UNSEEN, "sand"]), "'sand' was seen, is unseen now"),
    "it is so beside a text tower": ("start", classes(unseen=[*UNSEEN, "snow"]), "'snow' was seen, is unseen"),
    "two names are swapped": ("folder", classes(classes=swapped), "id 0 was 'grass', is 'sky' now"),
    "a name is another": ("folder", classes(classes=["lawn", *CLASS_NAMES[1:]]), "'grass' was seen, is no class now"),
    "a name is spelled otherwise": ("folder", classes(classes=["Grass", *CLASS_NAMES[1:]]), "'grass', is 'Grass' now"),
    "a class is added": ("start", classes(classes=[*CLASS_NAMES, "moon"]), "'moon' is a new class"),
    "the unseen names are turned": ("folder", classes(unseen=UNSEEN[::-1]), "unseen names are in another order"),
    "the ignored id is another": ("folder", classes(ignore_label=254), "the ignored id was 255, is 254 now"),
    "--label_space is edited": ("label_space", edited("classes.json", unseen=[*UNSEEN, "sky"]), "'sky' was seen"),
    "other vectors": ("folder", lambda: np.save("text.npy", np.load("text.npy")[::-1]), "text vectors in text.npy"),
    "other vectors of a stream": ("stream", lambda: np.save("text.npy", -np.load("text.npy")), "other text vectors"),
    "a picture is removed": ("folder", remove_picture, "6 pictures then, 5 now"),
    "of a stream a picture is removed": ("stream", remove_picture, "6 pictures then, 5 now"),
    "a picture is renamed": ("folder", rename_picture, "pictures of other names in scenes"),
    "another picture": ("folder", replace("images"), "other pictures in scenes"),
    "another picture of one size": ("folder", replace("images", same_size=True), "other pictures in scenes"),
    "another map": ("folder", replace("labels"), "other label maps in scenes"),
    "another map of one size": ("folder", replace("labels", same_size=True), "other label maps in scenes"),
    "another map in a stream": ("stream", replace("labels"), "other label maps in scenes"),
    "another table": ("parquet", other_table, "other parquet files in parquet"),
    "another streamed table": ("parquet_stream", other_table, "other parquet files in parquet"),
    "other pseudo labels": ("pseudo", lambda: write_scores(Path("scores"), seed=1), "other pseudo labels in scores"),
    "other captions": ("captions", lambda: write_captions(Path("nouns"), said=1), "other caption nouns in nouns"),
    "other weights of the start": ("start", other_weights, "other weights in start"),
    "another record of the start": (
        "start",
        edited("start/config.json", seen_class_names=[]),
        "another record of seen classes in start",
    ),
    "other prompts of the start": (
        "start",
        edited("start/processor_config.json", prompt_templates=["an etching of a {}."]),
        "other prompts, or another tokenizer",
    ),
    "another tokenizer": ("start", other_tokenizer, "other prompts, or another tokenizer"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_not_go_on_where(case, refusal):
    name, change, words = CASES[case]
    change()
    line = refusal(name)
    assert words in line and "restore the run's first inputs, or choose another --output_dir" in line


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_where_nothing_has_changed(name, here, monkeypatch, capsys):
    train_here(monkeypatch, name)
    out = capsys.readouterr().out
    assert "resumed   at step 2" in out and "warning" not in out
    assert (here / "runs" / name / "final" / "config.json").is_file()


def test_a_folder_that_left_nothing_takes_other_data(here, monkeypatch):
    shutil.rmtree("runs/folder/checkpoints")
    classes(unseen=[*UNSEEN, "sand"])()
    train_here(monkeypatch, "folder")
    saved = json.loads(Path("runs/folder/final/config.json").read_text())
    assert set(saved["seen_class_names"]) == {*SEEN} - {"sand"}
    assert read_stamp(Path("runs/folder/stamp.json"))["label_space"]["unseen"] == [*UNSEEN, "sand"]


def test_a_finished_run_is_compared_too(finished, refusal):
    classes(unseen=[*UNSEEN, "sand"])()
    assert "'sand' was seen, is unseen now" in refusal()


# ---- the record --------------------------------------------------------------------------------------------


def shrink(stamp: Path) -> None:
    content = json.loads(stamp.read_text())
    content["seen_class_names"].remove("sand")
    content["label_space"]["unseen"].append("sand")
    stamp.write_text(json.dumps(content))


STAMPS = {
    "deleted": lambda stamp: stamp.unlink(),
    "edited": shrink,
    "empty": lambda stamp: stamp.write_text(""),
    "a list": lambda stamp: stamp.write_text("[]"),
    "of another kind": lambda stamp: stamp.write_text('{"label_space": 3}'),
    "a torn one": lambda stamp: stamp.write_text(stamp.read_text()[:100]),
}


@pytest.mark.parametrize("state", STAMPS)
def test_the_record_does_not_shrink_where_the_stamp_was(state, refusal, monkeypatch):
    STAMPS[state](Path("runs/folder/stamp.json"))
    classes(unseen=[*UNSEEN, "sand"])()
    assert "'sand' was seen, is unseen now" in refusal()
    shutil.copy("classes.json", "scenes/classes.json")  # restored
    train_here(monkeypatch, "folder")
    assert json.loads(Path("runs/folder/final/config.json").read_text())["seen_class_names"] == SEEN
    assert read_stamp(Path("runs/folder/stamp.json"))["seen_class_names"] == SEEN


@pytest.mark.parametrize("change", [lambda stamp: stamp.unlink(), shrink])
def test_a_checkpoint_whose_copy_was_changed_is_not_used(change, refusal):
    change(Path("runs/folder/checkpoints/step_00000002/stamp.json"))
    assert "no checkpoint in runs/folder/checkpoints is whole" in refusal(may_change=True)


def test_where_no_checkpoint_has_a_copy_a_damaged_stamp_is_one_line(finished, refusal):
    (finished / "stamp.json").write_text("{")
    assert "runs/folder/stamp.json is no JSON" in refusal()


def test_a_finished_run_without_a_stamp_keeps_what_its_model_saw(finished, refusal):
    (finished / "stamp.json").unlink()
    classes(unseen=[*UNSEEN, "sand"])()
    assert "this run saw masks of 'sand', which is unseen now" in refusal()


def test_records_join_to_all_names_once_and_the_strongest_image_labels():
    one, other = SeenRecord(["sky", "Red  Circle"], "captions"), SeenRecord(["red circle", "sea"], "pseudo")
    assert joined([one, other]) == SeenRecord(["sky", "Red  Circle", "sea"], "captions")
    assert joined([one, SeenRecord(None, "none")]) == SeenRecord(None, None)
    assert joined([one, SeenRecord([], None)]) == SeenRecord(["sky", "Red  Circle"], None)


def test_a_name_that_was_seen_is_unseen_under_no_spelling():
    with pytest.raises(InputError, match="this run saw masks of 'TV set'"):
        check_not_unseen(SeenRecord(["tv  Set"], "none"), ["sea", "TV set"])
    check_not_unseen(SeenRecord(["tv set"], "none"), ["sea"])
    check_not_unseen(SeenRecord(None, None), ["sea"])


# ---- words and contents ------------------------------------------------------------------------------------


def test_the_change_of_a_label_space_is_short_whatever_the_names_are():
    names = ["a" * 500, "b" * 500]
    one, other = ({"class_names": n, "unseen": [], "ignore_index": 255} for n in (names, names[::-1]))
    assert len(label_space_change(one, other)) < 120
    assert label_space_change(one, one) is None


def test_a_stamp_does_not_depend_on_which_classes_are_things():
    plain, space = (LabelSpace(["a", "b"], ["b"], 255, things) for things in (None, ["a"]))
    fields = {"class_names": ["a", "b"], "unseen": ["b"], "ignore_index": 255}
    assert stamped_space(plain) == stamped_space(space) == fields


def test_a_run_goes_on_where_only_things_were_added(here, monkeypatch, capsys):
    classes(things=["sky"])()
    train_here(monkeypatch, "folder")
    assert "resumed" in capsys.readouterr().out and Path("runs/folder/final").is_dir()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_has_one_content_however_it_is_read(here, streaming):
    space = LabelSpace(list(CLASS_NAMES), list(UNSEEN))
    folder = (stream_split if streaming else load_split)("scenes", "train", space).contents()
    assert folder == load_split("scenes", "train", space).contents() and folder["num_images"] == 6
    table = (stream_split if streaming else load_split)("parquet", "train", space).contents()
    assert ("image_ids_sha256" in table) != streaming  # a streamed table's are not known beforehand
    assert "shard_sizes_sha256" in table and "picture_sizes_sha256" not in table


def test_the_first_pictures_of_a_split_have_the_sizes_of_a_split_of_them_alone(here):
    space = LabelSpace(list(CLASS_NAMES), list(UNSEEN))
    first = load_split("scenes", "train", space).picture_sizes_sha256(3)
    for image_id in IMAGE_IDS[3:]:
        for kind in ("images", "labels"):
            Path(f"scenes/train/{kind}/{image_id}.png").unlink()
    fewer = load_split("scenes", "train", space)
    assert first == fewer.picture_sizes_sha256(99) == fewer.contents()["picture_sizes_sha256"]


def test_a_hub_dataset_is_known_by_its_files_but_for_the_card(monkeypatch):
    found = [SimpleNamespace(rfilename=name, blob_id=name) for name in ("data/train-0.parquet", "README.md")]
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: SimpleNamespace(siblings=found))
    before = contents_of(None, None, "owner/name")
    found[1].blob_id = "another card"
    assert contents_of(None, None, "owner/name") == before and "hub_files_sha256" in before
    found[0].blob_id = "another table"
    assert contents_of(None, None, "owner/name") != before


def test_a_hub_that_does_not_answer_is_not_a_change(monkeypatch, capsys):
    def silent(*args, **kwargs):
        raise OSError("no way there")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", silent)
    assert contents_of(["a"], None, "owner/name").keys() == {"num_images", "image_ids_sha256", "layout"}
    assert "does not list the files of owner/name" in capsys.readouterr().out
