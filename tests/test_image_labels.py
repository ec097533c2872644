import shutil

import numpy as np
import pytest
from test_data import SPACE

from zs3.command_line import InputError
from zs3.data.image_labels import GroundTruthLabels, NoUnseenLabels, PseudoLabels, load_unseen_scores, training_space
from zs3.label_space import LabelSpace

IDS = ["p0", "p1", "p2", "p3"]


def labels_of(source, image_id="a", ids=(0,)):
    labels = source(image_id, np.array(ids, dtype=int), np.random.default_rng(0))
    assert labels.dtype == np.int8
    return labels.tolist()


def test_inductive_training_has_seen_names_alone():
    source = NoUnseenLabels(SPACE)
    assert source.class_names == ["sky", "road", "sea"] and labels_of(source, ids=[1, 3]) == [0, 0, 0]


def test_ground_truth_labels_are_those_of_unseen_names_in_the_picture():
    source = GroundTruthLabels(SPACE)
    assert source.class_names == SPACE.class_names
    assert labels_of(source, ids=[0, 3]) == [0, 0, 0, 1, 0] and labels_of(source, ids=[]) == [0] * 5


def test_supervised_training_has_no_unseen_class():
    assert training_space(SPACE, "inductive") == training_space(SPACE, "transductive") == SPACE
    everything = training_space(SPACE, "supervised")
    assert everything.seen == SPACE.class_names and everything.unseen == [] and everything.ignore_index == 255


def write_scores(file, scores):
    """scores: {image_id: {name: score}}, written as JSON would be: each row a dict."""
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(exist_ok=True)
    names = list(next(iter(scores.values())))
    kind = pyarrow.struct([(name, pyarrow.float32()) for name in names])
    columns = {"image_id": list(scores), "scores": pyarrow.array(list(scores.values()), kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


SCORES = {
    "p3": {"cat": 0.2, "cow": 0.9},
    "p1": {"cat": 0.99, "cow": 0.0},
    "p0": {"cat": 0.5, "cow": 0.989},
    "p2": {"cat": 0.51, "cow": 1.0},
}


@pytest.fixture
def scores_folder(tmp_path):
    """The four images in two shards, in an order of their own."""
    for shard, ids in enumerate((["p3", "p1"], ["p0", "p2"])):
        name = f"scores-{shard:05d}-of-00002.parquet"
        write_scores(tmp_path / "scores" / name, {image_id: SCORES[image_id] for image_id in ids})
    return tmp_path / "scores"


@pytest.mark.parametrize("space", [SPACE, LabelSpace(SPACE.class_names, SPACE.unseen[::-1], 255)])
@pytest.mark.parametrize(("threshold", "unknown_above"), [(0.99, None), (0.99, 0.5), (0.9, 0.2), (0.5, None)])
def test_scores_become_labels_of_their_names_where_they_are_read(scores_folder, space, threshold, unknown_above):
    source = PseudoLabels(scores_folder, space, IDS, threshold, unknown_above)
    assert source.class_names == SPACE.class_names
    for image_id in IDS:
        expected = []
        for name in ("cow", "cat"):  # places 1 and 3 of the class axis
            score = SCORES[image_id][name]
            unknown = unknown_above is not None and unknown_above < score < threshold
            expected.append(1 if score >= threshold else -1 if unknown else 0)
        assert labels_of(source, image_id) == [0, expected[0], 0, expected[1], 0]


def test_the_threshold_of_the_paper_is_the_default(scores_folder):
    source = PseudoLabels(scores_folder, SPACE, IDS)
    assert [labels_of(source, image_id) for image_id in IDS] == [[0] * 5, [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0] * 5]


def test_one_file_of_scores_will_do(tmp_path):
    file = write_scores(tmp_path / "all" / "mine.parquet", {**SCORES, "of another split": SCORES["p0"]})
    assert labels_of(PseudoLabels(file, SPACE, IDS), "p2") == [0, 1, 0, 0, 0]


def renamed(row):
    return {"cow": row["cow"], "dog": row["cat"]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: shard.unlink(), "holds 1 shards, but not the 2 of one run"),
        (lambda shard: write_scores(shard, {i: renamed(SCORES[i]) for i in ("p0", "p2")}), r"other .*names.*'cat'"),
        (lambda shard: write_scores(shard, {"p0": SCORES["p0"]}), r"no row for 1 images \('p2'"),
        (lambda shard: write_scores(shard, {"p0": SCORES["p0"], "p1": SCORES["p1"]}), "one row"),
        (lambda shard: write_scores(shard, {i: {"cat": None, "cow": 1.0} for i in ("p0", "p2")}), "not finite"),
        (lambda shard: shard.write_bytes(b"PAR1 no more"), "cannot read .*scores-00001-of-00002"),
        (lambda shard: shutil.rmtree(shard.parent), "do not exist"),
        (lambda shard: [file.unlink() for file in shard.parent.iterdir()], "holds no shards"),
        (lambda shard: shard.rename(shard.with_name("scores-00001-of-00003.parquet")), "not the 2 of one run"),
    ],
)
def test_bad_pseudo_labels_are_named(scores_folder, spoil, message):
    spoil(scores_folder / "scores-00001-of-00002.parquet")
    with pytest.raises(InputError, match=message):
        PseudoLabels(scores_folder, SPACE, IDS)


def test_of_a_stream_missing_scores_are_missed_when_the_picture_comes(scores_folder):
    source = PseudoLabels(scores_folder, SPACE, None)
    assert labels_of(source, "p2") == [0, 1, 0, 0, 0]
    with pytest.raises(InputError, match=r"scores has no row for 1 images \('p9'"):
        labels_of(source, "p9")


def test_unknown_scores_lie_below_the_threshold(scores_folder):
    for unknown_above in (0.99, 1.0):
        with pytest.raises(InputError, match="must be below the threshold 0.99"):
            PseudoLabels(scores_folder, SPACE, IDS, 0.99, unknown_above)


def test_scores_are_found_by_names_in_another_spelling(tmp_path):
    rows = {image_id: {"CAT": row["cat"], " Cow": row["cow"]} for image_id, row in SCORES.items()}
    write_scores(tmp_path / "spelt" / "scores-00000-of-00001.parquet", rows)
    found = load_unseen_scores(tmp_path / "spelt", SPACE, ["p0", "p3"])
    np.testing.assert_allclose(found, [[0.989, 0.5], [0.9, 0.2]], rtol=1e-6)  # cow, cat


@pytest.mark.parametrize(
    ("names", "odd"),
    [(["cat", "horse"], "'cow'"), (["cat"], "'cow'"), (["cat", "cow", "sea"], "'sea'"), (["cat", "cow", "Cow"], "")],
)
def test_scores_of_other_names_are_refused(tmp_path, names, odd):
    rows = {image_id: dict.fromkeys(names, 0.5) for image_id in SCORES}
    write_scores(tmp_path / "other" / "scores-00000-of-00001.parquet", rows)
    with pytest.raises(InputError, match=f"of other unseen names than the label space.*{odd}"):
        load_unseen_scores(tmp_path / "other", SPACE, ["p0"])
