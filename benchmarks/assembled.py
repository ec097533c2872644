"""Seconds and memory of checkpoints as `zs3 assemble` makes them, at real size with random weights.

    python -m benchmarks.assembled --output docs/results/assembled.json

The parts are timed one after the other for one picture of noise: the proposals, the image tower's view of them in one
pass, the text vectors of a label list (prompts of 10 tokens, as many for each label as the encoder's family has), and
the label map. A second label list costs its text vectors and its label map. The memory is the peak of the resident
memory while the model is made and all of this is done, less that before. Each pair runs in a process of its own.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    SwinConfig,
    Tipsv2TextConfig,
    Tipsv2VisionConfig,
)

from benchmarks import measuring
from configuration_zs3 import Zs3Config
from encoders_zs3 import family_of, vector_size
from label_maps_zs3 import semantic_map
from modeling_zs3 import Zs3ForSemanticSegmentation
from outputs_zs3 import own_probabilities
from processing_zs3 import Zs3ImageProcessor, padded_size
from zs3.command_line import Count, InputError, Pixels, Some, flag, read_arguments, run

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWINS = {
    "Swin-T": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "Swin-L": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
QUERIES = {"Swin-T": 100, "Swin-L": 200}


def clip(patch: int, width: int, layers: int) -> dict[str, PreTrainedConfig]:
    vision = CLIPVisionConfig(patch_size=patch, hidden_size=width, num_hidden_layers=layers, projection_dim=512)
    return {"text_config": CLIPTextConfig(projection_dim=512), "vision_config": vision}


def tipsv2(width: int, layers: int, heads: int) -> dict[str, PreTrainedConfig]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    text = Tipsv2TextConfig(**sizes | {"num_hidden_layers": 12}, intermediate_size=4 * width)
    return {"text_config": text, "vision_config": Tipsv2VisionConfig(**sizes)}


ENCODERS = {
    "CLIP_B/16": lambda: clip(16, 768, 12),
    "TIPSv2_B/14": lambda: tipsv2(768, 12, 12),
    "TIPSv2_L/14": lambda: tipsv2(1024, 24, 16),
}


@dataclass
class AssembledArgs(measuring.BenchmarkArguments):
    """Sizes of the measurement."""

    swins: Some[str] = flag(list(SWINS), f"Backbones of the proposals: {', '.join(SWINS)}.")
    encoders: Some[str] = flag(list(ENCODERS), f"Encoders: {', '.join(ENCODERS)}.")
    labels: Some[Count] = flag([150, 847], "Lengths of the label lists.")
    width: Pixels = flag(640, "Width of the picture.")
    height: Pixels = flag(480, "Height of the picture.")
    short_edge: Pixels = flag(640, "Shorter edge to which the network resizes it.")
    tiny: bool = flag(False, "Tiny towers and queries, for tests.")


def make_model(swin: str, encoder: str, tiny: bool) -> Zs3ForSemanticSegmentation:
    """A model of random weights."""
    backbone, towers = dict(SWINS[swin]), ENCODERS[encoder]()
    sizes = {"num_queries": QUERIES[swin], "proposal_classes": 133, "objectness": True, "class_head": "regions"}
    if tiny:
        backbone |= {"embed_dim": 24, "depths": [1] * 4}
        sizes |= {"num_queries": 4, "decoder_layers": 2, "encoder_layers": 1, "dim_feedforward": 64}
        for tower in towers.values():
            tower.num_hidden_layers = 1
    backbone = SwinConfig(drop_path_rate=0.0, out_features=STAGES, **backbone)
    dim = vector_size(towers["text_config"])
    return Zs3ForSemanticSegmentation(Zs3Config(backbone_config=backbone, projection_dim=dim, **towers, **sizes)).eval()


@torch.inference_mode()
def name_a_picture(args: AssembledArgs, swin: str, encoder: str, seconds: dict[str, float]) -> None:
    """Fills in the seconds of each part."""

    def timed(name: str, function: Callable) -> object:
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        return result

    torch.manual_seed(0)
    model = make_model(swin, encoder, args.tiny)
    size = {"shortest_edge": args.short_edge, "longest_edge": 4 * args.short_edge}
    processor = Zs3ImageProcessor(size=size)
    image = torch.randint(256, (args.height, args.width, 3), dtype=torch.uint8).numpy()
    inputs = processor(images=[image])
    images, templates = processor.to_rgb(inputs["pixel_values"]), len(family_of(model.config.text_config).templates)
    model.config.class_head = "learned"  # so that the proposals alone are timed
    proposals = timed("proposals", lambda: model.propose(**inputs))
    model.config.class_head = "regions"
    masks = proposals["mask_logits"], proposals["valid_sizes"]
    seen = timed("image tower", lambda: model.embed_proposals(images, *masks, view="single_pass"))
    proposals["region_embeds"] = F.normalize(torch.randn_like(seen.embeds), dim=-1)  # so that labels differ

    def label_map(text_embeds: torch.Tensor) -> None:
        probs = own_probabilities(proposals | model.classify(proposals, text_embeds))
        options = {"valid_sizes": masks[1], "image_sizes": [(args.height, args.width)]}
        semantic_map(probs, masks[0], padded_size(masks[0]), **options)

    for count in args.labels:
        ids = torch.randint(3, 200, (count, templates, 10))
        if family_of(model.config.text_config).title == "CLIP":
            ids[..., -1] = model.config.text_config.eos_token_id = 49407  # the largest id, as in CLIP
        text = timed(f"text, {count} labels", lambda ids=ids: model.encode_text(ids, torch.ones_like(ids)))
        timed(f"label map, {count} labels", lambda text=text: label_map(text))


def measure_pair(args: AssembledArgs, swin: str, encoder: str) -> dict:
    """In a process of its own."""
    torch.set_num_threads(os.cpu_count())
    seconds: dict[str, float] = {}
    peak = measuring.resident_peak(lambda: name_a_picture(args, swin, encoder, seconds))
    return {"proposals_of": swin, "encoder": encoder, "peak_mib": peak, "seconds": seconds}


def measure(args: AssembledArgs) -> list[dict]:
    pairs = [(swin, encoder) for swin in args.swins for encoder in args.encoders]
    return [measuring.in_fresh_process(measure_pair, args, *pair) for pair in pairs]


def report(result: dict) -> str:
    names = list(result["rows"][0]["seconds"])
    rows = [
        [
            row["proposals_of"],
            row["encoder"],
            *(f"{row['seconds'][name]:.2f}" for name in names),
            f"{row['peak_mib']:,.0f}",
        ]
        for row in result["rows"]
    ]
    titles = ["backbone of the proposals", "encoder", *(f"{name}, s" for name in names), "peak memory, MiB"]
    return f"""# Checkpoints of `zs3 assemble` at real size

Made by `{result["command"]}`, {result["cores"]} CPU threads. **Random weights**. One picture of
{result["width"]} x {result["height"]} pixels, shorter edge {result["short_edge"]} in the network, float32.

{measuring.table_of(titles, rows)}"""


def main() -> None:
    args, _ = read_arguments(AssembledArgs)
    for given, known in ((args.swins, SWINS), (args.encoders, ENCODERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"there is no {unknown[0]!r}: give {', '.join(known)}")
    result = {**measuring.head(), **asdict(args), "cores": os.cpu_count(), "rows": measure(args)}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
