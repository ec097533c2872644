"""Tiny models and checkpoints that the tests share. They are made here, so that the tests need no download."""

import json
from pathlib import Path

import torch
import transformers
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ResNetConfig,
    Tipsv2TextConfig,
    Tipsv2VisionConfig,
)
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer

from configuration_zs3 import Zs3Config
from encoders_zs3 import FAMILIES
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from zs3.scenes.render import CLASS_NAMES as SCENES
from zs3.scenes.render import UNSEEN

CLASS_NAMES = ["sky", "grass", "red circle", "blue square"]


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def byte_tokenizer(family: str = "clip") -> PreTrainedTokenizerBase:
    """A tokenizer without merges: every byte is a token."""
    if family == "tipsv2":
        words = ["<pad>", "<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
        return Tipsv2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 77
    return tokenizer


def tiny_towers(family: str) -> dict[str, PreTrainedConfig]:
    """The towers of a tiny encoder of a family."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "tipsv2":
        text = Tipsv2TextConfig(**sizes, vocab_size=300, intermediate_size=32)
        return {"text_config": text, "vision_config": Tipsv2VisionConfig(**sizes, image_size=16, patch_size=8)}
    sizes |= {"intermediate_size": 32, "projection_dim": 12}
    text = CLIPTextConfig(**sizes, vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513)
    return {"text_config": text, "vision_config": CLIPVisionConfig(**sizes, image_size=16, patch_size=8)}


def tiny_config(text: bool = True, vision: bool = False, family: str = "clip", **overrides) -> Zs3Config:
    backbone = ResNetConfig(
        layer_type="basic",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        embedding_size=8,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    wanted = {"text_config": text, "vision_config": vision}
    towers = {name: config.to_dict() for name, config in tiny_towers(family).items() if wanted[name]}
    sizes = {
        "hidden_dim": 32,
        "feature_size": 32,
        "mask_feature_size": 32,
        "num_queries": 5,
        "decoder_layers": 3,
        "encoder_layers": 1,
        "num_attention_heads": 2,
        "dim_feedforward": 32,
        "encoder_feedforward_dim": 32,
        "projection_dim": {"clip": 12, "tipsv2": 16}[family],
        "train_num_points": 64,
    }
    return Zs3Config(**{"backbone_config": backbone.to_dict(), **towers, **sizes, **overrides})


def tiny_model(seed: int = 0, **kwargs) -> Zs3ForSemanticSegmentation:
    """A model with random weights. They are scaled so that queries differ and label maps have several classes."""
    torch.manual_seed(seed)
    model = Zs3ForSemanticSegmentation(tiny_config(**kwargs)).eval()
    module = model.model.transformer_module
    with torch.no_grad():
        module.queries_features.weight.normal_(std=3.0)
        module.queries_embedder.weight.normal_(std=3.0)
        module.decoder.mask_predictor.mask_embedder.get_submodule("2.0").weight.mul_(100)
    return model


def tiny_mask2former(num_labels: int = 3) -> Mask2FormerForUniversalSegmentation:
    """transformers' own Mask2Former of the tiny model's size; its class predictor has an opinion."""
    config = tiny_config(text=False).to_dict()
    fields = {name: config[name] for name in Mask2FormerConfig.__dataclass_fields__ if name in config}
    names = {"id2label": {index: f"class {index}" for index in range(num_labels)}, "label2id": None}
    torch.manual_seed(2)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**fields | names)).eval()
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=0.5)
    return model


def tiny_encoder(family: str) -> PreTrainedModel:
    """transformers' own encoder of both towers, with random weights."""
    torch.manual_seed(1)
    kind = getattr(transformers, FAMILIES[family].model)
    fields = {name: config.to_dict() for name, config in tiny_towers(family).items()}
    fields |= {"projection_dim": 12} if family == "clip" else {}
    model = kind(kind.config_class(**fields)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))  # biases and norms that are seen
    return model


def save_checkpoint(folder: Path, **kwargs) -> Zs3ForSemanticSegmentation:
    """Saves a whole checkpoint: weights, config, processor and code. CLASS_NAMES is its vocabulary."""
    model = tiny_model(**kwargs)
    image_processor = Zs3ImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    family = kwargs.get("family", "clip")
    processor = (
        Zs3Processor(image_processor, byte_tokenizer(family)) if model.text_model is not None else image_processor
    )
    if model.text_model is not None:
        embeds = model.encode_text(**processor(class_names=CLASS_NAMES))
    else:
        embeds = torch.randn(len(CLASS_NAMES), model.config.projection_dim)
    model.set_vocabulary(CLASS_NAMES, embeds)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def save_scenes_checkpoint(folder: Path, **kwargs) -> Path:
    """An untrained model whose masks are sharpened, with text vectors of the names of `scenes` near what its queries
    are compared with: many classes occur."""
    model = tiny_model(text=False, **kwargs)
    for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
        parameter.data *= 2
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 64), text_embeds=torch.randn(1, model.config.projection_dim))
    embeds = (outputs.class_embeds if outputs.region_embeds is None else outputs.region_embeds)[0]
    queries = (embeds - embeds.mean(0))[[(0, 2, 4)[index % 3] for index in range(len(SCENES))]]
    if outputs.region_embeds is not None:  # what all regions have in common must not decide
        common = torch.nn.functional.normalize(embeds.mean(0), dim=0)
        queries = queries - (queries @ common)[:, None] * common
    model.set_vocabulary(SCENES, queries + 0.1 * queries.std() * torch.randn_like(queries))
    model.config.seen_class_names = [name for name in SCENES if name not in UNSEEN]
    model.save_pretrained(folder)
    Zs3ImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder
