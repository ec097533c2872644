"""How often the tiny encoders name a picture rightly: on boxes, on masks, and on the proposals of a trained model.

Axes: B picture, H W pixels, Q query, P patch token, N name, D embedding.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPVisionModelWithProjection, PreTrainedModel, Tipsv2Model
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clip_views_zs3 import embed_proposals, proposal_masks
from text_zs3 import PROMPT_TEMPLATES
from zs3.checkpoints import load_checkpoint
from zs3.command_line import InputError
from zs3.scenes import render, tiny_clip, tiny_tipsv2
from zs3.scenes.contrastive import unit
from zs3.scenes.crops import held_out_crops, held_out_regions, held_out_scene

PER_CLASS = 50  # regions of each class
PURITIES = (0.85, 0.5)  # smallest share of the majority's class in a proposal
FIRST_SCENE = 10_000  # of the held-out scenes, for proposals
NUM_SCENES = 200

Scores = dict[str, dict[str, float | None]]  # for each kind of picture, what `accuracies` returns


# ------------------------------------------------------------------------------------------------ text


@torch.inference_mode()
def class_text_embeds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Tensor:
    """(N, D): the mean of the unit vectors of the 14 templates, normalised to unit length."""
    captions = [template.format(name) for name in names for template in PROMPT_TEMPLATES]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    embeds = unit(model.get_text_features(**inputs).pooler_output)  # (N*T, D)
    return unit(embeds.unflatten(0, (len(names), -1)).mean(dim=1))


def text_cosines(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Cosines of the text vectors of similar names."""
    pairs = [(f"{attribute} square", f"{attribute} circle") for attribute in render.ATTRIBUTES]
    pairs += [("red circle", "blue circle"), ("red square", "striped square"), ("brick wall", "stone wall")]
    vectors = class_text_embeds(model, tokenizer, [name for pair in pairs for name in pair])
    cosines = (vectors[0::2] * vectors[1::2]).sum(dim=1).tolist()
    return {f"{a} / {b}": cosine for (a, b), cosine in zip(pairs, cosines, strict=True)}


# ------------------------------------------------------------------------------------------------ counting


def accuracies(correct: np.ndarray, name: np.ndarray) -> dict[str, float | None]:
    """Accuracy by group of classes, in [0, 1]; None: no picture. correct: bool; name: of CLASS_NAMES; both (B,)."""
    unseen = np.isin(name, [render.CLASS_NAMES.index(unseen) for unseen in render.UNSEEN])
    is_stuff = name < len(render.STUFF)
    groups = {"all": name >= 0, "seen": ~unseen, "unseen": unseen, "things": ~is_stuff, "stuff": is_stuff}
    return {group: float(correct[members].mean()) if members.any() else None for group, members in groups.items()}


def by_name(correct: np.ndarray, name: np.ndarray) -> dict[str, float]:
    return {own: float(correct[name == place].mean()) for place, own in enumerate(render.CLASS_NAMES)}


# ------------------------------------------------------------------------------------------------ boxes and masks


@torch.inference_mode()
def crop_embeds(model: CLIPModel, pixels: np.ndarray) -> Tensor:
    """(B, 48, 48, 3) uint8 -> (B, D) unit length."""
    parts = np.array_split(pixels, len(pixels) // 256 + 1)
    pixel_values = map(tiny_clip.pixel_values, parts)
    return torch.cat([unit(model.get_image_features(part).pooler_output) for part in pixel_values])


def clip_accuracy(model: CLIPModel, text: Tensor) -> tuple[Scores, dict[str, float]]:
    """On crops of held-out scenes, and by name on boxes with a margin of 0.1. text: (N, D) of the classes."""
    kinds = {f"box, margin {margin}": (margin, False) for margin in (0.0, 0.1, 0.2, 0.3)}
    kinds |= {"mask, margin 0.0": (0.0, True), "mask, margin 0.1": (0.1, True)}
    scores, names = {}, {}
    for kind, (margin, masked) in tqdm(kinds.items(), desc="held-out crops", unit="kind"):
        crops = held_out_crops(margin, PER_CLASS, masked=masked)
        correct = (crop_embeds(model, crops.pixels) @ text.T).argmax(dim=1).numpy() == crops.name
        scores[kind] = accuracies(correct, crops.name)
        if kind == "box, margin 0.1":
            names = by_name(correct, crops.name)
    return scores, names


def mask_means(tokens: Tensor, masks: Tensor) -> Tensor:
    """(Q, D) unit length: the mean of the patch tokens in each mask. tokens: (P, D), masks: (Q, H, W) in [0, 1]."""
    side = int(len(tokens) ** 0.5)
    weight = F.adaptive_avg_pool2d(masks.float()[None], side)[0].flatten(1)  # (Q, P)
    return unit(weight @ tokens / weight.sum(dim=1, keepdim=True).clamp(min=1e-6))


@torch.inference_mode()
def tipsv2_accuracy(model: Tipsv2Model, text: Tensor) -> tuple[Scores, dict[str, float]]:
    """On boxes and visible masks of regions in held-out scenes, and by name on masks. text: (N, D) of the classes."""
    names, rows = [], {"box": [], "mask": []}
    for scene, chosen in held_out_regions(PER_CLASS):
        tokens = tiny_tipsv2.patch_tokens(model, tiny_tipsv2.pixel_values(scene.image[None]))[0]
        names += [render.CLASS_NAMES.index(scene.regions[place].name) for place in chosen]
        boxes = torch.zeros(len(chosen), render.SIZE, render.SIZE)
        for box, place in zip(boxes, chosen, strict=True):
            x0, y0, x1, y1 = scene.regions[place].box
            box[y0:y1, x0:x1] = 1
        masks = torch.from_numpy(np.stack([scene.owner == place for place in chosen]))
        rows["box"].append(mask_means(tokens, boxes))
        rows["mask"].append(mask_means(tokens, masks))
    name = np.array(names)
    correct = {kind: (torch.cat(means) @ text.T).argmax(dim=1).numpy() == name for kind, means in rows.items()}
    return {kind: accuracies(own, name) for kind, own in correct.items()}, by_name(correct["mask"], name)


# ------------------------------------------------------------------------------------------------ proposals


class Proposals(NamedTuple):
    """What a trained model proposes in one scene."""

    image: np.ndarray  # (H, W, 3) uint8
    mask_logits: Tensor  # (1, Q, h, w)
    size: tuple[int, int]
    name: np.ndarray  # (Q,) int64 of CLASS_NAMES, the class of most pixels
    purity: np.ndarray  # (Q,) the share of these pixels, in [0, 1]; 0: the proposal shows no class


def propose(checkpoint: str) -> Iterator[Proposals]:
    """The proposals of a segmenter in held-out scenes. Each scene is at the segmenter's own input size."""
    segmenter, processor = load_checkpoint(checkpoint)
    for index in range(FIRST_SCENE, FIRST_SCENE + NUM_SCENES):
        scene = held_out_scene(index)
        inputs = processor(images=scene.image, return_tensors="pt")
        outputs = segmenter.propose(inputs["pixel_values"], inputs["pixel_mask"])
        size = tuple(int(side) for side in outputs["valid_sizes"][0])
        if size != scene.label.shape:
            raise InputError(f"--proposals {checkpoint}: it sees scenes at {size} pixels, not at {scene.label.shape}")
        masks = proposal_masks(outputs["mask_logits"][0], size, 0.5).numpy()  # (Q, H, W)
        counts = np.stack([np.bincount(scene.label[mask], minlength=256) for mask in masks])
        own = counts[:, : len(render.CLASS_NAMES)]
        purity = own.max(axis=1) / np.maximum(counts.sum(axis=1), 1)
        yield Proposals(scene.image, outputs["mask_logits"], size, own.argmax(axis=1), purity)


Naming = Callable[[Proposals], Tensor]  # to (Q, D) unit length


def clip_namings(model: CLIPModel) -> dict[str, Naming]:
    """The ways of CLIP to see a proposal."""
    tower = CLIPVisionModelWithProjection(model.config.vision_config).eval()
    tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection

    def seen(options: dict) -> Naming:
        def embeds(found: Proposals) -> Tensor:
            images = torch.from_numpy(found.image).permute(2, 0, 1)[None].float() / 255
            return embed_proposals(tower, images, found.mask_logits, [found.size], **options).embeds[0]

        return embeds

    ways = {"crops, mean colour": {}, "crops, plain": {"fill": None}, "one pass": {"view": "single_pass"}}
    return {f"proposals, {name}": seen(options) for name, options in ways.items()}


def tipsv2_namings(model: Tipsv2Model) -> dict[str, Naming]:
    def embeds(found: Proposals) -> Tensor:
        tokens = tiny_tipsv2.patch_tokens(model, tiny_tipsv2.pixel_values(found.image[None]))[0]
        masks = F.interpolate(found.mask_logits, size=found.size, mode="bilinear", align_corners=False)
        return mask_means(tokens, masks[0].sigmoid())

    return {"proposals, patch tokens": embeds}


@torch.inference_mode()
def proposal_accuracy(checkpoint: str, namings: dict[str, Naming], text: Tensor) -> tuple[Scores, dict[str, float]]:
    """Accuracy on proposals, for each way and purity; and the share of the proposals that have each purity."""
    names, purities, right = [], [], {way: [] for way in namings}
    for found in tqdm(propose(checkpoint), total=NUM_SCENES, desc="proposals", unit="scene"):
        names.append(found.name)
        purities.append(found.purity)
        for way, embeds in namings.items():
            right[way].append((embeds(found) @ text.T).argmax(dim=1).numpy() == found.name)
    name, purity = np.concatenate(names), np.concatenate(purities)
    scores = {}
    for least in PURITIES:
        pure = purity >= least
        for way, correct in right.items():
            scores[f"{way}, purity {least}"] = accuracies(np.concatenate(correct)[pure], name[pure])
    return scores, {str(least): float((purity >= least).sum() / (purity > 0).sum()) for least in PURITIES}
