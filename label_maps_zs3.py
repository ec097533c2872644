"""From proposals to label maps: Eq. 4, and its argmax in memory that does not grow with the label list.

semantic_map(x) = argmax_c sum_q p_q(c) M_q(x) for every pixel x and any number of classes, in four steps an image:

1. Tiles. The image is cut into tiles. Upsampling takes convex combinations and the sigmoid is monotone. So the mask
   logits that a tile reads bound its mask probabilities before anything is upsampled: low <= M_q(x) <= high.
2. Guesses. Each query's smallest class probability is subtracted from its row (all classes lose the same at a pixel).
   Hardly anything is left of an undecided query. Each query has a favourite class; a few of these classes, at most Q,
   compete in each tile. By the bounds many tiles have a single winner among them.
3. Pixels. The other tiles are upsampled, with the queries that matter there, and decided pixel by pixel.
4. The certificate. Let floor(x) be the least score that the winner can have at x. A class c can win in a tile only if
   sum_q p_q(c) max_x (M_q(x) / floor(x)) >= 1. One matrix product, of tiles x Q with Q x C, finds all such classes.
   Mostly there is none; those found join the tile's guesses in step 3.

Every float32 number has a bound on its rounding (see ROUNDING). Where two classes are closer than these bounds, float64
decides. So the winner is that of float64 arithmetic.

Axes: B image, Q query, C class name, H W output size, h w mask size; N tile, n some tiles, K runner: a class that may
win in a tile, R query that matters there, X pixel of a tile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

try:
    from .configuration_zs3 import Refused, as_number, is_number, shortened
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import Refused, as_number, is_number, shortened

Sizes = Sequence[tuple[int, int]] | Tensor | None  # (height, width) of each image

MASK_STRIDE = 4  # a mask pixel covers 4 x 4 pixels of the model's input
EQUAL = 1e-12  # scores this close are equal: above the rounding of float64 sums over some hundred queries
NEAR = 1e-6  # scores this close count as equal among the seen, or the unseen, classes
TILE = 4  # mask pixels along the side of a tile
BLOCK = 4  # tiles along the side of the blocks with which the certificate begins
CHUNK = 2**19  # numbers in one tensor of steps 3 and 4, but for those of the size of the masks or the output
TAIL = 1e-6  # queries that together matter less than this share of a tile's best score are not upsampled there
RUNNER_UP = 0.05  # a runner-up is looked for among the classes that may have this share of the winner's score
GUESSES = 3  # favourites that compete in a tile before the certificate, beyond the rank wanted
TINY = 1e-30  # a smaller floor is no floor; it is far above what float32 loses to underflow
UNDECIDED = 1e-6  # the least weight of a query in a confidence: where all queries are undecided, they count alike

# u, the relative error of one float32 rounding. A sum of n rounded terms >= 0 is off by at most (n + 1) u of itself, to
# first order; the constants below are rounded up generously, which covers the higher orders.
ROUNDING = 2.0**-24
# M from logits of size at most L: two interpolations, each of two rounded weights, products and one sum, are off by
# 6 u L, and M by that times the slope of the sigmoid, M (1 - M), which is at most 1/4 and at most M; the sigmoid's own
# rounding is at most 4 u M, that of resizing M once more 6 u M.
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
    """The values of every pixel, each (H, W).

    label_map: int64, the winner. score: the winner's score of Eq. 4. margin: its distance to the runner-up's, 0 where C
    is 1. Where no other class has RUNNER_UP of the winner's score, the margin may be too large by that share.
    confidence: in [0, 1], the weighted mean over queries of the winner's probability p_q, times the part of the pixel
    that masks cover, min(1, sum_q M_q). A query's weight is its mask M_q times how decided it is, KL(p_q || U) / ln C.
    So a query that makes no difference between classes does not count; Eq. 5 trains unmatched queries to be so.
    confidence_margin: the distance to the runner-up's confidence.
    seen_map, seen_score, unseen_map, unseen_score: the best seen and the best unseen class, and their scores, to 1e-5;
    near-ties go to the lowest index. -1 and -inf where there is no such class. None without `is_seen`. One of the two
    is the winner.
    """

    label_map: Tensor
    score: Tensor
    margin: Tensor
    confidence: Tensor
    confidence_margin: Tensor
    seen_map: Tensor | None = None
    seen_score: Tensor | None = None
    unseen_map: Tensor | None = None
    unseen_score: Tensor | None = None

    def with_seen_bias(self, gamma: float) -> Tensor:
        """(H, W) int64: the winner after gamma is subtracted from the scores of seen classes (Chao et al. 2016); of
        equal scores the lowest index. Needs the best seen and unseen classes."""
        if gamma == 0:
            return self.label_map  # decided in float64
        seen, unseen = self.seen_score.double() - gamma, self.unseen_score.double()  # float32 would make false ties
        wins = (seen > unseen) | ((seen == unseen) & (self.seen_map < self.unseen_map))
        return torch.where(wins | (self.unseen_map < 0), self.seen_map, self.unseen_map)


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
    is_seen: (C,) bool, for the best seen and the best unseen class; implies return_scores.

    The winner's score, in float64, is within 1e-6 of the best; equal scores (to 1e-12) go to the lowest index. Returned
    scores are float32 numbers, within 1e-5 for up to some hundred queries.
    Returns (B, H, W) int64; with image_sizes a list, one (H, W) an image; with return_scores a list of SemanticMap.
    """
    sizes = {"valid_sizes": valid_sizes, "image_sizes": image_sizes}
    _check_inputs(class_probs, mask_logits, size, sizes, is_seen)
    device = mask_logits.device if mask_logits.device.type != "mps" else torch.device("cpu")  # mps has no float64
    groups = [] if is_seen is None else [is_seen.to(device).bool(), ~is_seen.to(device).bool()]
    groups = groups if return_scores or is_seen is not None else None
    class_probs, mask_logits = class_probs.to(device), mask_logits.to(device)
    results = []
    for image in range(len(mask_logits)):
        valid = own = tuple(size)
        if image_sizes is not None:
            valid = valid if valid_sizes is None else tuple(int(side) for side in valid_sizes[image])
            own = tuple(int(side) for side in image_sizes[image])
        axes = zip(mask_logits.shape[2:], size, valid, own, strict=True)
        rows, columns = (_axis(*lengths, TILE).to(device) for lengths in axes)
        with torch.autocast(device.type, enabled=False):
            results.append(_map_image(_bounds(class_probs[image], mask_logits[image], rows, columns), groups))
    if image_sizes is not None or groups is not None:
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
    masks = _exact_masks(mask_logits, rows, columns, torch.tensor([y]), torch.tensor([x]))[0]  # (Q,)
    contributions = class_probs * masks[:, None]  # (Q, C)
    winner = int(_first_of_best(contributions.sum(0)[None])[0])
    return Explanation(winner, float(contributions[:, winner].sum()), contributions[:, winner], masks)


# ------------------------------------------------------------------------------------- from mask pixels to the image


class _Taps(NamedTuple):
    """Bilinear resizing along one axis (align_corners=False): each new pixel is a weighted sum of two old ones."""

    index: Tensor  # (new, 2) int64; twice the same where one suffices
    weight: Tensor  # (new, 2) float64, at least 0, of sum 1


class _Axis(NamedTuple):
    """One axis of the way from mask pixels over input pixels to the image's, cut into tiles.

    The last tile is filled up with copies of the last pixel; lists shorter than others with weights of 0.
    """

    mask_index: Tensor  # (tiles, m) int64: the mask pixels that a tile looks at
    to_input: Tensor  # (tiles, i, m) float64: the input pixels it needs, as sums of these
    to_image: Tensor  # (tiles, side, i) float64: its own pixels, as sums of those
    resizes: bool  # the input is not the image: to_image is no identity
    input_taps: _Taps
    image_taps: _Taps

    def to(self, device: torch.device) -> "_Axis":
        moved = [value.to(device) for value in self[:3]]
        taps = [_Taps(*(value.to(device) for value in taps)) for taps in self[4:]]
        return _Axis(*moved, self.resizes, *taps)


def _taps(new: int, old: int) -> _Taps:
    position = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(min=0)
    low = position.floor().long().clamp(max=old - 1)
    share = position - low
    high = torch.where(share > 0, (low + 1).clamp(max=old - 1), low)
    return _Taps(torch.stack([low, high], dim=1), torch.stack([1 - share, share], dim=1))


@lru_cache(maxsize=64)
def _axis(mask: int, size: int, valid: int, image: int, tile: int) -> _Axis:
    """mask, size, valid, image: lengths of the axis in mask pixels, padded input, input without padding, image."""
    input_taps, image_taps = _taps(size, mask), _taps(image, valid)
    side = min(image, max(4, min(64, round(tile * size / mask * image / valid))))
    parts = []
    for start in range(0, image, side):
        to_image, inputs = _sums(image_taps, torch.arange(start, start + side).clamp(max=image - 1))
        to_input, index = _sums(input_taps, inputs)
        parts.append((index, to_input, to_image))
    most_index, most_inputs = (max(part[axis].shape[0] for part in parts) for axis in (0, 1))
    index = [torch.cat([part[0], part[0][-1:].expand(most_index - len(part[0]))]) for part in parts]
    to_input = [F.pad(w, (0, most_index - w.shape[1], 0, most_inputs - w.shape[0])) for _, w, _ in parts]
    to_image = [F.pad(w, (0, most_inputs - w.shape[1])) for *_, w in parts]
    return _Axis(
        torch.stack(index), torch.stack(to_input), torch.stack(to_image), image != valid, input_taps, image_taps
    )


def _sums(taps: _Taps, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The taps of some pixels as a matrix (pixels, old pixels needed), and the indices of these old pixels."""
    index, weight = taps.index[pixels], taps.weight[pixels]
    needed = torch.unique(index)
    matrix = torch.zeros(len(pixels), len(needed), dtype=torch.float64)
    return matrix.scatter_add_(1, torch.searchsorted(needed, index), weight), needed


def _exact_masks(mask_logits: Tensor, rows: _Axis, columns: _Axis, y: Tensor, x: Tensor) -> Tensor:
    """M in float64 at single pixels: mask_logits (Q, h, w), y and x (n,) -> (n, Q)."""
    y, y_share = rows.image_taps.index[y], rows.image_taps.weight[y]  # (n, 2): input pixels
    x, x_share = columns.image_taps.index[x], columns.image_taps.weight[x]
    row, row_share = rows.input_taps.index[y], rows.input_taps.weight[y]  # (n, 2, 2): mask pixels of each
    column, column_share = columns.input_taps.index[x], columns.input_taps.weight[x]
    logits = mask_logits[:, row[:, :, :, None, None], column[:, None, None]].double()  # (Q, n, 2, 2, 2, 2)
    probs = torch.einsum("qnyrxc,nyr,nxc->qnyx", logits, row_share, column_share).sigmoid()
    return torch.einsum("qnyx,ny,nx->nq", probs, y_share, x_share)


# ------------------------------------------------------------------------------------------- the tile-bound argmax


class _Tiles(NamedTuple):
    """One image: its proposals, and the bounds of every tile before anything is upsampled."""

    class_probs: Tensor  # (Q, C)
    base: Tensor  # (Q,): the smallest of each query; 0 where C is 1
    excess: Tensor  # (C, Q): class_probs without it
    mask_logits: Tensor  # (Q, h, w)
    rows: _Axis
    columns: _Axis
    low: Tensor  # (N, Q): low <= M_q(x) <= high, to a rounding
    high: Tensor
    reach: Tensor  # (N, Q): the largest |logit|


@dataclass
class _Race:
    """A competition of some classes at every pixel, and its result.

    members, favourites: (C,) bool. rank: 1, or 2 where the second best is wanted, too; 0 without members.
    exact: near-ties are decided in float64. Otherwise they go to the lowest index, which takes less time: a group may
    win nowhere in the image.
    ratio: (N, Q), at least M_q(x) / floor(x) in the whole tile; floor(x) is at most the score at x of the class of this
    rank. inf or NaN where there is no floor.
    label_map, score: (N, X), score None where it is not wanted.
    margin, confidence, confidence_margin: (N, X), see SemanticMap, and decided: (Q,), see `_decidedness`; None where
    they are not wanted.
    """

    members: Tensor
    rank: int
    exact: bool
    favourites: Tensor
    ratio: Tensor
    label_map: Tensor
    score: Tensor | None
    margin: Tensor | None = None
    confidence: Tensor | None = None
    confidence_margin: Tensor | None = None
    decided: Tensor | None = None


def _map_image(tiles: _Tiles, groups: list[Tensor] | None) -> Tensor | SemanticMap:
    """groups: of classes, (C,) bool; their best classes and scores are found, too. None: the label map alone."""
    everyone = torch.ones(len(tiles.excess), dtype=torch.bool, device=tiles.excess.device)
    scored = groups is not None
    first = _start(tiles, everyone, 2 if scored else 1, exact=True, scored=scored)
    if scored:
        first.decided = _decidedness(tiles.class_probs)
        first.margin, first.confidence, first.confidence_margin = first.score.new_zeros(3, *first.score.shape)
    races = [first, *(_start(tiles, members, 1, exact=False, scored=True) for members in groups or [])]
    runners = torch.cat([_guess(tiles, race) for race in races]).unique()
    _decide(tiles, runners, races)
    for race in races:
        others = _others(tiles, race, runners)
        if not len(others):
            continue
        again = torch.isin(runners // len(everyone), others // len(everyone)) & race.members[runners % len(everyone)]
        _decide(tiles, torch.cat([runners[again], others]).unique(), [race])

    if groups is None:
        return _assemble(first.label_map, tiles)
    names = ("label_map", "score", "margin", "confidence", "confidence_margin")
    values = {name: getattr(first, name) for name in names}
    for name, race in zip(("seen", "unseen"), races[1:], strict=False):  # the winner is the best of its group
        values[f"{name}_map"] = torch.where(race.members[first.label_map], first.label_map, race.label_map)
        values[f"{name}_score"] = race.score
    return SemanticMap(**{name: _assemble(value, tiles) for name, value in values.items()})


def _working_dtype(class_probs: Tensor, mask_logits: Tensor) -> torch.dtype:
    """float32, unless float64 was given, or float32 products are set to be less than that (TF32, bfloat16)."""
    backend = torch.backends.cuda if mask_logits.is_cuda else torch.backends.mkldnn
    settings = {torch.backends.fp32_precision, backend.matmul.fp32_precision}
    double = torch.float64 in (class_probs.dtype, mask_logits.dtype)
    return torch.float64 if double or settings - {"none", "ieee"} else torch.float32


def _bounds(class_probs: Tensor, mask_logits: Tensor, rows: _Axis, columns: _Axis) -> _Tiles:
    """Step 1."""
    kind = _working_dtype(class_probs, mask_logits)
    class_probs, mask_logits = class_probs.to(kind), mask_logits.to(kind)
    base = class_probs.amin(dim=1) * (class_probs.shape[1] > 1)
    excess = class_probs.T.clone(memory_format=torch.contiguous_format).sub_(base)
    low, high = torch.aminmax(mask_logits[:, rows.mask_index], dim=2)  # (Q, tile rows, w)
    low, high = low[:, :, columns.mask_index].amin(3), high[:, :, columns.mask_index].amax(3)
    low, high = (bound.flatten(1).T.double() for bound in (low, high))  # (N, Q)
    reach = torch.maximum(low.abs(), high.abs())
    for name, values in {"mask_logits": reach, "class_probs": excess}.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} hold NaN or infinite values: no label map can be made of them")
    low, high, reach = (bound.to(kind).contiguous() for bound in (low.sigmoid(), high.sigmoid(), reach))
    return _Tiles(class_probs, base, excess, mask_logits, rows, columns, low, high, reach)


def _start(tiles: _Tiles, members: Tensor, rank: int, *, exact: bool, scored: bool) -> _Race:
    """Step 2: the favourites of the queries, and their floor in every tile by the bounds."""
    classes = members.nonzero()[:, 0]
    rank = min(rank, len(classes))
    favourites, ratio = torch.zeros_like(members), torch.zeros_like(tiles.high)
    if rank:
        favourites[classes[tiles.class_probs[:, classes].topk(rank, dim=1).indices.flatten()]] = True
        floor = (tiles.low @ tiles.excess[favourites].T).topk(rank, dim=1).values  # (N, rank)
        if rank == 2:
            least = RUNNER_UP * floor[:, :1] - (1 - RUNNER_UP) * (tiles.high @ tiles.base)[:, None]
            floor = torch.maximum(floor[:, 1:], least)
        ratio = tiles.high / torch.where(floor > TINY, floor, 0)
    shape = len(tiles.low), tiles.rows.to_image.shape[1] * tiles.columns.to_image.shape[1]
    score = ratio.new_full(shape, -torch.inf) if scored else None
    return _Race(members, rank, exact, favourites, ratio, torch.full(shape, -1, device=ratio.device), score)


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
    favourites = race.favourites.nonzero()[:, 0]
    excess = tiles.excess[favourites]
    likely = ((tiles.low + tiles.high) / 2 @ excess.T).masked_fill(~_may_win(race.ratio, excess), -torch.inf)
    likely, place = likely.topk(min(race.rank + GUESSES, len(favourites)), dim=1)
    race.label_map[:] = favourites[place[:, :1]] if len(favourites) else -1
    tile, column = (likely > -torch.inf).nonzero(as_tuple=True)
    return tile * len(tiles.excess) + favourites[place[tile, column]]


def _others(tiles: _Tiles, race: _Race, runners: Tensor) -> Tensor:
    """Step 4: the members that may win and are no runners yet. Blocks of tiles are tried first."""
    grid = len(tiles.rows.mask_index), len(tiles.columns.mask_index)
    blocks = F.max_pool2d(race.ratio.T.reshape(1, -1, *grid), BLOCK, ceil_mode=True)[0].flatten(1).T
    possible = torch.zeros_like(race.members)
    for part in blocks.split(max(1, CHUNK // len(tiles.excess))):
        possible |= _may_win(part, tiles.excess).any(dim=0)
    classes = (possible & race.members).nonzero()[:, 0]
    excess, found = tiles.excess[classes], []
    step = max(1, CHUNK // max(1, len(classes)))
    for start in range(0, len(race.ratio), step):
        tile, place = _may_win(race.ratio[start : start + step], excess).nonzero(as_tuple=True)
        found.append((start + tile) * len(tiles.excess) + classes[place])
    found = torch.cat(found)
    return found[~torch.isin(found, runners)]


class _Part(NamedTuple):
    """Some tiles and their runners, with the masks of the queries that matter there, pixel by pixel."""

    tile: Tensor  # (n,)
    classes: Tensor  # (n, K): the runners
    excess: Tensor  # (n, K, Q)
    high: Tensor  # (n, Q)
    taken: Tensor  # (n, R): the queries that matter
    masks: Tensor  # (n, R, X): their M
    middle: Tensor  # (n, Q, 1): what stands for M of the other queries; 0 for those that matter
    off: Tensor  # (n, R): |M - what float64 gives| is at most this
    error: Tensor  # (n, 1): scores are off by at most this

    def sums(self, weights: Tensor) -> Tensor:
        """sum_q weight_q M_q: weights (n, rows, Q) -> (n, rows, X)."""
        own = weights.gather(2, self.taken[:, None].expand(-1, weights.shape[1], -1))
        return torch.baddbmm(weights @ self.middle, own, self.masks)


def _decide(tiles: _Tiles, runners: Tensor, races: list[_Race]) -> None:
    """Step 3, into the races: the winner of every pixel in the tiles that have several runners.

    runners: sorted, without repeats. Where scores are wanted, tiles with a single runner are decided, too.
    """
    (num_classes, queries), pixels = tiles.excess.shape, races[0].label_map.shape[1]
    scored = races[0].score is not None
    counts = torch.bincount(runners // num_classes, minlength=len(tiles.low))
    first = counts.cumsum(0) - counts
    order = counts.argsort()
    order = order[counts[order] > (0 if scored else 1)]
    for tile, most in _chunks(order, counts[order].tolist(), queries, pixels):
        slot = torch.arange(most, device=order.device)
        here = slot < counts[tile, None]  # (n, K)
        part = _upsampled(tiles, tile, runners[first[tile, None] + torch.where(here, slot, 0)] % num_classes, scored)
        scores = part.sums(part.excess).masked_fill_(~here[:, :, None], -torch.inf)  # (n, K, X)
        common = part.sums(tiles.base.expand(len(tile), 1, -1))[:, 0] if scored else None  # (n, X)
        for race in filter(lambda race: race.rank, races):
            runs = race.members[part.classes] & here  # (n, K)
            own = scores if len(races) == 1 else scores.masked_fill(~runs[:, :, None], -torch.inf)
            _decide_race(tiles, part, race, runs, own, common)


def _upsampled(tiles: _Tiles, tile: Tensor, classes: Tensor, scored: bool) -> _Part:
    """tile (n,), classes (n, K). A query's stake: how uncertain its mask is, without scores times its largest class."""
    low, high, reach = tiles.low[tile], tiles.high[tile], tiles.reach[tile]  # (n, Q)
    excess = tiles.excess[classes]  # (n, K, Q)
    largest, radius = excess.amax(dim=1), (high - low) / 2  # (n, Q)
    stake, query = (radius * (1 if scored else largest)).sort(dim=1)
    allowed = TAIL * (excess @ high[:, :, None]).amax(dim=1).clamp(max=1)  # (n, 1)
    left_out = int((stake.cumsum(dim=1) <= allowed).sum(dim=1).min())
    left_out, taken = query[:, :left_out], query[:, left_out:]
    middle = (low + radius).scatter(1, taken, 0)[:, :, None]  # (n, Q, 1)

    slope = (FAINT_LOGIT_ROUNDINGS * high).clamp(max=LOGIT_ROUNDINGS).where(reach < HUGE_LOGIT, LOGIT_ROUNDINGS)
    off = ROUNDING * (slope * reach + MASK_ROUNDINGS * high).gather(1, taken)  # (n, R)
    error = (off * largest.gather(1, taken)).sum(dim=1, keepdim=True)  # by the masks; by the sums; by the middles
    error += (high.shape[1] + 16) * ROUNDING * (largest * high).sum(dim=1, keepdim=True)
    error += (radius * largest).gather(1, left_out).sum(dim=1, keepdim=True)
    return _Part(tile, classes, excess, high, taken, _upsample(tiles, tile, taken), middle, off, error)


def _decide_race(tiles: _Tiles, part: _Part, race: _Race, runs: Tensor, scores: Tensor, common: Tensor | None) -> None:
    """runs: (n, K) bool, the runners of this race. scores: (n, K, X), -inf for others, changed here. common: (n, X)."""
    best, place = scores.max(dim=1)  # (n, X)
    second, next_place = scores.scatter_(1, place[:, None], -torch.inf).max(dim=1)
    second = second.clamp(min=0)
    if race.exact:
        _decide_exactly(tiles, part.tile, part.classes, runs, best - second <= 2 * part.error, place)
    else:
        _take_first(scores, best - NEAR, best - second <= NEAR, place)
    race.label_map[part.tile] = part.classes.gather(1, place)
    floor = best
    if race.rank == 2:
        floor = torch.maximum(second, RUNNER_UP * best - (1 - RUNNER_UP) * common)
    if race.score is not None:
        race.score[part.tile] = best + common
    if race.margin is not None:
        race.margin[part.tile] = (best - second) * (len(tiles.excess) > 1)
        runner_up = torch.where(runs.sum(dim=1, keepdim=True) > 1, next_place, -1)
        found = _confidence(part, part.excess + tiles.base, race.decided, place, runner_up)
        race.confidence[part.tile], race.confidence_margin[part.tile] = found
    # The floor, now by pixels, for the certificate.
    inverse = 1 / torch.where(floor - part.error > TINY, floor - part.error, 0)[:, None]  # (n, 1, X)
    most_inverse = inverse.amax(dim=2)
    ratio = (part.masks * inverse).amax(dim=2) + part.off * most_inverse
    ratio = (part.high * most_inverse).scatter(1, part.taken, ratio)
    race.ratio[part.tile] = torch.fmin(race.ratio[part.tile], ratio)  # either is a bound, NaN is none


def _confidence(part: _Part, probs: Tensor, decided: Tensor, place: Tensor, runner_up: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and its margin, (n, X), see SemanticMap; probs (n, K, Q), place, runner_up (n, X) of K, or -1."""
    voices = torch.stack([decided, torch.ones_like(decided)]).expand(len(probs), -1, -1)
    voices, covered = part.sums(voices).unbind(1)  # (n, X)
    shares = part.sums(probs * decided) * (covered.clamp(max=1) / voices.clamp(min=TINY))[:, None]  # (n, K, X)
    mine, theirs = (shares.gather(1, which.clamp(min=0)[:, None])[:, 0] for which in (place, runner_up))
    mine = mine.clamp(0, 1)
    return mine, (mine - theirs * (runner_up >= 0)).clamp(0, 1)


def _decidedness(class_probs: Tensor) -> Tensor:
    """(Q, C) -> (Q,): KL(p || U) / ln C, in [0, 1]; 1 where C is 1. At least UNDECIDED."""
    if class_probs.shape[1] == 1:
        return torch.ones_like(class_probs[:, 0])
    probs = class_probs / class_probs.sum(dim=1, keepdim=True).clamp(min=TINY)
    entropy = -torch.special.xlogy(probs, probs).sum(dim=1)
    return (1 - entropy / math.log(class_probs.shape[1])).clamp(UNDECIDED, 1)


def _chunks(order: Tensor, counts: list[int], queries: int, pixels: int):
    """Tiles with about the same number of runners, no more at once than CHUNK allows: (n,) and the largest number."""
    start = 0
    for stop in range(1, len(order) + 1):
        largest = max(queries * pixels, counts[min(stop, len(order) - 1)] * max(queries, pixels))
        if stop == len(order) or (stop + 1 - start) * largest > CHUNK:
            yield order[start:stop], counts[stop - 1]
            start = stop


def _upsample(tiles: _Tiles, tile: Tensor, query: Tensor) -> Tensor:
    """M of some queries, query (n, R), at the pixels of tiles (n,): (n, R, X)."""
    across = len(tiles.columns.mask_index)
    (rows, y), (columns, x) = (tiles.rows, tile // across), (tiles.columns, tile % across)
    row, column = rows.mask_index[y], columns.mask_index[x]  # (n, m)
    masks = tiles.mask_logits[query[:, None, :, None], row[:, :, None, None], column[:, None, None, :]]  # (n, m, R, m)
    masks = _resize(masks, rows.to_input[y], columns.to_input[x]).sigmoid_()
    if rows.resizes or columns.resizes:
        masks = _resize(masks, rows.to_image[y], columns.to_image[x])
    return masks.transpose(1, 2).flatten(2)


def _resize(masks: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
    """masks (n, a, R, b), to_rows (n, c, a), to_columns (n, d, b) -> (n, c, R, d), as few large products."""
    n, _, queries, width = masks.shape
    height = to_rows.shape[1]
    masks = torch.bmm(to_rows.to(masks.dtype), masks.flatten(2))  # (n, c, R b)
    masks = torch.bmm(masks.view(n, height * queries, width), to_columns.to(masks.dtype).mT)  # (n, c R, d)
    return masks.view(n, height, queries, to_columns.shape[1])


def _decide_exactly(tiles: _Tiles, tile: Tensor, classes: Tensor, runs: Tensor, close: Tensor, place: Tensor) -> None:
    """Near-ties in float64: tile (n,), classes, runs (n, K), close (n, X) bool; into place (n, X), which of K won."""
    across = len(tiles.columns.mask_index)
    width = tiles.columns.to_image.shape[1]
    last_y, last_x = len(tiles.rows.image_taps.index) - 1, len(tiles.columns.image_taps.index) - 1
    for own in close.any(dim=1).nonzero()[:, 0].tolist():
        probs = tiles.class_probs[:, classes[own]].double()  # (Q, K)
        for pixel in close[own].nonzero()[:, 0].split(max(1, CHUNK // max(16 * len(probs), probs.shape[1]))):
            y = tile[own] // across * tiles.rows.to_image.shape[1] + pixel // width
            x = tile[own] % across * width + pixel % width
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
    values = values.float() if values.is_floating_point() else values
    whole = values.view(down, across, height, width).transpose(1, 2).reshape(down * height, across * width)
    return whole[: len(tiles.rows.image_taps.index), : len(tiles.columns.image_taps.index)].contiguous()


__all__ = ["Explanation", "SemanticMap", "explain", "semantic_map", "semantic_scores"]
