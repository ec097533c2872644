"""How a run is spread over processes and devices, and how the parts of its model are gathered."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from torch import nn

from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import InputError
from zs3.data.batches import BatchParts, cut_batch
from zs3.training.arguments import TrainArgs


def make_accelerator(args: TrainArgs) -> tuple[Accelerator, BatchParts]:
    """The processes and devices of the run. Impossible flags are refused here, before anything is loaded."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a refusal below must not end a process before all have joined
        if torch.distributed.get_world_size() != state.num_processes:
            raise InputError(
                f"{torch.distributed.get_world_size()} processes were started, and accelerate sees no GPU for them: on "
                "CPU cores set ACCELERATE_USE_CPU=true in the environment"
            )
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU: on CPU cores give bf16 or no")
    if args.backbone_norm == "sync" and state.device.type != "cuda":
        raise InputError("--backbone_norm sync needs CUDA GPUs: give batch or frozen")
    parts = cut_batch(args.batch_size, state.num_processes, args.device_batch_size)
    check_norms(args.backbone_norm, args.crop_size, parts)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # A plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would replace a plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=parts.micro_batches),
        log_with=args.trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(args.output_dir) / "trackers")),
    )
    kind = accelerator.distributed_type
    is_old_fsdp = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if is_old_fsdp or kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"training with {kind.value} is not supported: choose several GPUs in `accelerate config`, or give "
            "--config_file recipes/accelerate/fsdp2.yaml"
        )
    if accelerator.is_fsdp2:
        # Autocast alone decides about precision. FSDP's own policy would round text vectors and losses too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return accelerator, parts


def check_norms(backbone_norm: str, crop_size: int, parts: BatchParts) -> None:
    """A batch norm needs two values or more. The last feature map has one for every 32 x 32 pixels of an image."""
    images = parts.images * (parts.processes if backbone_norm == "sync" else 1)
    if backbone_norm != "frozen" and images * math.ceil(crop_size / 32) ** 2 < 2:
        raise InputError(
            f"--backbone_norm {backbone_norm} needs two values or more, and one crop of {crop_size} pixels at a time "
            "gives one: give a larger --crop_size, more images at once, or frozen"
        )


def straighten_gradients(model: nn.Module) -> None:
    """Gives gradients the strides of their weights, because DDP warns if they differ.

    They differ for 1 x 1 convolutions of channels-last maps, but only in strides of axes of length 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.weight.requires_grad:
            module.weight.register_hook(lambda grad: grad.flatten(1)[:, :, None, None])


def go_on_after(saved_by: int, step: int, accelerator: Accelerator, *, streaming: bool, seed: int) -> None:
    """Resumes with another number of processes than saved_by, or refuses it. A note says what changes."""
    here = accelerator.num_processes
    if streaming:
        raise InputError(
            f"processes share the shards of a stream, and {saved_by} processes saved this run: resume it with "
            f"{saved_by}, not {here}, or it would read some pictures twice and miss others"
        )
    # New random numbers: neither those of the processes that saved, nor those from the beginning of the run.
    set_seed((seed + 1 + accelerator.process_index + here * step) % 2**32)
    accelerator.print(
        f"note      saved by {saved_by} processes, resumed by {here}: each step keeps its augmented images, "
        "but not its random points, nor the images over which batch norm averages"
    )


def whole_model(accelerator: Accelerator, model: nn.Module) -> Zs3ForSemanticSegmentation:
    """The trained model, for the main process to save. All processes call it together: FSDP's parts are gathered."""
    trained = accelerator.unwrap_model(model)
    if not accelerator.is_fsdp2:
        return trained
    weights = accelerator.get_state_dict(model)
    whole = Zs3ForSemanticSegmentation(trained.config)  # FSDP has changed the class of the trained one
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    return whole
