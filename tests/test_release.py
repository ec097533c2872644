"""Releases: what lies in the folder, where the numbers of the card come from, who has tried it, what is uploaded."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jinja2
import jinja2.meta
import pytest
import yaml
from conftest import Ended
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_wall import HUB_HALF
from tiny import save_checkpoint, tiny_config, tiny_model

import zs3.release.__main__
from configuration_zs3 import Zs3Config
from zs3.checkpoints import settings_sha256, weights_sha256
from zs3.command_line import InputError
from zs3.label_space import load_label_space
from zs3.release.__main__ import HUB_CARDS, chosen_template, code_files, is_sealed, main, project_code_of, release_files
from zs3.release.card import data_name, model_card, model_index, recipes_of, runs, starts, training

ROOT = Path(__file__).parents[1]
SCENES = load_label_space("scenes")
TEMPLATES = ("coco_stuff_171", "ovs", "scenes", "voc_20")
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
FILES = sorted(["config.json", "model.safetensors", *PROCESSOR, *(f"{name}.py" for name in HUB_HALF)])
SHARES = re.compile(r"\d+\.\d")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """As training on scenes leaves it, with what else may lie in such a folder."""
    folder = tmp_path_factory.mktemp("run") / "final"
    model = save_checkpoint(folder)
    model.config.seen_class_names, model.config.unseen_labels = SCENES.seen, "pseudo"
    model.save_pretrained(folder)
    for name in ("optimizer.bin", "pytorch_model.bin", "scheduler.pkl", "events.out", "README.md", ".hidden", "own.py"):
        (folder / name).write_text("not to be released")
    (folder / "checkpoints").mkdir()
    return folder


@pytest.fixture
def untried(monkeypatch) -> list[list[str]]:
    """The stranger's visits, who says yes to everything."""
    visits = []

    def visited(folder: Path, labels: list[str]) -> str:
        visits.append([sorted(path.name for path in folder.iterdir()), list(labels)])
        return "fine"

    monkeypatch.setattr(zs3.release.__main__, "visited", visited)
    return visits


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def a_result(checkpoint: Path, **changes: object) -> dict:
    """A result file's content, of the fields that eval.py writes."""
    return {
        "setting": "gzs3",
        "model": str(checkpoint),
        "dataset": "my_scenes",
        "split": "validation",
        "split_sha256": "5" * 64,
        "label_space_sha256": SCENES.sha256,
        "checkpoint_sha256": sha256(checkpoint / "model.safetensors"),
        "settings_sha256": settings_sha256(str(checkpoint)),
        "seen": SCENES.seen,
        "unseen": SCENES.unseen,
        "prompts": ["a photo of a {}.", "the {}"],
        "calibration": {"seen_bias": 0.0, "seen_bias_chosen": "none"},
        "protocol": "as agreed",
        "without": [],
        "absent": "union",
        "num_images": 1234,
        "split_images": 1234,
        "miou": 0.5123456789,
        "miou_seen": 0.6234567891,
        "miou_unseen": 0.3345678912,
        "hiou": 0.4456789123,
        "pixel_accuracy": 0.7567891234,
        "frequency_weighted_iou": 0.6678912345,
        "confidence_intervals": {
            "miou": [0.4911, 0.5322],
            "miou_seen": [0.6033, 0.6444],
            "miou_unseen": [0.3055, 0.3666],
            "hiou": [0.4177, 0.4788],
            "pixel_accuracy": [0.7444, 0.7699],
            "frequency_weighted_iou": [0.6511, 0.6855],
        },
        "per_class": {"grass": 0.8199, "sand": None, "red square": 0.2723},
        "per_class_intervals": {"grass": [0.7899, 0.8511], "sand": [None, None], "red square": [0.2044, 0.3355]},
        "clip_ensemble": "crops",
        "clip_ensemble_weight": 0.7,
        "versions": {"torch": "2.x"},
        **changes,
    }


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def release(call) -> Callable[..., Ended]:
    return partial(call, main)


def card_of(checkpoint: Path, template: str, results: list[dict], config: Zs3Config | None = None) -> ModelCard:
    config = config or Zs3Config.from_pretrained(checkpoint)
    text = model_card(HUB_CARDS / f"{template}.md", "me/a-model", config, "0" * 64, recipes_of(checkpoint), results)
    return ModelCard(text)


# ---- the folder --------------------------------------------------------------------------------------------


def test_a_release_is_made_and_a_stranger_uses_it(checkpoint, tmp_path, release):
    """The one test with a stranger who says yes: a process in which the project cannot be imported."""
    result, folder = write(tmp_path / "gzs3.json", a_result(checkpoint)), tmp_path / "out"
    before = {path.name: sha256(path) for path in checkpoint.iterdir() if path.is_file()}
    words = ["--model", checkpoint, "--results", result, "--repo_id", "me/a-model", "--output", folder]
    printed = release(*words).out
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", *FILES])
    for name in FILES:
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert before == {path.name: sha256(path) for path in checkpoint.iterdir() if path.is_file()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gzs3.json", "out"]

    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert f"stranger  Zs3ForSemanticSegmentation, {parameters:,} parameters" in printed
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", printed, re.M)}
    assert listed == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert f"{sum(listed.values()):,}  bytes in {len(listed)} files" in printed
    assert str(folder) in printed and "not uploaded" in printed


def test_without_an_output_the_folder_is_called_as_the_repository(checkpoint, tmp_path, monkeypatch, untried, release):
    monkeypatch.chdir(tmp_path)
    assert release("--model", checkpoint, "--repo_id", "me/a-model").code == 0
    assert (tmp_path / "runs" / "release" / "a-model" / "config.json").is_file()
    assert untried == [[sorted(["README.md", *FILES]), ["sky", "grass"]]]  # the card is there, too


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("import zs3\n", "zs3"),  # of the project itself, which the machine of the test has
        ("weights", "other weights do not fit"),
    ],
)
def test_what_a_stranger_cannot_use_is_not_made(checkpoint, tmp_path, damage, words, release):
    model, folder = tmp_path / "final", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    if damage == "weights":
        weights = load_file(model / "model.safetensors")
        weights.pop(next(name for name in weights if name.startswith("class_projection")))
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        source = (model / "modeling_zs3.py").read_text()
        (model / "modeling_zs3.py").write_text(f"{source}\n{damage}")
    trusted = ["--trust_remote_code"] if damage != "weights" else []
    last = release("--model", model, "--repo_id", "me/a-model", "--output", folder, *trusted).refusal
    assert last.startswith("error: a stranger cannot use this checkpoint, so nothing was made") and words in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_its_own_folder_is_made_anew_and_any_other_is_left_alone(checkpoint, tmp_path, untried, release):
    folder = tmp_path / "out"
    words = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", folder]
    folder.mkdir()  # empty: nothing to lose
    assert release(*words).code == 0 and is_sealed(folder)
    first = (folder / "README.md").read_text()
    result = write(tmp_path / "gzs3.json", a_result(checkpoint))
    assert release(*words, "--results", result).code == 0
    assert (folder / "README.md").read_text() != first and is_sealed(folder)

    def refused(changed: Path) -> None:
        before, ended = changed.read_bytes(), release(*words)
        words_said = "is a file: choose a folder" if folder.is_file() else "holds something else, or was changed"
        assert words_said in ended.refusal and "a stranger" not in ended.out
        assert changed.read_bytes() == before and not (tmp_path / "out.partial").exists()

    original = (folder / "README.md").read_text()
    (folder / "README.md").write_text(original.replace("## Limits", "## My limits"))
    refused(folder / "README.md")
    (folder / "README.md").write_text(original)
    assert is_sealed(folder)
    (folder / "notes.txt").write_text("mine")
    refused(folder / "notes.txt")
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text("{}")
    refused(folder / "config.json")
    shutil.rmtree(folder)
    folder.write_text("a file")
    refused(folder)


def test_the_folder_of_the_checkpoint_itself_is_no_output(checkpoint, untried, release):
    assert release("--model", checkpoint, "--repo_id", "me/a", "--output", checkpoint).code == 2
    assert (checkpoint / "optimizer.bin").read_text() == "not to be released" and not untried


def test_a_failure_keeps_the_release_before(checkpoint, tmp_path, monkeypatch, untried, release):
    folder = tmp_path / "out"
    words = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", folder]
    assert release(*words).code == 0
    before = {path.name: sha256(path) for path in folder.iterdir()}

    def fails(*_: object) -> None:
        raise InputError("a full disk, say")

    for place in ("zs3.release.__main__.visited", "zs3.files.rename"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fails)
            assert release(*words).code == 2
        assert {path.name: sha256(path) for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- what goes into it -------------------------------------------------------------------------------------


def test_shards_go_with_their_index_and_have_one_hash(checkpoint, tmp_path):
    model = save_checkpoint(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for name in PROCESSOR:
        shutil.copy(tmp_path / "whole" / name, tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    names = [path.name for path in release_files(tmp_path / "shards")]
    assert names == sorted([*(set(FILES) - {"model.safetensors"}), "model.safetensors.index.json", *shards])
    told = hashlib.sha256("".join(sha256(tmp_path / "shards" / name) for name in shards).encode()).hexdigest()
    assert weights_sha256(str(tmp_path / "shards")) == told
    (tmp_path / "shards" / shards[1]).unlink()
    with pytest.raises(InputError, match=f"lacks {shards[1]} of its weights"):
        release_files(tmp_path / "shards")


def test_weights_of_the_hub_have_the_hash_of_what_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    assert weights_sha256("owner/name") is None
    for path, content in {snapshot / "model.safetensors": "weights", snapshot.parents[1] / "refs/main": "abc"}.items():
        path.parent.mkdir(parents=True)
        path.write_text(content)
    assert weights_sha256("owner/name") == hashlib.sha256(b"weights").hexdigest()


def refer(folder: Path, **references: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] |= references
    write(folder / "config.json", config)


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    write(folder / "model.safetensors.index.json", {})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "losses_zs3.py").unlink(), "lacks losses_zs3.py, code that it needs"),
        (lambda folder: (folder / "pipeline_zs3.py").unlink(), "lacks pipeline_zs3.py, code that it needs"),
        (lambda folder: (folder / "processing_zs3.py").unlink(), "lacks processing_zs3.py, code that it needs"),
        (lambda folder: refer(folder, AutoModel="me/code--modeling_zs3.Model"), "lies in another repository"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "w.safetensors"), "has no model.safetensors"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has no processor"),
        (lambda folder: refer(folder, AutoModel="nowhere_zs3.Model"), "lacks nowhere_zs3.py"),
        (empty_index, "is no index of weights"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_in_words(checkpoint, tmp_path, damage, words):
    folder = tmp_path / "final"
    shutil.copytree(checkpoint, folder)
    release_files(folder)
    damage(folder)
    with pytest.raises(InputError, match=words):
        release_files(folder)


def test_code_is_what_the_configurations_name_and_what_that_imports(checkpoint, tmp_path):
    folder = tmp_path / "final"
    shutil.copytree(checkpoint, folder)
    (folder / "further_zs3.py").write_text("from .deep_zs3 import thing\n")
    (folder / "deep_zs3.py").write_text("thing = 1\n")
    assert code_files(folder) == {folder / f"{name}.py" for name in HUB_HALF}
    assert project_code_of(folder) == {ROOT / f"{name}.py" for name in HUB_HALF}
    refer(folder, AutoModelForImageSegmentation="further_zs3.Further", AutoTokenizer=["further_zs3.Slow", None])
    expected = {folder / f"{name}.py" for name in (*HUB_HALF, "further_zs3", "deep_zs3")}
    assert code_files(folder) == expected
    with pytest.raises(InputError, match="names further_zs3.*, which this project does not have"):
        project_code_of(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_zs3.Other"}}),
        ("config.json", {"auto_map": {"AutoModel": "me/code--modeling_zs3.Zs3ForSemanticSegmentation"}}),
        ("config.json", {"auto_map": {"AutoModel": "../modeling_zs3.Zs3ForSemanticSegmentation"}}),
        ("config.json", {"auto_map": 3}),
        ("config.json", {"auto_map": {"AutoModel": 3}}),
        ("config.json", {"backbone_config": {"auto_map": {"AutoBackbone": "evil.Evil"}}}),
        ("config.json", {"id2label": [{"auto_map": {"AutoModel": "evil.Evil"}}]}),
        ("config.json", {"custom_pipelines": {"a": {"impl": "evil.Evil", "pt": ["AutoModel"]}}}),
        ("config.json", {"custom_pipelines": {"a": {"pt": ["AutoModel"]}}}),
        ("config.json", {"custom_pipelines": [1]}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.Evil"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Evil"}}),
    ],
)
def test_settings_that_name_code_which_the_project_has_not_got_are_not_released(checkpoint, tmp_path, file, changes):
    folder = shutil.copytree(checkpoint, tmp_path / "final")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    write(folder / file, content | changes)
    with pytest.raises(InputError, match=file):
        project_code_of(folder)


def test_changed_code_beside_a_checkpoint_is_not_released_but_with_the_flag(checkpoint, tmp_path, untried, release):
    folder, out = shutil.copytree(checkpoint, tmp_path / "final"), tmp_path / "out"
    changed = (folder / "losses_zs3.py").read_text() + "\nCHANGED = True\n"
    (folder / "losses_zs3.py").write_text(changed)
    words = ["--model", folder, "--repo_id", "me/a-model", "--output", out]
    assert release(*words).code == 0
    assert (out / "losses_zs3.py").read_bytes() == (ROOT / "losses_zs3.py").read_bytes()
    assert release(*words, "--trust_remote_code").code == 0
    assert (out / "losses_zs3.py").read_text() == changed


def test_weights_that_are_no_numbers_are_not_released(checkpoint, tmp_path, release):
    folder = shutil.copytree(checkpoint, tmp_path / "final")
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["vocabulary"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refusal = release("--model", folder, "--repo_id", "me/a", "--output", tmp_path / "out").refusal
    assert "vocabulary holds values that are no finite numbers" in refusal
    assert not (tmp_path / "out").exists()


# ---- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"checkpoint_sha256": "f" * 64}, "is of other weights"),
        ({"settings_sha256": "f" * 64}, "of these weights with another configuration"),
        ({"checkpoint_sha256": None}, "does not say which weights"),
        ({"miou_unseen": 42.0}, "miou_unseen is 42.0, not a share in"),
        ({"miou": "high"}, "miou is 'high', not a number"),
        ({"hiou": -0.1}, "hiou is -0.1, not a share in"),
        ("{", "is no JSON"),
        ([1], "is no result file of eval.py"),
        ({"setting": ...}, "is no result file of eval.py, it lacks 'setting'"),
        ({"confidence_intervals": ...}, "it lacks 'confidence_intervals'"),
    ],
)
def test_a_result_that_does_not_belong_is_refused_by_name(checkpoint, tmp_path, untried, content, words, release):
    good, bad = write(tmp_path / "good.json", a_result(checkpoint)), tmp_path / "bad.json"
    if isinstance(content, dict):
        content = {name: value for name, value in a_result(checkpoint, **content).items() if value is not ...}
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    given = ["--model", checkpoint, "--repo_id", "me/a", "--output", tmp_path / "out", "--results", good, bad]
    refusal = release(*given).refusal
    assert "bad.json" in refusal and words in refusal
    assert not (tmp_path / "out").exists() and not untried


def test_one_result_twice_is_refused(checkpoint, tmp_path, release):
    paths = [write(tmp_path / name, a_result(checkpoint)) for name in ("a.json", "b.json")]
    refusal = release("--model", checkpoint, "--repo_id", "me/a", "--results", *paths).refusal
    assert "b.json equals another" in refusal


# ---- the card ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_front_matter_says_what_the_hub_wants_to_know(checkpoint, template):
    results = [a_result(checkpoint), a_result(checkpoint, clip_ensemble="off", clip_ensemble_weight=None)]
    card = card_of(checkpoint, template, results)
    front = yaml.safe_load(card.content.split("---\n")[1])
    assert front["pipeline_tag"] == "image-segmentation" and front["library_name"] == "transformers"
    assert front["license"] in ("apache-2.0", "other") and (front["license"] != "other" or front["license_name"])
    assert {"zero-shot", "open-vocabulary", "semantic-segmentation", "custom_code"} <= set(front["tags"])
    assert ("synthetic" in front["tags"]) == (template == "scenes")
    (index,) = front["model-index"]
    assert index["name"] == "a-model" and ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_the_model_index_has_the_numbers_of_the_result_files_and_their_protocol(checkpoint):
    off = {"clip_ensemble": "off", "clip_ensemble_weight": None, "miou_seen": 0.0}
    off |= {"calibration": {"seen_bias": 0.1, "seen_bias_chosen": TUNED}}
    ovs = {"setting": "ovs", "dataset": "ade20k_150", "label_space_sha256": "a" * 64, "miou_seen": None, "hiou": None}
    results = [a_result(checkpoint), a_result(checkpoint, **off), a_result(checkpoint, **ovs, miou_unseen=None)]
    entries = card_of(checkpoint, "scenes", results).data.eval_results
    told = [(e.dataset_type, e.dataset_config, e.metric_type, e.metric_value, e.metric_args) for e in entries]
    scores = ("miou_seen", "miou_unseen", "hiou", "miou", "pixel_accuracy", "frequency_weighted_iou")
    expected = []
    for result, ensemble in zip(results, ("crops, w = 0.7", "off", "crops, w = 0.7"), strict=True):
        for name in scores:
            protocol = {"setting": result["setting"], "absent": "union", "calibration": result["calibration"]}
            protocol |= {
                "num_images": 1234,
                "split_images": 1234,
                "split_sha256": "5" * 64,
                "ensemble": ensemble,
                "candidates": "24 names" if result["setting"] == "ovs" else "16 seen and 8 unseen names",
                "label_space_sha256": result["label_space_sha256"],
            }
            protocol |= {"interval_95": result["confidence_intervals"][name]}
            protocol = {key: value for key, value in protocol.items() if value is not None}
            if result[name] is not None:
                expected.append((result["dataset"], result["setting"], name, result[name], protocol))
    assert told == expected
    assert {e.task_type for e in entries} == {"image-segmentation"} and {e.dataset_split for e in entries} == {
        "validation"
    }
    assert {e.dataset_name for e in entries} == {"my_scenes (synthetic)", "ade20k_150"}


def test_the_tables_have_the_numbers_of_the_result_file_with_their_intervals(checkpoint):
    text = card_of(checkpoint, "scenes", [a_result(checkpoint)]).text
    assert (
        "| 1 | my_scenes (synthetic), validation, 1,234 images | gzs3 | crops, w = 0.7 | 62.3 [60.3, 64.4] "
        "| 33.5 [30.6, 36.7] | 44.6 [41.8, 47.9] | 51.2 [49.1, 53.2] | 75.7 [74.4, 77.0] | 66.8 [65.1, 68.5] |" in text
    )
    assert "grass 82.0 [79.0, 85.1], sand -, **red square 27.2 [20.4, 33.6]**" in text
    for told in (SCENES.sha256, "as agreed", "`a photo of a {}.` and 1 more"):
        assert told in text
    numbers = {
        "2301.0",
        "2.0",
        "0.7",
        *re.findall(
            SHARES, "51.2 49.1 53.2 62.3 60.3 64.4 33.5 30.6 36.7 44.6 41.8 47.9 75.7 74.4 77.0 66.8 65.1 68.5"
        ),
    }
    assert set(SHARES.findall(text)) == numbers | {"82.0", "79.0", "85.1", "27.2", "20.4", "33.6"}


def test_scores_that_older_results_lack_are_a_dash_in_their_rows(checkpoint):
    older, newer = a_result(checkpoint), a_result(checkpoint, miou_seen_on_seen_pixels=0.7001, miou_stuff=None)
    newer["confidence_intervals"] |= {"miou_seen_on_seen_pixels": [0.6802, 0.7203], "miou_stuff": [None, None]}
    lines = card_of(checkpoint, "scenes", [older, newer]).text.splitlines()
    assert any("| mIoU | mIoU(S) on seen pixels | pixel accuracy |" in line for line in lines)
    assert any("| 51.2 [49.1, 53.2] | - | 75.7 [74.4, 77.0] |" in line for line in lines)
    assert any("| 51.2 [49.1, 53.2] | 70.0 [68.0, 72.0] | 75.7 [74.4, 77.0] |" in line for line in lines)
    (entry,) = [entry for entry in model_index(newer) if entry.metric_type == "miou_seen_on_seen_pixels"]
    assert entry.metric_value == 0.7001 and entry.metric_args["interval_95"] == [0.6802, 0.7203]


def test_what_a_result_says_of_its_protocol_stands_below_the_table(checkpoint):
    stamped = {
        "protocol": "gzs3, 16 seen and 8 unseen names, without sand, bias 0.2, chosen TUNED ON THE TEST IMAGES",
        "without": ["sand"],
    }
    text = card_of(checkpoint, "scenes", [a_result(checkpoint), a_result(checkpoint, **stamped)]).text
    (line,) = [line for line in text.splitlines() if line.startswith("2. ")]
    assert stamped["protocol"] in line
    assert line.count("unseen names") == line.count("sand") == 1 and "calibration" not in line  # each is said once


HELD_OUT = "chosen on other images, on classes held out (red (dark) square, sky), without labels of unseen classes"
TUNED = "TUNED ON THE TEST IMAGES, for the best hIoU"


@pytest.mark.parametrize(
    ("changes", "cell", "metric", "sentence"),
    [
        ({"without": ["red square", "sky"]}, "gzs3, without 'red square', 'sky'", None, "Names after `without`"),
        (
            {"calibration": {"seen_bias": 0.068359375, "seen_bias_chosen": TUNED}},
            f"gzs3, bias 0.0684 ({TUNED})",
            None,
            "A `bias` is taken off",
        ),
        (
            {"calibration": {"seen_bias": -0.5, "seen_bias_chosen": HELD_OUT}},
            "gzs3, bias -0.5 (chosen on other images, on classes held out, without labels of unseen classes)",
            None,
            "A `bias` is taken off",
        ),
        ({"num_images": 40, "split_images": 2000}, "40 of 2,000 images", "40 of 2,000 images", "`N of M images`"),
    ],
)
def test_rows_that_differ_in_meaning_look_different(checkpoint, changes, cell, metric, sentence):
    whole = a_result(checkpoint)
    plain, both = (card_of(checkpoint, "scenes", results) for results in ([whole], [whole, {**whole, **changes}]))
    assert sentence in both.text and sentence not in plain.text
    first, second = (next(line for line in both.text.splitlines() if line.startswith(f"| {row} |")) for row in (1, 2))
    assert first in plain.text and "validation, 1,234 images | gzs3 |" in first
    assert f" {cell} |" in second
    names = [entry.metric_name for entry in both.data.eval_results if entry.metric_type == "miou"]
    assert names == [
        "mIoU, ensemble crops, w = 0.7",
        f"mIoU, {metric or cell.removeprefix('gzs3, ')}, ensemble crops, w = 0.7",
    ]
    args = next(entry.metric_args for entry in both.data.eval_results[::-1])
    assert all(args[name] == value for name, value in changes.items())


def test_unseen_is_no_word_of_the_ovs_setting(checkpoint):
    absent = dict.fromkeys(("miou_seen", "miou_unseen", "hiou"))
    ovs = a_result(checkpoint, setting="ovs", **absent)
    ovs["confidence_intervals"] |= {name: [None, None] for name in absent}
    two = card_of(checkpoint, "ovs", [a_result(checkpoint), ovs]).text
    assert "| ovs | crops, w = 0.7 | - | - | - | 51.2 [49.1, 53.2] | 75.7 [74.4, 77.0] | 66.8 [65.1, 68.5] |" in two
    text = card_of(checkpoint, "ovs", [ovs]).text
    assert "5 unseen" not in text and "red square 27.2" in text and "**red square" not in text
    assert "| mIoU | pixel accuracy | frequency-weighted IoU |" in text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("trained", [True, False])
def test_without_a_result_file_there_is_no_score_and_the_card_says_why_and_how_to(
    checkpoint, tmp_path, template, trained
):
    config = Zs3Config.from_pretrained(checkpoint) if trained else tiny_config()
    card = card_of(tmp_path / "final", template, [], config)
    assert "model-index" not in card.content and card.data.eval_results is None
    assert set(SHARES.findall(card.content)) <= {"2301.0", "2.0", "4.0"}  # the paper's, and those of licences
    assert ("Trained, not evaluated yet" in card.text) == trained and ("Not trained yet" in card.text) != trained
    for command_line in ("train.py --config recipes/", "eval.py --model"):
        assert command_line in card.text
    evaluated = card_of(checkpoint, template, [a_result(checkpoint)]).content
    assert "yet" not in evaluated and "\n\n\n" not in evaluated + card.content  # no slot leaves an empty paragraph


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_asks_for_nothing_that_is_not_known_and_its_commands_are_those_of_the_documents(template):
    source = (HUB_CARDS / f"{template}.md").read_text(encoding="utf-8")
    asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    needed = {"card_data", "name", "status", "usage", "training", "results", "runs", "citation"}
    assert needed <= asked <= needed | {"data_licence"}
    documents = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md"))
    (block,) = re.findall(r"```bash\n(.*?)```", source, re.DOTALL)
    for line in block.splitlines():
        assert line + "\n" in documents
    assert all((ROOT / path).is_file() for path in re.findall(r"recipes/\S+\.yaml", block))


def test_every_template_is_listed_beside_them():
    found = {path.stem for path in HUB_CARDS.glob("*.md")} - {"README"}
    listed = re.findall(r"^\| `(\w+)\.md` \|", (HUB_CARDS / "README.md").read_text(), re.MULTILINE)
    assert found == set(listed) and found - {"assembled"} == set(TEMPLATES)  # which `zs3 assemble` fills in


def test_unseen_names_of_several_results_are_each_told_once(checkpoint):
    spelled = a_result(checkpoint, unseen=["Red  Square", *SCENES.unseen[2:]])
    told = training(Zs3Config.from_pretrained(checkpoint), None, [a_result(checkpoint), spelled])
    assert f"(8): {', '.join(SCENES.unseen)}." in told


def test_the_card_says_what_training_saw_and_what_can_be_asked_for(checkpoint):
    text = card_of(checkpoint, "scenes", []).text
    assert f"Masks of 16 classes** were seen in training: {', '.join(SCENES.seen)}." in text
    assert f"(8): {', '.join(SCENES.unseen)}." in text
    assert "pseudo labels, which CLIP estimated" in text and "any names" in text
    fewer = a_result(checkpoint, unseen=SCENES.unseen[1:], without=SCENES.unseen[:1])
    assert f"(8): {', '.join(SCENES.unseen)}." in card_of(checkpoint, "scenes", [fewer, a_result(checkpoint)]).text
    config = tiny_config(text=False, class_names=["sky", "a | b"])
    text = card_of(checkpoint, "coco_stuff_171", [], config).text
    assert "is not known: no zero-shot claim" in text and "the 2 names stored" in text
    assert 'candidate_labels=["sky", "a | b"]' in text and "Image labels of unseen names**: not known" in text
    assert "(15): cow, giraffe, suitcase" in text and "CC BY 4.0" in text


def test_what_is_known_of_the_runs_is_told_without_paths(checkpoint, tmp_path, monkeypatch):
    private = "/home/somebody/data"
    first = {"backbone": "microsoft/resnet-50", "encoder": "./zs3/scenes_clip", "dataset": private, "max_steps": 1400}
    last = {"init_from": str(tmp_path / "stage1" / "final"), "max_steps": 500, "seed": 3, "output_dir": private}
    for name, recipe in (("stage1", first), ("stage2", last)):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = recipes_of(tmp_path / "stage2" / "final")
    assert found == [first, last] and recipes_of(tmp_path / "elsewhere" / "final") == []
    assert recipes_of(tmp_path / "stage2" / "saved_anew") == []  # no checkpoint that train.py wrote
    (tmp_path / "broken" / "final").mkdir(parents=True)
    wrong = ("- a list", "a: [", "init_from: [a]", "init_from: 1", "encoder: 1", "backbone: {a: 1}", "proposals: true")
    for content in (*wrong, yaml.safe_dump({"init_from": str(tmp_path / "broken" / "final")})):
        (tmp_path / "broken" / "recipe.yaml").write_text(content)
        with pytest.raises(InputError, match=r"recipe\.yaml"):
            recipes_of(tmp_path / "broken" / "final")
    assert starts(found) == ["microsoft/resnet-50"]
    monkeypatch.chdir(tmp_path)
    assert starts([{"backbone": "stage1/final", "encoder": "openai/clip"}]) == [
        "openai/clip"
    ]  # the first is a folder here
    text = runs(found)
    assert "- Before: a run whose recipe is not known here." in runs([last]) and "Before" not in text
    assert "Stage 1 of 2: max_steps 1400." in text and "Stage 2 of 2: max_steps 500, seed 3." in text
    card = card_of(tmp_path / "stage2" / "final", "scenes", [], Zs3Config.from_pretrained(checkpoint))
    assert card.data.base_model == ["microsoft/resnet-50"]
    assert "somebody" not in card.content and str(tmp_path) not in card.content


def test_the_template_is_that_of_the_masks_that_training_saw(checkpoint):
    zero_shot, elsewhere = a_result(checkpoint), a_result(checkpoint, setting="ovs")
    for name in ("coco_stuff_171", "voc_20", "scenes"):
        config = tiny_config(seen_class_names=load_label_space(name).seen)
        for results in ([], [zero_shot], [zero_shot, elsewhere]):
            assert chosen_template(None, config, results).stem == name
        assert chosen_template(None, config, [elsewhere]).stem == ("ovs" if name == "coco_stuff_171" else name)
        with pytest.raises(InputError, match="the masks that training saw do not fit"):
            chosen_template("scenes" if name == "voc_20" else "voc_20", config, [zero_shot])
        for wrong in ("voc", "README", "nowhere.md"):
            with pytest.raises(InputError, match="no such template"):
                chosen_template(wrong, config, [])
    assert (
        chosen_template("ovs", tiny_config(seen_class_names=load_label_space("coco_stuff_171").seen), []).stem == "ovs"
    )
    for config in (tiny_config(seen_class_names=["cat"]), tiny_config()):
        with pytest.raises(InputError, match=r"do not fit any card \(fitting: none\)"):
            chosen_template(None, config, [zero_shot])


@pytest.mark.parametrize("split", ["scenes:3", "scenes:11", "scenes_90:3"])
def test_a_class_split_has_the_card_of_its_benchmark_with_its_own_unseen_names(checkpoint, split):
    space = load_label_space(split)
    config = tiny_config(seen_class_names=space.seen, unseen_labels="none")
    assert space.unseen != SCENES.unseen and chosen_template(None, config, []).stem == "scenes"
    assert f"({len(space.unseen)}): {', '.join(space.unseen)}." in card_of(checkpoint, "scenes", [], config).text
    assert data_name(a_result(checkpoint, label_space_sha256=space.sha256)) == "my_scenes (synthetic)"
    assert data_name(a_result(checkpoint, label_space_sha256=load_label_space("voc_20").sha256)) == "my_scenes"


def test_results_of_the_first_edition_of_scenes_are_called_synthetic():
    result = json.loads((ROOT / "docs" / "results" / "first_edition" / "zs3-scenes.json").read_text())
    assert data_name(result) == "scenes (synthetic)"


def test_the_card_of_a_configuration_without_the_quality_of_image_labels(checkpoint):
    """As code of an older version beside a checkpoint has it."""
    config = Zs3Config.from_pretrained(checkpoint)
    older = SimpleNamespace(**{name: getattr(config, name) for name in ("seen_class_names", "unseen_labels")})
    older.text_config, older.class_names = config.text_config, config.class_names
    assert training(older, SCENES, []) == training(config, SCENES, [])


def test_a_template_of_ones_own(checkpoint, tmp_path, monkeypatch, untried, release):
    own = tmp_path / "mine.md"
    mine = "---\nlicense: mit\n{{ card_data }}\n---\n# {{ name }} by me\n\n{{ status }}\n\n{{ results }}\n"
    own.write_text(mine)
    words = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", tmp_path / "out", "--card", own]
    assert release(*words).code == 0
    assert "# a-model by me" in (tmp_path / "out" / "README.md").read_text()
    for left_out, words_of_it in (
        ("{{ card_data }}", "mine.md lacks {{ card_data }}: "),
        ("{{ results }}", "mine.md lacks {{ results }}: "),
    ):
        own.write_text(mine.replace(left_out, ""))
        assert words_of_it in release(*words).refusal
    for broken in ("# {{ name", "---\nlicense: [\n---\n# a\n", "---\n- a\n---\n"):
        own.write_text(broken)
        assert "mine.md cannot be filled" in release(*words).refusal


# ---- the Hub -----------------------------------------------------------------------------------------------


class StandIn:
    """The Hub, as far as a release needs it; what was asked of it. fails: the call that does."""

    calls: list
    fails = ""

    def __getattr__(self, name: str):
        def call(*args: object, **options: object) -> SimpleNamespace:
            self.calls.append((name, args, options))
            if name == self.fails:
                raise OSError("409 Conflict\nof some kind")
            return SimpleNamespace(oid="a1b2c3")

        return call


@pytest.fixture
def hub(monkeypatch) -> type[StandIn]:
    monkeypatch.setattr("huggingface_hub.HfApi", StandIn)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_a_token")
    monkeypatch.setattr(StandIn, "calls", [], raising=False)
    monkeypatch.setattr(StandIn, "fails", "")
    return StandIn


def test_the_folder_is_tried_and_then_uploaded_and_tagged(checkpoint, tmp_path, untried, hub, release):
    folder = tmp_path / "out"
    words = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", folder]
    assert release(*words).code == 0 and hub.calls == []  # a dry run
    tried = len(untried)
    printed = release(*words, "--push", "--tag", "v1").out
    assert len(untried) == tried + 1
    create, upload, tag = hub.calls
    assert create == ("create_repo", ("me/a-model",), {"exist_ok": True})
    assert upload[0] == "upload_folder" and upload[2]["repo_id"] == "me/a-model"
    assert Path(upload[2]["folder_path"]) == folder and "ignore_patterns" not in upload[2]
    assert {"*.py", "*.safetensors"} <= set(upload[2]["delete_patterns"])  # of an earlier version with other shards
    assert tag == ("create_tag", ("me/a-model",), {"tag": "v1", "revision": "a1b2c3"})
    assert "uploaded  https://huggingface.co/me/a-model" in printed
    hub.calls.clear()
    assert release(*words, "--push").code == 0
    assert [name for name, _, _ in hub.calls] == ["create_repo", "upload_folder"]


def test_nothing_is_uploaded_that_a_stranger_cannot_use(checkpoint, tmp_path, monkeypatch, hub, release):
    def refuses(*_: object) -> None:
        raise InputError("a stranger cannot use this checkpoint")

    monkeypatch.setattr(zs3.release.__main__, "visited", refuses)
    words = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", tmp_path / "out", "--push"]
    assert release(*words).code == 2 and hub.calls == []


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("create_repo", "cannot upload to me/a-model (409 Conflict of some kind)"),
        ("upload_folder", "cannot upload to me/a-model"),
        ("create_tag", "uploaded, but cannot set the tag v1"),
        ("get_token", "no token, `hf auth login` or HF_TOKEN gives one"),
    ],
)
def test_what_fails_on_the_way_to_the_hub_is_one_line_and_the_folder_is_kept(
    checkpoint, tmp_path, monkeypatch, untried, hub, fails, words, release
):
    folder = tmp_path / "out"
    hub.fails = fails
    if fails == "get_token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    push = ["--push", "--tag", "v1"]
    last = release("--model", checkpoint, "--repo_id", "me/a-model", "--output", folder, *push).refusal
    assert words in last and "/out is whole" in last
    assert is_sealed(folder) and hub.calls[-1:] == [call for call in hub.calls if call[0] == fails][-1:]


def test_a_hub_that_cannot_be_reached_is_one_line(checkpoint, tmp_path, monkeypatch, untried, release):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_a_token")  # the suite runs with HF_HUB_OFFLINE=1
    words = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", tmp_path / "out", "--push"]
    assert "cannot upload to me/a-model" in release(*words).refusal
    assert is_sealed(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--repo_id", "me"], "--repo_id me is no Hub id"),
        (["--tag", "v1"], "--tag goes with --push"),
        (["--results", "*.json"], "cannot read *.json"),
        (["--card", "voc"], "--card voc: no such template"),
    ],
)
def test_bad_flags_are_one_line(checkpoint, tmp_path, untried, flags, words, release):
    given = ["--model", checkpoint, "--repo_id", "me/a-model", "--output", tmp_path / "out"]
    assert words in release(*given, *flags).refusal
    assert not untried and not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path, release):
    write(tmp_path / "config.json", {"model_type": "bert"})
    refusal = release("--model", tmp_path, "--repo_id", "me/a-model").refusal
    assert "is a checkpoint of 'bert', not of 'zs3'" in refusal
