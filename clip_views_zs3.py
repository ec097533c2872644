"""CLIP's view of the proposals, and its ensemble with the model's own (sections 3.4 and 4.6).

CLIP, or another encoder of encoders_zs3, is shown a crop of each proposal (`crop_proposals`: as Xu et al. 2021 for the
ensemble, the plain box for pseudo labels), or all proposals of an image in one pass over it (`region_vectors`).
`ensemble_with_clip` joins its probabilities with the model's.

Axes: B image, Q query, N proposal that is looked at, C class name, D embedding; H W input size, h w mask size, S side
of CLIP's input, P patch.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

try:
    from .configuration_zs3 import PatchTokens, Refused, RegionView, as_number, shortened
    from .encoders_zs3 import (
        family_of,
        normalised,
        patch_grid,
        picture_vectors,
        region_vectors,
        square_windows,
        vector_size,
    )
    from .label_maps_zs3 import MASK_STRIDE
    from .outputs_zs3 import best_synonyms, check_finite_output, label_similarity
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import PatchTokens, Refused, RegionView, as_number, shortened
    from encoders_zs3 import (
        family_of,
        normalised,
        patch_grid,
        picture_vectors,
        region_vectors,
        square_windows,
        vector_size,
    )
    from label_maps_zs3 import MASK_STRIDE
    from outputs_zs3 import best_synonyms, check_finite_output, label_similarity

Fill = Literal["mean"] | None

MASK_THRESHOLD = 0.5  # a proposal is where its mask is above it (Xu et al. 2021)
LARGEST = 7  # proposals with a crop in the view "mixed": with one pass an eighth of the time of 100 crops
BICUBIC = -0.75  # the constant of PyTorch's bicubic kernel
CROPS_AT_ONCE = 16  # crops that are cut at once: each needs a copy of its image
CROPS_FOR_TOWER = 64  # crops that the image tower sees at once


class ProposalEmbeds(NamedTuple):
    """embeds: (B, Q, D) float32, unit length, 0 where the encoder was shown nothing. shown: (B, Q) bool."""

    embeds: Tensor
    shown: Tensor


@torch.no_grad()
def embed_proposals(
    tower: PreTrainedModel,
    images: Tensor,
    mask_logits: Tensor,
    valid_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
    *,
    view: RegionView = "crops",
    mask_threshold: float = MASK_THRESHOLD,
    fill: Fill = "mean",
    chosen: Tensor | None = None,
    patch_tokens: PatchTokens = "attention",
) -> ProposalEmbeds:
    """An image tower's embeddings of proposals. The only way of pixels to an encoder.

    images: (B, 3, H, W) RGB in [0, 1], see the image processor's `to_rgb`.
    mask_logits: (B, Q, h, w); valid_sizes: (B, 2), as in Zs3Output; None: no padding.
    view: "crops", a crop of each proposal; "single_pass", all proposals in one pass over their image, which takes the
        time of a few crops, and is an approximation with CLIP; or "mixed", crops of the `largest_proposals`, and one
        pass for the others.
    mask_threshold: a proposal is where its mask is above it. One that is nowhere is not shown.
    fill: the colour of pixels outside the mask in a crop, see `crop_proposals`.
    chosen: (B, Q) bool, the proposals to look at; None: all.
    patch_tokens: in a single pass, see `patch_means` of encoders_zs3.
    """
    if view not in get_args(RegionView):
        raise Refused(f"view must be one of {', '.join(get_args(RegionView))}, got {shortened(view)}")
    mask_threshold = as_number("mask_threshold", mask_threshold, 0, 1)
    valid_sizes = [images.shape[2:]] * len(images) if valid_sizes is None else valid_sizes
    sizes = [tuple(int(side) for side in size) for size in valid_sizes]
    images = [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]
    shown = visible_proposals(mask_logits, sizes, mask_threshold, chosen)
    embeds = mask_logits.new_zeros(*shown.shape, vector_size(tower.config), dtype=torch.float32)
    if view == "mixed":
        as_crops = largest_proposals(mask_logits, sizes, shown)
    else:
        as_crops = shown if view == "crops" else torch.zeros_like(shown)

    together = shown & ~as_crops
    for image in together.any(dim=1).nonzero()[:, 0].tolist():
        query = together[image].nonzero()[:, 0]
        own = mask_logits[image, query]
        embeds[image, query] = in_one_pass(tower, images[image], own, mask_threshold, patch_tokens).to(embeds)
    side = tower.config.image_size
    for part in as_crops.nonzero().split(CROPS_FOR_TOWER) if as_crops.any() else ():
        crops = []
        for image in part[:, 0].unique().tolist():
            query = part[part[:, 0] == image, 1]
            own = proposal_masks(mask_logits[image, query], sizes[image], mask_threshold)
            crops.append(crop_proposals(normalised(tower, images[image]), own, side, fill=fill))
        embeds[part[:, 0], part[:, 1]] = picture_vectors(tower, torch.cat(crops)).to(embeds)
    check_finite_output("the image tower's embeddings of the proposals", embeds)
    return ProposalEmbeds(F.normalize(embeds, dim=-1), shown)


def to_rgb(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float], full: float = 1.0) -> Tensor:
    """Normalised pixel_values (B, 3, H, W) -> RGB in [0, 1], float32. full: a full colour before the normalisation."""
    pixels = pixel_values.float()
    mean, std = (pixels.new_tensor(value).view(-1, 1, 1) for value in (mean, std))
    return ((pixels * std + mean) / full).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------- crops


def full_masks(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The proposals M in [0, 1]: (N, h, w) logits -> (N, H, W) float32, at `size` of the unpadded input."""
    full = [side * MASK_STRIDE for side in mask_logits.shape[1:]]
    masks = F.interpolate(mask_logits[None].float(), size=full, mode="bilinear", align_corners=False)[0]
    return masks[:, : size[0], : size[1]].sigmoid()


def proposal_masks(mask_logits: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Where proposals are, M > threshold: (N, h, w) logits -> (N, H, W) bool, at `size` of the unpadded input."""
    return full_masks(mask_logits, size) > threshold


def in_one_pass(
    tower: PreTrainedModel, image: Tensor, mask_logits: Tensor, threshold: float, patch_tokens: PatchTokens
) -> Tensor:
    """(N, D) float32 of all proposals of a picture, from one pass over each of its windows.

    image: (3, H, W) in [0, 1]; mask_logits: (N, h, w). A proposal's vector is the mean of those of the windows, each
    of unit length and weighted by the proposal's area in the window.
    """
    windows, total = square_windows(image.shape[1:]), 0
    for (rows, columns), covered in zip(windows, covered_patches(tower, mask_logits, windows, threshold), strict=True):
        area = covered.mean(dim=1)
        some = area > 0
        vectors = mask_logits.new_zeros(len(area), vector_size(tower.config), dtype=torch.float32)
        if some.any():
            found = region_vectors(tower, image[:, rows, columns], covered[some], patch_tokens)
            vectors[some] = F.normalize(found.to(vectors), dim=-1)
        total = total + area[:, None] * vectors
    return total


def covered_patches(
    tower: PreTrainedModel, mask_logits: Tensor, windows: list[tuple[slice, slice]], threshold: float
) -> list[Tensor]:
    """The share of each patch of each window that proposals cover: (N, h, w) logits -> (N, P) in [0, 1] of each.

    windows: of `square_windows`, the last of which ends where the picture ends. A pixel counts as M, or as M >
    threshold, as its family sees regions.
    """
    soft, size = family_of(tower.config).soft, tuple(part.stop for part in windows[-1])
    covered = [[] for _ in windows]
    for part in mask_logits.split(CROPS_AT_ONCE):  # all masks at the input size would need much memory
        masks = full_masks(part, size)
        masks = masks if soft else (masks > threshold).float()
        for found, (rows, columns) in zip(covered, windows, strict=True):
            grid = patch_grid(tower, (rows.stop - rows.start, columns.stop - columns.start))
            found.append(F.adaptive_avg_pool2d(masks[:, rows, columns], grid).flatten(1))
    return [torch.cat(found) for found in covered]


def visible_proposals(
    mask_logits: Tensor, valid_sizes: list[tuple[int, int]], threshold: float, chosen: Tensor | None = None
) -> Tensor:
    """(B, Q) bool: the proposals whose mask is not empty; mask_logits (B, Q, h, w), chosen (B, Q) bool, None: all."""
    visible = torch.ones(mask_logits.shape[:2], dtype=torch.bool, device=mask_logits.device)
    visible = visible if chosen is None else chosen.to(visible.device).clone()
    for image in visible.any(dim=1).nonzero()[:, 0].tolist():
        size = valid_sizes[image]
        for part in visible[image].nonzero()[:, 0].split(CROPS_AT_ONCE):
            visible[image, part] = proposal_masks(mask_logits[image, part], size, threshold).flatten(1).any(dim=1)
    return visible


def largest_proposals(mask_logits: Tensor, valid_sizes: list[tuple[int, int]], shown: Tensor) -> Tensor:
    """(B, Q) bool: in each image the LARGEST of the shown proposals, which most pixels belong to before any naming.

    A pixel of the mask grid belongs to the shown proposal whose mask is highest there. Equal numbers: the lower index.
    """
    largest = torch.zeros_like(shown)
    for image in shown.any(dim=1).nonzero()[:, 0].tolist():
        rows, columns = (-(-side // MASK_STRIDE) for side in valid_sizes[image])
        query = shown[image].nonzero()[:, 0]
        owner = mask_logits[image, query, :rows, :columns].argmax(dim=0)
        pixels = torch.bincount(owner.flatten(), minlength=len(query))
        largest[image, query[pixels.argsort(descending=True, stable=True)[:LARGEST]]] = True
    return largest


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks (N, H, W) bool, none of them empty: (N, 4) int64, left, top, right, bottom.

    Right and bottom are exclusive.
    """
    ends = []
    for across in (1, 2):
        used = masks.any(dim=across).int()  # (N, W), then (N, H)
        ends.append((used.argmax(dim=1), used.shape[1] - used.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], dim=1)


def crop_proposals(pixels: Tensor, masks: Tensor, size: int, *, fill: Fill = "mean") -> Tensor:
    """The proposals of one image as an encoder sees them: (N, 3, S, S).

    pixels: (3, H, W), of `normalised`; masks: (N, H, W) bool, none of them empty; size: S.
    fill: the colour of pixels outside the mask, the encoder's "mean" (0 after normalisation); None: their own.
    The box is stretched to S x S (bicubic, no antialias), as in Xu et al. 2021.
    """
    if fill not in ("mean", None):
        raise Refused(f"fill must be 'mean' or None, got {shortened(fill)}")
    left, top, right, bottom = mask_boxes(masks).unbind(1)
    rows = _bicubic(top, bottom, pixels.shape[1], size)  # (N, S, H)
    columns = _bicubic(left, right, pixels.shape[2], size)  # (N, S, W)
    crops = []
    with torch.autocast(pixels.device.type, enabled=False):
        for part in torch.arange(len(masks), device=masks.device).split(CROPS_AT_ONCE):
            shown = pixels if fill is None else torch.where(masks[part, None], pixels, 0)  # (n, 3, H, W)
            crops.append(rows[part, None] @ shown @ columns[part, None].mT)
    return torch.cat(crops) if crops else pixels.new_empty(0, 3, size, size)


def _bicubic(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """Matrices (N, size, length) that resize the pixels from start to stop (N,) of an axis to `size`.

    They do what F.interpolate does with these pixels cut out: the last one is repeated at the border. In float64, since
    positions in float32 are wrong by up to 3e-5 of a pixel.
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
    for tap in range(4):  # one by one: taps meet at a border, and the order of a sum must always be the same
        matrix.scatter_add_(2, index[..., tap, None], weight[..., tap, None])
    return matrix


# ---------------------------------------------------------------------------------------------------- the ensemble


def ensemble_with_clip(class_probs: Tensor, clip_probs: Tensor, is_seen: Tensor, weight: float) -> Tensor:
    """Geometric ensemble with CLIP's view of the proposals (section 4.6; Xu et al. 2021).

    class_probs, clip_probs: (B, Q, C), or without B; is_seen: (C,) bool; weight w in [0, 1].
    Seen classes p^w s^(1-w), unseen p^(1-w) s^w; not renormalised.
    """
    exponent = torch.where(is_seen.to(class_probs.device), weight, 1 - weight).to(class_probs.dtype)
    return class_probs**exponent * clip_probs ** (1 - exponent)


def clip_probabilities(
    proposals: ProposalEmbeds, text_embeds: Tensor, logit_scale: float, owner: Tensor | None = None
) -> Tensor:
    """CLIP's own view of the proposals: (B, Q, C), the softmax of scaled cosines.

    A proposal that CLIP was not shown has 1 for all classes, as empty masks have in Xu et al. 2021.
    text_embeds: (C, D), or with owner (S, D), see `best_synonyms`.
    """
    logits = logit_scale * label_similarity(proposals.embeds, text_embeds)
    logits = logits if owner is None else best_synonyms(logits, owner)
    return logits.softmax(dim=-1).masked_fill(~proposals.shown[..., None], 1)
