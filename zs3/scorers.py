"""What scores proposals against names: a checkpoint's own frozen encoder, or another one (sections 3.4 and 4.6)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from clip_views_zs3 import ProposalEmbeds, embed_proposals
from configuration_zs3 import PatchTokens
from encoders_zs3 import FAMILIES, family_of, load_encoder
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import embed_prompts, read_labels
from zs3.checkpoints import check_checkpoint, check_finite, load_texts, refusing
from zs3.command_line import in_one_line, shown


class Scorer(NamedTuple):
    """What scores proposals.

    vision_model: an encoder's image tower. text_embeds: (C, D), of its text tower. logit_scale: of their cosines.
    patch_tokens: see `patch_means` of encoders_zs3.
    """

    vision_model: PreTrainedModel
    text_embeds: Tensor
    logit_scale: float
    patch_tokens: PatchTokens

    def embed(self, *args: object, **options: object) -> ProposalEmbeds:
        """See `embed_proposals`."""
        return embed_proposals(self.vision_model, *args, patch_tokens=self.patch_tokens, **options)


def own_scorer(model: PreTrainedModel, text_embeds: Tensor) -> Scorer:
    """A checkpoint's own. text_embeds: (C, D), of its encoder. Older code beside a checkpoint has no patch_tokens."""
    config = model.config
    patch_tokens = getattr(config, "patch_tokens", "attention")
    return Scorer(model.vision_model, text_embeds.to(model.device), config.clip_logit_scale, patch_tokens)


def load_scorer(encoder: str, names: list[str], device: torch.device) -> tuple[Scorer, list[str]]:
    """That of an encoder, a folder or a Hub id; and the prompts of the names.

    The patch tokens of TIPSv2 keep their values, as it was published for segmentation.
    """
    check_checkpoint("encoder", encoder, tuple(FAMILIES))
    with refusing(f"--encoder {shown(encoder)} cannot be used"):
        towers = load_encoder(encoder)
    for tower in (towers.text_model, towers.vision_model):
        check_finite(tower, f"--encoder {shown(encoder)}")
    config = towers.text_model.config
    tokenizer, templates = load_texts(encoder, config, family_of(config).templates)
    with refusing(f"the prompts of {shown(encoder)}"):
        processor = Zs3Processor(Zs3ImageProcessor(), tokenizer, templates)
    with in_one_line("class names"):
        labels = read_labels(names, processor.prompt_templates)
        processor.check_readable(labels)
    embeds = F.normalize(embed_prompts(towers.text_model, **processor.tokenize(labels)), dim=-1)
    scorer = Scorer(towers.vision_model.to(device), embeds.to(device), towers.scale, "values")
    return scorer, processor.prompt_templates
