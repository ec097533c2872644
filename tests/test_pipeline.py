"""The pipeline: one call, any label list. That it loads as a stranger is tests/test_hub.py's business."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASS_NAMES, save_checkpoint
from transformers import pipeline

# Coarse blocks: something for masks to follow.
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((56, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, seed=1)  # with this seed several labels occur in IMAGE; a test below makes sure
    return path


@pytest.fixture(scope="module")
def segment(folder):
    return pipeline(model=str(folder), trust_remote_code=True)


def test_masks_are_a_partition_of_the_image_and_agree_with_the_map(segment):
    masks = segment(IMAGE, candidate_labels=CLASS_NAMES)
    result = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    assert result["segmentation"].shape == (40, 56) and result["labels"] == CLASS_NAMES
    assert len(masks) > 1, "too easy: one label everywhere"
    assert sum((np.asarray(entry["mask"]) == 255).astype(int) for entry in masks).tolist() == np.ones((40, 56)).tolist()
    for entry in masks:
        assert entry["label"] == CLASS_NAMES[entry["label_id"]] and entry["mask"].mode == "L"
        region = result["segmentation"] == entry["label_id"]
        assert np.array_equal(np.asarray(entry["mask"]) == 255, region)
        assert entry["score"] == pytest.approx(min(1, result["scores"][region].mean()), abs=1e-6)


def test_ids_follow_the_order_of_the_list(segment):
    forward = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    backward = segment(IMAGE, candidate_labels=CLASS_NAMES[::-1], output="map")["segmentation"]
    assert np.array_equal(forward, len(CLASS_NAMES) - 1 - backward)


def test_every_form_of_a_label_names_one_entry(segment):
    labels = ["sky", ["grass", "lawn"], {"name": "car", "synonyms": ["automobile"], "templates": ["one {}"]}]
    assert segment(IMAGE, candidate_labels=labels, output="map")["labels"] == ["sky", "grass", "car"]


def test_without_labels_the_stored_vocabulary_is_used(segment):
    stored = segment(IMAGE, output="map")
    given = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    assert stored["labels"] == CLASS_NAMES and np.array_equal(stored["segmentation"], given["segmentation"])


def test_images_of_different_sizes_in_one_call_are_each_as_alone(segment):
    images = [IMAGE, IMAGE.resize((80, 40)), IMAGE.rotate(90, expand=True)]
    together = segment(images, candidate_labels=CLASS_NAMES, output="map", batch_size=2)
    for image, result in zip(images, together, strict=True):
        alone = segment(image, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
        assert result["segmentation"].shape == (image.height, image.width)
        assert np.array_equal(result["segmentation"], alone)


def test_half_precision_weights_work(folder):
    half = pipeline(model=str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert half(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"].shape == (40, 56)


@pytest.mark.parametrize("labels", [[], ["sky", "sky"], [""], "sky", [{"nam": "sky"}], [3]])
def test_a_label_list_that_makes_no_sense_is_one_line(labels, segment):
    with pytest.raises(ValueError) as error:
        segment(IMAGE, candidate_labels=labels)
    assert "\n" not in str(error.value)


def test_an_unreadable_image_is_named(segment, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError), match="broken"):
        segment(str(tmp_path / "broken.png"), candidate_labels=CLASS_NAMES)


def test_an_unknown_output_is_refused(segment):
    with pytest.raises(ValueError, match="'masks' or 'map'"):
        segment(IMAGE, candidate_labels=CLASS_NAMES, output="masc")


def test_numpy_paths_and_thin_images_are_images_too(segment, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    expected = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    for image in (np.asarray(IMAGE), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(segment(image, candidate_labels=CLASS_NAMES, output="map")["segmentation"], expected)
    thin = segment(IMAGE.resize((900, 1)), candidate_labels=CLASS_NAMES, output="map")
    assert thin["segmentation"].shape == (1, 900)
    assert segment([], candidate_labels=CLASS_NAMES) == []
