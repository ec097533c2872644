"""Names without training on the embedded benchmark: the image tower's view of proposals beside learned heads.

    zs3 scenes --output runs/scenes
    python -m benchmarks.closed_set train --config recipes/scenes_stage1.yaml --dataset runs/scenes \
        --output_dir runs/closed
    python -m benchmarks.day_one --proposals runs/closed/final --dataset runs/scenes \
        --learned runs/stage1/final runs/stage2/final --output docs/results/day_one.json

The proposals are those of transformers' own Mask2Former, trained on the seen classes; or of a checkpoint of stage 1,
which has no objectness. `zs3 assemble` joins them with each tiny encoder, and `eval.py` evaluates each join. The rows
of --learned have the class heads and the proposals of these checkpoints. "Right names" gives each proposal the class
that most of its pixels belong to; it is a reference, and no bound. Seconds are those of the image tower alone, of one
picture, one thread.

--other_splits are result files of this command for other class splits, each with its own Mask2Former. The report then
also has the means over all of them.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks import measuring
from clip_views_zs3 import proposal_masks
from configuration_zs3 import Zs3Config
from label_maps_zs3 import semantic_map
from processing_zs3 import resize_nearest
from zs3.ablation.statistics import t_interval
from zs3.checkpoints import config_of, load_checkpoint, weights_sha256
from zs3.command_line import Count, OutputFolder, check_required, flag, read_arguments, run
from zs3.data.records import load_split
from zs3.evaluation.results import read_result
from zs3.files import project_folder, write_json
from zs3.label_space import load_label_space
from zs3.release import assemble
from zs3.scenes.demo import launch
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import GeneralizedScores, generalized_scores
from zs3.tables import percent, percent_range

ENCODERS = project_folder("zs3")
WAYS = {  # of naming: encoder, region_view, patch_tokens
    "tiny CLIP, crops": ("scenes_clip", "crops", "attention"),
    "tiny CLIP, class tokens": ("scenes_clip", "single_pass", "attention"),
    "tiny TIPSv2, crops": ("scenes_tipsv2", "crops", "attention"),
    "tiny TIPSv2, patches": ("scenes_tipsv2", "single_pass", "attention"),
    "tiny TIPSv2, patches, values": ("scenes_tipsv2", "single_pass", "values"),
}

CROPS, RIGHT = "tiny CLIP, crops", "right names"


@dataclass
class DayOneArgs(measuring.BenchmarkArguments):
    """What is compared."""

    proposals: str | None = flag(None, "transformers' Mask2Former, trained on the seen classes.")
    dataset: str | None = flag(None, "Folder made by `zs3 scenes`.")
    split: str = flag("validation", "Split to evaluate.")
    label_space: str = flag("scenes", "Class split, such as scenes:3; the Mask2Former was trained on its seen classes.")
    learned: list[str] = flag([], "Checkpoints with learned heads, for further rows.")
    folder: OutputFolder = flag("runs/day_one", "Folder for the joined checkpoints and their results.")
    pictures: Count = flag(20, "Pictures of the measurement of seconds.")
    other_splits: list[str] = flag([], "Results of this command for other class splits, to take means over.")

    def check(self) -> None:
        check_required(self, "proposals", "dataset")


def joined(args: DayOneArgs, way: str, objectness: bool) -> Path:
    """The checkpoint of one way. A Mask2Former's gets the record of its seen classes, which seen scores need."""
    encoder, region_view, patch_tokens = WAYS[way]
    proposals = weights_sha256(args.proposals)[:8]
    folder = Path(args.folder, f"{proposals}_{encoder}_{region_view}_{patch_tokens}" + "_objectness" * objectness)
    if not folder.exists():
        flags = {"proposals": args.proposals, "encoder": str(ENCODERS / encoder), "output": str(folder)}
        flags |= {"region_view": region_view, "patch_tokens": patch_tokens}
        sys.argv = ["zs3 assemble", *(f"--{name}={value}" for name, value in flags.items())]
        sys.argv += ["--objectness"] * objectness
        assemble.main()
        config = json.loads((folder / "config.json").read_text())
        if config.get("seen_class_names") is None:
            seen = load_label_space(args.label_space).seen
            write_json(folder / "config.json", config | {"seen_class_names": seen, "unseen_labels": "none"})
    return folder


def scores(args: DayOneArgs, model: Path, name: str) -> dict:
    """Scores and their intervals, of eval.py."""
    output = Path(args.folder, f"{name}_{args.split}_{args.label_space.replace(':', '_')}.json")
    flags = ("--model", model, "--dataset", args.dataset, "--split", args.split, "--label_space", args.label_space)
    launch("eval.py", 1, *flags, "--ensemble", "off", "--output", output)
    result = read_result(output, (*GeneralizedScores._fields, "confidence_intervals.hiou"))
    found = {score: result[score] for score in GeneralizedScores._fields}
    return found | {"hiou_interval": result["confidence_intervals"]["hiou"]}


@torch.inference_mode()
def tower_seconds(args: DayOneArgs, models: dict[str, Path]) -> dict[str, float]:
    """The median seconds that the image tower needs for the proposals of a picture."""
    records = load_split(args.dataset, args.split, load_label_space(args.label_space))
    steps = {}
    for way, folder in models.items():
        model, processor = load_proposer(folder)
        view, pictures = model.config.region_view, []
        for index in range(args.pictures):
            inputs = processor(images=records[index].image)
            found = model.propose(**inputs)
            pictures.append((processor.to_rgb(inputs["pixel_values"]), found["mask_logits"], found["valid_sizes"]))

        def step(model=model, view=view, pictures=pictures) -> None:
            for picture in pictures:
                model.embed_proposals(*picture, view=view)

        steps[way] = step
    times = measuring.take_turns(steps, 5)
    return {way: sorted(seconds)[len(seconds) // 2] / args.pictures for way, seconds in times.items()}


def load_proposer(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A joined checkpoint whose `propose` leaves the image tower alone."""
    model, processor = load_checkpoint(str(folder))
    model.config.class_head = "learned"
    return model, processor


@torch.inference_mode()
def right_names(args: DayOneArgs, folder: Path) -> dict:
    """Scores of proposals with the names of the ground truth."""
    space = load_label_space(args.label_space)
    records, count = load_split(args.dataset, args.split, space), len(space.class_names)
    model, processor = load_proposer(folder)
    confusion = ConfusionMatrix(count, space.ignore_index)
    for image, label, _ in tqdm(records, desc=RIGHT, mininterval=1):
        outputs = model.propose(**processor(images=image))
        size = tuple(outputs["valid_sizes"][0].tolist())
        masks = proposal_masks(outputs["mask_logits"][0], size, 0.5).numpy()
        truth = resize_nearest(label, size)
        known = [np.bincount(truth[mask & (truth != space.ignore_index)], minlength=count) for mask in masks]
        probs = torch.zeros(1, len(masks), count)
        for query, pixels in enumerate(known):
            probs[0, query, pixels.argmax()] = float(pixels.any())
        (found,) = semantic_map(probs, outputs["mask_logits"], size, image_sizes=[label.shape])
        confusion.update(found.numpy(), label)
    return generalized_scores(confusion.iou(), space.is_seen)._asdict()


def over_splits(results: list[list[dict]]) -> list[dict]:
    """The mean hIoU of each way that all results have, and the difference to CLIP's crops with its interval."""
    tables = [{row["way"]: row["hiou"] for row in rows} for rows in results]
    ways = [way for way in tables[0] if all(way in table for table in tables)]
    rows = []
    for way in ways:
        gains = [table[way] - table[CROPS] for table in tables]
        mean = float(np.mean([table[way] for table in tables]))
        rows.append({"way": way, "hiou": mean, "gain": float(np.mean(gains)), "interval": list(t_interval(gains))})
    return rows


def measure(args: DayOneArgs) -> list[dict]:
    rows = []
    for path in args.learned:
        name = Path(path).parent.name
        rows.append({"way": f"learned head of {name}", **scores(args, Path(path), name)})
    models = {way: joined(args, way, False) for way in WAYS}
    torch.set_num_threads(1)
    rows.append({"way": RIGHT, **right_names(args, models[CROPS]), "hiou_interval": None})
    seconds = tower_seconds(args, models)
    has_predictor = config_of("--proposals", args.proposals)["model_type"] != Zs3Config.model_type
    for way, folder in models.items():
        for objectness in (False, True) if has_predictor else (False,):
            folder = joined(args, way, objectness)
            row = {"way": way + ", objectness" * objectness, **scores(args, folder, folder.name)}
            rows.append(row | {"seconds": seconds[way], "of_crops": seconds[way] / seconds[CROPS]})
    return rows


def report(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        interval = percent_range(row["hiou_interval"]) if row["hiou_interval"] else "-"
        cost = [f"{1000 * row['seconds']:.0f}", f"{row['of_crops']:.2f}"] if "seconds" in row else ["-", "-"]
        rows.append([row["way"], *(percent(row[score]) for score in GeneralizedScores._fields), interval, *cost])
    titles = ["class head", "mIoU(S)", "mIoU(U)", "hIoU", "hIoU, 95 % interval", "ms a picture", "of CLIP's crops"]
    return f"""# Names without training

Made by `{result["command"]}`. The embedded synthetic benchmark, split `{result["split"]}`, label space
`{result["label_space"]}`. Scores in percent. Milliseconds of the image tower alone, 1 thread.

{measuring.table_of(titles, rows)}{splits_report(result)}"""


def splits_report(result: dict) -> str:
    if not result["over_splits"]:
        return ""
    rows = [
        [row["way"], percent(row["hiou"]), percent(row["gain"]), percent_range(row["interval"])]
        for row in result["over_splits"]
    ]
    titles = ["class head", "hIoU", "minus CLIP's crops", "95 % interval over splits"]
    count = 1 + len(result["other_splits"])
    return f"""
## Over {count} class splits

Each split has its own Mask2Former; one seed. Means, percent and points; Student's t.

{measuring.table_of(titles, rows)}"""


def main() -> None:
    args, _ = read_arguments(DayOneArgs)
    head = measuring.head()  # before sys.argv changes
    others = [json.loads(Path(path).read_text())["rows"] for path in args.other_splits]
    rows = measure(args)
    result = {**head, **asdict(args), "rows": rows, "over_splits": over_splits([rows, *others]) if others else []}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
