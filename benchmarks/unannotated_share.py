"""How good pseudo labels are with several values of `--unannotated_share`.

    zs3 scenes --output runs/scenes
    accelerate launch train.py --config recipes/scenes_stage1.yaml --dataset runs/scenes --output_dir runs/stage1
    python -m benchmarks.unannotated_share --model runs/stage1/final --dataset runs/scenes \
        --output docs/results/unannotated_share.json

Labels are counted at the model's own threshold. Precision and recall are over all pairs of an image and an unseen name;
the average precision (AP) is the mean over names, and needs no threshold.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measuring
from zs3.command_line import Count, Share, Some, check_required, flag, read_arguments, run
from zs3.pseudo_labels import PseudoLabelArgs, make_pseudo_labels
from zs3.tables import percent

DEFAULT = PseudoLabelArgs.unannotated_share


@dataclass
class ShareArgs(measuring.BenchmarkArguments):
    """The model, the images and the shares."""

    model: str | None = flag(None, "Stage-1 checkpoint with an image tower.")
    dataset: str | None = flag(None, "Folder of the dataset.")
    max_images: Count = flag(500, "Training images that are scored.")
    shares: Some[Share] = flag([0, 1e-6, 0.25, 0.5, 0.75, 0.9], "Values of --unannotated_share.")

    def check(self) -> None:
        check_required(self, "model", "dataset")


def row_of(args: ShareArgs, share: float) -> dict:
    """Labels, precision, recall and AP with one share."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"model": args.model, "dataset": args.dataset, "output": str(Path(folder, "labels"))}
        found = make_pseudo_labels(PseudoLabelArgs(**flags, unannotated_share=share, max_images=args.max_images))
    (own,) = [row for row in found["thresholds"] if row["threshold"] == found["pseudo_label_threshold"]]
    return {
        "share": share,
        "threshold": own["threshold"],
        "labels": sum(own["labels"]),
        "right_labels": sum(found["images_with_class"]),
        "precision": own["precision"]["micro"],
        "recall": own["recall"]["micro"],
        "average_precision": found["average_precision"]["macro"],
    }


def report(result: dict) -> str:
    rows = [
        [f"{row['share']:g}" + " (default)" * (row["share"] == DEFAULT), str(row["labels"]),
         *(percent(row[name]) for name in ("precision", "recall", "average_precision"))]
        for row in result["rows"]
    ]  # fmt: skip
    first = result["rows"][0]
    return f"""# Pseudo labels by the share of unannotated pixels

Made by `{result["command"]}`. {result["max_images"]} training images; {first["right_labels"]} labels would be right. \
Threshold {first["threshold"]:g}. Percent.

{measuring.table_of(["--unannotated_share", "labels", "precision", "recall", "AP"], rows)}"""


def main() -> None:
    args, _ = read_arguments(ShareArgs)
    rows = [row_of(args, share) for share in args.shares]
    result = {**measuring.head(), **vars(args), "rows": rows}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
