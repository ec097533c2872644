"""Pictures of label maps: panels side by side, with a legend of the classes that occur."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from drawing_zs3 import (
    BACKGROUND,
    INK,
    LONGER_SIDE,
    PREFERRED,
    Entry,
    colours_of,
    enlarged,
    enlargement,
    fitted,
    font_for,
    legend,
    line_height,
    outline,
    paint,
)
from files_zs3 import open_image
from zs3.files import writing

MARGIN = 8


def draw_comparison(
    panels: Mapping[str, Image.Image | np.ndarray | Tensor], class_names: Sequence[str], path: Path
) -> None:
    """Writes a PNG of panels side by side, each under its title.

    panels: an RGB image, or a label map (H, W) of indices into class_names; any other number is drawn as grey stripes.
    The legend lists the classes that occur in any of the maps.
    """
    panels = {name: panel if isinstance(panel, Image.Image) else np.asarray(panel) for name, panel in panels.items()}
    occurring = {index for panel in panels.values() if isinstance(panel, np.ndarray) for index in np.unique(panel)}
    present = [index for index in range(len(class_names)) if index in occurring]
    # A class of a short list has one colour in all pictures; a long list would run out of colours that differ clearly.
    coloured = range(len(class_names)) if len(class_names) <= PREFERRED else present
    colours = np.zeros((len(class_names), 3), dtype=np.uint8)
    colours[list(coloured)] = colours_of([class_names[index] for index in coloured])

    images = [_panel(panel, colours) for panel in panels.values()]
    width = max(LONGER_SIDE, sum(image.width for image in images) + MARGIN * (len(images) + 1))
    below = legend([Entry(class_names[index], colours[index]) for index in present], width)
    font = font_for(width)
    top = line_height(font) + MARGIN
    bottom = top + max(image.height for image in images)
    canvas = Image.new("RGB", (width, bottom + below.height), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    x = MARGIN
    for title, image in zip(panels, images, strict=True):
        pen.text((x, top // 2), fitted(title, font, image.width), fill=INK, font=font, anchor="lm")
        canvas.paste(image, (x, top))
        x += image.width + MARGIN
    canvas.paste(below, (0, bottom))
    save_picture(canvas, path)


def _panel(panel: Image.Image | np.ndarray, colours: np.ndarray) -> Image.Image:
    if isinstance(panel, Image.Image):
        return ImageOps.scale(panel, enlargement(panel.size), Image.Resampling.BILINEAR)
    label_map = enlarged(panel, enlargement(panel.shape))
    return outline(paint(label_map, colours), label_map)


def stack(paths: Sequence[Path], path: Path) -> None:
    """Writes one PNG with several, one below the other."""
    pictures = [open_image(source) for source in paths]
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), BACKGROUND)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    save_picture(canvas, path)


def save_picture(canvas: Image.Image, path: Path) -> None:
    """Writes a PNG."""
    with writing(path) as partial:
        canvas.save(partial, format="PNG", optimize=True)
