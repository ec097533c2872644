import colorsys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from zs3.command_line import InputError
from zs3.data.augmentation import Augmentation, _jittered, augment


def coordinates(height, width):
    """A picture and a map which say of every pixel where it came from; ids up to 65535."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    return Image.fromarray(image), (rows * width + columns).astype(np.int32)


def smooth(height, width):
    """A picture of slow waves, the same at any scale."""
    rows, columns = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], axis=-1)
    return Image.fromarray((127 + 120 * waves).astype(np.uint8))


def drawn(image, label, seed, recipe):
    rng = np.random.default_rng(seed)
    return augment(image, label, recipe.draw_size(image.size, rng), rng, recipe, lambda crop: crop)


def test_crop_takes_one_window_of_picture_and_map_ids_beyond_255_included():
    image, label = coordinates(200, 250)
    recipe = Augmentation(crop_size=64, max_size=2048, short_edges=[200], color_jitter=False)
    corners, flips = set(), Counter()
    for seed in range(40):
        cropped, ids = drawn(image, label, seed, recipe)
        pixels = np.asarray(cropped).astype(int)
        np.testing.assert_array_equal(pixels[..., 0] * 250 + pixels[..., 1], ids)
        assert ids.shape == (64, 64)
        corners.add(int(ids.min()))
        flips[bool(ids[0, 0] > ids[0, 1])] += 1
    assert len(corners) > 30 and min(flips.values()) > 8


def test_map_scales_with_the_picture_by_nearest_pixel():
    image, label = coordinates(10, 20)
    recipe = Augmentation(crop_size=100, max_size=2048, short_edges=[20], flip=False, color_jitter=False)
    doubled, ids = drawn(image, label, 0, recipe)
    assert doubled.size == (40, 20)
    np.testing.assert_array_equal(ids, label.repeat(2, axis=0).repeat(2, axis=1))
    # PIL's own nearest-neighbour resize, where it can say the ids
    recipe = Augmentation(crop_size=9, max_size=2048, short_edges=[7], flip=False)
    smaller, ids = drawn(image, label, 0, recipe)
    whole = np.asarray(Image.fromarray(label.astype(np.uint8)).resize((14, 7), Image.Resampling.NEAREST))
    assert any(np.array_equal(whole[:, x : x + 9], ids) for x in range(6)) and smaller.size == (9, 7)


def test_crop_equals_resizing_the_whole_picture_first():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    label = np.arange(60 * 90).reshape(60, 90)
    recipe = Augmentation(crop_size=32, max_size=2048, short_edges=[45], flip=False, color_jitter=False)
    cropped, _ = drawn(image, label, 3, recipe)
    whole = np.asarray(image.resize((68, 45), Image.Resampling.BILINEAR)).astype(int)
    gaps = [np.abs(whole[y : y + 32, x : x + 32] - np.asarray(cropped)).max() for y in range(14) for x in range(37)]
    assert sorted(gaps)[0] <= 1 < sorted(gaps)[1]


def test_longer_edge_is_bounded():
    image, label = coordinates(10, 100)
    recipe = Augmentation(crop_size=100, short_edges=[20], max_size=50, flip=False)
    assert drawn(image, label, 0, recipe)[0].size == (50, 5)


def test_single_class_limit_finds_a_mixed_crop():
    label = np.zeros((64, 64), np.int64)
    label[:, 40:] = 1
    image = Image.new("RGB", (64, 64))
    shares = {}
    for limit in (1.0, 0.75):
        recipe = Augmentation(crop_size=16, max_size=2048, short_edges=[64], single_class_max_area=limit)
        crops = [drawn(image, label, seed, recipe)[1] for seed in range(30)]
        shares[limit] = sum(0.25 < crop.mean() < 0.75 for crop in crops)
    assert shares[0.75] > 20 > shares[1.0]


def test_color_jitter_changes_colours_but_no_place():
    image = Image.new("RGB", (20, 10), (200, 80, 40))
    recipe = Augmentation(crop_size=10, max_size=2048, short_edges=[10], flip=False)
    colours = set()
    for seed in range(20):
        jittered = np.asarray(drawn(image, np.zeros((10, 20)), seed, recipe)[0])
        assert (jittered == jittered[0, 0]).all()
        colours.add(tuple(jittered[0, 0].tolist()))
    assert len(colours) > 12


def test_default_short_edges_are_those_of_mask2former():
    assert Augmentation(512, 2048).short_edges == tuple(int(x * 0.1 * 512) for x in range(5, 21))


@pytest.mark.parametrize(
    "options", [{"crop_size": 0}, {"short_edges": []}, {"short_edges": [0]}, {"single_class_max_area": 0}]
)
def test_impossible_augmentations_are_refused(options):
    with pytest.raises(InputError):
        Augmentation(**{"crop_size": 16, "max_size": 64, **options})


def test_a_picture_decoded_at_half_its_size_is_cut_at_the_same_place():
    whole, label = smooth(256, 320), coordinates(256, 320)[1]
    half = whole.resize((160, 128), Image.Resampling.BOX)
    recipe = Augmentation(crop_size=64, max_size=2048, short_edges=[100, 128], color_jitter=False)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        size = recipe.draw_size(whole.size, rng)
        state = rng.bit_generator.state
        one, ids = augment(whole, label, size, rng, recipe, np.copy)
        rng.bit_generator.state = state
        other, same_ids = augment(half, label, size, rng, recipe, np.copy)
        np.testing.assert_array_equal(ids, same_ids)
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 3


def test_the_limit_of_one_class_is_a_share_of_the_labelled_pixels():
    label = np.full((32, 64), -1)
    label[14:18] = 0
    label[14:18, 32:] = 1  # most of any crop is ignored
    image = Image.new("RGB", (64, 32))
    recipe = Augmentation(crop_size=16, max_size=2048, short_edges=[32], single_class_max_area=0.75)
    mixed = 0
    for seed in range(100):
        crop = drawn(image, label, seed, recipe)[1]
        found = np.bincount(crop[crop != -1], minlength=2)
        mixed += found.max() < 0.75 * found.sum()
    assert mixed > 74  # 9 of 49 places are mixed enough, so 10 draws find one in 86 of 100


class Scripted:
    """A generator with given draws: which of brightness, contrast, saturation and hue; and the ends of ranges."""

    def __init__(self, which, end):
        self.which, self.end = which, end

    def random(self, size=None):
        if size is None:
            return 0.9  # contrast comes last
        return np.array(
            [0.1 if name == self.which else 0.9 for name in ("brightness", "contrast", "saturation", "hue")]
        )

    def uniform(self, low, high):
        return high if self.end else low


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_is_that_of_ssd(which, end):
    colour = (180, 90, 60)
    jittered = _jittered(Image.new("RGB", (1, 1), colour), Scripted(which, end)).getpixel((0, 0))
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    if which == "brightness":
        expected = [channel + (-32, 32)[end] for channel in colour]
    elif which == "contrast":
        expected = [channel * (0.5, 1.5)[end] for channel in colour]
    elif which == "saturation":
        expected = [255 * c for c in colorsys.hsv_to_rgb(hue, min(saturation * (0.5, 1.5)[end], 1), value)]
    else:  # 18 of OpenCV's 180 steps
        expected = [255 * c for c in colorsys.hsv_to_rgb((hue + (-0.1, 0.1)[end]) % 1, saturation, value)]
    np.testing.assert_allclose(jittered, np.clip(expected, 0, 255), atol=3)
