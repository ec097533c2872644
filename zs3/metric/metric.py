"""The project's scores as a metric of the `evaluate` library; README.md beside this file shows its use.

evaluate copies this file elsewhere and imports the copy, so it imports zs3 as an installed package.
"""

from collections.abc import Sequence

import datasets  # noqa: TID253
import evaluate  # noqa: TID253
import numpy as np
from torch import Tensor

from zs3.command_line import InputError
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import OF_SEEN_AND_UNSEEN, Absent, class_mask

LabelMap = Tensor | np.ndarray

DESCRIPTION = """Mean IoU of semantic segmentation over a whole dataset, and over its seen and unseen classes. Maps are
counted and not kept: memory does not grow with their number."""
INPUTS = """
predictions: label maps, (H, W) integers: ids in 0 to num_classes - 1, -1 for no class.
references: label maps of the same sizes: ids, or ignore_index where a pixel is not labelled.
"""


class SegmentationScores(evaluate.Metric):
    """Streams label maps into one ConfusionMatrix."""

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        is_seen: Sequence[bool] | None = None,
        absent: Absent = "union",
        is_thing: Sequence[bool] | None = None,
        **settings: object,
    ):
        """num_classes, ignore_index, absent: as in ConfusionMatrix. is_seen: (C,); None: no seen and unseen means.
        is_thing: (C,); None: no means of things and stuff. settings: evaluate's own, such as cache_dir."""
        super().__init__(**settings)
        if self.num_process > 1:
            raise InputError("this metric counts in one process: merge the ConfusionMatrix of several instead")
        self.is_seen = None if is_seen is None else class_mask(is_seen, num_classes)
        self.is_thing = None if is_thing is None else class_mask(is_thing, num_classes, "is_thing")
        self.absent = absent
        self.confusion = ConfusionMatrix(num_classes, ignore_index)
        self.confusion.iou(absent)  # an unknown rule is refused before the evaluation, not after it

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def __len__(self) -> int:
        """Images counted."""
        return len(self.confusion.images)

    def add(self, *, prediction: LabelMap, reference: LabelMap) -> None:
        """Counts one image."""
        self.confusion.update(prediction, reference)

    def add_batch(self, *, predictions: Sequence[LabelMap], references: Sequence[LabelMap]) -> None:
        """Counts several images, of any sizes."""
        if len(predictions) != len(references):
            raise InputError(f"{len(predictions)} predictions, but {len(references)} references: give one for each")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self, *, predictions: Sequence[LabelMap] | None = None, references: Sequence[LabelMap] | None = None
    ) -> dict[str, float | list[float]]:
        """The scores in [0, 1] of all maps added and of those given here; NaN: the mean has no class.

        Counting then starts anew, as with every metric of evaluate.
        """
        if (predictions is None) != (references is None):
            raise InputError("compute takes predictions and references, or neither of them")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if not len(self):
            raise InputError("no label map was added: call add or add_batch before compute")
        confusion = self.confusion
        self.confusion = ConfusionMatrix(confusion.num_classes, confusion.ignore_index)
        every = np.ones(confusion.num_classes, dtype=bool)
        scores = confusion.scores(every if self.is_seen is None else self.is_seen, self.absent, self.is_thing)
        left_out = [*(OF_SEEN_AND_UNSEEN if self.is_seen is None else ())]
        left_out += ["miou_things", "miou_stuff"] if self.is_thing is None else []
        return {
            **{name: score for name, score in scores.items() if name not in left_out},
            "per_class": confusion.iou(self.absent).tolist(),
        }
