"""Augmentation by the ancestors' recipe: a picture and its label map scaled, cropped, jittered and mirrored together.

Axes: H W pixels of the stored map, h w of the crop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from processing_zs3 import nearest_pixels
from zs3.command_line import Pixels, PositiveShare, Some, checked

IGNORED = -1  # in a map: no label here


@dataclass(frozen=True)
class Augmentation:
    """Mask2Former's recipe for semantic segmentation. Lengths in pixels.

    crop_size: side of the square crop, and of the sample.
    short_edges: lengths of the image's shorter edge, one drawn for each sample; None stands for 0.5 to 2.0
        times crop_size in steps of a tenth.
    max_size: upper bound of the longer edge.
    flip: mirror left and right, half of the time.
    color_jitter: SSD's changes of brightness, contrast, saturation and hue, each half of the time.
    single_class_max_area: largest share of the labelled pixels of a crop that one class should have, in (0, 1];
        ten draws are tried. 1 takes the first.
    """

    crop_size: int
    max_size: int
    short_edges: Sequence[int] | None = None
    flip: bool = True
    color_jitter: bool = True
    single_class_max_area: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in {"crop_size": Pixels, "max_size": Pixels, "single_class_max_area": PositiveShare}.items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))
        edges = checked("short_edges", self.short_edges, Some[Pixels] | None)
        edges = edges or [max(1, self.crop_size * tenth // 10) for tenth in range(5, 21)]
        object.__setattr__(self, "short_edges", tuple(edges))

    def draw_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """Width and height to which a picture of `size` is scaled before the crop; its shape is kept."""
        scale = min(rng.choice(self.short_edges) / min(size), self.max_size / max(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def augment(
    image: Image.Image,
    label: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    augmentation: Augmentation,
    relabel: Callable[[np.ndarray], np.ndarray],
) -> tuple[Image.Image, np.ndarray]:
    """Scaled, cropped, jittered, mirrored: an RGB picture and its (h, w) map, both at most crop_size a side.

    image: RGB, of the map's size, or decoded at a reduced one that is no less than `size`.
    label: (H, W) integers.
    size: from `Augmentation.draw_size`.
    relabel: of every crop of the map, before anything looks at it: integers of any range, IGNORED where there is no
        label. What it takes out of a map cannot be seen in the choice of the crop.
    """
    width, height = size
    rows = nearest_pixels(height, label.shape[0])
    columns = nearest_pixels(width, label.shape[1])
    for _ in range(10):
        w, h = min(width, augmentation.crop_size), min(height, augmentation.crop_size)
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        cropped = relabel(label[rows[y : y + h, None], columns[None, x : x + w]])
        if augmentation.single_class_max_area == 1 or _is_mixed(cropped, augmentation.single_class_max_area):
            break
    scale_x, scale_y = image.width / width, image.height / height
    box = (x * scale_x, y * scale_y, min((x + w) * scale_x, image.width), min((y + h) * scale_y, image.height))
    image = image.resize((w, h), Image.Resampling.BILINEAR, box=box)  # the crop of the resized picture
    if augmentation.color_jitter:
        image = _jittered(image, rng)
    if augmentation.flip and rng.random() < 0.5:
        image, cropped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), cropped[:, ::-1]
    return image, cropped


def _is_mixed(label: np.ndarray, max_area: float) -> bool:
    counts = np.unique(label[label != IGNORED], return_counts=True)[1]
    return len(counts) > 1 and counts.max() < max_area * counts.sum()


def _jittered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's photometric distortion; contrast stands before or after saturation and hue, half of the time each."""
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    if brightness:
        image = _linear(image, 1, rng.uniform(-32, 32))
    if contrast and contrast_first:
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    if saturation or hue:
        hues, saturations, values = image.convert("HSV").split()
        if saturation:
            factor = rng.uniform(0.5, 1.5)
            saturations = saturations.point([min(int(value * factor), 255) for value in range(256)])
        if hue:  # 18 of OpenCV's units of 2 degrees; here a turn is 256
            shift = round(rng.uniform(-36, 36) * 256 / 360)
            hues = hues.point([(value + shift) % 256 for value in range(256)])
        image = Image.merge("HSV", (hues, saturations, values)).convert("RGB")
    if contrast and not contrast_first:
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    return image


def _linear(image: Image.Image, factor: float, offset: float) -> Image.Image:
    """Every channel's value v in [0, 255] becomes factor * v + offset, cut back to that range."""
    table = (np.arange(256) * factor + offset).clip(0, 255).round().astype(int)
    return image.point(table.tolist() * 3)
