"""The counts of one pass over the images. The counts of several processes merge into one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from label_maps_zs3 import SemanticMap
from zs3.scores.calibration import OUTSIDER, Rejection, Reliability, SeenBiasCurve
from zs3.scores.confusion import ConfusionMatrix


@dataclass
class PassCounts:
    """names: the candidates, C. is_seen: (C,) bool. None: not counted."""

    names: list[str]
    is_seen: Tensor
    confusion: ConfusionMatrix
    curve: SeenBiasCurve | None
    reliability: Reliability | None
    rejection: Rejection | None

    def update(self, found: SemanticMap | Tensor, prediction: Tensor, label: Tensor, image_id: str) -> None:
        """Counts one image. found: as `semantic_map` returned it. label: (H, W), see `Candidates.label_map`."""
        inside = torch.where(label == OUTSIDER, self.confusion.ignore_index, label)
        self.confusion.update(prediction, inside, image_id)
        if self.curve is not None:
            self.curve.update(found, inside)
        if self.reliability is not None:
            self.reliability.update(found, inside)
            self.rejection.update(found, label, image_id)

    def merge(self, other: "PassCounts") -> None:
        for name in ("confusion", "curve", "reliability", "rejection"):
            if getattr(self, name) is not None:
                getattr(self, name).merge(getattr(other, name))


def new_counts(
    names: list[str], is_seen: Tensor, ignored: int, setting: str, seen_bias: float, calibration: bool
) -> PassCounts:
    """A curve needs seen and unseen candidates. Confidences are those of the winner without a bias, so they are not
    counted with a bias. ignored: the id of ignored pixels."""
    has_curve = calibration and setting == "gzs3" and 0 < int(is_seen.sum()) < len(names)
    has_confidences = calibration and seen_bias == 0
    return PassCounts(
        names,
        is_seen,
        ConfusionMatrix(len(names), ignored, is_seen),
        SeenBiasCurve(is_seen, ignored) if has_curve else None,
        Reliability(ignored) if has_confidences else None,
        Rejection(ignored) if has_confidences else None,
    )
