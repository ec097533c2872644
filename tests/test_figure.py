"""Figures: what is drawn, against the pipeline's own label maps; which images are the worst, by sets of pixels."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ended
from PIL import Image
from tiny import save_checkpoint, tiny_model
from transformers import AutoModel, pipeline

from processing_zs3 import Zs3ImageProcessor
from zs3.checkpoints import class_vectors, load_checkpoint
from zs3.data.records import load_split
from zs3.evaluation import figure
from zs3.evaluation.figure import image_ious, label_map, main
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, UNSEEN
from zs3.scores.bootstrap import load_images
from zs3.scores.confusion import ConfusionMatrix


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, num_train=1, num_validation=4, seed=0)
    return folder


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory) -> Path:
    """No text tower, an image tower and a weight: an ensemble by itself. Text vectors near its queries, so that several
    classes occur."""
    folder = tmp_path_factory.mktemp("with_clip")
    model = tiny_model(text=False, vision=True, class_temperature=0.1)
    for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
        parameter.data *= 2  # sharper masks, so that several queries win somewhere
    with torch.no_grad():
        queries = model(torch.randn(1, 3, 64, 64), text_embeds=torch.randn(1, 12)).class_embeds[0]
    queries = (queries - queries.mean(0))[[index % 5 for index in range(len(CLASS_NAMES))]]
    model.set_vocabulary(CLASS_NAMES, queries + queries.std() * torch.randn_like(queries))
    model.config.seen_class_names = [name for name in CLASS_NAMES if name not in UNSEEN]
    model.save_pretrained(folder)
    Zs3ImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with_text")
    save_checkpoint(folder, seed=1)
    return folder


@pytest.fixture
def draw(call) -> Callable[..., Ended]:
    return partial(call, main)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict]:
    """file name -> panels, of what is drawn from here on."""
    kept = {}
    monkeypatch.setattr(figure, "draw_comparison", lambda panels, names, path: kept.update({path.name: panels}))
    return kept


def test_a_figure_has_image_truth_and_the_label_map_of_each_model_in_their_order(
    data, with_clip, with_text, tmp_path, drawn, draw
):
    words = ["--dataset", data, "--models", with_clip, with_text, "--titles", "baseline", "ours", "--output", tmp_path]
    assert draw(*words, "--images", "00002", "00000").out.split() == [
        str(tmp_path / name) for name in ("00002.png", "00000.png")
    ]
    assert list(drawn) == ["00002.png", "00000.png"]
    for name, panels in drawn.items():
        assert [title.split(" (")[0] for title in panels] == ["image", "ground truth", "baseline", "ours"]
        image, truth, *maps = panels.values()
        stored = data / "validation"
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(stored / "images" / name).convert("RGB")))
        assert np.array_equal(truth, np.asarray(Image.open(stored / "labels" / name)))
        for path, found in zip((with_clip, with_text), maps, strict=True):
            segment = pipeline(model=str(path), trust_remote_code=True)
            expected = segment(image, candidate_labels=list(CLASS_NAMES), output="map")["segmentation"]
            np.testing.assert_array_equal(found, expected)


def test_the_ensemble_of_the_checkpoint_takes_part(data, with_clip):
    model, processor = load_checkpoint(str(with_clip))
    image = load_split(data, "validation")[0].image
    vectors, _ = class_vectors(model, processor, list(CLASS_NAMES), None)
    joined = label_map(model, processor, image, CLASS_NAMES, vectors)
    model.config.clip_ensemble_weight = None
    alone = label_map(model, processor, image, CLASS_NAMES, vectors)
    assert joined.shape == (image.height, image.width) and len(joined.unique()) > 1 and (joined != alone).any()


def test_one_png_an_image(data, with_text, tmp_path, draw):
    words = ["--dataset", data, "--models", with_text, "--output", tmp_path / "deep", "--images", "00001"]
    assert draw(*words).code == 0
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["00001.png"]
    with Image.open(tmp_path / "deep" / "00001.png") as picture:
        assert picture.format == "PNG" and picture.width > 3 * 96


# ---- the worst ---------------------------------------------------------------------------------------------


def iou_by_pixels(prediction: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean over the classes of the truth, of sets of pixels."""
    labelled = {tuple(place) for place in np.argwhere(truth != 255).tolist()}
    ious = []
    for index in {truth[place] for place in labelled}:
        true = {place for place in labelled if truth[place] == index}
        mine = {place for place in labelled if prediction[place] == index}
        ious.append(len(true & mine) / len(true | mine))
    return sum(ious) / len(ious) if ious else None


def test_the_iou_of_an_image_is_that_of_its_sets_of_pixels(tmp_path):
    rng = np.random.default_rng(0)
    maps = [(rng.integers(0, 4, (6, 5)), rng.choice([0, 1, 2, 255], (6, 5))) for _ in range(8)]
    maps[3] = (maps[3][0], np.full((6, 5), 255))
    image_ids = [f"picture {number}" for number in range(8)]
    confusion = ConfusionMatrix(4, 255)
    for image_id, (prediction, truth) in zip(image_ids, maps, strict=True):
        confusion.update(prediction, truth, image_id)
    confusion.save_images(tmp_path / "a_images.npz", ["a", "b", "c", "d"])
    expected = {image_id: iou_by_pixels(*pair) for image_id, pair in zip(image_ids, maps, strict=True)}
    assert expected.pop("picture 3") is None
    assert image_ious(load_images(tmp_path / "a_images.npz")) == pytest.approx(expected, abs=1e-12)


def write_result(folder: Path, data: Path, shares: dict[str, float]) -> Path:
    """A result file, with its areas, in which the given share of each image's pixels is right."""
    confusion = ConfusionMatrix(len(CLASS_NAMES), 255)
    for image_id, share in shares.items():
        prediction = np.ones((1, 100), dtype=int)
        prediction[0, : round(100 * share)] = 0
        confusion.update(prediction, np.zeros((1, 100), dtype=int), image_id)
    confusion.save_images(folder / "gzs3_images.npz", CLASS_NAMES)
    told = {"split": "validation", "label_space_sha256": load_split(data, "validation").label_space.sha256}
    (folder / "gzs3.json").write_text(json.dumps({**told, "per_class": {}}))
    return folder / "gzs3.json"


def test_the_worst_images_are_drawn_the_worst_first(data, with_text, tmp_path, drawn, draw):
    result = write_result(tmp_path, data, {"00000": 0.5, "00001": 0.1, "00002": 0.9, "00003": 0.1})
    words = ["--dataset", data, "--models", with_text, "--output", tmp_path, "--worst", 3, "--result", result]
    assert draw(*words).code == 0
    assert list(drawn) == ["00001.png", "00003.png", "00000.png"]


def test_more_than_there_are_is_one_line(data, with_text, tmp_path, drawn, draw):
    result = write_result(tmp_path, data, {"00000": 0.5, "00001": 0.1})
    words = ["--dataset", data, "--models", with_text, "--output", tmp_path, "--result", result, "--worst"]
    assert draw(*words, 3).refusal.endswith("gzs3.json has 2 images with labelled pixels") and not drawn
    assert draw(*words, 2).code == 0 and len(drawn) == 2


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "say which images to draw"),
        (["--images", "00000", "--worst", "1", "--result", "r.json"], "say which images to draw"),
        (["--worst", "2"], "--worst N and --result FILE.json go together"),
        (["--images", "00000", "--result", "r.json"], "go together"),
        (["--images", "00000", "7"], "no image '7'"),
        (["--images", "00000", "--titles", "a", "b"], "--titles has 2 for 1 of --models"),
        (["--images", "00000", "--titles", "image"], "--titles repeats a title"),
        (["--worst", "0", "--result", "r.json"], "--worst must be 1 or more"),
        (["--worst", "1", "--result", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_bad_flags_are_one_line(data, with_text, tmp_path, flags, words, draw):
    assert words in draw("--dataset", data, "--models", with_text, "--output", tmp_path / "out", *flags).refusal
    assert not (tmp_path / "out").exists()


def test_counts_that_are_missing_or_of_something_else_are_one_line(data, with_text, tmp_path, draw):
    words = ["--dataset", data, "--models", with_text, "--output", tmp_path / "out", "--worst", 1, "--result"]
    result = write_result(tmp_path, data, {"elsewhere": 0.5})
    counts = tmp_path / "gzs3_images.npz"
    told = json.loads(result.read_text())

    def refused(with_words: str) -> None:
        assert with_words in draw(*words, result).refusal

    refused("no image 'elsewhere'")
    result.write_text(json.dumps({**told, "split": "test"}))
    refused("gzs3.json is of other data")
    for more, flag in (
        ({"setting": "zs3"}, "--setting zs3"),
        ({"without": ["sand"]}, "--without"),
        ({"calibration": {"seen_bias": -0.1}}, "--seen_bias"),
    ):
        result.write_text(json.dumps({**told, **more}))
        refused(f"gzs3.json is of other label maps than the figure: evaluate again without {flag}")
    plain = {"setting": "gzs3", "without": [], "calibration": {"seen_bias": 0.0}}
    result.write_text(json.dumps({**told, **plain}))
    refused("no image 'elsewhere'")
    result.write_text(json.dumps(told))
    counts.write_bytes(b"PK and no more")
    refused("gzs3_images.npz is no file of image areas")
    counts.unlink()
    refused("gzs3_images.npz does not exist")


def test_a_model_that_cannot_name_the_classes_is_one_line(data, tmp_path, draw):
    save_checkpoint(tmp_path / "four", text=False)
    assert AutoModel.from_pretrained(tmp_path / "four", trust_remote_code=True).text_model is None
    words = ["--dataset", data, "--models", tmp_path / "four", "--output", tmp_path / "out", "--images", "00000"]
    assert "no text tower and no vector for 'sand'" in draw(*words).refusal
