"""Exports the visual part of a checkpoint (torch.export or ONNX): from pixels and text vectors to proposals.

    zs3 export --model runs/demo/stage2/final --output zs3.pt2
    zs3 export --model runs/demo/stage2/final --output zs3.onnx

Inputs: pixel_values (B, 3, H, W), normalised, H and W at least 33; text_embeds (C, D) of any label list, from the
model's `encode_text` or `vocabulary`. Outputs: class_probs (B, Q, C) and mask_logits (B, Q, h, w) of Eq. 4. B, H, W and
C are free at run time. The file needs neither this project nor transformers.
"""

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from configuration_zs3 import SIZE_DIVISOR
from modeling_zs3 import Zs3ForSemanticSegmentation
from outputs_zs3 import class_probabilities
from zs3.checkpoints import load_model
from zs3.command_line import Arguments, InputError, OutputFile, check_required, flag, read_arguments
from zs3.files import naming

INPUTS, OUTPUTS = ["pixel_values", "text_embeds"], ["class_probs", "mask_logits"]
SIZES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "text_embeds": {0: "num_classes"}}  # free at run time
FEWEST_TILES, MOST_TILES = 2, 1024  # of 32 pixels along a side; feature maps of one row take other branches
SIDE = {"min": (FEWEST_TILES - 1) * SIZE_DIVISOR + 1, "max": MOST_TILES * SIZE_DIVISOR}  # pixels


class VisualPart(nn.Module):
    """`model(pixel_values, text_embeds=text_embeds)` as a function of tensors only, for tracing."""

    def __init__(self, model: Zs3ForSemanticSegmentation):
        super().__init__()
        self.model = model.without_towers("text_model", "vision_model")
        self.model.register_buffer("vocabulary", None)

    def forward(self, pixel_values: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """pixel_values (B, 3, H, W), text_embeds (C, D) -> class_probs (B, Q, C), mask_logits (B, Q, h, w).

        The image is padded by zeros to multiples of 32, as in the model; h and w are a quarter of the padded size.
        """
        height, width = pixel_values.shape[2:]
        pixel_values = F.pad(pixel_values, (0, _padded(width) - width, 0, _padded(height) - height))
        with FreeSizes():  # transformers' forward: ONNX has all its operators
            outputs = self.model.model(pixel_values, output_hidden_states=True, return_dict=True)
        class_embeds = self.model.class_projection(outputs.transformer_decoder_intermediate_states[-1].transpose(0, 1))
        class_probs = class_probabilities(**self.model.classify({"class_embeds": class_embeds}, text_embeds))
        return class_probs, outputs.masks_queries_logits[-1]


def _padded(side: int) -> int:
    """The next multiple of 32.

    The tracer gets the number of tiles as a new value. Its formulas of sizes stay short, and tracing and loading fast.
    """
    tiles = 1 + (side - 1) // SIZE_DIVISOR  # without negative numbers, whose quotient ONNX would round up
    tiles = torch.full((), tiles, dtype=torch.int64).item()
    for fact in (tiles >= FEWEST_TILES, tiles <= MOST_TILES, tiles * SIZE_DIVISOR >= side):
        torch._check(fact)
    return tiles * SIZE_DIVISOR


class FreeSizes(TorchFunctionMode):
    """Keeps sizes free that transformers' Mask2Former passes to torch.tensor and torch.linspace while it is traced.

    These functions take no symbols: they would make the traced size a constant of the program.
    """

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and _holds_symbol(args[0]):
            return _as_tensor(args[0]).to(**kwargs)
        if function is torch.linspace and _holds_symbol(args):
            first, _, steps = args  # the centres of `steps` pixels, 0.5, 1.5, ...
            return torch.arange(steps, **kwargs) + first
        return function(*args, **kwargs)


def _holds_symbol(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_symbol(item) for item in value)
    return isinstance(value, torch.SymInt)


def _as_tensor(value: list | tuple | int | torch.SymInt) -> Tensor:
    """Nested lists of sizes -> int64 tensor."""
    if isinstance(value, list | tuple):
        return torch.stack([_as_tensor(item) for item in value])
    return torch.full((), value, dtype=torch.int64)


def export_visual(model: Zs3ForSemanticSegmentation) -> ExportedProgram:
    """VisualPart, traced with the free sizes SIZES, on the model's device and in its precision."""
    if model.training:
        raise InputError("a model in training mode cannot be exported: call model.eval() first")
    if model.config.class_head == "regions":
        raise InputError(
            "class_head 'regions' cannot be exported: its names come from the image tower, not from the exported part"
        )
    if model.config.backbone_config.model_type == "swin":
        raise InputError("a Swin backbone cannot be exported: its windows depend on the size of the image")
    # Different sizes, no multiples of 32, so that the tracer cannot confuse them.
    pixel_values = torch.zeros(2, 3, 150, 90, dtype=model.dtype, device=model.device)
    text_embeds = torch.zeros(4, model.config.projection_dim, device=model.device)
    limits = {"height": SIDE, "width": SIDE}
    sizes = {
        name: {axis: Dim(size, **limits.get(size, {"min": 1})) for axis, size in axes.items()}
        for name, axes in SIZES.items()
    }
    with torch.no_grad():
        part = VisualPart(model).eval()
        return torch.export.export(part, (pixel_values, text_embeds), dynamic_shapes=sizes, strict=False)


def save(program: ExportedProgram, path: Path) -> None:
    """Writes .pt2 or .onnx, by the suffix. The file is moved from a temporary folder when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.TemporaryDirectory(prefix=".export.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        if path.suffix == ".onnx":
            _onnx(program).save(partial)
        else:
            torch.export.save(program, partial)
        for file in sorted(partial.parent.iterdir(), reverse=True):  # NAME.onnx.data, if there is one, before NAME
            os.replace(file, path.with_name(file.name))


def _onnx(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their warnings are for their own developers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning for PyTorch's developers
        return torch.onnx.export(
            program, dynamo=True, input_names=INPUTS, output_names=OUTPUTS, dynamic_shapes=SIZES, verbose=False
        )


@dataclass
class ExportArgs(Arguments):
    """Exports the visual part of a checkpoint to one file."""

    model: str | None = flag(None, "Checkpoint: a folder or a Hub id.")
    trust_remote_code: bool = flag(False, "Run the code that lies beside the checkpoint, in place of this project's.")
    output: OutputFile | None = flag(
        None, "File to write: .pt2 (torch.export) or .onnx, which needs the extra `export`."
    )

    def check(self) -> None:
        check_required(self, "model", "output")
        suffix = Path(self.output).suffix
        if suffix not in (".pt2", ".onnx"):
            raise InputError(f"--output {self.output}: the suffix says the kind, .pt2 (torch.export) or .onnx")
        if suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
            raise InputError(f"--output {self.output} needs onnxscript: pip install -c constraints.txt -e '.[export]'")


def main() -> None:
    args, _ = read_arguments(ExportArgs)
    model = load_model(args.model, args.trust_remote_code)
    print("tracing: about a minute, for ONNX several", flush=True)
    save(export_visual(model), Path(args.output))
    print(f"{args.output}: {', '.join(INPUTS)} (C, {model.config.projection_dim}) -> {', '.join(OUTPUTS)}")
