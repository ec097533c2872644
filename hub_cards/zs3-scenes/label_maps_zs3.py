"""From proposals to label maps: Eq. 4, and its argmax in memory that does not grow with the label list.

semantic_map(x) = argmax_c sum_q p_q(c) M_q(x) for every pixel x and any number of classes, in four steps an image:

1. Tiles. The image is cut into tiles. Upsampling takes convex combinations and the sigmoid is monotone. So the mask
   logits that a tile reads bound its mask probabilities before anything is upsampled: low <= M_q(x) <= high.
2. Guesses. Each query's smallest class probability is subtracted from its row (all classes lose the same at a pixel).
   Hardly anything is left of an undecided query. The class with a query's largest probability is its favourite. In each
   tile at most four of the favourites (GUESSES) compete first. By the bounds many tiles have a single winner among
   them.
3. Pixels. In the other tiles masks are upsampled to the model's input and summed to the scores of the few classes.
   These are resized to the image, as Eq. 4 is linear in the masks, and decided pixel by pixel.
4. The certificate. Let floor(x) be the least score that the winner can have at x. A class c can win in a tile only if
   sum_q p_q(c) max_x (M_q(x) / floor(x)) >= 1. One matrix product, of tiles x Q with Q x C, finds all such classes.
   Mostly there is none; those found join the tile's guesses in step 3.

Every float32 number has a bound on its rounding (see ROUNDING). Where two classes are closer than these bounds, float64
decides. So the winner is that of float64 arithmetic.

Confidences are defined on the mask grid (`GridConfidences`), so they take little time compared with the label map.

Axes: B image, Q query, C class name, H W output size, h w mask size; N tile, n some tiles, K runner: a class that may
win in a tile, and whose score is computed there; I pixel of the model's input in a tile, i j along its sides; X pixel
of the image in a tile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

try:
    from .confidences_zs3 import CHUNK, TINY, GridConfidences, Taps, taps, working_dtype
    from .configuration_zs3 import Refused, as_number, is_number, shortened
except ImportError:
    if __package__:
        raise
    from confidences_zs3 import CHUNK, TINY, GridConfidences, Taps, taps, working_dtype
    from configuration_zs3 import Refused, as_number, is_number, shortened

Sizes = Sequence[tuple[int, int]] | Tensor | None  # (height, width) of each image

MASK_STRIDE = 4  # a mask pixel covers 4 x 4 pixels of the model's input
EQUAL = 1e-12  # scores this close are equal: above the rounding of float64 sums over some hundred queries
NEAR = 1e-6  # scores this close count as equal among the seen, or the unseen, classes
TILE = 4  # mask pixels along the side of a tile
BLOCK = 4  # tiles along the side of the blocks with which the certificate begins
GUESSES = 4  # favourites that compete in a tile before the certificate

# u, the relative error of one float32 rounding. A sum of n rounded terms >= 0 is off by at most (n + 1) u of itself, to
# first order; the constants below are rounded up generously, which covers the higher orders.
ROUNDING = 2.0**-24
# M from logits of size at most L: two interpolations, each of two rounded weights, products and one sum, are off by
# 6 u L, and M by that times the slope of the sigmoid, M (1 - M), which is at most 1/4 and at most M; the sigmoid's own
# rounding is at most 4 u M, that of resizing the sums of all M once more 6 u of them.
LOGIT_ROUNDINGS, FAINT_LOGIT_ROUNDINGS, MASK_ROUNDINGS = 2, 7, 12
HUGE_LOGIT = 1e5  # beyond it, 6 u L is no small step along the sigmoid


def semantic_scores(class_probs: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. 4 before the argmax, dense: the reference for tests and small problems.

    class_probs (B, Q, C), mask_logits (B, Q, h, w) -> (B, C, H, W) at `size` (H, W).
    """
    logits = F.interpolate(mask_logits.float(), size=size, mode="bilinear", align_corners=False)
    with torch.autocast(logits.device.type, enabled=False):
        return torch.einsum("bqc,bqhw->bchw", class_probs.float(), logits.sigmoid())


@dataclass
class SemanticMap:
    """A label map, (H, W), and what belongs to its pixels, each (H, W).

    label_map: int64, the winner. Do not change it in place: confidences are computed from it when they are read.
    confidence: float32 in [0, 1], and margin, the confidence minus the largest confidence of another class: see
        `GridConfidences`. They are computed when they are read. `confidences` keeps all masks in memory.
    seen_map, unseen_map: int64, the best seen and the best unseen class; near-ties go to the lowest index; -1 where
        there is no such class. One of the two is the winner. None without `is_seen`.
    gap: float32, the score of the best seen class less that of the best unseen class, to 1e-5; -inf or inf where one is
        missing. None without `is_seen`.
    classes: (K,) int64, ascending: those in label_map. Confidences are computed for them alone.
    """

    label_map: Tensor
    confidences: GridConfidences | None = None
    seen_map: Tensor | None = None
    unseen_map: Tensor | None = None
    gap: Tensor | None = None
    classes: Tensor | None = None

    @cached_property
    def confidence(self) -> Tensor:
        return self.confidences.of(self.label_map, self.classes)

    @cached_property
    def margin(self) -> Tensor:
        return self.confidences.of(self.label_map, self.classes, margin=True)

    def totals(self, ids: Tensor, num_ids: int) -> Tensor:
        """(2, num_ids + 1) float64: the number of pixels of each id, -1 first, and the sum of `confidence` over them.
        The whole map of confidences is not made. ids: (H, W) int64, from -1 to num_ids - 1."""
        totals = torch.zeros(2, num_ids + 1, dtype=torch.float64, device=ids.device)
        made = "confidence" in vars(self)
        parts = [(slice(None), self.confidence)] if made else self.confidences.strips(self.label_map, self.classes)
        for rows, values in parts:
            place = ids[rows].flatten() + 1
            for total, weights in zip(totals, (None, values.flatten().double()), strict=True):
                total += torch.bincount(place, weights, num_ids + 1)
        return totals

    def with_seen_bias(self, gamma: float) -> Tensor:
        """(H, W) int64: the winner after gamma is subtracted from the scores of seen classes (Chao et al. 2016); of
        equal scores the lowest index. Needs the best seen and unseen classes."""
        if gamma == 0:
            return self.label_map  # decided in float64
        gap = self.gap.double()  # gamma as float32 would make false ties
        wins = (gap > gamma) | ((gap == gamma) & (self.seen_map < self.unseen_map))
        return torch.where((wins | (self.unseen_map < 0)) & (self.seen_map >= 0), self.seen_map, self.unseen_map)


@torch.no_grad()
def semantic_map(
    class_probs: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    valid_sizes: Sizes = None,
    image_sizes: Sizes = None,
    return_scores: bool = False,
    is_seen: Tensor | None = None,
) -> Tensor | list[Tensor] | list[SemanticMap]:
    """Eq. 4: the best class of every pixel, in O(H W + Q C) memory as long as few classes compete in one place.

    class_probs: (B, Q, C), at least 0; mask_logits: (B, Q, h, w), finite. Mask logits are resized to `size`, the
    (padded) input size; then comes the sigmoid. With image_sizes the probabilities are cut to valid_sizes (the input
    without padding) and resized to the images' own sizes: Mask2Former's order, since Eq. 4 is linear in the masks.
    return_scores: a SemanticMap for each image; its confidences are computed when they are read.
    is_seen: (C,) bool, for the best seen and the best unseen class of every pixel, too; it implies return_scores.

    The winner's score, in float64, is within 1e-6 of the best; equal scores go to the lowest index.
    Returns (B, H, W) int64; with image_sizes a list, one (H, W) an image; with return_scores a list of SemanticMap.
    """
    sizes = {"valid_sizes": valid_sizes, "image_sizes": image_sizes}
    _check_inputs(class_probs, mask_logits, size, sizes, is_seen)
    device = mask_logits.device if mask_logits.device.type != "mps" else torch.device("cpu")  # mps has no float64
    scored = return_scores or is_seen is not None
    is_seen = None if is_seen is None else is_seen.to(device).bool()
    class_probs, mask_logits = class_probs.to(device), mask_logits.to(device)
    results = []
    for image in range(len(mask_logits)):
        valid = own = tuple(size)
        if image_sizes is not None:
            valid = valid if valid_sizes is None else tuple(int(side) for side in valid_sizes[image])
            own = tuple(int(side) for side in image_sizes[image])
        axes = list(zip(mask_logits.shape[2:], size, valid, own, strict=True))
        rows, columns = (_axis(*lengths, TILE).to(device) for lengths in axes)
        with torch.autocast(device.type, enabled=False):
            found = _map_image(_bounds(class_probs[image], mask_logits[image], rows, columns), is_seen)
            if scored:
                found["confidences"] = GridConfidences.of_proposals(class_probs[image], mask_logits[image], axes)
        results.append(SemanticMap(**found) if scored else found["label_map"])
    if image_sizes is not None or scored:
        return results
    return torch.stack(results) if results else mask_logits.new_empty(0, *size, dtype=torch.int64)


def _check_inputs(
    class_probs: Tensor, mask_logits: Tensor, size: tuple[int, int], sizes: dict[str, Sizes], is_seen: Tensor | None
) -> None:
    valid_sizes, image_sizes = sizes.values()
    if class_probs.dim() != 3 or mask_logits.dim() != 4 or class_probs.shape[:2] != mask_logits.shape[:2]:
        shapes = f"{tuple(class_probs.shape)} and {tuple(mask_logits.shape)}"
        raise ValueError(f"class_probs must be (B, Q, C) and mask_logits (B, Q, h, w), got {shapes}")
    if 0 in class_probs.shape[1:] or 0 in mask_logits.shape[1:]:
        raise ValueError(f"a label map needs queries, classes and mask pixels, got {tuple(class_probs.shape)}")
    if is_seen is not None and tuple(is_seen.shape) != class_probs.shape[2:]:
        raise ValueError(f"is_seen must be ({class_probs.shape[2]},), got {tuple(is_seen.shape)}")
    if valid_sizes is not None and image_sizes is None:
        raise ValueError("valid_sizes go with image_sizes: without them the whole padded input is labelled")
    for name, given in sizes.items():
        if given is not None and len(given) != len(class_probs):
            raise ValueError(f"{name} must hold one size an image, got {len(given)} for {len(class_probs)} images")
        if given is not None and any(int(side) < 1 for own in given for side in own):
            raise ValueError(f"{name} must be 1 pixel or more on each side")
    for own in () if valid_sizes is None else valid_sizes:
        if any(int(side) > whole for side, whole in zip(own, size, strict=True)):
            raise ValueError(f"valid_sizes must lie inside the padded input, got {tuple(own)} in {tuple(size)}")


@dataclass
class Explanation:
    """label_id: the winner. score: its Eq. 4, the sum of contributions (Q,): p_q(winner) M_q. mask_probs (Q,): M_q."""

    label_id: int
    score: float
    contributions: Tensor
    mask_probs: Tensor


@torch.no_grad()
def explain(
    outputs: ModelOutput, y: int, x: int, *, image: int = 0, image_size: tuple[int, int] | None = None
) -> Explanation:
    """Which proposals decided pixel (y, x): Eq. 4 of its winner, summand by summand, in float64.

    outputs: a Zs3Output; its method of this name does the same. y, x: row and column in the image of `image_size`
    (height, width); None: the size without padding at the model's input. image: its place in the batch.
    """
    batch = len(outputs.mask_logits)
    image = as_number("image", image, -batch, batch - 1, whole=True)
    mask_logits, class_probs = (values[image].cpu().double() for values in (outputs.mask_logits, outputs.class_probs))
    if not (torch.isfinite(mask_logits).all() and torch.isfinite(class_probs).all()):
        raise ValueError("the outputs hold NaN or infinite values: they explain nothing")
    valid = tuple(outputs.valid_sizes[image].tolist())
    own = valid if image_size is None else tuple(image_size) if isinstance(image_size, Sequence) else ()
    if len(own) != 2 or not all(is_number(side, whole=True) and side > 0 for side in own):
        raise Refused(f"image_size must be (height, width), whole pixels, got {shortened(image_size)}")
    y, x = (as_number(name, at, 0, side - 1, whole=True) for name, at, side in zip("yx", (y, x), own, strict=True))
    lengths = zip(mask_logits.shape[1:], valid, own, strict=True)
    rows, columns = (_axis(mask, mask * MASK_STRIDE, *sides, TILE) for mask, *sides in lengths)
    masks = _exact_masks(mask_logits.permute(1, 2, 0), rows, columns, torch.tensor([y]), torch.tensor([x]))[0]  # (Q,)
    contributions = class_probs * masks[:, None]  # (Q, C)
    winner = int(_first_of_best(contributions.sum(0)[None])[0])
    return Explanation(winner, float(contributions[:, winner].sum()), contributions[:, winner], masks)


# ------------------------------------------------------------------------------------- from mask pixels to the image


class _Axis(NamedTuple):
    """One axis of the way from mask pixels over input pixels to the image's, cut into tiles.

    The last tile is filled up with copies of the last pixel; shorter lists with copies of their last entry (weight 0).
    """

    mask_index: Tensor  # (tiles, m) int64: the mask pixels that a tile looks at
    to_input: Tensor  # (tiles, i, m) float64, or of `cast`'s dtype: the input pixels it needs, as sums of these
    to_image: Tensor  # (tiles, side, i), of the same dtype: its own pixels, as sums of those
    resizes: bool  # the input is not the image: to_image is no identity
    input_taps: Taps
    image_taps: Taps

    def to(self, device: torch.device) -> "_Axis":
        moved = [value.to(device) for value in self[:3]]
        return _Axis(*moved, self.resizes, *(taps.to(device) for taps in self[4:]))

    def cast(self, kind: torch.dtype) -> "_Axis":
        return self._replace(to_input=self.to_input.to(kind), to_image=self.to_image.to(kind))


@lru_cache(maxsize=64)
def _axis(mask: int, size: int, valid: int, image: int, tile: int) -> _Axis:
    """mask, size, valid, image: lengths of the axis in mask pixels, padded input, input without padding, image."""
    input_taps, image_taps = taps(size, mask), taps(image, valid)
    side = min(image, max(4, min(64, round(tile * size / mask * image / valid))))
    parts = []
    for start in range(0, image, side):
        to_image, inputs = _sums(image_taps, torch.arange(start, start + side).clamp(max=image - 1))
        to_input, index = _sums(input_taps, inputs)
        parts.append((index, to_input, to_image))
    most_index, most_inputs = (max(part[axis].shape[0] for part in parts) for axis in (0, 1))
    index = [torch.cat([part[0], part[0][-1:].expand(most_index - len(part[0]))]) for part in parts]
    to_input = [F.pad(w, (0, most_index - w.shape[1])) for _, w, _ in parts]
    to_input = [torch.cat([w, w[-1:].expand(most_inputs - len(w), -1)]) for w in to_input]
    to_image = [F.pad(w, (0, most_inputs - w.shape[1])) for *_, w in parts]
    return _Axis(
        torch.stack(index), torch.stack(to_input), torch.stack(to_image), image != valid, input_taps, image_taps
    )


def _sums(taps: Taps, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The taps of some pixels as a matrix (pixels, old pixels needed), and the indices of these old pixels."""
    index, weight = taps.index[pixels], taps.weight[pixels]
    needed = torch.unique(index)
    matrix = torch.zeros(len(pixels), len(needed), dtype=torch.float64)
    return matrix.scatter_add_(1, torch.searchsorted(needed, index), weight), needed


def _exact_masks(mask_logits: Tensor, rows: _Axis, columns: _Axis, y: Tensor, x: Tensor) -> Tensor:
    """M in float64 at single pixels: mask_logits (h, w, Q), y and x (n,) -> (n, Q)."""
    y, y_share = rows.image_taps.index[y], rows.image_taps.weight[y]  # (n, 2): input pixels
    x, x_share = columns.image_taps.index[x], columns.image_taps.weight[x]
    row, row_share = rows.input_taps.index[y], rows.input_taps.weight[y]  # (n, 2, 2): mask pixels of each
    column, column_share = columns.input_taps.index[x], columns.input_taps.weight[x]
    logits = mask_logits[row[:, :, :, None, None], column[:, None, None]].double()  # (n, 2, 2, 2, 2, Q)
    probs = torch.einsum("nyrxcq,nyr,nxc->nyxq", logits, row_share, column_share).sigmoid()
    return torch.einsum("nyxq,ny,nx->nq", probs, y_share, x_share)


# ------------------------------------------------------------------------------------------- the tile-bound argmax


class _Tiles(NamedTuple):
    """One image: its proposals, and the bounds of every tile before anything is upsampled."""

    class_probs: Tensor  # (Q, C)
    excess: Tensor  # (C, Q): class_probs without the smallest of each query; class_probs where C is 1
    mask_logits: Tensor  # (h, w, Q)
    rows: _Axis
    columns: _Axis
    low: Tensor  # (N, Q): low <= M_q(x) <= high, to a rounding
    high: Tensor
    off: Tensor  # (N, Q): |M_q(x) - what float64 gives| is at most this

    @property
    def resizes(self) -> bool:
        """Whether the image is not the input."""
        return self.rows.resizes or self.columns.resizes

    def grid(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """The row and the column of tiles."""
        across = len(self.columns.mask_index)
        return tile // across, tile % across


@dataclass
class _Race:
    """A competition of some classes at every pixel, and its result.

    is_seen: (C,) bool; wanted: (N,) bool. In a tile those classes compete whose `is_seen` is the tile's `wanted`. Where
    all of both are True, all classes compete.
    favourites: (F,) int64, classes.
    exact: near-ties are decided in float64. Otherwise they go to the lowest index. This saves time where many classes
    of a group have almost the same small score.
    ratio: (N, Q), at least M_q(x) / floor(x) in the whole tile; floor(x) is at most the winner's score at x. inf or NaN
    where there is no floor; 0 in a tile without a competition.
    label_map: (N, X) int32, -1 where nobody competes. score, rival: (N, X), of `excess`: the winner's, and the best
    among the runners that do not compete; None in an exact race.
    """

    is_seen: Tensor
    wanted: Tensor
    favourites: Tensor
    exact: bool
    ratio: Tensor
    label_map: Tensor
    score: Tensor | None
    rival: Tensor | None

    def has(self, tile: Tensor, classes: Tensor) -> Tensor:
        """Whether classes (..., K) compete in tiles (...)."""
        return self.is_seen[classes] == self.wanted[tile, None]


def _map_image(tiles: _Tiles, is_seen: Tensor | None) -> dict[str, Tensor]:
    """The fields of a SemanticMap. is_seen: (C,) bool; None: the label map alone."""
    count, (num_classes, _) = len(tiles.low), tiles.excess.shape
    everywhere = torch.ones(count, dtype=torch.bool, device=tiles.low.device)
    first = _start(tiles, everywhere.new_ones(num_classes), everywhere, exact=True)
    runners = _run(tiles, first, _guess(tiles, first))
    several = torch.bincount(runners // num_classes, minlength=count) > 1
    winners = torch.cat([first.label_map[:, 0], first.label_map[several].flatten()])
    classes = torch.bincount(winners, minlength=num_classes).nonzero()[:, 0]
    found = {"label_map": _assemble(first.label_map, tiles).long(), "classes": classes}
    return found if is_seen is None else {**found, **_best_of_groups(tiles, is_seen, first.label_map, runners)}


def _best_of_groups(tiles: _Tiles, is_seen: Tensor, winners: Tensor, runners: Tensor) -> dict[str, Tensor]:
    """seen_map, unseen_map and gap of SemanticMap. winners: (N, X), changed here; runners: of their race.

    At a pixel the winner is the best class of its group; only the best of the other group is not known. In each tile
    "own" is the group that wins the first pixel. The other group competes in every tile, the own group only in tiles
    where both groups win pixels.
    """
    winner_seen = is_seen.index_select(0, winners.flatten()).view_as(winners)  # (N, X)
    own_seen = winner_seen[:, 0]
    other = _start(tiles, is_seen, ~own_seen, exact=False)
    _run(tiles, other, torch.cat([_guess(tiles, other), runners]))
    own_map, other_map, own_score = winners, other.label_map, other.rival
    mixed = (winner_seen != own_seen[:, None]).any(dim=1).nonzero()[:, 0]
    if len(mixed):
        own = _start(tiles, is_seen, own_seen, exact=False)
        own.ratio = torch.zeros_like(own.ratio).index_copy_(0, mixed, own.ratio[mixed])
        _run(tiles, own, _guess(tiles, own))
        own_wins = winner_seen[mixed] == own_seen[mixed, None]
        other_map[mixed] = torch.where(own_wins, other_map[mixed], own_map[mixed])
        own_map[mixed] = torch.where(own_wins, own_map[mixed], own.label_map[mixed])
        own_score[mixed] = own.score[mixed]
    gap = (own_score - other.score) * torch.where(own_seen, 1, -1)[:, None]
    seen_map = torch.where(own_seen[:, None], own_map, other_map)
    unseen_map = torch.where(own_seen[:, None], other_map, own_map)
    found = {"seen_map": _assemble(seen_map, tiles).long(), "unseen_map": _assemble(unseen_map, tiles).long()}
    return {**found, "gap": _assemble(gap, tiles).float()}


def _run(tiles: _Tiles, race: _Race, runners: Tensor) -> Tensor:
    """Steps 3 and 4. Returns all runners."""
    runners = runners.unique()
    _decide(tiles, runners, race, certify=True)
    others = _others(tiles, race, runners)
    if len(others):
        num_classes = len(tiles.excess)
        again = torch.isin(runners // num_classes, others // num_classes)
        _decide(tiles, torch.cat([runners[again], others]).unique(), race, certify=False)
    return torch.cat([runners, others])


def _bounds(class_probs: Tensor, mask_logits: Tensor, rows: _Axis, columns: _Axis) -> _Tiles:
    """Step 1."""
    kind = working_dtype(class_probs, mask_logits)
    class_probs, mask_logits = class_probs.to(kind), mask_logits.to(kind).permute(1, 2, 0).contiguous()
    excess = class_probs.T.clone(memory_format=torch.contiguous_format)
    excess -= class_probs.amin(dim=1) * (class_probs.shape[1] > 1)
    low, high = (
        _extreme(_extreme(mask_logits, rows.mask_index, 0, of), columns.mask_index, 1, of).flatten(0, 1).double()
        for of in (torch.minimum, torch.maximum)
    )  # (N, Q)
    reach = torch.maximum(low.abs(), high.abs())
    for name, values in {"mask_logits": reach, "class_probs": excess}.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} hold NaN or infinite values: no label map can be made of them")
    low, high, reach = (bound.to(kind) for bound in (low.sigmoid(), high.sigmoid(), reach))
    slope = (FAINT_LOGIT_ROUNDINGS * high).clamp(max=LOGIT_ROUNDINGS).where(reach < HUGE_LOGIT, LOGIT_ROUNDINGS)
    off = ROUNDING * (slope * reach + MASK_ROUNDINGS * high)
    return _Tiles(class_probs, excess, mask_logits, rows.cast(kind), columns.cast(kind), low, high, off)


def _extreme(values: Tensor, index: Tensor, axis: int, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The least or the largest of the m places along an axis that each tile looks at, index (tiles, m)."""
    return reduce(of, (values.index_select(axis, places) for places in index.T))


def _start(tiles: _Tiles, is_seen: Tensor, wanted: Tensor, *, exact: bool) -> _Race:
    """Step 2: the favourites of the queries, and their floor in every tile by the bounds."""
    groups = [group.nonzero()[:, 0] for group in (is_seen, ~is_seen) if group.any()]
    favourites = torch.cat([classes[tiles.class_probs[:, classes].argmax(dim=1)] for classes in groups]).unique()
    shape = len(tiles.low), tiles.rows.to_image.shape[1] * tiles.columns.to_image.shape[1]
    label_map = torch.full(shape, -1, dtype=torch.int32, device=tiles.low.device)
    score, rival = (None, None) if exact else tiles.low.new_full((2, *shape), -torch.inf)
    race = _Race(is_seen, wanted, favourites, exact, tiles.high, label_map, score, rival)
    competes = race.has(torch.arange(len(wanted), device=wanted.device), favourites)  # (N, F)
    floor = (tiles.low @ tiles.excess[favourites].T).masked_fill(~competes, 0).amax(dim=1, keepdim=True)
    race.ratio = tiles.high / torch.where(floor > TINY, floor, 0)
    return race


def _may_win(ratio: Tensor, excess: Tensor) -> Tensor:
    """ratio (N, Q), excess (C, Q) -> (N, C) bool; not `>=`, which would lose the NaN of a tile without a floor.

    Slack: a ratio (quotient of a rounded number and a sum of Q products) and the sum of Q products here are off by
    (2 Q + 12) u at most.
    """
    return ~(ratio @ excess.T < 1 - (4 * excess.shape[1] + 32) * ROUNDING)


def _guess(tiles: _Tiles, race: _Race) -> Tensor:
    """Of the favourites that may win, those that lead in the middle of the bounds. One alone wins the whole tile.

    Runners are tile x C + class, int64, here and below.
    """
    favourites = race.favourites
    excess = tiles.excess[favourites]
    competes = race.has(torch.arange(len(race.wanted), device=favourites.device), favourites)
    competes &= _may_win(race.ratio, excess)
    likely = ((tiles.low + tiles.high) / 2 @ excess.T).masked_fill(~competes, -torch.inf)
    likely, place = likely.topk(min(GUESSES, len(favourites)), dim=1)
    race.label_map[:] = torch.where(likely[:, :1] > -torch.inf, favourites[place[:, :1]], -1)
    tile, column = (likely > -torch.inf).nonzero(as_tuple=True)
    return tile * len(tiles.excess) + favourites[place[tile, column]]


def _others(tiles: _Tiles, race: _Race, runners: Tensor) -> Tensor:
    """Step 4: the classes that compete and may win, and are no runners yet. Blocks of tiles are tried first."""
    grid = len(tiles.rows.mask_index), len(tiles.columns.mask_index)
    blocks = F.max_pool2d(race.ratio.T.reshape(1, -1, *grid), BLOCK, ceil_mode=True)[0].flatten(1).T
    possible = torch.zeros_like(race.is_seen)
    for part in blocks.split(max(1, CHUNK // len(tiles.excess))):
        possible |= _may_win(part, tiles.excess).any(dim=0)
    classes = possible.nonzero()[:, 0]
    excess, found = tiles.excess[classes], []
    step = max(1, CHUNK // max(1, len(classes)))
    for tile in torch.arange(len(race.ratio), device=classes.device).split(step):
        place, column = (_may_win(race.ratio[tile], excess) & race.has(tile, classes)).nonzero(as_tuple=True)
        found.append(tile[place] * len(tiles.excess) + classes[column])
    found = torch.cat(found)
    return found[~torch.isin(found, runners)]


class _Part(NamedTuple):
    """Some tiles and their runners, with the masks at the pixels of the model's input."""

    tile: Tensor  # (n,)
    classes: Tensor  # (n, K): the runners
    runs: Tensor  # (n, K) bool: those that compete
    masks: Tensor  # (n, I, Q): M
    scores: Tensor  # (n, K, i, j): of `excess`, at the same pixels
    off: Tensor  # (n, Q): |M - what float64 gives| is at most this
    error: Tensor  # (n, 1): scores are off by at most this


def _decide(tiles: _Tiles, runners: Tensor, race: _Race, *, certify: bool) -> None:
    """Step 3, into the race: the winner of every pixel in the tiles that have several runners.

    runners: sorted, without repeats. Where scores are wanted, tiles with a single runner are decided, too.
    certify: the ratio of step 4 is made, too.
    """
    num_classes, queries = tiles.excess.shape
    inputs = tiles.rows.to_input.shape[1] * tiles.columns.to_input.shape[1]
    counts = torch.bincount(runners // num_classes, minlength=len(tiles.low))  # (N,)
    first = counts.cumsum(0) - counts
    for count in counts[counts > (1 if race.exact else 0)].unique().tolist():
        largest = max(queries * inputs, count * max(queries, inputs, race.label_map.shape[1]))
        for tile in (counts == count).nonzero()[:, 0].split(max(1, CHUNK // largest)):
            classes = runners[first[tile, None] + torch.arange(count, device=tile.device)] % num_classes
            part = _summed(tiles, tile, classes, race.has(tile, classes))
            best = _decide_part(tiles, part, race)
            if certify:
                _bound_ratio(tiles, part, race, best)


def _summed(tiles: _Tiles, tile: Tensor, classes: Tensor, runs: Tensor) -> _Part:
    """tile (n,), classes, runs (n, K)."""
    y, x = tiles.grid(tile)
    rows, columns = tiles.rows, tiles.columns
    index = rows.mask_index[y, :, None] * tiles.mask_logits.shape[1] + columns.mask_index[x, None]  # (n, m, m)
    n, height, width = index.shape
    masks = tiles.mask_logits.flatten(0, 1).index_select(0, index.flatten())  # (n m m, Q)
    queries = masks.shape[1]
    masks = (rows.to_input.index_select(0, y) @ masks.view(n, height, -1)).view(n, -1, width, queries)  # (n, i, m, Q)
    masks = (columns.to_input.index_select(0, x)[:, None] @ masks).sigmoid_()  # (n, i, j, Q)
    excess = tiles.excess.index_select(0, classes.flatten()).view(n, -1, queries)  # (n, K, Q)
    scores = (excess @ masks.flatten(1, 2).mT).unflatten(2, masks.shape[1:3])
    off = tiles.off[tile]  # (n, Q)
    of_sums = (queries + 16) * ROUNDING * tiles.high[tile]
    error = ((off + of_sums) * excess.amax(dim=1)).sum(dim=1, keepdim=True)
    return _Part(tile, classes, runs, masks.flatten(1, 2), scores, off, error)


def _decide_part(tiles: _Tiles, part: _Part, race: _Race) -> Tensor:
    """Step 3 in some tiles, into the race; returns the best scores, (n, X)."""
    whole = _to_image(tiles, part)  # (n, K, X)
    scores = whole.masked_fill(~part.runs[:, :, None], -torch.inf)
    best, place = scores.max(dim=1)  # (n, X)
    second = scores.scatter_(1, place[:, None], -torch.inf).amax(dim=1)
    if race.exact:
        _decide_exactly(tiles, part.tile, part.classes, part.runs, best - second <= 2 * part.error, place)
    else:
        _take_first(scores, best - NEAR, best - second <= NEAR, place)
        race.score[part.tile] = best
        race.rival[part.tile] = whole.masked_fill(part.runs[:, :, None], -torch.inf).amax(dim=1)
    winner = torch.where(best > -torch.inf, part.classes.gather(1, place), -1)
    race.label_map[part.tile] = winner.int()
    return best


def _bound_ratio(tiles: _Tiles, part: _Part, race: _Race, best: Tensor) -> None:
    """The race's ratio by pixels, for step 4; best: (n, X). The old and the new one are bounds, NaN is none."""
    floor = _floor(tiles, part, best) - part.error
    inverse = 1 / torch.where(floor > TINY, floor, 0)  # (n, I)
    ratio = (part.masks * inverse[:, :, None]).amax(dim=1) + part.off * inverse.amax(dim=1, keepdim=True)
    race.ratio[part.tile] = torch.fmin(race.ratio[part.tile], ratio)


def _to_image(tiles: _Tiles, part: _Part) -> Tensor:
    """(n, K, X): the scores at the pixels of the image."""
    scores, (y, x) = part.scores, tiles.grid(part.tile)
    if tiles.resizes:
        to_rows, to_columns = tiles.rows.to_image[y, None], tiles.columns.to_image[x, None].mT
        scores = to_rows @ scores @ to_columns
    return scores.flatten(2)


def _floor(tiles: _Tiles, part: _Part, best: Tensor) -> Tensor:
    """(n, I): at most the best score at any image pixel to which an input pixel contributes.

    best: (n, X) at image pixels, which lie between 2 x 2 input pixels each. A class has at least the least of its four
    scores there; the largest of these over the classes that compete is a floor for them.
    """
    if not tiles.resizes:
        return best
    scores = part.scores.masked_fill(~part.runs[:, :, None, None], -torch.inf)
    cell = [min(2, side) for side in scores.shape[2:]]
    floor = (-F.max_pool2d(-scores, cell, stride=1)).amax(dim=1, keepdim=True)
    return -F.max_pool2d(-floor, cell, stride=1, padding=[side - 1 for side in cell])[:, 0].flatten(1)


def _decide_exactly(tiles: _Tiles, tile: Tensor, classes: Tensor, runs: Tensor, close: Tensor, place: Tensor) -> None:
    """Near-ties in float64: tile (n,), classes, runs (n, K), close (n, X) bool; into place (n, X), which of K won."""
    width = tiles.columns.to_image.shape[1]
    last_y, last_x = len(tiles.rows.image_taps.index) - 1, len(tiles.columns.image_taps.index) - 1
    tile_y, tile_x = tiles.grid(tile)
    for own in close.any(dim=1).nonzero()[:, 0].tolist():
        probs = tiles.class_probs[:, classes[own]].double()  # (Q, K)
        for pixel in close[own].nonzero()[:, 0].split(max(1, CHUNK // max(16 * len(probs), probs.shape[1]))):
            y = tile_y[own] * tiles.rows.to_image.shape[1] + pixel // width
            x = tile_x[own] * width + pixel % width
            y, x = y.clamp(max=last_y), x.clamp(max=last_x)  # beyond it lie copies of the last pixel
            scores = _exact_masks(tiles.mask_logits, tiles.rows, tiles.columns, y, x) @ probs
            place[own, pixel] = _first_of_best(scores.masked_fill(~runs[own], -torch.inf))


def _take_first(scores: Tensor, least: Tensor, close: Tensor, place: Tensor) -> None:
    """Of near-ties the lowest index: scores (n, K, X) without those of place (n, X), which it is written into; least,
    close (n, X)."""
    tile, pixel = close.nonzero(as_tuple=True)
    near = scores[tile, :, pixel] >= least[tile, pixel, None]  # (m, K)
    place[tile, pixel] = near.scatter_(1, place[tile, pixel, None], True).int().argmax(dim=1)


def _first_of_best(scores: Tensor) -> Tensor:
    """(n, K) float64 -> (n,): the lowest index of the best, where EQUAL counts as equal."""
    return (scores >= scores.amax(dim=1, keepdim=True) - EQUAL).int().argmax(dim=1)


def _assemble(values: Tensor, tiles: _Tiles) -> Tensor:
    """(N, X) -> (H, W)."""
    down, across = len(tiles.rows.mask_index), len(tiles.columns.mask_index)
    height, width = tiles.rows.to_image.shape[1], tiles.columns.to_image.shape[1]
    whole = values.view(down, across, height, width).transpose(1, 2).reshape(down * height, across * width)
    return whole[: len(tiles.rows.image_taps.index), : len(tiles.columns.image_taps.index)].contiguous()


__all__ = ["Explanation", "GridConfidences", "SemanticMap", "explain", "semantic_map", "semantic_scores"]
