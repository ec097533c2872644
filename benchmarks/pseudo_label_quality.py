"""How good pseudo labels are: by `--unannotated_share`, and by what scores the proposals.

    zs3 scenes --output runs/scenes
    accelerate launch train.py --config recipes/scenes_stage1.yaml --dataset runs/scenes --output_dir runs/stage1
    python -m benchmarks.pseudo_label_quality --model runs/stage1/final --dataset runs/scenes \
        --encoders zs3/scenes_tipsv2 --output docs/results/pseudo_label_quality.json

Labels are counted at the model's own threshold. Precision and recall are over all pairs of an image and an unseen name;
the average precision (AP) is the mean over names, and needs no threshold.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from benchmarks import measuring
from configuration_zs3 import RegionView
from zs3.command_line import Count, Share, Some, check_required, flag, read_arguments, run
from zs3.pseudo_labels import PseudoLabelArgs, make_pseudo_labels
from zs3.tables import percent

DEFAULT = PseudoLabelArgs.unannotated_share


@dataclass
class QualityArgs(measuring.BenchmarkArguments):
    """The model, the images and what is varied."""

    model: str | None = flag(None, "Stage-1 checkpoint with an image tower.")
    dataset: str | None = flag(None, "Folder of the dataset.")
    max_images: Count = flag(500, "Training images that are scored.")
    shares: Some[Share] = flag([0, 1e-6, 0.25, 0.5, 0.75, 0.9], "Values of --unannotated_share.")
    encoders: list[str] = flag([], "Encoders that score the proposals, beside the checkpoint's own.")

    def check(self) -> None:
        check_required(self, "model", "dataset")


def row_of(args: QualityArgs, **options: object) -> dict:
    """Labels, precision, recall and AP with these fields of PseudoLabelArgs."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"model": args.model, "dataset": args.dataset, "output": str(Path(folder, "labels"))}
        found = make_pseudo_labels(PseudoLabelArgs(**flags, max_images=args.max_images, **options))
    (own,) = [row for row in found["thresholds"] if row["threshold"] == found["pseudo_label_threshold"]]
    return options | {
        "threshold": own["threshold"],
        "labels": sum(own["labels"]),
        "right_labels": sum(found["images_with_class"]),
        "precision": own["precision"]["micro"],
        "recall": own["recall"]["micro"],
        "average_precision": found["average_precision"]["macro"],
    }


def scorers(args: QualityArgs) -> list[dict]:
    """A row for each encoder and region_view, with the default share."""
    pairs = [(encoder, view) for encoder in (None, *args.encoders) for view in get_args(RegionView)]
    return [row_of(args, encoder=encoder, region_view=view) for encoder, view in pairs]


def cells(row: dict) -> list[str]:
    return [str(row["labels"]), *(percent(row[name]) for name in ("precision", "recall", "average_precision"))]


def report(result: dict) -> str:
    titles, first = ["labels", "precision", "recall", "AP"], result["shares"][0]
    shares = [
        [f"{row['unannotated_share']:g}" + " (default)" * (row["unannotated_share"] == DEFAULT), *cells(row)]
        for row in result["shares"]
    ]
    views = [
        ["own" if row["encoder"] is None else Path(row["encoder"]).name, row["region_view"], *cells(row)]
        for row in result["scorers"]
    ]
    return f"""# Pseudo labels by the share of unannotated pixels, and by what scores the proposals

Made by `{result["command"]}`. {result["max_images"]} training images; {first["right_labels"]} labels would be right. \
Threshold {first["threshold"]:g}. Percent.

{measuring.table_of(["--unannotated_share", *titles], shares)}
{measuring.table_of(["encoder", "region_view", *titles], views)}"""


def main() -> None:
    args, _ = read_arguments(QualityArgs)
    rows = [row_of(args, unannotated_share=share) for share in args.shares]
    result = {**measuring.head(), **vars(args), "shares": rows, "scorers": scorers(args)}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
