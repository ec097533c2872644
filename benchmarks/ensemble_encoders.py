"""The ensemble of section 4.6 with other encoders than the classifier's: Table 4, with stronger and weaker views.

    python -m benchmarks.ensemble_encoders --models runs/stage1/final runs/stage2/final --dataset runs/scenes \
        --encoders zs3/scenes_tipsv2 --output docs/results/ensemble_encoders.json

`eval.py` evaluates each model without an ensemble, and with each view of its own CLIP and of each encoder. Gains are
differences to no ensemble, with the interval of `zs3 compare`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from benchmarks import measuring
from configuration_zs3 import RegionView
from zs3.checkpoints import weights_sha256
from zs3.command_line import OutputFolder, Share, Some, check_required, flag, read_arguments, run
from zs3.evaluation.compare import CompareArgs, compare
from zs3.scenes.demo import launch
from zs3.scores.means import GeneralizedScores
from zs3.tables import percent, percent_range

OFF, OWN = "off", "its own CLIP"


@dataclass
class EnsembleArgs(measuring.BenchmarkArguments):
    """What is compared."""

    models: Some[str] | None = flag(None, "Checkpoints with an image tower: folders final/ of runs.")
    dataset: str | None = flag(None, "Folder of the dataset.")
    split: str = flag("validation", "Split to evaluate.")
    encoders: list[str] = flag([], "Encoders whose view is ensembled, beside the checkpoint's own.")
    weight: Share = flag(0.8, "w of the ensemble.")
    folder: OutputFolder = flag("runs/ensemble_encoders", "Folder for the results of eval.py.")

    def check(self) -> None:
        check_required(self, "models", "dataset")


def short(encoder: str) -> str:
    """Of a folder the beginning of its digest, which names its results."""
    return weights_sha256(encoder)[:8] if Path(encoder).is_dir() else encoder.replace(" ", "_").replace("/", "_")


def evaluated(args: EnsembleArgs, model: Path, encoder: str, view: str) -> Path:
    """The result file of eval.py; an earlier start may have made it."""
    output = Path(args.folder, f"{short(str(model))}_{short(encoder)}_{view}_{args.weight}_{args.split}.json")
    if output.exists():
        return output
    flags = ["--model", model, "--dataset", args.dataset, "--split", args.split, "--ensemble", view, "--output", output]
    flags += ["--ensemble_weight", args.weight] if view != OFF else []
    flags += ["--encoder", encoder] if encoder not in (OFF, OWN) else []
    launch("eval.py", 1, *flags, "--calibration", "false")
    return output


def measure(args: EnsembleArgs) -> list[dict]:
    rows = []
    for model in map(Path, args.models):
        ways = [(OFF, OFF), *((encoder, view) for encoder in (OWN, *args.encoders) for view in get_args(RegionView))]
        results = [str(evaluated(args, model, *way)) for way in ways]
        for (encoder, view), result in zip(ways, results, strict=True):
            found = compare(CompareArgs(results[0], result))["scores"]
            row = {"model": model.parent.name, "encoder": Path(encoder).name, "view": view}
            row |= {name: found[name]["b"] for name in GeneralizedScores._fields}
            rows.append(row | {"gain": found["hiou"]["difference"], "gain_interval": found["hiou"]["interval"]})
    return rows


def report(result: dict) -> str:
    names = {"single_pass": "one pass", OFF: "no ensemble"}
    rows = [
        [row["model"], "-" if row["view"] == OFF else row["encoder"], names.get(row["view"], row["view"])]
        + [percent(row[name]) for name in GeneralizedScores._fields]
        + (["-", "-"] if row["view"] == OFF else [percent(row["gain"]), percent_range(row["gain_interval"])])
        for row in result["rows"]
    ]
    titles = ["model", "encoder", "view", "mIoU(S)", "mIoU(U)", "hIoU", "gain of hIoU", "95 % interval over images"]
    return f"""# The ensemble with other encoders

Made by `{result["command"]}`. Dataset `{result["dataset"]}`, split `{result["split"]}`, w = {result["weight"]}, one
seed. Percent and points.

{measuring.table_of(titles, rows)}"""


def main() -> None:
    args, _ = read_arguments(EnsembleArgs)
    head = measuring.head()
    result = {**head, **asdict(args), "rows": measure(args)}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
