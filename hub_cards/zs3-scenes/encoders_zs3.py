"""The encoders that see texts and pictures in one space: what each family reads, and how it sees regions.

FAMILIES has a record of each family. A further family needs a record, and a function of its own if it sees regions in
another way. `text_vectors`: tokens -> vectors. `picture_vectors`: whole pictures, or crops -> vectors.
`region_vectors`: all regions of a picture, in one pass over it -> vectors. None of them normalises the vectors.

Axes: N text, picture or region, L token, P patch, D embedding; H W pixels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Tipsv2VisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer  # not in transformers' own list of names

try:
    from .configuration_zs3 import PatchTokens, Refused, shortened
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import PatchTokens, Refused, shortened

# The 14 templates of Gu et al. 2022 (ViLD), as the paper's ancestors use them.
PROMPT_TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
# The 9 templates of Cha et al. 2023 (TCL), with which TIPSv2 was evaluated.
TCL_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
)


# Windows of a picture, see `square_windows`. TIPSv2 was evaluated with such windows.
WINDOW_OVERLAP, NEARLY_SQUARE = 0.25, 1.25


class Family(NamedTuple):
    """How the encoders of a family are used. Classes and fields are transformers'.

    title: the family in messages. model, text_model, vision_model: the classes of the whole encoder and of its towers.
    text_output, picture_output: the towers' outputs that hold the vectors of texts and pictures.
    dim: the field of a tower's configuration that holds D.
    text_fields: fields of the text tower's configuration that change its vectors, but not the names and shapes of its
        weights.
    tokenizer: its class. It makes texts lower-case itself, and pads them to the longest.
    templates: prompts.
    scale: of a whole encoder, the number that multiplies cosines before a softmax.
    mean, std: of pixels, for RGB in [0, 1].
    sides: side of a window of the picture in `region_vectors`, in sides of the pictures of its training.
    soft: whether regions are masks M in [0, 1], not M > threshold.
    regions: see `region_vectors`.
    """

    title: str
    model: str
    text_model: str
    vision_model: str
    text_output: str
    picture_output: str
    dim: str
    text_fields: tuple[str, ...]
    tokenizer: type[PreTrainedTokenizerBase]
    templates: tuple[str, ...]
    scale: Callable[[PreTrainedModel], float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sides: float
    soft: bool
    regions: Callable[[PreTrainedModel, Tensor, Tensor, PatchTokens], Tensor]


# ----------------------------------------------------------------------------------------------------------- regions


def class_token_copies(
    tower: CLIPVisionModelWithProjection, pixels: Tensor, covered: Tensor, patch_tokens: PatchTokens
) -> Tensor:
    """Every region is a copy of CLIP's class token. It reads each patch as far as the region covers the patch.

    No other token reads it, so patches are those of CLIP's own pass over the picture. Nothing is trained. The idea is
    that of MaskCLIP (Ding et al. 2023) and MAFT (Jiao et al. 2023). See `region_vectors`; patch_tokens is not used.
    """
    vision = tower.vision_model
    hidden = vision.embeddings(pixels, interpolate_pos_encoding=True)  # (1, 1 + P, width)
    known = hidden.shape[1]
    hidden = torch.cat([hidden, hidden[:, :1].expand(-1, len(covered), -1)], dim=1)
    bias = hidden.new_full((hidden.shape[1], hidden.shape[1]), -torch.inf)
    bias[:known, :known] = 0
    bias[known:, 1:known] = covered.to(bias).log()
    bias[known:, known:].fill_diagonal_(0)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden), attention_mask=bias[None, None])
    return tower.visual_projection(vision.post_layernorm(hidden.last_hidden_state[0, known:]))


def patch_means(tower: Tipsv2VisionModel, pixels: Tensor, covered: Tensor, patch_tokens: PatchTokens) -> Tensor:
    """Every region is the mean of the unit vectors of its patch tokens, each as far as the region covers the patch.

    patch_tokens: in the last block, tokens attend to each other ("attention"), or keep their own values ("values": as
    TIPSv2 was published for segmentation). See `region_vectors`.
    """
    if patch_tokens == "attention":
        tokens = tower(pixel_values=pixels).last_hidden_state
    else:
        hidden = tower.embeddings(pixels)
        for block in tower.encoder.layer[:-1]:
            hidden = block(hidden)
        last = tower.encoder.layer[-1]
        values = last.attention.o_proj(last.attention.v_proj(last.norm1(hidden)))
        hidden = hidden + last.layer_scale1(values)
        hidden = hidden + last.layer_scale2(last.mlp(last.norm2(hidden)))
        tokens = tower.layernorm(hidden)
    patches = F.normalize(tokens[0, 1 + tower.config.num_register_tokens :].float(), dim=-1)  # (P, D)
    weight = covered.to(patches)
    return weight @ patches / weight.sum(dim=1, keepdim=True)


# --------------------------------------------------------------------------------------------------------- the table

FAMILIES = {
    "clip": Family(
        title="CLIP",
        model="CLIPModel",
        text_model="CLIPTextModelWithProjection",
        vision_model="CLIPVisionModelWithProjection",
        text_output="text_embeds",
        picture_output="image_embeds",
        dim="projection_dim",
        text_fields=("eos_token_id", "hidden_act", "layer_norm_eps", "num_attention_heads", "projection_dim"),
        tokenizer=CLIPTokenizer,
        templates=PROMPT_TEMPLATES,
        scale=lambda encoder: encoder.logit_scale.exp().item(),
        mean=tuple(OPENAI_CLIP_MEAN),
        std=tuple(OPENAI_CLIP_STD),
        sides=2.0,
        soft=False,
        regions=class_token_copies,
    ),
    "tipsv2": Family(
        title="TIPSv2",
        model="Tipsv2Model",
        text_model="Tipsv2TextModel",
        vision_model="Tipsv2VisionModel",
        text_output="pooler_output",
        picture_output="pooler_output",
        dim="hidden_size",
        text_fields=("hidden_act", "layer_norm_eps", "num_attention_heads", "scale_sqrt_depth", "pooling_epsilon"),
        tokenizer=Tipsv2Tokenizer,
        templates=TCL_TEMPLATES,
        scale=lambda encoder: 1 / encoder.temperature.item(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        sides=1.0,
        soft=True,
        regions=patch_means,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of an encoder's configuration, or of one of its towers'. Raises Refused for another model."""
    kind = str(config.model_type).removesuffix("_text_model").removesuffix("_vision_model")
    if kind not in FAMILIES:
        known = " or ".join(family.title for family in FAMILIES.values())
        raise Refused(f"an encoder must be a {known}, got a {config.model_type}")
    return FAMILIES[kind]


def vector_size(config: PreTrainedConfig) -> int:
    """D of a tower's configuration."""
    return getattr(config, family_of(config).dim)


def check_towers(text: PreTrainedConfig | None, vision: PreTrainedConfig | None, size: int) -> None:
    """Raises Refused where the towers' configurations are not those of one encoder with vectors of `size` numbers."""
    for kind, config in (("text", text), ("vision", vision)):
        if config is None:
            continue
        family = family_of(config)
        if not config.model_type.endswith(f"_{kind}_model"):
            raise Refused(f"{kind}_config is a {config.model_type}, not the {kind} tower of an encoder")
        if vector_size(config) != size:
            raise Refused(f"the {kind} tower makes vectors of {vector_size(config)} numbers, projection_dim is {size}")
        if kind == "vision" and not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
            raise Refused("an image tower must have square pictures and patches: image_size and patch_size are numbers")
        if text is not None and family_of(text) is not family:
            raise Refused(f"the text tower is a {family_of(text).title}'s, the image tower a {family.title}'s")


def new_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower of random weights. config: a text tower's or an image tower's."""
    family = family_of(config)
    kind = family.vision_model if config.model_type.endswith("_vision_model") else family.text_model
    return getattr(transformers, kind)._from_config(config)


class Encoder(NamedTuple):
    """The towers of a whole encoder, and the number that multiplies its cosines before a softmax."""

    text_model: PreTrainedModel
    vision_model: PreTrainedModel
    scale: float


def load_encoder(source: str) -> Encoder:
    """The encoder of a Hub id or a folder, in float32 and in eval mode. Raises Refused where it is no whole one."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise Refused(f"an encoder must be a whole {' or '.join(FAMILIES)}, got a {config.model_type}")
    family = family_of(config)
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    whole, loading = getattr(transformers, family.model).from_pretrained(source, **options)
    lost = sorted(set(loading["missing_keys"]) - {"temperature"})  # which published TIPSv2 leave out
    if lost:
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        raise Refused(f"the encoder lacks weights of a {family.title}: {shortened(lost[0])}{more}")
    towers = []
    for name in ("text", "vision"):
        tower_config = getattr(config, f"{name}_config")
        if hasattr(config, family.dim):  # the tower's own may be another one
            setattr(tower_config, family.dim, getattr(config, family.dim))
        towers.append(new_tower(tower_config).eval())
        load_into(towers[-1], whole, f"{name}_model.")
    return Encoder(*towers, family.scale(whole))


def load_into(module: nn.Module, source: nn.Module, prefix: str = "") -> None:
    """Copies the weights of `module` from a model that has them under the same names, or under `prefix` and the name.

    The model may have others, too.
    """
    weights = source.state_dict()
    names = {name: name if name in weights else prefix + name for name in module.state_dict()}
    module.load_state_dict({name: weights[its] for name, its in names.items()})


# ----------------------------------------------------------------------------------------------------------- vectors


def text_vectors(tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, D) of N texts; input_ids and attention_mask: (N, L)."""
    output = tower(input_ids=input_ids, attention_mask=attention_mask)
    return output[family_of(tower.config).text_output]


def picture_vectors(tower: PreTrainedModel, pixels: Tensor) -> Tensor:
    """(N, D) of N pictures; pixels: (N, 3, S, S), of `normalised`."""
    return tower(pixels)[family_of(tower.config).picture_output]


def normalised(tower: PreTrainedModel, image: Tensor) -> Tensor:
    """(3, H, W) RGB in [0, 1] -> as the image tower takes it, float32."""
    family, image = family_of(tower.config), image.float()
    mean, std = (image.new_tensor(value).view(3, 1, 1) for value in (family.mean, family.std))
    return (image - mean) / std


def square_windows(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows in which a picture of (height, width) is seen: squares of its shorter side.

    They are evenly spread, and overlap by WINDOW_OVERLAP or more. A picture that is nearly square is one window.
    """
    short, long = min(size), max(size)
    if long <= NEARLY_SQUARE * short:
        return [(slice(0, size[0]), slice(0, size[1]))]
    count = 1 + math.ceil((long - short) / (short * (1 - WINDOW_OVERLAP)))
    starts = [round(place * (long - short) / (count - 1)) for place in range(count)]
    whole, parts = slice(0, short), [slice(start, start + short) for start in starts]
    return [(part, whole) if size[0] > size[1] else (whole, part) for part in parts]


def patch_grid(tower: PreTrainedModel, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in which `region_vectors` sees a picture, or a window of one, of (height, width)."""
    config = tower.config
    scale = family_of(config).sides * config.image_size / (size[0] * size[1]) ** 0.5
    return tuple(max(1, round(side * scale / config.patch_size)) for side in size)


def region_vectors(
    tower: PreTrainedModel, image: Tensor, covered: Tensor, patch_tokens: PatchTokens = "attention"
) -> Tensor:
    """(N, D) of N regions of a picture, or of a window of one, from one pass over it.

    image: (3, H, W) RGB in [0, 1]. covered: (N, P) in [0, 1], the share of each patch of `patch_grid` that a region
    covers; no region covers nothing. patch_tokens: see `patch_means`.
    """
    grid = patch_grid(tower, image.shape[1:])
    size = [side * tower.config.patch_size for side in grid]
    pixels = F.interpolate(
        normalised(tower, image)[None], size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return family_of(tower.config).regions(tower, pixels, covered, patch_tokens)
