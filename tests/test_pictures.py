"""Pictures: what stands where, and in which colour."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawing_zs3 import NOTHING, STRIPE, colour_of, colours_of, font_for, line_height
from zs3.evaluation.pictures import MARGIN, draw_comparison, stack

CLASSES = Path(__file__).parents[1] / "zs3" / "classes"


def comparison(folder: Path, panels: dict, names: list[str]) -> np.ndarray:
    draw_comparison(panels, names, folder / "deep" / "a.png")
    assert [file.name for file in (folder / "deep").iterdir()] == ["a.png"]
    return np.asarray(Image.open(folder / "deep" / "a.png"))


def test_panels_stand_side_by_side_at_one_scale_above_a_legend_of_what_occurs(tmp_path):
    image = Image.new("RGB", (60, 40), (10, 200, 30))
    label_map = np.zeros((40, 60), dtype=np.int64)
    label_map[:, 30:] = 2
    drawn = comparison(tmp_path, {"image": image, "truth": label_map}, ["sky", "sea", "sand"])
    scale = 5  # 60 columns become about 320
    rows, columns = np.nonzero((drawn == (10, 200, 30)).all(-1))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    assert (bottom - top + 1, right - left + 1) == (40 * scale, 60 * scale) and left == MARGIN
    sky, sea, sand = colours_of(["sky", "sea", "sand"]).tolist()
    second = right + 1 + MARGIN
    assert drawn[top + 5, second + 5].tolist() == sky
    assert drawn[top + 5, second + 60 * scale - 5].tolist() == sand
    legend = {tuple(pixel) for pixel in drawn[bottom + 1 :].reshape(-1, 3).tolist()}
    assert tuple(sky) in legend and tuple(sand) in legend and tuple(sea) not in legend


def test_what_is_no_class_is_striped_grey(tmp_path):
    drawn = comparison(tmp_path, {"truth": np.array([[-1] * 8, [255] * 8, [0] * 8]).repeat(20, axis=0)}, ["sky"])
    colours = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
    assert {colour_of("sky"), NOTHING, STRIPE} <= colours


def test_a_class_of_a_short_list_has_one_colour_in_all_pictures(tmp_path):
    names = json.loads((CLASSES / "voc_20.json").read_text())["classes"]
    for index, colour in enumerate(colours_of(names).tolist()):
        drawn = comparison(tmp_path, {"truth": np.full((40, 60), index)}, names)
        assert drawn[100, 100].tolist() == colour


@pytest.mark.parametrize("name", ["coco_stuff_171", "ade20k_847"])
def test_classes_of_a_long_list_that_meet_in_a_picture_differ(tmp_path, name):
    names = json.loads((CLASSES / f"{name}.json").read_text())["classes"]
    present = np.random.default_rng(0).choice(len(names), 12, replace=False)
    drawn = comparison(tmp_path, {"truth": present.reshape(3, 4).repeat(20, axis=0).repeat(20, axis=1)}, names)
    top = MARGIN + line_height(font_for(drawn.shape[1]))
    blocks = drawn[top + 40 : top + 240 : 80, MARGIN + 40 : MARGIN + 320 : 80]  # the middle of each
    assert blocks.shape == (3, 4, 3) and len(np.unique(blocks.reshape(-1, 3), axis=0)) == 12


def test_a_stack_holds_every_picture_one_below_the_other(tmp_path):
    for number, (width, height) in enumerate([(5, 3), (7, 2)]):
        Image.new("RGB", (width, height), (number, 0, 0)).save(tmp_path / f"{number}.png")
    stack([tmp_path / "0.png", tmp_path / "1.png"], tmp_path / "all.png")
    drawn = np.asarray(Image.open(tmp_path / "all.png"))
    assert drawn.shape == (5, 7, 3)
    assert drawn[2, 4].tolist() == [0, 0, 0] and drawn[3, 6].tolist() == [1, 0, 0]
