"""From proposals to label maps: Eq. 4, its argmax in memory that label lists do not swell, the ensemble of 4.6.

Axes: B image, Q query, C class name, H W output size, h w mask size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EQUAL = 1e-12  # scores this close are equal: above the rounding of float64 sums over some hundred queries


def semantic_scores(class_probs: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. 4 before the argmax, dense: the reference for tests and small problems.

    class_probs (B, Q, C), mask_logits (B, Q, h, w) -> (B, C, H, W) at `size` (H, W).
    """
    logits = F.interpolate(mask_logits.float(), size=size, mode="bilinear", align_corners=False)
    with torch.autocast(logits.device.type, enabled=False):
        return torch.einsum("bqc,bqhw->bchw", class_probs.float(), logits.sigmoid())


@dataclass
class SemanticMap:
    """label_map: (H, W) int64; score: (H, W) of the winner; margin: (H, W) to the runner-up (0 where C is 1)."""

    label_map: Tensor
    score: Tensor
    margin: Tensor


def semantic_map(
    class_probs: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    valid_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    return_scores: bool = False,
    chunk: int = 2**22,
) -> Tensor | list[Tensor] | list[SemanticMap]:
    """Eq. 4: the best class of every pixel, without ever holding C x H x W values.

    class_probs: (B, Q, C); mask_logits: (B, Q, h, w). Mask logits go up to `size`, the (padded) input size, then
    sigmoid. With image_sizes the probabilities are cut to valid_sizes (the input without padding) and resized to
    the images' own sizes: Mask2Former's order, since Eq. 4 is linear in the masks.
    chunk: float64 values of one kind held at once; the masks are held at full size for one image at a time.
    Equal scores go to the lowest index.
    Returns (B, H, W) int64; with image_sizes or return_scores a list, one entry an image.
    """
    results = []
    for image in range(len(mask_logits)):
        probs = F.interpolate(mask_logits[image : image + 1].float(), size=size, mode="bilinear", align_corners=False)
        probs = probs.sigmoid()
        if image_sizes is not None:
            height, width = size if valid_sizes is None else (int(side) for side in valid_sizes[image])
            target = tuple(int(side) for side in image_sizes[image])
            probs = F.interpolate(probs[:, :, :height, :width], size=target, mode="bilinear", align_corners=False)
        results.append(_best_class(class_probs[image].float(), probs[0], chunk))
    if not return_scores:
        results = [result.label_map for result in results]
        return torch.stack(results) if image_sizes is None else results
    return results


def _best_class(class_probs: Tensor, mask_probs: Tensor, chunk: int) -> SemanticMap:
    """class_probs (Q, C), mask_probs (Q, H, W); float64 sums, a chunk of pixels at a time."""
    queries, height, width = mask_probs.shape
    classes = class_probs.shape[1]
    label_map, score, margin = [], [], []
    for pixels in mask_probs.reshape(queries, -1).split(max(1, chunk // max(classes, queries)), dim=1):
        scores = class_probs.double().T @ pixels.double()  # (C, pixels)
        best = scores.amax(0)
        # The lowest index of equal scores; equal up to the rounding of the sums, which differs between columns.
        index = (scores >= best - EQUAL).int().argmax(0)
        label_map.append(index)
        score.append(best.float())
        runner_up = scores.scatter(0, index[None], -torch.inf).amax(0) if classes > 1 else best
        margin.append((best - runner_up).clamp(min=0).float())
    shape = (height, width)
    return SemanticMap(*(torch.cat(parts).reshape(shape) for parts in (label_map, score, margin)))


def ensemble_with_clip(class_probs: Tensor, clip_probs: Tensor, is_seen: Tensor, weight: float) -> Tensor:
    """Geometric ensemble with CLIP's view of the proposals (section 4.6; Xu et al. 2021).

    class_probs, clip_probs: (B, Q, C); is_seen: (C,) bool; weight w in [0, 1].
    Seen classes p^w s^(1-w), unseen p^(1-w) s^w; not renormalised.
    """
    exponent = torch.where(is_seen.to(class_probs.device), weight, 1 - weight).to(class_probs.dtype)
    return class_probs**exponent * clip_probs ** (1 - exponent)


__all__ = ["SemanticMap", "ensemble_with_clip", "semantic_map", "semantic_scores"]
