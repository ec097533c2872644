"""Three ways to show the proposals to CLIP are compared: a loop over crops, batched crops, and one pass for all.

    python -m benchmarks.clip_views --model CHECKPOINT --dataset runs/scenes --output docs/results/clip_views.json

Cost: an image tower of CLIP ViT-B/16's size, with random weights, embeds the proposals of one image. No proposal is
empty. The loop is the way of earlier work: it crops, resizes and embeds one proposal after the other.

Trained: a checkpoint of the embedded benchmark segments the validation scenes with its tiny CLIP. For each way the
table shows the scores, the seconds, and the share of pixels whose label differs from that of batched crops. For the
columns "at ViT-B/16's cost" the large tower embeds every crop too. Only its time is used.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks import measuring
from clip_views_zs3 import ProposalEmbeds, crop_proposals, in_one_pass, proposal_masks
from encoders_zs3 import normalised
from outputs_zs3 import Zs3Output
from zs3.checkpoints import class_vectors, load_checkpoint
from zs3.command_line import Count, InputError, Pixels, Share, check_required, flag, read_arguments, run
from zs3.data.records import load_split
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import generalized_scores
from zs3.tables import percent

OFF = "no ensemble"
LOOP, CROPS, SINGLE = "loop over crops", "batched crops", "single pass"
SAME = 1e-4  # largest difference allowed between the embeddings of loop and batch


@dataclass
class ClipViewsArgs(measuring.BenchmarkArguments):
    """Sizes of the comparison."""

    model: str | None = flag(None, "Checkpoint with an image tower, trained on the embedded benchmark.")
    dataset: str | None = flag(None, "The benchmark's folder.")
    images: Count = flag(200, "Validation scenes.")
    weight: Share = flag(0.8, "w of the ensemble.")
    proposals: Count = flag(100, "Proposals of the image in the cost measurement.")
    size: Pixels = flag(640, "Side of that image, pixels.")
    rounds: Count = flag(3, "Rounds of the cost measurement; the first is not counted.")
    large_images: Count = flag(20, "Number of these scenes that the large tower sees too.")
    layers: Count = flag(12, "Layers of the large tower.")

    def check(self) -> None:
        check_required(self, "model", "dataset")


def crop_loop(
    tower: CLIPVisionModelWithProjection, image: Tensor, mask_logits: Tensor, size: tuple[int, int], masked: bool = True
) -> ProposalEmbeds:
    """Embeds one proposal after the other and skips empty masks. image: (3, H, W) in [0, 1]; mask_logits: (Q, h, w).

    masked: pixels outside the mask get the mean colour.
    """
    side, dim = tower.config.image_size, tower.config.projection_dim
    embeds, shown = torch.zeros(len(mask_logits), dim), torch.zeros(len(mask_logits), dtype=torch.bool)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    masks = proposal_masks(mask_logits, size, 0.5)
    for query, mask in enumerate(masks):
        if not mask.any():
            continue
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        region = image[:, *box] * 255
        region = torch.where(mask[box], region, 255 * mean) if masked else region
        region = (region - 255 * mean) / (255 * std)
        crop = F.interpolate(region[None], size=(side, side), mode="bicubic", align_corners=False)
        embeds[query] = F.normalize(tower(crop).image_embeds[0], dim=-1)
        shown[query] = True
    return ProposalEmbeds(embeds[None], shown[None])


def large_tower(layers: int) -> CLIPVisionModelWithProjection:
    """An image tower of CLIP ViT-B/16's size with random weights."""
    config = CLIPVisionConfig(patch_size=16, num_hidden_layers=layers, projection_dim=512)
    return CLIPVisionModelWithProjection(config).eval()


def draw_image(args: ClipViewsArgs) -> tuple[Tensor, Tensor]:
    """A noise image (3, S, S) and mask logits (Q, S/4, S/4). Each mask is smooth and covers 2 to 50 % of the image."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, args.proposals, 5, 5, generator=generator)
    masks = F.interpolate(coarse, size=[args.size // 4] * 2, mode="bicubic", align_corners=False)[0]
    shares = (0.5 + 0.48 * torch.rand(args.proposals, generator=generator)).tolist()
    masks = torch.stack([mask - mask.quantile(share) for mask, share in zip(masks, shares, strict=True)])
    return torch.rand(3, args.size, args.size, generator=generator), 8 * masks


def batched(tower: CLIPVisionModelWithProjection, image: Tensor, masks: Tensor) -> Tensor:
    """The embeddings (N, D) of the crops, computed in batches of 64."""
    pixels = normalised(tower, image)
    crops = [crop_proposals(pixels, part, tower.config.image_size) for part in masks.split(64)]
    return F.normalize(torch.cat([tower(part).image_embeds for part in crops]), dim=-1)


def measure_cost(args: ClipViewsArgs) -> list[dict]:
    tower, (image, mask_logits) = large_tower(args.layers), draw_image(args)
    size = (args.size, args.size)
    ways = {
        LOOP: lambda: crop_loop(tower, image, mask_logits, size).embeds[0],
        CROPS: lambda: batched(tower, image, proposal_masks(mask_logits, size, 0.5)),
        SINGLE: lambda: in_one_pass(tower, image, mask_logits, 0.5, "attention"),
    }
    results = {}

    def keep(name: str) -> None:
        results[name] = ways[name]()

    with torch.inference_mode():
        turns = measuring.take_turns({name: partial(keep, name) for name in ways}, args.rounds)
    far = float((results[LOOP] - results[CROPS]).abs().max())
    measuring.check_close(far, SAME, "embeddings of loop and batch")
    seconds = {name: statistics.median(values) for name, values in turns.items()}
    return [{"way": way, "seconds": own, "times_faster_than_loop": seconds[LOOP] / own} for way, own in seconds.items()]


def looks(model, outputs: Zs3Output, images: Tensor, options: dict) -> dict[str, Callable]:
    """For each way the call that is timed on one image, the loop first. options: arguments of `model.ensemble`."""
    masks = outputs.mask_logits, outputs.valid_sizes

    def loop() -> Zs3Output:
        size = tuple(outputs.valid_sizes[0].tolist())
        embeds = crop_loop(model.vision_model, images[0], outputs.mask_logits[0], size)
        return model.ensemble(outputs, embeds, **options)

    def view(name: str) -> Zs3Output:
        return model.ensemble(outputs, model.embed_proposals(images, *masks, view=name), **options)

    return {LOOP: loop, CROPS: partial(view, "crops"), SINGLE: partial(view, "single_pass")}


def measure_trained(args: ClipViewsArgs) -> tuple[list[dict], dict]:
    """A row for each way on the validation scenes, and the numbers of images and queries."""
    model, processor = load_checkpoint(args.model)
    if model.vision_model is None:
        raise InputError(f"{args.model} has no CLIP image tower")
    records = load_split(args.dataset, "validation")
    space = records.label_space
    text_embeds, _ = class_vectors(model, processor, space.class_names, None)
    options = {"text_embeds": text_embeds, "is_seen": space.is_seen, "weight": args.weight}
    large = large_tower(args.layers)

    def large_too(tower: nn.Module, inputs: tuple, named: dict) -> None:
        """Before the tiny tower runs, the large one embeds the same crops. Its results are not used."""
        large(F.interpolate((*inputs, *named.values())[0], size=large.config.image_size))

    count, names = min(args.images, len(records)), [OFF, LOOP, CROPS, SINGLE]
    confusion = {name: ConfusionMatrix(len(space.class_names), space.ignore_index) for name in names}
    seconds, large_seconds, looked, differing = (dict.fromkeys(names, 0.0) for _ in range(4))
    pixels = 0
    with torch.inference_mode():
        for index in tqdm(range(count), unit="image", mininterval=1):
            image, label, _ = records[index]
            inputs = processor(images=image)
            images = processor.to_rgb(inputs["pixel_values"])
            outputs = model(**inputs, text_embeds=text_embeds, return_dict=True)
            ways = looks(model, outputs, images, options)
            made = {name: measuring.timed(way) for name, way in ways.items()}
            if index < args.large_images:
                hook = model.vision_model.register_forward_pre_hook(large_too, with_kwargs=True)
                for name in (LOOP, CROPS):
                    large_seconds[name] += measuring.seconds_of(ways[name]) / min(args.large_images, count)
                hook.remove()
            maps = {}
            for name, (spent, result) in {OFF: (0.0, outputs), **made}.items():
                (found,) = processor.post_process_semantic_segmentation(result, [label.shape])
                maps[name] = found.numpy()
                if name != OFF:
                    seconds[name] += spent / count
                    looked[name] += int(result.shown_to_clip.sum()) / count
            pixels += label.size
            for name, found in maps.items():
                confusion[name].update(found, label)
                differing[name] += int((found != maps[CROPS]).sum())
    rows = []
    for name in names:
        scores = generalized_scores(confusion[name].iou(), space.is_seen)
        row = {"way": name, **scores._asdict(), "differing_share": differing[name] / pixels}
        if name != OFF:
            row |= {"crops_per_image": looked[name] if name != SINGLE else 0.0, "seconds": seconds[name]}
            row |= {"times_faster_than_loop": seconds[LOOP] / seconds[name]}
        if large_seconds[name]:
            row |= {"large_seconds": large_seconds[name]}
            row |= {"large_times_faster_than_loop": large_seconds[LOOP] / large_seconds[name]}
        rows.append(row)
    return rows, {"images": count, "queries": outputs.mask_logits.shape[1]}


COST = ("way | seconds an image | times faster than the loop", "{way} | {seconds:.2f} | {times_faster_than_loop:.2f}")
TITLES = "way | crops an image | other pixels than batched crops | mIoU(S) | mIoU(U) | hIoU | seconds | x faster | "
TITLES += "seconds at ViT-B/16's cost | x faster"
CELLS = "{way} | {crops_per_image:.1f} | {differing_share:.2%} | {miou_seen} | {miou_unseen} | {hiou} | "
CELLS += "{seconds:.3f} | {times_faster_than_loop:.2f} | {large_seconds:.2f} | {large_times_faster_than_loop:.2f}"


def report(result: dict) -> str:
    args, trained = result["arguments"], result["trained"]
    scores = ("miou_seen", "miou_unseen", "hiou")
    rows = [{**row, **{name: percent(row[name]) for name in scores}} for row in trained["rows"]]
    return f"""# CLIP's view of the proposals

Made by `{result["command"]}` with {result["machine"]}, torch {result["torch"]}.

## Cost: an image tower of {result["tower_parameters"] / 1e6:.0f} M parameters (CLIP ViT-B/16's size), \
{args["proposals"]} proposals, {args["size"]} x {args["size"]} pixels

{measuring.table(*COST, result["cost"])}
## A trained model of the embedded synthetic benchmark: {trained["images"]} validation scenes, \
{trained["queries"]} queries, w = {args["weight"]}

Model {args["model"]}. Seconds with its tiny CLIP; "at ViT-B/16's cost" on the first \
{min(args["large_images"], trained["images"])} scenes.

{measuring.table(TITLES, CELLS, rows)}"""


def main() -> None:
    args, _ = read_arguments(ClipViewsArgs)
    rows, facts = measure_trained(args)
    cost = measure_cost(args)
    result = {
        **measuring.head(),
        "arguments": asdict(args),
        "threads": torch.get_num_threads(),
        "tower_parameters": sum(p.numel() for p in large_tower(args.layers).parameters()),
        "cost": cost,
        "trained": {**facts, "rows": rows},
    }
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
