"""Costs that are counted, not timed: numbers that go through the sigmoid, passes of the towers, crops, copies."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import pipeline

from label_maps_zs3 import semantic_map
from zs3.evaluation.counts import new_counts

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))


class Counts(TorchDispatchMode):
    """What PyTorch does in the block. sigmoids: numbers that go through the sigmoid. new: (dtype, numel) of each new
    tensor."""

    def __init__(self):
        super().__init__()
        self.sigmoids, self.new = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.sigmoid, torch.ops.aten.sigmoid_):
            self.sigmoids += result.numel()
        given = {value.data_ptr() for value in [*args, *(kwargs or {}).values()] if isinstance(value, Tensor)}
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.data_ptr() not in given:
                self.new.append((value.dtype, value.numel()))
        return result

    def maps(self, pixels: int) -> int:
        """New tensors of floating-point numbers with one entry for each of so many pixels."""
        return sum(dtype.is_floating_point and count == pixels for dtype, count in self.new)


def cells(queries: int = 24, classes: int = 30, side: int = 48) -> tuple[Tensor, Tensor]:
    """Proposals like a trained model's: one query owns each cell of a grid, with logits of 20 inside, -20 outside."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    owner = (y // 12) * 4 + x // 12  # 16 cells of 12 x 12 mask pixels
    masks = torch.stack([torch.where(owner == query, 20.0, -20.0) for query in range(queries)])
    return (8 * torch.randn(queries, classes)).softmax(-1)[None], masks[None]


def counted(step: Callable[[], object]) -> Counts:
    with Counts() as counts:
        step()
    return counts


def test_a_label_map_upsamples_only_tiles_that_are_not_decided():
    proposals = cells()
    queries, side = 24, 48
    tiles = (side // 4) ** 2
    bounds = 2 * tiles * queries  # the lowest and the highest probability in each tile
    upsampled = counted(lambda: semantic_map(*proposals, (192, 192))).sigmoids - bounds
    whole = queries * 192 * 192
    # A border of cells lies beside each third tile of a row, and the tiles on both its sides see it.
    undecided = tiles - 16  # in each cell of 3 x 3 tiles only the middle one sees a single query
    assert 0 < upsampled <= whole * undecided / tiles
    (probs, masks) = proposals
    alone = torch.where(torch.arange(queries)[:, None, None] == 3, 20.0, -20.0).expand(1, -1, side, side)
    assert counted(lambda: semantic_map(probs, alone, (192, 192))).sigmoids == bounds  # one query everywhere


def test_a_larger_picture_upsamples_no_more_masks():
    """Masks are upsampled to the model's input, their sums to the picture."""
    proposals = cells()
    small = counted(lambda: semantic_map(*proposals, (192, 192), image_sizes=[(192, 192)])).sigmoids
    large = counted(lambda: semantic_map(*proposals, (192, 192), image_sizes=[(960, 960)])).sigmoids
    assert large <= 1.5 * small  # tiles overlap by an input pixel


def test_confidences_cost_one_sigmoid_for_each_mask_pixel():
    proposals = cells()
    plain = counted(lambda: semantic_map(*proposals, (192, 192)))
    scored = counted(lambda: semantic_map(*proposals, (192, 192), return_scores=True)[0].confidence)
    assert scored.sigmoids - plain.sigmoids == proposals[1].numel()
    lazy = counted(lambda: semantic_map(*proposals, (192, 192), return_scores=True))
    assert lazy.maps(192 * 192) == plain.maps(192 * 192)  # nobody asked for a map of confidences


def test_the_other_group_costs_at_most_two_upsamplings_of_the_image():
    """The best class of the winner's own group is the winner: it is not looked for again."""
    probs, masks = cells()
    is_seen = torch.arange(30) % 5 > 0
    plain = counted(lambda: semantic_map(probs, masks, (192, 192))).sigmoids
    grouped = counted(lambda: semantic_map(probs, masks, (192, 192), is_seen=is_seen)).sigmoids
    once = masks.numel() * 16 + masks.numel()  # all input pixels; the grid of the confidences
    assert once <= grouped - plain <= 2 * once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, vision=True, clip_ensemble_weight=0.5, seen_class_names=["sky"])
    return str(folder)


@pytest.fixture
def segment(folder):
    return pipeline(model=folder, trust_remote_code=True)


@pytest.fixture
def passes(segment, monkeypatch):
    """The batch size of each pass of the network and of the image tower, and the number of labels embedded."""
    found = {"network": [], "tower": [], "labels": []}
    propose, encode = segment.model.propose, segment.model.encode_text

    def proposing(pixel_values, **options):
        found["network"].append(len(pixel_values))
        return propose(pixel_values, **options)

    def encoding(input_ids, **options):
        found["labels"].append(len(input_ids))
        return encode(input_ids, **options)

    monkeypatch.setattr(segment.model, "propose", proposing)
    monkeypatch.setattr(segment.model, "encode_text", encoding)
    (patches,) = [part for part in segment.model.vision_model.modules() if isinstance(part, torch.nn.Conv2d)]
    handle = patches.register_forward_pre_hook(lambda module, args: found["tower"].append(len(args[0])))
    yield found
    handle.remove()


def test_output_masks_makes_no_map_of_confidences_and_output_map_makes_one(segment):
    picture = PICTURE.resize((601, 307))  # more pixels than a strip has
    pixels = 601 * 307
    options = {"candidate_labels": ["sky", "sea"], "ensemble": "off"}
    proposals = segment.propose(picture, ensemble="off")
    masks = counted(lambda: segment(proposals, **options)).maps(pixels)
    mapped = counted(lambda: segment(proposals, output="map", **options)).maps(pixels)
    assert masks == 0 and mapped >= 1


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (8, [4])])
def test_the_windows_of_one_picture_go_through_the_network_in_batches(batch_size, batches, segment, passes):
    options = {"candidate_labels": ["sky", "sea"], "window": 72, "overlap": 8, "ensemble": "off"}
    segment(PICTURE, batch_size=batch_size, **options)
    assert passes["network"] == batches and passes["tower"] == []


def test_new_labels_need_no_network_and_known_labels_no_text_tower(segment, passes):
    segment.text_cache.folder = None
    proposals = segment.propose(PICTURE)
    assert len(passes["network"]) == 1 and passes["labels"] == []
    looks = len(passes["tower"])
    for labels, embedded in ((["sky", "sea"], [2]), (["sea", "dog"], [1]), (["dog", "sky"], [])):
        passes["labels"].clear()
        segment(proposals, candidate_labels=labels)
        assert passes["labels"] == embedded
    assert len(passes["network"]) == 1 and len(passes["tower"]) == looks


@pytest.mark.parametrize("view", ["crops", "single_pass", "mixed"])
def test_a_view_of_the_proposals_costs_its_number_of_passes(view, segment, passes):
    """For one pass 96 x 128 pixels are two windows. "mixed" has crops of up to 7 proposals; here there are 5."""
    proposals = segment.propose(PICTURE, ensemble=view)
    shown = int(proposals.outputs[0]["shown_to_clip"].sum())
    expected = {"crops": shown, "mixed": shown, "single_pass": 2}[view]
    assert shown > 0 and sum(passes["tower"]) == expected


def test_all_counters_of_an_evaluation_share_one_map_of_confidences():
    probs, masks = cells()
    is_seen = torch.arange(30) % 5 > 0
    counts = new_counts([str(name) for name in range(30)], is_seen, 255, "gzs3", 0.0, calibration=True)
    (found,) = semantic_map(probs, masks, (192, 192), is_seen=is_seen)
    label = torch.zeros(192, 192, dtype=torch.int64)
    first = counted(lambda: counts.update(found, found.label_map, label, "a"))
    again = counted(lambda: counts.update(found, found.label_map, label, "b"))
    assert again.maps(192 * 192) < first.maps(192 * 192)
