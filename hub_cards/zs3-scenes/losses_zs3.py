"""Matching and losses of the paper, one function per equation; `zs3_losses` (Eq. 8) puts them together.

Axes: O decoder output, B image, Q query, C class name, M mask target and L present label of an image, K matched mask,
P point, H W label map, h w mask.
Equation numbers are those of arXiv 2301.07336. Readings where the paper is silent are marked "Reading:".
Functions above `zs3_losses` take tensors and numbers, no config. Sums are made in float32 or better, also under
autocast.

What saves time and memory: targets stay id maps and are read at points, so no mask of full size is made. All masks of
an image and all decoder outputs share these points. Samples and sums are made for all images of a batch at once. All
matching costs of a step go to the CPU in one copy.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

try:
    from .configuration_zs3 import Refused, Zs3Config
    from .outputs_zs3 import at_least_float32, class_probabilities
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import Refused, Zs3Config
    from outputs_zs3 import at_least_float32, class_probabilities

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # inference needs no matching
    linear_sum_assignment = None

UNMATCHED = -1  # a query without a label
IGNORED, PADDING = -1, -(2**62)  # in a label map
NO_ID = 2**62  # fills up the ids of an image with fewer masks than others
POINTS_AT_ONCE = 2**21  # of several masks together: more points need memory, fewer take time
TINY = 1e-6  # the divisor in place of zero, where the dividend is zero, too
FLOOR = 1e-30  # the least argument of a logarithm: its inverse is a float32, too

# A function's intermediate values are made again in the backward pass. Kept, they would take most of the memory.
remade_backward = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


# --------------------------------------------------------------------------------------------------- targets


class Targets(NamedTuple):
    """The targets of a batch.

    labels: (B, H, W) int64 ids, IGNORED or PADDING; on the device of the predictions.
    ids: for each image the ids of its mask targets, (M,) int64, on the CPU; see `mask_ids`.
    image_labels: (B, C), 1 present, 0 absent, -1 unknown; on the CPU.
    """

    labels: Tensor
    ids: list[Tensor]
    image_labels: Tensor


def mask_ids(labels: Tensor) -> list[Tensor]:
    """The distinct ids >= 0 of each label map, ascending, on the CPU: labels (B, H, W) int64 -> B times (M,).

    Raises Refused where an id is negative, and neither IGNORED nor PADDING.
    """
    ids = [label_map.unique_consecutive().unique().cpu() for label_map in labels]  # runs first: little is left to sort
    for values in ids:
        wrong = values[(values < IGNORED) & (values != PADDING)]
        if len(wrong):
            raise Refused(f"labels must be ids of 0 or more, or {IGNORED} where there is none, got {int(wrong[0])}")
    return [values[values >= 0] for values in ids]


def default_image_labels(ids: list[Tensor], num_classes: int, is_seen: Tensor | None) -> Tensor:
    """Image labels from the ids of each image's masks, which index the class axis: B times (M,) -> (B, C) int8.

    1 present, 0 absent and seen, -1 absent and unseen: an unseen name never becomes a negative by accident.
    is_seen: (C,) bool; None: all seen.
    """
    absent = torch.zeros(num_classes, dtype=torch.int8)
    if is_seen is not None:
        absent[~is_seen.cpu()] = -1
    return torch.stack([absent.index_fill(0, present, 1) for present in ids])


def pad_ids(ids: list[Tensor], device: torch.device) -> Tensor:
    """B times (M,), ascending -> (B, M), ascending, NO_ID where an image has fewer masks than others."""
    return pad_sequence(ids, batch_first=True, padding_value=NO_ID).to(device)


class PointLabels(NamedTuple):
    """The targets at points that all masks of an image share.

    points: (B, P, 2), (x, y) in [-1, 1] from border to border, as F.grid_sample has them.
    weight: (B, P) in [0, 1], the part of a point's four neighbouring pixels that is not ignored.
    inside: (B, M, P) in [0, 1], the part that belongs to the target; at most `weight`.
    """

    points: Tensor
    weight: Tensor
    inside: Tensor


def label_points(labels: Tensor, ids: Tensor, points: Tensor, *, ignored_pixels: str = "ignore") -> PointLabels:
    """The bilinear samples of mask targets at points (B, P, 2), from the id maps (B, H, W).

    The sample of a one-hot mask is the sum of the weights of those neighbours, of four, that have the target's id.
    Points within half a pixel of the border are clamped to it.
    ids: (B, M), see `pad_ids`, on the device of the labels.
    ignored_pixels: "ignore", they have no weight; "negative", they belong to no mask (Mask2Former's).
    """
    batch, height, width = labels.shape
    pixel = (points + 1) / 2 * points.new_tensor([width, height]) - 0.5
    low = pixel.floor()
    fraction = pixel - low
    image = torch.arange(batch, device=labels.device)[:, None]
    weight = torch.zeros_like(points[..., 0])
    inside = weight.new_zeros(batch, ids.shape[1] + 1, points.shape[1])  # the last row stays empty
    for dx in (0, 1):
        for dy in (0, 1):
            x = (low[..., 0] + dx).long().clamp(0, width - 1)
            y = (low[..., 1] + dy).long().clamp(0, height - 1)
            label = labels[image, y, x]
            part = (fraction[..., 0] - (1 - dx)).abs() * (fraction[..., 1] - (1 - dy)).abs()
            valid = part * (label >= 0)  # 0 for an ignored neighbour, so its place below does not matter
            inside.scatter_add_(1, torch.searchsorted(ids, label)[:, None], valid[:, None])
            weight += part if ignored_pixels == "negative" else valid
    return PointLabels(points, weight, inside[:, :-1].contiguous())  # `take` is slow on anything else


def grid_points(height: int, width: int, device: torch.device) -> Tensor:
    """The centres of a mask's pixels, row by row: (height x width, 2), (x, y) in [-1, 1]."""
    x, y = ((2 * torch.arange(side, device=device) + 1) / side - 1 for side in (width, height))
    return torch.cartesian_prod(y, x).flip(1)


def random_points(batch: int, count: int, device: torch.device) -> Tensor:
    """Uniform points: (B, count, 2), (x, y) in [-1, 1]."""
    return 2 * torch.rand(batch, count, 2, device=device) - 1


def sample_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of mask_logits (B, Q, h, w) at points (B, P, 2) in [-1, 1] -> (B, Q, P), differentiable."""
    mask_logits = at_least_float32(mask_logits)
    grid = points.to(mask_logits.dtype)[:, None]
    return F.grid_sample(mask_logits, grid, padding_mode="border", align_corners=False)[:, :, 0]


# -------------------------------------------------------------------------------------------------- matching


class Match(NamedTuple):
    """A one-to-one assignment: `query[i]` predicts `target[i]`. Both (K,) int64."""

    query: Tensor
    target: Tensor


class Matches(NamedTuple):
    """The matched masks of a batch in every decoder output, image after image.

    image: (K,) int64; query, target: (O, K) int64. In output o, query[o, k] of image[k] predicts its target[o, k]. K is
    the same in every output.
    """

    image: Tensor
    query: Tensor
    target: Tensor


def hungarian(cost: Tensor) -> Match:
    """The cheapest one-to-one assignment of the rows (queries) and columns (targets) of cost (Q, M)."""
    if linear_sum_assignment is None:
        raise ImportError("training needs scipy for the Hungarian matching: pip install scipy")
    finite = torch.nan_to_num(cost.detach().double(), nan=1e9, posinf=1e9, neginf=-1e9)
    query, target = linear_sum_assignment(finite.cpu().numpy())
    return Match(
        torch.as_tensor(query, dtype=torch.int64, device=cost.device),
        torch.as_tensor(target, dtype=torch.int64, device=cost.device),
    )


def pairwise_bce(logits: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """Mean binary cross-entropy of every pair: logits (B, Q, P), inside (B, M, P), weight (B, P) -> (B, Q, M).

    -t log s(x) - (1 - t) log(1 - s(x)) = softplus(x) - x t: one matrix product for all pairs.
    """
    total = weight.sum(-1)[..., None, None].clamp(min=TINY)
    return (F.softplus(logits) @ weight[..., None] - logits @ inside.mT) / total


def pairwise_dice(logits: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """Dice loss of every pair: logits (B, Q, P), inside (B, M, P), weight (B, P) -> (B, Q, M) in [0, 1]."""
    probs = logits.sigmoid()
    total = probs @ weight[..., None] + inside.sum(-1)[..., None, :]
    return 1 - (2 * (probs @ inside.mT) + 1) / (total + 1)


@torch.no_grad()
def mask_cost(logits: Tensor, truth: PointLabels, mask_weight: float, dice_weight: float) -> Tensor:
    """mask_weight * BCE + dice_weight * dice of every pair (section 3.2).

    logits: (B, Q, P) at `truth.points` -> (B, Q, M).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, weight, inside = at_least_float32(logits), truth.weight, truth.inside
        return mask_weight * pairwise_bce(logits, inside, weight) + dice_weight * pairwise_dice(logits, inside, weight)


@torch.no_grad()
def match_labels(similarity: Tensor, image_labels: Tensor) -> Tensor:
    """Assign every present label of an image to one query: Hungarian on the negative cosine (section 3.2).

    similarity: (B, Q, C) cosine in [-1, 1].
    image_labels: (B, C), 1 present, 0 absent, -1 unknown.
    Returns (B, Q) int64: a class index, or UNMATCHED. Where labels outnumber queries, the best fitting Q are assigned.
    """
    scores = similarity.cpu()
    present = present_labels(image_labels)
    rows = [assign_labels(-score[:, labels], labels) for score, labels in zip(scores, present, strict=True)]
    return torch.stack(rows).to(similarity.device)


def present_labels(image_labels: Tensor) -> list[Tensor]:
    """The present labels of each image: (B, C) -> B times (L,) int64, on the CPU."""
    return [(row == 1).nonzero().squeeze(1) for row in image_labels.cpu()]


def assign_labels(cost: Tensor, labels: Tensor) -> Tensor:
    """cost (Q, L), labels (L,) class indices -> (Q,) a class index or UNMATCHED."""
    match = hungarian(cost)
    return torch.full((len(cost),), UNMATCHED).index_copy(0, match.query, labels[match.target])


def assign(
    mask_cost: Tensor, label_cost: Tensor, ids: Tensor, labels: Tensor, matching: str, class_weight: float
) -> tuple[Match, Tensor]:
    """The masks and the labels (Q,) of one image's queries: a class index or UNMATCHED. By one of three matchings.

    mask_cost: (Q, M) of mask targets with ids (M,); except for "unpaired" it includes the cost of their labels.
    label_cost: (Q, L) of the present labels (L,).
    matching:
        "unpaired": two independent assignments (sections 3.1, 3.2).
        "joint": a query takes its mask's id as its label; labels without a mask go to left-over queries by label_cost.
        "hybrid": the same in one assignment, where labels without a mask compete at class_weight * label_cost.
    """
    if matching == "unpaired":
        return hungarian(mask_cost), assign_labels(label_cost, labels)
    without_mask = ~torch.isin(labels, ids)
    label_cost, labels = label_cost[:, without_mask], labels[without_mask]
    query_labels = torch.full((len(mask_cost),), UNMATCHED)
    if matching == "hybrid":
        finite = torch.nan_to_num(mask_cost.double(), nan=1e5, posinf=1e5, neginf=-1e5)
        masks_first = finite - 1e6  # matters only where there are too few queries
        match = hungarian(torch.cat([masks_first, class_weight * label_cost], dim=1))
        query_labels[match.query] = torch.cat([ids, labels])[match.target]
        has_mask = match.target < len(ids)
        return Match(match.query[has_mask], match.target[has_mask]), query_labels
    match = hungarian(mask_cost)
    query_labels[match.query] = ids[match.target]
    left_over = query_labels == UNMATCHED
    query_labels[left_over] = assign_labels(label_cost[left_over], labels)
    return match, query_labels


# ---------------------------------------------------------------------------------------------- mask losses


@torch.no_grad()
def choose_points(
    mask_logits: Tensor, image: Tensor, truth: PointLabels, num_points: int, importance_sample_ratio: float
) -> Tensor:
    """Mask2Former's points for the mask losses: most are where the prediction is uncertain, the rest are uniform.

    mask_logits: (K, h, w) of the matched queries; image: (K,).
    The last (1 - importance_sample_ratio) * num_points of an image's `truth.points` are used by all its masks. The
    points before them are candidates: a mask takes those with the smallest |logit|, points without weight last.
    Returns (K, num_points) int32, indices into the image's `truth.points`.
    """
    num_uncertain = int(importance_sample_ratio * num_points)
    num_candidates = truth.points.shape[1] - (num_points - num_uncertain)
    certainty = sample_logits(mask_logits[:, None], truth.points[image, :num_candidates])[:, 0].abs_()
    certainty.masked_fill_(truth.weight[image, :num_candidates] == 0, torch.inf)
    uncertain = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    chosen = uncertain.new_empty(len(mask_logits), num_points, dtype=torch.int32)
    chosen[:, :num_uncertain] = uncertain
    chosen[:, num_uncertain:] = torch.arange(num_candidates, truth.points.shape[1], device=chosen.device)
    return chosen


def mask_losses(
    mask_logits: Tensor,
    image: Tensor,
    query: Tensor,
    target: Tensor,
    chosen: Tensor,
    truth: PointLabels,
    num_masks: Tensor,
    mask_loss: str,
) -> tuple[Tensor, Tensor]:
    """The focal (or BCE) and the dice loss of matched masks at their chosen points (section 3.2).

    mask_logits: (B, Q, h, w); image, query, target: (K,), see `Matches`; chosen: see `choose_points`.
    """
    _, num_targets, points_of_image = truth.inside.shape
    # Flat indices: `take` is several times as fast as an index of three tensors.
    place = chosen.long() + image[:, None] * points_of_image
    points = truth.points.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, place.shape)
    logits = sample_logits(mask_logits[image, query][:, None], points)[:, 0]  # (K, points)
    weight = truth.weight.take(place)
    row = image * num_targets + target
    share = truth.inside.take(chosen + row[:, None] * points_of_image) / weight.clamp(min=TINY)
    loss = focal_loss if mask_loss == "focal" else bce_loss
    return loss(logits, share, num_masks, weight=weight), dice_loss(logits, share, num_masks, weight=weight)


def dice_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Dice loss (section 3.2), summed over masks, divided by num_masks.

    logits, targets: (M, P); targets in [0, 1]. weight: (M, P) in [0, 1], 0 on ignored points.
    """
    probs, targets = at_least_float32(logits).sigmoid(), at_least_float32(targets)
    weight = torch.ones_like(probs) if weight is None else weight
    overlap = 2 * (weight * probs * targets).sum(1)
    total = (weight * (probs + targets)).sum(1)
    return (1 - (overlap + 1) / (total + 1)).sum() / num_masks


def bce_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the points that count, summed over masks, divided by num_masks.

    logits, targets, weight: (M, P), as in `dice_loss`. Mask2Former's own mask loss.
    """
    loss = F.binary_cross_entropy_with_logits(at_least_float32(logits), at_least_float32(targets), reduction="none")
    return _point_mean(loss, weight).sum() / num_masks


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    num_masks: float | Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Focal loss (section 3.2; Lin et al. 2017), mean over the points that count, divided by num_masks.

    logits, targets, weight: (M, P), as in `dice_loss`. alpha weighs positives, 1 - alpha negatives.
    """
    logits, targets = at_least_float32(logits), at_least_float32(targets)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probs = logits.sigmoid()
    miss = probs + targets - 2 * probs * targets  # 1 - p_t
    balance = 1 - alpha + (2 * alpha - 1) * targets
    return _point_mean(balance * miss**gamma * cross_entropy, weight).sum() / num_masks


def _point_mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """(M, P) -> (M,): mean over the points, weighted; 0 for a mask whose points are all ignored."""
    if weight is None:
        return loss.mean(1)
    return (weight * loss).sum(1) / weight.sum(1).clamp(min=TINY)


# --------------------------------------------------------------------------------------------- class losses


def probabilities_of_cosines(similarity: Tensor, background: Tensor | None, temperature: float) -> Tensor:
    """p_q of Eq. 2: similarity (..., Q, C) and, where there is a t_0, background (..., Q), both cosine."""
    background_logits = None if background is None else at_least_float32(background) / temperature
    return class_probabilities(at_least_float32(similarity) / temperature, background_logits)


def kl_to_uniform(log_probs: Tensor) -> Tensor:
    """KL(p || U) = ln C - H(p) of log_probs (..., C) -> (...), in [0, ln C] (Eq. 5)."""
    return math.log(log_probs.shape[-1]) + (log_probs.exp() * log_probs).sum(-1)


def class_loss(
    similarity: Tensor,
    target: Tensor,
    temperature: float,
    matched_weight: float,
    *,
    kl: str = "p_u",
    class_norm: str = "groups",
    num_matched: Tensor | None = None,
    num_unmatched: Tensor | None = None,
) -> Tensor:
    """Background-aware class loss (Eq. 5): matched queries learn their label, the others to prefer none.

    similarity: (..., Q, C) cosine in [-1, 1]; target: (..., Q) class index or UNMATCHED.
    kl: "p_u" is KL(p || U) as printed, "u_p" is KL(U || p).
    class_norm: "groups" takes the mean over each group. "queries" takes the sum over all queries, as Eq. 1 prints it,
        divided by the number of matched ones, or of images if there are more of these.
    num_matched, num_unmatched: the numbers of queries in each group; default: those in `target`.
    Reading: Eq. 5 does not say sum or mean. In a sum, 92 unmatched queries count far more than 8 matched ones. The sum
    is divided because alpha and beta are Mask2Former's weights (section 4.3): there, sums over masks are divided by
    their number. So with both values the cross-entropy has the same dose; only that of the KL differs.
    """
    log_probs = (at_least_float32(similarity) / temperature).log_softmax(-1)
    matched = target != UNMATCHED
    cross_entropy = -log_probs.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    if kl == "p_u":
        divergence = kl_to_uniform(log_probs)
    elif kl == "u_p":
        divergence = -log_probs.mean(-1) - math.log(log_probs.shape[-1])
    else:
        raise ValueError(f"kl must be 'p_u' or 'u_p', got {kl!r}")
    num_matched = matched.sum() if num_matched is None else num_matched
    num_unmatched = (~matched).sum() if num_unmatched is None else num_unmatched
    if class_norm == "queries":
        num_images = (num_matched + num_unmatched) / max(target.shape[-1], 1)
        num_matched = num_unmatched = torch.maximum(num_matched, num_images)
    elif class_norm != "groups":
        raise ValueError(f"class_norm must be 'groups' or 'queries', got {class_norm!r}")
    return matched_weight * _mean_where(matched, cross_entropy, num_matched) + (1 - matched_weight) * _mean_where(
        ~matched, divergence, num_unmatched
    )


def _mean_where(where: Tensor, values: Tensor, count: Tensor) -> Tensor:
    """The sum of the values at `where`, over `count`; 0 where there are none."""
    return values.masked_fill(~where, 0).sum() / count.clamp(min=TINY)


def background_class_loss(
    similarity: Tensor,
    background_similarity: Tensor,
    target: Tensor,
    temperature: float,
    *,
    unmatched_weight: float = 0.1,
    num_matched: Tensor | None = None,
    num_unmatched: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with a background class t_0 for unmatched queries (Eq. 1-2), the baseline of Table 6.

    similarity: (..., Q, C) cosine; background_similarity: (..., Q) cosine with the background embedding.
    target: (..., Q) class index or UNMATCHED. The mean is weighted, 1 for matched, unmatched_weight for unmatched.
    num_matched, num_unmatched: as in `class_loss`.
    """
    logits = torch.cat([similarity, background_similarity[..., None]], dim=-1)
    log_probs = (at_least_float32(logits) / temperature).log_softmax(-1)
    background = similarity.shape[-1]
    matched = target != UNMATCHED
    index = target.masked_fill(~matched, background)
    cross_entropy = -log_probs.gather(-1, index[..., None]).squeeze(-1)
    of_matched, of_unmatched = cross_entropy.masked_fill(~matched, 0), cross_entropy.masked_fill(matched, 0)
    total = of_matched.sum() + unmatched_weight * of_unmatched.sum()
    num_matched = matched.to(total.dtype).sum() if num_matched is None else num_matched
    num_unmatched = (~matched).to(total.dtype).sum() if num_unmatched is None else num_unmatched
    return total / (num_matched + unmatched_weight * num_unmatched).clamp(min=TINY)


def ranking_loss(similarity: Tensor, positive: Tensor, negative: Tensor, *, norm: str = "positives") -> Tensor:
    """Multi-label ranking loss (Eq. 6, 7): every positive label should outrank every negative one.

    similarity: (..., B, Q, C) cosine in [-1, 1], not divided by the temperature; a sum over the axes before B.
    positive, negative: (B, C) bool; a label in neither is unknown and takes no part.
    norm: "positives" divides by |P| as printed, "pairs" by |P||N|. An image without P or without N adds 0.
    """
    if norm not in ("positives", "pairs"):
        raise ValueError(f"norm must be 'positives' or 'pairs', got {norm!r}")
    scores = at_least_float32(similarity).amax(dim=-2)  # (..., B, C)  r*: the best query of each class
    total = scores.sum() * 0
    for score, is_positive, is_negative in zip(scores.unbind(-2), positive, negative, strict=True):
        above = score[..., is_positive.nonzero().squeeze(1).to(score.device)]
        below = score[..., is_negative.nonzero().squeeze(1).to(score.device)]
        gap = below[..., None, :] - above[..., :, None]  # (..., |P|, |N|)  r*_k - r*_j
        count = above.shape[-1] * (1 if norm == "positives" else below.shape[-1])
        total = total + F.softplus(gap).sum() / max(count, 1)
    return total / len(positive)  # Eq. 7


# ------------------------------------------------------------------------------------ beyond the paper: label map


def possible_labels(
    label_map: Tensor, ids: Tensor, image_labels: Tensor, points: Tensor, *, pixels: str = "all"
) -> Tensor:
    """The classes that the pixel at each point may have: (C, P) bool.

    A labelled pixel has its own class. An ignored pixel has the image labels without a mask, present or unknown; with
    pixels="labelled" it has none. Padding has none.
    label_map: (H, W) ids of the class axis; ids: (M,); image_labels: (C,); points: (P, 2) in [-1, 1].
    """
    height, width = label_map.shape
    x, y = ((points + 1) / 2 * points.new_tensor([width, height])).long().unbind(1)
    label = label_map[y.clamp(0, height - 1), x.clamp(0, width - 1)]
    possible = label == torch.arange(len(image_labels), device=label.device)[:, None]
    if pixels == "all":
        without_mask = image_labels != 0
        without_mask[ids] = False
        possible |= without_mask.to(label.device)[:, None] & (label == IGNORED)
    return possible


def label_map_loss(class_probs: Tensor, mask_logits: Tensor, points: Tensor, possible: Tensor) -> Tensor:
    """Minus the log of the share of Eq. 4's scores that possible classes have; not the paper's.

    The mean over an image's points, then over images. An image counts as 0 where no point has a possible class. This
    loss connects a query's class with its mask; Eq. 5 and the mask losses do so only through the query. With image
    labels of unseen classes it supposes that ignored pixels belong to these classes.
    class_probs: (B, Q, C) of Eq. 2. mask_logits: (B, Q, h, w). points: (B, P, 2). possible: (B, C, P), 1 or 0, see
    `possible_labels`; a point without any takes no part.
    """
    with torch.autocast(mask_logits.device.type, enabled=False):
        masks, class_probs = sample_logits(mask_logits, points).sigmoid(), at_least_float32(class_probs)
        possible_scores = (class_probs @ possible * masks).sum(1)  # Eq. 4's, summed over the possible classes
        scores = (class_probs.sum(2, keepdim=True) * masks).sum(1)
    known = possible.any(1)
    log_share = possible_scores.clamp(min=FLOOR).log() - scores.clamp(min=FLOOR).log()
    return -((log_share * known).sum(1) / known.sum(1).clamp(min=1)).mean()


# ------------------------------------------------------------------------------------------------------ Eq. 8


class Losses(NamedTuple):
    """terms: the unweighted scalars class, mask, dice and rank of Eq. 8, each summed over the decoder outputs; with a
    label_map_weight also label_map. same_label_rate: see the function of this name.
    """

    terms: dict[str, Tensor]
    same_label_rate: Tensor


def zs3_losses(
    mask_logits: list[Tensor],
    similarity: list[Tensor],
    background_similarity: list[Tensor | None],
    targets: Targets,
    config: Zs3Config,
    counts: Tensor | None = None,
) -> Losses:
    """The terms of Eq. 8. Only this function, and its steps below, see the config.

    For each decoder output: mask_logits (B, Q, h, w), similarity (B, Q, C), and for class_loss "cross_entropy"
    background_similarity (B, Q), else None.
    counts: (3,), the divisors of sums, see `count_targets`; None: those of these targets.
    """
    ids = pad_ids(targets.ids, mask_logits[0].device)
    matches, query_labels = match_outputs(mask_logits, similarity, background_similarity, targets, ids, config)
    if counts is None:
        counts = count_targets(targets.ids, targets.image_labels, query_labels.shape[2], config.matching)
    num_masks, num_matched, num_unmatched = mean_over_ranks(counts.to(query_labels.device)).clamp(min=TINY)

    cosine = torch.stack(similarity)
    numbers = {"num_matched": num_matched, "num_unmatched": num_unmatched}
    if config.class_loss == "cross_entropy":
        background = torch.stack(background_similarity)
        numbers["unmatched_weight"] = config.no_object_weight
        of_classes = background_class_loss(cosine, background, query_labels, config.class_temperature, **numbers)
    else:
        numbers |= {"matched_weight": config.matched_weight, "kl": config.kl, "class_norm": config.class_norm}
        of_classes = class_loss(cosine, query_labels, config.class_temperature, **numbers)
    positive, negative = targets.image_labels == 1, targets.image_labels == 0
    of_ranking = ranking_loss(config.rank_scale * cosine, positive, negative, norm=config.rank_norm)

    num_points = config.train_num_points
    num_uniform = num_points - int(config.importance_sample_ratio * num_points)
    num_candidates = int(config.oversample_ratio * num_points)
    points = random_points(len(targets.ids), num_candidates + num_uniform, query_labels.device)
    points = points.to(torch.promote_types(mask_logits[0].dtype, torch.float32))
    truth = label_points(targets.labels, ids, points, ignored_pixels=config.ignored_pixels)
    mask, dice = mask_terms(mask_logits, matches, truth, num_masks, config)
    terms = {"class": of_classes, "mask": mask, "dice": dice, "rank": of_ranking}
    if config.label_map_weight:
        uniform = points[:, -num_uniform:] if num_uniform else points
        terms["label_map"] = label_map_term(mask_logits, similarity, background_similarity, targets, uniform, config)
    return Losses(terms, same_label_rate(matches, query_labels, ids))


def mask_terms(
    mask_logits: list[Tensor], matches: Matches, truth: PointLabels, num_masks: Tensor, config: Zs3Config
) -> tuple[Tensor, Tensor]:
    """The sums of `mask_losses` over the decoder outputs, mask_logits (B, Q, h, w) of each."""
    masks_at_once = max(POINTS_AT_ONCE // truth.points.shape[1], 1)
    losses = []
    sizes = config.train_num_points, config.importance_sample_ratio
    for logits, queries, targets in zip(mask_logits, matches.query, matches.target, strict=True):
        parts = (values.split(masks_at_once) for values in (matches.image, queries, targets))
        for image, query, target in zip(*parts, strict=True):
            chosen = choose_points(logits[image, query], image, truth, *sizes)
            # All logits, which exist anyway. A copy of the matched masks would be kept until the backward pass.
            given = logits, image, query, target, chosen, truth, num_masks, config.mask_loss
            losses.append(remade_backward(mask_losses, *given))
    mask, dice = (torch.stack(values).sum() for values in zip(*losses, strict=True))
    return mask, dice


def label_map_term(
    mask_logits: list[Tensor],
    similarity: list[Tensor],
    background_similarity: list[Tensor | None],
    targets: Targets,
    points: Tensor,
    config: Zs3Config,
) -> Tensor:
    """The sum of `label_map_loss` over the decoder outputs, at points (B, P, 2)."""
    images = zip(*targets, points, strict=True)
    possible = [possible_labels(*image, pixels=config.label_map_pixels) for image in images]
    possible = torch.stack(possible).to(points.dtype)
    losses = []
    for logits, *cosines in zip(mask_logits, similarity, background_similarity, strict=True):
        probs = probabilities_of_cosines(*cosines, config.class_temperature)
        losses.append(remade_backward(label_map_loss, probs, logits, points, possible))
    return torch.stack(losses).sum()


def count_targets(ids: list[Tensor], image_labels: Tensor, num_queries: int, matching: str) -> Tensor:
    """A batch's numbers of masks, of queries that get a label and of queries that get none: (3,) float32.

    ids, image_labels: as in Targets. The numbers are the same for every decoder output and every result of matching.
    Where a batch is cut into parts, each part is given the mean of the parts' counts: their gradients then add up to
    that of the whole.
    """
    labels = present_labels(image_labels)
    if matching != "unpaired":  # a mask's id is its query's label, too
        labels = [torch.cat(both).unique() for both in zip(ids, labels, strict=True)]
    matched = sum(min(len(row), num_queries) for row in labels)
    num_masks = sum(len(row) for row in ids)
    return torch.tensor([num_masks, matched, len(labels) * num_queries - matched], dtype=torch.float32)


@torch.no_grad()
def match_outputs(
    mask_logits: list[Tensor],
    similarity: list[Tensor],
    background_similarity: list[Tensor | None],
    targets: Targets,
    ids: Tensor,
    config: Zs3Config,
) -> tuple[Matches, Tensor]:
    """The masks of the queries of all images and decoder outputs, and query_labels (O, B, Q); see `assign`.

    ids: (B, M), those of the targets on the device of the predictions, see `pad_ids`.
    The costs of all outputs and images go to the CPU in one copy, and so do the indices back.
    """
    device, (batch, _, height, width) = mask_logits[0].device, mask_logits[0].shape
    on_grid = config.match_points == "grid"
    if on_grid:
        points = grid_points(height, width, device).expand(batch, -1, -1)
    else:
        points = random_points(batch, config.train_num_points, device)
    points = points.to(torch.promote_types(mask_logits[0].dtype, torch.float32))
    truth = label_points(targets.labels, ids, points, ignored_pixels=config.ignored_pixels)
    present = present_labels(targets.image_labels)
    present_there = pad_sequence(present, batch_first=True).to(device)  # (B, L)
    ids_there = ids.masked_fill(ids == NO_ID, 0)  # these columns are cut off below

    costs = []
    for logits, cosine, background in zip(mask_logits, similarity, background_similarity, strict=True):
        at_points = logits.flatten(2) if on_grid else sample_logits(logits, points)
        cost = mask_cost(at_points, truth, config.mask_weight, config.dice_weight)
        if config.matching != "unpaired":
            probs = probabilities_of_cosines(cosine, background, config.class_temperature)
            cost -= config.class_weight * pick_columns(probs, ids_there)
        costs.append(torch.cat([cost, -pick_columns(cosine, present_there)], dim=2))  # (B, Q, M + L)
    costs = torch.stack(costs, dim=1).cpu()

    masks, query_labels = [], []
    for cost, image_ids, image_labels in zip(costs, targets.ids, present, strict=True):
        of_masks, of_labels = cost.tensor_split([ids.shape[1]], dim=2)  # (O, Q, M), (O, Q, L)
        pairs = zip(of_masks[..., : len(image_ids)], of_labels[..., : len(image_labels)], strict=True)
        assigned = [assign(*pair, image_ids, image_labels, config.matching, config.class_weight) for pair in pairs]
        masks.append(torch.stack([torch.stack(match) for match, _ in assigned], dim=1))  # (2, O, K)
        query_labels.append(torch.stack([labels for _, labels in assigned]))
    image = torch.repeat_interleave(torch.tensor([mask.shape[2] for mask in masks]))
    query, target = torch.cat(masks, dim=2).to(device)
    return Matches(image.to(device), query, target), torch.stack(query_labels, dim=1).to(device)


def pick_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Some columns of each image: values (B, Q, C), columns (B, L) -> (B, Q, L)."""
    return values.gather(2, columns[:, None].expand(-1, values.shape[1], -1))


def same_label_rate(matches: Matches, query_labels: Tensor, ids: Tensor) -> Tensor:
    """The share of queries with a mask whose label is the mask's id, in the last decoder output; NaN without masks.

    query_labels: (O, B, Q); ids: (B, M), see `pad_ids`.
    """
    own = ids[matches.image, matches.target[-1]]
    return (query_labels[-1, matches.image, matches.query[-1]] == own).float().mean()


def mean_over_ranks(counts: Tensor) -> Tensor:
    """The mean over the processes of a distributed run, as DDP averages the gradients."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.clone()  # all_reduce changes them in place
        torch.distributed.all_reduce(counts)
        counts = counts / torch.distributed.get_world_size()
    return counts
