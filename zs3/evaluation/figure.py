"""Figures of label maps as the paper's Fig. 4: image, ground truth and each model's label map, side by side.

    zs3 figure --dataset DIR --models A B --titles baseline ours --output figures --images ID ID
    zs3 figure --dataset DIR --models A B --titles baseline ours --output figures --worst 8 --result B.json

It writes one PNG for each image. All classes are candidates, and each model uses the ensemble of its checkpoint.
`--worst` reads the areas of the images, which eval.py wrote beside its result file.

Axes: H W pixels, C classes, N images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from configuration_zs3 import among, shortened
from text_zs3 import TextCache
from zs3.checkpoints import class_vectors, load_checkpoint
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFolder,
    check_outside,
    check_required,
    flag,
    in_one_line,
    read_arguments,
    shown,
)
from zs3.data.records import Split, load_split
from zs3.evaluation.one_pass import Predictor
from zs3.evaluation.pictures import draw_comparison
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import EVALUATE_AGAIN, read_images, read_result
from zs3.files import file_name
from zs3.label_space import load_label_space
from zs3.scores.bootstrap import SavedImages, images_path
from zs3.scores.means import Areas, iou_of_areas, nanmean
from zs3.typed_json import refusal

IMAGE, TRUTH = "image", "ground truth (grey: unlabelled)"


@dataclass
class FigureArgs(Arguments):
    """Pictures of some images of a dataset, with the label maps of one or several models."""

    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    split: str = flag("validation", "Split of the dataset.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    models: list[str] = flag([], "Checkpoints, folders or Hub ids, in the order of their panels.")
    trust_remote_code: bool = flag(False, "Run the code that lies beside the checkpoint, in place of this project's.")
    titles: list[str] = flag([], "Titles of the models' panels; default: --models.")
    output: OutputFolder | None = flag(None, "Folder for the pictures.")
    images: list[str] = flag([], "Ids of the images to draw.")
    worst: Count | None = flag(None, "Draw the N images with the lowest mean IoU of their classes, by --result.")
    result: str | None = flag(None, "Result file of eval.py for --worst, with NAME_images.npz beside it.")

    def check(self) -> None:
        check_required(self, "dataset", "output")
        check_outside("--output", self.output, self.dataset)
        if not self.models:
            raise InputError("--models is missing")
        self.titles = self.titles or self.models
        if len(self.titles) != len(self.models):
            raise InputError(f"--titles has {len(self.titles)} for {len(self.models)} of --models: one for each")
        if len({IMAGE, TRUTH, *self.titles}) != len(self.titles) + 2:
            raise InputError(f"--titles repeats a title: all of {IMAGE!r}, {TRUTH!r}, {self.titles} must differ")
        if bool(self.images) == (self.worst is not None):
            raise InputError("say which images to draw: either --images ID ID, or --worst N --result FILE.json")
        if (self.worst is None) != (self.result is None):
            raise InputError("--worst N and --result FILE.json go together")


def draw_figures(
    records: Split,
    models: Mapping[str, str | Path],
    indices: Sequence[int],
    folder: Path,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Writes folder/IMAGE_ID.png (see `file_name`) for each record: image, truth, and the label map of each model.

    models: title -> checkpoint.
    """
    names = records.label_space.class_names
    loaded = {}
    for title, path in models.items():
        model, processor = load_checkpoint(str(path), trust_remote_code)
        text_embeds, _ = class_vectors(model, processor, names, None, TextCache())
        loaded[title] = (model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, text_embeds)
    drawn = []
    for index in indices:
        image, label, image_id = records[index]
        panels = {IMAGE: image, TRUTH: label}
        for title, (model, processor, text_embeds) in loaded.items():
            with in_one_line(f"image {shortened(image_id)}"):
                panels[title] = label_map(model, processor, image, names, text_embeds)
        drawn.append(folder / file_name(image_id, ".png"))
        draw_comparison(panels, names, drawn[-1])
    return drawn


@torch.inference_mode()
def label_map(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    class_names: Sequence[str],
    text_embeds: Tensor,
) -> Tensor:
    """(H, W) int64, on the CPU: each pixel's index into class_names. text_embeds: (C, D), their vectors."""
    is_trained = torch.tensor(among(class_names, model.config.seen_class_names))
    predictor = Predictor(model, processor, text_embeds.to(model.device), is_trained, model.ensemble_view())
    outputs = predictor(processor(images=image).to(model.device))
    return processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0].cpu()


def worst_images(records: Split, split: str, result: Path, count: int) -> list[int]:
    """Places in `records` of the `count` images with the lowest `image_ious`, the lowest first."""
    content = read_result(result)
    if (content.get("split"), content.get("label_space_sha256")) != (split, records.label_space.sha256):
        raise InputError(f"--result {shown(result)} is of other data: give its --split, --dataset and --label_space")
    check_same_maps(content, result)
    saved = read_images(result, content)
    if saved.class_names != records.label_space.class_names:
        raise refusal(images_path(result), "it has other names than the label space", EVALUATE_AGAIN)
    ious = image_ious(saved)
    if count > len(ious):
        raise InputError(f"--worst {count} is too many: {shown(result)} has {len(ious)} images with labelled pixels")
    return indices_of(records, sorted(ious, key=lambda image_id: (ious[image_id], image_id))[:count])


def check_same_maps(content: Result, result: Path) -> None:
    """Refuses a result of other label maps. Those of the figure have every class as a candidate, and no bias."""
    other = {
        "--setting zs3": content.get("setting") == "zs3",
        "--without": content.get("without"),
        "--seen_bias": content.get("calibration", {}).get("seen_bias"),
    }
    for flag_given, given in other.items():
        if given:
            what = f"--result {shown(result)} is of other label maps than the figure"
            raise InputError(f"{what}: evaluate again without {flag_given}")


def image_ious(images: SavedImages) -> dict[str, float]:
    """Image id -> mean IoU, in [0, 1], over the classes that the image's label map shows.

    Images without a labelled pixel are left out.
    """
    areas = Areas(*(area.toarray().T for area in images.areas.counted))  # (N, C) each
    means = nanmean(iou_of_areas(areas, absent="truth"))  # (N,)
    ious = zip(images.image_ids, means.tolist(), strict=True)
    return {str(image_id): iou for image_id, iou in ious if not math.isnan(iou)}


def indices_of(records: Split, image_ids: Sequence[str]) -> list[int]:
    """The places of the images in `records`."""
    place = {image_id: index for index, image_id in enumerate(records.image_ids)}
    for image_id in image_ids:
        if image_id not in place:
            closest = get_close_matches(image_id, records.image_ids, n=1, cutoff=0.0)[0]
            raise InputError(f"the dataset has no image {image_id!r}; did you mean {closest!r}?")
    return [place[image_id] for image_id in dict.fromkeys(image_ids)]


def main() -> None:
    args, _ = read_arguments(FigureArgs)
    label_space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, args.split, label_space)
    if args.images:
        indices = indices_of(records, args.images)
    else:
        indices = worst_images(records, args.split, Path(args.result), args.worst)
    models = dict(zip(args.titles, args.models, strict=True))
    for path in draw_figures(records, models, indices, Path(args.output), args.trust_remote_code):
        print(path)
