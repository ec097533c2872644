import json

import pytest

from zs3.command_line import InputError
from zs3.label_space import BENCHMARKS, CLASSES_FOLDER, LabelSpace, load_label_space

SIZES = {
    "ade20k_150": (150, 0, 255),
    "ade20k_847": (847, 0, 65535),
    "coco_stuff_171": (171, 15, 255),
    "pascal_context_459": (459, 0, 65535),
    "pascal_context_59": (59, 0, 255),
    "scenes": (20, 5, 255),
    "voc_20": (20, 5, 255),
}


@pytest.mark.parametrize("name", SIZES)
def test_benchmarks_have_the_published_numbers_of_classes(name):
    space = load_label_space(name)
    assert (len(space.class_names), len(space.unseen), space.ignore_index) == SIZES[name]


def test_every_benchmark_is_offered_by_name():
    assert set(BENCHMARKS) == set(SIZES)


def test_voc_holds_its_names_in_the_order_of_its_ids():
    space = load_label_space("voc_20")
    assert space.class_names[:3] == ["aeroplane", "bicycle", "bird"] and space.class_names[14] == "person"
    assert space.unseen == ["pottedplant", "sheep", "sofa", "train", "tvmonitor"]
    assert space.is_seen.tolist() == [True] * 15 + [False] * 5
    assert space.seen == space.class_names[:15]


def test_coco_unseen_names_stand_at_the_published_ids():
    space = load_label_space("coco_stuff_171")
    ids = [space.class_names.index(name) for name in space.unseen]
    assert ids == json.loads((CLASSES_FOLDER / "coco_stuff_171.json").read_text())["unseen_contiguous_ids"]


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
    assert len(load_label_space("voc_20").class_names) == 20
    content = {"classes": ["background", "cow"], "unseen": [], "ignore_label": 255}
    (tmp_path / "voc_20" / "classes.json").write_text(json.dumps(content))
    assert load_label_space("voc_20").class_names == ["background", "cow"]


@pytest.mark.parametrize(
    ("class_names", "unseen", "ignore_index", "message"),
    [
        (["a", "b", "a"], [], 255, "repeats \\['a'\\]"),
        (["a", "b"], ["b", "b"], 255, "unseen repeats"),
        (["a", "b"], ["c"], 255, "unseen holds \\['c'\\]"),
        (["a", "b"], [], 1, "outside ids 0 to 1"),
        (["a", "b"], [], "255", "must be an integer"),
        ([], [], 255, "empty"),
        (["a", ""], [], 255, "non-empty strings"),
        ("ab", [], 255, "list of non-empty strings"),
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
        ('{"classes": ["a", "a"], "unseen": [], "ignore_label": 255}', "classes.json: class_names repeats"),
        ('["a"]', "lacks classes, unseen, ignore_label"),
        ("{", "cannot read .*classes.json as JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_label_space(tmp_path)


def test_unknown_name_meets_the_closest_one(tmp_path):
    with pytest.raises(InputError, match=r"did you mean voc_20\?"):
        load_label_space("voc20")
    with pytest.raises(InputError, match="classes.json is missing"):
        load_label_space(tmp_path)
