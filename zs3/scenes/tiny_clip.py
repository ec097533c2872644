"""A small but real CLIP that knows the world of `zs3.scenes`, and nothing else: its model and its training.

A small CLIPModel of transformers, trained like CLIP on pictures and captions, without label maps. The captions hold all
names that can be drawn (`WORLD_NAMES`, with the 24 classes), just as web captions hold the classes of any benchmark; or
all but some hidden names. The pictures are crops around things and stuff, whole or in part, crops with the mean colour
around a mask, and product photos on a plain background (`zs3.scenes.crops`).

Axes: B picture, N name, D embedding.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from zs3.files import write_json
from zs3.scenes.captions import clip_tokenizer
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
from zs3.scenes.crops import CROP, MEAN, STD

BATCH = 128  # crops of one step


def pixel_values(pixels: np.ndarray) -> Tensor:
    """(B, 48, 48, 3) uint8 -> (B, 3, 48, 48) float32, normalised as in CLIP's image processor."""
    image = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


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
    with torch.no_grad():
        waves = grid_of_waves(CROP // vision["patch_size"], tower["hidden_size"])
        model.vision_model.embeddings.position_embedding.weight[1:] = waves
    return model


def train(folder: Path, steps: int, seed: int, hidden: frozenset[str] = frozenset()) -> CLIPModel:
    """Trains a new CLIP, and saves it in `folder`. hidden: names without captions."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 0, 2))
    tokenizer = clip_tokenizer()
    model = new_model(tokenizer)
    optimizer, schedule = make_optimizer(model, steps)
    tokens = caption_tokens(tokenizer)
    batches = crop_batches(rng, steps, BATCH, seed, hidden)
    progress = tqdm(batches, total=steps, desc="training the tiny CLIP", unit="step", smoothing=0.05)
    for step, crops in enumerate(progress, start=1):
        names, target = np.unique(crops.name, return_inverse=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = model.get_image_features(pixel_values(crops.pixels)).pooler_output
            text = model.get_text_features(a_caption_each(rng, tokens, names)).pooler_output
        loss = contrastive_loss(unit(image), unit(text), torch.from_numpy(target), model.logit_scale.exp())
        take_step(model, loss, optimizer, schedule)
        model.logit_scale.data.clamp_(max=math.log(LARGEST_SCALE))
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
    save(model, tokenizer, folder)
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
