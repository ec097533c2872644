"""The keys of a result file of an evaluation, with their types. zs3/evaluation/results.py writes and reads the file."""

from typing import Annotated, Literal, NamedTuple, Required

from typing_extensions import TypedDict

from configuration_zs3 import RegionView
from zs3.scores.means import Absent
from zs3.typed_json import Count, Share, rule


class Chosen(NamedTuple):
    """The bias of an evaluation or the weight of its ensemble, and in words how it was chosen."""

    value: float | None  # None: no ensemble
    how: str


class Ensemble(NamedTuple):
    view: str  # "off": no ensemble
    weight: Chosen


# Confidences are sums of float32 numbers: rounding may lift their mean above 1.
RoundedShare = Annotated[float, rule("a share in [0, 1]", lambda value: 0 <= value <= 1 + 1e-6)]
Interval = Annotated[
    list[Share | None],
    rule("[low, high] or [null, null]", lambda ends: len(ends) == 2 and (None not in ends or ends == [None, None])),
    rule("[low, high] or [null, null]", lambda ends: None in ends or ends[0] <= ends[1]),
]


class CalibrationChoices(TypedDict, total=False):
    """The bias that was subtracted from the scores of seen classes; in words, how it and the weight were chosen."""

    seen_bias: float
    seen_bias_chosen: str
    ensemble_weight_chosen: str


class CurveScores(TypedDict, total=False):
    """The scores at one bias. None: the mean has no class."""

    miou: Share | None
    miou_seen: Required[Share | None]
    miou_unseen: Share | None
    hiou: Share | None


class CurvePoint(CurveScores, total=False):
    gamma: Required[float]


class CurveColumns(TypedDict, total=False):
    """Columns of equal length."""

    gamma: Required[list[float]]
    miou: list[Share | None]
    miou_seen: list[Share | None]
    miou_unseen: list[Share | None]
    hiou: Required[list[Share | None]]


class CurveResult(TypedDict, total=False):
    """See `zs3.scores.calibration.SeenBiasCurve.result`."""

    absent: Absent
    area: Required[RoundedShare | None]
    unbiased: CurvePoint
    best: CurvePoint | None
    seen_only: Required[CurveScores]
    unseen_only: CurveScores
    points: CurveColumns


class Bin(TypedDict, total=False):
    low: Share
    high: Share
    count: Count
    confidence: RoundedShare | None
    accuracy: Share | None


class ReliabilityResult(TypedDict, total=False):
    """See `zs3.scores.calibration.Reliability.result`."""

    pixels: Count
    ece: RoundedShare | None
    bins: list[Bin]


class Conformal(TypedDict, total=False):
    alpha: Share
    threshold: Share | None
    rejects_everything: bool
    num_calibration_images: Count
    num_check_images: Count
    wrong_share: RoundedShare | None
    accepted_share: RoundedShare | None


class RejectionResult(TypedDict, total=False):
    """See `zs3.scores.calibration.Rejection.result`."""

    insiders: Count
    outsiders: Count
    auroc: RoundedShare | None
    threshold_at_95: Share | None
    fpr_at_95: Share | None
    conformal: Conformal


class ConfusedNames(TypedDict, total=False):
    """See `zs3.scores.confusion.ConfusedPair`; names in place of ids."""

    truth: str
    predicted: str
    pixels: Count
    share: Share


class Result(TypedDict, total=False):
    """The content of a result file, in its order. None: not measured, or not defined in this setting.

    Older files have three more keys, for the view "lazy": ensemble_tolerance, proposals_shown_to_clip, undecided_share.
    """

    protocol: str
    setting: Literal["gzs3", "zs3", "ovs"]
    model: str
    dataset: str
    split: str
    split_sha256: str
    split_images: Count
    label_space: str
    label_space_sha256: str
    checkpoint_sha256: str | None  # None, also in the next two: a Hub id that was not downloaded
    settings_sha256: str | None
    code_sha256: str | None
    given_sha256: dict[str, str]
    seen: list[str]
    unseen: list[str]
    things: list[str] | None  # None: not known; older files lack it
    without: list[str]
    trained_on_masks_of: list[str] | None
    unseen_labels_in_training: Literal["none", "pseudo", "captions", "ground_truth"] | None
    image_label_precision: Share | None  # of these labels, see `Zs3Config`; older files lack both
    image_label_recall: Share | None
    absent: Absent
    seed: Count
    settings: dict[str, bool | float | str | list[str] | None]  # flags of eval.py
    versions: dict[str, str]
    prompts: list[str]
    clip_ensemble: Literal["off", "lazy", RegionView]  # lazy: only in older files
    clip_ensemble_weight: Share | None
    calibration: CalibrationChoices
    num_images: Count
    miou: Share | None
    miou_seen: Share | None
    miou_unseen: Share | None
    hiou: Share | None
    miou_seen_on_seen_pixels: Share | None  # older files lack this and the next two
    miou_things: Share | None
    miou_stuff: Share | None
    pixel_accuracy: Share | None
    frequency_weighted_iou: Share | None
    confidence_intervals: dict[str, Interval]
    per_class: dict[str, Share | None]
    per_class_intervals: dict[str, Interval]
    seen_unseen_confusion: dict[str, dict[str, Share | None]] | None  # see `zs3.scores.confusion`
    worst_pairs: list[ConfusedNames]
    seen_unseen_curve: CurveResult | None
    reliability: ReliabilityResult | None
    rejection: RejectionResult | None
