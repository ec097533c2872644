"""From images and label lists to tensors, and from proposals to label maps.

Zs3ImageProcessor: image (and label map) -> pixel_values, pixel_mask, labels. PIL and NumPy only.
Zs3Processor: the same, and class names -> input_ids of T prompts a class.
"""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, cached_file

try:
    from .clip_views_zs3 import to_rgb
    from .configuration_zs3 import SIZE_DIVISOR, Refused, is_number, shortened
    from .encoders_zs3 import FAMILIES, PROMPT_TEMPLATES
    from .files_zs3 import is_deep, load_picture, read_text
    from .label_maps_zs3 import MASK_STRIDE, SemanticMap, semantic_map
    from .outputs_zs3 import Zs3Output, final_probabilities
    from .text_zs3 import ClassName, Label, read_labels, seen_labels
except ImportError:
    if __package__:
        raise
    from clip_views_zs3 import to_rgb
    from configuration_zs3 import SIZE_DIVISOR, Refused, is_number, shortened
    from encoders_zs3 import FAMILIES, PROMPT_TEMPLATES
    from files_zs3 import is_deep, load_picture, read_text
    from label_maps_zs3 import MASK_STRIDE, SemanticMap, semantic_map
    from outputs_zs3 import Zs3Output, final_probabilities
    from text_zs3 import ClassName, Label, read_labels, seen_labels


LABELS_AT_ONCE = 256  # when tokens are counted
TOKENIZING = threading.RLock()
TEXT_OPTIONS = {  # None or one of these
    "padding": (True, "longest", "max_length"),
    "truncation": (True, "longest_first"),
    "return_tensors": ("pt", "np"),
}


SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


class Zs3ImageProcessorKwargs(ImagesKwargs, total=False):
    """size_divisor: images are padded to a multiple of it. ignore_index: the id of ignored pixels in label maps."""

    size_divisor: int | None
    ignore_index: int | None


def is_size(value: object, keys: Sequence[set[str]] = SIZE_KEYS) -> bool:
    """Whether a value is an edge, (height, width), or a dict with one of these sets of keys, in whole pixels."""
    if isinstance(value, dict):
        sides, known = list(value.values()), set(value) in keys
    else:
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        known = len(sides) == 2
    return known and all(is_number(side, whole=True) and side > 0 for side in sides)


def is_per_channel(value: object, positive: bool = False) -> bool:
    """Whether a value is a number, or a list of one a channel."""
    numbers = value if isinstance(value, list | tuple) else [value]
    return len(numbers) > 0 and all(is_number(number) and (number > 0 or not positive) for number in numbers)


SWITCHES = ("do_resize", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb", "default_to_square")

# For each option a test of its value, where it is not None, and words for the message.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys((*SWITCHES, "disable_grouping"), (lambda value: isinstance(value, bool), "True or False")),
    "do_center_crop": (lambda value: value is False, "False: cut the images and their label maps first"),
    "size": (is_size, "whole pixels: an edge, (height, width), {shortest_edge, longest_edge} or {height, width}"),
    "pad_size": (
        lambda value: is_size(value, [{"height", "width"}]),
        "whole pixels: an edge, (height, width) or {height, width}",
    ),
    "size_divisor": (lambda value: is_number(value, whole=True) and value >= 0, "a whole number, 0 or more"),
    "resample": (lambda value: is_number(value, whole=True) and value in list(PILImageResampling), "a PIL resampling"),
    "rescale_factor": (lambda value: is_number(value) and value != 0, "a number other than 0"),
    "image_mean": (is_per_channel, "a number, or one a channel"),
    "image_std": (lambda value: is_per_channel(value, positive=True), "a number above 0, or one a channel"),
    **dict.fromkeys(
        ("ignore_index", "image_seq_length"), (lambda value: is_number(value, whole=True), "a whole number")
    ),
    **dict.fromkeys(
        ("data_format", "input_data_format"),
        (lambda value: value in list(ChannelDimension), "'channels_first' or 'channels_last'"),
    ),
    "return_tensors": (lambda value: value in list(TensorType), "'pt' or 'np'"),
    "device": (lambda value: isinstance(value, str | torch.device), "a device"),
}


def as_python(value: Any) -> Any:
    """A value whose numbers and arrays of NumPy and torch are made Python's."""
    if isinstance(value, dict | SizeDict):
        return {name: as_python(entry) for name, entry in dict(value).items()}
    if isinstance(value, list | tuple):
        return [as_python(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Tensor) else value


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of an image processor as Python's values. Raises Refused."""
    options = {name: as_python(value) for name, value in options.items()}
    for name, (fits, words) in OPTIONS.items():
        if options.get(name) is not None and not fits(options[name]):
            raise Refused(f"{name} must be {words}, got {shortened(options[name])}")
    for name in ("rescale_factor", "image_mean", "image_std"):  # transformers refuses whole numbers here
        value = options.get(name)
        if value is not None:
            options[name] = list(map(float, value)) if isinstance(value, list) else float(value)
    return options


def kind(value: object) -> str:
    """An input's type, for a message, with the shape of an array."""
    if isinstance(value, list | tuple):
        return f"a list of {' and '.join(dict.fromkeys(map(kind, value))) or 'nothing'}"
    return f"{type(value).__name__}{f' {tuple(value.shape)}' if isinstance(value, np.ndarray | Tensor) else ''}"


class Zs3ImageProcessor(PilBackend):
    """Resize (short edge, bilinear), rescale, normalise and pad images; resize label maps by nearest neighbour."""

    valid_kwargs = Zs3ImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 640, "longest_edge": 2560}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    do_convert_rgb = True
    size_divisor = SIZE_DIVISOR
    ignore_index = 255

    def __init__(self, **kwargs):
        super().__init__(**checked_options(kwargs))

    def preprocess(self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs) -> BatchFeature:
        """Images, and optionally one label map an image, to tensors.

        images: PIL, NumPy or torch, a path or an address, or a list of them.
        segmentation_maps: (H, W) integers of any size, the images' own height and width; `ignore_index` -> -1.
        kwargs: options of this call, see OPTIONS.
        Returns pixel_values (B, 3, H, W), pixel_mask (B, H, W) int64, and labels (B, H, W) int64, -1 on padding.
        """
        return super().preprocess(images, segmentation_maps, **checked_options(kwargs))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths and addresses as the pipeline does: see `load_picture`."""
        if isinstance(image_url_or_urls, str | Path):
            return load_picture(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Image.Image | np.ndarray]:
        """Images, or label maps of two dimensions, as a flat list. Raises Refused, also if an image has no pixels."""
        name, shape = ("image", "(H, W, C) or (C, H, W)") if expected_ndims == 3 else ("segmentation map", "(H, W)")
        try:
            if expected_ndims == 2 and isinstance(images, str | Path):
                raise TypeError("a path")
            flat = super()._prepare_images_structure(images, expected_ndims)
        except Refused:
            raise
        except (TypeError, ValueError) as error:  # its message holds the whole input
            words = f"PIL images, {shape} arrays{', paths' if expected_ndims == 3 else ''}, or lists of them"
            raise Refused(f"{name}s must be {words}, got {kind(images)[:90]}") from error
        flat = [_as_array(image) if isinstance(image, Tensor) else image for image in flat]
        for place, image in enumerate(flat):
            sides = image.size if isinstance(image, Image.Image) else image.shape
            if expected_ndims == 3 and isinstance(image, Image.Image) and is_deep(image):
                raise Refused(
                    f"{name} {place} has more than 8 bits a channel (mode {image.mode}): convert it to 8 first"
                )
            if 0 in sides:
                raise Refused(f"{name} {place} has no pixels: its sides are {tuple(sides)}")
        if not flat:
            raise Refused(f"there is no {name}")
        return flat

    def resize(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """As in transformers, but a side of a very long, thin image never becomes 0 pixels."""
        height, width = image.shape[-2:]
        if size.shortest_edge and size.longest_edge:
            target = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
            size = SizeDict(height=max(1, target[0]), width=max(1, target[1]))
        return super().resize(image, size, **kwargs)

    def _preprocess_image_like_inputs(
        self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs
    ) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors", None) or "pt"
        images = self._prepare_image_like_inputs(images, **kwargs)
        own_sizes = [image.shape[-2:] for image in images]
        features = self._preprocess(images, **kwargs)
        if segmentation_maps is not None:
            features["labels"] = self._label_maps(segmentation_maps, own_sizes, features, kwargs["ignore_index"])
        return BatchFeature(dict(features), tensor_type=return_tensors)

    def _preprocess(self, images: list[np.ndarray], *, do_pad, pad_size, size_divisor, **kwargs) -> BatchFeature:
        kwargs.update(do_pad=False, pad_size=None, return_tensors=None)
        pixel_values = super()._preprocess(images, **kwargs)["pixel_values"]
        channels = {len(image) for image in pixel_values}
        if len(channels) > 1:
            raise Refused("images of different numbers of channels need do_convert_rgb=True to make a batch")
        if not do_pad and len({image.shape for image in pixel_values}) > 1:
            raise Refused("images of different sizes need do_pad=True to make a batch")
        tallest, widest = (max(image.shape[axis] for image in pixel_values) for axis in (1, 2))
        divisor = size_divisor if do_pad and size_divisor else 1
        height, width = (-(-side // divisor) * divisor for side in (tallest, widest))
        if do_pad and pad_size is not None:
            height, width = pad_size.height, pad_size.width
            if tallest > height or widest > width:
                raise Refused(f"pad_size must be {tallest} x {widest} or more, got {height} x {width}")
        pixels = np.zeros((len(pixel_values), *channels, height, width), dtype=np.float32)
        mask = np.zeros((len(pixel_values), height, width), dtype=np.int64)
        for row, image in enumerate(pixel_values):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            mask[row, : image.shape[1], : image.shape[2]] = 1
        return BatchFeature({"pixel_values": pixels, "pixel_mask": mask})

    def to_rgb(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) of this processor -> images (B, 3, H, W), RGB in [0, 1], for CLIP's view."""
        if not self.do_rescale:
            raise ValueError("without do_rescale the range of pixel_values is not known: make RGB in [0, 1] yourself")
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else ([0.0] * 3, [1.0] * 3)
        return to_rgb(pixel_values, mean, std, full=255 * self.rescale_factor)

    def _label_maps(self, segmentation_maps, own_sizes, features: BatchFeature, ignore_index: int | None) -> np.ndarray:
        segmentation_maps = self._prepare_images_structure(segmentation_maps, expected_ndims=2)
        if len(segmentation_maps) != len(own_sizes):
            raise Refused(f"{len(own_sizes)} images, but {len(segmentation_maps)} segmentation maps")
        labels = np.full(features["pixel_mask"].shape, -1, dtype=np.int64)
        for row, (label_map, own_size) in enumerate(zip(segmentation_maps, own_sizes, strict=True)):
            ids = np.asarray(label_map)
            if ids.shape != tuple(own_size):
                raise Refused(f"segmentation map {row} has size {ids.shape}, its image {tuple(own_size)}")
            if not np.can_cast(ids.dtype, np.int64):
                with np.errstate(invalid="ignore"):  # NaN becomes some integer, and the comparison finds it
                    if ids.dtype.kind not in "uf" or (ids.astype(np.int64) != ids).any():
                        raise Refused(f"segmentation map {row} must hold whole numbers, the ids of classes")
            label_map = ids.astype(np.int64)
            if ignore_index is not None:
                label_map = np.where(label_map == ignore_index, -1, label_map)
            height, width = (int(features["pixel_mask"][row].any(axis).sum()) for axis in (1, 0))
            labels[row, :height, :width] = resize_nearest(label_map, (height, width))
        return labels

    def post_process_semantic_segmentation(
        self,
        outputs: Zs3Output,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        return_scores: bool = False,
        is_seen: Tensor | None = None,
    ) -> list[Tensor] | list[SemanticMap]:
        """Label maps (Eq. 4): one (H, W) int64 tensor an image, of indices into the class names.

        target_sizes: (height, width) of each original image; None: the sizes after resizing, without padding.
        return_scores: a SemanticMap an image instead, with confidences.
        is_seen: (C,) bool; also a SemanticMap an image, with the best seen and the best unseen class.
        """
        if target_sizes is None:
            target_sizes = outputs.valid_sizes
        target_sizes = checked_sizes(target_sizes)
        if len(target_sizes) != len(outputs.mask_logits):
            raise Refused(f"{len(outputs.mask_logits)} images, but {len(target_sizes)} target sizes")
        return semantic_map(
            final_probabilities(outputs),
            outputs.mask_logits,
            padded_size(outputs.mask_logits),
            valid_sizes=outputs.valid_sizes,
            image_sizes=target_sizes,
            return_scores=return_scores,
            is_seen=is_seen,
        )


def checked_sizes(sizes: Any) -> list[tuple[int, int]]:
    """(height, width) of images, from a list or an array of any kind. Raises Refused."""
    sizes = as_python(sizes)
    for size in sizes if isinstance(sizes, list) else [sizes]:
        sides = size if isinstance(size, list) and len(size) == 2 else [None]
        if not all(is_number(side) and side >= 1 and side == int(side) for side in sides):
            raise Refused(f"a target size must be (height, width), in whole pixels, got {shortened(size)}")
    return [(int(height), int(width)) for height, width in sizes]


def _as_array(image: Tensor) -> np.ndarray:
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy(force=True)  # NumPy has no bfloat16


def padded_size(mask_logits: Tensor) -> tuple[int, int]:
    """(H, W) of the padded input that gave mask_logits (B, Q, h, w)."""
    return mask_logits.shape[2] * MASK_STRIDE, mask_logits.shape[3] * MASK_STRIDE


def nearest_pixels(new: int, old: int) -> np.ndarray:
    """(new,) int64: along one axis, the old pixel under the centre of each new pixel."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)


def resize_nearest(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) integers of any width to `size` by nearest neighbour."""
    rows, columns = (nearest_pixels(new, old) for new, old in zip(size, label_map.shape, strict=True))
    return label_map[rows[:, None], columns]


class Zs3Processor(ProcessorMixin):
    """Makes the model's inputs from images and class names, and label maps from its outputs."""

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        """The parts, by known classes. The Auto classes would run the checkpoint's code, or ask whether to run it."""
        parts = Zs3ImageProcessor, tokenizer_class(pretrained_model_name_or_path, **kwargs)
        return [part.from_pretrained(pretrained_model_name_or_path, **kwargs) for part in parts]

    def __init__(
        self, image_processor=None, tokenizer=None, prompt_templates: Sequence[str] = PROMPT_TEMPLATES, **kwargs
    ):
        super().__init__(image_processor, tokenizer, **kwargs)
        wrong = isinstance(prompt_templates, str) or not isinstance(prompt_templates, Sequence) or not prompt_templates
        if wrong or not all(isinstance(template, str) and "{}" in template for template in prompt_templates):
            raise ValueError("prompt_templates must be a list of texts with '{}' where the name goes")
        self.prompt_templates = list(prompt_templates)

    def __call__(
        self,
        images: ImageInput | None = None,
        class_names: Sequence[ClassName] | None = None,
        segmentation_maps: ImageInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Tensors of images (see Zs3ImageProcessor.preprocess), of one label list for all of them, or of both.

        class_names: see `read_labels`. Adds input_ids and attention_mask (C, T, L): T prompts a class. Where a class
        has fewer, the attention_mask of the rest is all zero.
        kwargs: options, see `_options`.
        """
        image_options, text_options = self._options(**kwargs)
        if images is None and class_names is None:
            raise Refused("give images, class_names or both")
        if images is None and segmentation_maps is not None:
            raise Refused("segmentation_maps go with their images")
        if class_names is not None:
            labels = read_labels(class_names, self.prompt_templates)
            self.check_readable(labels)
        features = {}
        if images is not None:
            features.update(self.image_processor(images, segmentation_maps, **image_options))
        if class_names is not None:
            features.update(self.tokenize(labels, text_options.get("padding") or True))
        tensor_type = text_options.get("return_tensors") or image_options.get("return_tensors") or "pt"
        return BatchFeature(features, tensor_type=tensor_type)

    def _options(self, *, images_kwargs=None, text_kwargs=None, common_kwargs=None, **flat) -> tuple[dict, dict]:
        """The options of images and of texts. They come flat, in common_kwargs, or in the dict of their kind.

        TEXT_OPTIONS are those of texts. padding="max_length" pads to the number of tokens that the tokenizer reads.
        """
        if "text" in flat:
            raise Refused("the texts of this processor are class names: give class_names=[...], not text=")
        common, images, texts = {**(common_kwargs or {}), **flat}, images_kwargs or {}, text_kwargs or {}
        of_images = self.image_processor.valid_kwargs.__annotations__.keys()
        of_texts = TEXT_OPTIONS.keys()
        unknown = (common.keys() - of_images - of_texts) | (images.keys() - of_images) | (texts.keys() - of_texts)
        if unknown:
            raise Refused(f"{shortened(min(unknown))} is no option of images or of class names")
        twice = flat.keys() & {**images, **texts}.keys()
        if twice:
            raise Refused(f"{min(twice)} is given twice, once in a dict")
        texts = {**{name: value for name, value in common.items() if name in of_texts}, **texts}
        for name, values in TEXT_OPTIONS.items():
            if texts.get(name) not in (None, *values):
                raise Refused(f"{name} of class names must be one of {values}, got {shortened(texts[name])}")
        return {**{name: value for name, value in common.items() if name in of_images}, **images}, texts

    def check_readable(self, labels: Sequence[Label]) -> None:
        """Raises Refused where two labels have the same tokens, or where the tokens end before a name does.

        Labels with the same tokens would have the same text vector.
        """
        first: dict[tuple, Label] = {}
        short = [Label(label.name, label.words, label.templates[:1]) for label in labels]
        for label, tokens in zip(labels, self._tokens(short), strict=True):
            if any(self.tokenizer.eos_token_id in row[:-1] for row in tokens):  # CLIP reads up to its end token
                ends = any(str(self.tokenizer.eos_token) in word for word in label.words)
                why = "a name must not hold the tokenizer's end token" if ends else "is tokenizer.json missing?"
                raise Refused(f"the tokenizer cannot read {shortened(label.name)}: {why}")
            other = first.setdefault(tokens, label)
            if other is not label and len({*self._tokens([other, label])}) == 1:
                both = f"{shortened(other.name, 45)} and {shortened(label.name, 45)}"
                limit = self.tokenizer.model_max_length
                raise Refused(f"{both} become the same tokens ({limit} are read): rename one")

    def token_counts(self, labels: Sequence[Label]) -> list[int]:
        """The number of tokens of each label's longest prompt, with special tokens, before it is cut."""
        counts = []
        for start in range(0, len(labels), LABELS_AT_ONCE):
            prompts = [label.prompts for label in labels[start : start + LABELS_AT_ONCE]]
            texts = [text for of_label in prompts for text in of_label]
            lengths = iter([len(row) for row in self._encode(texts, truncation=False, verbose=False)["input_ids"]])
            counts += [max(next(lengths) for _ in of_label) for of_label in prompts]
        return counts

    def _encode(self, texts: list[str], **options) -> BatchEncoding:
        """Calls the tokenizer. Threads take turns, since a call changes the way it cuts and pads."""
        with TOKENIZING:
            return self.tokenizer(texts, **options)

    def _tokens(self, labels: Sequence[Label]) -> list[tuple]:
        """The tokens of each label's prompts, sorted: the order of its words does not matter."""
        texts = [text for label in labels for text in label.prompts]
        rows = iter(self._encode(texts, truncation=True)["input_ids"])
        return [tuple(sorted(tuple(next(rows)) for _ in label.prompts)) for label in labels]

    def tokenize(self, labels: Sequence[Label], padding: bool | str = True) -> dict[str, Tensor]:
        """input_ids and attention_mask, both (C, T, L) int64. padding: the tokenizer's; True: to the longest prompt."""
        counts = torch.tensor([len(label.words) * len(label.templates) for label in labels])
        prompts = [prompt for label in labels for prompt in label.prompts]
        tokens = self._encode(prompts, padding=padding, truncation=True, return_tensors="pt")
        exists = torch.arange(int(counts.max())) < counts[:, None]  # (C, T)
        shape = (*exists.shape, tokens["input_ids"].shape[1])
        features = {}
        for name in ("input_ids", "attention_mask"):
            features[name] = torch.zeros(shape, dtype=torch.int64)
            features[name][exists] = tokens[name]
        return features

    def post_process_semantic_segmentation(
        self,
        outputs: Zs3Output,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        return_scores: bool = False,
        is_seen: Tensor | None = None,
    ) -> list[Tensor] | list[SemanticMap]:
        """See Zs3ImageProcessor.post_process_semantic_segmentation."""
        return self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes, return_scores=return_scores, is_seen=is_seen
        )

    def to_rgb(self, pixel_values: Tensor) -> Tensor:
        """See Zs3ImageProcessor.to_rgb."""
        return self.image_processor.to_rgb(pixel_values)


def check_colours(config: PreTrainedConfig, image_processor: Zs3ImageProcessor) -> None:
    """Raises Refused where class_head "regions" would see other colours than those of the picture."""
    if getattr(config, "class_head", "learned") != "regions":
        return
    processed = [image_processor.image_mean, image_processor.image_std] if image_processor.do_normalize else None
    if processed is None or not np.allclose(processed, [config.pixel_mean, config.pixel_std], atol=1e-6):
        raise Refused(
            "the image processor's image_mean and image_std are not pixel_mean and pixel_std of the config, so regions "
            "would have wrong colours: make them equal"
        )


# ---- from a checkpoint, with the classes of this file -------------------------------------------------------
# Where the tokenizer's files are missing, these raise; `Zs3Processor.from_pretrained` makes an empty tokenizer.


def saved_processor(source: str, *, text: bool = True, revision: str = "main") -> Zs3Processor | Zs3ImageProcessor:
    """The processor of a checkpoint, a folder or a Hub id. text: the checkpoint has a text tower and a tokenizer."""
    image_processor = Zs3ImageProcessor.from_pretrained(source, revision=revision)
    vars(image_processor).pop("auto_map", None)  # it names code of the checkpoint, and would be saved again
    if not text:
        return image_processor
    return Zs3Processor(image_processor, saved_tokenizer(source, revision), saved_templates(source, revision))


def tokenizer_class(source: str, **options) -> type[PreTrainedTokenizerBase]:
    """The class of a checkpoint's tokenizer, of those of FAMILIES: as its file says, else that of its encoder's family.

    options: of `from_pretrained`.
    """
    name = get_tokenizer_config(source, **options).get("tokenizer_class")
    classes = {family.tokenizer.__name__: family.tokenizer for family in FAMILIES.values()}
    if name in classes:
        return classes[name]
    file = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **options)
    config = {} if file is None else json.loads(read_text(file))
    kind = (config.get("text_config") or config).get("model_type")
    return FAMILIES.get(str(kind).removesuffix("_text_model"), FAMILIES["clip"]).tokenizer


def saved_tokenizer(source: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Without its files transformers would make one without words, and not say so."""
    kind = tokenizer_class(source, revision=revision)
    if not _saved(source, "tokenizer.json", revision):
        for name in kind.vocab_files_names.values():
            if name != "tokenizer.json" and not _saved(source, name, revision):
                raise ValueError(f"there is no tokenizer.json (nor {name}): processor.save_pretrained writes it")
    try:
        tokenizer = kind.from_pretrained(source, revision=revision)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ValueError(f"its tokenizer cannot be read ({type(error).__name__}: {error})") from error
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def saved_templates(source: str, revision: str = "main", family: Sequence[str] | None = None) -> Sequence[str]:
    """The prompt templates of a checkpoint with a text tower.

    family: those of an encoder's family, for an encoder whose files have none. None: a checkpoint's files must have
        them.
    """
    file = _saved(source, "processor_config.json", revision)
    if file is None and family is None:
        raise ValueError(
            "there is no processor_config.json, which has its prompts: processor.save_pretrained writes it"
        )
    own = {} if file is None else json.loads(read_text(file))
    return own.get("prompt_templates", family or PROMPT_TEMPLATES)


def _saved(source: str, name: str, revision: str) -> str | None:
    """The file's path on this disk, after a download if needed; None: there is no such file."""
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)


Zs3ImageProcessor.register_for_auto_class("AutoImageProcessor")
Zs3Processor.register_for_auto_class("AutoProcessor")

__all__ = [
    "PROMPT_TEMPLATES",
    "Label",
    "Zs3ImageProcessor",
    "Zs3Processor",
    "read_labels",
    "saved_processor",
    "saved_templates",
    "saved_tokenizer",
    "seen_labels",
]
