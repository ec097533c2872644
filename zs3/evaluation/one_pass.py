"""One pass over the images of a split: what competes, what is counted, what is drawn.

Axes: C candidate, H W pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from configuration_zs3 import among, shortened
from label_maps_zs3 import SemanticMap
from zs3.checkpoints import NoClaim, check_no_unseen_masks, is_trained
from zs3.command_line import InputError, in_one_line, printable
from zs3.data.records import Split, dataset_name
from zs3.evaluation.arguments import EvalArgs
from zs3.evaluation.choices import Choice
from zs3.evaluation.pictures import draw_comparison
from zs3.files import file_name
from zs3.label_space import LabelSpace
from zs3.scores.calibration import OUTSIDER, Rejection, Reliability, SeenBiasCurve
from zs3.scores.confusion import ConfusionMatrix


class Look(NamedTuple):
    """How a model looks at images: with text vectors (C, D) on its device, and with CLIP's view of the proposals."""

    model: PreTrainedModel
    processor: ProcessorMixin
    text_embeds: Tensor
    is_trained: Tensor  # (C,) bool
    view: str  # "off" for no ensemble
    weight: float | None = None  # of the ensemble; None: the checkpoint's
    tolerance: float = 0.0

    def __call__(self, inputs: BatchFeature, size: tuple[int, int]) -> ModelOutput:
        """The model's output of one image, whose label map is wanted at this size (H, W)."""
        outputs = self.model(**inputs, text_embeds=self.text_embeds, return_dict=True)
        if self.view == "off":
            return outputs
        return self.model.ensemble(
            outputs,
            self.processor.to_rgb(inputs["pixel_values"]),
            self.text_embeds,
            is_seen=self.is_trained,
            weight=self.weight,
            view=self.view,
            tolerance=self.tolerance,
            image_sizes=[size],
        )


# ---- what is asked -----------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The class axis of an evaluation, C names; is_seen and is_trained: (C,) bool.

    place: (ids + 1,) int64, where each id of a label map lands on the axis: OUTSIDER where the class is no candidate;
        the last entry is for pixels without a label.
    """

    names: list[str]
    index: Tensor  # (C,) int64, of the label space
    is_seen: Tensor
    is_trained: Tensor
    place: np.ndarray

    @property
    def ignored(self) -> int:
        """An id of our own for pixels without a label: the data's may lie inside the candidates' range."""
        return len(self.place) - 1

    def label_map(self, label: np.ndarray, ignore_index: int) -> np.ndarray:
        """(H, W) ids of the label space -> int64: 0 to C - 1, OUTSIDER or `ignored`."""
        return self.place[np.where(label == ignore_index, self.ignored, label)]


def candidates_of(label_space: LabelSpace, setting: str, without: list[str], config: PreTrainedConfig) -> Candidates:
    names = label_space.class_names
    strangers = [name for name, known in zip(without, among(without, names), strict=True) if not known]
    if strangers:
        raise InputError(f"--without {strangers[0]!r}: the label space has no such name (quote names of two words)")
    chosen = ~torch.tensor(among(names, without))
    if setting == "zs3":
        chosen &= ~label_space.is_seen
    index = torch.nonzero(chosen).squeeze(1)
    if len(index) == 0:
        raise InputError(f"no candidate is left: --setting {setting} asks for names that the label space has not got")
    place = np.full(len(names) + 1, OUTSIDER)
    place[-1] = len(names)
    place[index.numpy()] = np.arange(len(index))
    kept = [names[position] for position in index]
    return Candidates(kept, index, label_space.is_seen[index], is_trained(config, kept), place)


def check_claim(config: PreTrainedConfig, label_space: LabelSpace, setting: str) -> None:
    """A zero-shot number needs a model that saw no unseen mask."""
    if setting == "ovs":
        return
    check_no_unseen_masks(config, label_space, f"{setting} result can be claimed, --setting ovs is open to it")
    trained = among(label_space.seen, config.seen_class_names)
    missing = [name for name, is_known in zip(label_space.seen, trained, strict=True) if not is_known]
    if missing and setting == "gzs3":
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise NoClaim(
            f"the checkpoint saw no masks of {shortened(missing[0])}{more}, seen classes here: use --setting ovs"
        )


# ---- the pass ----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """An image as the pass meets it. label: (H, W) int64 on the class axis, see Candidates.label_map."""

    index: int
    image: Image.Image
    label: np.ndarray
    image_id: str
    inputs: BatchFeature


class Images(Dataset):
    """Some of a split's images."""

    def __init__(self, records: Split, indices: range, candidates: Candidates, processor: ProcessorMixin):
        self.records, self.indices, self.candidates, self.processor = records, indices, candidates, processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Item:
        image, label, image_id = self.records[self.indices[position]]
        label = self.candidates.label_map(label, self.records.label_space.ignore_index)
        return Item(self.indices[position], image, label, image_id, self.processor(images=image))


def as_it_is(item: Item) -> Item:
    """No collation, which would make tensors of arrays."""
    return item


@dataclass
class Counts:
    """What one process counts. shown, undecided: sums over images, of the ensemble."""

    confusion: ConfusionMatrix
    curve: SeenBiasCurve | None
    reliability: Reliability | None
    rejection: Rejection | None
    shown: int = 0
    undecided: float = 0.0

    def merge(self, other: "Counts") -> None:
        for name in ("confusion", "curve", "reliability", "rejection"):
            if getattr(self, name) is not None:
                getattr(self, name).merge(getattr(other, name))
        self.shown += other.shown
        self.undecided += other.undecided


def new_counts(args: EvalArgs, candidates: Candidates, bias: Choice, calibration: bool) -> Counts:
    """A curve where there are seen and unseen candidates; confidences where no bias changes the winner, whose they
    are."""
    ignored, unbiased = candidates.ignored, calibration and bias.value == 0
    curve = calibration and args.setting == "gzs3" and 0 < int(candidates.is_seen.sum()) < len(candidates.names)
    return Counts(
        ConfusionMatrix(len(candidates.names), ignored),
        SeenBiasCurve(candidates.is_seen, ignored) if curve else None,
        Reliability(ignored) if unbiased else None,
        Rejection(ignored) if unbiased else None,
    )


def count(counts: Counts, found: SemanticMap, prediction: Tensor, label: Tensor, image_id: str) -> None:
    """One image into the counts. label: (H, W), see Candidates.label_map."""
    inside = torch.where(label == OUTSIDER, counts.confusion.ignore_index, label)
    counts.confusion.update(prediction, inside, image_id)
    if counts.curve is not None:
        counts.curve.update(found, inside)
    if counts.reliability is not None:
        counts.reliability.update(found, inside)
        counts.rejection.update(found, label, image_id)


@torch.inference_mode()
def count_images(
    args: EvalArgs, look: Look, images: Images, counts: Counts, seen_bias: float, accelerator: Accelerator
) -> None:
    """All of this process's images into the counts; some of them are drawn."""
    candidates, options = images.candidates, {"return_scores": counts.reliability is not None}
    if counts.curve is not None or seen_bias:
        options["is_seen"] = candidates.is_seen
    num_images = len(images.records.image_ids[: args.max_images])
    drawn = set(np.linspace(0, num_images - 1, min(args.num_pictures, num_images)).astype(int).tolist())
    workers = min(args.num_workers, len(images))
    loader = DataLoader(images, batch_size=None, num_workers=workers, collate_fn=as_it_is)
    quiet = not accelerator.is_local_main_process
    for item in tqdm(loader, desc=printable(dataset_name(args.dataset)), unit="image", mininterval=1, disable=quiet):
        size = item.label.shape
        with in_one_line(f"image {shortened(item.image_id)}"):
            outputs = look(item.inputs.to(accelerator.device), size)
        if look.view != "off":
            counts.shown += int(outputs.shown_to_clip.sum())
            counts.undecided += float(outputs.undecided.sum())
        (found,) = look.processor.post_process_semantic_segmentation(outputs, [size], **options)
        prediction = found if isinstance(found, Tensor) else found.with_seen_bias(seen_bias)
        count(counts, found, prediction, torch.from_numpy(item.label).to(prediction.device), item.image_id)
        if args.pictures is not None and item.index in drawn:
            try:
                draw(item, prediction, candidates, Path(args.pictures))
            except InputError as error:  # the pass is worth more than its pictures
                print(f"warning: {error}; no more pictures are drawn")
                drawn = set()


def draw(item: Item, prediction: Tensor, candidates: Candidates, folder: Path) -> None:
    truth = np.where((item.label == OUTSIDER) | (item.label == candidates.ignored), -1, item.label)
    panels = {"image": item.image, "truth (grey: not counted)": truth, "prediction": prediction.cpu()}
    draw_comparison(panels, candidates.names, folder / file_name(item.image_id, ".png"))
