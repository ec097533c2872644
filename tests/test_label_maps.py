"""Label maps against Eq. 4 in float64, dense and in loops; on inputs made to be hard for the tile-bound argmax."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import confidences_zs3
import label_maps_zs3
from confidences_zs3 import working_dtype
from label_maps_zs3 import explain, semantic_map, semantic_scores
from outputs_zs3 import Zs3Output


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def proposals(batch: int = 2, queries: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, queries, classes).softmax(-1), 3 * torch.randn(batch, queries, 7, 9)


def literal_scores(class_probs: Tensor, mask_logits: Tensor, size, valid=None, target=None) -> Tensor:
    """(C, H, W): Eq. 4 in float64 in Mask2Former's literal order: masks up, sigmoid, einsum, padding cropped, then the
    class SCORES to the image's size."""
    probs = F.interpolate(mask_logits[None].double(), size=size, mode="bilinear", align_corners=False).sigmoid()
    scores = torch.einsum("qc,bqhw->bchw", class_probs.double(), probs)
    if target is not None:
        scores = scores[:, :, : valid[0], : valid[1]]
        scores = F.interpolate(scores, size=target, mode="bilinear", align_corners=False)
    return scores[0]


def assert_best(label_map: Tensor, scores: Tensor, equal: float = 1e-11) -> None:
    """The contract's "exact": within 1e-6 of the best; where one class is clearly the best, that one; clear is what two
    ways of summing in float64 agree on."""
    best = scores.amax(0)
    assert (best - scores.gather(0, label_map[None])[0]).max() <= min(1e-6, equal)
    clear = scores >= best - equal
    assert torch.equal(label_map[clear.sum(0) == 1], clear.int().argmax(0)[clear.sum(0) == 1])


# --------------------------------------------------------------------------------------------- what Eq. 4 says


def test_semantic_scores_are_equation_4_in_loops():
    class_probs, mask_logits = proposals()
    scores = semantic_scores(class_probs, mask_logits, (7, 9))  # the masks' own size: nothing to resize
    for image, label, y, x in ((0, 0, 0, 0), (1, 4, 6, 8), (0, 2, 3, 5), (1, 1, 5, 0)):
        masks = 1 / (1 + (-mask_logits[image, :, y, x].double()).exp())
        expected = sum(class_probs[image, q, label].double() * masks[q] for q in range(6))
        assert scores[image, label, y, x].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_semantic_map_is_the_argmax_in_float64(tile, monkeypatch):
    class_probs, mask_logits = proposals(classes=11)
    monkeypatch.setattr(label_maps_zs3, "TILE", tile)
    label_maps = semantic_map(class_probs, mask_logits, (28, 36))
    assert label_maps.shape == (2, 28, 36) and label_maps.dtype == torch.int64
    for image in range(2):
        assert_best(label_maps[image], literal_scores(class_probs[image], mask_logits[image], (28, 36)))
        assert len(torch.unique(label_maps[image])) > 2
    dense = semantic_scores(class_probs, mask_logits, (28, 36)).argmax(1)
    assert (label_maps == dense).float().mean() > 0.99


def kinds_of_probs(kind: str, queries: int, classes: int) -> Tensor:
    noise = torch.randn(queries, classes)
    if kind == "near_uniform":  # differences of a few float32 roundings
        return torch.full((queries, classes), 1 / classes) * (1 + 2.0**-22 * torch.randint(-2, 3, (queries, classes)))
    if kind == "one_hot":
        return F.one_hot(noise.argmax(1), classes).float()
    if kind == "copies":  # every class but the first few is an exact copy of one of them
        return noise[:, torch.arange(classes) % 3].softmax(-1)
    return (noise * {"soft": 1.0, "peaked": 8.0}[kind]).softmax(-1)


def kinds_of_masks(kind: str, queries: int, height: int, width: int) -> Tensor:
    noise = torch.randn(queries, height, width)
    if kind == "saturated":
        return 200 * noise.sign()
    if kind == "constant":
        return noise[:, :1, :1].expand(-1, height, width).clone()
    if kind == "absent":  # nothing anywhere: every sigmoid underflows in float32
        return -120 + noise
    return noise * {"soft": 0.3, "usual": 5.0, "steep": 50.0}[kind]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.sampled_from([1, 2, 3, 17, 255, 256, 257, 847]),
    queries=st.sampled_from([1, 2, 7, 30]),
    probs=st.sampled_from(["soft", "peaked", "near_uniform", "one_hot", "copies"]),
    masks=st.sampled_from(["soft", "usual", "steep", "saturated", "constant", "absent"]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    target=st.one_of(st.none(), st.tuples(st.integers(1, 41), st.integers(1, 41))),
    scored=st.booleans(),
)
def test_the_winner_is_that_of_float64_on_any_input(seed, classes, queries, probs, masks, grid, cut, target, scored):
    torch.manual_seed(seed)
    class_probs = kinds_of_probs(probs, queries, classes)
    mask_logits = kinds_of_masks(masks, queries, *grid)
    size = (4 * grid[0], 4 * grid[1])
    valid = tuple(max(1, side - less) for side, less in zip(size, cut, strict=True))
    options = {} if target is None else {"valid_sizes": [valid], "image_sizes": [target]}
    given = class_probs.clone(), mask_logits.clone()
    (result,) = semantic_map(class_probs[None], mask_logits[None], size, return_scores=scored, **options)
    assert torch.equal(class_probs, given[0]) and torch.equal(mask_logits, given[1])
    scores = literal_scores(class_probs, mask_logits, size, valid, target)
    assert_best(result.label_map if scored else result, scores)
    assert not scored or result.classes.tolist() == sorted(set(result.label_map.flatten().tolist()))


@pytest.mark.parametrize("probs", ["soft", "near_uniform", "peaked"])
@pytest.mark.parametrize("masks", ["usual", "soft"])
def test_five_thousand_classes(probs, masks):
    class_probs, mask_logits = kinds_of_probs(probs, 20, 5000), kinds_of_masks(masks, 20, 6, 5)
    (label_map,) = semantic_map(class_probs[None], mask_logits[None], (23, 19))
    assert_best(label_map, literal_scores(class_probs, mask_logits, (23, 19)))


@pytest.mark.parametrize("target", [(50, 61), (9, 40), (13, 11), (97, 23), (1, 30)])
def test_the_floor_of_an_input_pixel_is_below_the_best_of_the_pixels_that_use_it(target):
    """In loops over the taps of each image pixel; step 4 rests on it where the image is not the input."""
    class_probs, mask_logits = proposals(1, 6, 7)
    lengths = zip(mask_logits.shape[2:], (28, 36), (26, 33), target, strict=True)
    rows, columns = (label_maps_zs3._axis(*axis, label_maps_zs3.TILE) for axis in lengths)
    tiles = label_maps_zs3._bounds(class_probs[0], mask_logits[0], rows, columns)
    tile = torch.arange(len(tiles.low))
    runs = torch.rand(len(tile), 7) < 0.6
    runs[:, 0] = True
    part = label_maps_zs3._summed(tiles, tile, torch.arange(7).expand(len(tile), -1), runs)
    whole = label_maps_zs3._to_image(tiles, part).masked_fill(~runs[:, :, None], -torch.inf).amax(1)
    floor = label_maps_zs3._floor(tiles, part, whole).unflatten(1, part.scores.shape[2:])
    whole = whole.unflatten(1, (rows.to_image.shape[1], columns.to_image.shape[1]))
    used = 0
    for number in tile.tolist():
        down, across = (
            rows.to_image[number // len(columns.mask_index)],
            columns.to_image[number % len(columns.mask_index)],
        )
        for y, x in itertools.product(range(len(down)), range(len(across))):
            for i, j in itertools.product(down[y].nonzero()[:, 0].tolist(), across[x].nonzero()[:, 0].tolist()):
                assert floor[number, i, j] <= whole[number, y, x] + 1e-6
                used += 1
    assert used >= target[0] * target[1]


def test_a_class_that_is_no_querys_favourite_can_win():
    """Two queries overlap; each prefers a class of its own, and both like a third a little less."""
    class_probs = torch.tensor([[[0.5, 0.0, 0.45, 0.05], [0.0, 0.5, 0.45, 0.05]]])
    mask_logits = torch.full((1, 2, 8, 8), -20.0)
    mask_logits[0, 0, :, :6] = mask_logits[0, 1, :, 2:] = 20.0
    label_map = semantic_map(class_probs, mask_logits, (32, 32))[0]
    assert label_map[16, [1, 15, 30]].tolist() == [0, 2, 1]


@pytest.mark.parametrize("classes", [1, 3, 8, 33, 150])
def test_equal_scores_go_to_the_lowest_index(classes):
    class_probs, mask_logits = proposals(queries=13, classes=classes)
    doubled = torch.cat([class_probs, class_probs], dim=-1)  # each name twice
    label_maps = semantic_map(doubled, mask_logits, (29, 37))
    assert int(label_maps.max()) < classes
    assert torch.equal(label_maps, semantic_map(class_probs, mask_logits, (29, 37)))
    all_equal = torch.full_like(class_probs, 1 / classes)
    assert torch.all(semantic_map(all_equal, mask_logits, (29, 37)) == 0)


def test_a_float32_tie_is_decided_in_float64():
    """Two queries, sums 1 + 2^-30 and 1 + 2^-29: the same float32."""
    class_probs = torch.tensor([[[1.0, 1.0], [2.0**-30, 2.0**-29]]])
    label_map = semantic_map(class_probs, torch.full((1, 2, 4, 4), 40.0), (4, 4))  # sigmoid(40) is 1
    assert torch.all(label_map == 1)


def test_only_near_ties_are_decided_in_float64(monkeypatch):
    """The bound on rounding is no pretext to do everything in float64."""
    class_probs, mask_logits = proposals(1, 30, 200)
    exact, pixels = label_maps_zs3._exact_masks, []
    monkeypatch.setattr(label_maps_zs3, "_exact_masks", lambda *a: pixels.append(len(a[-1])) or exact(*a))
    semantic_map(class_probs, mask_logits, (280, 360))
    assert sum(pixels) < 0.005 * 280 * 360


# -------------------------------------------------------------------------------------------- geometry and batches


def test_label_maps_of_the_images_own_sizes_follow_the_literal_order():
    class_probs, mask_logits = proposals(batch=3)
    size, valid, targets = (28, 36), [(28, 30), (20, 36), (17, 19)], [(50, 61), (20, 36), (9, 7)]
    label_maps = semantic_map(class_probs, mask_logits, size, valid_sizes=torch.tensor(valid), image_sizes=targets)
    for image, label_map in enumerate(label_maps):
        scores = literal_scores(class_probs[image], mask_logits[image], size, valid[image], targets[image])
        assert label_map.shape == targets[image]
        assert_best(label_map, scores)
    dense = torch.randn(1, 6, 5).softmax(-1), torch.randn(1, 6, 7, 9)
    (without,) = semantic_map(*dense, size, image_sizes=[size])  # all of it is valid
    assert torch.equal(without, semantic_map(*dense, size)[0])


def test_an_image_is_the_same_alone_and_in_a_batch():
    class_probs, mask_logits = proposals(batch=3, classes=40)
    together = semantic_map(class_probs, mask_logits, (28, 36), return_scores=True)
    for image, result in enumerate(together):
        (alone,) = semantic_map(class_probs[[image]], mask_logits[[image]], (28, 36), return_scores=True)
        for name in ("label_map", "confidence", "margin"):
            assert torch.equal(getattr(result, name), getattr(alone, name))


# --------------------------------------------------------------------------------------------- scores and groups


def literal_confidences(class_probs: Tensor, mask_logits: Tensor) -> Tensor:
    """(C, h, w) float64, in loops over queries, from the sentences in GridConfidences."""
    classes = class_probs.shape[1]
    mean = total = covered = 0
    for p, logits in zip(class_probs.double(), mask_logits.double(), strict=True):
        divergence = sum(v * math.log(v * classes) for v in p.tolist())  # KL(p, U)
        weight = max(1e-6, divergence / math.log(classes)) if classes > 1 else 1.0
        mask = 1 / (1 + (-logits).exp())
        mean = mean + weight * p[:, None, None] * mask
        total, covered = total + weight * mask, covered + mask
    return mean / total * covered.clamp(max=1)


def at_pixel(values: Tensor, y: int, x: int, target, covered) -> float:
    """values (h, w) on the mask grid, its first `covered` (height, width) resized to `target`: bilinear, one pixel."""
    result, places = 0.0, []
    for at, side, share, most in zip((y, x), target, covered, values.shape, strict=True):
        place = min(max((at + 0.5) * share / side - 0.5, 0.0), most - 1.0)
        low = int(place)
        places.append([(low, 1 - (place - low)), (min(low + 1, most - 1), place - low)])
    for (row, row_weight), (column, column_weight) in itertools.product(*places):
        result += row_weight * column_weight * float(values[row, column])
    return result


@pytest.mark.parametrize("classes", [1, 2, 5, 300])
@pytest.mark.parametrize("target", [None, (50, 61), (9, 40)])
@pytest.mark.parametrize("strip", [1, 200, 2**16])
def test_confidences_and_margins_are_those_of_the_mask_grid(classes, target, strip, monkeypatch):
    monkeypatch.setattr(confidences_zs3, "STRIP", strip)
    monkeypatch.setattr(confidences_zs3, "CHUNK", 2 * strip)  # several blocks of the grid
    class_probs, mask_logits = proposals(classes=classes)
    size = target or (28, 36)
    options = {} if target is None else {"image_sizes": [size] * 2, "valid_sizes": [(28, 36), (21, 30)]}
    best = semantic_map(class_probs, mask_logits, (28, 36), return_scores=True, **options)
    for image, result in enumerate(best):
        covered = (21 / 4, 30 / 4) if target is not None and image else (7, 9)
        confidences = literal_confidences(class_probs[image], mask_logits[image])
        others = torch.zeros_like(confidences)
        for label in range(classes if classes > 1 else 0):
            others[label] = torch.cat([confidences[:label], confidences[label + 1 :]]).amax(0)
        assert result.confidence.dtype == result.margin.dtype == torch.float32
        assert result.confidence.shape == result.margin.shape == size
        for y, x in [(0, 0), (size[0] - 1, size[1] - 1), (0, size[1] - 1), (3, 31), (5, 17), (7, 2)]:
            label = int(result.label_map[y, x])
            confidence = at_pixel(confidences[label], y, x, size, covered)
            margin = at_pixel((confidences[label] - others[label]).clamp(min=0), y, x, size, covered)
            assert result.confidence[y, x].item() == pytest.approx(confidence, abs=1e-5)
            assert result.margin[y, x].item() == pytest.approx(margin, abs=1e-5)
        assert result.confidence.min() >= 0 and result.confidence.max() <= 1


@pytest.mark.parametrize("strip", [1, 100, 2**16])
def test_the_sums_of_regions_are_those_of_the_map(strip, monkeypatch):
    monkeypatch.setattr(confidences_zs3, "STRIP", strip)
    monkeypatch.setattr(confidences_zs3, "CHUNK", 8 * strip)
    class_probs, mask_logits = proposals(1, classes=12)
    (result,) = semantic_map(class_probs, mask_logits, (28, 36), return_scores=True)
    ids = torch.arange(28 * 36).reshape(28, 36) % 5 - 1
    counts, sums = result.totals(ids, 6)
    assert counts[5:].tolist() == sums[5:].tolist() == [0, 0]
    for place, own in enumerate(range(-1, 4)):
        values = result.confidence.double()[ids == own].tolist()
        assert counts[place] == len(values) and float(sums[place]) == pytest.approx(sum(values), rel=1e-6)


@pytest.mark.parametrize("classes", [4, 150, 847])
@pytest.mark.parametrize("undecided", [0, 5, 40])
def test_undecided_queries_take_no_confidence_away(classes, undecided):
    """One sure query, and others that cover the image too but hardly know a difference between the labels."""
    class_probs = (0.1 * torch.randn(1, 1 + undecided, classes)).softmax(-1)
    class_probs[0, 0] = 0.03 / (classes - 1)
    class_probs[0, 0, 2] = 0.97
    mask_logits = torch.full((1, 1 + undecided, 4, 4), 20.0)
    (result,) = semantic_map(class_probs, mask_logits, (16, 16), return_scores=True)
    assert (result.label_map == 2).all() and (result.confidence > 0.85).all()
    if undecided:
        (result,) = semantic_map(class_probs[:, 1:], mask_logits[:, 1:], (16, 16), return_scores=True)
        assert (result.confidence < 2 / classes).all()


def test_a_pixel_that_no_mask_covers_has_no_confidence():
    class_probs = torch.tensor([[[0.97, 0.03], [0.02, 0.98]]])
    (result,) = semantic_map(class_probs, torch.full((1, 2, 4, 4), -9.0), (16, 16), return_scores=True)
    assert (result.confidence < 1e-3).all()
    (alone,) = semantic_map(torch.ones(1, 1, 1), torch.tensor([[[[-9.0, 9.0]]]]), (4, 8), return_scores=True)
    assert alone.confidence[0, 0] < 1e-3 and alone.confidence[0, -1] > 0.99  # one label: whether a mask is there


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.sampled_from([1, 2, 17, 60, 257]),
    queries=st.sampled_from([1, 2, 7, 30]),
    probs=st.sampled_from(["soft", "peaked", "near_uniform", "one_hot", "copies"]),
    masks=st.sampled_from(["soft", "usual", "steep", "saturated", "constant", "absent"]),
    double=st.booleans(),
    share=st.one_of(st.sampled_from([0, 0.5, 1]), st.floats(0, 1)),
    target=st.one_of(st.none(), st.tuples(st.integers(1, 41), st.integers(1, 41))),
)
def test_confidences_and_groups_on_any_input(seed, classes, queries, probs, masks, double, share, target):
    torch.manual_seed(seed)
    class_probs, mask_logits = kinds_of_probs(probs, queries, classes), kinds_of_masks(masks, queries, 5, 6)
    if double:
        class_probs, mask_logits = class_probs.double(), mask_logits.double()
    is_seen = torch.rand(classes) < share
    options = {} if target is None else {"image_sizes": [target]}
    (result,) = semantic_map(class_probs[None], mask_logits[None], (20, 24), is_seen=is_seen, **options)
    scores = literal_scores(class_probs, mask_logits, (20, 24), (20, 24), target)
    best = []
    for members, label_map in ((is_seen, result.seen_map), (~is_seen, result.unseen_map)):
        own = scores.masked_fill(~members[:, None, None], -torch.inf)
        best.append(own.amax(0))
        if members.any():
            torch.testing.assert_close(own.gather(0, label_map[None])[0], best[-1], rtol=0, atol=1e-5)
        else:
            assert (label_map == -1).all()
    torch.testing.assert_close(result.gap.double(), best[0] - best[1], rtol=0, atol=1e-5)
    assert_best(result.label_map, scores)
    assert torch.equal(torch.where(is_seen[result.label_map], result.seen_map, result.unseen_map), result.label_map)
    assert ((result.confidence >= 0) & (result.confidence <= 1)).all()


def test_where_no_mask_is_only_near_ties_cost_float64(monkeypatch):
    class_probs = kinds_of_probs("soft", 30, 300)
    mask_logits = torch.full((30, 12, 12), -25.0) + torch.randn(30, 12, 12)
    exact, pixels = label_maps_zs3._exact_masks, []
    monkeypatch.setattr(label_maps_zs3, "_exact_masks", lambda *a: pixels.append(len(a[-1])) or exact(*a))
    (label_map,) = semantic_map(class_probs[None], mask_logits[None], (48, 48))
    assert_best(label_map, literal_scores(class_probs, mask_logits, (48, 48)))
    assert sum(pixels) < 0.02 * 48 * 48


def test_less_than_float32_products_are_not_relied_on():
    """Where somebody allows TF32 or bfloat16 in matrix products, the work is done in float64."""
    class_probs, mask_logits = proposals(1, 30, 200)
    expected = semantic_map(class_probs, mask_logits, (28, 36))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert working_dtype(class_probs, mask_logits) == torch.float64
        assert torch.equal(semantic_map(class_probs, mask_logits, (28, 36)), expected)
        (scored,) = semantic_map(class_probs, mask_logits, (28, 36), is_seen=torch.arange(200) % 2 == 0)
        assert torch.equal(scored.label_map, expected[0]) and scored.gap.dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)
    assert working_dtype(class_probs, mask_logits) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(semantic_map(class_probs, mask_logits, (28, 36)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_label_map():
    class_probs, mask_logits = proposals(2, 30, 300)
    is_seen = torch.arange(300) % 3 > 0
    on_gpu = semantic_map(class_probs.cuda(), mask_logits.cuda(), (28, 36), is_seen=is_seen.cuda())
    for found, expected in zip(on_gpu, semantic_map(class_probs, mask_logits, (28, 36), is_seen=is_seen), strict=True):
        assert torch.equal(found.label_map.cpu(), expected.label_map)
        for name in ("gap", "confidence", "margin"):
            torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=0, atol=1e-5)
        totals = found.totals(found.label_map, 300).cpu()
        torch.testing.assert_close(totals, expected.totals(expected.label_map, 300), rtol=1e-6, atol=1e-4)


# ------------------------------------------------------------------------------------------------ metamorphic


def test_permuting_labels_permutes_ids():
    class_probs, mask_logits = proposals(1, 20, 300)
    order = torch.randperm(300)
    permuted = semantic_map(class_probs[..., order], mask_logits, (28, 36))
    assert torch.equal(order[permuted], semantic_map(class_probs, mask_logits, (28, 36)))


def test_a_label_that_never_wins_changes_nothing():
    class_probs, mask_logits = proposals(1, 20, 50)
    loser = class_probs.amin(-1, keepdim=True) * 0.9
    with_loser = semantic_map(torch.cat([class_probs, loser], dim=-1), mask_logits, (28, 36))
    assert torch.equal(with_loser, semantic_map(class_probs, mask_logits, (28, 36)))


# ---------------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize("spoiled", ["mask_logits", "class_probs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(spoiled, value):
    tensors = dict(zip(("class_probs", "mask_logits"), proposals(), strict=True))
    tensors[spoiled].view(-1)[3] = value
    with pytest.raises(ValueError, match=spoiled):
        semantic_map(**tensors, size=(28, 36))


def test_shapes_that_do_not_fit_are_refused():
    class_probs, mask_logits = proposals()
    for wrong in ((class_probs[0], mask_logits), (class_probs[:, :3], mask_logits), (class_probs, mask_logits[0])):
        with pytest.raises(ValueError, match="must be"):
            semantic_map(*wrong, (28, 36))
    with pytest.raises(ValueError, match="needs queries, classes"):
        semantic_map(class_probs[..., :0], mask_logits, (28, 36))
    for options, message in (
        ({"image_sizes": [(5, 5)]}, "one size an image"),
        ({"image_sizes": [(5, 5), (0, 5)]}, "1 pixel or more"),
        ({"valid_sizes": [(5, 5), (5, 5)]}, "go with image_sizes"),
        ({"valid_sizes": [(5, 5), (29, 5)], "image_sizes": [(5, 5), (5, 5)]}, "inside the padded input"),
    ):
        with pytest.raises(ValueError, match=message):
            semantic_map(class_probs, mask_logits, (28, 36), **options)
    assert semantic_map(class_probs[:0], mask_logits[:0], (28, 36)).shape == (0, 28, 36)
    with pytest.raises(ValueError, match="is_seen"):
        semantic_map(class_probs, mask_logits, (28, 36), is_seen=torch.ones(3).bool())


# ------------------------------------------------------------------------------------------- explanations, ensemble


@pytest.mark.parametrize("image_size", [None, (40, 33)])
def test_an_explanation_adds_up_to_the_winners_score(image_size):
    class_logits, mask_logits = torch.randn(2, 6, 9), 3 * torch.randn(2, 6, 7, 9)
    outputs = Zs3Output(
        class_logits=class_logits, mask_logits=mask_logits, valid_sizes=torch.tensor([[28, 36], [20, 31]])
    )
    valid = outputs.valid_sizes[1].tolist()
    for y, x in ((0, 0), (7, 11), (19, 30)):
        found = explain(outputs, y, x, image=1, image_size=image_size)
        scores = literal_scores(outputs.class_probs[1], mask_logits[1], (28, 36), valid, image_size or tuple(valid))
        assert found.label_id == scores[:, y, x].argmax()
        assert found.score == pytest.approx(scores[:, y, x].max().item(), abs=1e-12)
        assert found.contributions.shape == (6,) and found.contributions.sum().item() == pytest.approx(found.score)
        expected = outputs.class_probs[1, :, found.label_id].double() * found.mask_probs
        torch.testing.assert_close(found.contributions, expected)
    assert outputs.explain(0, 0, image=1).contributions.requires_grad is False
    for y, x in ((40, 0), (-1, 0), (0, 1000), (True, 0), (0, 1.0), (float("nan"), 0)):
        with pytest.raises(ValueError, match="^[xy] must be "):
            outputs.explain(y, x, image=1, image_size=image_size)
    assert outputs.explain(np.int64(0), np.uint8(1), image=1).label_id == outputs.explain(0, 1, image=1).label_id


@pytest.mark.parametrize("seen", ["all", "none", "some"])
@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.4, -0.3, torch.inf, -torch.inf])
def test_a_bias_is_taken_off_the_scores_of_seen_classes(gamma, seen):
    class_probs, mask_logits = kinds_of_probs("soft", 12, 9), kinds_of_masks("usual", 12, 7, 9)
    is_seen = {"all": torch.ones(9), "none": torch.zeros(9), "some": torch.arange(9) % 2}[seen].bool()
    (result,) = semantic_map(class_probs[None], mask_logits[None], (28, 36), is_seen=is_seen)
    scores = literal_scores(class_probs, mask_logits, (28, 36))
    scores[is_seen] -= max(-1e3, min(gamma, 1e3))
    found = scores.gather(0, result.with_seen_bias(gamma)[None])[0]
    torch.testing.assert_close(found, scores.amax(0), rtol=0, atol=1e-5)


def test_of_equal_scores_the_lowest_index_wins_with_a_bias_too():
    maps = {"seen_map": torch.tensor([[1, 0, 2]]), "unseen_map": torch.tensor([[0, 1, 1]])}
    result = label_maps_zs3.SemanticMap(torch.zeros(1, 3), gap=torch.tensor([[0.5, 0.5, 0.75]]), **maps)
    assert result.with_seen_bias(0.5).tolist() == [[0, 0, 2]]
