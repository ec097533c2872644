"""Matching and losses of the paper, one function per equation, for the predictions of one decoder output.

Axes: B image, Q query, C class name, M mask target, K matched pair, P sampled point, H W label map, h w mask.
Equation numbers are those of arXiv 2301.07336. Readings where the paper is silent are marked "Reading:".
Everything below `zs3_losses` takes tensors and numbers, no config. All sums are made in float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from .configuration_zs3 import Zs3Config
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import Zs3Config

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # inference needs no matching
    linear_sum_assignment = None

UNMATCHED = -1  # a query without a label


class Match(NamedTuple):
    """A one-to-one assignment: `query[i]` predicts `target[i]`. Both (K,) int64."""

    query: Tensor
    target: Tensor


class MaskTargets(NamedTuple):
    """The class-agnostic mask targets of a batch, M in all images together.

    labels: (B, H, W) int64, the ids; -1 is ignored.
    image: (M,) int64, the image of each target.
    value: (M,) int64, the id in `labels` whose pixels are the target.
    """

    labels: Tensor
    image: Tensor
    value: Tensor


def mask_targets(labels: Tensor) -> MaskTargets:
    """One target for each distinct id >= 0 of each label map; labels (B, H, W) int64."""
    present = [torch.unique(label_map) for label_map in labels]
    present = [values[values >= 0] for values in present]
    image = torch.repeat_interleave(torch.tensor([len(values) for values in present]))
    return MaskTargets(labels, image.to(labels.device), torch.cat(present))


# ---------------------------------------------------------------------------------------------- matching


def hungarian(cost: Tensor) -> Match:
    """The cheapest one-to-one assignment of the rows (queries) and columns (targets) of cost (Q, M)."""
    if linear_sum_assignment is None:
        raise ImportError("training needs scipy for the Hungarian matching: pip install scipy")
    finite = torch.nan_to_num(cost.detach().float(), nan=1e9, posinf=1e9, neginf=-1e9)
    query, target = linear_sum_assignment(finite.cpu().numpy())
    return Match(
        torch.as_tensor(query, dtype=torch.int64, device=cost.device),
        torch.as_tensor(target, dtype=torch.int64, device=cost.device),
    )


@torch.no_grad()
def match_labels(similarity: Tensor, image_labels: Tensor) -> Tensor:
    """Assign every present label of an image to one query: Hungarian on the negative cosine (section 3.2).

    similarity: (B, Q, C) cosine in [-1, 1].
    image_labels: (B, C), 1 present, 0 absent, -1 unknown.
    Returns (B, Q) int64: a class index, or UNMATCHED. Of more labels than queries, the best fitting Q are assigned.
    """
    target = torch.full(similarity.shape[:2], UNMATCHED, dtype=torch.int64, device=similarity.device)
    for row, scores, labels in zip(target, similarity, image_labels, strict=True):
        present = (labels == 1).nonzero().squeeze(1)
        match = hungarian(-scores[:, present])
        row[match.query] = present[match.target]
    return target


@torch.no_grad()
def match_masks(
    mask_logits: Tensor,
    targets: MaskTargets,
    num_points: int,
    mask_weight: float,
    dice_weight: float,
    class_cost: Tensor | None = None,
) -> Match:
    """Assign mask targets to queries by mask_weight * BCE + dice_weight * dice on random points (section 3.2).

    mask_logits: (B, Q, h, w). The points are shared by all masks of an image.
    class_cost: (B, Q, C), added where given (joint matching: `targets.value` indexes C).
    Returns the match of all images together; `target` indexes `targets`, whose `image` says where `query` lives.
    """
    points = torch.rand(len(mask_logits), num_points, 2, device=mask_logits.device)
    logits = F.grid_sample(mask_logits.float(), 2 * points[:, :, None] - 1, padding_mode="border", align_corners=False)
    logits = logits.squeeze(-1)  # (B, Q, P)
    share, weight = point_targets(
        targets, torch.arange(len(targets.image), device=points.device), points[targets.image]
    )
    queries, chosen = [], []
    for image in range(len(mask_logits)):
        mine = (targets.image == image).nonzero().squeeze(1)  # (M,) of this image
        if len(mine) == 0:
            continue
        with torch.autocast(mask_logits.device.type, enabled=False):  # sums over points in float32
            cost = mask_weight * pairwise_bce(logits[image], share[mine], weight[mine[0]])
            cost = cost + dice_weight * pairwise_dice(logits[image], share[mine], weight[mine[0]])
        if class_cost is not None:
            cost = cost + class_cost[image][:, targets.value[mine]]
        match = hungarian(cost)
        queries.append(match.query)
        chosen.append(mine[match.target])
    nothing = targets.image.new_zeros(0)
    return Match(torch.cat([nothing, *queries]), torch.cat([nothing, *chosen]))


def pairwise_bce(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean binary cross-entropy of every pair: logits (Q, P), targets (M, P), weight (P,) -> (Q, M)."""
    positive = (F.softplus(-logits) * weight) @ targets.T
    negative = (F.softplus(logits) * weight) @ (1 - targets).T
    return (positive + negative) / weight.sum().clamp(min=1)


def pairwise_dice(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Dice loss of every pair: logits (Q, P), targets (M, P), weight (P,) -> (Q, M) in [0, 1]."""
    probs = logits.sigmoid() * weight
    total = probs.sum(1)[:, None] + (targets * weight).sum(1)[None, :]
    return 1 - (2 * probs @ targets.T + 1) / (total + 1)


# ------------------------------------------------------------------------------------------ point sampling


def point_targets(targets: MaskTargets, chosen: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The value of some mask targets at points, sampled bilinearly from the id map (no mask is ever made).

    chosen: (K,) indices into `targets`; points: (K, P, 2) as (x, y) in [0, 1].
    Returns targets (K, P) in [0, 1] and weight (K, P) in [0, 1]. A point between pixels sees four of them: its
    weight is the share that is not ignored, its target the share of the target's id among those. Points within
    half a pixel of the border are clamped to it.
    """
    height, width = targets.labels.shape[-2:]
    pixel = points * points.new_tensor([width, height]) - 0.5
    low = pixel.floor()
    fraction = pixel - low
    image, value = targets.image[chosen][:, None], targets.value[chosen][:, None]
    share, weight = torch.zeros_like(points[..., 0]), torch.zeros_like(points[..., 0])
    for dx in (0, 1):
        for dy in (0, 1):
            x = (low[..., 0] + dx).long().clamp(0, width - 1)
            y = (low[..., 1] + dy).long().clamp(0, height - 1)
            corner = (fraction[..., 0] - (1 - dx)).abs() * (fraction[..., 1] - (1 - dy)).abs()
            label = targets.labels[image, y, x]  # (K, P)
            share = share + corner * (label == value)
            weight = weight + corner * (label >= 0)
    return share / weight.clamp(min=1e-6), weight


@torch.no_grad()
def sample_points(
    mask_logits: Tensor,
    targets: MaskTargets,
    chosen: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
) -> Tensor:
    """Mask2Former's points for the mask losses: most where the prediction is uncertain, the rest uniform.

    mask_logits: (K, h, w) of the matched queries. Returns (K, P, 2) as (x, y) in [0, 1].
    Ignored places are drawn among the uncertain points only when nothing else is left.
    """
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates = torch.rand(len(chosen), int(num_points * oversample_ratio), 2, device=mask_logits.device)
    uncertainty = -sample_logits(mask_logits, candidates).abs()
    height, width = targets.labels.shape[-2:]
    x = (candidates[..., 0] * width).long().clamp(max=width - 1)
    y = (candidates[..., 1] * height).long().clamp(max=height - 1)
    nearest = targets.labels[targets.image[chosen][:, None], y, x]
    uncertainty = uncertainty.masked_fill(nearest < 0, -torch.inf)
    best = uncertainty.topk(num_uncertain, dim=1).indices  # (K, num_uncertain)
    uncertain = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    uniform = torch.rand(len(chosen), num_points - num_uncertain, 2, device=mask_logits.device)
    return torch.cat([uncertain, uniform], dim=1)


def sample_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of mask_logits (K, h, w) at points (K, P, 2) in [0, 1] -> (K, P), differentiable."""
    grid = 2 * points[:, :, None] - 1
    sampled = F.grid_sample(mask_logits[:, None].float(), grid, padding_mode="border", align_corners=False)
    return sampled[:, 0, :, 0]


# ------------------------------------------------------------------------------------------------- losses


def dice_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Dice loss (section 3.2), summed over masks, divided by num_masks.

    logits, targets: (M, P); targets in [0, 1]. weight: (M, P) in [0, 1], 0 on ignored points.
    """
    probs, targets = logits.float().sigmoid(), targets.float()
    weight = torch.ones_like(probs) if weight is None else weight
    overlap = 2 * (weight * probs * targets).sum(1)
    total = (weight * (probs + targets)).sum(1)
    return (1 - (overlap + 1) / (total + 1)).sum() / num_masks


def bce_loss(logits: Tensor, targets: Tensor, num_masks: float | Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the points that count, summed over masks, divided by num_masks.

    logits, targets, weight: (M, P), as in `dice_loss`. Mask2Former's own mask loss.
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
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
    logits, targets = logits.float(), targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probs = logits.sigmoid()
    miss = probs * (1 - targets) + (1 - probs) * targets  # 1 - p_t
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return _point_mean(balance * miss**gamma * cross_entropy, weight).sum() / num_masks


def _point_mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """(M, P) -> (M,): mean over the points, weighted; 0 for a mask whose points are all ignored."""
    if weight is None:
        return loss.mean(1)
    return (weight * loss).sum(1) / weight.sum(1).clamp(min=1)


def class_probabilities(class_logits: Tensor, background_logits: Tensor | None = None) -> Tensor:
    """p_q of Eq. 2: class_logits (..., Q, C) = cosine / temperature -> (..., Q, C).

    background_logits: (..., Q), of the learned t_0 where there is one; it takes part in the sum (j = 0 of Eq. 2)
    and its column is dropped, so that rows sum to at most 1.
    """
    if background_logits is None:
        return class_logits.float().softmax(-1)
    logits = torch.cat([class_logits, background_logits[..., None]], dim=-1)
    return logits.float().softmax(-1)[..., :-1]


def kl_to_uniform(log_probs: Tensor) -> Tensor:
    """KL(p || U) = ln C - H(p) of log_probs (..., C) -> (...), in [0, ln C] (Eq. 5)."""
    return math.log(log_probs.shape[-1]) + (log_probs.exp() * log_probs).sum(-1)


def class_loss(
    similarity: Tensor, target: Tensor, temperature: float, matched_weight: float, *, kl: str = "p_u"
) -> Tensor:
    """Background-aware class loss (Eq. 5): matched queries learn their label, the others to prefer none.

    similarity: (B, Q, C) cosine in [-1, 1]; target: (B, Q) class index or UNMATCHED.
    kl: "p_u" is KL(p || U) as printed, "u_p" is KL(U || p).
    Reading: Eq. 5 does not say sum or mean. Mean over each group, or 92 unmatched queries would drown 8 matched.
    """
    log_probs = (similarity.float() / temperature).log_softmax(-1)
    matched = target != UNMATCHED
    cross_entropy = -log_probs[matched].gather(1, target[matched][:, None]).sum() / matched.sum().clamp(min=1)
    unmatched = log_probs[~matched]
    if kl == "p_u":
        divergence = kl_to_uniform(unmatched)
    elif kl == "u_p":
        divergence = -unmatched.mean(-1) - math.log(unmatched.shape[-1])
    else:
        raise ValueError(f"kl must be 'p_u' or 'u_p', got {kl!r}")
    divergence = divergence.sum() / (~matched).sum().clamp(min=1)
    return matched_weight * cross_entropy + (1 - matched_weight) * divergence


def background_class_loss(
    similarity: Tensor,
    background_similarity: Tensor,
    target: Tensor,
    temperature: float,
    *,
    unmatched_weight: float = 0.1,
) -> Tensor:
    """Cross-entropy with a background class t_0 for unmatched queries (Eq. 1-2), the baseline of Table 6.

    similarity: (B, Q, C) cosine; background_similarity: (B, Q) cosine with the background embedding.
    target: (B, Q) class index or UNMATCHED. The mean is weighted, 1 for matched, unmatched_weight for unmatched.
    """
    logits = torch.cat([similarity.float(), background_similarity.float()[..., None]], dim=-1) / temperature
    background = similarity.shape[-1]
    weight = torch.ones(background + 1, device=logits.device)
    weight[background] = unmatched_weight
    target = target.masked_fill(target == UNMATCHED, background)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)


def ranking_loss(similarity: Tensor, positive: Tensor, negative: Tensor, *, norm: str = "positives") -> Tensor:
    """Multi-label ranking loss (Eq. 6, 7): every positive label should outrank every negative one.

    similarity: (B, Q, C) cosine in [-1, 1], not divided by the temperature.
    positive, negative: (B, C) bool; a label in neither is unknown and takes no part.
    norm: "positives" divides by |P| as printed, "pairs" by |P||N|. An image without P or without N adds 0.
    """
    if norm not in ("positives", "pairs"):
        raise ValueError(f"norm must be 'positives' or 'pairs', got {norm!r}")
    scores = similarity.float().amax(dim=1)  # (B, C)  r*: the best query of each class
    total = scores.sum() * 0
    for score, is_positive, is_negative in zip(scores, positive, negative, strict=True):
        gap = score[is_negative][None, :] - score[is_positive][:, None]  # (|P|, |N|)  r*_k - r*_j
        count = len(gap) if norm == "positives" else gap.numel()
        total = total + F.softplus(gap).sum() / max(count, 1)
    return total / len(scores)  # Eq. 7


class Losses(NamedTuple):
    """terms: unweighted scalars; same_label_rate: share of mask-matched queries whose label is their mask's, 0
    without masks."""

    terms: dict[str, Tensor]
    same_label_rate: Tensor


def zs3_losses(
    mask_logits: Tensor,
    similarity: Tensor,
    background_similarity: Tensor | None,
    targets: MaskTargets,
    image_labels: Tensor,
    num_masks: float | Tensor,
    config: Zs3Config,
) -> Losses:
    """The terms of Eq. 8 for one decoder output; the only function here that sees the config.

    mask_logits (B, Q, h, w), similarity (B, Q, C), background_similarity (B, Q) or None,
    image_labels (B, C) 1 present, 0 absent, -1 unknown; num_masks normalises the mask terms.
    """
    class_cost = None
    if config.matching == "joint":
        background_logits = None if background_similarity is None else background_similarity / config.class_temperature
        probs = class_probabilities(similarity / config.class_temperature, background_logits)
        class_cost = -config.class_weight * probs.detach()
    query, chosen = match_masks(
        mask_logits, targets, config.train_num_points, config.mask_weight, config.dice_weight, class_cost
    )
    image, value = targets.image[chosen], targets.value[chosen]

    if config.matching == "joint":
        label_target = joint_labels(similarity, image_labels, image, query, value)
    else:
        label_target = match_labels(similarity, image_labels)

    matched_logits = mask_logits[image, query]  # (K, h, w)
    points = sample_points(
        matched_logits,
        targets,
        chosen,
        config.train_num_points,
        config.oversample_ratio,
        config.importance_sample_ratio,
    )
    logits = sample_logits(matched_logits, points)
    truth, weight = point_targets(targets, chosen, points)
    mask_loss = focal_loss if config.mask_loss == "focal" else bce_loss

    if config.class_loss == "cross_entropy":
        label_loss = background_class_loss(
            similarity,
            background_similarity,
            label_target,
            config.class_temperature,
            unmatched_weight=config.no_object_weight,
        )
    else:
        label_loss = class_loss(similarity, label_target, config.class_temperature, config.matched_weight, kl=config.kl)

    terms = {
        "class": label_loss,
        "mask": mask_loss(logits, truth, num_masks, weight=weight),
        "dice": dice_loss(logits, truth, num_masks, weight=weight),
        "rank": ranking_loss(similarity, image_labels == 1, image_labels == 0, norm=config.rank_norm),
    }
    same = (label_target[image, query] == value).float()
    return Losses(terms, same.sum() / max(len(same), 1))


def joint_labels(similarity: Tensor, image_labels: Tensor, image: Tensor, query: Tensor, value: Tensor) -> Tensor:
    """Joint matching's labels: a query takes its mask's label; present labels without a mask take left-over queries.

    image, query, value: (K,), the matched masks. Returns (B, Q) int64 class index or UNMATCHED.
    """
    left_over_labels = image_labels.clone()
    left_over_labels[image, value] = 0
    left_over_similarity = similarity.detach().clone()
    left_over_similarity[image, query] = -torch.inf
    target = match_labels(left_over_similarity, left_over_labels)
    target[image, query] = value
    return target
