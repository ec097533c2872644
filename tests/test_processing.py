"""Images, label maps and label lists to tensors, worked out with NumPy or by hand."""

import copy
import inspect
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer, tiny_model
from transformers import CLIPTokenizer, Mask2FormerImageProcessorPil
from transformers.image_utils import SizeDict

from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import PROMPT_TEMPLATES, read_labels, seen_labels

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(**kwargs) -> Zs3Processor:
    return Zs3Processor(Zs3ImageProcessor(size={"shortest_edge": 40, "longest_edge": 80}), byte_tokenizer(), **kwargs)


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((20, 30), (40, 60), (64, 64)),  # the short edge becomes 40
        ((60, 40), (60, 40), (64, 64)),
        ((20, 60), (27, 80), (32, 96)),  # the long edge may not pass 80
        ((64, 64), (40, 40), (64, 64)),
        ((160, 80), (80, 40), (96, 64)),
    ],
)
def test_the_short_edge_is_resized_and_sides_padded_to_32(size, resized, padded):
    features = processor()(picture(*size))
    assert features["pixel_values"].shape == (1, 3, *padded) and features["pixel_values"].dtype == torch.float32
    expected = torch.zeros(1, *padded, dtype=torch.int64)
    expected[:, : resized[0], : resized[1]] = 1
    assert torch.equal(features["pixel_mask"], expected)
    assert (features["pixel_values"] * (1 - expected)).abs().sum() == 0


def test_pixels_are_normalised_with_imagenets_mean():
    image = picture(32, 64)
    features = Zs3ImageProcessor(do_resize=False)(image)
    expected = (np.asarray(image) / 255 - MEAN) / STD
    np.testing.assert_allclose(features["pixel_values"][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_resizing_is_pils_bilinear():
    image = picture(30, 20)
    features = Zs3ImageProcessor(size={"shortest_edge": 40, "longest_edge": 80})(image)
    expected = (np.asarray(image.resize((40, 60), Image.Resampling.BILINEAR)) / 255 - MEAN) / STD
    np.testing.assert_allclose(features["pixel_values"][0, :, :60, :40].permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_any_mode_become_rgb(mode):
    image = picture(32, 32).convert(mode)
    pixels = Zs3ImageProcessor(do_resize=False)(image)["pixel_values"]
    assert torch.equal(pixels, Zs3ImageProcessor(do_resize=False)(image.convert("RGB"))["pixel_values"])


def test_a_batch_is_padded_to_its_largest_sides_and_holds_each_image_as_alone():
    images = [picture(20, 30), picture(60, 40, 1)]
    batch = processor()(images)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    wide = processor()([picture(20, 60), picture(60, 20)])
    assert wide["pixel_values"].shape == (2, 3, 96, 96)
    for row, image in enumerate(images):
        alone = processor()(image)
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])
        assert torch.equal(batch["pixel_mask"][row], alone["pixel_mask"][0])


SIZE = {"shortest_edge": 40, "longest_edge": 80}
ARRAY = np.asarray(picture(20, 30))
KINDS = {
    "PIL": picture(20, 30),
    "list": [picture(20, 30), picture(60, 40, 1)],
    "lists": [[picture(20, 30)], [picture(60, 40, 1)]],
    "tuple": (picture(20, 30), ARRAY),
    "rows first": ARRAY,
    "channels first": ARRAY.transpose(2, 0, 1),
    "batch": np.stack([ARRAY, 255 - ARRAY]),
    "float": ARRAY / 255,
    "int64": ARRAY.astype(np.int64),
    "tensor": torch.tensor(ARRAY).permute(2, 0, 1),
    "tensors": torch.tensor(ARRAY).permute(2, 0, 1).repeat(2, 1, 1, 1),
    "half": torch.tensor(ARRAY).permute(2, 0, 1).half() / 255,
    "gray": ARRAY[..., :1],
    "L": picture(20, 30).convert("L"),
    "clear": Image.merge("RGBA", [*picture(20, 30).split(), picture(20, 30, 1).getchannel(0)]),
    "four channels": np.dstack([ARRAY, ARRAY[..., :1]]),
}


def assert_as_transformers(images, **options):
    """Where there are pixels, they are those of Mask2Former's image processor; beside them there are zeros."""
    peer = Mask2FormerImageProcessorPil(size=SIZE, size_divisor=0, do_convert_rgb=True)
    expected = peer(images, return_tensors="pt", **options)
    found = Zs3ImageProcessor(size=SIZE)(images, return_tensors="pt", **options)
    height, width = expected["pixel_values"].shape[2:]
    torch.testing.assert_close(found["pixel_values"][..., :height, :width], expected["pixel_values"].float())
    assert torch.equal(found["pixel_mask"][:, :height, :width], expected["pixel_mask"])
    assert found["pixel_mask"].sum() == expected["pixel_mask"].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_all_kinds_are_read_as_transformers_reads_them(kind):
    assert_as_transformers(KINDS[kind])


@pytest.mark.parametrize(
    "options",
    [
        *({name: False} for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")),
        dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_pad"), False),
        *(
            {"size": size}
            for size in ((24, 28), [24, 28], {"height": 24, "width": 28}, {"max_height": 24, "max_width": 24})
        ),
        {"resample": Image.Resampling.NEAREST},
        {"resample": 3},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": (0.1, 0.2, 0.3), "image_std": [0.5, 0.6, 0.7]},
        {"rescale_factor": -1.0},
        {"input_data_format": "channels_last"},
        {"disable_grouping": True, "device": "cpu", "data_format": "channels_first"},
    ],
    ids=str,
)
def test_options_do_what_they_do_in_transformers(options):
    assert_as_transformers([ARRAY, ARRAY], **options)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"size": np.int64(24)}, {"size": {"shortest_edge": 24}}),
        ({"size": {"height": np.int32(24), "width": np.uint8(40)}}, {"size": (24, 40)}),
        ({"size": np.array([24, 40])}, {"size": (24, 40)}),
        ({"size": SizeDict(height=24, width=40)}, {"size": (24, 40)}),
        ({"image_mean": np.array([0.5, 0.25, 0.5])}, {"image_mean": [0.5, 0.25, 0.5]}),
        ({"image_mean": torch.tensor([0.5, 0.25, 0.5])}, {"image_mean": [0.5, 0.25, 0.5]}),
        ({"image_mean": [0, np.float32(1), 1]}, {"image_mean": [0.0, 1.0, 1.0]}),
        ({"rescale_factor": 1}, {"rescale_factor": 1.0}),
        ({"do_resize": np.bool_(False)}, {"do_resize": False}),
        ({"resample": np.int64(3)}, {"resample": Image.Resampling.BICUBIC}),
        ({"size_divisor": np.uint8(8), "ignore_index": np.int64(3)}, {"size_divisor": 8, "ignore_index": 3}),
        ({"size_divisor": 0}, {"size_divisor": 1}),
        ({"size_divisor": None}, {"size_divisor": 1}),
    ],
    ids=str,
)
def test_numbers_of_numpy_are_numbers_in_a_call_and_in_the_settings(options, same):
    label_map = np.random.default_rng(0).integers(0, 9, (20, 30))
    expected = Zs3ImageProcessor()(ARRAY, label_map, **same)
    for found in (Zs3ImageProcessor()(ARRAY, label_map, **options), Zs3ImageProcessor(**options)(ARRAY, label_map)):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    json.loads(Zs3ImageProcessor(**options).to_json_string())


@pytest.mark.parametrize(
    "options",
    [
        *({"size": size} for size in (0, -3, True, 2.5, "40", (1, 2, 3), {"height": 8}, {"height": 0, "width": 5})),
        *({"size": size} for size in ({"longest_edge": 9}, {"shortest_edge": float("nan")}, {"x" * 500: 1}, {})),
        *({"size_divisor": divisor} for divisor in (-4, 3.5, "32", True)),
        *({"rescale_factor": factor} for factor in (float("nan"), "x", True)),
        *({"image_mean": mean} for mean in ([float("nan")] * 3, "a", [True] * 3, [0.5] * 3000, [0.5, 0.5])),
        *({"image_std": std} for std in (0, [1, 0, 1], [-1.0] * 3, ["a"] * 3, [])),
        *({"resample": filter} for filter in (77, "bilinear", True)),
        *({"do_resize": switch} for switch in ("no", 0)),
        *({"return_tensors": kind} for kind in ("tf", 3, "x" * 500)),
        {"ignore_index": 2.5},
        {"input_data_format": "rows"},
        {"pad_size": 8},
        {"pad_size": {"shortest_edge": 800}},
        {"do_center_crop": True, "crop_size": 8},
    ],
    ids=lambda options: str(options)[:60],
)
def test_options_that_make_no_sense_are_one_line(options):
    for use in (lambda: Zs3ImageProcessor()(ARRAY, **options), lambda: Zs3ImageProcessor(**options)(ARRAY)):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}|^(mean|std) must have 3") as refused:
            use()
        assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)


def test_an_option_that_is_unknown_is_refused():
    with pytest.raises(TypeError, match="'do_rezise'"):
        Zs3ImageProcessor()(ARRAY, do_rezise=False)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Image.new("RGB", (0, 5)), r"image 0 has no pixels: its sides are \(0, 5\)"),
        (np.zeros((5, 0, 3), np.uint8), "image 0 has no pixels"),
        ([ARRAY, torch.zeros(3, 0, 5)], "image 1 has no pixels"),
        (np.zeros((0, 5, 5, 3), np.uint8), "there is no image"),
        ([], "there is no image"),
        (None, "got NoneType"),
        ([None], "got a list of NoneType"),
        ([picture(2, 2), 3], "got a list of Image and int"),
        (np.zeros((500, 500)), r"got ndarray \(500, 500\)"),
        (ARRAY.tolist(), "got a list of a list of a list of int"),
        (b"picture", "got bytes"),
        ("no such picture.png", "no such picture.png cannot be read"),
        (ARRAY[..., :2], "channel dimension format"),
        (ARRAY / 255 - 0.5, "outside the range"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(images, message):
    with pytest.raises(ValueError, match=message) as refused:
        Zs3ImageProcessor()(images)
    assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)


def test_tensors_that_numpy_has_not_are_pictures_too():
    tensor = torch.tensor(ARRAY).permute(2, 0, 1).float() / 255
    expected = processor()(tensor)["pixel_values"]
    assert torch.equal(processor()(tensor.clone().requires_grad_())["pixel_values"], expected)
    torch.testing.assert_close(processor()(tensor.bfloat16())["pixel_values"], expected, atol=0.1, rtol=0)


def test_images_keep_their_channels_where_rgb_is_not_wanted():
    four = np.dstack([ARRAY, ARRAY[..., :1]])
    options = {"do_convert_rgb": False, "do_resize": False, "do_pad": False, "image_mean": [0.0] * 4, "image_std": 1.0}
    pixels = Zs3ImageProcessor()(four, **options)["pixel_values"]
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), four / 255, atol=1e-6)
    with pytest.raises(ValueError, match="channels need do_convert_rgb=True"):
        Zs3ImageProcessor(do_convert_rgb=False, do_normalize=False)([ARRAY, ARRAY[..., :1]])


@pytest.mark.parametrize("pad_size", [96, (96, 96), {"height": 96, "width": 96}])
def test_images_are_padded_to_a_size_that_is_given(pad_size):
    label_map = np.zeros((20, 30), int)
    padded, usual = (processor()(ARRAY, segmentation_maps=label_map, pad_size=size) for size in (pad_size, None))
    assert padded["pixel_values"].shape == (1, 3, 96, 96)
    for name, empty in {"pixel_values": 0, "pixel_mask": 0, "labels": -1}.items():
        assert torch.equal(padded[name][..., :64, :64], usual[name])
        assert (padded[name][..., 64:, :] == empty).all() and (padded[name][..., 64:] == empty).all()


# -------------------------------------------------------------------------------------------------- label maps


def test_label_maps_keep_ids_beyond_255_and_lose_the_ignored():
    label_map = np.array([[0, 846], [255, 300]]).repeat(32, 0).repeat(32, 1).astype(np.int32)
    features = Zs3ImageProcessor(do_resize=False)(picture(64, 64), label_map)
    labels = features["labels"]
    assert labels.dtype == torch.int64 and labels.shape == (1, 64, 64)
    assert labels[0, ::32, ::32].tolist() == [[0, 846], [-1, 300]]
    kept = Zs3ImageProcessor(do_resize=False, ignore_index=300)(picture(64, 64), label_map)["labels"]
    assert kept[0, ::32, ::32].tolist() == [[0, 846], [255, -1]]
    none = Zs3ImageProcessor(do_resize=False, ignore_index=None)(picture(64, 64), label_map)["labels"]
    assert none[0, ::32, ::32].tolist() == [[0, 846], [255, 300]]


def test_label_maps_are_resized_by_nearest_neighbour_and_padded_with_minus_1():
    label_map = np.arange(600).reshape(20, 30)  # twice the size: each id becomes 2 x 2
    label_map[label_map == 255] = 0
    labels = processor()(picture(20, 30), segmentation_maps=label_map)["labels"]
    assert labels.shape == (1, 64, 64)
    np.testing.assert_array_equal(labels[0, :40, :60].numpy(), label_map.repeat(2, 0).repeat(2, 1))
    assert (labels[0, 40:] == -1).all() and (labels[0, :, 60:] == -1).all()


@pytest.mark.parametrize("size", [(21, 33), (90, 77), (40, 41)])
def test_resized_label_maps_are_pils_nearest_neighbour(size):
    label_map = np.random.default_rng(1).integers(0, 200, size, dtype=np.uint8)
    features = processor()(picture(*size), segmentation_maps=label_map)
    height, width = int(features["pixel_mask"][0, :, 0].sum()), int(features["pixel_mask"][0, 0].sum())
    expected = np.asarray(Image.fromarray(label_map).resize((width, height), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(features["labels"][0, :height, :width].numpy(), expected)


def test_label_maps_come_as_pictures_arrays_or_lists():
    label_map = np.random.default_rng(1).integers(0, 9, (20, 30), dtype=np.uint8)
    palette = Image.fromarray(label_map)
    palette.putpalette(list(range(256)) * 3)
    expected = processor()(picture(20, 30), segmentation_maps=label_map)["labels"]
    others = (Image.fromarray(label_map), palette, [label_map], [[label_map]], label_map[None], torch.tensor(label_map))
    for other in (*others, torch.tensor(label_map)[None], torch.tensor(label_map).float(), label_map.astype(np.uint64)):
        assert torch.equal(processor()(picture(20, 30), segmentation_maps=other)["labels"], expected)


def test_a_label_map_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"segmentation map 1 has size \(30, 20\), its image \(20, 30\)"):
        processor()([picture(20, 30)] * 2, segmentation_maps=[np.zeros((20, 30), int), np.zeros((30, 20), int)])
    with pytest.raises(ValueError, match="2 images, but 1 segmentation maps"):
        processor()([picture(20, 30)] * 2, segmentation_maps=[np.zeros((20, 30), int)])


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (np.full((20, 30), 0.5), "segmentation map 0 must hold whole numbers"),
        (np.full((20, 30), np.nan), "whole numbers"),
        (np.full((20, 30), np.inf), "whole numbers"),
        (np.full((20, 30), 2**63, np.uint64), "whole numbers"),
        (np.full((20, 30), "a"), "whole numbers"),
        (picture(20, 30), r"has size \(20, 30, 3\)"),
        (np.zeros((0, 30), int), "segmentation map 0 has no pixels"),
        (np.zeros((1, 1, 20, 30), int), r"segmentation maps must be .*, got ndarray \(1, 1, 20, 30\)"),
        ([None], "got a list of NoneType"),
        ([], "there is no segmentation map"),
    ],
)
def test_what_is_no_label_map_is_refused_in_one_line(label_map, message):
    with pytest.raises(ValueError, match=message) as refused:
        Zs3ImageProcessor()(picture(20, 30), label_map)
    assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------- label lists


def test_the_templates_are_vilds_fourteen():
    assert tuple(template.format("cat") for template in PROMPT_TEMPLATES) == (
        "a photo of a cat.",
        "This is a photo of a cat",
        "There is a cat in the scene",
        "There is the cat in the scene",
        "a photo of a cat in the scene",
        "a photo of a small cat.",
        "a photo of a medium cat.",
        "a photo of a large cat.",
        "This is a photo of a small cat.",
        "This is a photo of a medium cat.",
        "This is a photo of a large cat.",
        "There is a small cat in the scene.",
        "There is a medium cat in the scene.",
        "There is a large cat in the scene.",
    )


def test_a_label_is_a_name_or_synonyms_or_a_dict():
    labels = read_labels(
        [
            " sky ",
            ["dog", "puppy"],
            {"name": "road, route", "templates": ["the {}"]},
            {"name": "grass", "synonyms": ["lawn"]},
            {"name": "sea", "synonyms": "ocean", "templates": "deep {}"},
        ],
        templates=["a {}.", "one {}"],
    )
    assert [label.name for label in labels] == ["sky", "dog", "road, route", "grass", "sea"]
    assert [list(label.prompts) for label in labels] == [
        ["a sky.", "one sky"],
        ["a dog.", "one dog", "a puppy.", "one puppy"],
        ["the road, route"],
        ["a grass.", "one grass", "a lawn.", "one lawn"],
        ["deep sea", "deep ocean"],
    ]
    assert [label.words for label in labels[1:3]] == [("dog", "puppy"), ("road, route",)]
    assert [label.templates for label in labels[1:3]] == [("a {}.", "one {}"), ("the {}",)]


def test_a_labels_synonyms_are_labels_of_one_word():
    (label,) = read_labels([["dog", "puppy"]], templates=["a {}.", "one {}"])
    synonyms = label.synonyms()
    assert [synonym.name for synonym in synonyms] == ["dog", "puppy"]
    assert [synonym.prompts for synonym in synonyms] == [("a dog.", "one dog"), ("a puppy.", "one puppy")]
    assert synonyms[0].synonyms() == synonyms[:1]


def test_repeated_names_are_read_where_they_are_asked_for():
    labels = read_labels(["sky", "sky ", ["sea", "sky"]], ["{}"], allow_repeats=True)
    assert [label.words for label in labels] == [("sky",), ("sky",), ("sea", "sky")]
    with pytest.raises(ValueError, match="must be a name"):
        read_labels(["sky", 3], allow_repeats=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "empty"),
        ("sky", "must be a list, got 'sky'"),
        (None, "must be a list, got None"),
        (["sky", "sea", "sky"], "repeat: 'sky' is there twice"),
        (["sky", "sky "], "repeat: 'sky' is there twice"),
        (["sky", {"name": "sky"}], "repeat: 'sky' is there twice"),
        (["sky", "sea", "Sky"], "'sky' and 'Sky' are one name"),
        (["traffic light", ["traffic  LIGHT", "lamp"]], "'traffic light' and 'traffic  LIGHT' are one name"),
        (["caf\u00e9", {"name": "cafe\u0301"}], "are one name"),
        (["sky", " "], "not blank"),
        (["sky", ["sea", "\u200b"]], "not blank"),
        (["sky", "s\nea"], "one line"),
        (["sky", {"name": "sea", "synonyms": ["oc\tean"]}], "one line"),
        (["sky", "x" * 500, "X" * 500], "names repeat"),
        ([{"name": "sky", 3: "a"}], "a label needs a name"),
        ([{"name": "sky", "templates": [3]}], "prompt template"),
        (["sky", 3], "must be a name, a list of synonyms or a dict, got 3"),
        (["sky", []], "must be a name"),
        ([{"synonyms": ["sky"]}], "a label needs a name"),
        ([{"name": "sky", "template": "a {}"}], "template"),
        ([{"name": "sky", "templates": ["a sky"]}], "'a sky'"),
        ([{"name": None}], "must be a name"),
        ([{"name": "sky", "synonyms": [4]}], "must be a name"),
    ],
)
def test_a_wrong_label_list_is_refused_in_words(labels, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_labels(labels)
    assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a-b", "sky", "a - b"], "'a-b' and 'a - b' become the same tokens"),
        ([["sea", "a-b"], "sky", ["a - b", "sea"]], "'sea' and 'a - b' become the same tokens"),
        (["very " * 40 + "long", "very " * 40 + "short"], "become the same tokens (77 are read)"),
        (["sky <|endoftext|> sea", "grass"], "'sky <|endoftext|> sea': a name must not hold the tokenizer's end token"),
    ],
)
def test_names_that_the_tokens_do_not_tell_apart_are_refused(labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor()(class_names=labels)


@pytest.mark.parametrize(
    "labels",
    [
        ["a-b", "ab"],
        [["sea", "ocean"], ["lake", "sea"]],
        ["\u0131rmak", "irmak"],
        ["\u65e5\u672c", "\u65e5\u672c\u8a9e"],
    ],
)
def test_names_that_differ_are_read(labels):
    assert len(processor()(class_names=labels)["input_ids"]) == 2


def test_names_that_one_template_cuts_off_may_differ_in_another():
    ours = processor(prompt_templates=["very " * 90 + "{}", "a {}"])
    assert len(ours(class_names=["cat", "dog"])["input_ids"]) == 2
    with pytest.raises(ValueError, match="become the same tokens"):
        processor(prompt_templates=["very " * 90 + "{}"])(class_names=["cat", "dog"])


def test_a_tokenizer_that_was_lost_is_refused_before_all_names_become_one_vector():
    """What transformers makes of a checkpoint without tokenizer.json."""
    with pytest.raises(ValueError, match="cannot read 'sky': is tokenizer.json missing"):
        Zs3Processor(Zs3ImageProcessor(), CLIPTokenizer())(class_names=["sky"])


def test_a_label_is_seen_if_one_of_its_words_is():
    labels = read_labels([["meadow", "Grass "], "sky", {"name": "Cafe\u0301"}, "sea"])
    assert seen_labels(labels, ["grass", "caf\u00e9", "SEA  "]) == [True, False, True, True]
    assert seen_labels(labels, None) == [False] * 4


def test_prompts_become_one_row_a_class_and_missing_ones_are_masked():
    tokenizer, prompts = byte_tokenizer(), ["a {}.", "some {}"]
    features = processor(prompt_templates=prompts)(class_names=["sea", ["dog", "big dog"]])
    ids, mask = features["input_ids"], features["attention_mask"]
    expected = [["a sea.", "some sea"], ["a dog.", "some dog", "a big dog.", "some big dog"]]
    assert ids.shape == mask.shape and ids.shape[:2] == (2, 4) and ids.dtype == torch.int64
    assert ids.shape[2] == len(tokenizer("some big dog")["input_ids"])  # no longer than needed
    for row, words in enumerate(expected):
        for column in range(4):
            real = ids[row, column][mask[row, column] == 1].tolist()
            assert real == (tokenizer(words[column])["input_ids"] if column < len(words) else [])


def test_a_prompt_longer_than_clips_context_is_cut():
    features = processor()(class_names=["very " * 40 + "long name"])
    assert features["input_ids"].shape == (1, 14, 77)


def test_images_and_names_together():
    features = processor()([picture(20, 30)] * 2, class_names=["sky", "sea"])
    assert set(features) == {"pixel_values", "pixel_mask", "input_ids", "attention_mask"}
    assert features["input_ids"].shape[:2] == (2, 14) and features["pixel_values"].shape[0] == 2


# ------------------------------------------------------------------------------------------------------ options


def equal(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "flat"),
    [
        ({"images_kwargs": {}, "text_kwargs": {}, "common_kwargs": {}}, {}),
        ({"return_tensors": "pt", "padding": True, "truncation": True}, {}),
        ({"text_kwargs": {"padding": "longest"}}, {}),
        ({"images_kwargs": {"do_resize": False}}, {"do_resize": False}),
        ({"images_kwargs": {"size": 24}, "do_normalize": False}, {"size": 24, "do_normalize": False}),
        ({"common_kwargs": {"size": 24}, "do_normalize": False}, {"size": 24, "do_normalize": False}),
        ({"common_kwargs": {"size": 24}, "size": 40}, {"size": 40}),
    ],
    ids=str,
)
def test_options_come_flat_or_in_a_dict_of_their_kind(options, flat):
    expected = processor()(ARRAY, ["sky", "sea"], **flat)
    assert equal(processor()(images=ARRAY, class_names=["sky", "sea"], **options), expected)


@pytest.mark.parametrize("options", [{"return_tensors": "np"}, {"common_kwargs": {"return_tensors": "np"}}])
def test_all_features_become_numpys(options):
    ours, label_map = processor(), np.zeros((20, 30), int)
    features = ours(ARRAY, ["sky"], label_map, **options)
    assert {type(value) for value in features.values()} == {np.ndarray}
    assert equal(features.convert_to_tensors("pt"), ours(ARRAY, ["sky"], label_map))
    assert isinstance(ours(class_names=["sky"], **options)["input_ids"], np.ndarray)


def test_prompts_can_be_padded_to_all_tokens_that_are_read():
    ours = processor()
    padded, usual = (ours(class_names=["sky", ["sea", "lake"]], padding=how) for how in ("max_length", True))
    length = usual["input_ids"].shape[2]
    assert padded["input_ids"].shape == (2, 28, 77)
    assert torch.equal(padded["input_ids"][..., :length], usual["input_ids"])
    assert torch.equal(padded["attention_mask"][..., :length], usual["attention_mask"])
    assert padded["attention_mask"][..., length:].sum() == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give images, class_names or both"),
        ({"segmentation_maps": np.zeros((20, 30), int)}, "give images"),
        ({"class_names": ["sky"], "segmentation_maps": np.zeros((20, 30), int)}, "with their images"),
        ({"images": ARRAY, "text": ["sky"]}, re.escape("give class_names=[...], not text=")),
        ({"text": "sky"}, re.escape("give class_names=[...], not text=")),
        ({"images": ARRAY, "do_rezise": False}, "'do_rezise' is no option"),
        ({"class_names": ["sky"], "videos": [ARRAY]}, "'videos' is no option"),
        ({"class_names": ["sky"], "text_kwargs": {"max_length": 5}}, "'max_length' is no option"),
        ({"class_names": ["sky"], "images_kwargs": {"padding": True}}, "'padding' is no option"),
        ({"class_names": ["sky"], "padding": False}, "padding of class names must be one of"),
        ({"class_names": ["sky"], "return_tensors": "tf"}, "return_tensors"),
        ({"images": ARRAY, "do_resize": False, "images_kwargs": {"do_resize": True}}, "do_resize is given twice"),
        ({"images": ARRAY, "images_kwargs": {"size": -1}}, "size must be"),
    ],
)
def test_a_call_that_makes_no_sense_is_one_line(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        processor()(**given)
    assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)


def test_the_processor_names_the_inputs_that_it_makes():
    ours = processor()
    assert ours.model_input_names == list(ours(ARRAY, ["sky"]))
    assert ours.get_attributes() == ["image_processor", "tokenizer"] and ours.unused_input_names == []
    assert list(inspect.signature(ours).parameters)[:2] == ["images", "class_names"]
    assert list(ours.to_dict()) == ["image_processor", "prompt_templates", "processor_class"]
    assert repr(ours).startswith("Zs3Processor:\n- image_processor: Zs3ImageProcessor")


def test_the_processor_decodes_as_its_tokenizer_and_has_no_chat():
    ours, ids = processor(), [[512, 1, 4, 513], [3, 4, 3, 1]]
    assert ours.batch_decode(ids) == ours.tokenizer.batch_decode(ids) and ours.decode(ids[0]) == ours.tokenizer.decode(
        ids[0]
    )
    with pytest.raises(ValueError, match="does not have a chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hello"}])


# ------------------------------------------------------------------------------------------------------- saving


def test_a_processor_survives_saving_copying_and_pickling(tmp_path):
    """Its own class loads it without asking for trust; as remote code it is loaded by test_hub."""
    ours, names = processor(prompt_templates=["a {}", "one {}"]), ["sky", ["sea", "lake"]]
    ours.save_pretrained(tmp_path)
    again = Zs3Processor.from_pretrained(tmp_path)
    assert again.prompt_templates == ["a {}", "one {}"] and again.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    assert again.image_processor.to_dict() == ours.image_processor.to_dict()
    assert Zs3ImageProcessor.from_pretrained(tmp_path).to_dict() == ours.image_processor.to_dict()
    for other in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert equal(other(ARRAY, names, np.zeros((20, 30), int)), ours(ARRAY, names, np.zeros((20, 30), int)))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/processor_config.json").read_text() == (tmp_path / "processor_config.json").read_text()


def test_settings_of_a_saved_processor_can_be_overridden(tmp_path):
    processor().save_pretrained(tmp_path)
    changed = Zs3Processor.from_pretrained(
        tmp_path, do_normalize=False, size=24, cls_token="(CLS)", prompt_templates=["{}"]
    )
    assert changed.image_processor.do_normalize is False and changed.image_processor.size == {"shortest_edge": 24}
    assert changed.tokenizer.cls_token == "(CLS)" and changed.prompt_templates == ["{}"]
    alone, unused = Zs3ImageProcessor.from_pretrained(tmp_path, size=24, foo=3, return_unused_kwargs=True)
    assert alone.size == {"shortest_edge": 24} and unused == {"size": 24, "foo": 3}
    given = Zs3ImageProcessor(ignore_index=7)
    assert Zs3Processor.from_pretrained(tmp_path, image_processor=given).image_processor is given
    for wrong in ({"size": -1}, {"prompt_templates": ["sky"]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Zs3Processor.from_pretrained(tmp_path, **wrong)


def test_an_image_processor_survives_saving_and_json(tmp_path):
    settings = {"size": {"height": 24, "width": 28}, "do_pad": False, "ignore_index": 300, "image_std": [0.5] * 3}
    ours = Zs3ImageProcessor(**settings)
    assert {name: json.loads(ours.to_json_string())[name] for name in settings} == settings
    ours.save_pretrained(tmp_path)
    ours.to_json_file(tmp_path / "settings.json")
    label_map = np.random.default_rng(0).integers(298, 303, (20, 30))
    for again in (
        Zs3ImageProcessor.from_dict(ours.to_dict()),
        Zs3ImageProcessor.from_json_file(tmp_path / "settings.json"),
        Zs3ImageProcessor.from_pretrained(tmp_path),
    ):
        assert again.to_dict() == ours.to_dict() and equal(again(ARRAY, label_map), ours(ARRAY, label_map))
    without = Zs3ImageProcessor(ignore_index=None)
    assert Zs3ImageProcessor.from_dict(without.to_dict()).ignore_index is None
    assert Zs3ImageProcessor.from_dict(ours.to_dict(), size=np.int64(42)).size == {"shortest_edge": 42}
    assert Zs3ImageProcessor().size == {"shortest_edge": 640, "longest_edge": 2560}


# ------------------------------------------------------------------------------------------------- label maps out


def test_label_maps_have_the_sizes_asked_for():
    model, ours = tiny_model(), processor()
    with torch.no_grad():
        outputs = model(**ours([picture(20, 30), picture(60, 40)], class_names=["sky", "sea"]))
    maps = ours.post_process_semantic_segmentation(outputs, [(7, 11), (5, 3)])
    assert [tuple(label_map.shape) for label_map in maps] == [(7, 11), (5, 3)]
    assert [label_map.dtype for label_map in maps] == [torch.int64] * 2
    resized = ours.post_process_semantic_segmentation(outputs)
    assert [tuple(label_map.shape) for label_map in resized] == [(40, 60), (60, 40)]
    sizes = ([[7, 11], [5, 3]], np.array([[7, 11], [5, 3]]), torch.tensor([[7, 11], [5, 3]]))
    for target_sizes in (*sizes, [(np.int64(7), np.uint8(11)), torch.tensor([5, 3])]):
        others = ours.post_process_semantic_segmentation(outputs, target_sizes)
        assert all(torch.equal(*pair) for pair in zip(others, maps, strict=True))
    with pytest.raises(ValueError, match="2 images, but 1 target sizes"):
        ours.post_process_semantic_segmentation(outputs, [(7, 11)])
    for wrong in ((7, 11), 7, "ab", [(7,), (5,)], [(7.5, 11), (5, 3)], [(True, 3), (5, 3)], [(float("nan"), 3)] * 2):
        with pytest.raises(ValueError, match=r"must be \(height, width\), in whole pixels, got .{1,60}$"):
            ours.post_process_semantic_segmentation(outputs, wrong)
    is_seen = torch.tensor([False, True])
    scored = ours.post_process_semantic_segmentation(outputs, [(7, 11), (5, 3)], is_seen=is_seen)
    assert [found.label_map.tolist() for found in scored] == [label_map.tolist() for label_map in maps]
    assert scored[0].seen_map.eq(1).all() and scored[0].unseen_map.eq(0).all()
    (found, _) = ours.post_process_semantic_segmentation(outputs, return_scores=True)
    assert found.seen_map is None and found.confidence.shape == (40, 60)


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_pixel_values_go_back_to_the_picture(options):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    processor = Zs3ImageProcessor(size={"shortest_edge": 40, "longest_edge": 56}, **options)
    rgb = processor.to_rgb(processor(images=Image.fromarray(pixels))["pixel_values"])[0, :, :40, :56]
    torch.testing.assert_close(rgb, torch.from_numpy(pixels).permute(2, 0, 1) / 255, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="without do_rescale"):
        Zs3ImageProcessor(do_rescale=False).to_rgb(torch.zeros(1, 3, 4, 4))
