"""What the image tower should see of proposals: crops, one pass at which side, windows, or a mixture of them.

    python -m benchmarks.region_views --proposals runs/closed/final --dataset runs/scenes \
        --output docs/results/region_views.json

The proposals and the joined checkpoints are those of `python -m benchmarks.day_one`. Pairs and mosaics are pictures of
two and four scenes, with the proposals of each: larger than the encoder's side, with things of the size that it knows.

The side is that of what the tower sees at once (the geometric mean), in sides of the pictures that it was trained on.
Windows of pairs are those of `square_windows`; of mosaics, squares of a scene's size that overlap by half. The vector
of a region is the mean over windows, weighted by its area in each. The cost is the number of tokens that the tower
sees, copies of its class token included, divided by that of all crops.
"""

import math
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

import clip_views_zs3
import encoders_zs3
from benchmarks import day_one, measuring
from clip_views_zs3 import visible_proposals
from configuration_zs3 import RegionView
from encoders_zs3 import FAMILIES, family_of, patch_grid, square_windows
from label_maps_zs3 import MASK_STRIDE, semantic_map
from processing_zs3 import resize_nearest
from zs3.checkpoints import class_vectors
from zs3.command_line import Count, InputError, Some, flag, read_arguments, run
from zs3.data.records import load_split
from zs3.label_space import load_label_space
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import generalized_scores
from zs3.tables import percent

ENCODERS = {"tiny CLIP": "tiny CLIP, class tokens", "tiny TIPSv2": "tiny TIPSv2, patches, values"}
SIDES = (1.0, 1.5, 2.0, 3.0)
LARGEST = (2, 4, 7, 12)  # proposals with a crop of their own


@dataclass
class RegionViewsArgs(day_one.DayOneArgs):
    """What is compared."""

    encoders: Some[str] = flag(list(ENCODERS), f"Of {', '.join(ENCODERS)}.")
    scenes: Count = flag(200, "Scenes.")
    pairs: Count = flag(50, "Pairs of scenes side by side.")
    mosaics: Count = flag(25, "Mosaics of four scenes each.")


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


def joined(scenes: list[Picture]) -> Picture:
    """Two scenes of one size side by side, or four in a square, with the proposals of each."""

    def tiled(tensors: list[Tensor]) -> Tensor:
        rows = [torch.cat(tensors[at : at + 2], dim=-1) for at in range(0, len(tensors), 2)]
        return torch.cat(rows, dim=-2)

    rows, columns = scenes[0].mask_logits.shape[1:]
    masks = []
    for place, scene in enumerate(scenes):
        top, left = divmod(place, 2)
        below = len(scenes) // 2 - 1 - top
        margin = (left * columns, (1 - left) * columns, top * rows, below * rows)
        masks.append(F.pad(scene.mask_logits, margin, value=-30.0))
    return Picture(tiled([one.image for one in scenes]), torch.cat(masks), tiled([one.label for one in scenes]))


@contextmanager
def constants(model: PreTrainedModel, sides: float, largest: int, nearly_square: float) -> Iterator[None]:
    """Within the block the image tower's family has these sides, and the modules these constants."""
    kind = model.config.vision_config.model_type.removesuffix("_vision_model")
    before = FAMILIES[kind], clip_views_zs3.LARGEST, encoders_zs3.NEARLY_SQUARE
    FAMILIES[kind] = before[0]._replace(sides=sides)
    clip_views_zs3.LARGEST, encoders_zs3.NEARLY_SQUARE = largest, nearly_square
    try:
        yield
    finally:
        FAMILIES[kind], clip_views_zs3.LARGEST, encoders_zs3.NEARLY_SQUARE = before


class Seen(NamedTuple):
    """embeds: (N, D), unit length; 0 of empty proposals. tokens: how many the tower saw."""

    embeds: Tensor
    tokens: int


def look(
    model: PreTrainedModel,
    picture: Picture,
    view: RegionView,
    sides: float,
    largest: int = clip_views_zs3.LARGEST,
    nearly_square: float = encoders_zs3.NEARLY_SQUARE,
) -> Seen:
    """By `embed_proposals` with these constants."""
    config, tokens = model.vision_model.config, 0
    with constants(model, sides, largest, nearly_square):
        seen = model.embed_proposals(picture.image[None], picture.mask_logits[None], view=view)
        shown = int(seen.shown.sum())
        crops = {"crops": shown, "single_pass": 0, "mixed": min(largest, shown)}[view]
        for rows, columns in square_windows(picture.size) if crops < shown else ():
            size = (rows.stop - rows.start, columns.stop - columns.start)
            copies = 0 if family_of(config).soft else shown - crops
            tokens += 1 + math.prod(patch_grid(model.vision_model, size)) + copies
    return Seen(seen.embeds[0], tokens + crops * (1 + (config.image_size // config.patch_size) ** 2))


def quarters(model: PreTrainedModel, picture: Picture, sides: float) -> Seen:
    """Windows of a mosaic: half as wide and high, overlapping by half, the mean weighted by the area in each."""
    side, total, tokens = picture.size[0] // 2, 0, 0
    for top in (0, side // 2, side):
        for left in (0, side // 2, side):
            part = picture.part(top, left, side, side)
            area = part.mask_logits.sigmoid().flatten(1).sum(1)
            seen = look(model, part, "single_pass", sides)
            total, tokens = total + area[:, None] * seen.embeds, tokens + seen.tokens
    return Seen(F.normalize(total, dim=-1), tokens)


def ways(encoder: str, own_sides: float, ground: str) -> dict[str, Callable]:
    """What is called with (model, picture). own_sides: of the encoder's family."""
    found: dict[str, Callable] = {"crops": partial(look, view="crops", sides=own_sides)}
    for sides in SIDES if ground != "mosaics" else (*SIDES, 4.0):
        way = partial(look, view="single_pass", sides=sides, nearly_square=math.inf)
        found[f"one pass, side {sides:g}"] = way
    for sides in SIDES[:3]:
        if ground == "pairs":
            found[f"windows, side {sides:g}"] = partial(look, view="single_pass", sides=sides)
        elif ground == "mosaics":
            found[f"windows, side {sides:g}"] = partial(quarters, sides=sides)
    if encoder == "tiny CLIP":
        for largest in LARGEST:
            way = partial(look, view="mixed", sides=own_sides, largest=largest)
            found[f"mixed: crops of the {largest} largest"] = way
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
    grounds = {"scenes": scenes}
    grounds["pairs"] = [joined(scenes[2 * at : 2 * at + 2]) for at in range(args.pairs)]
    grounds["mosaics"] = [joined(scenes[4 * at : 4 * at + 4]) for at in range(args.mosaics)]
    rows = []
    for ground, pictures in grounds.items():
        known = ways(encoder, family_of(model.config.vision_config).sides, ground)
        confusion = {way: ConfusionMatrix(len(space.class_names), space.ignore_index) for way in known}
        others, tokens = dict.fromkeys(known, 0), dict.fromkeys(known, 0)
        for picture in tqdm(pictures, desc=f"{encoder}, {ground}", mininterval=1):
            maps = {}
            for way, way_of in known.items():
                embeds, spent = way_of(model, picture)
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
    if not set(args.encoders) <= set(ENCODERS):
        raise InputError(f"--encoders must be of {', '.join(ENCODERS)}, got {args.encoders}")
    head = measuring.head()  # before sys.argv changes
    rows = [row for encoder in args.encoders for row in measure_encoder(args, encoder)]
    result = {**head, **asdict(args), "rows": rows}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
