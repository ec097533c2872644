"""What CLIP sees of the proposals, and the ensemble of its view with the model's own (sections 3.4 and 4.6).

A proposal is shown to CLIP as a crop of its own (`crop_proposals`: Xu et al. 2021 for the ensemble, the plain box for
pseudo labels), or all proposals of an image in one pass over it (`single_pass`). `ensemble_with_clip` joins what comes
out with the class probabilities, and `ensemble_lazily` leaves out the crops that cannot change the label map.

Axes: B image, Q query, N proposal that is looked at, C class name, D embedding; H W input size, h w mask size, S side
of CLIP's input, P patch.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

try:
    from .configuration_zs3 import TINY, Refused, as_number, shortened
    from .label_maps_zs3 import MASK_STRIDE, RUNNER_UP, semantic_map
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import TINY, Refused, as_number, shortened
    from label_maps_zs3 import MASK_STRIDE, RUNNER_UP, semantic_map

Fill = Literal["mean", "zero"]

MASK_THRESHOLD = 0.5  # a proposal is where its mask is above it (Xu et al. 2021)
BICUBIC = -0.75  # the constant of PyTorch's bicubic kernel
CROPS_AT_ONCE = 16  # crops cut out at once: each needs a copy of its image
SINGLE_PASS_SCALE = 2.0  # sides of the image in `single_pass`, in those of CLIP's training (geometric mean)
SCORE_ROUNDING = 4 * 2.0**-24  # share of itself that a float64 score and its margin lose when they become float32
EQUAL = 1e-9  # scores closer than this are not told apart


class ProposalEmbeds(NamedTuple):
    """embeds: (B, Q, D) float32, unit length, 0 where CLIP was shown nothing. shown: (B, Q) bool."""

    embeds: Tensor
    shown: Tensor


# ------------------------------------------------------------------------------------------------------- crops


def proposal_masks(mask_logits: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Where proposals are, M > threshold: (N, h, w) logits -> (N, H, W) bool, at `size` of the unpadded input."""
    full = [side * MASK_STRIDE for side in mask_logits.shape[1:]]
    masks = F.interpolate(mask_logits[None].float(), size=full, mode="bilinear", align_corners=False)[0]
    return masks[:, : size[0], : size[1]].sigmoid() > threshold


def visible_proposals(
    mask_logits: Tensor, valid_sizes: list[tuple[int, int]], threshold: float, chosen: Tensor | None = None
) -> Tensor:
    """(B, Q) bool: the proposals, of those chosen (None: all), that are somewhere; mask_logits (B, Q, h, w)."""
    visible = torch.ones(mask_logits.shape[:2], dtype=torch.bool, device=mask_logits.device)
    visible = visible if chosen is None else chosen.to(visible.device).clone()
    for image in visible.any(dim=1).nonzero()[:, 0].tolist():
        size = valid_sizes[image]
        for part in visible[image].nonzero()[:, 0].split(CROPS_AT_ONCE):
            visible[image, part] = proposal_masks(mask_logits[image, part], size, threshold).flatten(1).any(dim=1)
    return visible


def mask_boxes(masks: Tensor, expansion: float = 1.0) -> Tensor:
    """Tight boxes of masks (N, H, W) bool, none of them empty: (N, 4) int64, left, top, right, bottom.

    Right and bottom are exclusive. expansion: sides become so many times as long about the same middle, are cut off at
    the image and rounded down to whole pixels.
    """
    ends = []
    for across in (1, 2):
        used = masks.any(dim=across).int()  # (N, W), then (N, H)
        length = used.shape[1]
        start, stop = used.argmax(dim=1), length - used.flip(1).argmax(dim=1)
        middle, half = (start + stop) / 2, (stop - start) * (expansion / 2)
        start = (middle - half).clamp(min=0).long()
        ends.append((start, torch.maximum((middle + half).clamp(max=length).long(), start + 1)))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], dim=1)


def crop_proposals(
    image: Tensor, masks: Tensor, size: int, *, fill: Fill | None = "mean", expansion: float = 1.0
) -> Tensor:
    """The proposals of one image as CLIP gets to see them: (N, 3, S, S), normalised.

    image: (3, H, W) RGB in [0, 1]; masks: (N, H, W) bool, none of them empty; size: S.
    fill: what stands for pixels outside the mask, CLIP's "mean" colour (0 after normalisation) or "zero", black; None:
        they are shown as they are. The box is stretched to S x S (bicubic, no antialias), as in Xu et al. 2021.
    """
    if fill not in ("mean", "zero", None):
        raise Refused(f"fill must be 'mean', 'zero' or None, got {shortened(fill)}")
    expansion = as_number("expansion", expansion, TINY)
    pixels = _normalised(image)
    blank = _normalised(torch.zeros_like(image[:, :1, :1])) if fill == "zero" else pixels.new_zeros(3, 1, 1)
    left, top, right, bottom = mask_boxes(masks, expansion).unbind(1)
    rows = _bicubic(top, bottom, image.shape[1], size)  # (N, S, H)
    columns = _bicubic(left, right, image.shape[2], size)  # (N, S, W)
    crops = []
    with torch.autocast(image.device.type, enabled=False):
        for part in torch.arange(len(masks), device=masks.device).split(CROPS_AT_ONCE):
            shown = pixels if fill is None else torch.where(masks[part, None], pixels, blank)  # (n, 3, H, W)
            crops.append(rows[part, None] @ shown @ columns[part, None].mT)
    return torch.cat(crops) if crops else pixels.new_empty(0, 3, size, size)


def _normalised(image: Tensor) -> Tensor:
    """(3, H, W) RGB in [0, 1] -> as CLIP takes it, float32."""
    image = image.float()
    mean, std = (image.new_tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (image - mean) / std


def _bicubic(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """Resizing the pixels start to stop (N,) of an axis to `size`, as a matrix (N, size, length).

    What F.interpolate does with them cut out: at their borders the last of them is repeated. In float64, since places
    in float32 are off by up to 3e-5 of a pixel.
    """
    extent = (stop - start)[:, None]
    place = extent.double() / size * (torch.arange(size, device=start.device) + 0.5) - 0.5  # (N, size)
    low = place.floor()
    t = (place - low)[..., None]
    near, far = torch.cat([t, 1 - t], dim=-1), torch.cat([1 + t, 2 - t], dim=-1)  # distances of the four taps
    near = ((BICUBIC + 2) * near - (BICUBIC + 3)) * near**2 + 1
    far = ((BICUBIC * far - 5 * BICUBIC) * far + 8 * BICUBIC) * far - 4 * BICUBIC
    weight = torch.stack([far[..., 0], near[..., 0], near[..., 1], far[..., 1]], dim=-1).float()  # (N, size, 4)
    taps = low.long()[..., None] + torch.arange(-1, 3, device=start.device)
    index = start[:, None, None] + taps.clamp(min=0).minimum(extent[..., None] - 1)
    matrix = weight.new_zeros(len(start), size, length)
    for tap in range(4):  # one by one: at a border they meet, and the order of a sum must not be left to chance
        matrix.scatter_add_(2, index[..., tap, None], weight[..., tap, None])
    return matrix


# ------------------------------------------------------------------------------------------------- one pass for all


def single_pass(tower: CLIPVisionModelWithProjection, image: Tensor, masks: Tensor) -> Tensor:
    """CLIP embeddings of all proposals of an image from one pass over it: (N, D), not normalised.

    image: (3, H, W) RGB in [0, 1]; masks: (N, H, W) bool, none of them empty.
    Every proposal is a copy of CLIP's class token that reads the patches as far as its mask covers them, and is read by
    nobody: the patches are those of CLIP's own pass over the image. Nothing is trained. The idea is that of MaskCLIP
    (Ding et al. 2023) and MAFT (Jiao et al. 2023).
    """
    vision = tower.vision_model
    side, patch = tower.config.image_size, tower.config.patch_size
    scale = SINGLE_PASS_SCALE * side / (image.shape[1] * image.shape[2]) ** 0.5
    grid = [max(1, round(length * scale / patch)) for length in image.shape[1:]]
    pixels = _normalised(image)[None]
    pixels = F.interpolate(pixels, size=[n * patch for n in grid], mode="bicubic", antialias=True, align_corners=False)
    covered = F.adaptive_avg_pool2d(masks.float(), grid).flatten(1)  # (N, P), share of each patch
    hidden = vision.embeddings(pixels, interpolate_pos_encoding=True)  # (1, 1 + P, width)
    known = hidden.shape[1]
    hidden = torch.cat([hidden, hidden[:, :1].expand(-1, len(masks), -1)], dim=1)
    bias = hidden.new_full((hidden.shape[1], hidden.shape[1]), -torch.inf)
    bias[:known, :known] = 0
    bias[known:, 1:known] = covered.to(bias.dtype).log()
    bias[known:, known:].fill_diagonal_(0)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden), attention_mask=bias[None, None])
    return tower.visual_projection(vision.post_layernorm(hidden.last_hidden_state[0, known:]))


# ---------------------------------------------------------------------------------------------------- the ensemble


def ensemble_with_clip(class_probs: Tensor, clip_probs: Tensor, is_seen: Tensor, weight: float) -> Tensor:
    """Geometric ensemble with CLIP's view of the proposals (section 4.6; Xu et al. 2021).

    class_probs, clip_probs: (B, Q, C), or without B; is_seen: (C,) bool; weight w in [0, 1].
    Seen classes p^w s^(1-w), unseen p^(1-w) s^w; not renormalised.
    """
    exponent = torch.where(is_seen.to(class_probs.device), weight, 1 - weight).to(class_probs.dtype)
    return class_probs**exponent * clip_probs ** (1 - exponent)


class LazyEnsemble(NamedTuple):
    """probs: (Q, C). looked: (Q,) bool, which proposals CLIP was shown. undecided: share of pixels, in [0, 1]."""

    probs: Tensor
    looked: Tensor
    undecided: float


def ensemble_lazily(
    class_probs: Tensor,
    mask_logits: Tensor,
    shown: Tensor,
    look: Callable[[Tensor], Tensor],
    is_seen: Tensor,
    weight: float,
    *,
    valid_size: tuple[int, int],
    image_size: tuple[int, int],
    tolerance: float = 0.0,
) -> LazyEnsemble:
    """The ensemble of one image without looks at proposals that cannot change its label map.

    class_probs (Q, C); mask_logits (Q, h, w); shown (Q,) bool: what CLIP could be shown. look(queries (n,) int64) gives
    CLIP's probabilities (n, C). valid_size, image_size: as in `semantic_map`, of the label map that matters.

    Without a look at query q its part of Eq. 4 is not known, but lies between 0 and p_q(c)^e M_q, as CLIP's s is at
    most 1. So the winner of a pixel is certain when what it surely has beats what any other class may have. Queries are
    looked at, those first that may have most to say where no winner is certain, until at most the share `tolerance` of
    the pixels is open: 0 gives the label map of looking at all to the pixel, otherwise at most so many pixels differ.
    A query that was not looked at keeps p_q, as if CLIP agreed: scores are not those of looking at all.
    """
    if class_probs.shape[1] == 1:
        return LazyEnsemble(class_probs, torch.zeros_like(shown), 0.0)
    most = ensemble_with_clip(class_probs, torch.ones_like(class_probs), is_seen, weight)  # also what empty masks get
    probs, unknown = torch.where(shown[:, None], class_probs, most), shown.clone()
    part = [-(-side // MASK_STRIDE) for side in valid_size]
    say = mask_logits[:, : part[0], : part[1]].float().sigmoid() * most.amax(dim=1)[:, None, None]  # (Q, h, w)
    wanted = say.flatten(1).argmax(dim=0).unique()  # those with most to say somewhere
    while True:
        wanted = wanted[unknown[wanted]]
        if len(wanted):
            probs[wanted] = ensemble_with_clip(class_probs[wanted], look(wanted), is_seen, weight)
            unknown[wanted] = False
        if not unknown.any():
            return LazyEnsemble(probs, shown, 0.0)
        bounds = torch.stack([probs.masked_fill(unknown[:, None], 0), torch.where(unknown[:, None], most, probs)])
        size = tuple(side * MASK_STRIDE for side in mask_logits.shape[1:])
        sizes = {"valid_sizes": [valid_size] * 2, "image_sizes": [image_size] * 2}
        masks = mask_logits.expand(2, -1, -1, -1)
        least, largest = semantic_map(bounds.double(), masks, size, **sizes, return_scores=True)
        rival = torch.maximum(largest.score - largest.margin, RUNNER_UP * largest.score)  # no other class has more
        slack = EQUAL + SCORE_ROUNDING * largest.score
        certain = (least.label_map == largest.label_map) & (least.score - rival > slack)
        undecided = float((~certain).float().mean())
        if undecided <= tolerance:
            return LazyEnsemble(probs, shown & ~unknown, undecided)
        # The open pixels, as mask pixels: each names the query with most to say there among those not looked at.
        where = F.adaptive_max_pool2d((~certain)[None].float(), part)[0] > 0
        left = say[:, where].masked_fill(~unknown[:, None], -1)
        wanted = left.argmax(dim=0).unique()


__all__ = [
    "LazyEnsemble",
    "ProposalEmbeds",
    "crop_proposals",
    "ensemble_lazily",
    "ensemble_with_clip",
    "mask_boxes",
    "proposal_masks",
    "single_pass",
    "visible_proposals",
]
