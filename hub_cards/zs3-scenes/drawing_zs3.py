"""Pictures of results: `draw(image, result)`, the colours of class names, painted label maps, legends.

A colour belongs to a name: `colour_of` gives every name one of 20 colours, whatever list it stands in. Where two names
of one picture have the same colour, `colours_of` gives one of them a free colour.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

try:
    from .configuration_zs3 import as_number, plain
    from .files_zs3 import load_picture
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import as_number, plain
    from files_zs3 import load_picture

# The first n differ by at least .10 (n = 8), .088 (20), .053 (32), .038 (64) in OKLab, where .02 is just visible. It is
# the least of normal vision, protanopia, deuteranopia and tritanopia, simulated as in Machado et al. 2009. NOTHING is
# as far from all of them. The first 20 were found by repulsion. Each later one is as far as possible from those before.
_COLOURS = """
75fc51 2409ab 6c1b00 fc99f3 c68700 3f7500 6c63fc bdbd00 5a4875 fc51c6 90cfab fccffc 9951a2 2db475 5a0975 ab87fc
990048 512dd8 e11236 c6f3b4 bd48cf a24863 48e175 753f00 7e90bd 7e36ab cf99a2 005148 ea875a 099051 a20090 b4d800
abe1cf d85163 d863a2 63c6c6 753fea 483663 fcb4f3 6c7ef3 b44809 d8d8a2 a2bd7e 636cbd 9099e1 c61b90 480990 63362d
7e5a7e 6309bd a2fc87 36a27e fcbd6c 6cab48 c66c12 636c3f 5a51c6 e190fc 6c247e 90b400 90fce1 fc6ce1 873f2d 7e6cd8
"""
PALETTE = np.frombuffer(bytes.fromhex(_COLOURS), dtype=np.uint8).reshape(-1, 3)
PREFERRED = 20  # a name's own colour is one of the first 20
NOTHING, STRIPE = (128, 128, 128), (176, 176, 176)  # where no name applies: grey with lighter stripes
NONE_OF_THESE = "none of these"
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
LONGER_SIDE = 320  # pixels: smaller pictures are enlarged to about this side


def colour_of(name: str) -> tuple[int, int, int]:
    """A name's own colour, the same in every picture and every spelling."""
    return tuple(PALETTE[_place(name)].tolist())


def colours_of(names: Sequence[str]) -> np.ndarray:
    """(C, 3) uint8: the colours of names in one picture, all different for up to 64 names.

    Of names with the same own colour, the first in the alphabet keeps it. Each of the others gets the next colour that
    no name has. The order of `names` does not matter, and a further name with a free own colour changes no other.
    Once all 64 are taken, the remaining names keep their own colours, which others have, too.
    """
    places = {name: _place(name) for name in sorted(set(names), key=lambda name: (plain(name), name))}
    moved, taken = [], set()
    for name, place in places.items():
        if place in taken:
            moved.append(name)
        taken.add(place)
    for name in moved:
        turn = [(places[name] + step) % PREFERRED for step in range(PREFERRED)]
        free = (place for place in (*turn, *range(PREFERRED, len(PALETTE))) if place not in taken)
        places[name] = next(free, places[name])
        taken.add(places[name])
    return PALETTE[[places[name] for name in names]].reshape(-1, 3)


def _place(name: str) -> int:
    digest = hashlib.sha256(plain(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") % PREFERRED


def draw(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    result: list[dict] | dict,
    *,
    opacity: float = 0.55,
    confidence: bool = False,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """The image under the colours of its labels, with a legend: name, share of the picture, mean score.

    image: as for `load_picture` of files_zs3. result: Zs3Pipeline's result for it, in either form.
    confidence: the lower the score of a pixel (or of its region), the less colour.
    class_names: the names that get colours; by default those in this picture. With the whole label list, a name has the
    same colour in every picture.
    """
    opacity = as_number("opacity", opacity, 0, 1)
    picture = load_picture(image)
    regions = _read_result(result, picture.size)
    if confidence and regions.scores is None:
        raise ValueError("confidence=True needs a result with scores")
    colours = _colours_among(regions.names, class_names)

    factor = enlargement(picture.size)
    label_map = enlarged(regions.label_map, factor)
    weight = np.full(label_map.shape, 255.0 * opacity)
    if confidence:
        weight *= enlarged(np.where(regions.label_map < 0, 1, np.clip(regions.scores, 0, 1)), factor)
    weight = Image.fromarray(weight.round().astype(np.uint8))
    picture = ImageOps.scale(picture, factor, Image.Resampling.BILINEAR)
    picture = outline(Image.composite(paint(label_map, colours), picture, weight), label_map)

    headings = ("share",) if regions.scores is None else ("share", "score")
    below = legend(_entries(regions, colours), max(picture.width, LONGER_SIDE), headings)
    canvas = Image.new("RGB", (below.width, picture.height + below.height), BACKGROUND)
    canvas.paste(picture, (0, 0))
    canvas.paste(below, (0, picture.height))
    return canvas


class Regions(NamedTuple):
    """A result in one form, with only the names that occur."""

    label_map: np.ndarray  # (H, W) int64, indices into names, -1 where none of them applies
    names: list[str]
    scores: np.ndarray | None  # (H, W)


def _read_result(result: list[dict] | dict, size: tuple[int, int]) -> Regions:
    """A result, in either form, for an image of this size (width, height)."""
    shape = size[::-1]
    if isinstance(result, dict) and {"segmentation", "labels"} <= result.keys():
        names, label_map, scores = list(result["labels"]), _of_shape(result["segmentation"], shape), None
        if result.get("scores") is not None:
            scores = _of_shape(result["scores"], shape)
    elif isinstance(result, list) and all(isinstance(region, dict) and "mask" in region for region in result):
        names, label_map, scores = _read_regions(result, shape)
    else:
        raise ValueError(
            "a result is a list of {'label', 'score', 'mask'}, or a dict with 'segmentation' and 'labels', of one image"
        )
    inside = (label_map >= 0) & (label_map < len(names))
    present = np.unique(label_map[inside])
    place = np.zeros(len(names), dtype=np.int64)
    place[present] = np.arange(len(present))
    placed = np.full(shape, -1)
    placed[inside] = place[label_map[inside]]
    return Regions(placed, [names[index] for index in present], scores)


def _read_regions(result: list[dict], shape: tuple[int, int]) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    named = [region for region in result if region.get("label_id") != -1]
    names = list(dict.fromkeys(region["label"] for region in named))
    label_map, scores = np.full(shape, -1), np.zeros(shape)
    has_scores = all(region.get("score") is not None for region in named)
    for region in named:
        inside = _of_shape(region["mask"], shape) > 0
        label_map[inside] = names.index(region["label"])
        if has_scores:
            scores[inside] = region["score"]
    return names, label_map, scores if has_scores else None


def _of_shape(array: np.ndarray | Image.Image, shape: tuple[int, int]) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != shape:
        got = " x ".join(str(side) for side in array.shape[::-1])
        raise ValueError(
            f"the image has {shape[1]} x {shape[0]} pixels, the result {got}: draw the image that the result is of"
        )
    return array


def _colours_among(names: list[str], class_names: Sequence[str] | None) -> np.ndarray:
    """(C, 3): the colours of `names` in a picture that could show all class_names."""
    everyone = names if class_names is None else class_names
    colour = dict(zip(everyone, colours_of(everyone), strict=True))
    if missing := [name for name in names if name not in colour]:
        raise ValueError(f"{missing[0]!r} is in the result and not in class_names")
    return np.array([colour[name] for name in names], dtype=np.uint8).reshape(-1, 3)


class Entry(NamedTuple):
    """A row of a legend."""

    name: str
    colour: np.ndarray | None  # (3,); None: the stripes of no label
    figures: tuple[str, ...] = ()


def _entries(regions: Regions, colours: np.ndarray) -> list[Entry]:
    """The largest region first; last the pixels without a name, which have no score."""
    places = regions.label_map.ravel() + 1  # 0: no name
    counts = np.bincount(places, minlength=len(colours) + 1)
    figures = [(f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %",) for share in counts / places.size]
    if regions.scores is not None:
        means = np.bincount(places, weights=regions.scores.ravel(), minlength=len(counts)) / counts.clip(min=1)
        scores = ["", *(f"{min(1, mean):.2f}" for mean in means[1:])]
        figures = [(*row, score) for row, score in zip(figures, scores, strict=True)]
    order = np.argsort(-counts[1:], kind="stable")
    entries = [Entry(regions.names[place], colours[place], figures[place + 1]) for place in order]
    return [*entries, Entry(NONE_OF_THESE, None, figures[0])] if counts[0] else entries


def enlargement(size: tuple[int, int]) -> int:
    """The whole factor that brings a small picture's longer side near LONGER_SIDE."""
    return max(1, round(LONGER_SIDE / max(size)))


def enlarged(array: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) -> (factor H, factor W): every value becomes a square."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def paint(label_map: np.ndarray, colours: np.ndarray) -> Image.Image:
    """(H, W) indices in colours (C, 3); grey stripes where an index is outside 0 to C - 1."""
    height, width = label_map.shape
    stripes = np.add.outer(np.arange(height), np.arange(width)) // max(3, max(height, width) // 100) % 2
    inside = (label_map >= 0) & (label_map < len(colours))
    palette = np.vstack([colours, np.array([NOTHING, STRIPE], dtype=np.uint8)])
    return Image.fromarray(palette[np.where(inside, label_map, len(colours) + stripes)])


def outline(picture: Image.Image, label_map: np.ndarray) -> Image.Image:
    """The picture with lines between regions: dark on one side, light on the other, visible on every colour."""
    thickness = max(1, round(max(label_map.shape) / 1000))
    light, dark = np.zeros(label_map.shape, dtype=bool), np.zeros(label_map.shape, dtype=bool)
    for labels, lights, darks in ((label_map, light, dark), (label_map.T, light.T, dark.T)):
        differs = labels[thickness:] != labels[:-thickness]
        lights[thickness:] |= differs
        darks[:-thickness] |= differs
    pixels = np.array(picture)
    pixels[light] = BACKGROUND
    pixels[dark] = INK
    return Image.fromarray(pixels)


def font_for(width: int) -> ImageFont.FreeTypeFont:
    """Letters that can be read on a picture of this width."""
    return ImageFont.load_default(size=12 + width // 160)


def line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(1.5 * font.size)


def fitted(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """One line of at most `room` pixels; a longer text ends in an ellipsis. Accents go: the font has none."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    text = " ".join("".join(letters).split())[:1000]
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def legend(entries: Sequence[Entry], width: int, headings: tuple[str, ...] = ()) -> Image.Image:
    """For each entry a box of its colour, its name and its figures, in as many columns as fit.

    headings: the names of the figures, as many as each entry has.
    """
    font = font_for(width)
    em, line = int(font.size), line_height(font)
    texts = zip(headings, *(entry.figures for entry in entries), strict=True) if headings else ()
    widths = [round(max(font.getlength(text) for text in column)) + em for column in texts]
    around = 2 * em + sum(widths) + em  # box, figures, and the gap to the next column
    names = [fitted(entry.name, font, min(22 * em, width - em - around)) for entry in entries]
    column = around + round(max((font.getlength(name) for name in names), default=0))
    rows = -(-len(entries) // max(1, (width - em) // column))

    picture = Image.new("RGB", (width, 2 * em + line * (rows + bool(headings))), BACKGROUND)
    pen = ImageDraw.Draw(picture)

    def write_figures(figures: tuple[str, ...], x: int, y: int, ink: tuple[int, int, int]) -> None:
        for place, text in enumerate(figures):
            right = x + column - em - sum(widths[place + 1 :])
            pen.text((right, y), text, fill=ink, font=font, anchor="rm")

    for place, (entry, name) in enumerate(zip(entries, names, strict=True)):
        x, y = em + column * (place // rows), em + line // 2 + line * (place % rows + bool(headings))
        if place % rows == 0:
            write_figures(headings, x, y - line, FAINT)
        pen.rectangle((x - 1, y - em // 2 - 1, x + em, y - em // 2 + em), fill=INK)
        colours = np.empty((0, 3), dtype=np.uint8) if entry.colour is None else entry.colour[None]
        picture.paste(paint(np.zeros((em, em), dtype=np.int64), colours), (x, y - em // 2))
        pen.text((x + round(1.5 * em), y), name, fill=INK, font=font, anchor="lm")
        write_figures(entry.figures, x, y, INK)
    return picture


__all__ = ["colour_of", "colours_of", "draw"]
