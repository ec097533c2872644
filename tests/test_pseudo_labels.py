"""Pseudo labels: the scores against loops, the same bytes whoever makes them, and no way for unseen truth to get in."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from forked import ended, start, start_two, wait_for
from PIL import Image
from tiny import save_checkpoint
from transformers import AutoModel, AutoProcessor

from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import InputError
from zs3.data.image_labels import (
    check_scored_pictures,
    load_unseen_scores,
    pseudo_label_settings,
    settings_digest,
    shard_digest,
)
from zs3.data.records import load_split
from zs3.label_space import load_label_space
from zs3.pseudo_labels import (
    PseudoLabelArgs,
    check_settings,
    main,
    make_pseudo_labels,
    precision_and_recall,
    report,
    summary,
    unseen_scores,
    usable_proposals,
)
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, UNSEEN

ROOT = Path(__file__).parent.parent
NUM_IMAGES = 11
SEEN_IDS = [index for index, name in enumerate(CLASS_NAMES) if name not in UNSEEN]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, num_train=NUM_IMAGES, num_validation=1, seed=0)
    return folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    model = save_checkpoint(folder, vision=True)
    model.config.seen_class_names = [name for name in CLASS_NAMES if name not in UNSEEN]
    model.config.unseen_labels = "none"
    model.config.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(stage1, data, tmp_path) -> PseudoLabelArgs:
    """Three shards of 4, 4 and 3 images, none of whole batches."""
    return PseudoLabelArgs(
        model=str(stage1), dataset=str(data), output=str(tmp_path / "out"), shard_size=4, batch_size=3, measure=False
    )


def words_of(args: PseudoLabelArgs, **overrides) -> list[str]:
    """The command line of args."""
    words = ["--no_measure"]
    names = ("model", "dataset", "output", "shard_size", "batch_size", "unannotated_share")
    for name, value in ({name: getattr(args, name) for name in names} | overrides).items():
        words += [f"--{name}", str(value)]
    return words


def shards(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("scores-*.parquet"))}


def shards_of(args: PseudoLabelArgs) -> dict[str, bytes]:
    make_pseudo_labels(args)
    return shards(args.output)


def rows_of(args: PseudoLabelArgs) -> list[dict]:
    """[{"image_id": str, "scores": {name: float}}, ...] of all shards in order."""
    tables = [pyarrow.parquet.read_table(f"{args.output}/{name}") for name in shards(args.output)]
    return [row for table in tables for row in table.to_pylist()]


# ---- Eq. 9 and 10 ----


@pytest.mark.parametrize(("given", "scale"), [([1.0], 1.0), ([], 100.0)])  # CLIP's own scale is the default
def test_scores_equal_eq_9_and_10_written_as_loops(given, scale):
    torch.manual_seed(0)
    proposals, texts = torch.randn(6, 8), torch.randn(4, 8)

    def cosine(one, other):
        return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))

    expected = []
    for j in range(4):
        best = 0.0
        for i in range(6):
            exponentials = [math.exp(scale * cosine(proposals[i], text)) for text in texts]
            best = max(best, exponentials[j] / sum(exponentials))
        expected.append(best)
    torch.testing.assert_close(unseen_scores(proposals, texts, *given), torch.tensor(expected), atol=2e-5, rtol=1e-4)


def test_an_image_without_proposals_scores_nothing():
    assert unseen_scores(torch.zeros(0, 8), torch.randn(4, 8)).tolist() == [0.0] * 4


def scores_by_hand(args: PseudoLabelArgs) -> list[list[float]]:
    """Image by image, proposal by proposal, pixel by pixel where a filter is on."""
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    texts = model.encode_text(**processor(class_names=CLASS_NAMES))
    columns = [CLASS_NAMES.index(name) for name in UNSEEN]
    softmax_over = range(len(CLASS_NAMES)) if args.seen_names else columns
    rows = []
    for image, label, _ in load_split(args.dataset, "train"):
        small = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR)) / 255  # a square, short edge 48
        scale = len(label) / 48
        rgb = torch.from_numpy(small).permute(2, 0, 1).float()
        with torch.inference_mode():
            proposals = model.propose(**processor(images=image))
        masks = F.interpolate(proposals["mask_logits"], scale_factor=4, mode="bilinear")[0, :, :48, :48].sigmoid() > 0.5
        best = [0.0] * len(UNSEEN)
        for mask in masks:
            places = mask.nonzero().tolist()
            middles = [(int((y + 0.5) * scale), int((x + 0.5) * scale)) for y, x in places]
            hidden = [label[place] not in SEEN_IDS for place in middles]
            if not places or sum(hidden) < args.unannotated_share * len(places):
                continue
            mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
            picture = rgb if args.fill == "none" else torch.where(mask, rgb, mean)
            (top, left), (bottom, right) = (
                tuple(end(axis) for axis in zip(*places, strict=True)) for end in (min, max)
            )
            crop = picture[:, top : bottom + 1, left : right + 1]
            std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
            crop = F.interpolate(((crop - mean) / std)[None], size=(16, 16), mode="bicubic")
            with torch.inference_mode():
                embeds = F.normalize(model.vision_model(crop).image_embeds[0], dim=0)
            exponentials = {index: math.exp(100 * float(embeds @ texts[index])) for index in softmax_over}
            for place, index in enumerate(columns):
                best[place] = max(best[place], exponentials[index] / sum(exponentials.values()))
        rows.append(best)
    return rows


@pytest.mark.parametrize(
    "options", [{}, {"unannotated_share": 0.0}, {"unannotated_share": 0.1, "seen_names": True}, {"fill": "mean"}]
)
def test_a_run_stores_the_scores_made_by_hand(arguments, data, options):
    args = replace(arguments, **options)
    make_pseudo_labels(args)
    rows = rows_of(args)
    assert [row["image_id"] for row in rows] == [f"{index:05d}" for index in range(NUM_IMAGES)]
    assert all(list(row["scores"]) == UNSEEN for row in rows)
    expected = scores_by_hand(args)
    np.testing.assert_allclose([list(row["scores"].values()) for row in rows], expected, atol=2e-3)
    if args.unannotated_share == 0.5:
        assert 0 < sum(row == [0.0] * len(UNSEEN) for row in expected) < NUM_IMAGES, "too easy: all or nothing filtered"


@pytest.mark.parametrize("share", [0.5, 1e-9, 0.0])
def test_a_fully_annotated_image_gets_no_label_and_is_not_shown_to_the_network(
    arguments, data, tmp_path, monkeypatch, share
):
    """Of the first batch all images, of the second batch the second image have only pixels of seen classes."""
    other = shutil.copytree(data, tmp_path / "scenes")
    whole = ["00000", "00001", "00002", "00004"]
    for image_id in whole:
        path = other / "train" / "labels" / f"{image_id}.png"
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), SEEN_IDS[0])).save(path)
    shown, propose = [], Zs3ForSemanticSegmentation.propose

    def counted(self, pixel_values, *args, **kwargs):
        shown.append(len(pixel_values))
        return propose(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(Zs3ForSemanticSegmentation, "propose", counted)
    args = replace(arguments, dataset=str(other), unannotated_share=share, shard_size=NUM_IMAGES)
    make_pseudo_labels(args)
    assert shown == ([3, 3, 3, 2] if share == 0 else [2, 3, 2])
    rows = [list(row["scores"].values()) for row in rows_of(args)]
    np.testing.assert_allclose(rows, scores_by_hand(args), atol=2e-3)
    unscored = [f"{index:05d}" for index, row in enumerate(rows) if not any(row)]
    assert ({*whole} <= {*unscored}) == (share > 0) and len(unscored) < NUM_IMAGES


def test_the_other_options_change_the_scores(arguments, tmp_path):
    args = replace(arguments, max_images=2)
    runs = [{}, {"mask_threshold": 0.9}, {"mixed_precision": "bf16"}, {"fill": "mean"}]
    found = [shards_of(replace(args, output=str(tmp_path / str(n)), **options)) for n, options in enumerate(runs)]
    assert len({tuple(files.values()) for files in found}) == len(runs)


def test_images_whose_proposals_are_nowhere_score_nothing(arguments):
    args = replace(arguments, mask_threshold=0.999999, max_images=4)
    result = make_pseudo_labels(args)
    assert [list(row["scores"].values()) for row in rows_of(args)] == [[0.0] * len(UNSEEN)] * 4
    assert result["images_without_proposals"] == 4 and "all scores are 0 and mean nothing" in report(result)
    assert "warning" not in report({**result, "images_without_proposals": 3})


def test_the_filter_counts_pixels_as_a_loop_does():
    torch.manual_seed(0)
    mask_logits = 3 * torch.randn(20, 5, 6) - 1
    mask_logits[3] = -9  # nowhere
    annotated = torch.rand(17, 22) < 0.55  # of a padded input of 20 x 24
    probs = F.interpolate(mask_logits[None], size=(20, 24), mode="bilinear")[0].sigmoid()
    for share in (0.3, 0.5):
        expected = []
        for query in range(20):
            inside = unannotated = 0
            for y in range(17):
                for x in range(22):
                    if probs[query, y, x] > 0.4:
                        inside += 1
                        unannotated += not annotated[y, x]
            expected.append(inside > 0 and unannotated / inside >= share)
        assert usable_proposals(mask_logits, annotated, 0.4, share).tolist() == expected
    assert 0 < sum(expected) < 20


# ---- the same bytes, whoever makes them ----


def test_two_processes_write_the_bytes_of_one(arguments, tmp_path):
    expected = shards_of(arguments)
    assert list(expected) == [f"scores-{index:05d}-of-00003.parquet" for index in range(3)]
    words, log = words_of(arguments, output=tmp_path / "two", num_workers=1), tmp_path / "log"
    assert [ended(process) for process in start_two("zs3.pseudo_labels", words, log)] == [0, 0], log.read_text()
    assert shards(tmp_path / "two") == expected
    said = log.read_text()
    assert "7/7" in said  # the share of the main process: shards 0 and 2, of 4 and 3 images
    assert (tmp_path / "two" / "summary.json").exists() and f"labels of {len(UNSEEN)} unseen names" in said


def test_a_killed_run_goes_on_to_the_bytes_of_an_uninterrupted_one(arguments, tmp_path, capsys):
    expected = shards_of(replace(arguments, shard_size=1, output=str(tmp_path / "straight")))
    args = replace(arguments, shard_size=1)
    killed = start("zs3.pseudo_labels", words_of(args), tmp_path / "log")
    wait_for(lambda: bool(shards(args.output)), killed)
    killed.kill()
    assert ended(killed) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in Path(args.output).glob("scores-*.parquet")}
    assert 0 < len(done) < NUM_IMAGES
    with pytest.raises(InputError, match="shards, but not the 11 of one run"):
        load_unseen_scores(args.output, load_label_space("scenes"), [])
    (Path(args.output) / f"scores-00010-of-{NUM_IMAGES:05d}.parquet.partial").write_bytes(b"half a shard")
    capsys.readouterr()
    assert shards_of(args) == expected
    assert {path: path.stat().st_mtime_ns for path in done} == done, "shards that were there were made again"
    assert f"{NUM_IMAGES}/{NUM_IMAGES}" in capsys.readouterr().err  # the resumed ones are in the count
    assert not list(Path(args.output).glob("*.partial"))


def test_the_same_command_again_changes_nothing(arguments):
    args = replace(arguments, max_images=2)
    make_pseudo_labels(args)
    before = {path.name: path.read_bytes() for path in Path(args.output).iterdir()}
    assert {"expansion": 1.0, "num_threads": 1}.items() <= json.loads(before["settings.json"]).items()  # as 0.1.0 wrote
    make_pseudo_labels(args)
    assert {path.name: path.read_bytes() for path in Path(args.output).iterdir()} == before


# ---- no way for unseen truth to get in ----


def relabelled(data: Path, folder: Path, change: dict[str, int]) -> Path:
    """A copy of the data with other ids where these classes were."""
    copy = shutil.copytree(data, folder / "scenes")
    table = np.arange(256, dtype=np.uint8)
    for name, other in change.items():
        table[CLASS_NAMES.index(name)] = other
    for path in (copy / "train" / "labels").iterdir():
        Image.fromarray(table[np.asarray(Image.open(path))]).save(path)
    return copy


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_unseen_truth_cannot_reach_the_scores(arguments, data, tmp_path, share):
    args = replace(arguments, unannotated_share=share)
    ids = [CLASS_NAMES.index(name) for name in UNSEEN]
    permuted = relabelled(data, tmp_path / "permuted", dict(zip(UNSEEN, ids[1:] + ids[:1], strict=True)))
    void = relabelled(data, tmp_path / "void", dict.fromkeys(UNSEEN, 255))
    expected = shards_of(args)
    for number, other in enumerate((permuted, void)):
        assert shards_of(replace(args, dataset=str(other), output=str(tmp_path / f"out{number}"))) == expected
    settings = [json.loads((Path(f) / "settings.json").read_text()) for f in (args.output, tmp_path / "out1")]
    assert settings[0] == settings[1]
    # The filter does look at the seen ones
    seen = relabelled(data, tmp_path / "seen", dict.fromkeys([n for n in CLASS_NAMES if n not in UNSEEN], 255))
    changed = shards_of(replace(args, dataset=str(seen), output=str(tmp_path / "seen_out")))
    assert (changed == expected) == (share == 0)


def with_config(stage1: Path, folder: Path, **changes) -> str:
    copy = shutil.copytree(stage1, folder / "other")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return str(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seen_class_names": None}, "does not say which classes"),
        ({"seen_class_names": ["grass", "Red  Square"]}, "trained on masks of 'red square'"),
        ({"unseen_labels": "ground_truth"}, "learned from ground-truth image labels"),
        ({"vision_config": None}, "no image tower"),
    ],
)
def test_a_model_that_knows_unseen_classes_or_cannot_look_is_refused(arguments, stage1, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        make_pseudo_labels(replace(arguments, model=with_config(stage1, tmp_path, **changes)))
    assert not Path(arguments.output).exists()


# ---- other refusals ----


def test_a_folder_of_other_settings_is_refused_by_the_field(arguments, stage1, data, tmp_path):
    args = replace(arguments, max_images=2)
    make_pseudo_labels(args)
    before = shards(args.output)
    others = {
        "fill": {"fill": "mean"},
        "shard_size": {"shard_size": 2},
        "num_images, image_ids_sha256": {"max_images": 3},
        "seen_names": {"seen_names": True},
        "unannotated_share": {"unannotated_share": 0.0},
        "checkpoint_sha256": {"model": with_config(stage1, tmp_path, pseudo_label_threshold=0.9)},
    }
    for fields, change in others.items():
        with pytest.raises(InputError, match="shards made with another") as refused:
            make_pseudo_labels(replace(args, **change))
        assert all(field in str(refused.value) for field in fields.split(", "))
    other = shutil.copytree(data, tmp_path / "data")
    image = other / "train" / "images" / f"{load_split(data, 'train').image_ids[0]}.png"
    Image.open(image).rotate(180).save(image)
    with pytest.raises(InputError, match="picture_sizes_sha256"):
        make_pseudo_labels(replace(args, dataset=str(other)))
    check_scored_pictures(Path(args.output), load_split(data, "train"))
    with pytest.raises(InputError, match="other pictures of the same names"):  # in training
        check_scored_pictures(Path(args.output), load_split(other, "train"))
    assert shards(args.output) == before


def test_a_shard_knows_its_settings(arguments, tmp_path, capsys):
    """Shards of one run under the settings of another are found when going on, and when they are read."""
    other = replace(arguments, output=str(tmp_path / "other"), mask_threshold=0.3)
    make_pseudo_labels(other)
    make_pseudo_labels(arguments)
    folder, before = Path(arguments.output), shards(arguments.output)
    space, ids = load_label_space("scenes"), load_split(arguments.dataset, "train").image_ids
    name = sorted(before)[1]
    (folder / name).write_bytes(shards(other.output)[name])
    with pytest.raises(InputError, match=f"{name} was made with other settings"):
        make_pseudo_labels(arguments)
    with pytest.raises(InputError, match=f"{name} was made with other settings"):
        load_unseen_scores(folder, space, ids)
    (folder / name).unlink()
    for text in ("", "{", '{"checkpoint_sha256": 1}'):  # the shards stand for a damaged file
        (folder / "settings.json").write_text(text)
        make_pseudo_labels(arguments)
        assert shards(arguments.output) == before and "is written again" in capsys.readouterr().out
    (folder / "settings.json").write_text((Path(other.output) / "settings.json").read_text())
    with pytest.raises(InputError, match="made with other settings"):
        load_unseen_scores(folder, space, ids)


def test_two_runs_with_other_settings_never_share_a_folder(arguments, tmp_path):
    runs = {tmp_path / f"log{threshold}": words_of(arguments, mask_threshold=threshold) for threshold in (0.5, 0.3)}
    both = [start("zs3.pseudo_labels", words, log) for log, words in runs.items()]
    codes = [ended(process) for process in both]
    assert sorted(codes) == [0, 2]
    refused = [*runs][codes.index(2)].read_text().strip().splitlines()[-1]
    assert refused.startswith("error: ") and ("another run writes" in refused or "another mask_threshold" in refused)
    digest = settings_digest(pseudo_label_settings(Path(arguments.output)))
    assert {shard_digest(Path(arguments.output, name)) for name in shards(arguments.output)} == {digest}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"checkpoint_sha256": "0123"}', '{"num_images": true}', "null"])
def test_settings_that_are_none_are_one_line_and_stay_as_they_are(tmp_path, text):
    (tmp_path / "scores-00000-of-00001.parquet").write_bytes(b"")
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match="settings.json"):
        check_settings(tmp_path, {"num_images": 1})
    assert (tmp_path / "settings.json").read_text() == text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (["--dataset", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--unannotated_share", "50"], "--unannotated_share must be at most 1"),
        (["--shard_size", "0"], "--shard_size must be 1 or more, got 0"),
        (["--output", str(ROOT / "LICENSE")], "is a file"),
        (["--fil", "mean"], "did you mean --fill"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, call, flags, words):
    assert words in call(main, *words_of(arguments), *flags).refusal


# ---- the summary ----


def test_precision_and_recall_equal_their_definition_on_sets():
    rng = np.random.default_rng(0)
    labels, truth = rng.random((30, 5)) < 0.4, rng.random((30, 5)) < 0.3
    labels[:, 1] = truth[:, 2] = False  # never labelled; never true
    found = precision_and_recall(labels, truth)
    said, true = ({(n, u) for n, u in zip(*np.nonzero(table), strict=True)} for table in (labels, truth))
    for name, of in (("precision", said), ("recall", true)):
        per_class = []
        for u in range(5):
            own = {pair for pair in of if pair[1] == u}
            per_class.append(len(own & said & true) / len(own) if own else math.nan)
        np.testing.assert_allclose(found[name]["per_class"], per_class)
        assert found[name]["micro"] == pytest.approx(len(said & true) / len(of))
        known = [value for value in per_class if not math.isnan(value)]
        assert len(known) == 4 and found[name]["macro"] == pytest.approx(sum(known) / 4)


def test_the_summary_counts_labels_and_compares_with_the_label_maps(arguments, data, capsys):
    args = replace(arguments, measure=True)
    result = make_pseudo_labels(args)
    assert json.loads((Path(args.output) / "summary.json").read_text()).keys() == result.keys()
    rows = [row["scores"] for row in rows_of(args)]
    present = [{CLASS_NAMES[i] for i in np.unique(record.label) if i != 255} for record in load_split(data, "train")]
    assert result["images_with_class"] == [sum(name in names for names in present) for name in UNSEEN]
    assert [row["threshold"] for row in result["thresholds"]] == [0.5, 0.7, 0.9, 0.95, 0.99, 0.999]
    for row in result["thresholds"]:
        said = [[values[name] >= row["threshold"] for values in rows] for name in UNSEEN]
        assert row["labels"] == [sum(column) for column in said]
        hits = [sum(s and n in p for s, p in zip(c, present, strict=True)) for c, n in zip(said, UNSEEN, strict=True)]
        assert row["recall"]["micro"] == pytest.approx(sum(hits) / sum(result["images_with_class"]))
    assert sum(result["thresholds"][0]["labels"]) > 0, "too easy: no label at all"
    text = report(result)
    assert all(name in text for name in UNSEEN) and "AP" in text


def test_the_last_line_has_precision_and_recall_at_the_models_threshold():
    """Eight images, two names: 5 labels reach 0.9, 4 of them are right, and 6 classes are there."""
    truth, scores = np.zeros((8, 2), bool), np.full((8, 2), 0.2, np.float32)
    truth[:4, 0], truth[6:, 1] = True, True
    for row, column in ((0, 0), (1, 0), (2, 0), (5, 0), (7, 1)):
        scores[row, column] = 0.93
    result = summary(scores, truth, ["cow", "cat"], 0.92)
    (own,) = [row for row in result["thresholds"] if row["threshold"] == 0.92]
    assert (own["precision"]["micro"], own["recall"]["micro"]) == (4 / 5, 4 / 6)
    *_, head, _, _, _, last = report(result).splitlines()
    assert head == "at 0.92, name by name" and " ".join(last.split()) == "5 6 80.0 66.7 - all names together"
    last = report(summary(scores, None, ["cow", "cat"], 0.92)).splitlines()[-1]
    assert " ".join(last.split()) == "5 all names together"


def test_without_unseen_classes_in_the_label_maps_labels_are_only_counted(arguments, data, tmp_path):
    void = relabelled(data, tmp_path, dict.fromkeys(UNSEEN, 255))
    result = make_pseudo_labels(replace(arguments, dataset=str(void), measure=True, max_images=2))
    assert "average_precision" not in result and "precision" not in result["thresholds"][0]
    assert "AP" not in report(result)


def test_average_precision_of_a_class_that_is_never_there_is_left_out_of_the_mean():
    scores = np.array([[0.9, 0.1], [0.85, 1.0], [0.1, 0.2]], np.float32)
    truth = np.array([[True, False], [False, False], [True, False]])
    result = summary(scores, truth, ["cow", "cat"], 0.8)
    np.testing.assert_allclose(result["average_precision"]["per_class"], [(1 + 2 / 3) / 2, math.nan])
    assert result["average_precision"]["macro"] == pytest.approx((1 + 2 / 3) / 2)
    (own,) = [row for row in result["thresholds"] if row["threshold"] == 0.8]
    assert len(result["thresholds"]) == 7 and own["labels"] == [2, 1]
