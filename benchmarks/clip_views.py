"""Three ways to show the proposals to CLIP are compared: a loop over crops, batched crops, and one pass for all.

    python -m benchmarks.clip_views --output docs/results/clip_views.json

An image tower of CLIP ViT-B/16's size, with random weights, embeds the proposals of one image. No proposal is empty.
The loop is the way of earlier work: it crops, resizes and embeds one proposal after the other.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks import measuring
from clip_views_zs3 import ProposalEmbeds, crop_proposals, in_one_pass, proposal_masks
from encoders_zs3 import normalised
from zs3.command_line import Count, Pixels, flag, read_arguments, run

LOOP, CROPS, SINGLE = "loop over crops", "batched crops", "single pass"
SAME = 1e-4  # largest difference allowed between the embeddings of loop and batch


@dataclass
class ClipViewsArgs(measuring.BenchmarkArguments):
    """Sizes of the comparison."""

    proposals: Count = flag(100, "Proposals of the image in the cost measurement.")
    size: Pixels = flag(640, "Side of that image, pixels.")
    rounds: Count = flag(3, "Rounds of the cost measurement; the first is not counted.")
    layers: Count = flag(12, "Layers of the large tower.")


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


COST = ("way | seconds an image | times faster than the loop", "{way} | {seconds:.2f} | {times_faster_than_loop:.2f}")


def main() -> None:
    args, _ = read_arguments(ClipViewsArgs)
    cost, facts = measure_cost(args), measuring.head()
    size = sum(p.numel() for p in large_tower(args.layers).parameters())
    text = f"An image tower of {size / 1e6:.0f} M parameters, {args.proposals} proposals, {args.size} x {args.size} "
    text += f"pixels, torch {facts['torch']}, {facts['machine']}.\n\n{measuring.table(*COST, cost)}"
    measuring.publish(args.output, {**facts, **vars(args), "tower_parameters": size, "cost": cost}, text)


if __name__ == "__main__":
    run(main)
