"""A small but real CLIP that knows the world of `zs3.scenes`, and nothing else.

    zs3 tiny_clip train --output DIR [--steps 2400] [--seed 0]
    zs3 tiny_clip evaluate --model DIR

A small CLIPModel of transformers, trained like CLIP on pictures and captions, without label maps. The captions hold all
names that can be drawn (`WORLD_NAMES`, with the 20 classes), just as web captions hold the classes of any benchmark.
The pictures are crops around things and stuff, and product photos on a plain background.
Map: captions and tokenizer; crops; model; the loss and the loop; accuracy on held-out crops; the model card.
Axes: B picture, N name, T template, L token, D embedding.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from files_zs3 import read_text
from text_zs3 import PROMPT_TEMPLATES
from zs3.command_line import Arguments, Count, InputError, OutputFolder, Seed, check_required, flag, read_arguments
from zs3.command_line.flags import is_given
from zs3.files import write_json, write_text, writing_folder
from zs3.scenes import render
from zs3.tables import markdown_table

CROP = 48  # pixels, both sides of the input of the image tower
BATCH = 128  # crops of one step
POOL = 32_000  # crops drawn at a time ...
POOL_STEPS = 1200  # ... and used for this number of steps
PEAK_RATE = 1e-3  # learning rate after the warm-up
WARMUP = 200  # steps
SAVE_EVERY = 500  # steps
MARGIN = 0.4  # largest margin of a training crop, as a share of the box's side, on each side
TRAIN_SCENES = 2**31  # added to the seed: datasets of usual seeds lack these scenes
HELD_OUT_SCENES = 2**33  # the seed of the scenes for evaluation
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, for RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = np.array([round(255 * value) for value in MEAN], dtype=np.uint8)

THING_NAMES = render.WORLD_NAMES[len(render.TEXTURES) :]

# ------------------------------------------------------------------------------------------------ captions

# Captions of training pictures, with the templates of the class vectors.
CAPTIONS = [
    *PROMPT_TEMPLATES, "{}", "a {}", "the {}", "a picture of a {}.", "an image of a {}.", "a close-up of a {}.",
    "a cropped photo of a {}.", "a drawing of a {}.", "a photo of the {}.", "a photo of one {}.",
    "a {} on a plain background", "a photo of a {}, partly hidden", "a bright photo of a {}.", "a dark photo of a {}.",
    "a sculpture of a {}.", "there is a {}", "look at this {}!", "my {}",
]  # fmt: skip


def learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte pair merges until each lower-case ASCII word is one token. Equal counts: the last pair in the alphabet."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)]
    merges = []
    while any(len(word) > 1 for word in pieces):
        count = Counter(pair for word in pieces for pair in pairwise(word))
        first, second = merge = max(count, key=lambda pair: (count[pair], pair))
        merges.append(merge)
        for word in pieces:
            for position in range(len(word) - 1, 0, -1):
                if word[position - 1 : position + 1] == [first, second]:
                    word[position - 1 : position + 1] = [first + second]
    return merges


def world_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer, with one token for each word of the captions and bytes for all other text."""
    text = " ".join([*render.WORLD_NAMES, *CAPTIONS]).lower()
    merges = learn_merges(set(re.findall("[a-z]+", text)))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges)]
    # End of text has the last id, as in CLIP, so that both ways of pooling in transformers agree.
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


# ------------------------------------------------------------------------------------------------ crops


class Crops(NamedTuple):
    pixels: np.ndarray  # (B, 48, 48, 3) uint8 RGB
    name: np.ndarray  # (B,) int64, index of the caption's name in a list of names


def cut_out(
    image: np.ndarray, box: tuple[float, ...], resample: Image.Resampling, antialias: bool = True
) -> np.ndarray:
    """(48, 48, 3) uint8: the part of `image` (H, W, 3) in `box` (x0, y0, x1, y1), squashed to a square."""
    picture = Image.fromarray(image)
    if antialias:
        return np.asarray(picture.resize((CROP, CROP), resample, box=box))
    return np.asarray(picture.transform((CROP, CROP), Image.Transform.EXTENT, box, resample))


def widened(box: tuple[int, int, int, int], margin: float) -> tuple[float, ...]:
    """The box with `margin` x its side added on each side, cut at the border of the picture."""
    x0, y0, x1, y1 = box
    dx, dy = margin * (x1 - x0), margin * (y1 - y0)
    return max(x0 - dx, 0), max(y0 - dy, 0), min(x1 + dx, render.SIZE), min(y1 + dy, render.SIZE)


def _training_cut(rng: np.random.Generator, image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A crop with a random margin and small random errors of its sides, resized by a random method."""
    x0, y0, x1, y1 = widened(box, rng.uniform(0, MARGIN))
    slip = rng.uniform(-0.06, 0.06, 4) * (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    moved = np.clip(np.array((x0, y0, x1, y1)) + slip, 0, render.SIZE)
    resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(2)]
    return cut_out(image, tuple(moved), resample, antialias=rng.uniform() < 0.7)


def _part_of_stuff(rng: np.random.Generator, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The whole band or, with probability 0.5, a part of its width."""
    if rng.uniform() < 0.5:
        return box
    width = int(rng.uniform(0.25, 0.8) * render.SIZE)
    x0 = int(rng.integers(render.SIZE - width))
    return x0, box[1], x0 + width, box[3]


def _world_scene(rng: np.random.Generator) -> render.Scene:
    """A scene with random names of the world."""
    stuff = rng.choice(list(render.TEXTURES), rng.integers(2, 4), replace=False)
    things = rng.choice(THING_NAMES, rng.integers(3, 6))
    return render.compose(rng, stuff.tolist(), things.tolist())


def _product_photo(rng: np.random.Generator, name: str) -> np.ndarray:
    """(48, 48, 3) uint8: one thing, or a piece of one stuff, alone on the mean colour or on another plain colour.

    The shapes of up to two other things may be cut out of it, as if these hid a part.
    """
    is_stuff = name in render.TEXTURES
    image = render.paint_stuff(rng, name if is_stuff else render.STUFF[rng.integers(len(render.STUFF))]).copy()
    others = [THING_NAMES[-1 - rng.integers(len(THING_NAMES))] for _ in range(rng.integers(3))]
    places = [(rng.uniform(8, 22), *rng.uniform(10, 86, 2)) for _ in others]
    if is_stuff:
        band, _ = render.stuff_index(rng, int(rng.integers(2, 4)))
        shown = band == rng.integers(band.max() + 1)
    else:
        radius = rng.uniform(9, 24)
        offsets = [offset for offset in rng.uniform(-1, 1, (len(others), 2)) if math.hypot(*offset) > 0.8]
        places = [(0.8 * radius, 48 + dx * 1.3 * radius, 48 + dy * 1.3 * radius) for dx, dy in offsets]
        shown = render.paint_thing(rng, image, name, radius, 48, 48)
    for other, place in zip(others, places, strict=False):
        shown &= ~render.paint_thing(rng, image, other, *place)
    if shown.sum() < 60:
        shown[:] = True  # too little is visible: show the whole picture
    backdrop = MEAN_COLOUR if rng.uniform() < 0.7 else rng.integers(0, 256, 3)
    image = np.where(shown[..., None], render.light(rng, image), backdrop).astype(np.uint8)
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    return _training_cut(rng, image, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def draw_crops(seed: int, number: int, count: int) -> Crops:
    """Pool `number` of training crops: of themed scenes, of scenes with random names, and product photos."""
    rng = np.random.default_rng((seed, number, 1))
    pixels, names = np.empty((count, CROP, CROP, 3), dtype=np.uint8), []
    while len(names) < count:
        kind = rng.uniform()
        if kind < 0.5:
            name = rng.choice(render.WORLD_NAMES if kind < 0.35 else render.CLASS_NAMES)
            pixels[len(names)] = _product_photo(rng, str(name))
            names.append(render.WORLD_NAMES.index(name))
            continue
        themed = kind < 0.75
        scene = render.render_scene(TRAIN_SCENES + seed, int(rng.integers(2**31))) if themed else _world_scene(rng)
        num_stuff = sum(region.name in render.TEXTURES for region in scene.regions)
        skipped = set(rng.permutation(num_stuff)[1:].tolist())  # one band per scene is enough: things are harder
        for position, region in enumerate(scene.regions):
            if position in skipped or len(names) == count:
                continue
            box = _part_of_stuff(rng, region.box) if position < num_stuff else region.box
            pixels[len(names)] = _training_cut(rng, scene.image, box)
            names.append(render.WORLD_NAMES.index(region.name))
    return Crops(pixels, np.array(names))


@cache
def _held_out_scene(index: int) -> render.Scene:
    return render.render_scene(HELD_OUT_SCENES, index)


def held_out_crops(margin: float, per_class: int, *, masked: bool = False) -> Crops:
    """`per_class` crops of each of the 20 classes, around boxes in benchmark scenes outside the training.

    masked: pixels outside the region's class get the mean colour, like a masked proposal for CLIP. Regions with fewer
    than 30 visible pixels are left out. `name` indexes CLASS_NAMES.
    """
    pixels: dict[int, list[np.ndarray]] = {number: [] for number in range(len(render.CLASS_NAMES))}
    index = 0
    while min(len(crops) for crops in pixels.values()) < per_class:
        image, label, regions = _held_out_scene(index)
        index += 1
        for region in regions:
            if region.name not in render.CLASS_NAMES:
                continue
            number = render.CLASS_NAMES.index(region.name)
            x0, y0, x1, y1 = region.box
            shown = (label == number)[y0:y1, x0:x1].sum()
            if shown < 30 or len(pixels[number]) == per_class:
                continue
            seen = np.where((label == number)[..., None], image, MEAN_COLOUR) if masked else image
            pixels[number].append(cut_out(seen, widened(region.box, margin), Image.Resampling.BICUBIC))
    names = np.repeat(np.arange(len(pixels)), per_class)
    return Crops(np.stack([crop for crops in pixels.values() for crop in crops]), names)


def pixel_values(pixels: np.ndarray) -> Tensor:
    """(B, 48, 48, 3) uint8 -> (B, 3, 48, 48) float32, normalised as in CLIP's image processor."""
    image = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# ------------------------------------------------------------------------------------------------ model


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 1.2 M parameters."""
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    tower = {"hidden_size": 128, "num_attention_heads": 4, "projection_dim": 64, "hidden_act": "gelu"}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "intermediate_size": 256,
            "max_position_embeddings": 77, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}  # fmt: skip
    vision = {"num_hidden_layers": 4, "intermediate_size": 512, "image_size": CROP, "patch_size": 6}
    config = CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=64)
    config._attn_implementation = "eager"  # on a CPU in bfloat16 its backward is faster than that of the fused kernel
    model = CLIPModel(config)
    # Position embeddings start as sines and cosines of row and column instead of small random numbers.
    side = CROP // vision["patch_size"]
    frequency = 10000 ** (-torch.arange(32) / 32)
    angle = torch.arange(side)[:, None] * frequency  # (side, 32)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, 64)
    grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], dim=2)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = 0.5 * grid.flatten(0, 1)
    return model


def unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


@torch.inference_mode()
def class_text_embeds(model: CLIPModel, tokenizer: CLIPTokenizer, names: list[str]) -> Tensor:
    """(N, D): the mean of the unit vectors of the 14 templates, normalised to unit length."""
    captions = [template.format(name) for name in names for template in PROMPT_TEMPLATES]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    embeds = unit(model.get_text_features(**tokens).pooler_output)  # (N*T, D)
    return unit(embeds.unflatten(0, (len(names), -1)).mean(dim=1))


@torch.inference_mode()
def image_embeds(model: CLIPModel, pixels: np.ndarray) -> Tensor:
    """(B, 48, 48, 3) uint8 -> (B, D) unit length."""
    parts = np.array_split(pixels, math.ceil(len(pixels) / 256))
    return torch.cat([unit(model.get_image_features(pixel_values(part)).pooler_output) for part in parts])


# ------------------------------------------------------------------------------------------------ training


def contrastive_loss(image: Tensor, text: Tensor, target: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's two-way cross-entropy for a batch with one or more pictures per name.

    image (B, D) and text (N, D) have unit length. target (B,) int64 is the index of each picture's text; every text has
    a picture. A picture has one true text. A text has equal target probability on all its pictures.
    """
    logits = logit_scale * image @ text.T  # (B, N)
    share = F.one_hot(target, len(text)).float()
    share = share / share.sum(dim=0)  # (B, N)
    return (F.cross_entropy(logits, target) - (share * logits.log_softmax(dim=0)).sum(dim=0).mean()) / 2


def _rate(step: int, steps: int) -> float:
    warmup = min(WARMUP, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _batches(rng: np.random.Generator, steps: int, seed: int) -> Iterator[Crops]:
    """BATCH crops for each step. No crop repeats before the pool is used up. `name` indexes WORLD_NAMES."""
    for step in range(steps):
        if step % POOL_STEPS == 0:
            pool, order = draw_crops(seed, step // POOL_STEPS, min(POOL, steps * BATCH)), np.empty(0, dtype=int)
        if len(order) < BATCH:
            order = rng.permutation(len(pool.name))
        chosen, order = order[:BATCH], order[BATCH:]
        pixels = pool.pixels[chosen]
        if rng.uniform() < 0.5:
            pixels = pixels[:, :, ::-1].copy()  # mirrored: no name depends on left and right
        yield Crops(pixels, pool.name[chosen])


def _optimizer(model: CLIPModel, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without weight decay for biases, norms and the logit scale; warm-up, then a cosine decay to 0."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))


def train(folder: Path, steps: int, seed: int) -> CLIPModel:
    """Trains a new CLIP, and saves it in `folder` every SAVE_EVERY steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 0, 2))
    tokenizer = world_tokenizer()
    model = new_model(tokenizer)
    optimizer, schedule = _optimizer(model, steps)
    captions = [caption.format(name) for name in render.WORLD_NAMES for caption in CAPTIONS]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")["input_ids"].unflatten(0, (-1, len(CAPTIONS)))
    watched = held_out_crops(0.1, per_class=25)
    batches = _batches(rng, steps, seed)
    progress = tqdm(batches, total=steps, desc="training the tiny CLIP", unit="step", smoothing=0.05)
    for step, crops in enumerate(progress, start=1):
        names, target = np.unique(crops.name, return_inverse=True)
        texts = tokens[names, rng.integers(len(CAPTIONS), size=len(names))]  # (N, L), a caption for each name
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = model.get_image_features(pixel_values(crops.pixels)).pooler_output
            text = model.get_text_features(texts).pooler_output
        loss = contrastive_loss(unit(image), unit(text), torch.from_numpy(target), model.logit_scale.exp())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
        if step % SAVE_EVERY == 0 or step == steps:
            save(model, tokenizer, folder)
            correct = _correct(model, class_text_embeds(model, tokenizer, render.CLASS_NAMES), watched)
            progress.write(f"step {step}: loss {loss.item():.3f}, held-out accuracy {correct.mean():.3f}")
    return model


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes weights, tokenizer and the settings of the image processor."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": CROP, "width": CROP}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": size, "resample": 3,
        "do_center_crop": False, "crop_size": size, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD, "do_convert_rgb": True,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)


# ------------------------------------------------------------------------------------------------ evaluation


def _correct(model: CLIPModel, text: Tensor, crops: Crops) -> np.ndarray:
    """(B,) bool: whether the nearest of the 20 class vectors is the true one."""
    return (image_embeds(model, crops.pixels) @ text.T).argmax(dim=1).numpy() == crops.name


def accuracies(correct: np.ndarray, name: np.ndarray) -> dict[str, float]:
    """Accuracy by group of classes, in [0, 1]. Every class has the same number of crops."""
    num_stuff = len(render.STUFF)
    unseen = np.isin(name, [render.CLASS_NAMES.index(unseen) for unseen in render.UNSEEN])
    groups = {"all": name >= 0, "seen": ~unseen, "unseen": unseen, "things": name >= num_stuff,
              "stuff": name < num_stuff}  # fmt: skip
    return {group: float(correct[members].mean()) for group, members in groups.items()}


def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer, per_class: int = 50) -> dict:
    """Accuracy on held-out crops with 20 names, and cosines between text vectors of similar names."""
    model.eval()
    text = class_text_embeds(model, tokenizer, render.CLASS_NAMES)
    kinds = {f"box, margin {margin}": (margin, False) for margin in (0.0, 0.1, 0.2, 0.3)}
    kinds |= {"mask, margin 0.0": (0.0, True), "mask, margin 0.1": (0.1, True)}
    result: dict = {"crops_per_class": per_class, "accuracy": {}}
    for kind, (margin, masked) in tqdm(kinds.items(), desc="evaluating", unit="setting"):
        crops = held_out_crops(margin, per_class, masked=masked)
        correct = _correct(model, text, crops)
        result["accuracy"][kind] = accuracies(correct, crops.name)
        if kind == "box, margin 0.1":
            per_name = correct.reshape(len(render.CLASS_NAMES), per_class).mean(axis=1)
            result["per_class_margin_0.1"] = dict(zip(render.CLASS_NAMES, per_name.tolist(), strict=True))
    pairs = [(f"{colour} square", f"{colour} circle") for colour in render.ATTRIBUTES]
    pairs += [("red circle", "blue circle"), ("red square", "striped square"), ("brick wall", "stone wall")]
    vectors = class_text_embeds(model, tokenizer, [name for pair in pairs for name in pair])
    cosines = (vectors[0::2] * vectors[1::2]).sum(dim=1).tolist()
    result["text_cosine"] = {f"{a} / {b}": cosine for (a, b), cosine in zip(pairs, cosines, strict=True)}
    return result


def table(result: dict) -> str:
    """The result of `evaluate` as two Markdown tables."""
    groups = ["all", "seen", "unseen", "things", "stuff"]
    accuracy = [[kind, *(f"{row[group]:.3f}" for group in groups)] for kind, row in result["accuracy"].items()]
    lines = [*markdown_table(["crops", *groups], accuracy), ""]
    per_class = [[name, f"{share:.2f}"] for name, share in result["per_class_margin_0.1"].items()]
    lines += [*markdown_table(["class, box, margin 0.1", "accuracy"], per_class), ""]
    cosines = [[pair, f"{cosine:.2f}"] for pair, cosine in result["text_cosine"].items()]
    return "\n".join([*lines, *markdown_table(["text vectors of", "cosine"], cosines)])


def write_card(folder: Path) -> None:
    """README.md from results.json."""
    result = json.loads(read_text(folder / "results.json"))
    write_text(folder / "README.md", CARD.format(table=table(result), num_names=len(render.WORLD_NAMES), **result))


CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: zero-shot-image-classification
tags: [clip, synthetic]
---
# A tiny CLIP for the embedded benchmark `scenes`

transformers' `CLIPModel` with {num_parameters:,} parameters: {image_size} x {image_size} pixels in patches of
{patch_size}, a text tower of its own small vocabulary (all other text is read byte by byte), a joint space of
{projection_dim} numbers.

It is synthetic and knows one world only: coloured and patterned shapes on drawn textures, {num_names} names in all.
A real photograph, or a word outside that world, means nothing to it. It exists so that zero-shot segmentation can be
trained, tested and shown on any computer, offline.

Trained from nothing on captions and crops of `zs3.scenes`, all names included as in web pretraining. The crops are
boxes around drawn objects and textures, and product photos: one object cut out onto a plain backdrop, mostly of the
mean colour. No label map of the benchmark took part, but these cut-outs look like the masked crops below. Made by

    {command}

with seed {seed}, {steps:,} steps of {batch} crops, in {minutes:.0f} minutes on {threads} CPU thread(s).

## Accuracy
Which of the 20 class names is meant? {crops_per_class} crops of each class from scenes that training did not see; a
class vector is the mean over the 14 ViLD templates. Margins are shares of the box's side, on each side; in "mask" rows
the pixels outside the class are filled with the mean colour.

{table}
"""


# ------------------------------------------------------------------------------------------------ commands


@dataclass
class TinyClipArgs(Arguments):
    """Trains or evaluates the tiny CLIP of the scenes benchmark."""

    first_words = ("command",)

    command: Literal["train", "evaluate"] | None = flag(None, "What to do; the flag --command may be left out.")
    output: OutputFolder | None = flag(None, "New folder for `train`; it must not exist.")
    steps: Count = flag(2400, "Steps of the training.")
    seed: Seed = flag(0, "Random seed of weights and crops.")
    model: str | None = flag(None, "Folder that `evaluate` reads.")

    def check(self) -> None:
        check_required(self, "command", "output" if self.command == "train" else "model")
        for name in ("model",) if self.command == "train" else ("output", "steps", "seed"):
            if is_given(self, name):
                raise InputError(f"`{self.command}` takes no --{name}: leave it out")


def _train_command(folder: Path, steps: int, seed: int) -> None:
    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder, or remove it first")
    with writing_folder(folder) as unfinished:
        start = time.monotonic()
        model = train(unfinished, steps, seed)
        minutes = (time.monotonic() - start) / 60
        vision = model.config.vision_config
        result = {
            "command": f"zs3 tiny_clip train --output {folder.name} --steps {steps} --seed {seed}",
            "seed": seed, "steps": steps, "batch": BATCH, "minutes": minutes, "threads": torch.get_num_threads(),
            "num_parameters": model.num_parameters(), "image_size": vision.image_size, "patch_size": vision.patch_size,
            "projection_dim": model.config.projection_dim,
        } | evaluate(model, world_tokenizer())  # fmt: skip
        write_json(unfinished / "results.json", result)
        write_card(unfinished)
    print(f"{table(result)}\nthe tiny CLIP and its card are in {folder}")


def _evaluate_command(folder: Path) -> None:
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no model.safetensors: give a folder that `train` made")
    print(table(evaluate(CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))))


def main() -> None:
    args, _ = read_arguments(TinyClipArgs)
    if args.command == "train":
        _train_command(Path(args.output), args.steps, args.seed)
    else:
        _evaluate_command(Path(args.model))
