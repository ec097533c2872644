"""Augmentation: a picture and its label map are scaled, cropped and mirrored together, by Mask2Former's recipe.

Axes: H W pixels of the stored map, h w of the crop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from processing_zs3 import nearest_pixels
from zs3.command_line import Pixels, PositiveShare, Some, checked

IGNORED = -1  # an ignored pixel in the label maps of training


@dataclass(frozen=True)
class Augmentation:
    """Mask2Former's recipe for semantic segmentation. Lengths in pixels.

    short_edges: each sample draws one. None: 0.5 to 2.0 times crop_size, in steps of a tenth.
    single_class_max_area: at most ten crops are tried; with 1 the first crop is taken.
    """

    crop_size: int  # side of the square crop, and of the sample
    max_size: int  # upper bound of the longer edge
    short_edges: Sequence[int] | None = None  # lengths of the shorter edge after scaling
    flip: bool = True  # mirror half of the samples, left and right
    color_jitter: bool = True  # SSD's changes of brightness, contrast, saturation and hue, each for half of the samples
    single_class_max_area: float = 1.0  # largest share of a crop's labelled pixels that one class should have, (0, 1]

    def __post_init__(self) -> None:
        for name, kind in {"crop_size": Pixels, "max_size": Pixels, "single_class_max_area": PositiveShare}.items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))
        edges = checked("short_edges", self.short_edges, Some[Pixels] | None)
        edges = edges or [max(1, self.crop_size * tenth // 10) for tenth in range(5, 21)]
        object.__setattr__(self, "short_edges", tuple(edges))

    def draw_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The width and height to which a picture of this size is scaled. Their ratio stays."""
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
    """An RGB crop and its (h, w) map: scaled, cropped, jittered, mirrored. A side is crop_size at most.

    image: RGB. It has the map's size, or a reduced one that is no smaller than `size`.
    label: (H, W) integers.
    size: from `Augmentation.draw_size`.
    relabel: applied to each crop of the map before anything else reads it. So a class that it removes has no influence
        on the choice of the crop. It gives integers, and IGNORED for ignored pixels.
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
    image = image.resize((w, h), Image.Resampling.BILINEAR, box=box)  # resizes only the crop, which is cheaper
    if augmentation.color_jitter:
        image = _jittered(image, rng)
    if augmentation.flip and rng.random() < 0.5:
        image, cropped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), cropped[:, ::-1]
    return image, cropped


def _is_mixed(label: np.ndarray, max_area: float) -> bool:
    counts = np.unique(label[label != IGNORED], return_counts=True)[1]
    return len(counts) > 1 and counts.max() < max_area * counts.sum()


def _jittered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's photometric distortion. Contrast comes before or after saturation and hue, each in half of the samples."""
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
        if hue:  # 36 degrees, which are 18 units of OpenCV; a turn is 256 here
            shift = round(rng.uniform(-36, 36) * 256 / 360)
            hues = hues.point([(value + shift) % 256 for value in range(256)])
        image = Image.merge("HSV", (hues, saturations, values)).convert("RGB")
    if contrast and not contrast_first:
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    return image


def _linear(image: Image.Image, factor: float, offset: float) -> Image.Image:
    """Each value v in [0, 255] becomes factor * v + offset, clipped to this range."""
    table = (np.arange(256) * factor + offset).clip(0, 255).round().astype(int)
    return image.point(table.tolist() * 3)
