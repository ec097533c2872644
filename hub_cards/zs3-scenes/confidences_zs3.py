"""Confidences of the pixels of a label map, defined on the mask grid and made when they are read.

Axes: Q query, C class name, K class that wins somewhere, H W output size, h w mask size, H' h' some of their rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

STRIP = 2**17  # numbers in one tensor of `strips`: they fit into a CPU's cache
CHUNK = 2**19  # numbers in one tensor of other steps, except those as large as the masks or the output
TINY = 1e-30  # divisors below it are no divisors; float32 underflows only far below it
UNDECIDED = 1e-6  # the least d_q: where all queries are undecided, each counts by its mask alone


class Taps(NamedTuple):
    """Bilinear resizing along one axis (align_corners=False): each new pixel is a weighted sum of two old ones."""

    index: Tensor  # (new, 2) int64; twice the same where one suffices
    weight: Tensor  # (new, 2) float64, at least 0, of sum 1

    def to(self, device: torch.device) -> "Taps":
        return Taps(self.index.to(device), self.weight.to(device))


def taps(new: int, old: int, span: float | None = None) -> Taps:
    """span: the part of the old pixels that the new ones cover, from the first on; None: all of them."""
    position = ((torch.arange(new, dtype=torch.float64) + 0.5) * ((span or old) / new) - 0.5).clamp(min=0)
    low = position.floor().long().clamp(max=old - 1)
    share = position - low
    high = torch.where(share > 0, (low + 1).clamp(max=old - 1), low)
    return Taps(torch.stack([low, high], dim=1), torch.stack([1 - share, share], dim=1))


def working_dtype(class_probs: Tensor, mask_logits: Tensor) -> torch.dtype:
    """float32, unless float64 was given, or float32 products are set to be less than that (TF32, bfloat16)."""
    backend = torch.backends.cuda if mask_logits.is_cuda else torch.backends.mkldnn
    settings = {torch.backends.fp32_precision, backend.matmul.fp32_precision}
    double = torch.float64 in (class_probs.dtype, mask_logits.dtype)
    return torch.float64 if double or settings - {"none", "ieee"} else torch.float32


@dataclass
class GridConfidences:
    """The confidence of every class on the mask grid, brought to the image by one bilinear resizing.

    The confidence of class c at a mask pixel, in [0, 1], is the weighted mean over queries of p_q(c), times the part of
    the pixel that masks cover, min(1, sum_q M_q). A query's weight is d_q M_q; d_q = KL(p_q || U) / ln C says how
    decided it is. So a query that makes no difference between classes does not count; Eq. 5 trains unmatched queries to
    be so. The margin of c is its confidence less the largest one of another class, at least 0; with a single
    class it is the confidence.

    masks: (Q, h, w), M. decided_probs: (Q, C), d_q p_q. covered: (h, w), min(1, sum_q M_q) / sum_q d_q M_q. rows,
    columns: of the image's pixels.
    """

    masks: Tensor
    decided_probs: Tensor
    covered: Tensor
    rows: Taps
    columns: Taps

    @classmethod
    def of_proposals(
        cls, class_probs: Tensor, mask_logits: Tensor, axes: Sequence[tuple[int, int, int, int]]
    ) -> "GridConfidences":
        """class_probs (Q, C), mask_logits (Q, h, w); axes: for rows, then columns, the lengths of mask,
        padded input, input without padding, and image."""
        kind = working_dtype(class_probs, mask_logits)
        masks, class_probs = mask_logits.to(kind).sigmoid(), class_probs.to(kind)
        decided = _decidedness(class_probs)
        voices = torch.einsum("q,qhw->hw", decided, masks)
        covered = masks.sum(dim=0).clamp(max=1) / voices.clamp(min=TINY)
        resized = (taps(image, mask, mask * valid / size).to(masks.device) for mask, size, valid, image in axes)
        return cls(masks, decided[:, None] * class_probs, covered, *resized)

    def of(self, label_map: Tensor, classes: Tensor, margin: bool = False) -> Tensor:
        """(H, W) float32: the confidence, or the margin, of each pixel's class.

        label_map: (H, W) int64; classes: (K,) int64, those in it.
        """
        values = torch.empty(label_map.shape, dtype=self.masks.dtype, device=label_map.device)
        for _ in self.strips(label_map, classes, margin, values):
            pass
        return values.float()

    def strips(
        self, label_map: Tensor, classes: Tensor, margin: bool = False, out: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields strip by strip its rows and its values (H', W). out: (H, W), to which the values are written."""
        _, height, width = self.masks.shape
        begin = torch.zeros(self.decided_probs.shape[1], dtype=torch.int64, device=classes.device)
        begin[classes] = width * torch.arange(len(classes), device=classes.device)  # of a class in a row (K w)
        left, right = self.columns.index.T  # (W,)
        share = (self.columns.weight[:, 1] * (right > left)).to(self.masks.dtype)
        step = max(1, STRIP // max(len(left), len(classes) * width))
        # The grid's values are made for several strips at once.
        block = step * max(1, CHUNK // (len(classes) * width) * len(label_map) // height // step)
        for start in range(0, len(label_map), step):
            if start % block == 0:
                first = int(self.rows.index[start, 0])
                last = int(self.rows.index[start : start + block].max()) + 1
                grid = self._values(classes, slice(first, last), margin)  # (K, h', w)
            rows = slice(start, start + step)
            low, high = (self.rows.index[rows] - first).T
            down = self.rows.weight[rows, 1, None].to(grid.dtype)
            values = torch.lerp(grid.index_select(1, low), grid.index_select(1, high), down)  # (K, H', w)
            values = values.transpose(0, 1).flatten(1)  # (H', K w)
            index = begin.index_select(0, label_map[rows].flatten()).view(-1, len(left)).add_(left)
            ends = values.gather(1, index), values.roll(-1, 1).gather(1, index)
            yield rows, torch.lerp(*ends, share, out=None if out is None else out[rows])

    def _values(self, classes: Tensor, rows: slice, margin: bool) -> Tensor:
        """(K, h', w): the confidences or the margins of some classes in some rows of the grid."""
        values = self._grid(classes, rows)
        if not margin:
            return values
        (best, second), (winner, _) = (both[:, rows] for both in self._best_two)  # (h', w)
        return (values - torch.where(winner == classes[:, None, None], second, best)).clamp_(min=0)

    def _grid(self, classes: Tensor, rows: slice) -> Tensor:
        """(K, h', w): the confidences of some classes in some rows of the grid."""
        with torch.autocast(self.masks.device.type, enabled=False):
            values = torch.einsum("qk,qhw->khw", self.decided_probs[:, classes], self.masks[:, rows])
        return values.mul_(self.covered[rows]).clamp_(0, 1)

    @cached_property
    def _best_two(self) -> tuple[Tensor, Tensor]:
        """The largest two confidences at each mask pixel, and their classes, both (2, h, w). Where C is 1 the second
        is 0."""
        height, width = self.covered.shape
        best = self.covered.new_zeros(2, height, width)
        of = torch.full(best.shape, -1, device=best.device)
        everyone = torch.arange(self.decided_probs.shape[1], device=best.device)
        for classes in everyone.split(max(1, CHUNK // (height * width))):
            values, numbers = self._grid(classes, slice(None)), classes[:, None, None].expand(-1, height, width)
            values, numbers = torch.cat([best, values]), torch.cat([of, numbers])
            first, place = values.max(dim=0, keepdim=True)
            second, next_place = values.scatter(0, place, -1).max(dim=0, keepdim=True)
            best = torch.cat([first, second])
            of = numbers.gather(0, torch.cat([place, next_place]))
        return best, of


def _decidedness(class_probs: Tensor) -> Tensor:
    """(Q, C) -> (Q,): KL(p || U) / ln C, in [0, 1]; 1 where C is 1. At least UNDECIDED."""
    if class_probs.shape[1] == 1:
        return torch.ones_like(class_probs[:, 0])
    probs = class_probs / class_probs.sum(dim=1, keepdim=True).clamp(min=TINY)
    entropy = -torch.special.xlogy(probs, probs).sum(dim=1)
    return (1 - entropy / math.log(class_probs.shape[1])).clamp(UNDECIDED, 1)


__all__ = ["GridConfidences"]
