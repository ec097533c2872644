"""The pipeline: one call, any label list. That it loads as a stranger is tests/test_hub.py's business."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CLASS_NAMES, save_checkpoint
from transformers import pipeline

from pipeline_zs3 import _cuts

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
        assert entry["score"] == pytest.approx(result["scores"][region].mean(), abs=1e-6)
        assert 0 <= entry["score"] <= 1


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


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_of_different_sizes_in_one_call_are_each_as_alone(batch_size, segment):
    images = [IMAGE, IMAGE.resize((80, 40)), IMAGE.rotate(90, expand=True)]
    together = segment(images, candidate_labels=CLASS_NAMES, output="map", batch_size=batch_size)
    for image, result in zip(images, together, strict=True):
        alone = segment(image, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
        assert result["segmentation"].shape == (image.height, image.width)
        assert (result["segmentation"] == alone).mean() > 0.999  # all, but for ties within rounding


def test_half_precision_weights_work(folder):
    half = pipeline(model=str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert half(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"].shape == (40, 56)


@pytest.mark.parametrize(
    "labels", [[], ["sky", "sky"], [""], "sky", [{"nam": "sky"}], [3], {"sky", "grass"}, {"sky": 1}]
)
def test_a_label_list_that_makes_no_sense_is_one_line(labels, segment):
    with pytest.raises(ValueError) as error:
        segment(IMAGE, candidate_labels=labels)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 5, 3)), np.zeros((4, 5, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((2, 3, 4, 5, 3), np.uint8)],
)
def test_an_array_that_is_no_image_is_refused(array, segment):
    with pytest.raises(ValueError, match="must be uint8|image"):
        segment(array, candidate_labels=CLASS_NAMES)


def test_an_image_that_is_not_there_or_unreadable_is_named(segment, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for path in (tmp_path / "broken.png", tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=path.name) as error:
            segment(str(path), candidate_labels=CLASS_NAMES)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="it is a folder, no file"):
        segment([str(tmp_path)], candidate_labels=CLASS_NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        segment(tmp_path / "empty", candidate_labels=CLASS_NAMES)


def test_a_map_is_saved_with_the_ids_of_its_list(segment, tmp_path):
    result = segment(IMAGE, candidate_labels=CLASS_NAMES, background="reject", threshold=0.3, output="map")
    segment.save_map(result, tmp_path / "map.png")
    stored = np.asarray(Image.open(tmp_path / "map.png")).astype(int)
    np.testing.assert_array_equal(np.where(stored == 255, -1, stored), result["segmentation"])


def test_a_path_is_opened_by_the_list_of_formats_by_the_processor_too(segment, tmp_path):
    IMAGE.save(tmp_path / "picture.png")
    one = segment.image_processor(str(tmp_path / "picture.png"))["pixel_values"]
    torch.testing.assert_close(one, segment.image_processor(IMAGE)["pixel_values"])
    IMAGE.save(tmp_path / "picture.png", "PCX")
    for door in (segment.image_processor, lambda path: segment(path, candidate_labels=CLASS_NAMES)):
        with pytest.raises(ValueError, match="picture.png cannot be read as an image: it is no image of a format"):
            door(str(tmp_path / "picture.png"))


def test_an_address_is_refused_offline(segment, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^https://example.org/cat.png .* this process is offline"):
        segment("https://example.org/cat.png", candidate_labels=CLASS_NAMES)


def test_whatever_holds_the_image_the_result_is_the_same(segment, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    expected = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    opaque = np.asarray(IMAGE.convert("RGBA"))
    for image in (np.asarray(IMAGE), opaque, torch.tensor(np.asarray(IMAGE)), tmp_path / "image.png"):
        assert np.array_equal(segment(image, candidate_labels=CLASS_NAMES, output="map")["segmentation"], expected)
    grey = segment(np.asarray(IMAGE.convert("L")), candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    alike = segment(IMAGE.convert("L"), candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    assert np.array_equal(grey, alike)


def test_thin_images_and_no_images(segment):
    thin = segment(IMAGE.resize((900, 1)), candidate_labels=CLASS_NAMES, output="map")
    assert thin["segmentation"].shape == (1, 900)
    assert segment([], candidate_labels=CLASS_NAMES) == []


def test_folders_lists_tuples_arrays_and_generators_of_images(segment, tmp_path):
    images = [IMAGE, IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), IMAGE.rotate(180)]
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    (tmp_path / "notes.txt").write_text("no image")
    options = {"candidate_labels": CLASS_NAMES, "output": "map"}
    alone = [segment(image, **options)["segmentation"] for image in images]
    drawn = []
    lazy = (drawn.append(place) or image for place, image in enumerate(images))
    results = segment(lazy, **options)
    first = next(results)
    assert drawn == [0], "a generator is read as its results are asked for"
    several = [
        [first, *results],
        segment(tmp_path, **options),
        segment(tuple(images), **options),
        segment(np.stack([np.asarray(image) for image in images]), **options),
        list(segment(iter(images), **options)),
    ]
    for found in several:
        assert all(np.array_equal(a["segmentation"], b) for a, b in zip(found, alone, strict=True))


# ------------------------------------------------------------------------------------------------------ labels


def test_a_further_synonym_never_takes_a_pixel_from_its_label_under_max(segment):
    before = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map", synonyms="max")["segmentation"]
    gained = 0
    for place, name in enumerate(CLASS_NAMES):
        for word in ("lawn", "ocean blue thing", "x"):
            labels = [[name, word] if other == name else other for other in CLASS_NAMES]
            after = segment(IMAGE, candidate_labels=labels, output="map", synonyms="max")["segmentation"]
            assert (after[before == place] == place).all()
            gained += (after == place).sum() - (before == place).sum()
    assert gained > 0, "too easy: no synonym changes anything"


def test_one_word_a_label_is_the_same_under_mean_and_max(segment):
    mean, most = (segment(IMAGE, candidate_labels=CLASS_NAMES, output="map", synonyms=how) for how in ("mean", "max"))
    assert np.array_equal(mean["segmentation"], most["segmentation"])
    np.testing.assert_allclose(mean["scores"], most["scores"], atol=1e-6)


def test_text_is_embedded_once(folder, monkeypatch):
    segment = pipeline(model=str(folder), trust_remote_code=True)
    asked, embed = [], segment.model.encode_text
    monkeypatch.setattr(
        segment.model, "encode_text", lambda **tokens: asked.append(len(tokens["input_ids"])) or embed(**tokens)
    )
    new = ["never heard of", "unheard of"]
    first = segment(IMAGE, candidate_labels=new, output="map")
    again = segment(IMAGE, candidate_labels=new[::-1], output="map")
    assert asked == [2] and np.array_equal(first["segmentation"], 1 - again["segmentation"])
    segment(IMAGE, candidate_labels=[*new, "something else"])
    assert asked == [2, 1]


def test_labels_can_be_given_when_the_pipeline_is_made(folder, segment):
    made = pipeline(model=str(folder), trust_remote_code=True, candidate_labels=["sky", "grass"], output="map")
    expected = segment(IMAGE, candidate_labels=["sky", "grass"], output="map")
    assert np.array_equal(made(IMAGE)["segmentation"], expected["segmentation"])
    others = made(IMAGE, background=["red circle", "blue square"])
    assert others["labels"] == ["sky", "grass"] and (others["segmentation"] == -1).any()


def test_the_linter_knows_the_checkpoint(segment):
    report = segment.lint_labels(["sky", "Sky", "red circle"])
    assert report.duplicates == {"sky": [0, 1]} and report.seen is None


# ------------------------------------------------------------------------------------------------ none of these


def test_what_distractors_win_gets_no_label(segment):
    alone = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    distracted = segment(IMAGE, candidate_labels=CLASS_NAMES[:2], background=CLASS_NAMES[2:], output="map")
    expected = np.where(alone["segmentation"] < 2, alone["segmentation"], -1)
    assert distracted["labels"] == CLASS_NAMES[:2] and 0 < (expected == -1).mean() < 1
    assert np.array_equal(distracted["segmentation"], expected)
    np.testing.assert_allclose(distracted["scores"], alone["scores"], atol=1e-6)


@pytest.mark.parametrize("confidence", [None, "probability", "margin"])
def test_rejection_is_a_threshold_on_confidence(confidence, segment):
    options = {"candidate_labels": CLASS_NAMES, "output": "map"}
    plain = segment(IMAGE, **options)
    shares = []
    for threshold in (0.0, 0.2, 0.35, 0.5, 1.0):
        result = segment(IMAGE, background="reject", threshold=threshold, confidence=confidence, **options)
        rejected = result["segmentation"] == -1
        if confidence != "margin":
            assert np.array_equal(rejected, plain["scores"] < np.float32(threshold))
        assert np.array_equal(result["segmentation"][~rejected], plain["segmentation"][~rejected])
        shares.append(rejected.mean())
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.9


def test_what_is_rejected_is_a_segment_of_its_own(segment):
    scores = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")["scores"]
    threshold = float(np.median(scores))
    segments = segment(IMAGE, candidate_labels=CLASS_NAMES, background="reject", threshold=threshold)
    assert segments[0]["label"] == "none of these" and segments[0]["label_id"] == -1
    assert sum((np.asarray(entry["mask"]) == 255).sum() for entry in segments) == 40 * 56


def confidence_in_loops(segment, labels: list[str], y: int, x: int) -> tuple[float, float]:
    """Probability and margin of a pixel of IMAGE at the model's own size."""
    inputs = segment.processor(images=IMAGE, class_names=labels, do_resize=False)
    with torch.no_grad():
        outputs = segment.model(**inputs)
    resized = partial(torch.nn.functional.interpolate, scale_factor=4, mode="bilinear")
    probs, masks = outputs.class_probs[0].tolist(), outputs.mask_logits[0].double().sigmoid()  # (Q, h, w)
    weights = [sum(v * math.log(v * len(labels)) for v in p) / math.log(len(labels)) for p in probs]  # KL(p, U) / ln C
    pairs = list(zip(weights, probs, masks, strict=True))
    whole = sum(w * m for w, _, m in pairs) / masks.sum(0).clamp(max=1)  # on the mask grid
    means = torch.stack([sum(w * p[c] * m for w, p, m in pairs) / whole for c in range(len(labels))])
    pixel = resized(outputs.mask_logits.double())[0, :, y, x].sigmoid().tolist()
    score = [sum(p[c] * m for p, m in zip(probs, pixel, strict=True)) for c in range(len(labels))]
    winner = max(range(len(labels)), key=score.__getitem__)
    margins = (means[winner] - torch.cat([means[:winner], means[winner + 1 :]]).amax(0)).clamp(min=0)
    both = resized(torch.stack([means[winner], margins])[None])
    return both[0, 0, y, x].item(), both[0, 1, y, x].item()


def test_confidence_is_what_the_decided_queries_say(folder):
    segment = pipeline(model=str(folder), trust_remote_code=True)
    segment.image_processor.do_resize = False
    result = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    for y, x in ((0, 0), (17, 30), (39, 55), (8, 51)):
        probability, margin = confidence_in_loops(segment, CLASS_NAMES, y, x)
        assert result["scores"][y, x] == pytest.approx(probability, abs=1e-5)
        for less, rejected in ((1e-3, False), (-1e-3, True)):
            options = {"background": "reject", "confidence": "margin", "threshold": max(0, margin - less)}
            found = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map", **options)["segmentation"]
            assert (found[y, x] == -1) == rejected


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (["sky", "grass", "Sky"], {}),
        (["sky", ["  SKY", "heaven"]], {"synonyms": "max"}),
        (["sky", "grass"], {"background": ["Grass "]}),
        (None, {"background": ["SKY"]}),
    ],
)
def test_names_that_are_one_are_refused_with_both_spellings(labels, options, segment):
    with pytest.raises(ValueError, match="names repeat: .* are one name"):
        segment(IMAGE, candidate_labels=labels, **options)


def test_a_stored_vocabulary_that_is_damaged_is_refused(folder):
    segment = pipeline(model=str(folder), trust_remote_code=True)
    segment.model.config.class_names = ["Sky", *CLASS_NAMES[1:-1], "sky "]
    with pytest.raises(ValueError, match="'Sky' and 'sky' are one name"):
        segment(IMAGE)
    segment.model.config.class_names = CLASS_NAMES
    segment.model.vocabulary[2] = 0
    with pytest.raises(ValueError, match="text vectors have no direction, row 2 first"):
        segment(IMAGE)


def test_weights_that_are_not_finite_give_no_label_map(folder):
    segment = pipeline(model=str(folder), trust_remote_code=True)
    with torch.no_grad():
        segment.model.class_projection[0].weight[3, 5] = torch.nan
    for call in (segment.propose, lambda image: segment(image, candidate_labels=["sky", "sea"])):
        with pytest.raises(ValueError, match="class_embeds hold NaN or infinities"):
            call(IMAGE)


def test_labels_that_the_tokens_do_not_tell_apart_are_refused_whatever_the_cache_holds(segment):
    for label in ("a-b", "a - b"):
        segment(IMAGE, candidate_labels=[label, "sky"])
    for _ in range(2):
        with pytest.raises(ValueError, match="'a-b' and 'a - b' become the same tokens"):
            segment(IMAGE, candidate_labels=["a-b", "sky", "a - b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5}, "background"),
        ({"background": ["zebra"], "confidence": "margin"}, "background"),
        ({"background": "rejekt"}, "'reject'"),
        ({"background": "reject", "threshold": 1.5}, "at most 1"),
        ({"background": "reject", "confidence": "marge"}, "'probability' or 'margin'"),
        ({"background": ["sky"]}, "repeat"),
        ({"synonyms": "min"}, "'mean' or 'max'"),
        ({"overlap": 8}, "overlap needs a window"),
        ({"window": 16, "overlap": 16}, "less than a window's side"),
        ({"window": 0}, "1 or more"),
        ({"window": 24.0}, "whole number"),
        ({"threshold": "0.3", "background": "reject"}, "a finite number"),
        ({"background": 3}, "list of labels"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"treshold": 0.5}, "treshold"),
        ({"output": "masc"}, "'masks' or 'map'"),
        ({"ensemble": "yes"}, "ensemble must be 'off' or 'crops'"),
        ({"ensemble_weight": 2}, "ensemble_weight must be at most 1"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options, message, segment):
    with pytest.raises(ValueError, match=message) as error:
        segment(IMAGE, candidate_labels=CLASS_NAMES, **options)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- windows, proposals


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 120), st.data())
def test_windows_cover_an_axis_and_share_it_out(length, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    cuts = _cuts(length, window, overlap)
    own = [list(range(first, last)) for _, _, first, last in cuts]
    assert sum(own, []) == list(range(length))
    assert all(end - start == min(window, length) for start, end, _, _ in cuts)
    for (_, end, _, _), (start, _, _, _) in zip(cuts, cuts[1:], strict=False):
        assert end - start >= min(overlap, length)
    for start, end, first, last in cuts:
        assert start <= first < last <= end
        for pixel in range(first, last):  # no other window has it deeper inside, but for half a pixel
            assert depth(start, end, pixel, length) >= max(depth(*other[:2], pixel, length) for other in cuts) - 1


def depth(start: int, end: int, pixel: int, length: int) -> float:
    """How far a pixel lies from those ends of a window that are no ends of the image."""
    return min(pixel - start if start else length, end - 1 - pixel if end < length else length)


def test_a_large_image_in_windows_is_what_each_window_says(segment):
    image = IMAGE.resize((150, 70))
    result = segment(image, candidate_labels=CLASS_NAMES, output="map", window=64, overlap=16, batch_size=3)
    assert result["segmentation"].shape == (70, 150) and result["segmentation"].min() >= 0
    for top, bottom, own_top, own_bottom in _cuts(70, 64, 16):
        for left, right, own_left, own_right in _cuts(150, 64, 16):
            alone = segment(image.crop((left, top, right, bottom)), candidate_labels=CLASS_NAMES, output="map")
            part = alone["segmentation"][own_top - top : own_bottom - top, own_left - left : own_right - left]
            whole = result["segmentation"][own_top:own_bottom, own_left:own_right]
            assert (whole == part).mean() > 0.999
    at_once = segment(image, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    same = segment(image, candidate_labels=CLASS_NAMES, output="map", window=150)["segmentation"]
    assert np.array_equal(same, at_once)


def test_proposals_serve_other_label_lists_without_the_network(segment, monkeypatch):
    images = [IMAGE, IMAGE.resize((80, 40))]
    lists = [CLASS_NAMES, CLASS_NAMES[1:], [*CLASS_NAMES, "tree"]]
    expected = [[r["segmentation"] for r in segment(images, candidate_labels=labels, output="map")] for labels in lists]
    proposals = segment.propose(images, batch_size=2)
    windows = segment.propose(IMAGE, window=32)
    in_windows = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map", window=32)["segmentation"]
    monkeypatch.setattr(segment.model, "propose", None)  # the network is gone
    for labels, maps in zip(lists, expected, strict=True):
        for result, label_map in zip(segment(proposals, candidate_labels=labels, output="map"), maps, strict=True):
            assert (result["segmentation"] == label_map).mean() > 0.999
    again = segment(windows, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    assert np.array_equal(again, in_windows)


def test_the_picture_of_a_result_can_be_had_from_the_pipeline(segment):
    for output in ("masks", "map"):
        picture = segment.draw(IMAGE, segment(IMAGE, candidate_labels=CLASS_NAMES, background="reject", output=output))
        assert picture.mode == "RGB" and picture.width >= IMAGE.width


# ---------------------------------------------------------------------------------------------- corners


def test_what_was_set_at_the_making_can_be_undone(folder, segment):
    made = pipeline(
        model=str(folder), trust_remote_code=True, background="reject", threshold=0.99, window=32, output="map"
    )
    plain = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    assert (made(IMAGE, candidate_labels=CLASS_NAMES)["segmentation"] == -1).mean() > 0.5
    found = made(IMAGE, candidate_labels=CLASS_NAMES, background=None, window=None)["segmentation"]
    assert np.array_equal(found, plain)
    distracted = made(IMAGE, candidate_labels=CLASS_NAMES[:2], background=CLASS_NAMES[2:], window=None)
    assert np.array_equal(distracted["segmentation"], np.where(plain < 2, plain, -1))


def test_distractors_leave_the_stored_vectors_alone(folder):
    segment = pipeline(model=str(folder), trust_remote_code=True)
    torch.manual_seed(0)
    embeds = torch.randn(2, 12)
    segment.model.set_vocabulary(["sky", "grass"], embeds)
    choice = segment._choose(background=["red circle"])
    torch.testing.assert_close(choice.text_embeds[:2], torch.nn.functional.normalize(embeds, dim=-1))
    assert choice.names == ["sky", "grass", "red circle"] and choice.num_labels == 2


def test_one_label_alone_is_everywhere_and_sure_where_masks_are(segment):
    result = segment(IMAGE, candidate_labels=["sky"], output="map")
    assert (result["segmentation"] == 0).all() and result["scores"].max() > 0.9
    with pytest.raises(ValueError, match="'sky' alone is compared with nothing"):
        segment(IMAGE, candidate_labels=["sky"], background="reject")


def test_sixteen_bits_are_refused_rather_than_cut(segment, tmp_path):
    deep = Image.fromarray((np.arange(12).reshape(3, 4) * 5000).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    for image in (deep, tmp_path / "deep.png"):
        with pytest.raises(ValueError, match="more than 8 bits"):
            segment(image, candidate_labels=CLASS_NAMES)


@pytest.fixture(scope="module")
def textless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("textless")
    save_checkpoint(folder, text=False)
    return pipeline(model=str(folder), trust_remote_code=True)


def test_without_a_text_tower_nothing_is_dropped_silently(textless):
    assert textless(IMAGE, candidate_labels=["grass", "sky"], background=["red circle"], output="map")["labels"]
    for labels, options in (
        ([["sky", "heaven"]], {}),
        ([{"name": "sky", "templates": ["{}"]}], {}),
        (["sky"], {"synonyms": "max"}),
    ):
        with pytest.raises(ValueError, match="no text tower"):
            textless(IMAGE, candidate_labels=labels, **options)


def test_without_a_text_tower_a_name_is_found_in_whatever_case(textless):
    exact = textless(IMAGE, candidate_labels=["red circle", "grass"], output="map")
    other = textless(IMAGE, candidate_labels=["Red  Circle ", "GRASS"], output="map")
    assert np.array_equal(exact["segmentation"], other["segmentation"]) and other["labels"] == ["Red  Circle", "GRASS"]


def test_proposals_keep_their_windows(segment):
    with pytest.raises(ValueError, match="goes with propose"):
        segment(segment.propose(IMAGE), candidate_labels=CLASS_NAMES, window=16)


def test_less_precise_products_and_half_precision_proposals(folder, segment):
    plain = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        result = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    finally:
        torch.set_float32_matmul_precision(before)
    assert (result["segmentation"] == plain["segmentation"]).mean() > 0.999 and result["scores"].dtype == np.float32
    half = pipeline(model=str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    alone = half(IMAGE, candidate_labels=CLASS_NAMES, output="map")["segmentation"]
    assert np.array_equal(half(half.propose(IMAGE), candidate_labels=CLASS_NAMES, output="map")["segmentation"], alone)


# ------------------------------------------------------------------------------------------------ the ensemble


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_clip")
    save_checkpoint(folder, seed=1, vision=True, seen_class_names=CLASS_NAMES[:2])
    return pipeline(model=str(folder), trust_remote_code=True)


def test_the_ensemble_is_the_models_and_names_decide_what_is_seen(with_clip):
    labels = ["Sky", "grass ", "red circle", "blue square", "zebra"]  # two seen, two not, one never heard of
    result = with_clip(IMAGE, labels, ensemble="crops", ensemble_weight=0.6, output="map")
    model, processor = with_clip.model, with_clip.processor
    inputs = processor(images=IMAGE, class_names=labels)
    images, text = inputs.pop("pixel_values"), {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs = model(images, inputs["pixel_mask"], **text)
    seen = torch.tensor([True, True, False, False, False])
    proposals = model.embed_proposals(processor.to_rgb(images), outputs.mask_logits, outputs.valid_sizes)
    outputs = model.ensemble(outputs, proposals, **text, is_seen=seen, weight=0.6)
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(40, 56)])
    assert np.array_equal(result["segmentation"], expected.numpy())
    off = with_clip(IMAGE, labels, ensemble="off", output="map")
    assert not np.array_equal(off["segmentation"], result["segmentation"]), "too easy: the ensemble changes nothing"


def test_a_checkpoint_with_an_image_tower_and_a_weight_ensembles_by_itself(with_clip, segment):
    by_itself = with_clip(IMAGE, CLASS_NAMES, output="map")
    asked = with_clip(IMAGE, CLASS_NAMES, ensemble="crops", ensemble_weight=0.8, output="map")
    assert np.array_equal(by_itself["scores"], asked["scores"])
    one_pass = with_clip(IMAGE, CLASS_NAMES, ensemble="single_pass", output="map")
    assert not np.array_equal(one_pass["scores"], asked["scores"])
    with pytest.raises(ValueError, match="no image tower"):
        segment(IMAGE, CLASS_NAMES, ensemble="crops")


@pytest.mark.parametrize("view", ["crops", "single_pass"])
def test_kept_proposals_keep_what_clip_saw(with_clip, view):
    proposals = with_clip.propose([IMAGE, IMAGE.rotate(90, expand=True)], ensemble=view, batch_size=2, window=32)
    for image, kept in zip([IMAGE, IMAGE.rotate(90, expand=True)], proposals, strict=True):
        direct = with_clip(image, CLASS_NAMES, ensemble=view, window=32, output="map")
        again = with_clip(kept, CLASS_NAMES, ensemble=view, output="map")
        assert np.array_equal(direct["segmentation"], again["segmentation"])
    other = {"crops": "single_pass", "single_pass": "crops"}[view]
    for kept in (with_clip.propose(IMAGE, ensemble="off"), with_clip.propose(IMAGE, ensemble=other)):
        with pytest.raises(ValueError, match="these proposals were kept with"):
            with_clip(kept, CLASS_NAMES, ensemble=view)


def test_kept_proposals_follow_the_checkpoint_as_a_direct_call_does(with_clip, segment):
    direct = with_clip(IMAGE, CLASS_NAMES, output="map")
    assert np.array_equal(with_clip(with_clip.propose(IMAGE), CLASS_NAMES, output="map")["scores"], direct["scores"])
    assert with_clip.propose(IMAGE).ensemble == "crops" and segment.propose(IMAGE).ensemble == "off"


def test_the_ensemble_goes_with_synonyms_and_distractors(with_clip):
    labels = [["sky", "heaven"], "grass"]
    options = {"synonyms": "max", "background": ["red circle", "blue square"], "output": "map", "ensemble": "crops"}
    single, twice = (with_clip(IMAGE, [first, "grass"], **options) for first in ("sky", ["sky", "sky"]))
    np.testing.assert_allclose(single["scores"], twice["scores"], atol=1e-5)  # the label's own name once more
    other = with_clip(IMAGE, labels, **options)
    assert not np.allclose(other["scores"], single["scores"], atol=1e-5)
