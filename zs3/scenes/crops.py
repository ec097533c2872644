"""Pictures of single things and stuffs for the tiny encoders: crops for training, and held-out crops with their names.

Axes: B picture, H W pixels of a scene.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from zs3.scenes import render

CROP = 48  # pixels, both sides of a crop
MARGIN = 0.4  # largest margin of a training crop, as a share of the box's side, on each side
TRAIN_SCENES = 2**31  # added to the seed: datasets of usual seeds lack these scenes
HELD_OUT_SCENES = 2**33  # the seed of the scenes for evaluation
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, for RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = np.array([round(255 * value) for value in MEAN], dtype=np.uint8)
MASK_STRIDE = 4  # pixels of a cell of a segmenter's masks
LEAST_PIXELS = 50  # of a region or mask that is visible enough to be named

THING_NAMES = render.WORLD_NAMES[len(render.TEXTURES) :]


class Crops(NamedTuple):
    pixels: np.ndarray  # (B, 48, 48, 3) uint8 RGB
    name: np.ndarray  # (B,) int64, index of the caption's name in a list of names


# ------------------------------------------------------------------------------------------------ cutting


def cut_out(
    image: np.ndarray, box: tuple[float, ...], resample: Image.Resampling, antialias: bool = True
) -> np.ndarray:
    """(48, 48, 3) uint8: the part of `image` (H, W, 3) in `box` (x0, y0, x1, y1), squashed to a square."""
    picture = Image.fromarray(image)
    if antialias:
        return np.asarray(picture.resize((CROP, CROP), resample, box=box))
    return np.asarray(picture.transform((CROP, CROP), Image.Transform.EXTENT, box, resample))


def widened(box: tuple[int, int, int, int], margin: float) -> tuple[float, ...]:
    """The box with `margin` x its side added on each side, cut at the border of the picture."""
    x0, y0, x1, y1 = box
    dx, dy = margin * (x1 - x0), margin * (y1 - y0)
    return max(x0 - dx, 0), max(y0 - dy, 0), min(x1 + dx, render.SIZE), min(y1 + dy, render.SIZE)


def is_visible(scene: render.Scene, position: int) -> bool:
    """Whether enough of region `position` is in front."""
    return (scene.owner == position).sum() >= LEAST_PIXELS


def _training_cut(rng: np.random.Generator, image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A crop with no or a random margin and small random errors of its sides, resized by a random method."""
    x0, y0, x1, y1 = widened(box, rng.uniform(0, MARGIN) * (rng.uniform() < 0.6))
    slip = rng.uniform(-0.06, 0.06, 4) * (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    moved = np.clip(np.array((x0, y0, x1, y1)) + slip, 0, render.SIZE)
    resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(2)]
    return cut_out(image, tuple(moved), resample, antialias=rng.uniform() < 0.5)


def _side_of_a_line(rng: np.random.Generator, mask: np.ndarray, kept: float) -> np.ndarray:
    """The pixels of `mask` (H, W) bool on one side of a random straight line, about the share `kept` of them."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.nonzero(mask)
    along = math.cos(angle) * x + math.sin(angle) * y
    chosen = along <= np.quantile(along, kept)
    part = np.zeros_like(mask)
    part[y[chosen], x[chosen]] = True
    return part


def like_a_proposal(rng: np.random.Generator, scene: render.Scene, position: int) -> np.ndarray:
    """(H, W) bool: a mask of region `position` with the errors that a segmenter makes.

    A segmenter's mask has coarse cells and rough borders. It may cover all regions of one name, or lack a part, or hold
    a part of a neighbour; the region's name stays the name of most pixels.
    """
    names = [region.name for region in scene.regions]
    alike = [index for index, name in enumerate(names) if name == names[position]]
    mask = np.isin(scene.owner, alike if rng.uniform() < 0.5 else [position])
    if rng.uniform() < 0.3:
        mask = _side_of_a_line(rng, mask, rng.uniform(0.5, 0.95))
    x0, y0, x1, y1 = render.box_of(mask)
    near = np.zeros_like(mask)
    near[max(y0 - 6, 0) : y1 + 6, max(x0 - 6, 0) : x1 + 6] = True
    neighbour = near & (scene.owner == scene.owner[near & ~mask][rng.integers((near & ~mask).sum())]) & ~mask
    if rng.uniform() < 0.35 and neighbour.any():
        most = 0.35 * mask.sum() / neighbour.sum()
        mask = mask | _side_of_a_line(rng, neighbour, min(rng.uniform(0, most), 1))
    cells = render.SIZE // MASK_STRIDE
    soft = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((cells, cells), Image.Resampling.BOX))
    rough = Image.fromarray(rng.uniform(-1, 1, (cells // 2, cells // 2)).astype(np.float32))
    rough = np.asarray(rough.resize((cells, cells), Image.Resampling.BICUBIC))
    soft = Image.fromarray(soft + np.float32(rng.uniform(0, 0.5)) * rough)
    return np.asarray(soft.resize((render.SIZE, render.SIZE), Image.Resampling.BILINEAR)) > 0.5


# ------------------------------------------------------------------------------------------------ training crops


def world_scene(rng: np.random.Generator) -> render.Scene:
    """A scene with random names of the world."""
    stuff = rng.choice(list(render.TEXTURES), rng.integers(2, 4), replace=False)
    things = rng.choice(THING_NAMES, rng.integers(3, 7))
    return render.compose(rng, stuff.tolist(), things.tolist())


def training_scene(rng: np.random.Generator, seed: int) -> render.Scene:
    """A themed scene that no dataset of a usual seed holds, or a scene with random names of the world."""
    if rng.uniform() < 0.5:
        return render.render_scene(TRAIN_SCENES + seed, int(rng.integers(2**31)))
    return world_scene(rng)


def _part_of_stuff(rng: np.random.Generator, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The whole band or, with probability 0.5, a part of its width."""
    if rng.uniform() < 0.5:
        return box
    width = int(rng.uniform(0.25, 0.8) * render.SIZE)
    x0 = int(rng.integers(render.SIZE - width))
    return x0, box[1], x0 + width, box[3]


def _product_photo(rng: np.random.Generator, name: str) -> np.ndarray:
    """(48, 48, 3) uint8: one thing, or a piece of one stuff, alone on the mean colour or on another plain colour.

    The shapes of up to two other things may be cut out of it, as if these hid a part.
    """
    is_stuff, middle = name in render.TEXTURES, render.SIZE / 2
    image = render.paint_stuff(rng, name if is_stuff else render.STUFF[rng.integers(len(render.STUFF))]).copy()
    others = [THING_NAMES[rng.integers(len(THING_NAMES))] for _ in range(rng.integers(3))]
    if is_stuff:
        band, _ = render.stuff_index(rng, int(rng.integers(2, 4)))
        shown = band == rng.integers(band.max() + 1)
        places = [(rng.uniform(11, 29), *rng.uniform(13, render.SIZE - 13, 2)) for _ in others]
    else:
        radius = rng.uniform(12, 32)
        offsets = [offset for offset in rng.uniform(-1, 1, (len(others), 2)) if math.hypot(*offset) > 0.8]
        places = [(0.8 * radius, middle + dx * 1.3 * radius, middle + dy * 1.3 * radius) for dx, dy in offsets]
        shown = render.paint_thing(rng, image, name, radius, middle, middle)
    for other, place in zip(others, places, strict=False):
        shown &= ~render.paint_thing(rng, image, other, *place)
    if shown.sum() < 100:
        shown[:] = True  # too little is visible: show the whole picture
    backdrop = MEAN_COLOUR if rng.uniform() < 0.7 else rng.integers(0, 256, 3)
    image = np.where(shown[..., None], render.light(rng, image), backdrop).astype(np.uint8)
    return _training_cut(rng, image, render.box_of(shown))


def _region_crop(rng: np.random.Generator, scene: render.Scene, position: int) -> np.ndarray | None:
    """(48, 48, 3) uint8: a box around a region, or a proposal-like mask of it. None if it is hidden."""
    region = scene.regions[position]
    if not is_visible(scene, position):
        return None
    if rng.uniform() < 0.4:
        is_stuff = region.name in render.TEXTURES
        return _training_cut(rng, scene.image, _part_of_stuff(rng, region.box) if is_stuff else region.box)
    mask = like_a_proposal(rng, scene, position)
    if mask.sum() < LEAST_PIXELS:
        return None
    filled = rng.uniform() < 0.65
    image = np.where(mask[..., None], scene.image, MEAN_COLOUR) if filled else scene.image
    return _training_cut(rng, image, render.box_of(mask))


def draw_crops(seed: int, number: int, count: int, hidden: frozenset[str] = frozenset()) -> Crops:
    """Pool `number` of training crops: of themed scenes, of scenes with random names, and product photos.

    hidden: names that no crop has. Their pixels may be in the crops of other names.
    """
    rng = np.random.default_rng((seed, number, 1))
    world = [name for name in render.WORLD_NAMES if name not in hidden]
    classes = [name for name in render.CLASS_NAMES if name not in hidden]
    pixels, names = np.empty((count, CROP, CROP, 3), dtype=np.uint8), []
    while len(names) < count:
        kind = rng.uniform()
        if kind < 0.3:
            name = str(rng.choice(world if kind < 0.2 else classes))
            pixels[len(names)] = _product_photo(rng, name)
            names.append(render.WORLD_NAMES.index(name))
            continue
        scene = training_scene(rng, seed)
        num_stuff = sum(region.name in render.TEXTURES for region in scene.regions)
        skipped = set(rng.permutation(num_stuff)[1:].tolist())  # one band per scene is enough: things are harder
        for position, region in enumerate(scene.regions):
            if position in skipped or region.name in hidden or len(names) == count:
                continue
            crop = _region_crop(rng, scene, position)
            if crop is not None:
                pixels[len(names)] = crop
                names.append(render.WORLD_NAMES.index(region.name))
    return Crops(pixels, np.array(names))


# ------------------------------------------------------------------------------------------------ held-out crops


@cache
def held_out_scene(index: int) -> render.Scene:
    return render.render_scene(HELD_OUT_SCENES, index)


def held_out_regions(per_class: int) -> Iterator[tuple[render.Scene, list[int]]]:
    """Scenes outside the training with the positions of visible regions, in all `per_class` of each class."""
    left = dict.fromkeys(render.CLASS_NAMES, per_class)
    index = 0
    while any(left.values()):
        scene = held_out_scene(index)
        index += 1
        chosen = []
        for position, region in enumerate(scene.regions):
            if left.get(region.name) and is_visible(scene, position):
                left[region.name] -= 1
                chosen.append(position)
        if chosen:
            yield scene, chosen


def held_out_crops(margin: float, per_class: int, *, masked: bool = False) -> Crops:
    """Crops around the boxes of `held_out_regions`. `name` indexes CLASS_NAMES.

    masked: pixels outside the region's class get the mean colour, like a masked proposal for CLIP.
    """
    pixels, names = [], []
    for scene, positions in held_out_regions(per_class):
        for position in positions:
            region = scene.regions[position]
            number = render.CLASS_NAMES.index(region.name)
            shown = (scene.label == number)[..., None]
            seen = np.where(shown, scene.image, MEAN_COLOUR) if masked else scene.image
            pixels.append(cut_out(seen, widened(region.box, margin), Image.Resampling.BICUBIC))
            names.append(number)
    return Crops(np.stack(pixels), np.array(names))
