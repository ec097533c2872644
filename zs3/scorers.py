"""What scores proposals against names: a checkpoint's own frozen encoder, or another one (sections 3.4 and 4.6)."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from encoders_zs3 import FAMILIES, family_of, load_encoder
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import embed_prompts, read_labels
from zs3.checkpoints import check_checkpoint, load_texts, refusing
from zs3.command_line import in_one_line, shown


class Scorer(NamedTuple):
    """What scores proposals: an image tower, the text vectors (C, D) of its encoder, and the scale of their cosines."""

    vision_model: PreTrainedModel
    text_embeds: Tensor
    logit_scale: float


def load_scorer(encoder: str, model: PreTrainedModel, names: list[str]) -> tuple[Scorer, list[str]]:
    """That of an encoder, a folder or a Hub id, on the model's device; and the prompts of the names."""
    check_checkpoint("encoder", encoder, tuple(FAMILIES))
    with refusing(f"--encoder {shown(encoder)} cannot be used"):
        towers = load_encoder(encoder)
    config = towers.text_model.config
    processor = Zs3Processor(Zs3ImageProcessor(), *load_texts(encoder, config, family_of(config).templates))
    with in_one_line("class names"):
        labels = read_labels(names, processor.prompt_templates)
        processor.check_readable(labels)
    embeds = F.normalize(embed_prompts(towers.text_model, **processor.tokenize(labels)), dim=-1)
    scorer = Scorer(towers.vision_model.to(model.device), embeds.to(model.device), towers.scale)
    return scorer, processor.prompt_templates
