"""The embedded benchmark `scenes`: coloured and patterned shapes in front of textured stuff, drawn by rule.

A scene has 2-3 bands of stuff (grass, sky, ...) and 3-6 things ("red circle": an attribute and a shape). Most things of
a scene belong to its theme. A band may be a distractor, and up to 2 further things are: they have no class, so their
pixels are ignored.
The world has 102 names. 24 are the classes (zs3/classes/scenes.json, with 12 class splits), 12 are distractors. No
dataset shows the other 66; they are candidate names in the label space `scenes_90`.
Map: the vocabulary; outlines of shapes; textures of stuff; painting a thing; `compose` draws a picture from names;
`render_scene` picks the names. `zs3.scenes.dataset` makes the folder that train.py reads.
Every picture depends on its (seed, index) alone. Coordinates are pixels, x to the right and y down.
Axes: H W picture, h w the part of it that a thing can touch, P corner of an outline.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128  # pixels, both sides of a picture
ATLAS = 256  # pixels, both sides of a texture; scenes use pieces of it


# ------------------------------------------------------------------------------------------------ vocabulary


COLOURS = {
    "red": (205, 40, 45),
    "orange": (240, 130, 30),
    "yellow": (245, 215, 45),
    "green": (35, 160, 70),
    "blue": (40, 80, 215),
    "purple": (145, 55, 185),
    "white": (240, 240, 240),
}
PATTERNS = ("striped", "dotted", "checkered")  # dark on light
ATTRIBUTES = (*COLOURS, *PATTERNS)

_CLASSES = json.loads((Path(__file__).parents[1] / "classes" / "scenes.json").read_text(encoding="utf-8"))
CLASS_NAMES: list[str] = _CLASSES["classes"]  # 8 stuff, then 16 things
THINGS: list[str] = _CLASSES["things"]
STUFF = CLASS_NAMES[: -len(THINGS)]
UNSEEN: list[str] = _CLASSES["unseen"]  # of split 0
IGNORE_INDEX: int = _CLASSES["ignore_label"]  # label of distractors
# Some share a word with a class, some do not.
DISTRACTOR_STUFF = ["lava", "metal wall"]
DISTRACTOR_THINGS = [
    "orange ring", "purple moon", "white arrow", "checkered moon", "orange arrow",
    "red ring", "blue moon", "orange star", "white heart", "purple square",
]  # fmt: skip
DISTRACTORS = DISTRACTOR_STUFF + DISTRACTOR_THINGS


class Theme(NamedTuple):
    bands: tuple[tuple[str, ...], ...]  # possible stacks of stuff, from top to bottom
    things: tuple[str, ...]


THEMES = (
    Theme(
        (("sky", "grass"), ("sky", "grass", "water"), ("sky", "water", "grass")),
        ("red circle", "red star", "green cross", "yellow heart", "green circle", "blue square"),
    ),
    Theme(
        (("sky", "water", "sand"), ("water", "sand"), ("sky", "sand", "water")),
        ("yellow triangle", "yellow star", "blue heart", "dotted cross", "red square", "green triangle"),
    ),
    Theme(
        (("brick wall", "wood floor"), ("sky", "brick wall", "sand"), ("brick wall", "grass")),
        ("striped square", "striped star", "red star", "red square", "blue circle", "dotted triangle"),
    ),
    Theme(
        (("sky", "stone wall", "grass"), ("stone wall", "wood floor"), ("stone wall", "sand")),
        ("blue square", "blue circle", "green triangle", "dotted cross", "yellow heart", "striped square"),
    ),
    Theme(
        (("sky", "snow"), ("stone wall", "snow"), ("brick wall", "snow", "wood floor"), ("snow", "water")),
        ("dotted triangle", "green circle", "striped star", "red circle", "blue heart", "yellow triangle"),
    ),
)
THEME_SHARE = 0.7  # share of things that are of the theme; the rest are any of THINGS
DISTRACTOR_BAND = 0.55  # share of scenes with a band that is a distractor
DISTRACTOR_COUNTS = (0.25, 0.5, 0.25)  # shares of scenes with 0, 1, 2 things that are distractors


class Region(NamedTuple):
    name: str
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 of the part inside the picture, x1 and y1 exclusive


class Scene(NamedTuple):
    image: np.ndarray  # (128, 128, 3) uint8 RGB
    label: np.ndarray  # (128, 128) uint8, an index of CLASS_NAMES or IGNORE_INDEX
    regions: list[Region]  # stuff from top to bottom, then things from back to front
    owner: np.ndarray  # (128, 128) int, the index of each pixel's region


# ------------------------------------------------------------------------------------------------ shapes


def _circle(radius: float = 1.0, start: float = 0.0, stop: float = 2 * math.pi) -> np.ndarray:
    angle = np.linspace(start, stop, 49)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star() -> np.ndarray:
    angle = np.arange(10) * math.pi / 5 - math.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.15, 0.46)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 49)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([17 * np.sin(t) ** 3, y - 2.5], axis=1) / 15


def _moon() -> np.ndarray:
    outer = _circle(1.05, 0.38 * math.pi, 1.62 * math.pi)
    tip = outer[0, 0]
    inner = (outer[::-1] - (tip, 0)) * (0.5, 1) + (tip, 0)
    return np.concatenate([outer, inner]) + (0.15, 0)


ARM = 0.36  # half the width of a cross's arms, and of an arrow's shaft
# Corners (P, 2), x and y in about [-1, 1]: the outer border and, if there is one, a hole.
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_circle(),),
    "square": (0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),),
    "triangle": (np.array([(0, -1.1), (1.1, 0.85), (-1.1, 0.85)]),),
    "star": (_star(),),
    "cross": (np.array([
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ]),),
    "heart": (_heart(),),
    "ring": (_circle(1.05), _circle(0.58)),
    "moon": (_moon(),),
    "arrow": (np.array([(0, -1.1), (1, 0), (ARM, 0), (ARM, 1.05), (-ARM, 1.05), (-ARM, 0), (-1, 0)]),),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ textures


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """(ATLAS, ATLAS) float in about [-1, 1]: rows x columns random numbers, smoothly enlarged."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((ATLAS, ATLAS), Image.Resampling.BICUBIC))


def _tint(value: np.ndarray, dark: tuple[int, int, int], light: tuple[int, int, int]) -> np.ndarray:
    """Colours between `dark` (value -1) and `light` (value 1)."""
    share = ((np.clip(value, -1, 1) + 1) / 2)[..., None]
    return share * np.array(light) + (1 - share) * np.array(dark)


def _bricks(rng: np.random.Generator, height: int, width: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of blocks: (ATLAS, ATLAS) random shade of each block in [-1, 1], and bool joints."""
    y, x = np.mgrid[:ATLAS, :ATLAS]
    row = y // height
    x = x + (row * shift * width).astype(int)
    shade = rng.uniform(-1, 1, (ATLAS // height + 1, 3 * ATLAS // width + 20))[row, x // width]
    return shade, (y % height < 1.5) | (x % width < 1.5)


def _grass(rng: np.random.Generator) -> np.ndarray:
    blades = 0.8 * _noise(rng, 48, 170) + 0.35 * _noise(rng, 10, 10)
    return _tint(1.2 * blades, (38, 84, 26), (142, 186, 74))


def _sky(rng: np.random.Generator) -> np.ndarray:
    clouds = _noise(rng, 7, 4) + 0.4 * _noise(rng, 20, 10)
    return _tint(3 * clouds - 1.6, (132, 184, 232), (236, 242, 248))


def _sand(rng: np.random.Generator) -> np.ndarray:
    return _tint(0.4 * _noise(rng, 200, 200) + 0.5 * _noise(rng, 14, 7), (190, 160, 110), (234, 212, 164))


def _water(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:ATLAS, :ATLAS]
    waves = np.sin(0.62 * y + 2.0 * np.sin(0.13 * x + 2 * _noise(rng, 6, 6)) + 3 * _noise(rng, 8, 4))
    return _tint(np.sign(waves) * np.abs(waves) ** 0.7, (18, 84, 112), (92, 178, 186))


def _brick_wall(rng: np.random.Generator) -> np.ndarray:
    shade, joint = _bricks(rng, height=9, width=20, shift=0.5)
    bricks = _tint(0.7 * shade + 0.4 * _noise(rng, 128, 128), (112, 50, 36), (178, 92, 66))
    return np.where(joint[..., None], (206, 196, 182), bricks)


def _wood_floor(rng: np.random.Generator) -> np.ndarray:
    shade, joint = _bricks(rng, height=13, width=75, shift=0.37)
    planks = _tint(0.5 * shade + 0.7 * _noise(rng, 128, 12), (122, 78, 36), (196, 146, 84))
    return np.where(joint[..., None], (66, 40, 18), planks)


def _stone_wall(rng: np.random.Generator) -> np.ndarray:
    cell, around = 20, np.arange(3)  # one stone around a jittered point of each cell of 20 pixels
    grid = np.arange(-cell, ATLAS + cell, cell)
    points = np.stack(np.meshgrid(grid, grid), axis=-1)  # (cells, cells, 2) x, y
    points = points + rng.uniform(2, cell - 2, (len(grid) ** 2, 2)).reshape(points.shape)
    pixel = np.arange(ATLAS)
    near = pixel[:, None] // cell + around  # (ATLAS, 3) cells about each pixel
    dx, dy = np.moveaxis(points[near[:, None, :, None], near[None, :, None, :]], -1, 0)  # (ATLAS, ATLAS, 3, 3)
    dx, dy = np.abs(dx - pixel[:, None, None]), np.abs(dy - pixel[:, None, None, None])
    distance = (np.maximum(dx, dy) + 0.35 * (dx + dy)).reshape(ATLAS, ATLAS, -1)
    nearest, second = np.moveaxis(np.partition(distance, 1, axis=-1)[..., :2], -1, 0)
    row, column = np.divmod(distance.argmin(axis=-1), len(around))
    owner = np.take_along_axis(near[:, None], row[..., None], axis=-1) * len(grid)
    owner = owner + np.take_along_axis(near[None], column[..., None], axis=-1)
    shade = rng.uniform(-1, 1, len(grid) ** 2)[owner[..., 0]]
    stones = _tint(0.7 * shade + 0.4 * _noise(rng, 90, 90), (110, 112, 120), (182, 182, 186))
    return np.where((second - nearest < 2.6)[..., None], (52, 54, 60), stones)


def _snow(rng: np.random.Generator) -> np.ndarray:
    drifts = 0.5 * _noise(rng, 12, 12) + 0.3 * _noise(rng, 128, 128)
    return _tint(drifts + 0.4, (196, 206, 226), (250, 251, 255))


def _lava(rng: np.random.Generator) -> np.ndarray:
    crust = np.abs(_noise(rng, 16, 16) + 0.5 * _noise(rng, 40, 40))
    return _tint(3 * crust - 1.2, (250, 150, 30), (70, 18, 14))


def _night_sky(rng: np.random.Generator) -> np.ndarray:
    sky = _tint(_noise(rng, 6, 6), (12, 14, 40), (34, 36, 78))
    return np.where((_noise(rng, 128, 128) > 0.93)[..., None], (230, 230, 210), sky)


def _tile_floor(rng: np.random.Generator) -> np.ndarray:
    shade, joint = _bricks(rng, height=16, width=16, shift=0)
    tiles = _tint(0.5 * shade + 0.3 * _noise(rng, 60, 60), (150, 186, 176), (214, 236, 226))
    return np.where(joint[..., None], (84, 110, 104), tiles)


def _metal_wall(rng: np.random.Generator) -> np.ndarray:
    x = np.arange(ATLAS)[None, :]
    ridges = 0.8 * np.sin(2 * math.pi * x / 12) + 0.3 * _noise(rng, 10, 128)
    return _tint(ridges, (72, 80, 92), (186, 196, 206))


TEXTURES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "grass": _grass, "sky": _sky, "sand": _sand, "water": _water, "brick wall": _brick_wall,
    "wood floor": _wood_floor, "stone wall": _stone_wall, "snow": _snow, "lava": _lava, "night sky": _night_sky,
    "tile floor": _tile_floor, "metal wall": _metal_wall,
}  # fmt: skip
# The names of everything that can be drawn.
WORLD_NAMES = [*TEXTURES, *(f"{attribute} {shape}" for attribute in ATTRIBUTES for shape in OUTLINES)]


@cache
def _atlas(name: str) -> Image.Image:
    texture = TEXTURES[name](np.random.default_rng(list(name.encode())))
    return Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8))


def paint_stuff(rng: np.random.Generator, name: str) -> np.ndarray:
    """(128, 128, 3) float32 in [0, 255]: a piece of the texture, at a random place, scale, tilt and tint."""
    scale, angle = rng.uniform(0.6, 1.05), math.radians(rng.uniform(-8, 8))
    flip = rng.choice((-1, 1))
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    x, y = rng.uniform(80, ATLAS - 80, 2)  # the middle of the piece; its corners are inside the atlas
    middle = SIZE / 2
    to_atlas = (flip * a, -b, x - (flip * a - b) * middle, flip * b, a, y - (flip * b + a) * middle)
    piece = _atlas(name).transform((SIZE, SIZE), Image.Transform.AFFINE, to_atlas, Image.Resampling.BILINEAR)
    return np.asarray(piece, dtype=np.float32) * rng.uniform(0.9, 1.1, 3).astype(np.float32)


# ------------------------------------------------------------------------------------------------ things


class _Window(NamedTuple):
    """The part of the picture that a thing and its shadow can touch."""

    rows: slice
    columns: slice
    dx: np.ndarray  # (h, w) float32, each pixel's distance from the middle of the thing
    dy: np.ndarray  # (h, w) float32


def _window(radius: float, x: float, y: float) -> _Window:
    reach = 1.35 * radius + 5
    rows = slice(max(math.floor(y - reach), 0), min(math.ceil(y + reach), SIZE))
    columns = slice(max(math.floor(x - reach), 0), min(math.ceil(x + reach), SIZE))
    dy, dx = np.mgrid[rows, columns].astype(np.float32)
    return _Window(rows, columns, dx + np.float32(0.5 - x), dy + np.float32(0.5 - y))


def _outline_masks(rng: np.random.Generator, shape: str, radius: float, window: _Window) -> list[Image.Image]:
    """Coverage of the body and of its dark rim, two antialiased (h, w) pictures of mode L."""
    fine = 4  # drawn 4 times larger, then reduced
    angle = math.radians(rng.uniform(-12, 12))
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    stretch = rng.uniform(0.9, 1.1)
    height, width = window.dx.shape
    middle = 0.5 - np.array([window.dx[0, 0], window.dy[0, 0]])
    body, rim = (Image.new("L", (width * fine, height * fine)) for _ in range(2))
    for fill, outline in zip((255, 0), OUTLINES[shape], strict=False):
        points = ((outline * (stretch, 1 / stretch)) @ turn * radius + middle) * fine
        corners = [tuple(point) for point in points.tolist()]
        ImageDraw.Draw(body).polygon(corners, fill=fill)
        ImageDraw.Draw(rim).line([*corners, corners[0]], fill=255, width=round(2 * fine))
    return [body.reduce(fine), rim.reduce(fine)]


def _pattern(rng: np.random.Generator, attribute: str, radius: float, window: _Window) -> np.ndarray:
    """(h, w) bool: the dark part of a patterned thing."""
    period = rng.uniform(7, 9.5) * max(1.0, radius / 18)  # pixels; still visible on a small thing at stride 2
    angle = math.radians(rng.uniform(-12, 12))
    if attribute == "striped":
        angle += rng.integers(4) * math.pi / 4
    cosine, sine = np.float32(math.cos(angle) / period), np.float32(math.sin(angle) / period)
    u = window.dx * cosine + window.dy * sine + np.float32(rng.uniform())
    if attribute == "striped":
        return u % 1 < 0.5
    v = window.dy * cosine - window.dx * sine + np.float32(rng.uniform())
    if attribute == "checkered":
        return (1.5 * u) // 1 % 2 == (1.5 * v) // 1 % 2
    return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.31**2


def paint_thing(
    rng: np.random.Generator, image: np.ndarray, name: str, radius: float, x: float, y: float
) -> np.ndarray:
    """Draws a thing and its shadow into `image` (128, 128, 3) float32, in place.

    Returns the pixels of the thing, (128, 128) bool. radius: in pixels. (x, y): the middle of the thing.
    """
    attribute, shape = name.split()
    window = _window(radius, x, y)
    target = image[window.rows, window.columns]  # (h, w, 3), a view
    body, rim = _outline_masks(rng, shape, radius, window)
    moved = (1, 0, -1, 0, 1, -3)  # one pixel to the right, three down
    shadow = body.filter(ImageFilter.BoxBlur(2)).transform(body.size, Image.Transform.AFFINE, moved)
    target *= 1 - (0.35 / 255) * np.asarray(shadow, dtype=np.float32)[..., None]
    light, direction = rng.uniform(0, 0.22) / radius, rng.uniform(0, 2 * math.pi)
    across, down = np.float32(light * math.cos(direction)), np.float32(light * math.sin(direction))
    shade = 1 + window.dx * across + window.dy * down
    if attribute in COLOURS:
        paint = (np.array(COLOURS[attribute]) + rng.uniform(-16, 16, 3)).astype(np.float32)
    else:
        dark, pale = rng.uniform(15, 60, 3), rng.uniform(205, 250, 3)
        paint = np.where(_pattern(rng, attribute, radius, window)[..., None], dark, pale).astype(np.float32)
    coverage = np.asarray(body, dtype=np.float32)[..., None] / 255
    edge = np.asarray(rim, dtype=np.float32)[..., None] / 255
    target += coverage * (paint * shade[..., None] * (1 - 0.5 * edge) - target)
    shown = np.zeros((SIZE, SIZE), dtype=bool)
    shown[window.rows, window.columns] = coverage[..., 0] > 0.5
    return shown


# ------------------------------------------------------------------------------------------------ scenes


def box_of(shown: np.ndarray) -> tuple[int, int, int, int]:
    """The tight box of a mask (H, W) bool that is not empty: x0, y0, x1, y1, the last two exclusive."""
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def stuff_index(rng: np.random.Generator, num_bands: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The band of each pixel, (128, 128) int, and the rows y0 to y1 of each band."""
    x = np.arange(SIZE)
    index = np.zeros((SIZE, SIZE), dtype=int)
    rows = [(0, SIZE)]
    for band in range(1, num_bands):
        level = SIZE * (band / num_bands + rng.uniform(-0.11, 0.11))
        slope = rng.uniform(-0.15, 0.15)
        wave = rng.uniform(0, 7) * np.sin(2 * math.pi * x / rng.uniform(30, 120) + rng.uniform(0, 2 * math.pi))
        border = level + slope * (x - SIZE / 2) + wave
        index += np.arange(SIZE)[:, None] >= border
        rows[-1] = (rows[-1][0], math.ceil(border.max()))
        rows.append((math.floor(border.min()), SIZE))
    return index, rows


def _hidden_share(box: tuple[float, ...], front: tuple[float, ...]) -> float:
    """The share of `box` that `front` covers, in [0, 1]."""
    width = min(box[2], front[2]) - max(box[0], front[0])
    height = min(box[3], front[3]) - max(box[1], front[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def _free_place(rng: np.random.Generator, boxes: list[tuple[float, ...]]) -> tuple[float, float, float]:
    """Radius and middle of a new thing. It hides at most 35 % of the box of each earlier thing."""
    radius = 12 * (28 / 12) ** rng.uniform()
    while True:
        x, y = rng.uniform(0.5 * radius, SIZE - 0.5 * radius, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        if max((_hidden_share(earlier, box) for earlier in boxes), default=0) <= 0.35:
            return radius, x, y
        radius = max(0.95 * radius, 10)


def light(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The image with random light colour, direction and brightness, and sensor noise; float in, uint8 out."""
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    slope, direction = rng.uniform(0, 0.18), rng.uniform(0, 2 * math.pi)
    across, down = np.float32(slope * math.cos(direction)), np.float32(slope * math.sin(direction))
    gain = np.float32(rng.uniform(0.75, 1.1)) + across * ramp + down * ramp[:, None]
    warmth = rng.uniform(-0.06, 0.06)
    noise = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32) * np.float32(rng.uniform(2, 6))
    image = image * gain[..., None] * np.array((1 + warmth, 1, 1 - warmth), dtype=np.float32) + noise
    return np.clip(image, 0, 255).astype(np.uint8)


def compose(rng: np.random.Generator, stuff: list[str], things: list[str]) -> Scene:
    """Draws the bands of `stuff` from top to bottom, then `things` from back to front. Names are in WORLD_NAMES."""
    band, rows = stuff_index(rng, len(stuff))
    image = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    for number, name in enumerate(stuff):
        np.copyto(image, paint_stuff(rng, name), where=(band == number)[..., None])
    regions = [Region(name, (0, y0, SIZE, y1)) for name, (y0, y1) in zip(stuff, rows, strict=True)]
    owner = band  # (128, 128) index of the region of each pixel
    boxes: list[tuple[float, ...]] = []
    for name in things:
        radius, x, y = _free_place(rng, boxes)
        boxes.append((x - radius, y - radius, x + radius, y + radius))
        shown = paint_thing(rng, image, name, radius, x, y)
        owner = np.where(shown, len(regions), owner)
        regions.append(Region(name, box_of(shown)))
    ids = [CLASS_NAMES.index(name) if name in CLASS_NAMES else IGNORE_INDEX for name, _ in regions]
    return Scene(light(rng, image), np.array(ids, dtype=np.uint8)[owner], regions, owner)


def render_scene(seed: int, index: int) -> Scene:
    """Picture number `index` (>= 0) of `seed` (>= 0): the same in every call."""
    rng = np.random.default_rng((seed, index))
    theme = THEMES[rng.integers(len(THEMES))]
    stuff = list(theme.bands[rng.integers(len(theme.bands))])
    if rng.uniform() < DISTRACTOR_BAND:
        stuff[rng.integers(len(stuff))] = str(rng.choice(DISTRACTOR_STUFF))
    count = rng.integers(3, 7)
    things = [str(rng.choice(theme.things if rng.uniform() < THEME_SHARE else THINGS)) for _ in range(count)]
    for _ in range(rng.choice(len(DISTRACTOR_COUNTS), p=DISTRACTOR_COUNTS)):
        things.insert(rng.integers(len(things) + 1), str(rng.choice(DISTRACTOR_THINGS)))
    return compose(rng, stuff, things)


# ------------------------------------------------------------------------------------------------ the folder


class SceneFile(NamedTuple):
    """A picture of a dataset: its split, its number there, and the scene."""

    split: str
    number: int
    seed: int
    index: int


def write_scene(folder: Path, file: SceneFile) -> None:
    scene = render_scene(file.seed, file.index)
    Image.fromarray(scene.image).save(folder / file.split / "images" / f"{file.number:05d}.png")
    # 8 bits with the ignored id 255, as save_map writes it
    Image.fromarray(scene.label).save(folder / file.split / "labels" / f"{file.number:05d}.png")
