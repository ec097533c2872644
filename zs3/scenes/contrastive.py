"""What the trainings of the tiny encoders share: CLIP's loss, the optimizer, the crops and captions of a step, and the
position embeddings to start from.

Axes: B picture, N name, D embedding, L token.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from zs3.scenes.captions import CAPTIONS
from zs3.scenes.crops import Crops, draw_crops
from zs3.scenes.render import WORLD_NAMES

POOL = 32_000  # crops drawn at a time ...
POOL_STEPS = 1200  # ... and used for this number of steps
PEAK_RATE = 1e-3  # learning rate after the warm-up
WARMUP = 200  # steps
LARGEST_SCALE = 100.0  # of cosines, CLIP's


def unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


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
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def make_optimizer(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without weight decay for biases, norms and the logit scale; warm-up, then a cosine decay to 0."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))


def crop_batches(rng: np.random.Generator, steps: int, size: int, seed: int, hidden: frozenset[str]) -> Iterator[Crops]:
    """`size` crops for each step. No crop repeats before the pool is used up. `name` indexes WORLD_NAMES."""
    for step in range(steps):
        if step % POOL_STEPS == 0:
            pool = draw_crops(seed, step // POOL_STEPS, min(POOL, steps * size), hidden)
            order = np.empty(0, dtype=int)
        if len(order) < size:
            order = rng.permutation(len(pool.name))
        chosen, order = order[:size], order[size:]
        pixels = pool.pixels[chosen]
        if rng.uniform() < 0.5:
            pixels = pixels[:, :, ::-1].copy()  # mirrored: no name depends on left and right
        yield Crops(pixels, pool.name[chosen])


def take_step(
    model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """One step down the loss, with gradients of a norm of at most 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def caption_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(names, captions, L): the tokens of all captions of all WORLD_NAMES."""
    captions = [caption.format(name) for name in WORLD_NAMES for caption in CAPTIONS]
    return tokenizer(captions, padding=True, return_tensors="pt")["input_ids"].unflatten(0, (-1, len(CAPTIONS)))


def a_caption_each(rng: np.random.Generator, tokens: Tensor, names: np.ndarray) -> Tensor:
    """(N, L) tokens of one random caption of each of N names. tokens: (names, captions, L)."""
    return tokens[names, rng.integers(len(CAPTIONS), size=len(names))]


def grid_of_waves(side: int, dim: int) -> Tensor:
    """(side * side, dim): position embeddings to start from, sines and cosines of row and column."""
    frequency = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side)[:, None] * frequency  # (side, dim / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, dim / 2)
    grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], dim=2)
    return 0.5 * grid.flatten(0, 1)
