import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from zs3.command_line import InputError
from zs3.label_space import (
    BENCHMARKS,
    CLASSES_FOLDER,
    LabelSpace,
    benchmark_spaces,
    load_label_space,
    load_text_embeds,
    source_ids,
)

SIZES = {
    "ade20k_150": (150, 0, 255),
    "ade20k_847": (847, 0, 65535),
    "coco_stuff_171": (171, 15, 255),
    "pascal_context_459": (459, 0, 65535),
    "pascal_context_59": (59, 0, 255),
    "scenes": (24, 8, 255),
    "scenes_90": (90, 8, 255),
    "voc_20": (20, 5, 255),
    "voc_21": (21, 5, 255),
}
THINGS = {"ade20k_150": 100, "coco_stuff_171": 80, "scenes": 16, "scenes_90": 80, "voc_20": 20}  # the others: unknown
SYNTHETIC = ("scenes", "scenes_90")  # without an archive
SHARED = Path(__file__).parents[2] / "shared" / "classes"


@pytest.mark.parametrize("name", SIZES)
def test_benchmarks_have_the_published_numbers_of_classes(name):
    space = load_label_space(name)
    assert (len(space.class_names), len(space.unseen), space.ignore_index) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_benchmarks_have_the_published_numbers_of_things(name):
    things = load_label_space(name).things
    assert (None if things is None else len(things)) == THINGS.get(name)
    if name in THINGS and name not in SYNTHETIC:
        assert json.loads((CLASSES_FOLDER / f"{name}.json").read_text())["things_source"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/classes is not here")
def test_the_things_of_coco_stuff_are_those_of_the_published_list():
    theirs, space = json.loads((SHARED / "coco_stuff_171.json").read_text()), load_label_space("coco_stuff_171")
    assert [name in space.things for name in space.class_names] == [kind == 1 for kind in theirs["isthing"]]


def test_the_stuff_of_ade20k_is_at_the_published_ids():
    """detectron2's and Mask2Former's ADE20K_150_CATEGORIES, those with isthing 0."""
    stuff = {*range(7), 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79}
    stuff |= {84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145}
    assert np.flatnonzero(~load_label_space("ade20k_150").is_thing.numpy()).tolist() == sorted(stuff)


def test_voc_holds_its_names_in_the_order_of_its_ids():
    space = load_label_space("voc_20")
    assert space.class_names[:3] == ["aeroplane", "bicycle", "bird"] and space.class_names[14] == "person"
    assert space.unseen == ["pottedplant", "sheep", "sofa", "train", "tvmonitor"]
    assert space.is_seen.tolist() == [True] * 15 + [False] * 5
    assert space.seen == space.class_names[:15]


def test_coco_unseen_names_stand_at_the_published_ids():
    space = load_label_space("coco_stuff_171")
    ids = [space.class_names.index(name) for name in space.unseen]
    assert ids == [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]
    values = [source_ids("coco_stuff_171")[index] for index in ids]
    assert values == [20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171]


def test_coco_values_are_all_182_but_those_of_the_11_removed_labels():
    removed = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]  # label ids from 1; a map holds one less
    assert source_ids("coco_stuff_171") == [label - 1 for label in range(1, 183) if label not in removed]


def test_voc_21_is_the_background_and_voc_20():
    assert load_label_space("voc_21").class_names == ["background", *load_label_space("voc_20").class_names]
    assert load_label_space("voc_21").unseen == load_label_space("voc_20").unseen
    assert (source_ids("voc_20"), source_ids("voc_21")) == (list(range(1, 21)), list(range(21)))


def test_the_59_of_pascal_context_are_among_the_459():
    of_value = dict(
        zip(source_ids("pascal_context_459"), load_label_space("pascal_context_459").class_names, strict=True)
    )
    names = load_label_space("pascal_context_59").class_names
    renamed = {name: of_value[value] for name, value in zip(names, source_ids("pascal_context_59"), strict=True)}
    assert {name: other for name, other in renamed.items() if other != name} == {"diningtable": "table"}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in SYNTHETIC])
def test_every_class_has_one_value_in_the_archive_and_its_synonyms(name):
    content = json.loads((CLASSES_FOLDER / f"{name}.json").read_text())
    assert content.keys() >= {"name", "source", "source_commit", "source_ids", "source_ids_meaning", "notes"}
    assert len(set(source_ids(name))) == len(content["classes"])
    if "synonyms" in content:
        assert len(content["synonyms"]) == len(content["classes"]) and all(content["synonyms"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/classes is not here")
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ade20k_150", None),
        ("ade20k_847", "ade20k_full_ids"),
        ("coco_stuff_171", "stuffthingmaps_ids"),
        ("pascal_context_459", "pascal_context_459_ids"),
        ("pascal_context_59", "pascal_context_459_ids"),
        ("voc_20", "voc_ids"),
    ],
)
def test_classes_are_those_of_the_published_lists_entry_by_entry(name, key):
    theirs, space = json.loads((SHARED / f"{name}.json").read_text()), load_label_space(name)
    for ours, published in ((space.class_names, theirs["classes"]), (space.unseen, theirs["unseen"])):
        assert len(ours) == len(published)
        for index, (mine, published_name) in enumerate(zip(ours, published, strict=True)):
            assert mine == published_name, index
    assert space.ignore_index == theirs["ignore_label"]
    assert source_ids(name) == (theirs[key] if key else list(range(1, 151)))


def test_is_seen_follows_the_names_wherever_the_unseen_stand():
    space = LabelSpace(["a", "b", "c", "d"], ["d", "b"], 255)
    assert space.is_seen.tolist() == [True, False, True, False]
    assert space.seen == ["a", "c"]


def test_tuples_and_later_changes_of_the_given_lists_are_harmless():
    names = ["a", "b"]
    space = LabelSpace(names, ("b",), 255)
    names.append("c")
    assert (space.class_names, space.unseen) == (["a", "b"], ["b"])


def test_file_and_its_folder_load_alike(tmp_path):
    content = {"classes": ["a", "b"], "unseen": ["b"], "ignore_label": 9, "source": "by hand"}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert (
        load_label_space(tmp_path / "classes.json")
        == load_label_space(str(tmp_path))
        == LabelSpace(["a", "b"], ["b"], 9)
    )


def test_a_folder_called_like_a_benchmark_keeps_its_own_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc_20").mkdir()
    content = {"classes": ["background", "cow"], "unseen": [], "ignore_label": 255}
    (tmp_path / "voc_20" / "classes.json").write_text(json.dumps(content))
    assert load_label_space("voc_20").class_names == ["background", "cow"]


def test_things_are_names_of_classes_and_are_not_part_of_the_digest():
    plain, space = LabelSpace(["a", "b", "c"], ["b"]), LabelSpace(["a", "b", "c"], ["b"], things=("c", "a"))
    assert plain.things is plain.is_thing is None
    assert space.things == ["c", "a"] and space.is_thing.tolist() == [True, False, True]
    assert LabelSpace(["a"], [], things=[]).is_thing.tolist() == [False]
    assert space.sha256 == plain.sha256
    for things, message in (
        (["d"], "things holds 'd', which class_names lacks: add it"),
        (["B"], "things holds 'B', which class_names lacks: spell it 'b' in both"),
        (["a", "A"], "things: names repeat: 'a' and 'A' are one name"),
        ("ab", "things must be a list of names"),
        ({"a": True}, "things must be a list of names"),
    ):
        with pytest.raises(InputError, match=message):
            LabelSpace(["a", "b", "c"], ["b"], things=things)


# ---- class splits ------------------------------------------------------------------------------------------

CONTENT = {"classes": ["a", "b", "c"], "unseen": ["b"], "ignore_label": 255}


def write(folder: Path, **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({**CONTENT, **more}))
    return folder


def test_a_number_behind_a_colon_selects_the_unseen_names_of_a_split(tmp_path):
    folder = write(tmp_path / "set", splits=[["c"], ["a", "b"], []], things=["a"])
    assert load_label_space(folder) == LabelSpace(["a", "b", "c"], ["b"], 255, ["a"])
    for number, unseen in enumerate((["c"], ["a", "b"], [])):
        for path in (folder, folder / "classes.json"):
            assert load_label_space(f"{path}:{number}") == LabelSpace(["a", "b", "c"], unseen, 255, ["a"])


def test_every_split_of_a_benchmark_has_a_digest_of_its_own():
    spaces = benchmark_spaces("scenes")
    assert [load_label_space("scenes"), *(load_label_space(f"scenes:{number}") for number in range(12))] == spaces
    assert len({space.sha256 for space in spaces[1:]}) == 12
    assert benchmark_spaces("voc_20") == [load_label_space("voc_20")]


def test_a_folder_or_file_whose_name_has_a_colon_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "scenes:3")
    write(tmp_path / "set", splits=[["c"]])
    (tmp_path / "set:0").write_text(json.dumps({**CONTENT, "unseen": ["a"]}))
    assert load_label_space("scenes:3").class_names == ["a", "b", "c"]
    assert load_label_space("set:0").unseen == ["a"]
    assert len(load_label_space("scenes:2").class_names) == 24


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes:", "scenes.json has no split '': its splits are 0 to 11"),
        ("scenes:x", "scenes.json has no split 'x': its splits are 0 to 11"),
        ("scenes:12", "scenes.json has no split '12': its splits are 0 to 11"),
        ("scenes:-1", "has no split '-1'"),
        ("scenes:03", "has no split '03'"),
        ("scenes:\u0663", "has no split"),  # a digit three, but not of ASCII
        ("scenes:" + "1" * 200, "has no split"),
        ("voc_20:0", "voc_20.json has no splits: leave out ':0'"),
        ("scens:3", "label space 'scens:3' is no known name, and no such file exists; did you mean scenes"),
        (":3", "label space ':3' is no known name"),
        ("x" * 5000, "cannot look for label space ...x+: File name too long"),
        ("x" * 5000 + ":3", "cannot look for label space ...x+:3: File name too long"),
    ],
)
def test_a_split_that_does_not_exist_is_refused_in_a_line(name, message):
    with pytest.raises(InputError, match=message) as refusal:
        load_label_space(name)
    assert len(str(refusal.value)) <= 200 and "\n" not in str(refusal.value)


def test_splits_of_a_wrong_form_are_refused(tmp_path):
    for splits in (None, [], {"0": ["a"]}, "a"):
        with pytest.raises(InputError, match="has no splits: leave out ':0'"):
            load_label_space(f"{write(tmp_path / 'set', splits=splits)}:0")
    for split, message in ((["d"], "unseen holds 'd', which classes lacks"), ("a", "unseen must be a list of names")):
        folder = write(tmp_path / "set", splits=[[], split])
        with pytest.raises(InputError, match=f"classes.json, split 1: {message}"):
            load_label_space(f"{folder}:1")


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_names", "unseen", "ignore_index", "message"),
    [
        (["a", "b", "a"], [], 255, "'a' is there twice"),
        (["cow", "b", "Cow"], [], 255, "'cow' and 'Cow' are one name"),
        (["traffic light", "traffic  Light "], [], 255, "'traffic light' and 'traffic  Light ' are one name"),
        (["caf\u00e9", "cafe\u0301"], [], 255, "are one name"),
        (["stra\u00dfe", "STRASSE"], [], 255, "are one name"),
        (["cow", "cow\u200b"], [], 255, "are one name"),
        (["co w", "co\u00a0w"], [], 255, "are one name"),
        (["a", "b"], ["b", "b"], 255, "unseen: names repeat"),
        (["a", "b"], ["c"], 255, "unseen holds 'c'"),
        (["a", "Cow"], ["cow"], 255, "unseen holds 'cow', which class_names lacks: spell it 'Cow' in both"),
        (["a", "b"], [], 1, "outside ids 0 to 1"),
        (["a", "b"], [], "255", "must be an integer"),
        ([], [], 255, "empty"),
        (["a", "b"], [], True, "must be an integer"),
        (["a", ""], [], 255, "a text that is not blank"),
        (["a", " \t"], [], 255, "not blank"),
        (["a", "\u200b"], [], 255, "not blank"),
        (["a", "b\nc"], [], 255, "one line"),
        (["a", "b\u2028c"], [], 255, "one line"),
        (["a", "b\x1b[31mc"], [], 255, "control characters"),
        (["a", "\ud800"], [], 255, "control characters"),
        (["a", 3], [], 255, "a text"),
        ("ab", [], 255, "a list of names"),
    ],
)
def test_impossible_label_spaces_are_refused(class_names, unseen, ignore_index, message):
    with pytest.raises(InputError, match=message):
        LabelSpace(class_names, unseen, ignore_index)


def test_256_classes_need_an_ignored_id_beyond_255():
    names = [str(index) for index in range(256)]
    with pytest.raises(InputError, match="255"):
        LabelSpace(names, [], 255)
    assert LabelSpace(names, [], 65535).ignore_index == 65535


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"classes": ["a"], "unsen": [], "ignore_label": 255}', "classes.json lacks unseen"),
        ('{"classes": ["a", "a"], "unseen": [], "ignore_label": 255}', "classes.json: classes: names repeat"),
        ('["a"]', "lacks classes, unseen, ignore_label"),
        ("{", "cannot read .*classes.json as JSON"),
        ("[" * 100_000, "cannot read .*classes.json as JSON"),
        ('{"classes": ' + "[" * 100_000, "cannot read .*classes.json as JSON"),
        ('{"ignore_label": 1' + "0" * 5000 + "}", "cannot read .*classes.json as JSON"),
    ],
)
def test_bad_files_are_named_in_a_line(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InputError, match=message) as refusal:
        load_label_space(tmp_path)
    assert len(str(refusal.value)) <= 200


def test_unknown_name_meets_the_closest_one(tmp_path):
    with pytest.raises(InputError, match=r"did you mean voc_20\?"):
        load_label_space("voc20")
    with pytest.raises(InputError, match="classes.json is missing"):
        load_label_space(tmp_path)


def test_the_docs_name_every_label_space_with_its_stamp():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6]
    stamps = {cells[0].strip(" `"): [cell.strip(" `") for cell in cells[1:]] for cells in rows}
    assert stamps.keys() == set(BENCHMARKS) == set(SIZES)
    for name, cells in stamps.items():
        space = load_label_space(name)
        content = json.dumps([space.class_names, space.unseen, space.ignore_index])
        digest = hashlib.sha256(content.encode()).hexdigest()
        assert cells == [str(len(space.class_names)), str(len(space.unseen)), str(space.ignore_index), digest]


def save(path: Path, rows: np.ndarray) -> Path:
    np.save(path, rows)
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([[1.0, 0], [0, 0]]), "1 of 2 text vectors have no direction, row 1 first"),
        (np.array([[1.0, 0], [np.nan, 1]]), "row 1 first"),
        (np.array([[np.inf, 0], [0, 1]]), "row 0 first"),
        (np.array([[1e300, 0], [0, 1]]), "row 0 first"),
        (np.eye(2, dtype=np.int64), "holds int64: text vectors are floating-point numbers"),
        (np.eye(2, dtype=bool), "holds bool"),
        (np.eye(2, dtype=np.complex64), "holds complex64"),
        (np.array([["a", "b"], ["c", "d"]]), "holds <U1"),
        (np.array([[None, 1], [2, 3]]), "cannot read text vectors"),
        (np.ones(2), "has shape .2,., expected .2, D."),
        (np.ones((3, 2)), "has shape .3, 2., expected .2, D."),
        (np.ones((2, 0)), r"\(C, 0\)|no direction"),
    ],
)
def test_text_vectors_without_a_direction_or_of_a_wrong_type_are_refused(tmp_path, rows, message):
    with pytest.raises(InputError, match=message) as refused:
        load_text_embeds(save(tmp_path / "text.npy", rows), 2)
    assert "text.npy" in str(refused.value) and "\n" not in str(refused.value)


def test_text_vectors_come_out_in_unit_length(tmp_path):
    vectors = load_text_embeds(save(tmp_path / "text.npy", np.array([[3.0, 4], [0, -2]], dtype=np.float16)), 2, 2)
    assert vectors.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, -1]]


def test_a_label_space_is_bounded_and_quick():
    names = [f"class {index}" for index in range(10_000)]
    before = time.monotonic()
    space = LabelSpace(names, names[1::2], 65535)
    assert space.seen == names[::2] and int(space.is_seen.sum()) == 5000
    assert time.monotonic() - before < 20  # each name against each takes minutes
    with pytest.raises(InputError, match="class_names holds 10,001 names: a label space has 10,000 or less"):
        LabelSpace([*names, "one more"], [], 65535)
    with pytest.raises(InputError, match="ignore_index 1000.*must be an integer outside"):
        LabelSpace(["a"], [], 10**400)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read_over(encoding, tmp_path):
    text = '{"classes": ["größe", "b"], "unseen": ["b"], "ignore_label": 255}'
    (tmp_path / "classes.json").write_text(text, encoding=encoding)
    assert load_label_space(tmp_path).class_names == ["größe", "b"]


def test_vectors_whose_header_says_more_than_the_file_holds_are_refused(tmp_path):
    """A header of 4 TB, of which numpy would reserve as much."""
    np.save(tmp_path / "a.npy", np.ones((5, 8), np.float32))
    content = (tmp_path / "a.npy").read_bytes()
    shape, huge = b"(5, 8), }", b"(1000000000, 1000), }"
    spare = len(huge) - len(shape)
    (tmp_path / "a.npy").write_bytes(content.replace(shape + b" " * spare, huge))
    with pytest.raises(InputError, match="cannot read text vectors"):
        load_text_embeds(tmp_path / "a.npy", 5)
