"""One pass over the images of a split: the candidates, the predictor, and the loop that counts and draws.

Axes: C candidate, H W pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from configuration_zs3 import among, shortened, unshared
from zs3.checkpoints import NoClaim, check_no_unseen_masks
from zs3.command_line import InputError, in_one_line
from zs3.data.records import Split
from zs3.evaluation.counts import PassCounts
from zs3.evaluation.pictures import draw_comparison
from zs3.files import file_name
from zs3.label_space import LabelSpace
from zs3.scorers import Scorer
from zs3.scores.calibration import OUTSIDER


class Predictor(NamedTuple):
    """A model with the text vectors (C, D) of the candidates, on its device, and with its ensemble.

    scorer: another encoder, whose view of the proposals is ensembled; None: the model's own encoder.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    text_embeds: Tensor
    is_trained: Tensor  # (C,) bool
    view: str  # of the ensemble; "off": none
    weight: float | None = None  # of the ensemble; None: the checkpoint's
    scorer: Scorer | None = None

    def __call__(self, inputs: BatchFeature) -> ModelOutput:
        """The model's output for one image."""
        outputs = self.model(**inputs, text_embeds=self.text_embeds, return_dict=True)
        if self.view == "off":
            return outputs
        images = self.processor.to_rgb(inputs["pixel_values"])
        masks = outputs.mask_logits, outputs.valid_sizes
        options = {"is_seen": self.is_trained, "weight": self.weight}
        if self.scorer is None:  # the code beside the checkpoint may be another one
            proposals = self.model.embed_proposals(images, *masks, view=self.view)
            return self.model.ensemble(outputs, proposals, self.text_embeds, **options)
        proposals = self.scorer.embed(images, *masks, view=self.view)
        options["logit_scale"] = self.scorer.logit_scale
        return self.model.ensemble(outputs, proposals, self.scorer.text_embeds, **options)


# ---- the candidates ----------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The class axis of an evaluation, C names; is_seen and is_trained: (C,) bool.

    place: (ids + 1,) int64, the place of each id of a label map on the axis: OUTSIDER where the class is no candidate.
        The last entry is for ignored pixels.
    """

    names: list[str]
    index: Tensor  # (C,) int64, of the label space
    is_seen: Tensor
    is_trained: Tensor
    place: np.ndarray

    @property
    def ignored(self) -> int:
        """The id of ignored pixels on this axis. The dataset's own ignored id may be the place of a candidate."""
        return len(self.place) - 1

    def label_map(self, label: np.ndarray, ignore_index: int) -> np.ndarray:
        """(H, W) ids of the label space -> int64: 0 to C - 1, OUTSIDER or `ignored`."""
        return self.place[np.where(label == ignore_index, self.ignored, label)]


def candidates_of(label_space: LabelSpace, setting: str, without: list[str], config: PreTrainedConfig) -> Candidates:
    names = label_space.class_names
    strangers = unshared(without, names)
    if strangers:
        raise InputError(f"--without {strangers[0]!r}: the label space has no such name (quote names of two words)")
    chosen = ~torch.tensor(among(names, without))
    if setting == "zs3":
        chosen &= ~label_space.is_seen
    index = torch.nonzero(chosen).squeeze(1)
    if len(index) == 0:
        raise InputError(f"no candidate is left: --setting {setting} and --without exclude all names")
    place = np.full(len(names) + 1, OUTSIDER)
    place[-1] = len(names)
    place[index.numpy()] = np.arange(len(index))
    kept = [names[position] for position in index]
    is_trained = torch.tensor(among(kept, config.seen_class_names))
    return Candidates(kept, index, label_space.is_seen[index], is_trained, place)


def check_claim(config: PreTrainedConfig, label_space: LabelSpace, setting: str) -> None:
    """Refuses a claim for a model that saw masks of unseen classes, or (gzs3) lacks masks of seen classes."""
    if setting == "ovs":
        return
    check_no_unseen_masks(config, label_space, f"{setting} result can be claimed, use --setting ovs")
    missing = unshared(label_space.seen, config.seen_class_names)
    if missing and setting == "gzs3":
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise NoClaim(
            f"the checkpoint saw no masks of {shortened(missing[0])}{more}, seen classes here: use --setting ovs"
        )


# ---- the pass ----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One image of the pass. label: (H, W) int64 on the class axis, see Candidates.label_map."""

    index: int
    image: Image.Image
    label: np.ndarray
    image_id: str
    inputs: BatchFeature


class Items(Dataset):
    """Some images of a split, as items of the pass."""

    def __init__(self, records: Split, indices: range, candidates: Candidates, processor: ProcessorMixin):
        self.records, self.indices, self.candidates, self.processor = records, indices, candidates, processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Item:
        image, label, image_id = self.records[self.indices[position]]
        label = self.candidates.label_map(label, self.records.label_space.ignore_index)
        return Item(self.indices[position], image, label, image_id, self.processor(images=image))


def unchanged(item: Item) -> Item:
    """Replaces collation, which would make tensors of arrays."""
    return item


@dataclass
class Drawings:
    """Pictures of some images: image, truth and prediction. indices: of those images in the split."""

    folder: Path
    indices: set[int]

    def draw(self, item: Item, prediction: Tensor, candidates: Candidates) -> None:
        if item.index not in self.indices:
            return
        truth = np.where((item.label == OUTSIDER) | (item.label == candidates.ignored), -1, item.label)
        panels = {"image": item.image, "truth (grey: not counted)": truth, "prediction": prediction.cpu()}
        try:
            draw_comparison(panels, candidates.names, self.folder / file_name(item.image_id, ".png"))
        except InputError as error:  # the pass goes on without pictures
            print(f"warning: {error}; no more pictures are drawn")
            self.indices = set()


@torch.inference_mode()
def count_images(
    counts: PassCounts,
    items: Items,
    predictor: Predictor,
    seen_bias: float,
    num_workers: int,
    drawings: Drawings | None,
    bar: tqdm,
) -> None:
    """Counts this process's images. bar: shows the progress."""
    candidates, options = items.candidates, {"return_scores": counts.reliability is not None}
    if counts.curve is not None or seen_bias:
        options["is_seen"] = candidates.is_seen
    workers = min(num_workers, len(items))
    for item in DataLoader(items, batch_size=None, num_workers=workers, collate_fn=unchanged):
        with in_one_line(f"image {shortened(item.image_id)}"):
            outputs = predictor(item.inputs.to(predictor.text_embeds.device))
        (found,) = predictor.processor.post_process_semantic_segmentation(outputs, [item.label.shape], **options)
        prediction = found if isinstance(found, Tensor) else found.with_seen_bias(seen_bias)
        counts.update(found, prediction, torch.from_numpy(item.label).to(prediction.device), item.image_id)
        if drawings is not None:
            drawings.draw(item, prediction, candidates)
        bar.update()
