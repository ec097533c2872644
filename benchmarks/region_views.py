"""What the image tower should see of proposals: crops, one pass at which side, windows, or a mixture of them.

    python -m benchmarks.region_views --proposals runs/closed/final --dataset runs/scenes \
        --output docs/results/region_views.json

The proposals and the joined checkpoints are those of `python -m benchmarks.day_one`. Mosaics are pictures of four
scenes, with the proposals of each: larger than the encoder's side, with things of the size that it knows.

The side is the geometric mean of the sides of what the tower sees at once, in sides of the pictures that it was
trained on. A window is half as wide and half as high as the picture, and windows overlap by half; the vector of a
region is the mean over windows, weighted by its area in each. "Widest" proposals are those that most pixels belong to
before anything is named; they are seen as crops, the others in one pass. The cost is the number of tokens that the
tower sees, copies of its class token included, divided by that of all crops.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from benchmarks import day_one, measuring
from clip_views_zs3 import covered_patches, embed_proposals, visible_proposals
from encoders_zs3 import FAMILIES, family_of, patch_grid, region_vectors
from label_maps_zs3 import MASK_STRIDE, semantic_map
from processing_zs3 import resize_nearest
from zs3.checkpoints import class_vectors
from zs3.command_line import Count, flag, read_arguments, run
from zs3.data.records import load_split
from zs3.label_space import load_label_space
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import generalized_scores
from zs3.tables import percent

ENCODERS = {"tiny CLIP": "tiny CLIP, class tokens", "tiny TIPSv2": "tiny TIPSv2, patches, values"}
SIDES = (1.0, 1.5, 2.0, 3.0)
WIDEST = (2, 4, 8)  # proposals with a crop of their own


@dataclass
class RegionViewsArgs(day_one.DayOneArgs):
    """What is compared."""

    scenes: Count = flag(200, "Scenes.")
    mosaics: Count = flag(50, "Mosaics of four scenes each.")


class Picture(NamedTuple):
    """image: (3, H, W) in [0, 1]. mask_logits: (N, h, w), of proposals that are not empty. label: (H, W) ids."""

    image: Tensor
    mask_logits: Tensor
    label: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.image.shape[1:])

    def part(self, top: int, left: int, height: int, width: int) -> "Picture":
        """A window. Its proposals may be empty."""
        rows, columns = slice(top, top + height), slice(left, left + width)
        small = (
            slice(top // MASK_STRIDE, (top + height) // MASK_STRIDE),
            slice(left // MASK_STRIDE, (left + width) // MASK_STRIDE),
        )
        return Picture(self.image[:, rows, columns], self.mask_logits[:, *small], self.label[rows, columns])


def mosaic(scenes: list[Picture]) -> Picture:
    """Four scenes of one size as one picture, with the proposals of each."""

    def tiled(tensors: list[Tensor]) -> Tensor:
        return torch.cat([torch.cat(tensors[:2], dim=-1), torch.cat(tensors[2:], dim=-1)], dim=-2)

    rows, columns = scenes[0].mask_logits.shape[1:]
    masks = []
    for place, scene in enumerate(scenes):
        top, left = divmod(place, 2)
        margin = (left * columns, (1 - left) * columns, top * rows, (1 - top) * rows)
        masks.append(F.pad(scene.mask_logits, margin, value=-30.0))
    return Picture(tiled([one.image for one in scenes]), torch.cat(masks), tiled([one.label for one in scenes]))


@contextmanager
def at_side(model: PreTrainedModel, sides: float) -> Iterator[None]:
    """Within the block the family of the model's image tower sees pictures at this side."""
    kind = model.config.vision_config.model_type.removesuffix("_vision_model")
    family = FAMILIES[kind]
    FAMILIES[kind] = family._replace(sides=sides)
    try:
        yield
    finally:
        FAMILIES[kind] = family


class Seen(NamedTuple):
    """embeds: (N, D), unit length. tokens: how many the tower saw."""

    embeds: Tensor
    tokens: int


def crops(model: PreTrainedModel, picture: Picture) -> Seen:
    seen = embed_proposals(model.vision_model, picture.image[None], picture.mask_logits[None])
    config = model.vision_model.config
    return Seen(seen.embeds[0], len(picture.mask_logits) * (1 + (config.image_size // config.patch_size) ** 2))


def one_pass(model: PreTrainedModel, picture: Picture, sides: float) -> Seen:
    """The vectors of regions that cover nothing are 0."""
    tower = model.vision_model
    with at_side(model, sides):
        covered = covered_patches(tower, picture.mask_logits, picture.size, 0.5)
        some = covered.sum(1) > 0
        embeds = torch.zeros(len(covered), model.config.projection_dim)
        if some.any():
            embeds[some] = region_vectors(tower, picture.image, covered[some], model.config.patch_tokens)
        rows, columns = patch_grid(tower, picture.size)
    copies = 0 if family_of(tower.config).soft else int(some.sum())
    return Seen(F.normalize(embeds, dim=-1), 1 + rows * columns + copies)


def windows(model: PreTrainedModel, picture: Picture, sides: float) -> Seen:
    height, width = (side // 2 for side in picture.size)
    total, tokens = 0, 0
    for top in (0, height // 2, height):
        for left in (0, width // 2, width):
            part = picture.part(top, left, height, width)
            area = part.mask_logits.sigmoid().flatten(1).sum(1)
            seen = one_pass(model, part, sides)
            total, tokens = total + area[:, None] * seen.embeds, tokens + seen.tokens
    return Seen(F.normalize(total, dim=-1), tokens)


def widest_as_crops(model: PreTrainedModel, picture: Picture, count: int, sides: float) -> Seen:
    owner = picture.mask_logits.argmax(0).flatten()
    pixels = torch.bincount(owner, minlength=len(picture.mask_logits))
    widest = pixels.argsort(descending=True)[:count]
    chosen, others = picture._replace(mask_logits=picture.mask_logits[widest]), one_pass(model, picture, sides)
    own = crops(model, chosen)
    embeds = others.embeds.clone()
    embeds[widest] = own.embeds
    return Seen(embeds, own.tokens + others.tokens)


def ways(encoder: str, sides_of_family: float, of_mosaics: bool) -> dict[str, Callable]:
    """What is called with (model, picture)."""
    found: dict[str, Callable] = {"crops": crops}
    for sides in SIDES:
        found[f"one pass, side {sides:g}"] = partial(one_pass, sides=sides)
    if of_mosaics:
        for sides in SIDES[:3]:
            found[f"windows, side {sides:g}"] = partial(windows, sides=sides)
        found["one pass, side 4"] = partial(one_pass, sides=4.0)
    elif encoder == "tiny CLIP":
        for count in WIDEST:
            way = partial(widest_as_crops, count=count, sides=sides_of_family)
            found[f"crops of the {count} widest, one pass, side {sides_of_family:g}"] = way
    return found


def read_pictures(args: RegionViewsArgs, model: PreTrainedModel, processor) -> list[Picture]:
    records = load_split(args.dataset, args.split, load_label_space(args.label_space))
    pictures = []
    for index in tqdm(range(min(args.scenes, len(records))), desc="proposals", mininterval=1):
        image, label, _ = records[index]
        inputs = processor(images=image)
        mask_logits, pixels = model.propose(**inputs)["mask_logits"], processor.to_rgb(inputs["pixel_values"])[0]
        size = tuple(pixels.shape[1:])
        visible = visible_proposals(mask_logits, [size], 0.5)[0]
        pictures.append(Picture(pixels, mask_logits[0, visible], torch.from_numpy(resize_nearest(label, size)).long()))
    return pictures


@torch.inference_mode()
def measure_encoder(args: RegionViewsArgs, encoder: str) -> list[dict]:
    model, processor = day_one.load_proposer(day_one.joined(args, ENCODERS[encoder], False))
    space = load_label_space(args.label_space)
    text_embeds, _ = class_vectors(model, processor, space.class_names, None)
    scenes = read_pictures(args, model, processor)
    count = min(args.mosaics, len(scenes) // 4)
    grounds = {"scenes": scenes, "mosaics": [mosaic(scenes[4 * at : 4 * at + 4]) for at in range(count)]}
    rows = []
    for ground, pictures in grounds.items():
        known = ways(encoder, family_of(model.config.vision_config).sides, ground == "mosaics")
        confusion = {way: ConfusionMatrix(len(space.class_names), space.ignore_index) for way in known}
        others, tokens = dict.fromkeys(known, 0), dict.fromkeys(known, 0)
        for picture in tqdm(pictures, desc=f"{encoder}, {ground}", mininterval=1):
            maps = {}
            for way, look in known.items():
                embeds, spent = look(model, picture)
                probs = (model.config.clip_logit_scale * embeds @ text_embeds.T).softmax(-1)
                masks = picture.mask_logits[None]
                (maps[way],) = semantic_map(probs[None], masks, picture.size, image_sizes=[picture.size])
                tokens[way] += spent
                others[way] += int((maps[way] != maps["crops"]).sum())
                confusion[way].update(maps[way].numpy(), picture.label.numpy())
        for way in known:
            found = generalized_scores(confusion[way].iou(), space.is_seen)._asdict()
            row = {
                "encoder": encoder,
                "pictures": ground,
                "way": way,
                **found,
                "of_crops": tokens[way] / tokens["crops"],
            }
            rows.append(row | {"other_pixels": others[way] / sum(picture.label.numel() for picture in pictures)})
    return rows


def report(result: dict) -> str:
    rows = [
        [
            row["encoder"],
            row["pictures"],
            row["way"],
            *(percent(row[name]) for name in ("miou_seen", "miou_unseen", "hiou")),
        ]
        + [percent(row["other_pixels"]), f"{row['of_crops']:.2f}"]
        for row in result["rows"]
    ]
    titles = [
        "encoder",
        "pictures",
        "way",
        "mIoU(S)",
        "mIoU(U)",
        "hIoU",
        "other pixels than crops",
        "tokens, of crops'",
    ]
    return f"""# What the image tower sees of proposals

Made by `{result["command"]}`. The embedded synthetic benchmark, split `{result["split"]}`, label space
`{result["label_space"]}`; names without training. Percent.

{measuring.table_of(titles, rows)}"""


def main() -> None:
    args, _ = read_arguments(RegionViewsArgs)
    head = measuring.head()  # before sys.argv changes
    rows = [row for encoder in ENCODERS for row in measure_encoder(args, encoder)]
    result = {**head, **asdict(args), "rows": rows}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
