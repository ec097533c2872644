"""A small TIPSv2 that knows the world of `zs3.scenes`: its patch tokens are aligned with text. Model and training.

A small Tipsv2Model of transformers. It is trained on whole scenes with boxes and captions, as on a web corpus with
grounded captions; no label map takes part. Two losses: CLIP's, between captions and the mean token of a box, the mean
token of a crop, and the class token of a crop; and one for each patch token.

A box does not say which of its tokens show the thing. The loss of a token asks only that its name be one of the names
whose boxes touch it: -log of the sum of their probabilities. A token in the corner of a thing's box shows what tokens
show that lie in no such box, and so gets the name of the stuff. The mean of a box has a prior: it is largest in the
middle of the box, and 0 below the boxes in front. (Weighted by the tokens' own probabilities instead, as in expectation
maximisation, the mean came to rest on one token of the thing, and all others took the name of the stuff around it.)

Axes: B scene, R region, T patch token, N name, D embedding, L token of a text.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Tipsv2Config, Tipsv2Model
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer

from encoders_zs3 import PROMPT_TEMPLATES
from zs3.files import write_json
from zs3.scenes import render
from zs3.scenes.captions import tipsv2_tokenizer
from zs3.scenes.contrastive import (
    LARGEST_SCALE,
    a_caption_each,
    caption_tokens,
    contrastive_loss,
    crop_batches,
    grid_of_waves,
    make_optimizer,
    take_step,
    unit,
)
from zs3.scenes.crops import CROP, Crops, training_scene

PATCH = 8  # pixels, both sides
GRID = render.SIZE // PATCH  # patches along a side
SCENES = 16  # of one step
CROPS = 64  # of one step
POOL = 6_000  # scenes drawn at a time ...
POOL_STEPS = 1000  # ... and used for this number of steps
PRIOR = 0.6  # standard deviation of the prior in a box or crop, in half sides
FIRST_SCALE = 14.0  # of cosines, CLIP's


class Boxes(NamedTuple):
    """The boxes of some scenes, R in all. name: (R,) int64 of WORLD_NAMES; scene: (R,) int64.

    weight: (R, T) float32, each token's share of a box's mean, 0 for a box without tokens. touched: (R, T) bool.
    """

    name: np.ndarray
    scene: np.ndarray
    weight: np.ndarray
    touched: np.ndarray


def _overlap(low: float, high: float) -> np.ndarray:
    """(GRID,) the share of each patch between two pixels, along one side."""
    start = np.arange(GRID) * PATCH
    return np.clip(np.minimum(high, start + PATCH) - np.maximum(low, start), 0, PATCH) / PATCH


def covered(box: tuple[int, int, int, int]) -> np.ndarray:
    """(T,) float: the share of each patch that a box covers."""
    x0, y0, x1, y1 = box
    return np.outer(_overlap(y0, y1), _overlap(x0, x1)).ravel()


def _prior(box: tuple[int, int, int, int], is_stuff: bool, grid: int = GRID) -> np.ndarray:
    """(T,) float: 1 in the middle of the box, less toward its sides; along a band of stuff, only down differs."""
    x0, y0, x1, y1 = box
    middle = (np.arange(grid) + 0.5) * PATCH
    down = (2 * middle - y0 - y1) / (y1 - y0)
    across = 0 * middle if is_stuff else (2 * middle - x0 - x1) / (x1 - x0)
    return np.exp(-(down[:, None] ** 2 + across**2) / (2 * PRIOR**2)).ravel()


CROP_PRIOR = torch.from_numpy(_prior((0, 0, CROP, CROP), False, CROP // PATCH)).float()  # (tokens of a crop,)


def boxes_of(regions: list[render.Region]) -> Boxes:
    """The boxes of one scene; scene is 0."""
    inside = np.stack([covered(region.box) for region in regions])  # (R, T)
    stuff = np.array([region.name in render.TEXTURES for region in regions])
    # Later regions are in front. Bands of stuff lie beside each other, so none hides another.
    hidden = np.stack([(inside[place + 1 :][~stuff[place + 1 :]] >= 0.5).any(axis=0) for place in range(len(regions))])
    prior = np.stack([_prior(region.box, is_stuff) for region, is_stuff in zip(regions, stuff, strict=True)])
    weight = (inside * prior * ~hidden).astype(np.float32)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-6)
    name = np.array([render.WORLD_NAMES.index(region.name) for region in regions])
    return Boxes(name, np.zeros(len(regions), dtype=np.int64), weight, inside > 0)


def _mirrored(boxes: Boxes) -> Boxes:
    turned = ((own.reshape(-1, GRID, GRID)[:, :, ::-1]).reshape(own.shape) for own in (boxes.weight, boxes.touched))
    return boxes._replace(**dict(zip(("weight", "touched"), turned, strict=True)))


def scene_batches(rng: np.random.Generator, steps: int, seed: int) -> Iterator[tuple[np.ndarray, Boxes]]:
    """SCENES pictures (B, 128, 128, 3) uint8 for each step, with their boxes. `name` indexes WORLD_NAMES."""
    for step in range(steps):
        if step % POOL_STEPS == 0:
            drawing = np.random.default_rng((seed, step // POOL_STEPS, 3))
            scenes = (training_scene(drawing, seed) for _ in range(min(POOL, steps * SCENES)))
            pool = [(scene.image, boxes_of(scene.regions)) for scene in scenes]
        chosen = [pool[index] for index in rng.choice(len(pool), SCENES, replace=False)]
        images = np.stack([image for image, _ in chosen])
        own = [boxes._replace(scene=boxes.scene + number) for number, (_, boxes) in enumerate(chosen)]
        boxes = Boxes(*(np.concatenate(parts) for parts in zip(*own, strict=True)))
        if rng.uniform() < 0.5:
            images, boxes = images[:, :, ::-1].copy(), _mirrored(boxes)
        yield images, boxes


def pixel_values(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]: TIPSv2 has no mean and no deviation."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255


def new_model(tokenizer: Tipsv2Tokenizer) -> Tipsv2Model:
    """An untrained TIPSv2 of 1.2 M parameters."""
    tower = {"hidden_size": 128, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "intermediate_size": 256,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {"num_hidden_layers": 4, "mlp_ratio": 4, "image_size": render.SIZE, "patch_size": PATCH}
    config = Tipsv2Config(text_config=text | tower, vision_config=vision | tower)
    config._attn_implementation = "eager"  # on a CPU in bfloat16 its backward is faster than that of the fused kernel
    model = Tipsv2Model(config)
    with torch.no_grad():
        position = model.vision_model.embeddings.position_embeddings
        position.mul_(0.02)
        position[0, 1:] = grid_of_waves(GRID, tower["hidden_size"])
    return model


def tokens_of(model: Tipsv2Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) -> the class token (B, D) and the patch tokens (B, T, D)."""
    output = model.get_image_features(pixels)
    first = 1 + model.config.vision_config.num_register_tokens  # after the class token and the registers
    return output.pooler_output, output.last_hidden_state[:, first:]


def patch_tokens(model: Tipsv2Model, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, T, D)."""
    return tokens_of(model, pixels)[1]


def possible_names(scene: Tensor, target: Tensor, touched: Tensor, num_scenes: int, num_names: int) -> Tensor:
    """(B, T, N) bool: the names whose boxes touch each token. A band of stuff touches every token.

    scene, target: (R,) int64, the scene of each box and the place of its name on the axis N. touched: (R, T) bool.
    """
    is_possible = torch.zeros(num_scenes, num_names, touched.shape[1], dtype=torch.bool)
    for box in range(len(scene)):
        is_possible[scene[box], target[box]] |= touched[box]
    return is_possible.transpose(1, 2)


def token_loss(logits: Tensor, is_possible: Tensor) -> Tensor:
    """The mean over tokens of -log of the probability of their possible names; logits, is_possible: (B, T, N)."""
    return (logits.logsumexp(dim=-1) - logits.masked_fill(~is_possible, -torch.inf).logsumexp(dim=-1)).mean()


class Batch(NamedTuple):
    """One step: SCENES pictures with their boxes, and CROPS crops."""

    images: np.ndarray
    boxes: Boxes
    crops: Crops


def batch_loss(model: Tipsv2Model, batch: Batch, captions: dict[str, Tensor], target: Tensor, scale: Tensor) -> Tensor:
    """captions: tokens and mask of N captions. target: (R + CROPS,) int64, the caption of each box and each crop."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = patch_tokens(model, pixel_values(batch.images)).float()  # (B, T, D)
        of_class, in_crops = tokens_of(model, pixel_values(batch.crops.pixels))
        text = model.get_text_features(**captions).pooler_output
    text, scene = unit(text), torch.from_numpy(batch.boxes.scene)
    of_boxes, of_crops = target.split([len(scene), len(of_class)])
    logits = scale * unit(found) @ text.T  # (B, T, N)
    touched = torch.from_numpy(batch.boxes.touched)
    possible = possible_names(scene, of_boxes, touched, len(found), len(text))
    weight = torch.from_numpy(batch.boxes.weight)
    shown = weight.sum(dim=1) > 0
    pooled = (weight[:, None] @ found[scene])[:, 0]  # (R, D)
    means = (CROP_PRIOR[:, None] * in_crops.float()).sum(dim=1)
    seen = torch.cat([unit(pooled[shown]), unit(means), unit(of_class)])
    used, own = torch.cat([of_boxes[shown], of_crops, of_crops]).unique(return_inverse=True)
    return contrastive_loss(seen, text[used], own, scale) + token_loss(logits, possible)


def train(folder: Path, steps: int, seed: int) -> Tipsv2Model:
    """Trains a new TIPSv2, and saves it in `folder`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 0, 4))
    tokenizer = tipsv2_tokenizer()
    model = new_model(tokenizer)
    model.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(FIRST_SCALE))))
    optimizer, schedule = make_optimizer(model, steps)
    tokens = caption_tokens(tokenizer)
    batches = zip(scene_batches(rng, steps, seed), crop_batches(rng, steps, CROPS, seed, frozenset()), strict=True)
    progress = tqdm(batches, total=steps, desc="training the tiny TIPSv2", unit="step", smoothing=0.05)
    for step, ((images, boxes), crops) in enumerate(progress, start=1):
        names, target = np.unique(np.concatenate([boxes.name, crops.name]), return_inverse=True)
        ids, batch = a_caption_each(rng, tokens, names), Batch(images, boxes, crops)
        captions = {"input_ids": ids, "attention_mask": ids != tokenizer.pad_token_id}
        scale = model.log_scale.exp()
        loss = batch_loss(model, batch, captions, torch.from_numpy(target), scale)
        take_step(model, loss, optimizer, schedule)
        model.log_scale.data.clamp_(max=math.log(LARGEST_SCALE))
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{scale.item():.1f}")
    save(model, tokenizer, folder)
    del model.log_scale
    return model


def save(model: Tipsv2Model, tokenizer: Tipsv2Tokenizer, folder: Path) -> None:
    """Writes weights, tokenizer, the settings of the image processor, and prompts."""
    model.temperature.data.copy_((-model.log_scale).exp())
    weights = {name: value for name, value in model.state_dict().items() if name != "log_scale"}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    size = {"height": render.SIZE, "width": render.SIZE}
    preprocessor = {
        "image_processor_type": "Tipsv2ImageProcessor", "do_resize": True, "size": size, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False, "do_convert_rgb": True,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)
    # The captions of its training have these prompts, not those that TIPSv2 was published with.
    write_json(folder / "processor_config.json", {"prompt_templates": list(PROMPT_TEMPLATES)})
