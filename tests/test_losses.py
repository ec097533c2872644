"""Matching and losses: each equation against loops, permutations, transformers' own code, or numbers worked by hand."""

import math
import re
from itertools import permutations
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from forked import begin, ended
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from tiny import tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mask2former import modeling_mask2former as mask2former

from configuration_zs3 import Zs3Config
from losses_zs3 import (
    PADDING,
    UNMATCHED,
    Losses,
    PointLabels,
    Targets,
    assign,
    background_class_loss,
    bce_loss,
    choose_points,
    class_loss,
    dice_loss,
    focal_loss,
    grid_points,
    hungarian,
    kl_to_uniform,
    label_map_loss,
    label_points,
    mask_cost,
    mask_ids,
    match_labels,
    pad_ids,
    ranking_loss,
    sample_logits,
    zs3_losses,
)
from outputs_zs3 import class_probabilities, cosine_similarity


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_similarity(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape) - 1


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def close(actual: Tensor, expected: float | Tensor, **tolerances):
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), **{"rtol": 1e-5, "atol": 1e-6, **tolerances}
    )


# ----------------------------------------------------------------------------------------- class loss, Eq. 1-2, 5


def loop_class_loss(
    similarity: Tensor, target: Tensor, temperature: float, matched_weight: float, kl: str, class_norm: str
) -> float:
    cross_entropies, divergences = [], []
    classes = similarity.shape[-1]
    for image_scores, image_target in zip(similarity.tolist(), target.tolist(), strict=True):
        for scores, label in zip(image_scores, image_target, strict=True):
            probs = softmax([value / temperature for value in scores])
            if label >= 0:
                cross_entropies.append(-math.log(probs[label]))
            elif kl == "p_u":
                divergences.append(sum(p * math.log(p * classes) for p in probs if p > 0))
            else:
                divergences.append(sum(math.log(1 / classes / p) / classes for p in probs))
    if class_norm == "queries":
        weighted = [matched_weight * value for value in cross_entropies]
        weighted += [(1 - matched_weight) * value for value in divergences]
        return sum(weighted) / max(len(cross_entropies), len(target))
    mean = [sum(values) / max(len(values), 1) for values in (cross_entropies, divergences)]
    return matched_weight * mean[0] + (1 - matched_weight) * mean[1]


def loop_background_class_loss(
    similarity: Tensor, background: Tensor, target: Tensor, temperature: float, unmatched_weight: float
) -> float:
    total = weights = 0.0
    for image, query in torch.cartesian_prod(*(torch.arange(size) for size in target.shape)).tolist():
        row = [*similarity[image, query].tolist(), float(background[image, query])]
        probs = softmax([value / temperature for value in row])
        label = int(target[image, query])
        weight = unmatched_weight if label == UNMATCHED else 1.0
        total -= weight * math.log(probs[-1 if label == UNMATCHED else label])
        weights += weight
    return total / weights if weights else 0.0


SHAPES = {"batch": st.integers(1, 3), "queries": st.integers(1, 6), "classes": st.integers(1, 7)}


def random_target(batch: int, queries: int, classes: int) -> Tensor:
    """Labels of some queries; perhaps of none or of all."""
    labels = torch.randint(0, classes, (batch, queries))
    return labels.masked_fill(torch.rand(batch, queries) < 2 * torch.rand(()) - 0.5, UNMATCHED)


@settings(deadline=None, max_examples=60)
@given(
    **SHAPES,
    seed=st.integers(0, 2**16),
    kl=st.sampled_from(["p_u", "u_p"]),
    class_norm=st.sampled_from(["groups", "queries"]),
    temperature=st.floats(0.01, 1.0),
)
def test_class_loss_is_equation_5_in_loops(batch, queries, classes, seed, kl, class_norm, temperature):
    torch.manual_seed(seed)
    similarity, target = random_similarity(batch, queries, classes).double(), random_target(batch, queries, classes)
    loss = class_loss(similarity, target, temperature, 0.7, kl=kl, class_norm=class_norm)
    expected = loop_class_loss(similarity, target, temperature, 0.7, kl, class_norm)
    close(loss, expected, rtol=1e-9, atol=1e-9)


def test_the_sum_over_queries_is_a_change_of_two_weights():
    """Of 100 queries, 8 have a label: the KL's weight is multiplied by 92 / 8, that of the cross-entropy stays."""
    similarity = random_similarity(3, 100, 171).double()
    target = torch.full((3, 100), UNMATCHED)
    for row in target:
        row[torch.randperm(100)[:8]] = torch.randperm(171)[:8]
    of_queries = 2 * class_loss(similarity, target, 0.01, 0.6, class_norm="queries")
    share = 0.6 / (0.6 + 0.4 * 92 / 8)
    close(of_queries, 2 * 0.6 / share * class_loss(similarity, target, 0.01, share), rtol=1e-9)
    close(of_queries, 10.4 * class_loss(similarity, target, 0.01, 0.1154), rtol=1e-3)  # rounded


@settings(deadline=None, max_examples=60)
@given(**SHAPES, seed=st.integers(0, 2**16), weight=st.sampled_from([0.0, 0.1, 0.5]))
def test_background_class_loss_is_a_weighted_cross_entropy_in_loops(batch, queries, classes, seed, weight):
    torch.manual_seed(seed)
    similarity, target = random_similarity(batch, queries, classes).double(), random_target(batch, queries, classes)
    background = random_similarity(batch, queries).double()
    loss = background_class_loss(similarity, background, target, 0.05, unmatched_weight=weight)
    expected = loop_background_class_loss(similarity, background, target, 0.05, weight)
    close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("class_norm", ["groups", "queries"])
@pytest.mark.parametrize("kl", ["p_u", "u_p"])
def test_all_weight_on_the_matched_is_plain_cross_entropy(kl, class_norm):
    similarity = random_similarity(2, 5, 7)
    target = torch.tensor([[3, -1, -1, 0, 6], [-1, 2, 4, -1, -1]])
    expected = F.cross_entropy(similarity.flatten(0, 1) / 0.05, target.flatten(), ignore_index=UNMATCHED)
    close(class_loss(similarity, target, 0.05, matched_weight=1.0, kl=kl, class_norm=class_norm), expected)


def test_counts_of_a_larger_batch_divide_in_place_of_its_own():
    """A batch in two halves, each divided by half of the whole's counts, gives twice the whole's loss."""
    similarity, background = random_similarity(4, 5, 7), random_similarity(4, 5)
    target = torch.tensor([[3, -1, -1, 0, 6], [-1, 2, 4, -1, -1], [-1, -1, -1, -1, 5], [-1, -1, -1, -1, -1]])
    counts = {"num_matched": torch.tensor(6 / 2), "num_unmatched": torch.tensor(14 / 2)}
    halves = [
        background_class_loss(similarity[part], background[part], target[part], 0.1, **counts)
        for part in (slice(2), slice(2, 4))
    ]
    close(sum(halves), 2 * background_class_loss(similarity, background, target, 0.1))


@pytest.mark.parametrize("class_norm", ["groups", "queries"])
@pytest.mark.parametrize("matched", [[3, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [5, 5, 5, 5]])
def test_parts_of_any_size_add_up_to_the_class_loss_of_the_batch(matched, class_norm):
    """Images with these numbers of labels, in parts of one and of three; each part has half of the counts."""
    similarity, target = random_similarity(4, 5, 7), torch.full((4, 5), UNMATCHED)
    for row, count in zip(target, matched, strict=True):
        row[:count] = torch.randperm(7)[:count]
    counts = {"num_matched": torch.tensor(sum(matched) / 2), "num_unmatched": torch.tensor((20 - sum(matched)) / 2)}
    parts = [
        class_loss(similarity[part], target[part], 0.1, 0.6, class_norm=class_norm, **counts)
        for part in (slice(1), slice(1, 4))
    ]
    close(sum(parts), 2 * class_loss(similarity, target, 0.1, 0.6, class_norm=class_norm))


def test_class_loss_of_three_to_one_odds():
    similarity = 0.01 * torch.tensor([[[math.log(3), 0.0], [math.log(3), 0.0]]])  # p = (3/4, 1/4), twice
    target = torch.tensor([[0, UNMATCHED]])
    printed = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    other = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    close(class_loss(similarity, target, 0.01, 0.6), 0.6 * math.log(4 / 3) + 0.4 * printed)
    close(class_loss(similarity, target, 0.01, 0.6, kl="u_p"), 0.6 * math.log(4 / 3) + 0.4 * other)
    thrice = similarity.repeat(1, 3, 1), torch.tensor([[0, UNMATCHED, UNMATCHED, 0, UNMATCHED, UNMATCHED]])
    close(class_loss(*thrice, 0.01, 0.6), 0.6 * math.log(4 / 3) + 0.4 * printed)
    close(class_loss(*thrice, 0.01, 0.6, class_norm="queries"), 0.6 * math.log(4 / 3) + 2 * 0.4 * printed)


@pytest.mark.parametrize("class_norm", ["groups", "queries"])
def test_uniform_predictions_cost_nothing_on_unmatched_queries(class_norm):
    nobody = torch.full((2, 5), UNMATCHED)
    loss = class_loss(torch.zeros(2, 5, 7), nobody, temperature=0.01, matched_weight=0.6, class_norm=class_norm)
    torch.testing.assert_close(loss, torch.tensor(0.0))


@pytest.mark.parametrize("class_norm", ["groups", "queries"])
def test_a_group_without_queries_adds_nothing(class_norm):
    similarity = random_similarity(1, 3, 4)
    nobody, everybody = torch.full((1, 3), UNMATCHED), torch.tensor([[0, 1, 2]])
    assert class_loss(similarity, nobody, 0.1, matched_weight=1.0, class_norm=class_norm) == 0
    assert class_loss(similarity, everybody, 0.1, matched_weight=0.0, class_norm=class_norm) == 0
    for empty in (similarity[:0], nobody[:0]), (similarity[:, :0], nobody[:, :0]):  # no images, no queries
        assert class_loss(*empty, 0.1, matched_weight=0.6, class_norm=class_norm) == 0


def test_class_loss_refuses_an_unknown_choice():
    for choice in ({"kl": "reverse"}, {"class_norm": "images"}):
        with pytest.raises(ValueError, match=" must be .* got '(reverse|images)'"):
            class_loss(random_similarity(1, 2, 3), torch.full((1, 2), UNMATCHED), 0.1, 0.6, **choice)


def test_kl_to_uniform_is_the_sum_over_classes():
    log_probs = random_similarity(2, 3, 6).mul(4).log_softmax(-1)
    probs = log_probs.double().exp()
    expected = (probs * (probs / (1 / 6)).log()).sum(-1)
    close(kl_to_uniform(log_probs), expected)


@pytest.mark.parametrize("num_classes", [2, 20, 171])
def test_kl_to_uniform_lies_between_0_and_ln_c(num_classes):
    certain = torch.full((num_classes,), -300.0).index_fill(0, torch.tensor([1]), 0.0)
    close(kl_to_uniform(certain.log_softmax(-1)), math.log(num_classes))
    close(kl_to_uniform(torch.zeros(num_classes).log_softmax(-1)), 0.0)


def test_background_takes_its_share_of_the_probabilities():
    logits, background = torch.tensor([[[0.0, math.log(2)]]]), torch.tensor([[math.log(5)]])
    close(class_probabilities(logits, background), torch.tensor([[[1 / 8, 2 / 8]]]))
    close(class_probabilities(logits), torch.tensor([[[1 / 3, 2 / 3]]]))


# --------------------------------------------------------------------------------------------- ranking, Eq. 6-7


def loop_ranking_loss(similarity: Tensor, image_labels: Tensor, norm: str) -> float:
    batch, queries, classes = similarity.shape
    total = 0.0
    for image in range(batch):
        best = [max(similarity[image, q, c].item() for q in range(queries)) for c in range(classes)]
        positives = [c for c in range(classes) if image_labels[image, c] == 1]
        negatives = [c for c in range(classes) if image_labels[image, c] == 0]
        if positives and negatives:
            pairs = sum(math.log(1 + math.exp(best[k] - best[j])) for j in positives for k in negatives)
            total += pairs / (len(positives) * (len(negatives) if norm == "pairs" else 1))
    return total / batch


@settings(deadline=None, max_examples=60)
@given(**SHAPES, seed=st.integers(0, 2**16), norm=st.sampled_from(["positives", "pairs"]))
def test_ranking_loss_is_equations_6_and_7_in_loops(batch, queries, classes, seed, norm):
    torch.manual_seed(seed)
    similarity = random_similarity(batch, queries, classes).double()
    image_labels = torch.randint(-1, 2, (batch, classes))
    loss = ranking_loss(similarity, image_labels == 1, image_labels == 0, norm=norm)
    close(loss, loop_ranking_loss(similarity, image_labels, norm), rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor that any operation makes, those of the backward pass included."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_ranking_loss_makes_no_more_than_the_pairs_of_an_image():
    """1,047 names: B x C x C values would be 8 x 1,096,209."""
    similarity = random_similarity(8, 1, 1047).requires_grad_()
    positive = torch.zeros(8, 1047, dtype=torch.bool)
    positive[:, :14] = True
    with Largest() as largest:
        ranking_loss(similarity, positive, ~positive).backward()
    assert largest.size == 14 * 1033 and similarity.grad.isfinite().all()


def test_ranking_loss_of_equal_scores():
    similarity = torch.full((1, 2, 3), 0.5)
    positive, negative = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    close(ranking_loss(similarity, positive, negative), 2 * math.log(2))
    close(ranking_loss(similarity, positive, negative, norm="pairs"), math.log(2))


def test_only_the_best_query_of_a_known_label_gets_a_ranking_gradient():
    similarity = random_similarity(1, 5, 4).requires_grad_()
    image_labels = torch.tensor([[1, 0, -1, 0]])
    ranking_loss(similarity, image_labels == 1, image_labels == 0).backward()
    expected = torch.zeros(5, 4)
    for label, sign in ((0, -1), (1, 1), (3, 1)):
        expected[similarity[0, :, label].argmax(), label] = sign
    torch.testing.assert_close(similarity.grad[0].sign(), expected)


def test_ranking_loss_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="mean"):
        ranking_loss(random_similarity(1, 2, 3), torch.zeros(1, 3).bool(), torch.zeros(1, 3).bool(), norm="mean")


# ------------------------------------------------------------------------------------- doses, docs/method.md


def kl_dose(class_norm: str, queries: int, present: int) -> float:
    """The weight of the mean KL over that of the mean cross-entropy where `present` queries have labels."""
    scores, target = torch.tensor([1.0, 0.0]), torch.zeros(1, queries, dtype=torch.int64)
    target[:, present:] = UNMATCHED
    parts = [class_loss(scores.expand(1, queries, 2), target, 1, share, class_norm=class_norm) for share in (0, 1)]
    share, log_probs = Zs3Config().matched_weight, scores.log_softmax(0)
    of_kl, of_cross_entropy = parts[0] / kl_to_uniform(log_probs), parts[1] / -log_probs[0]
    return float((1 - share) * of_kl / (share * of_cross_entropy))


def ranking_pull(names: int, present: int, gap: float) -> float:
    """The size of Eq. 6's gradient on the score of a positive label, whose score is higher than others by the gap."""
    positive = torch.arange(names)[None] < present
    scores = (gap * positive.float())[:, None].requires_grad_()  # of one query
    ranking_loss(scores, positive, ~positive).backward()
    return -float(scores.grad[0, 0, 0])


def test_the_doses_of_the_method_are_those_of_the_losses():
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| .*: (\d+) names, (\d+) present, Q = (\d+) \| (.*) \|$", page, re.MULTILINE)
    rows = [(*map(int, sizes), cells) for *sizes, cells in found]
    for names, present, queries, cells in rows:
        doses = [f"{kl_dose(norm, queries, present):.2f}" for norm in ("groups", "queries")]
        doses += [f"{ranking_pull(names, present, gap):.1f}" for gap in (0, 0.1)]
        assert cells == " | ".join(doses)
    large, small = rows
    ratio, config = kl_dose("queries", large[2], large[1]), Zs3Config()
    share, weight = 1 / (1 + ratio), config.class_weight * config.matched_weight * (1 + ratio)
    for told in (f"matched_weight: {share:.4f}", f"class_weight: {weight:.1f}", f"the dose {ratio:.2f}"):
        assert told in page
    assert f"rank_weight: {ranking_pull(*large[:2], 0) / ranking_pull(*small[:2], 0):.0f}" in page


# ------------------------------------------------------------------------------------------------- mask losses


def loop_mask_losses(logits: Tensor, targets: Tensor, weight: Tensor, num_masks: float) -> dict[str, float]:
    losses = {"dice": 0.0, "bce": 0.0, "focal": 0.0}
    for row in zip(logits.tolist(), targets.tolist(), weight.tolist(), strict=True):
        overlap = total = bce = focal = weights = 0.0
        for logit, t, w in zip(*row, strict=True):
            p = 1 / (1 + math.exp(-logit))
            cross_entropy = -t * math.log(p) - (1 - t) * math.log(1 - p)
            p_miss = t * (1 - p) + (1 - t) * p
            overlap += w * 2 * p * t
            total += w * (p + t)
            bce += w * cross_entropy
            focal += w * (t * 0.25 + (1 - t) * 0.75) * p_miss**2 * cross_entropy
            weights += w
        losses["dice"] += 1 - (overlap + 1) / (total + 1)
        losses["bce"] += bce / weights if weights else 0.0
        losses["focal"] += focal / weights if weights else 0.0
    return {name: loss / num_masks for name, loss in losses.items()}


@settings(deadline=None, max_examples=60)
@given(
    masks=st.integers(0, 4),
    points=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    soft=st.booleans(),
    num_masks=st.floats(0.5, 9),
)
def test_mask_losses_are_their_equations_in_loops(masks, points, seed, soft, num_masks):
    torch.manual_seed(seed)
    logits = 4 * torch.randn(masks, points, dtype=torch.float64)
    targets, weight = (
        torch.rand(2, masks, points, dtype=torch.float64) if soft else torch.rand(2, masks, points).round()
    )
    expected = loop_mask_losses(logits, targets.double(), weight.double(), num_masks)
    for name, loss in {"dice": dice_loss, "bce": bce_loss, "focal": focal_loss}.items():
        value = loss(logits, targets.double(), num_masks, weight=weight.double())
        close(value, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [dice_loss, bce_loss, focal_loss])
def test_gradients_of_the_mask_losses_are_differences(loss):
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    targets, weight = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    weight[0, :3] = 0
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, 3.0, weight=weight), logits)


@pytest.mark.parametrize("kl", ["p_u", "u_p"])
def test_gradients_of_the_class_and_ranking_losses_are_differences(kl):
    similarity = random_similarity(2, 4, 5).double().requires_grad_()
    background = random_similarity(2, 4).double().requires_grad_()
    target = torch.tensor([[3, -1, -1, 0], [-1, -1, -1, -1]])
    image_labels = torch.tensor([[1, 0, 0, 1, -1], [0, 0, 0, 0, 0]])
    for class_norm in ("groups", "queries"):
        for some in (target, target[1:], target.clamp(min=0)):  # few, none and all are matched
            switches = {"kl": kl, "class_norm": class_norm}
            inputs = similarity[: len(some)]
            assert torch.autograd.gradcheck(lambda s, t=some, k=switches: class_loss(s, t, 0.2, 0.6, **k), inputs)
    assert torch.autograd.gradcheck(lambda s, b: background_class_loss(s, b, target, 0.2), (similarity, background))
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, image_labels == 1, image_labels == 0), similarity)


def test_gradients_of_sampled_logits_are_differences():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    points = 2 * torch.rand(2, 7, 2, dtype=torch.float64) - 1
    assert torch.autograd.gradcheck(lambda x: sample_logits(x, points), logits)


def test_mask_losses_without_weights_are_transformers():
    logits, targets = 3 * torch.randn(3, 50), torch.rand(3, 50).round()
    close(dice_loss(logits, targets, 3), mask2former.dice_loss(logits, targets, 3))
    close(bce_loss(logits, targets, 3), mask2former.sigmoid_cross_entropy_loss(logits, targets, 3))


def test_focal_loss_of_an_undecided_point():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    close(focal_loss(zero, one, 1), 0.25 * 0.25 * math.log(2))  # alpha x (1 - p)^gamma x CE
    close(focal_loss(zero, zero, 1), 0.75 * 0.25 * math.log(2))
    close(focal_loss(zero, one, 1, alpha=0.4, gamma=3.0), 0.4 * 0.125 * math.log(2))


@pytest.mark.parametrize("loss", [dice_loss, bce_loss, focal_loss])
def test_an_ignored_point_is_as_good_as_none(loss):
    logits, targets = torch.randn(2, 9), torch.rand(2, 9).round()
    weight = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1, 0]).repeat(2, 1)
    keep = weight[0] == 1
    close(loss(logits, targets, 2, weight=weight), loss(logits[:, keep], targets[:, keep], 2))


@pytest.mark.parametrize("loss", [dice_loss, bce_loss, focal_loss])
def test_mask_losses_of_nothing_are_zero(loss):
    nothing = torch.zeros(0, 7, requires_grad=True)
    value = loss(nothing, torch.zeros(0, 7), 1, weight=torch.zeros(0, 7))
    value.backward()
    assert value == 0
    logits = torch.randn(2, 7, requires_grad=True)
    value = loss(logits, torch.ones(2, 7), 1, weight=torch.zeros(2, 7))  # all points ignored
    value.backward()
    assert value == 0 and torch.all(logits.grad == 0)


@pytest.mark.parametrize("loss", [dice_loss, bce_loss, focal_loss])
def test_mask_losses_and_their_gradients_are_finite_at_large_logits(loss):
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    value = loss(logits, torch.tensor([[1.0, 0, 0, 1]]), 1)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


# --------------------------------------------------------------------------------------------------- matching


def cheapest(cost: Tensor) -> float:
    """The total of the cheapest one-to-one assignment of cost (Q, M), by trying all."""
    rows, columns = cost.shape
    if rows < columns:
        return cheapest(cost.T)
    return min(sum(cost[q, m].item() for m, q in enumerate(chosen)) for chosen in permutations(range(rows), columns))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (4, 0), (1, 3)])
def test_hungarian_is_the_best_of_all_permutations(shape):
    cost = torch.randn(shape)
    match = hungarian(cost)
    assert len(match.query) == min(shape) == len(set(match.query.tolist())) == len(set(match.target.tolist()))
    close(cost[match.query, match.target].sum(), cheapest(cost) if min(shape) else 0.0)


def test_hungarian_avoids_what_is_not_a_number():
    cost = torch.tensor([[math.nan, 1.0], [0.0, math.inf]])
    match = hungarian(cost)
    assert match.target[match.query.argsort()].tolist() == [1, 0]


@pytest.mark.parametrize("queries", [5, 2])
def test_label_matching_is_the_best_of_all_permutations(queries):
    similarity = random_similarity(3, queries, 6)
    image_labels = torch.tensor([[1, 0, 1, -1, 1, 0], [0, 0, 0, -1, -1, 0], [1, 1, 1, 0, -1, 0]])
    target = match_labels(similarity, image_labels)
    assert target.dtype == torch.int64
    for image in range(3):
        present = (image_labels[image] == 1).nonzero().squeeze(1)
        given = [(q, c) for q, c in enumerate(target[image].tolist()) if c != UNMATCHED]
        assert len(given) == min(queries, len(present))
        assert {c for _, c in given} <= set(present.tolist()) and len({c for _, c in given}) == len(given)
        total = -sum(similarity[image, q, c].item() for q, c in given)
        best = cheapest(-similarity[image][:, present]) if len(present) else 0.0
        assert total == pytest.approx(best, abs=1e-5)


def random_labels(batch: int, size: tuple[int, int] = (12, 16), ids=(-1, 0, 3, 5)) -> Tensor:
    """Label maps (B, H, W) of rectangles."""
    labels = torch.full((batch, *size), ids[-1])
    for label_map in labels:
        for value in ids[:-1]:
            top, left = (int(torch.randint(0, side // 2, ())) for side in size)
            label_map[top : top + size[0] // 2, left : left + size[1] // 2] = value
    return labels


def test_targets_are_the_distinct_ids_of_each_image():
    labels = torch.tensor([[[3, -1], [7, 3]], [[-1, -1], [-1, -1]], [[0, 0], [0, 1]], [[2**40, 9], [9, 2**40]]])
    assert [ids.tolist() for ids in mask_ids(labels)] == [[3, 7], [], [0, 1], [9, 2**40]]


def sample(values: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (H, W) at points (P, 2) in [-1, 1] -> (P,)."""
    return F.grid_sample(
        values.double()[None, None], points.double()[None, :, None], padding_mode="border", align_corners=False
    ).flatten()  # transformers' own call, except for the half pixel at the border


def pairs_in_loops(logits: Tensor, label_map: Tensor, points: Tensor, ignored_pixels: str) -> tuple[Tensor, Tensor]:
    """BCE and dice (Q, M) of mask logits (Q, h, w) and every id of a label map, from explicit masks."""
    ids = sorted(set(label_map[label_map >= 0].tolist()))
    bce, dice = torch.zeros(2, len(logits), len(ids), dtype=torch.float64)
    valid = sample(label_map >= 0, points) if ignored_pixels == "ignore" else torch.ones(len(points)).double()
    for q, logit in enumerate(logits):
        probs = sample(logit, points).sigmoid()
        for m, value in enumerate(ids):
            truth = sample(label_map == value, points) / valid.clamp(min=1e-9)
            entropy = -(truth * probs.log() + (1 - truth) * (1 - probs).log())
            bce[q, m] = (valid * entropy).sum() / valid.sum()
            dice[q, m] = 1 - (2 * (valid * probs * truth).sum() + 1) / ((valid * (probs + truth)).sum() + 1)
    return bce, dice


@pytest.mark.parametrize("ignored_pixels", ["ignore", "negative"])
def test_mask_costs_are_those_of_explicit_masks(ignored_pixels):
    logits, labels = 2 * torch.randn(2, 5, 6, 8), random_labels(2)
    labels[1][labels[1] == 3] = 0  # fewer masks than the first
    points, ids = 2 * torch.rand(2, 40, 2) - 1, mask_ids(labels)
    truth = label_points(labels, pad_ids(ids, labels.device), points, ignored_pixels=ignored_pixels)
    costs = mask_cost(sample_logits(logits, points), truth, 5.0, 2.0)
    assert [len(values) for values in ids] == [3, 2] and costs.shape == (2, 5, 3)
    for cost, values, *image in zip(costs, ids, logits, labels, points, strict=True):
        bce, dice = pairs_in_loops(*image, ignored_pixels)
        close(cost[:, : len(values)], 5 * bce + 2 * dice)


def test_mask_costs_on_the_grid_are_those_at_the_pixels_centres():
    logits, labels = 2 * torch.randn(1, 5, 6, 8), random_labels(1, (24, 32))
    points = grid_points(6, 8, logits.device)[None]
    close(sample_logits(logits, points), logits.flatten(2))
    truth = label_points(labels, mask_ids(labels)[0][None], points)
    middle = torch.cat([labels[:, y::4, x::4] for y in (1, 2) for x in (1, 2)]).flatten(1)
    for value, inside in zip((0, 3, 5), truth.inside[0], strict=True):  # of 4 x 4 pixels the middle four
        close(inside, (middle == value).float().mean(0))
    close(truth.weight[0], (middle >= 0).float().mean(0))


def test_joint_matching_is_transformers():
    logits, class_logits = 2 * torch.randn(1, 6, 16, 16), torch.randn(1, 6, 9)  # 8 classes and background
    labels = torch.randint(0, 8, (2, 2)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    (ids,) = mask_ids(labels[None])
    masks = torch.stack([(labels == value).float() for value in ids])
    matcher = mask2former.Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=400)
    torch.manual_seed(1)
    ((query, target),) = matcher(logits, class_logits, [masks], [ids])
    torch.manual_seed(1)
    points = 2 * torch.rand(1, 400, 2) - 1
    probs = class_probabilities(class_logits[0, :, :-1], class_logits[0, :, -1])
    truth = label_points(labels[None], ids[None], points)
    (cost,) = mask_cost(sample_logits(logits, points), truth, 5.0, 5.0)
    match, label = assign(cost - 2 * probs[:, ids], torch.zeros(6, 0), ids, ids[:0], "joint", 2.0)
    assert dict(zip(match.target.tolist(), match.query.tolist(), strict=True)) == dict(
        zip(target.tolist(), query.tolist(), strict=True)
    )
    assert label[match.query].tolist() == ids[match.target].tolist()


def test_unpaired_matching_is_two_assignments():
    mask, labels = torch.randn(5, 3), torch.randn(5, 2)
    match, label = assign(mask, labels, torch.tensor([0, 4, 7]), torch.tensor([4, 6]), "unpaired", 2.0)
    close(mask[match.query, match.target].sum(), cheapest(mask))
    assert sorted(value for value in label.tolist() if value != UNMATCHED) == [4, 6]
    given_to = [label.tolist().index(value) for value in (4, 6)]
    close(labels[given_to[0], 0] + labels[given_to[1], 1], cheapest(labels))


def test_joint_matching_gives_left_over_queries_the_labels_without_a_mask():
    ids, present = torch.tensor([0, 4]), torch.tensor([0, 2, 4, 5])
    mask, labels = torch.randn(5, 2), torch.randn(5, 4)
    labels[mask.argmin(0), 3] = -9.0  # their favourites are taken
    match, label = assign(mask, labels, ids, present, "joint", 2.0)
    close(mask[match.query, match.target].sum(), cheapest(mask))
    assert label[match.query].tolist() == ids[match.target].tolist()
    free = [q for q in range(5) if q not in match.query.tolist()]
    given_to = [label.tolist().index(value) for value in (2, 5)]
    assert set(given_to) <= set(free) and sum(value == UNMATCHED for value in label.tolist()) == 1
    close(labels[given_to[0], 1] + labels[given_to[1], 3], cheapest(labels[free][:, [1, 3]]))


def test_hybrid_matching_is_one_assignment_of_masks_and_labels():
    ids, present = torch.tensor([0, 4]), torch.tensor([0, 2, 4, 5])
    for _ in range(10):
        mask, labels = torch.randn(5, 2), torch.randn(5, 4)
        match, label = assign(mask, labels, ids, present, "hybrid", 3.0)
        assert label[match.query].tolist() == ids[match.target].tolist()
        given_to = [label.tolist().index(value) for value in (2, 5)]
        total = mask[match.query, match.target].sum() + 3 * (labels[given_to[0], 1] + labels[given_to[1], 3])
        close(total, cheapest(torch.cat([mask, 3 * labels[:, [1, 3]]], dim=1)))


def test_a_label_of_strong_similarity_takes_a_query_from_a_mask_in_hybrid_matching_only():
    mask = torch.tensor([[0.0], [0.5], [9.0]])  # query 0 draws the mask a little better than query 1
    similarity = torch.tensor([[0.9], [-0.9], [-0.9]])  # and is the only one that means the label without a mask
    arguments = (mask, -similarity, torch.tensor([0]), torch.tensor([3]))
    assert assign(*arguments, "joint", 2.0)[1].tolist() == [0, 3, UNMATCHED]
    assert assign(*arguments, "hybrid", 2.0)[1].tolist() == [3, 0, UNMATCHED]


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
def test_more_masks_and_labels_than_queries(matching):
    ids, present = torch.arange(4), torch.arange(1, 7)
    match, label = assign(torch.randn(3, 4), torch.randn(3, 6), ids, present, matching, 2.0)
    assert len(set(match.query.tolist())) == len(match.query) == 3 and (label != UNMATCHED).all()
    if matching != "unpaired":
        assert label[match.query].tolist() == ids[match.target].tolist()


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
def test_every_mask_is_matched_where_its_costs_are_not_numbers(matching):
    """Or decoder outputs would differ in the number of their masks."""
    cost = torch.full((3, 2), torch.nan)
    match, _ = assign(cost, torch.randn(3, 4), torch.arange(2), torch.arange(2, 6), matching, 2.0)
    assert sorted(match.target.tolist()) == [0, 1]


# ---------------------------------------------------------------------------------------------- point sampling


def test_labels_at_points_are_bilinear_samples_of_explicit_masks():
    labels = random_labels(2)
    labels[1][labels[1] == 3] = 0  # fewer masks than the first
    ids = mask_ids(labels)
    points = 2 * torch.rand(2, 500, 2) - 1
    truth = label_points(labels, pad_ids(ids, labels.device), points)
    assert [len(values) for values in ids] == [3, 2]
    for image, values in enumerate(ids):
        close(truth.weight[image], sample(labels[image] >= 0, points[image]), atol=1e-5)
        for value, inside in zip(values, truth.inside[image, : len(values)], strict=True):
            close(inside, sample(labels[image] == value, points[image]), atol=1e-5)
    assert (truth.inside[1, 2] == 0).all()
    assert truth.weight.amin() == 0 and truth.weight.amax() == pytest.approx(1)  # both kinds were met
    negative = label_points(labels, pad_ids(ids, labels.device), points, ignored_pixels="negative")
    close(negative.weight, torch.ones(2, 500), atol=1e-5)
    assert torch.equal(negative.inside, truth.inside)


def test_a_half_ignored_point_has_half_the_weight():
    points = 2 * torch.tensor([[[0.5, 0.5], [0.25, 0.5], [0.9, 0.5]]]) - 1
    truth = label_points(torch.tensor([[[4, -1], [4, -1]]]), torch.tensor([[4]]), points)
    close(truth.weight, torch.tensor([[0.5, 1.0, 0.0]]))
    close(truth.inside[0], torch.tensor([[0.5, 1.0, 0.0]]))


def test_chosen_points_are_the_most_uncertain_and_the_uniform_ones():
    logits, image, points = torch.randn(3, 8, 8), torch.tensor([0, 0, 1]), 2 * torch.rand(2, 50, 2) - 1
    truth = PointLabels(points, torch.ones(2, 50), torch.ones(2, 2, 50))
    chosen = choose_points(logits, image, truth, 20, 0.75)  # 45 candidates, 15 of them, and the last 5
    assert chosen.shape == (3, 20)
    for row, logit, own in zip(chosen.tolist(), logits, points[image], strict=True):
        certainty = sample(logit, own[:45]).abs()
        assert set(row[:15]) == set(certainty.argsort()[:15].tolist()) and row[15:] == [45, 46, 47, 48, 49]


def test_uncertain_points_avoid_ignored_pixels():
    labels = torch.full((1, 16, 16), -1)
    labels[..., :8] = 2
    logits = torch.where(torch.arange(16) < 8, 9.0, 0.0).expand(1, 16, 16)  # uncertain where it is ignored
    image, ids = torch.tensor([0]), torch.tensor([[2]])
    truth = label_points(labels, ids, 2 * torch.rand(1, 120, 2) - 1)
    chosen = choose_points(logits, image, truth, 40, 1.0)
    assert (truth.weight[0, chosen.long()] > 0).all()
    truth = label_points(labels, ids, torch.rand(1, 120, 2))  # nothing but ignored pixels: taken then
    assert choose_points(logits, image, truth, 40, 1.0).shape == (1, 40)


# ------------------------------------------------------------------------------------- Eq. 8, all decoder outputs


def criterion(
    mask_logits: list[Tensor],
    similarity: list[Tensor],
    labels: Tensor,
    image_labels: Tensor,
    config: Zs3Config,
    background: list[Tensor] | None = None,
) -> Losses:
    background = [None] * len(similarity) if background is None else background
    return zs3_losses(mask_logits, similarity, background, Targets(labels, mask_ids(labels), image_labels), config)


def loop_label_map_loss(
    logits: Tensor, probs: Tensor, label_map: Tensor, image_labels: Tensor, points: Tensor, pixels: str
) -> float:
    """Of an image, point by point: logits (Q, h, w), probs (Q, C) of Eq. 2, the nearest pixel's label."""
    height, width = label_map.shape
    masks = [sample(query, points).sigmoid() for query in logits]
    ids, losses = set(label_map.flatten().tolist()), []
    for place, (x, y) in enumerate(points.tolist()):
        label = int(label_map[int((y + 1) / 2 * height), int((x + 1) / 2 * width)])
        allowed = [label] if label >= 0 else []
        if label == -1 and pixels == "all":
            allowed = [c for c, value in enumerate(image_labels.tolist()) if value != 0 and c not in ids]
        scores = [sum(float(p[c] * m[place]) for p, m in zip(probs, masks, strict=True)) for c in range(probs.shape[1])]
        if allowed:
            losses.append(-math.log(sum(scores[c] for c in allowed) / sum(scores)))
    return sum(losses) / max(len(losses), 1)


def literal_terms(
    mask_logits: list[Tensor],
    similarity: list[Tensor],
    background: list[Tensor],
    labels: Tensor,
    image_labels: Tensor,
    config: Zs3Config,
    match_points: Tensor,
    points: Tensor,
) -> dict[str, float]:
    """The terms of Eq. 8 in loops over outputs, images, masks and points, from explicit masks, in float64."""
    terms = dict.fromkeys(("class", "mask", "dice", "rank", *(["label_map"] if config.label_map_weight else [])), 0.0)
    num_masks = sum(len(set(label_map[label_map >= 0].tolist())) for label_map in labels)
    num_uncertain = int(config.importance_sample_ratio * config.train_num_points)
    num_candidates = points.shape[1] - config.train_num_points + num_uncertain
    for logits, cosine, back in zip(mask_logits, similarity, background, strict=True):
        targets = torch.full(cosine.shape[:2], UNMATCHED)
        for image, label_map in enumerate(labels):
            ids = sorted(set(label_map[label_map >= 0].tolist()))
            bce, dice = pairs_in_loops(logits[image], label_map, match_points[image], config.ignored_pixels)
            cost = config.mask_weight * bce + config.dice_weight * dice
            scores = cosine[image].double()
            if config.matching != "unpaired":
                every = (
                    torch.cat([scores, back[image][:, None]], dim=1)
                    if config.class_loss != "background_aware"
                    else scores
                )
                cost -= config.class_weight * (every / config.class_temperature).softmax(1)[:, ids]
            present = [c for c, value in enumerate(image_labels[image].tolist()) if value == 1]
            alone = [c for c in present if c not in ids]
            if config.matching == "hybrid":
                columns = torch.cat([cost - 1000, -config.class_weight * scores[:, alone]], dim=1)  # masks first
                every_pair = list(zip(*linear_sum_assignment(columns), strict=True))
                pairs = [(q, m) for q, m in every_pair if m < len(ids)]
                for q, column in every_pair:
                    targets[image, q] = [*ids, *alone][column]
            else:
                pairs = list(zip(*linear_sum_assignment(cost), strict=True))
                free, names = list(range(len(scores))), present
                if config.matching == "joint":
                    for q, m in pairs:
                        targets[image, q] = ids[m]
                    free, names = [q for q in free if q not in dict(pairs)], alone
                for row, column in zip(*linear_sum_assignment(-scores[free][:, names]), strict=True):
                    targets[image, free[row]] = names[column]
            for q, m in pairs:
                valid = sample(label_map >= 0, points[image])
                if config.ignored_pixels == "negative":
                    valid = torch.ones_like(valid)
                truth = sample(label_map == ids[m], points[image]) / valid.clamp(min=1e-9)
                sampled = sample(logits[image, q], points[image])
                certainty = sampled[:num_candidates].abs().masked_fill(valid[:num_candidates] == 0, torch.inf)
                nearly = certainty.sort().values[num_uncertain - 1 : num_uncertain + 1]  # the last that is in, the next
                assume(num_uncertain in (0, num_candidates) or not nearly[1] - nearly[0] < 1e-5)  # either would do
                places = [*certainty.argsort()[:num_uncertain].tolist(), *range(num_candidates, len(valid))]
                losses = loop_mask_losses(sampled[None, places], truth[None, places], valid[None, places], num_masks)
                terms["mask"] += losses[config.mask_loss]
                terms["dice"] += losses["dice"]
        temperature = config.class_temperature
        if config.class_loss == "background_aware":
            switches = config.matched_weight, config.kl, config.class_norm
            loss = loop_class_loss(cosine, targets, temperature, *switches)
        else:
            loss = loop_background_class_loss(cosine, back, targets, temperature, config.no_object_weight)
        terms["class"] += loss
        terms["rank"] += loop_ranking_loss(config.rank_scale * cosine, image_labels, config.rank_norm)
        if config.label_map_weight:
            every = cosine if config.class_loss == "background_aware" else torch.cat([cosine, back[..., None]], dim=2)
            probs = (every / temperature).softmax(2)[..., : cosine.shape[2]]
            uniform = points[:, num_candidates:] if num_candidates < points.shape[1] else points
            rows = zip(logits, probs, labels, image_labels, uniform, strict=True)
            terms["label_map"] += sum(loop_label_map_loss(*row, config.label_map_pixels) for row in rows) / len(labels)
    return terms


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    queries=st.sampled_from([8, 2]),
    gone=st.sampled_from([[], [3], [5], [0, 3, 5]]),  # ids that the second image has not, so fewer masks
    points_at_once=st.sampled_from([1, 160, 2**21]),  # of one mask, of few, of all
    switches=st.fixed_dictionaries(
        {
            "class_loss": st.sampled_from(["background_aware", "cross_entropy"]),
            "kl": st.sampled_from(["p_u", "u_p"]),
            "class_norm": st.sampled_from(["groups", "queries"]),
            "rank_norm": st.sampled_from(["positives", "pairs"]),
            "rank_scale": st.sampled_from([1.0, 10.0]),
            "mask_loss": st.sampled_from(["focal", "bce"]),
            "ignored_pixels": st.sampled_from(["ignore", "negative"]),
            "matching": st.sampled_from(["unpaired", "joint", "hybrid"]),
            "match_points": st.sampled_from(["grid", "random"]),
            "importance_sample_ratio": st.sampled_from([0.0, 0.75, 1.0]),
            "no_object_weight": st.sampled_from([0.1, 0.7]),
            "matched_weight": st.sampled_from([0.6, 0.9]),
            "class_weight": st.sampled_from([2.0, 9.0]),
            "mask_weight": st.sampled_from([5.0, 1.0]),
            "dice_weight": st.sampled_from([5.0, 20.0]),
            "oversample_ratio": st.sampled_from([3.0, 1.0]),
            "label_map_weight": st.sampled_from([0.0, 2.0]),
            "label_map_pixels": st.sampled_from(["all", "labelled"]),
        }
    ),
)
def test_every_switch_is_what_loops_over_explicit_masks_give(seed, queries, gone, points_at_once, switches):
    assume(switches["class_loss"] == "background_aware" or switches["class_norm"] == "groups")  # others are refused
    config = tiny_config(text=False, class_temperature=0.1, train_num_points=20, **switches)
    torch.manual_seed(seed)
    mask_logits = [3 * torch.randn(2, queries, 6, 8) for _ in range(2)]
    shapes = (2, queries, 7), (2, queries)
    similarity, background = ([random_similarity(*shape) for _ in range(2)] for shape in shapes)
    labels = random_labels(2, ids=(PADDING, -1, 0, 3, 5))
    labels[1][torch.isin(labels[1], torch.tensor(gone))] = -1
    image_labels = torch.randint(-1, 2, (2, 7))
    if config.matching != "unpaired":
        for row, ids in zip(image_labels, mask_ids(labels), strict=True):
            row[ids] = 1
    given_background = background if config.class_loss == "cross_entropy" else None
    torch.manual_seed(seed)
    with patch("losses_zs3.POINTS_AT_ONCE", points_at_once):
        losses = criterion(mask_logits, similarity, labels, image_labels, config, given_background)

    torch.manual_seed(seed)
    match_points = grid_points(6, 8, labels.device).expand(2, -1, -1)
    if config.match_points == "random":
        match_points = 2 * torch.rand(2, 20, 2) - 1
    count = int(20 * config.oversample_ratio) + 20 - int(20 * config.importance_sample_ratio)
    points = 2 * torch.rand(2, count, 2) - 1
    expected = literal_terms(mask_logits, similarity, background, labels, image_labels, config, match_points, points)
    assert list(losses.terms) == list(expected)
    for name, value in expected.items():
        close(losses.terms[name], value, rtol=1e-4, atol=1e-5)


def random_case(config: Zs3Config, ids=(-1, 0, 3, 5)) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Zs3Config]:
    image_labels = torch.tensor([[1, 0, 1, 1, -1, 1, 0], [1, 0, 0, 1, 0, 1, -1]], dtype=torch.int8)
    mask_logits = [3 * torch.randn(2, 6, 8, 8) for _ in range(2)]
    similarity = [random_similarity(2, 6, 7) for _ in range(2)]
    return mask_logits, similarity, random_labels(2, (16, 16), ids), image_labels, config


CLASS_LOSSES = [{}, {"class_norm": "queries"}, {"class_loss": "cross_entropy"}]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", CLASS_LOSSES)
def test_gradients_of_the_whole_criterion_are_differences(kind, seed):
    torch.manual_seed(seed)
    mask_logits, similarity, labels, image_labels, config = random_case(
        tiny_config(text=False, **kind, class_temperature=0.3, train_num_points=30)
    )
    inputs = [torch.randn(2, 6, 4, 4), random_similarity(2, 6, 7), random_similarity(2, 6)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs[: 3 if "class_loss" in kind else 2]]

    def terms(logits: Tensor, cosine: Tensor, background: Tensor | None = None) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return tuple(criterion([logits], [cosine], labels, image_labels, config, [background]).terms.values())

    assert torch.autograd.gradcheck(terms, inputs, fast_mode=True)


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
def test_the_order_of_queries_and_of_names_does_not_matter(matching):
    mask_logits, similarity, labels, image_labels, config = random_case(tiny_config(text=False, matching=matching))
    queries, names = torch.randperm(6), torch.randperm(7)

    def terms(mask_logits, similarity, labels, image_labels) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return criterion(mask_logits, similarity, labels, image_labels, config).terms

    before = terms(mask_logits, similarity, labels, image_labels)
    other_queries = terms(
        [x[:, queries] for x in mask_logits], [s[:, queries] for s in similarity], labels, image_labels
    )
    place = names.argsort()  # name c has moved to place[c]
    moved = torch.where(labels >= 0, place[labels.clamp(min=0)], labels)
    other_names = terms(mask_logits, [s[..., names] for s in similarity], moved, image_labels[:, names])
    for name, value in before.items():
        close(other_queries[name], value)
        close(other_names[name], value)


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
@pytest.mark.parametrize("mask_loss", ["focal", "bce"])
def test_ignored_pixels_have_no_influence(mask_loss, matching):
    """Labels of the right half are ignored, as padding is. Mask pixels from column 9 on touch no point that counts."""
    labels = random_labels(2, (32, 32), ids=(1, 3, 0))
    labels[:, :, 16:] = -1
    similarity, image_labels = [random_similarity(2, 5, 4)], torch.tensor([[1, 1, 0, 1]]).repeat(2, 1)
    logits = torch.randn(2, 5, 16, 16)

    def terms(logits: Tensor, **switches) -> dict[str, Tensor]:
        config = tiny_config(text=False, mask_loss=mask_loss, matching=matching, **switches)
        torch.manual_seed(1)
        return criterion([logits], similarity, labels, image_labels, config).terms

    changed, touched = logits.clone(), logits.clone()
    changed[..., 9:] = 50 * torch.randn(2, 5, 16, 7)
    touched[..., 3:6] += 1
    before, after, other = terms(logits), terms(changed), terms(touched)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert other["mask"] != before["mask"] and other["dice"] != before["dice"]
    assert terms(changed, ignored_pixels="negative")["mask"] > 2 * terms(logits, ignored_pixels="negative")["mask"]

    logits.requires_grad_()
    losses = terms(logits)
    (losses["mask"] + losses["dice"]).backward()
    assert torch.all(logits.grad[..., 9:] == 0) and logits.grad[..., :8].abs().sum() > 0


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
def test_unknown_labels_take_no_part(matching):
    """Their scores change neither matching nor ranking; the softmax of Eq. 5 is over all names."""
    mask_logits, similarity, labels, image_labels, config = random_case(
        tiny_config(text=False, matching=matching), ids=(-1, 0, 3)
    )
    image_labels[:, 5] = -1
    changed = [scores.clone() for scores in similarity]
    for scores in changed:
        scores[..., 5] = 0.999  # every query's favourite, if it counted
    torch.manual_seed(1)
    before = criterion(mask_logits, similarity, labels, image_labels, config).terms
    torch.manual_seed(1)
    after = criterion(mask_logits, changed, labels, image_labels, config).terms
    assert before["rank"] == after["rank"] and before["class"] != after["class"]
    assert (match_labels(changed[0], image_labels) != 5).all()


NOTHING = torch.full((2, 16, 16), -1)
MANY = torch.arange(8).repeat_interleave(4).reshape(1, 1, 32).repeat(2, 16, 1)  # 8 masks for 5 queries
ONE_OF_TWO = torch.stack([torch.zeros(16, 16, dtype=torch.int64), NOTHING[0]])


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
@pytest.mark.parametrize("kind", CLASS_LOSSES)
@pytest.mark.parametrize(
    ("labels", "present", "absent"),
    [
        pytest.param(NOTHING, [], range(8), id="all ignored, no positives"),
        pytest.param(NOTHING, [1, 6], [0, 2], id="labels without masks"),
        pytest.param(ONE_OF_TWO, [0], [1], id="one image without masks"),
        pytest.param(random_labels(2), range(8), [], id="no negatives"),
        pytest.param(random_labels(2), [0, 3, 5], [], id="the rest unknown"),
        pytest.param(random_labels(2, ids=(-1, 5)), [5], [0, 1], id="one mask"),
        pytest.param(MANY, range(8), [], id="more labels and masks than queries"),
        pytest.param(NOTHING, [], [], id="nothing known"),
    ],
)
def test_loss_and_gradients_are_finite(matching, kind, labels, present, absent):
    config = tiny_config(text=False, matching=matching, **kind)
    image_labels = torch.full((2, 8), -1, dtype=torch.int8)
    image_labels[:, list(absent)], image_labels[:, list(present)] = 0, 1
    logits = (20 * torch.randn(2, 5, 8, 8)).requires_grad_()
    similarity = random_similarity(2, 5, 8).requires_grad_()
    background = random_similarity(2, 5).requires_grad_() if "class_loss" in kind else None
    losses = criterion([logits], [similarity], labels, image_labels, config, [background])
    assert set(losses.terms) == {"class", "mask", "dice", "rank"}
    assert losses.terms["class"] < 1e3  # not divided by nearly nothing
    sum(losses.terms.values()).backward()
    for value in (*losses.terms.values(), logits.grad, similarity.grad):
        assert torch.isfinite(value).all()
    if labels is NOTHING:
        assert losses.terms["mask"] == losses.terms["dice"] == 0
        assert losses.same_label_rate.isnan()
    else:
        assert 0 <= losses.same_label_rate <= 1
    if not (len(present) and len(absent)):
        assert losses.terms["rank"] == 0


def test_same_label_rate_counts_queries_whose_label_is_their_masks():
    labels = torch.tensor([0, 1, 2, 3]).repeat_interleave(4).expand(1, 16, 16)
    logits = -8 * torch.ones(1, 5, 16, 16)
    for query in range(4):  # query q draws mask q
        logits[0, query] = 16 * (labels[0] == query).float() - 8
    similarity = -torch.ones(1, 5, 4)
    for query, label in enumerate([0, 1, 3, 2]):  # two of four mean another label
        similarity[0, query, label] = 1
    image_labels = torch.ones(1, 4, dtype=torch.int8)
    arguments = ([logits], [similarity], labels, image_labels)
    assert criterion(*arguments, tiny_config(text=False)).same_label_rate == 0.5
    of_two = ([logits, logits], [similarity, similarity.flip(2)], labels, image_labels)  # the last output counts
    assert criterion(*of_two, tiny_config(text=False)).same_label_rate == 0
    assert criterion(*arguments, tiny_config(text=False, matching="joint")).same_label_rate == 1


def test_no_mask_is_ever_made():
    """170 names in a map of 128 x 128: what is made grows with masks x points, never with masks x pixels."""
    labels = torch.arange(128 * 128).reshape(1, 128, 128) % 170
    mask_logits = [torch.randn(1, 4, 32, 32, requires_grad=True)]
    config = tiny_config(text=False, train_num_points=50)
    with Largest() as largest:
        terms = criterion(mask_logits, [random_similarity(1, 4, 170)], labels, torch.ones(1, 170), config).terms
        (terms["mask"] + terms["dice"]).backward()
    assert largest.size == 171 * 32 * 32  # a row more than masks, on the mask grid
    assert largest.size < 170 * 128 * 128


def test_what_the_points_hold_is_not_kept_for_the_backward_pass():
    """Of each decoder output, only the indices of the chosen points: far less than the values at them."""
    mask_logits, similarity, labels, image_labels, _ = random_case(tiny_config(text=False))
    config = tiny_config(text=False, train_num_points=4096)
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    mask_logits = [logits.requires_grad_() for logits in mask_logits]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        criterion(mask_logits, similarity, labels, image_labels, config)
    assert max(kept.values()) < 4096


# ---------------------------------------------------------------------------------------- several processes

RANK_CASES = {
    "paper": {},
    "one mask": {"rank_weight": 0.5},
    "baseline": {"class_loss": "cross_entropy", "matching": "joint", "mask_loss": "bce"},
    "hybrid": {"matching": "hybrid", "kl": "u_p"},
    "sum over queries": {"class_norm": "queries"},
}


def same_points_everywhere(batch: int, count: int, two: int, device: torch.device) -> Tensor:
    """In place of torch.rand: the points do not depend on the batch or the process."""
    generator = torch.Generator().manual_seed(count)
    return torch.empty(1, count, two).uniform_(generator=generator).expand(batch, -1, -1)


def gradients(images: slice, case: str, parallel: bool) -> dict[str, Tensor]:
    """Of the loss of some images: the first has three masks, the second one, the third and fourth none.

    Case "one mask": the first has none either.
    """
    model = tiny_model(**RANK_CASES[case], text=False)
    trained = torch.nn.parallel.DistributedDataParallel(model) if parallel else model
    generator = torch.Generator().manual_seed(1)
    labels = torch.full((4, 64, 64), -1)
    if case != "one mask":
        labels[0, :20], labels[0, 20:40], labels[0, 40:] = 0, 2, 4
    labels[1, :, 30:] = 4
    image_labels = torch.zeros(4, 6, dtype=torch.int8)
    image_labels[0, [0, 2, 4]], image_labels[1, [1, 4]], image_labels[2, 5], image_labels[3] = 1, 1, 1, -1
    with patch("losses_zs3.torch.rand", same_points_everywhere):
        loss = trained(
            torch.randn(4, 3, 64, 64, generator=generator)[images],
            text_embeds=F.normalize(torch.randn(6, 12, generator=generator), dim=-1),
            labels=labels[images],
            image_labels=image_labels[images],
        ).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def rank_gradients(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images = slice(0, 2) if rank == 0 else slice(2, 4)
    results = {case: gradients(images, case, parallel=True) for case in RANK_CASES}
    if rank == 0:
        torch.save(results, f"{folder}/gradients")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one_with_the_double_batch(tmp_path):
    assert [ended(process) for process in [begin(rank_gradients, rank, str(tmp_path)) for rank in (0, 1)]] == [0, 0]
    of_two = torch.load(tmp_path / "gradients")
    for case, other in of_two.items():
        of_one = gradients(slice(0, 4), case, parallel=False)
        assert of_one.keys() == other.keys()
        largest = max(float(gradient.abs().max()) for gradient in of_one.values())
        for parameter, gradient in of_one.items():
            torch.testing.assert_close(
                other[parameter],
                gradient,
                rtol=1e-3,
                atol=1e-5 * largest,
                msg=lambda m, p=parameter: f"{p}: {m}",
            )


# ------------------------------------------------------------------------------------------------- low precision


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_class_and_ranking_losses_are_summed_in_float32_under_autocast():
    similarity, background = random_similarity(2, 5, 30).bfloat16(), random_similarity(2, 5).bfloat16()
    target = torch.tensor([[0, -1, 7, -1, -1], [-1, -1, -1, 3, 29]])
    positive, negative = torch.rand(2, 30) > 0.7, torch.zeros(2, 30, dtype=torch.bool)
    negative[:, 20:] = ~positive[:, 20:]
    losses = {
        "class": lambda s, b: class_loss(s, target, 0.01, 0.6),
        "queries": lambda s, b: class_loss(s, target, 0.01, 0.6, class_norm="queries"),
        "background": lambda s, b: background_class_loss(s, b, target, 0.01),
        "rank": lambda s, b: ranking_loss(s, positive, negative),
    }
    for loss in losses.values():
        with autocast():
            low = loss(similarity, background)
        assert low.dtype == torch.float32 and torch.isfinite(low)
        close(low, loss(similarity.float(), background.float()))


@pytest.mark.parametrize("loss", [dice_loss, bce_loss, focal_loss])
def test_mask_losses_of_low_precision_logits_are_float32(loss):
    logits, targets = (3 * torch.randn(3, 500)).bfloat16(), torch.rand(3, 500).bfloat16()
    low = loss(logits, targets, 3.0)
    assert low.dtype == torch.float32
    close(low, loss(logits.float(), targets.float(), 3.0))


def test_class_probabilities_of_low_precision_logits_are_float32():
    logits, background = torch.randn(2, 5, 30).bfloat16(), torch.randn(2, 5).bfloat16()
    close(class_probabilities(logits), logits.float().softmax(-1))
    close(class_probabilities(logits, background), class_probabilities(logits.float(), background.float()))
    assert class_probabilities(logits).dtype == class_probabilities(logits, background).dtype == torch.float32


def test_the_criterion_sums_low_precision_predictions_in_float32():
    mask_logits, similarity, labels, image_labels, config = random_case(tiny_config(text=False))
    low = [logits.bfloat16() for logits in mask_logits]
    torch.manual_seed(1)
    with autocast():
        terms = criterion(low, similarity, labels, image_labels, config).terms
    torch.manual_seed(1)
    expected = criterion([logits.float() for logits in low], similarity, labels, image_labels, config).terms
    for name, term in terms.items():
        assert term.dtype == torch.float32
        close(term, expected[name])


def test_the_label_map_loss_is_float32_under_autocast():
    probs, logits = torch.randn(2, 6, 5).softmax(-1), torch.randn(2, 6, 4, 4)
    points, possible = 2 * torch.rand(2, 40, 2) - 1, torch.randint(0, 2, (2, 5, 40)).float()
    with autocast():
        low = label_map_loss(probs, logits, points, possible)
    assert torch.equal(low, label_map_loss(probs, logits, points, possible))


def test_gradients_of_the_label_map_loss_are_differences():
    probs, logits = torch.randn(2, 4, 5, dtype=torch.float64).softmax(-1), torch.randn(2, 4, 4, 3, dtype=torch.float64)
    points, possible = 2 * torch.rand(2, 12, 2, dtype=torch.float64) - 1, torch.randint(0, 2, (2, 5, 12)).double()
    possible[..., 0] = 0  # a point that takes no part
    inputs = probs.requires_grad_(), logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, m: label_map_loss(p, m, points, possible), inputs)


def test_a_hopeless_point_still_has_a_gradient():
    """At temperature 0.01 a class that all queries reject has a probability far below float32's precision."""
    cosine = torch.tensor([[0.9, 0.4], [0.8, 0.35]], requires_grad=True)
    probs = class_probabilities(cosine / 0.01)
    possible = torch.tensor([[[0.0] * 3, [1.0] * 3]])
    label_map_loss(probs[None], torch.ones(1, 2, 4, 4), torch.zeros(1, 3, 2), possible).backward()
    assert probs[:, 1].max() < 1e-19 and cosine.grad[:, 1].max() < -1e-3 and cosine.grad.isfinite().all()


def test_cosine_is_float32_under_autocast():
    """At temperature 0.01 the 0.004 of a bfloat16 cosine would be 0.4 of a logit."""
    class_embeds, text_embeds = torch.randn(2, 5, 16), torch.randn(7, 16)
    with autocast():
        low = cosine_similarity(class_embeds, text_embeds)
    close(low, F.cosine_similarity(class_embeds[:, :, None], text_embeds[None, None], dim=-1))


def test_mask_matching_is_float32_under_autocast():
    """Of two nearly equal queries the one that is 0.1 % better gets the mask."""
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[:, :, 8:] = -1
    truth = label_points(labels, torch.tensor([[0]]), grid_points(16, 16, labels.device)[None])
    for better in (0, 1):
        logits = torch.full((1, 2, 16, 16), 1.0)
        logits[0, better] += 0.001
        with autocast():
            (cost,) = mask_cost(logits.flatten(2), truth, 5.0, 5.0)
        assert cost.dtype == torch.float32 and hungarian(cost).query.tolist() == [better]


def test_a_training_step_under_autocast_is_finite_at_temperature_001():
    model = tiny_model(class_temperature=0.01).train()
    labels = random_labels(2, (64, 64), ids=(-1, 0, 3))
    text_embeds = F.normalize(torch.randn(6, 12), dim=-1)
    with autocast():
        outputs = model(torch.randn(2, 3, 64, 64), text_embeds=text_embeds, labels=labels)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and torch.isfinite(outputs.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------------------------------- Eq. 8, the whole model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "labels": random_labels(2, (64, 64), ids=(-1, 0, 3)),
        "text_embeds": F.normalize(torch.randn(6, 12), dim=-1),
    }


def test_loss_is_the_sum_of_weight_times_term(batch):
    model = tiny_model(class_weight=3, mask_weight=7, dice_weight=11, rank_weight=13)
    outputs = model(**batch)
    terms = {name: term.item() for name, term in outputs.loss_terms.items()}
    assert sorted(terms) == ["class", "dice", "mask", "rank"] and all(term > 0 for term in terms.values())
    close(outputs.loss, 3 * terms["class"] + 7 * terms["mask"] + 11 * terms["dice"] + 13 * terms["rank"])


def test_a_loss_on_the_label_map_has_its_weight_and_leaves_out_padding(batch):
    model = tiny_model(label_map_weight=17, class_temperature=0.1)
    torch.manual_seed(2)
    outputs = model(**batch)
    torch.manual_seed(2)
    model.config.label_map_weight = 0
    without = model(**batch)
    model.config.label_map_weight = 17
    term = outputs.loss_terms.pop("label_map")
    assert list(outputs.loss_terms) == list(without.loss_terms) and term > 0
    close(outputs.loss - without.loss, 17 * term.item(), rtol=1e-4)
    batch["labels"][:] = -1  # every pixel may be of any present label
    present = {"image_labels": torch.tensor([[1, 1, 0, 0, 0, 0]] * 2)}
    assert model(**batch, **present).loss_terms["label_map"] > 0
    padding = torch.zeros(2, 64, 64, dtype=torch.int64)
    assert model(**batch, **present, pixel_mask=padding).loss_terms["label_map"] == 0


def test_terms_are_sums_over_the_decoder_outputs(batch):
    model = tiny_model()
    torch.manual_seed(1)
    terms = model(**batch).loss_terms
    inner = model.model(batch["pixel_values"], output_hidden_states=True)
    decoder = model.model.transformer_module.decoder
    states = inner.transformer_decoder_intermediate_states
    assert len(states) == len(inner.masks_queries_logits) == len(decoder.layers) + 1 > 2  # the learned queries too
    image_labels = torch.tensor([[int(c in label_map) for c in range(6)] for label_map in batch["labels"]])
    num_masks = sum(len(ids) for ids in mask_ids(batch["labels"]))
    assert num_masks == 4
    expected = dict.fromkeys(terms, 0.0)
    for hidden, mask_logits in zip(states, inner.masks_queries_logits, strict=True):
        embeds = model.class_projection(hidden.transpose(0, 1))
        similarity = F.cosine_similarity(embeds[:, :, None], batch["text_embeds"][None, None], dim=-1)
        torch.manual_seed(1)  # the points of a step are drawn once, for all outputs
        layer = criterion([mask_logits], [similarity], batch["labels"], image_labels, model.config)
        for name in expected:
            expected[name] += layer.terms[name].item()
    for name, value in expected.items():
        close(terms[name], value, rtol=1e-4)
    model.config.use_auxiliary_loss = False
    torch.manual_seed(1)
    last = model(**batch).loss_terms
    for name, value in layer.terms.items():
        close(last[name], value, rtol=1e-4)


@pytest.mark.parametrize("kind", ["background_aware", "cross_entropy"])
def test_gradients_reach_everything_that_learns_but_not_clip(batch, kind):
    model = tiny_model(vision=True, class_loss=kind).train()
    input_ids = torch.randint(0, 500, (6, 2, 5))
    input_ids[..., -1] = 513
    model(batch["pixel_values"], labels=batch["labels"], input_ids=input_ids).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("class_projection.0.", "class_projection.2.", "model.pixel_level_module.encoder.", "model."):
        assert any(name.startswith(part) for name in reached), part
    assert "model.pixel_level_module.encoder.embedder.embedder.convolution.weight" in reached
    assert "model.transformer_module.queries_features.weight" in reached
    assert ("background_embed" in reached) == (kind == "cross_entropy")
    towers = [p for name, p in model.named_parameters() if name.startswith(("text_model.", "vision_model."))]
    assert towers and all(p.grad is None and not p.requires_grad for p in towers)


@pytest.mark.parametrize("mask_loss", ["focal", "bce"])
def test_the_mask_loss_is_the_one_that_was_chosen(mask_loss):
    """At zero logits every point costs ln 2 in BCE, and 1/4 of alpha or 1 - alpha of that in focal loss."""
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)  # one mask, everywhere
    config = tiny_config(text=False, mask_loss=mask_loss)
    image_labels = torch.tensor([[1, 0]])
    losses = criterion([torch.zeros(1, 5, 8, 8)], [random_similarity(1, 5, 2)], labels, image_labels, config)
    close(losses.terms["mask"], math.log(2) * (1 if mask_loss == "bce" else 0.25 * 0.25))
