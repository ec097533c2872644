"""Matching and losses: each equation against loops, permutations, transformers' own code, or numbers worked by hand."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as mask2former

from losses_zs3 import (
    UNMATCHED,
    background_class_loss,
    bce_loss,
    class_loss,
    class_probabilities,
    dice_loss,
    focal_loss,
    hungarian,
    joint_labels,
    kl_to_uniform,
    mask_targets,
    match_labels,
    match_masks,
    point_targets,
    ranking_loss,
    sample_logits,
    sample_points,
    zs3_losses,
)
from modeling_zs3 import cosine_similarity


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


@pytest.mark.parametrize("kl", ["p_u", "u_p"])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_class_loss_is_equation_5_in_loops(kl, temperature):
    similarity, matched_weight = random_similarity(3, 5, 7), 0.7
    target = torch.tensor([[2, -1, -1, 0, 6], [-1, -1, -1, -1, -1], [1, 3, -1, -1, 5]])
    cross_entropies, divergences = [], []
    for image in range(3):
        for query in range(5):
            probs = softmax([value / temperature for value in similarity[image, query].tolist()])
            label = int(target[image, query])
            if label >= 0:
                cross_entropies.append(-math.log(probs[label]))
            elif kl == "p_u":
                divergences.append(sum(p * math.log(p / (1 / 7)) for p in probs))
            else:
                divergences.append(sum(1 / 7 * math.log((1 / 7) / p) for p in probs))
    expected = matched_weight * sum(cross_entropies) / len(cross_entropies)
    expected += (1 - matched_weight) * sum(divergences) / len(divergences)
    close(class_loss(similarity, target, temperature, matched_weight, kl=kl), expected)


def test_class_loss_of_three_to_one_odds():
    similarity = 0.01 * torch.tensor([[[math.log(3), 0.0], [math.log(3), 0.0]]])  # p = (3/4, 1/4), twice
    target = torch.tensor([[0, UNMATCHED]])
    printed = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    other = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    close(class_loss(similarity, target, 0.01, 0.6), 0.6 * math.log(4 / 3) + 0.4 * printed)
    close(class_loss(similarity, target, 0.01, 0.6, kl="u_p"), 0.6 * math.log(4 / 3) + 0.4 * other)


def test_uniform_predictions_cost_nothing_on_unmatched_queries():
    loss = class_loss(torch.zeros(2, 5, 7), torch.full((2, 5), UNMATCHED), temperature=0.01, matched_weight=0.6)
    torch.testing.assert_close(loss, torch.tensor(0.0))


def test_a_group_without_queries_adds_nothing():
    similarity = random_similarity(1, 3, 4)
    nobody, everybody = torch.full((1, 3), UNMATCHED), torch.tensor([[0, 1, 2]])
    assert class_loss(similarity, nobody, 0.1, matched_weight=1.0) == 0
    assert class_loss(similarity, everybody, 0.1, matched_weight=0.0) == 0


def test_class_loss_refuses_an_unknown_kl():
    with pytest.raises(ValueError, match="reverse"):
        class_loss(random_similarity(1, 2, 3), torch.full((1, 2), UNMATCHED), 0.1, 0.6, kl="reverse")


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


def test_background_class_loss_is_a_weighted_cross_entropy_in_loops():
    similarity, background, temperature = random_similarity(2, 4, 5), random_similarity(2, 4), 0.05
    target = torch.tensor([[4, -1, 0, -1], [-1, -1, 2, -1]])
    total = weights = 0.0
    for image in range(2):
        for query in range(4):
            row = [*similarity[image, query].tolist(), float(background[image, query])]
            probs = softmax([value / temperature for value in row])
            label = int(target[image, query])
            weight = 0.3 if label == UNMATCHED else 1.0
            total -= weight * math.log(probs[5 if label == UNMATCHED else label])
            weights += weight
    loss = background_class_loss(similarity, background, target, temperature, unmatched_weight=0.3)
    close(loss, total / weights)


def test_background_takes_its_share_of_the_probabilities():
    logits, background = torch.tensor([[[0.0, math.log(2)]]]), torch.tensor([[math.log(5)]])
    close(class_probabilities(logits, background), torch.tensor([[[1 / 8, 2 / 8]]]))
    close(class_probabilities(logits), torch.tensor([[[1 / 3, 2 / 3]]]))


# --------------------------------------------------------------------------------------------- ranking, Eq. 6-7


@pytest.mark.parametrize("norm", ["positives", "pairs"])
def test_ranking_loss_is_equations_6_and_7_in_loops(norm):
    similarity = random_similarity(4, 5, 6)
    image_labels = torch.tensor([[1, 0, 0, -1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, -1, 0, 0], [-1, 1, 0, 0, 1, 1]])
    total = 0.0
    for image in range(4):
        best = [max(similarity[image, q, c].item() for q in range(5)) for c in range(6)]
        positives = [c for c in range(6) if image_labels[image, c] == 1]
        negatives = [c for c in range(6) if image_labels[image, c] == 0]
        if positives and negatives:
            pairs = sum(math.log(1 + math.exp(best[k] - best[j])) for j in positives for k in negatives)
            total += pairs / (len(positives) * (len(negatives) if norm == "pairs" else 1))
    close(ranking_loss(similarity, image_labels == 1, image_labels == 0, norm=norm), total / 4)


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


# ------------------------------------------------------------------------------------------------- mask losses


def test_mask_losses_are_their_equations_in_loops():
    logits, targets, weight = 3 * torch.randn(3, 8), torch.rand(3, 8).round(decimals=1), torch.rand(3, 8)
    weight[0] = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0])
    targets[0] = targets[0].round()
    expected = {"dice": 0.0, "bce": 0.0, "focal": 0.0}
    for mask in range(3):
        overlap = total = bce = focal = weights = 0.0
        for logit, t, w in zip(logits[mask].tolist(), targets[mask].tolist(), weight[mask].tolist(), strict=True):
            p = 1 / (1 + math.exp(-logit))
            cross_entropy = -t * math.log(p) - (1 - t) * math.log(1 - p)
            p_miss = t * (1 - p) + (1 - t) * p
            overlap += w * 2 * p * t
            total += w * (p + t)
            bce += w * cross_entropy
            focal += w * (t * 0.25 + (1 - t) * 0.75) * p_miss**2 * cross_entropy
            weights += w
        expected["dice"] += 1 - (overlap + 1) / (total + 1)
        expected["bce"] += bce / weights
        expected["focal"] += focal / weights
    close(dice_loss(logits, targets, 4, weight=weight), expected["dice"] / 4)
    close(bce_loss(logits, targets, 4, weight=weight), expected["bce"] / 4)
    close(focal_loss(logits, targets, 4, weight=weight), expected["focal"] / 4)


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


def random_targets(batch: int, size: tuple[int, int] = (12, 16), ids=(-1, 0, 3, 5)) -> Tensor:
    """Label maps (B, H, W) of rectangles."""
    labels = torch.full((batch, *size), ids[-1])
    for label_map in labels:
        for value in ids[:-1]:
            top, left = (int(torch.randint(0, side // 2, ())) for side in size)
            label_map[top : top + size[0] // 2, left : left + size[1] // 2] = value
    return labels


def test_targets_are_the_distinct_ids_of_each_image():
    labels = torch.tensor([[[3, -1], [7, 3]], [[-1, -1], [-1, -1]], [[0, 0], [0, 1]]])
    targets = mask_targets(labels)
    assert list(zip(targets.image.tolist(), targets.value.tolist(), strict=True)) == [(0, 3), (0, 7), (2, 0), (2, 1)]
    empty = mask_targets(labels[1:2])
    assert len(empty.image) == len(empty.value) == 0


@pytest.mark.parametrize("with_class_cost", [False, True])
def test_mask_matching_is_the_best_of_all_permutations(with_class_cost):
    logits, labels, points = 2 * torch.randn(2, 5, 6, 8), random_targets(2), 40
    targets = mask_targets(labels)
    class_cost = torch.randn(2, 5, 6) if with_class_cost else None
    torch.manual_seed(1)
    query, chosen = match_masks(logits, targets, points, 5.0, 2.0, class_cost)
    torch.manual_seed(1)
    grids = 2 * torch.rand(2, points, 2)[:, :, None] - 1
    for image in range(2):
        mine = [m for m in range(len(targets.image)) if targets.image[m] == image]
        valid = sample(labels[image] >= 0, grids[image])
        cost = torch.zeros(5, len(mine))
        for q in range(5):
            probs = sample(logits[image, q], grids[image]).sigmoid()
            for column, m in enumerate(mine):
                truth = sample(labels[image] == targets.value[m], grids[image]) / valid.clamp(min=1e-6)
                entropy = -(truth * probs.log() + (1 - truth) * (1 - probs).log())
                dice = 1 - (2 * (valid * probs * truth).sum() + 1) / ((valid * (probs + truth)).sum() + 1)
                cost[q, column] = 5 * (valid * entropy).sum() / valid.sum() + 2 * dice
                if with_class_cost:
                    cost[q, column] += class_cost[image, q, targets.value[m]]
        given = [(int(q), mine.index(int(m))) for q, m in zip(query, chosen, strict=True) if targets.image[m] == image]
        assert len(given) == len(mine)
        assert sum(cost[q, m].item() for q, m in given) == pytest.approx(cheapest(cost), abs=1e-4)


def sample(values: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples of (H, W) at grid (P, 1, 2) in [-1, 1] -> (P,)."""
    return F.grid_sample(
        values.float()[None, None], grid[None], padding_mode="border", align_corners=False
    ).flatten()  # transformers' own call, except for the half pixel at the border


def test_every_mask_finds_the_query_that_draws_it():
    labels = random_targets(2, ids=(0, 2, 4))
    targets = mask_targets(labels)
    order = torch.tensor([[3, 0, 1], [2, 4, 0]])
    logits = -5 * torch.ones(2, 5, *labels.shape[1:])
    for m, (image, value) in enumerate(zip(targets.image, targets.value, strict=True)):
        logits[image, order[image, m % 3]] = 10 * (labels[image] == value).float() - 5
    query, chosen = match_masks(logits, targets, 200, 5.0, 5.0)
    for q, m in zip(query, chosen, strict=True):
        assert q == order[targets.image[m], m % 3]


def test_joint_matching_is_transformers():
    logits, class_logits = 2 * torch.randn(1, 6, 16, 16), torch.randn(1, 6, 9)  # 8 classes and background
    labels = torch.randint(0, 8, (1, 2, 2)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    targets = mask_targets(labels)
    masks = torch.stack([(labels[0] == value).float() for value in targets.value])
    matcher = mask2former.Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=400)
    torch.manual_seed(1)
    ((theirs_query, theirs_target),) = matcher(logits, class_logits, [masks], [targets.value])
    torch.manual_seed(1)
    probs = class_probabilities(class_logits[..., :-1], class_logits[..., -1])
    query, chosen = match_masks(logits, targets, 400, 5.0, 5.0, class_cost=-2.0 * probs)
    assert dict(zip(chosen.tolist(), query.tolist(), strict=True)) == dict(
        zip(theirs_target.tolist(), theirs_query.tolist(), strict=True)
    )


def test_of_equal_masks_joint_matching_takes_the_query_with_the_masks_label():
    config = tiny_config(text=False, matching="joint")
    labels = torch.tensor([2, 0]).repeat_interleave(8).expand(1, 16, 16)
    image_labels = torch.tensor([[1, 0, 1, 0]])
    for right in range(5):
        similarity = torch.zeros(1, 5, 4)
        similarity[..., 1] = 0.5  # no query means what is there
        similarity[0, right, 2], similarity[0, (right + 1) % 5, 0] = 0.9, 0.9
        losses = zs3_losses(torch.zeros(1, 5, 8, 8), similarity, None, mask_targets(labels), image_labels, 2.0, config)
        target = torch.full((1, 5), UNMATCHED)
        target[0, right], target[0, (right + 1) % 5] = 2, 0
        close(losses.terms["class"], class_loss(similarity, target, 0.01, 0.6))


def test_joint_labels_come_from_masks_and_the_rest_takes_left_over_queries():
    similarity = random_similarity(2, 5, 6)
    image_labels = torch.tensor([[1, 1, 1, 0, -1, 1], [0, 0, 0, 1, -1, 0]], dtype=torch.int8)
    image, query, value = torch.tensor([0, 0, 1]), torch.tensor([4, 1, 2]), torch.tensor([0, 2, 3])
    similarity[0, 4, 5] = 1.0  # the best query of a left-over label is taken
    target = joint_labels(similarity, image_labels, image, query, value)
    assert target[1].tolist() == [-1, -1, 3, -1, -1]
    assert target[0, [4, 1]].tolist() == [0, 2]
    free, left_over = torch.tensor([0, 2, 3]), torch.tensor([1, 5])
    given = {q: c for q, c in enumerate(target[0].tolist()) if q in (0, 2, 3) and c != UNMATCHED}
    assert sorted(given.values()) == [1, 5]
    total = -sum(similarity[0, q, c].item() for q, c in given.items())
    assert total == pytest.approx(cheapest(-similarity[0][free][:, left_over]), abs=1e-5)


def test_joint_labels_keep_a_masks_label_when_queries_run_out():
    image_labels = torch.ones(1, 4, dtype=torch.int8)
    both = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([3, 1])  # all queries have masks
    assert joint_labels(random_similarity(1, 2, 4), image_labels, *both).tolist() == [[3, 1]]


# ---------------------------------------------------------------------------------------------- point sampling


def test_point_targets_are_bilinear_samples_of_explicit_masks():
    labels = random_targets(2)
    targets = mask_targets(labels)
    chosen = torch.tensor([len(targets.image) - 1, 0, 2])
    points = torch.rand(3, 500, 2)
    share, weight = point_targets(targets, chosen, points)
    for row, m in enumerate(chosen):
        grid = 2 * points[row][:, None] - 1
        label_map = labels[targets.image[m]]
        valid, inside = sample(label_map >= 0, grid), sample(label_map == targets.value[m], grid)
        torch.testing.assert_close(weight[row], valid, rtol=0, atol=1e-5)
        torch.testing.assert_close(share[row] * weight[row], inside, rtol=0, atol=1e-5)
    assert weight.amin() == 0 and weight.amax() == pytest.approx(1)  # both kinds were met
    assert share.amin() >= 0 and share.amax() <= 1 + 1e-6


def test_a_half_ignored_point_has_half_the_weight_and_a_clean_target():
    targets = mask_targets(torch.tensor([[[4, -1], [4, -1]]]))
    share, weight = point_targets(targets, torch.tensor([0]), torch.tensor([[[0.5, 0.5], [0.25, 0.5], [0.9, 0.5]]]))
    close(weight[0], torch.tensor([0.5, 1.0, 0.0]))
    close(share[0], torch.tensor([1.0, 1.0, 0.0]))


def test_sampled_points_and_mask_losses_are_transformers():
    """On a fully labelled picture. Its border is made certain, since transformers samples zeros beyond it."""
    config = Mask2FormerConfig(num_labels=8, train_num_points=30, importance_sample_ratio=1.0)
    theirs = mask2former.Mask2FormerLoss(config, weight_dict={})
    labels = random_targets(1, (16, 16), ids=(1, 2, 5))
    targets = mask_targets(labels)
    logits = torch.randn(1, 5, 16, 16)
    logits[..., [0, -1], :] = logits[..., :, [0, -1]] = 100.0
    query, chosen = torch.tensor([0, 2, 4]), torch.tensor([1, 0, 2])
    masks = torch.stack([(labels[0] == value).float() for value in targets.value])
    torch.manual_seed(1)
    expected = theirs.loss_masks(logits, [masks], [(query, chosen)], 3)
    torch.manual_seed(1)
    points = sample_points(logits[0, query], targets, chosen, 30, 3.0, 1.0)
    truth, weight = point_targets(targets, chosen, points)
    sampled = sample_logits(logits[0, query], points)
    close(bce_loss(sampled, truth, 3, weight=weight), expected["loss_mask"])
    close(dice_loss(sampled, truth, 3, weight=weight), expected["loss_dice"])


def test_uncertain_points_avoid_ignored_pixels():
    labels = torch.full((1, 16, 16), -1)
    labels[:, :, :8] = 2
    logits = torch.where(torch.arange(16) < 8, 9.0, 0.0).expand(1, 16, 16)  # uncertain where it is ignored
    points = sample_points(logits, mask_targets(labels), torch.tensor([0]), 40, 3.0, 1.0)
    assert points.shape == (1, 40, 2) and points[..., 0].max() < 0.5


# ------------------------------------------------------------------------------------------------ Eq. 8, a layer


@pytest.mark.parametrize("mask_loss", ["focal", "bce"])
def test_ignored_pixels_have_no_influence(mask_loss):
    """Labels of the right half are ignored. Mask pixels from column 9 on touch no point that counts."""
    config = tiny_config(text=False, mask_loss=mask_loss)
    labels = random_targets(2, (32, 32), ids=(1, 3, 0))
    labels[:, :, 16:] = -1
    targets, image_labels = mask_targets(labels), torch.tensor([[1, 1, 0, 1]]).repeat(2, 1)
    similarity = random_similarity(2, 5, 4)
    logits = torch.randn(2, 5, 16, 16)

    def terms(logits: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return zs3_losses(logits, similarity, None, targets, image_labels, 6.0, config).terms

    changed, touched = logits.clone(), logits.clone()
    changed[..., 9:] = 50 * torch.randn(2, 5, 16, 7)
    touched[..., 3:6] += 1
    before, after, other = terms(logits), terms(changed), terms(touched)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert other["mask"] != before["mask"] and other["dice"] != before["dice"]

    logits.requires_grad_()
    losses = terms(logits)
    (losses["mask"] + losses["dice"]).backward()
    assert torch.all(logits.grad[..., 9:] == 0) and logits.grad[..., :8].abs().sum() > 0


def test_unknown_labels_are_neither_matched_nor_ranked():
    config = tiny_config(text=False)
    targets = mask_targets(random_targets(2))
    similarity = random_similarity(2, 5, 6)
    similarity[:, :, 4] = 0.999  # every query's favourite, if it counted
    labels = torch.tensor([[1, 0, 1, 0, -1, 0], [0, 0, 1, 0, -1, 1]])
    assert (match_labels(similarity, labels) != 4).all()
    unknown = zs3_losses(torch.randn(2, 5, 8, 8), similarity, None, targets, labels, 1.0, config).terms["rank"]
    without = [0, 1, 2, 3, 5]
    ranked = ranking_loss(similarity[..., without], labels[:, without] == 1, labels[:, without] == 0)
    close(unknown, ranked)


NOTHING = torch.full((2, 16, 16), -1)
MANY = torch.arange(8).repeat_interleave(4).reshape(1, 1, 32).repeat(2, 16, 1)  # 8 masks for 5 queries


@pytest.mark.parametrize("matching", ["unpaired", "joint"])
@pytest.mark.parametrize("kind", ["background_aware", "cross_entropy"])
@pytest.mark.parametrize(
    ("labels", "present", "absent"),
    [
        pytest.param(NOTHING, [], range(8), id="all ignored, no positives"),
        pytest.param(NOTHING, [1, 6], [0, 2], id="labels without masks"),
        pytest.param(random_targets(2), range(8), [], id="no negatives"),
        pytest.param(random_targets(2), [0, 3, 5], [], id="the rest unknown"),
        pytest.param(random_targets(2, ids=(-1, 5)), [5], [0, 1], id="one mask"),
        pytest.param(MANY, range(8), [], id="more labels and masks than queries"),
        pytest.param(NOTHING, [], [], id="nothing known"),
    ],
)
def test_loss_and_gradients_are_finite(matching, kind, labels, present, absent):
    config = tiny_config(text=False, matching=matching, class_loss=kind)
    image_labels = torch.full((2, 8), -1, dtype=torch.int8)
    image_labels[:, list(absent)], image_labels[:, list(present)] = 0, 1
    logits = (20 * torch.randn(2, 5, 8, 8)).requires_grad_()
    similarity = random_similarity(2, 5, 8).requires_grad_()
    background = random_similarity(2, 5).requires_grad_() if kind == "cross_entropy" else None
    losses = zs3_losses(logits, similarity, background, mask_targets(labels), image_labels, 1.0, config)
    assert set(losses.terms) == {"class", "mask", "dice", "rank"}
    sum(losses.terms.values()).backward()
    for value in (*losses.terms.values(), losses.same_label_rate, logits.grad, similarity.grad):
        assert torch.isfinite(value).all()
    if labels is NOTHING:
        assert losses.terms["mask"] == losses.terms["dice"] == 0
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
    arguments = (logits, similarity, None, mask_targets(labels), image_labels, 4.0)
    assert zs3_losses(*arguments, tiny_config(text=False)).same_label_rate == 0.5
    assert zs3_losses(*arguments, tiny_config(text=False, matching="joint")).same_label_rate == 1


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
        "background": lambda s, b: background_class_loss(s, b, target, 0.01),
        "rank": lambda s, b: ranking_loss(s, positive, negative),
    }
    for loss in losses.values():
        with autocast():
            low = loss(similarity, background)
        assert low.dtype == torch.float32 and torch.isfinite(low)
        close(low, loss(similarity.float(), background.float()))


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
    for better in (0, 1):
        logits = torch.full((1, 2, 16, 16), 1.0)
        logits[0, better] += 0.001
        with autocast():
            query, _ = match_masks(logits, mask_targets(labels), 64, 5.0, 5.0)
        assert query.tolist() == [better]


def test_a_training_step_under_autocast_is_finite_at_temperature_001():
    model = tiny_model(class_temperature=0.01).train()
    labels = random_targets(2, (64, 64), ids=(-1, 0, 3))
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
        "labels": random_targets(2, (64, 64), ids=(-1, 0, 3)),
        "text_embeds": F.normalize(torch.randn(6, 12), dim=-1),
    }


def test_loss_is_the_sum_of_weight_times_term(batch):
    model = tiny_model(class_weight=3, mask_weight=7, dice_weight=11, rank_weight=13)
    outputs = model(**batch)
    terms = {name: term.item() for name, term in outputs.loss_terms.items()}
    assert sorted(terms) == ["class", "dice", "mask", "rank"] and all(term > 0 for term in terms.values())
    close(outputs.loss, 3 * terms["class"] + 7 * terms["mask"] + 11 * terms["dice"] + 13 * terms["rank"])


def test_terms_are_sums_over_the_decoder_outputs(batch):
    model = tiny_model()
    torch.manual_seed(1)
    terms = model(**batch).loss_terms
    inner = model.model(batch["pixel_values"], output_hidden_states=True)
    decoder = model.model.transformer_module.decoder
    states = inner.transformer_decoder_intermediate_states
    assert len(states) == len(inner.masks_queries_logits) == len(decoder.layers) + 1 > 2  # the learned queries too
    image_labels = torch.tensor([[int(c in label_map) for c in range(6)] for label_map in batch["labels"]])
    targets = mask_targets(batch["labels"])
    expected = dict.fromkeys(terms, 0.0)
    torch.manual_seed(1)
    for hidden, mask_logits in zip(states, inner.masks_queries_logits, strict=True):
        embeds = model.class_projection(hidden.transpose(0, 1))
        similarity = F.cosine_similarity(embeds[:, :, None], batch["text_embeds"][None, None], dim=-1)
        layer = zs3_losses(mask_logits, similarity, None, targets, image_labels, len(targets.image), model.config)
        for name in expected:
            expected[name] += layer.terms[name].item()
    for name, value in expected.items():
        close(terms[name], value, rtol=1e-4)


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
    arguments = (torch.zeros(1, 5, 8, 8), random_similarity(1, 5, 2), None, mask_targets(labels))
    term = zs3_losses(*arguments, torch.tensor([[1, 0]]), 1.0, config).terms["mask"]
    close(term, math.log(2) * (1 if mask_loss == "bce" else 0.25 * 0.25))
