"""Calibration: the seen/unseen curve, the reliability of confidences, and the rejection of pixels of other classes.

Three counters get the results of `semantic_map`, image by image. Their memory does not grow with the number of images.
They add only whole numbers, so that the counts of parts add up exactly to those of the whole, in any order.

SeenBiasCurve: mIoU(S), mIoU(U) and hIoU for every bias gamma off the scores of seen classes, from one pass.
Reliability: accuracy by confidence, and the expected calibration error.
Rejection: how well the confidence separates pixels of other classes, and a threshold that bounds the share of wrong
labels.

Axes: H W pixels, C classes, G gammas, T levels of the confidence.
"""

import hashlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from label_maps_zs3 import SemanticMap
from zs3.command_line import InputError
from zs3.files import finite_or_none
from zs3.scores.means import Absent, Areas, check_ids, headline_scores, iou_of_areas

# The gap between the best seen and the best unseen score has any order of magnitude: about 1 if the model is sure, some
# thousandths if it can hardly separate hundreds of classes. So there are 32 gammas to each doubling, and neighbours
# differ by 1.6 to 3.1 %. The smallest is 2^-12: a smaller bias changes almost nothing. The largest is 8: Eq. 4 sums
# over queries, and only a few of them cover one pixel. All are exact in float32.
# Their bits after the first five of the mantissa are 0.
_SIZES = np.ldexp(1 + np.arange(32) / 32, np.arange(-12, 3)[:, None]).ravel()
GAMMAS = np.concatenate([[-np.inf], -_SIZES[::-1], [0], _SIZES, [np.inf]])  # (G,), ascending
UNBIASED = len(_SIZES) + 1  # the place of 0
_LATER_BITS = 23 - 5  # of float32's mantissa: they tell numbers between two neighbours apart
_BELOW = int(_SIZES[0].astype(np.float32).view(np.int32) >> _LATER_BITS) - 1

BINS = 15  # Guo et al. 2017
# Thresholds are multiples of 2^-16, about the error of a confidence (1e-5). They are exact in float32, so they divide
# pixels here as they do in the pipeline.
LEVELS = 2**16
UNIT = 2**24  # confidences and shares are added up as whole multiples of 1 / UNIT, the grain of float32 below 1

OUTSIDER = -1  # in a label map: the true class is none of the candidates


class Counter:
    """Counts in arrays. The counts of several parts of a dataset add up to those of the whole."""

    ignore_index: int

    def merge(self, other: Self) -> None:
        """Adds the counts of another part of the dataset."""
        for name, counts in vars(self).items():
            if isinstance(counts, np.ndarray) and counts.dtype != np.bool_:
                counts += getattr(other, name)

    def labelled(self, label: Tensor | np.ndarray, found: SemanticMap) -> tuple[Tensor, Tensor]:
        """The labels of the labelled pixels, and their places, both (P,) int64, on the device of the maps."""
        label, size = torch.as_tensor(label, device=found.label_map.device).long(), found.label_map.shape
        if label.shape != size:
            raise ValueError(f"prediction has shape {tuple(size)}, but the label map {tuple(label.shape)}")
        label = label.flatten()
        places = (label != self.ignore_index).nonzero()[:, 0]
        return label.index_select(0, places), places


class SeenBiasCurve(Counter):
    """Intersections and areas of every class, with each of GAMMAS subtracted from the seen scores (Chao et al. 2016).

    The best seen class, the best unseen class and the gap between their scores decide a pixel's class at any gamma.
    The switch of a pixel is the number of GAMMAS at which its seen class wins.

    predicted, intersection: (C, G + 1) int64, pixels by class and switch. truth: (C,) int64, pixels.
    """

    def __init__(self, is_seen: Sequence[bool] | Tensor | np.ndarray, ignore_index: int):
        self.is_seen = np.asarray(is_seen, dtype=bool)
        if self.is_seen.all() or not self.is_seen.any():
            raise InputError("a curve of seen against unseen classes needs both: the candidates are all of one kind")
        self.ignore_index = ignore_index
        shape = len(self.is_seen), len(GAMMAS) + 1
        self.predicted, self.intersection = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self.truth = np.zeros(len(self.is_seen), dtype=np.int64)

    def update(self, found: SemanticMap, label: Tensor | np.ndarray) -> None:
        """Counts one image. found: with the winners among seen and unseen. label: (H, W), 0 to C - 1, or ignored."""
        label, places = self.labelled(label, found)
        classes, switches = self.predicted.shape
        check_ids(label, classes, self.ignore_index)
        maps = found.label_map, found.seen_map, found.unseen_map, found.gap
        winner, seen, unseen, gap = (_at(places, values) for values in maps)
        switch = _switch(gap, seen < unseen, winner == seen)
        for guess in (seen, unseen):  # no class is in both
            place = (guess * switches + switch).cpu()
            # Dense counts would have as many entries for each image as all images together.
            torch.from_numpy(self.predicted).view(-1).scatter_add_(0, place, torch.ones_like(place))
            hits = (label == guess).cpu().long()
            torch.from_numpy(self.intersection).view(-1).scatter_add_(0, place, hits)
        self.truth += _counts(label, classes)

    @property
    def has_both(self) -> bool:
        """Whether seen and unseen classes both have pixels. Otherwise the curve means nothing."""
        return bool(self.truth[self.is_seen].any() and self.truth[~self.is_seen].any())

    def iou(self, absent: Absent = "union") -> np.ndarray:
        """(G, C) in [0, 1], NaN for the classes that are left out of means: see ConfusionMatrix.iou."""
        intersection, predicted = (self._with_bias(counts) for counts in (self.intersection, self.predicted))
        return iou_of_areas(Areas(intersection, self.truth, predicted), absent)

    def _with_bias(self, counts: np.ndarray) -> np.ndarray:
        """(C, G + 1) by switch -> (G, C) pixels at each gamma. A seen class keeps pixels that have not switched."""
        switched = counts.cumsum(axis=1)
        seen = switched[:, -1:] - switched
        return np.where(self.is_seen[:, None], seen, switched)[:, :-1].T

    def result(self, absent: Absent = "union", every: int = 8) -> dict:
        """Plain numbers in [0, 1]; None: the mean has no class.

        points: lists of equal length: gamma, ascending, miou_seen, miou_unseen, hiou and miou. They have one in `every`
            of the finite GAMMAS, and 0 and the best. All other keys are computed from all GAMMAS.
        seen_only, unseen_only: the same scores at gamma = -inf and inf. unbiased: at 0. best: at the gamma with the
            largest hiou; of equal ones, at the smallest bias.
        area: of all points x = mIoU(U), y = mIoU(S) that some gamma reaches or exceeds in both. It is a sum of steps,
            without interpolation between two gammas. Chao et al. 2016 take the area under the curve of accuracies
            (AUSUC), which only falls. A curve of IoUs also turns back, since too large a bias lowers both.
        """
        columns = {"gamma": GAMMAS, **headline_scores(self.iou(absent), self.is_seen)}
        rows = [dict(zip(columns, row, strict=True)) for row in np.stack(list(columns.values()), axis=1).tolist()]
        rows = finite_or_none(rows)
        finite = [row for row in rows if row["gamma"] is not None]
        seen_only, unseen_only = ({name: row[name] for name in row if name != "gamma"} for row in (rows[0], rows[-1]))
        best = best_point(finite)
        shown = [row for place, row in enumerate(finite) if place % every == 0 or row is best or row["gamma"] == 0]
        ends = [row for row in rows if row["miou_seen"] is not None and row["miou_unseen"] is not None]
        return {
            "absent": absent,
            "area": _attained_area([(row["miou_unseen"], row["miou_seen"]) for row in ends]) if ends else None,
            "unbiased": rows[UNBIASED],
            "best": best,
            "seen_only": seen_only,
            "unseen_only": unseen_only,
            "points": {name: [row[name] for row in shown] for name in rows[0]},
        }


def best_point(points: list[dict]) -> dict | None:
    """The point with the largest hiou; among equal ones, the smallest bias."""
    rated = [point for point in points if point["hiou"] is not None]
    return max(rated, key=lambda point: (point["hiou"], -abs(point["gamma"])), default=None)


def _switch(gap: Tensor, seen_first: Tensor, seen_wins: Tensor) -> Tensor:
    """(P,) int64: the number of GAMMAS at which the seen class wins.

    gap: (P,) float32, the best seen score minus the best unseen one. seen_first: (P,) bool, whether the seen index is
    the lower one. The lower one wins if gamma equals the gap. seen_wins: (P,) bool, whether the seen class wins at 0.
    This is more exact than the gap.
    """
    lead = torch.where(seen_wins, gap, -gap).clamp_(min=0).abs_()  # of the winner; never -0, whose bits are negative
    beaten = (seen_wins != seen_first).int()  # where the size of the bias equals the lead
    # The bits of positive float32 numbers, read as whole numbers, rise with them: no search among the sizes is needed.
    held = (((lead.view(torch.int32) - beaten) >> _LATER_BITS) - _BELOW).clamp_(0, len(_SIZES))
    return torch.where(seen_wins, UNBIASED + 1 + held, UNBIASED - held).long()


def _attained_area(points: list[tuple[float, float]]) -> float:
    """Area of the union of the rectangles from (0, 0) to each point (x, y) in [0, 1]."""
    x, y = np.array(sorted(points, reverse=True)).T
    return float(np.sum((x - np.append(x[1:], 0)) * np.maximum.accumulate(y)))


class Reliability(Counter):
    """Confidence against accuracy, by BINS equal bins of confidence: (0, 1/15], (1/15, 2/15], ..., the first with 0.

    count, correct: (BINS,) int64, pixels. confidence: (BINS,) int64, the sum in units of 1 / UNIT, each one rounded.
    """

    def __init__(self, ignore_index: int):
        self.ignore_index = ignore_index
        self.count, self.correct, self.confidence = np.zeros((3, BINS), dtype=np.int64)

    def update(self, found: SemanticMap, label: Tensor | np.ndarray) -> None:
        """Counts one image. label: (H, W), the true class, or ignored. found: without a bias."""
        label, places = self.labelled(label, found)
        confidence = _at(places, found.confidence).double()
        place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
        self.count += _counts(place, BINS)
        self.correct += _counts(place.masked_select(_at(places, found.label_map) == label), BINS)
        # The sums are exact: they are whole numbers, below 2^53 for images of up to 2^29 pixels.
        sums = torch.bincount(place, weights=(confidence * UNIT).round(), minlength=BINS)
        self.confidence += sums.long().cpu().numpy()

    def result(self) -> dict:
        """bins: low, high, count, and the mean confidence and the accuracy, in [0, 1], None in an empty bin.

        ece: expected calibration error (Guo et al. 2017), the mean over pixels of |accuracy - mean confidence| of their
        bin, in [0, 1]; None without pixels.
        """
        bins, off = [], 0.0
        rows = zip(self.count.tolist(), self.correct.tolist(), self.confidence.tolist(), strict=True)
        for place, (count, correct, confidence) in enumerate(rows):
            means = {"confidence": None, "accuracy": None}
            if count:
                means = {"confidence": confidence / UNIT / count, "accuracy": correct / count}
                off += abs(correct - confidence / UNIT)
            bins.append({"low": place / BINS, "high": (place + 1) / BINS, "count": count, **means})
        pixels = int(self.count.sum())
        return {"pixels": pixels, "ece": off / pixels if pixels else None, "bins": bins}


class Rejection(Counter):
    """ "None of these" if the confidence is below a threshold, as in the pipeline with `background="reject"`.

    Thresholds are t / LEVELS, t = 0 to LEVELS. A pixel is accepted if its confidence is the threshold or more.
    A hash of their ids divides the images into two halves: one to choose a threshold on, one to check it on.

    insiders, outsiders: (T,) int64, pixels of the candidates and of other classes, by the level of their confidence.
    images: (2,) int64, number in the calibration half and in the check half. accepted: (2, T) int64, the share of
    labelled pixels that threshold t accepts, summed over the images of a half. wrong: the same for pixels with a wrong
    label. Each share is rounded up to a multiple of 1 / UNIT: sums are exact, and the guarantee holds.
    """

    def __init__(self, ignore_index: int):
        self.ignore_index = ignore_index
        self.insiders, self.outsiders = np.zeros((2, LEVELS + 1), dtype=np.int64)
        self.images = np.zeros(2, dtype=np.int64)
        self.wrong, self.accepted = np.zeros((2, 2, LEVELS + 1), dtype=np.int64)

    def update(self, found: SemanticMap, label: Tensor | np.ndarray, image_id: str) -> None:
        """Counts one image. label: (H, W), the true class, OUTSIDER where it is no candidate, or ignored."""
        label, places = self.labelled(label, found)
        pixels = len(label)
        if not pixels:
            return  # without pixels there are no shares
        level = (_at(places, found.confidence) * LEVELS).long()
        outside, wrong = label == OUTSIDER, _at(places, found.label_map) != label
        by_level = _counts(level, LEVELS + 1)
        outsiders = _counts(level.masked_select(outside), LEVELS + 1)
        self.insiders += by_level - outsiders
        self.outsiders += outsiders
        half = int(in_check_half(image_id))
        self.images[half] += 1
        for total, counts in ((self.wrong, _counts(level.masked_select(wrong), LEVELS + 1)), (self.accepted, by_level)):
            total[half] += -(-_from_above(counts) * UNIT // pixels)  # rounded up

    def result(self, alpha: float = 0.1) -> dict:
        """How well the confidence separates outsiders, and the threshold for a share of wrong labels of at most alpha.

        auroc: the share of pairs of pixels in which the insider has more confidence than the outsider; ties count half.
        threshold_at_95: the largest threshold that accepts at least 95 % of the insiders; fpr_at_95: the share of the
            outsiders that it accepts. None without insiders or without outsiders.
        conformal: see `conformal_threshold`; wrong_share and accepted_share are means over the images of the check
            half, which did not take part in the choice.
        """
        if not 0 < alpha < 1:
            raise InputError(f"alpha, the share of wrong labels allowed, must lie between 0 and 1, got {alpha}")
        insiders, outsiders = _from_above(self.insiders), _from_above(self.outsiders)  # accepted at each threshold
        auroc = threshold = fpr = None
        if insiders[0] and outsiders[0]:
            better = insiders - self.insiders / 2  # insiders above the level, and half of those on it
            auroc = float(np.sum(self.outsiders / outsiders[0] * (better / insiders[0])))
            (enough,) = np.nonzero(20 * insiders >= 19 * insiders[0])
            threshold, fpr = int(enough[-1]) / LEVELS, float(outsiders[enough[-1]] / outsiders[0])
        (calibration, check), place = self.images.tolist(), conformal_threshold(self.wrong[0], self.images[0], alpha)
        shares = {"wrong_share": None, "accepted_share": None}
        if check and place is None:
            shares = {"wrong_share": 0.0, "accepted_share": 0.0}
        elif check:
            wrong, accepted = (float(total[1, place] / UNIT / check) for total in (self.wrong, self.accepted))
            shares = {"wrong_share": wrong, "accepted_share": accepted}
        return {
            "insiders": int(insiders[0]),
            "outsiders": int(outsiders[0]),
            "auroc": auroc,
            "threshold_at_95": threshold,
            "fpr_at_95": fpr,
            "conformal": {
                "alpha": alpha,
                "threshold": None if place is None else place / LEVELS,
                "rejects_everything": place is None,
                "num_calibration_images": calibration,
                "num_check_images": check,
                **shares,
            },
        }


def conformal_threshold(wrong: np.ndarray, images: int, alpha: float) -> int | None:
    """Conformal risk control (Angelopoulos et al. 2022): the least t with (sum of losses + 1) / (images + 1) <= alpha.

    wrong: (T,), the sum over calibration images of their loss at threshold t, in units of 1 / UNIT. A loss is the share
    of an image's labelled pixels that are accepted and wrong: it never grows with t, and is at most 1.
    Then the share of wrong labels of a new image is at most alpha, on average over images and over the choice of the
    calibration images, if all are exchangeable (drawn alike and independently; frames of one video are not). None: no t
    reaches it, for example with fewer than 1 / alpha - 1 images. Then everything is rejected.
    """
    (safe,) = np.nonzero((wrong / UNIT + 1) / (images + 1) <= alpha)
    return int(safe[0]) if len(safe) else None


def in_check_half(image_id: str) -> bool:
    """Whether an image belongs to the half that checks the threshold; the same on every process."""
    return bool(hashlib.sha256(image_id.encode()).digest()[0] % 2)


def _at(places: Tensor, values: Tensor) -> Tensor:
    """(H, W) -> (P,)."""
    return values.flatten().index_select(0, places)


def _counts(places: Tensor, length: int) -> np.ndarray:
    """(length,) int64."""
    return torch.bincount(places, minlength=length).cpu().numpy()


def _from_above(counts: np.ndarray) -> np.ndarray:
    """(T,) -> (T,): the number of pixels with level t or more."""
    return counts[::-1].cumsum()[::-1]
