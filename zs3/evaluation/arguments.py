"""The flags of eval.py."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from configuration_zs3 import TINY, Number, RegionView
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFolder,
    Seed,
    Whole,
    Workers,
    check_outside,
    check_required,
    flag,
    refuse_alone,
    refuse_together,
    try_output,
)
from zs3.evaluation.choices import check_bias, check_weight, number_or_none
from zs3.evaluation.curves import check_matplotlib
from zs3.evaluation.results import check_replaceable, read_result


@dataclass
class EvalArgs(Arguments):
    """One evaluation of one checkpoint: on one dataset, or on the datasets of a suite."""

    model: str | None = flag(None, "Checkpoint: a folder or a Hub id.")
    trust_remote_code: bool = flag(False, "Run the code that lies beside the checkpoint, in place of this project's.")
    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    suite: Literal["gzs3", "ovs5"] | None = flag(None, "Datasets and setting of the paper's Tables 1-2, or 3.")
    data_root: str | None = flag(None, "Folder of the suite's datasets, each named as zs3 convert names it.")
    members: list[str] = flag([], "Datasets of the suite; default: all that exist, except voc_21.")
    split: str = flag("validation", "Split of the dataset to evaluate on.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    setting: Literal["gzs3", "zs3", "ovs"] = flag(
        "gzs3",
        "Candidates: all classes (gzs3), the unseen alone (zs3), or any label space, without a zero-shot claim (ovs).",
    )
    without: list[str] = flag([], "Names that are no candidates; their pixels count for rejection only.")
    output: str | None = flag(None, "Result file (JSON); for a suite, a folder.")
    text_embeds: str | None = flag(
        None,
        "Text vectors for a checkpoint without text tower: a .npy, one row a class; for a suite, a folder of NAME.npy.",
    )
    ensemble: Literal["off", RegionView] | None = flag(
        None,
        "Combine with CLIP's scores of proposals (section 4.6 of the paper): from crops, one pass over the image, or "
        "crops of the largest and one pass; default: crops, if the checkpoint has an image tower and a weight.",
    )
    ensemble_weight: str | None = flag(
        None, "w of the ensemble: a number, or a file of zs3 ensemble_weight; default: the checkpoint's own weight."
    )
    encoder: str | None = flag(
        None,
        "CLIP or TIPSv2 that scores the proposals in the ensemble, in place of the checkpoint's own towers; needs "
        "--ensemble and a number as --ensemble_weight.",
    )
    seen_bias: str | None = flag(
        None, "Bias to subtract from the scores of seen classes: a number, or a result file with the best of its curve."
    )
    calibration: bool = flag(True, "Measure the seen/unseen curve, reliability and rejection in the same pass.")
    max_wrong: Annotated[float, Number(float, TINY, 1, below=True)] = flag(
        0.1, "Share of an image's pixels that may get a wrong label, for the rejection threshold."
    )
    absent: Literal["union", "truth"] = flag(
        "union", "A class is left out of means if truth and prediction (union) or the truth alone lack it."
    )
    pictures: OutputFolder | None = flag(None, "Folder for pictures: image, truth, prediction.")
    num_pictures: Whole = flag(8, "How many pictures to draw, spread evenly over the split.")
    curves: OutputFolder | None = flag(
        None, "Folder for the curve and the reliability diagram (PNG; needs matplotlib)."
    )
    max_images: Count | None = flag(None, "Evaluate the first N images only.")
    num_workers: Workers = flag(2, "Processes that read images ahead; 0 reads them in the main one.")
    seed: Seed = flag(0, "Seed of the bootstrap.")

    def check(self) -> None:
        check_required(self, "model")
        if self.ensemble_weight is not None:
            check_weight(self.ensemble_weight)
        if self.encoder is not None and self.ensemble in (None, "off"):
            raise InputError(f"--encoder needs --ensemble too: {', '.join(get_args(RegionView))}")
        if self.encoder is not None and number_or_none(self.ensemble_weight or "") is None:
            raise InputError("--encoder needs a number as --ensemble_weight too, such as 0.8")
        if self.seen_bias is not None:
            check_bias(self.seen_bias)
        if self.seen_bias is not None and (self.setting != "gzs3" or self.suite == "ovs5"):
            raise InputError("--seen_bias goes with --setting gzs3, where seen and unseen names compete")
        refuse_alone(self, "data_root", "members", without="suite")
        refuse_together(self, "suite", "dataset", "label_space", "without", why="the suite has its own")
        check_required(self, *(["dataset"] if self.suite is None else ["data_root", "output"]))
        check_outside("--pictures", self.pictures, self.dataset)
        if self.output is not None and self.suite is None:
            if Path(self.output).suffix != ".json" or os.path.isdir(self.output):
                raise InputError(f"--output {self.output} must be a file that ends in .json")
            try_output("--output", self.output, "file")
            check_replaceable(Path(self.output), read_result)
        elif self.output is not None:
            if os.path.exists(self.output) and not os.path.isdir(self.output):
                raise InputError(f"--output {self.output} is a file: a suite needs a folder")
            try_output("--output", self.output, "folder")
        if self.ensemble == "off" and self.ensemble_weight is not None:
            raise InputError("--ensemble_weight goes with an ensemble, and --ensemble is off")
        if self.curves is not None and not self.calibration:
            raise InputError("--curves needs the calibration: leave --calibration false out")
        if self.curves is not None:
            check_matplotlib("--curves")


NOT_OF_THE_RESULT = {
    *("output", "pictures", "num_pictures", "curves", "num_workers", "suite", "data_root", "members"),
    "trust_remote_code",  # code_sha256 identifies the code
}


def deciding_flags(args: EvalArgs) -> dict:
    """The flags that decide the numbers."""
    return {name: value for name, value in asdict(args).items() if name not in NOT_OF_THE_RESULT}


def same_flags(older: dict, newer: dict) -> bool:
    """Whether the flags of two results give the same numbers. Older versions had another flag, and lacked one."""
    gone, later = {"ensemble_tolerance": 0.0}, {"encoder": None}
    kept = {name: value for name, value in older.items() if (name, value) not in gone.items()}
    return later | kept == later | newer
