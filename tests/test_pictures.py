"""Pictures: what stands where, and in which colour."""

import numpy as np
from PIL import Image

from zs3.pictures import IGNORED_COLOUR, LINE, MARGIN, class_colours, colourise, draw_comparison, stack


def test_classes_have_different_colours_and_the_rest_is_grey():
    colours = class_colours(171)
    assert len({tuple(colour) for colour in colours.tolist()}) == 171
    picture = np.asarray(colourise(np.array([[0, 170], [-1, 255]]), 171))
    assert picture[0, 0].tolist() == colours[0].tolist() and picture[0, 1].tolist() == colours[170].tolist()
    assert picture[1, 0].tolist() == picture[1, 1].tolist() == list(IGNORED_COLOUR)


def test_panels_stand_side_by_side_at_one_scale(tmp_path):
    image = Image.fromarray(np.full((40, 60, 3), (10, 200, 30), np.uint8))
    label_map = np.zeros((40, 60), dtype=np.int64)
    label_map[:, 30:] = 2
    draw_comparison({"image": image, "truth": label_map}, ["sky", "sea", "sand"], tmp_path / "deep" / "a.png")
    drawn = np.asarray(Image.open(tmp_path / "deep" / "a.png"))
    scale = 8  # 40 rows become at least 320
    top, second = MARGIN + LINE, 2 * MARGIN + 60 * scale
    assert drawn[top + 5, MARGIN + 5].tolist() == [10, 200, 30]
    colours = class_colours(3).tolist()
    assert drawn[top + 5, second + 5].tolist() == colours[0]
    assert drawn[top + 5, second + 60 * scale - 5].tolist() == colours[2]
    legend = {tuple(pixel) for pixel in drawn[top + 40 * scale :].reshape(-1, 3).tolist()}
    assert tuple(colours[0]) in legend and tuple(colours[2]) in legend and tuple(colours[1]) not in legend


def test_a_stack_holds_every_picture_one_below_the_other(tmp_path):
    for number, (width, height) in enumerate([(5, 3), (7, 2)]):
        Image.new("RGB", (width, height), (number, 0, 0)).save(tmp_path / f"{number}.png")
    stack([tmp_path / "0.png", tmp_path / "1.png"], tmp_path / "all.png")
    drawn = np.asarray(Image.open(tmp_path / "all.png"))
    assert drawn.shape == (5, 7, 3)
    assert drawn[2, 4].tolist() == [0, 0, 0] and drawn[3, 6].tolist() == [1, 0, 0]
