"""Pictures of label maps: panels side by side, with a legend of the classes that occur."""

import colorsys
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

IGNORED_COLOUR = (90, 90, 90)
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)
PANEL_HEIGHT = 320  # pixels, at least; larger images keep their size
MARGIN, LINE = 8, 22


def class_colours(num_classes: int) -> np.ndarray:
    """(C, 3) uint8: colours of all classes, neighbours far apart (golden angle in hue, three brightnesses)."""
    colours = [
        colorsys.hsv_to_rgb(index * 0.618034 % 1, (0.85, 0.55, 0.95)[index % 3], (0.95, 0.85, 0.6)[index // 2 % 3])
        for index in range(num_classes)
    ]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def colourise(label_map: np.ndarray, num_classes: int) -> Image.Image:
    """(H, W) indices, anything outside 0 to C - 1 grey."""
    colours = np.vstack([class_colours(num_classes), np.array([IGNORED_COLOUR], dtype=np.uint8)])
    inside = (label_map >= 0) & (label_map < num_classes)
    return Image.fromarray(colours[np.where(inside, label_map, num_classes)])


def draw_comparison(
    panels: Mapping[str, Image.Image | np.ndarray | Tensor], class_names: Sequence[str], path: Path
) -> None:
    """Write a PNG of panels side by side, each under its title.

    panels: an RGB image, or a label map (H, W) of indices into class_names (grey where outside).
    The legend lists the classes that occur in any of the maps.
    """
    images, present = [], set()
    for panel in panels.values():
        if not isinstance(panel, Image.Image):
            label_map = np.asarray(panel)
            present.update(np.unique(label_map).tolist())
            panel = colourise(label_map, len(class_names))
        scale = max(1, round(PANEL_HEIGHT / panel.height))
        images.append(panel.resize((panel.width * scale, panel.height * scale), Image.Resampling.NEAREST))

    legend = [(class_names[index], index) for index in sorted(present) if 0 <= index < len(class_names)]
    column = 180
    width = sum(image.width for image in images) + MARGIN * (len(images) + 1)
    per_row = max(1, (width - MARGIN) // column)
    height = max(image.height for image in images) + LINE * (2 + -(-len(legend) // per_row)) + 2 * MARGIN
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    x = MARGIN
    for title, image in zip(panels, images, strict=True):
        draw.text((x, MARGIN), title, fill=INK, font=font)
        canvas.paste(image, (x, MARGIN + LINE))
        x += image.width + MARGIN
    top = max(image.height for image in images) + LINE + 2 * MARGIN
    colours = class_colours(len(class_names))
    for place, (name, index) in enumerate(legend):
        x, y = MARGIN + column * (place % per_row), top + LINE * (place // per_row)
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=tuple(colours[index].tolist()), outline=INK)
        draw.text((x + 20, y), name, fill=INK, font=font)

    _save(canvas, path)


def stack(paths: Sequence[Path], path: Path) -> None:
    """One PNG of several, one below the other."""
    pictures = [Image.open(source) for source in paths]
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), BACKGROUND)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    _save(canvas, path)


def _save(canvas: Image.Image, path: Path) -> None:
    """Written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    canvas.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
