"""Drawing: colours stay with their names and can be told apart by everybody; what a picture and its legend show."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pipeline import IMAGE, folder, segment  # noqa: F401
from tiny import CLASS_NAMES

import drawing_zs3
from drawing_zs3 import INK, NOTHING, PALETTE, PREFERRED, STRIPE, colour_of, colours_of, draw, fitted, font_for

CLASSES = Path(__file__).parents[1] / "zs3" / "classes"
VOC, ADE = (json.loads((CLASSES / f"{name}.json").read_text())["classes"] for name in ("voc_20", "ade20k_847"))

# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency (2009),
# severity 1.0, for linear RGB: normal vision, protanopia, deuteranopia, tritanopia.
VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
# Ottosson: A perceptual color space for image processing (2020).
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(colours: np.ndarray) -> np.ndarray:
    """(C, 3) sRGB -> (4, C, 3) OKLab, as each kind of vision sees it."""
    srgb = np.asarray(colours) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.einsum("vij,cj->vci", VISIONS, linear).clip(0, 1)
    return np.cbrt(seen @ TO_CONES.T) @ TO_OKLAB.T


def least_distance(colours: np.ndarray) -> float:
    """Of the two most alike, to whom they are most alike."""
    seen = oklab(colours)
    distances = np.linalg.norm(seen[:, :, None] - seen[:, None, :], axis=-1)
    return distances[:, ~np.eye(len(colours), dtype=bool)].min()


def test_oklab_of_known_colours():
    white, red = oklab(np.array([[255, 255, 255], [255, 0, 0]]))[0]
    np.testing.assert_allclose(white, [1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(red, [0.628, 0.225, 0.126], atol=1e-3)


@pytest.mark.parametrize(("count", "least"), [(8, 0.10), (PREFERRED, 0.088), (32, 0.053), (len(PALETTE), 0.038)])
def test_colours_and_the_grey_of_nothing_differ_to_every_kind_of_vision(count, least):
    assert least_distance(np.vstack([PALETTE[:count], NOTHING])) >= least


@pytest.mark.parametrize("seed", range(20))
def test_any_eight_names_differ_to_every_kind_of_vision(seed):
    names = np.random.default_rng(seed).choice(ADE, 8, replace=False).tolist()
    assert least_distance(colours_of(names)) >= 0.088


def test_the_twenty_classes_of_voc_differ_to_every_kind_of_vision():
    assert least_distance(colours_of(VOC)) >= 0.088


def test_a_name_has_the_same_colour_in_every_run_and_every_version():
    assert [colour_of(name) for name in ("sky", "grass", "Grass")] == [(153, 0, 72), (144, 207, 171), (144, 207, 171)]
    assert colours_of(["sky", "grass"]).tolist() == [[153, 0, 72], [144, 207, 171]]


@pytest.mark.parametrize("names", [VOC, ADE, ["Sky", "sky", "SKY"]], ids=len)
def test_permuting_names_permutes_colours(names):
    order = np.random.default_rng(0).permutation(len(names))
    assert np.array_equal(colours_of([names[index] for index in order]), colours_of(names)[order])


def test_a_further_name_with_a_colour_that_is_free_changes_nobody_elses():
    names, tried = ["sky", "car", "grass", "road", "tree", "cow"], 0
    colours = colours_of(names).tolist()
    assert list(colour_of("sky")) == list(colour_of("car")) and len({tuple(colour) for colour in colours}) == 6
    for further in ADE:
        if list(colour_of(further)) not in colours:
            tried += 1
            assert colours_of([*names, further]).tolist() == [*colours, list(colour_of(further))]
    assert tried > 100


def test_names_that_differ_by_case_only_differ_in_one_picture():
    assert len({tuple(colour) for colour in colours_of(["sky", "Sky"]).tolist()}) == 2


@pytest.mark.parametrize("count", [1, 64, 65, 847, 5000])
def test_colours_repeat_only_after_all_have_been_used(count):
    colours = colours_of([f"name {index}" for index in range(count)])
    assert colours.shape == (count, 3) and colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours.tolist()}) == min(count, 64)


def test_no_names_have_no_colours():
    assert colours_of([]).shape == (0, 3)


NAMES = ["sky", "grass", "road"]
LABEL_MAP = np.zeros((240, 400), dtype=np.int64)
LABEL_MAP[:, 100:] = 1
LABEL_MAP[200:, 300:] = -1  # the third name occurs nowhere
SCORES = np.where(LABEL_MAP == 0, 0.9, 0.3).astype(np.float32)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 400, 3), dtype=np.uint8))
SKY, GRASS, NONE = (120, 50), (120, 200), (slice(205, 240), slice(305, 400))  # far from lines


def as_map() -> dict:
    return {"segmentation": LABEL_MAP.copy(), "labels": NAMES, "scores": SCORES.copy()}


def as_regions() -> list[dict]:
    return [
        {
            "label": "none of these" if index < 0 else NAMES[index],
            "label_id": index,
            "score": float(SCORES[index == LABEL_MAP].mean()),
            "mask": Image.fromarray(np.where(index == LABEL_MAP, np.uint8(255), np.uint8(0))),
        }
        for index in (-1, 0, 1)
    ]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def rows_of_the_legend(monkeypatch, result, image=PHOTO) -> list[tuple[str, ...]]:
    seen = []

    def legend(entries, width, headings=()):
        seen.extend([("", *headings), *((entry.name, *entry.figures) for entry in entries)])
        return Image.new("RGB", (width, 1))

    monkeypatch.setattr(drawing_zs3, "legend", legend)
    draw(image, result)
    return seen


def test_both_forms_of_a_result_give_the_same_picture():
    assert np.array_equal(pixels(draw(PHOTO, as_map())), pixels(draw(PHOTO, as_regions())))
    covered = as_regions()[1:]  # what no mask covers has no name either
    assert np.array_equal(pixels(draw(PHOTO, as_map())), pixels(draw(PHOTO, covered)))


def test_both_forms_that_the_pipeline_returns_give_the_same_picture(segment):  # noqa: F811
    masks = segment(IMAGE, candidate_labels=CLASS_NAMES)
    result = segment(IMAGE, candidate_labels=CLASS_NAMES, output="map")
    assert np.array_equal(pixels(draw(IMAGE, masks)), pixels(draw(IMAGE, result)))


def test_drawing_twice_gives_the_same_picture_and_leaves_its_inputs_alone():
    image, result = PHOTO.copy(), as_map()
    first, second = draw(image, result), draw(image, result)
    assert np.array_equal(pixels(first), pixels(second))
    assert np.array_equal(pixels(image), pixels(PHOTO)) and np.array_equal(result["segmentation"], LABEL_MAP)


def test_opacity_goes_from_the_image_to_the_colours():
    clear, half, full = (pixels(draw(PHOTO, as_map(), opacity=opacity)) for opacity in (0, 0.5, 1))
    for place, name in ((SKY, "sky"), (GRASS, "grass")):
        photo = pixels(PHOTO)[place]
        assert clear[place].tolist() == photo.tolist() and full[place].tolist() == list(colour_of(name))
        assert np.abs(half[place] - (photo + colour_of(name)) / 2).max() <= 2
    with pytest.raises(ValueError, match=r"opacity must be at most 1, got 1\.5"):
        draw(PHOTO, as_map(), opacity=1.5)


def test_where_no_name_applies_there_are_grey_stripes():
    drawn = pixels(draw(PHOTO, as_map(), opacity=1))
    assert {tuple(pixel) for pixel in drawn[NONE].reshape(-1, 3).tolist()} == {NOTHING, STRIPE}
    beyond = {**as_map(), "segmentation": np.where(LABEL_MAP < 0, 255, LABEL_MAP)}
    assert np.array_equal(pixels(draw(PHOTO, beyond, opacity=1)), drawn)


def test_a_line_that_shows_without_colours_parts_the_regions():
    drawn = pixels(draw(Image.new("RGB", (400, 240), (7, 7, 7)), as_map(), opacity=0))[:240]
    assert drawn[100, 98:102].tolist() == [[7] * 3, list(INK), [255] * 3, [7] * 3]
    assert drawn[198:202, 350].tolist() == [[7] * 3, list(INK), [255] * 3, [7] * 3]


def test_the_legend_lists_what_occurs_by_its_share_with_its_score(monkeypatch):
    assert rows_of_the_legend(monkeypatch, as_map()) == [
        ("", "share", "score"),
        ("grass", "70.8 %", "0.30"),
        ("sky", "25.0 %", "0.90"),
        ("none of these", "4.2 %", ""),
    ]


def test_without_scores_the_legend_has_none_and_scores_above_one_are_shown_as_one(monkeypatch):
    without = {"segmentation": np.zeros((240, 400), dtype=np.uint8), "labels": ["sky"]}
    assert rows_of_the_legend(monkeypatch, without) == [("", "share"), ("sky", "100.0 %")]
    high = {**without, "scores": np.full((240, 400), 3.5)}
    assert rows_of_the_legend(monkeypatch, high) == [("", "share", "score"), ("sky", "100.0 %", "1.00")]


def test_a_region_too_small_for_a_decimal_is_still_listed(monkeypatch):
    label_map = np.zeros((240, 400), dtype=np.int64)
    label_map[3, 3] = 1
    rows = rows_of_the_legend(monkeypatch, {"segmentation": label_map, "labels": NAMES})
    assert rows == [("", "share"), ("sky", "100.0 %"), ("grass", "< 0.1 %")]


@pytest.mark.parametrize(
    "result", [[], {"segmentation": np.full((240, 400), -1), "labels": NAMES}], ids=["list", "map"]
)
def test_a_result_without_any_region_is_all_none_of_these(monkeypatch, result):
    assert rows_of_the_legend(monkeypatch, result)[1][:2] == ("none of these", "100.0 %")


def test_confidence_takes_colour_from_what_is_unsure():
    black, result = Image.new("RGB", (400, 240)), as_map()
    result["scores"][:120, 100:] = 1.7  # grass above, at least certain; 0.3 below
    plain, faded = (pixels(draw(black, result, opacity=1, confidence=confidence)) for confidence in (False, True))
    assert np.array_equal(faded[50, 200], plain[50, 200]) and np.array_equal(faded[NONE], plain[NONE])
    assert np.abs(faded[GRASS[0] + 10, 200] - 0.3 * plain[GRASS[0] + 10, 200]).max() <= 1
    assert np.abs(faded[SKY] - 0.9 * plain[SKY]).max() <= 1
    with pytest.raises(ValueError, match="confidence=True needs a result with scores"):
        draw(black, {"segmentation": LABEL_MAP, "labels": NAMES}, confidence=True)


def test_the_whole_label_list_can_fix_the_colours():
    assert colour_of("car") == colour_of("sky")
    names = ["car", "sky"]
    result = {"segmentation": np.ones((240, 400), dtype=np.int64), "labels": names}
    own, fixed = (draw(PHOTO, result, opacity=1, class_names=given) for given in (None, names))
    assert own.getpixel((50, 50)) == colour_of("sky")
    assert fixed.getpixel((50, 50)) == tuple(colours_of(names)[1].tolist()) != colour_of("sky")
    with pytest.raises(ValueError, match="'sky' is in the result and not in class_names"):
        draw(PHOTO, result, class_names=["car"])


def test_an_image_can_be_a_picture_an_array_or_a_path(tmp_path):
    expected = pixels(draw(PHOTO, as_map()))
    PHOTO.save(tmp_path / "photo.png")
    for image in (pixels(PHOTO).astype(np.uint8), tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert np.array_equal(pixels(draw(image, as_map())), expected)
    for array in (np.zeros((240, 400, 2), np.uint8), np.zeros((2, 240, 400, 3), np.uint8), np.zeros((240, 400, 3))):
        with pytest.raises(ValueError, match="an array must be uint8"):
            draw(array, as_map())


def test_a_photograph_that_says_how_to_turn_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    PHOTO.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(pixels(draw(tmp_path / "photo.png", as_map())), pixels(draw(PHOTO, as_map())))


@pytest.mark.parametrize("result", [as_map(), as_regions()], ids=["map", "regions"])
def test_a_result_of_another_size_is_refused(result):
    with pytest.raises(ValueError, match="the image has 300 x 200 pixels, the result 400 x 240: draw the image that"):
        draw(PHOTO.resize((300, 200)), result)


@pytest.mark.parametrize("result", [None, {"labels": NAMES}, [as_map()], [[]]])
def test_what_is_no_result_is_refused(result):
    with pytest.raises(ValueError, match="a result is a list of"):
        draw(PHOTO, result)


def test_a_small_picture_is_enlarged_in_whole_steps():
    label_map = np.zeros((40, 56), dtype=np.int64)
    label_map[:, 28:] = 1
    drawn = draw(np.full((40, 56, 3), 9, np.uint8), {"segmentation": label_map, "labels": NAMES}, opacity=1)
    assert drawn.width == 6 * 56 and drawn.height > 6 * 40
    assert drawn.getpixel((6 * 28 - 2, 100)) == colour_of("sky")
    assert drawn.getpixel((6 * 28 + 1, 100)) == colour_of("grass")


@pytest.mark.parametrize("size", [(1, 1), (56, 40), (90, 900), (400, 240), (1500, 400)])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_legends_stay_within_the_picture(size, count):
    names = [f"{index} " + "a name that goes on and on " * (index % 3 == 0) for index in range(count)]
    label_map = np.arange(size[0] * size[1]).reshape(size[::-1]) % count
    result = {"segmentation": label_map, "labels": names, "scores": np.ones(size[::-1])}
    drawn = draw(Image.new("RGB", size), result)
    top = size[1] * max(1, round(320 / max(size)))
    below = pixels(drawn)[top:]
    written = np.argwhere((below != 255).any(-1))
    assert (written.min(0) >= 5).all() and (written.max(0) < np.array(below.shape[:2]) - 5).all()


def test_text_that_is_too_long_ends_in_an_ellipsis():
    font = font_for(400)
    assert fitted("sky", font, 100) == "sky"
    cut = fitted("a name that goes on and on", font, 100)
    assert cut.startswith("a name") and cut.endswith("…") and 60 < font.getlength(cut) <= 100
    assert font_for(4000).size > font_for(400).size


def test_text_is_one_line_without_the_accents_that_the_font_lacks():
    assert fitted(" über\n café ", font_for(400), 1000) == "uber cafe"


def test_names_that_the_font_cannot_write_do_not_stop_a_picture():
    names = ["天空", "небо", "سماء", "🙂", "\u200d", "a\nb"]
    label_map = np.arange(240 * 400).reshape(240, 400) // 16000
    drawn = draw(PHOTO, {"segmentation": label_map, "labels": names}, opacity=1)
    assert [drawn.getpixel((9, 40 * row + 20)) for row in range(6)] == [tuple(c) for c in colours_of(names).tolist()]


def test_the_colour_before_a_name_is_that_of_its_region():
    entries = [drawing_zs3.Entry(name, colour) for name, colour in zip(NAMES, colours_of(NAMES), strict=True)]
    drawn = drawing_zs3.legend([*entries, drawing_zs3.Entry("none of these", None)], 150)
    colours = {colour for _, colour in drawn.getcolors(drawn.width * drawn.height)}
    assert {colour_of(name) for name in NAMES} | {NOTHING, STRIPE} <= colours
    heights = [np.argwhere((pixels(drawn) == colour_of(name)).all(-1))[:, 0].mean() for name in NAMES]
    assert heights == sorted(heights)


def test_a_names_colour_is_that_of_its_other_spellings():
    assert colour_of("Red  Circle ") == colour_of("red circle") and colour_of("cafe\u0301") == colour_of("CAF\u00c9")
