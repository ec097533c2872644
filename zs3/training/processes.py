"""How a run is spread over processes and devices, and how its model is gathered again."""

import math
from pathlib import Path
from typing import NamedTuple

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
from zs3.training.arguments import TrainArgs


class BatchParts(NamedTuple):
    """A step's batch in equal parts: each process takes its micro-batches one after the other."""

    processes: int
    micro_batches: int
    images: int  # of one micro-batch


def cut_batch(batch_size: int, num_processes: int, device_batch_size: int | None) -> BatchParts:
    """The fewest micro-batches of at most device_batch_size images each; None: one a process.

    Raises InputError where the processes cannot have equal shares.
    """
    share, rest = divmod(batch_size, num_processes)
    if rest or not share:
        sizes = [str(n * num_processes) for n in (share, share + 1) if n]
        fewer = next(n for n in range(num_processes - 1, 0, -1) if batch_size % n == 0)
        raise InputError(
            f"--batch_size {batch_size} cannot be shared equally by {num_processes} processes: "
            f"give --batch_size {' or '.join(sizes)}, or start {fewer} process{'es' if fewer > 1 else ''}"
        )
    at_once = device_batch_size or share
    micro_batches = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= at_once)
    return BatchParts(num_processes, micro_batches, share // micro_batches)


def check_norms(backbone_norm: str, crop_size: int, parts: BatchParts) -> None:
    """A batch norm needs two values or more; the last feature map has one for every 32 x 32 pixels of an image."""
    images = parts.images * (parts.processes if backbone_norm == "sync" else 1)
    if backbone_norm != "frozen" and images * math.ceil(crop_size / 32) ** 2 < 2:
        raise InputError(
            f"--backbone_norm {backbone_norm} needs two values or more, and one crop of {crop_size} pixels at a time "
            "gives one: give a larger --crop_size, more images at once, or frozen"
        )


UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def straighten_gradients(model: nn.Module) -> None:
    """For DDP, which warns of gradients with other strides than their weights have.

    Those of 1 x 1 convolutions of channels-last maps differ in strides that no element is found by.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.weight.requires_grad:
            module.weight.register_hook(lambda grad: grad.flatten(1)[:, :, None, None])


def make_accelerator(args: TrainArgs) -> tuple[Accelerator, BatchParts]:
    """How the run is spread over processes and devices; what cannot be is refused before anything is loaded."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # what is refused below ends a process, which must not while another still joins
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
        # As a plugin, which ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment does not replace.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=parts.micro_batches),
        log_with=args.trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(args.output_dir) / "trackers")),
    )
    kind = accelerator.distributed_type
    if kind in UNSUPPORTED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise InputError(
            f"training with {kind.value} is not supported: choose several GPUs in `accelerate config`, or give "
            "--config_file recipes/accelerate/fsdp2.yaml"
        )
    if accelerator.is_fsdp2:
        # Autocast decides about precision, as without FSDP, whose own policy would round text vectors and losses too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return accelerator, parts


def go_on_after(saved_by: int, args: TrainArgs, accelerator: Accelerator, step: int) -> None:
    """Another number of processes than saved_by takes up a run: what of it is kept, in words."""
    here = accelerator.num_processes
    if args.streaming:
        raise InputError(
            f"a stream's shards are dealt out to processes, and this run was saved by {saved_by}: resume it with as "
            f"many, not {here}, or it would meet some pictures twice and miss others"
        )
    # Neither the other processes' random numbers nor those of the run's beginning again.
    set_seed((args.seed + 1 + accelerator.process_index + here * step) % 2**32)
    accelerator.print(
        f"note      saved by {saved_by} processes, resumed by {here}: each step's images and their augmentation stay; "
        "the sampled points and the images that batch norm averages over do not"
    )


def whole_model(accelerator: Accelerator, model: nn.Module) -> Zs3ForSemanticSegmentation:
    """The trained model, for the main process to save. All must ask together: FSDP's parts are gathered."""
    trained = accelerator.unwrap_model(model)
    if not accelerator.is_fsdp2:
        return trained
    weights = accelerator.get_state_dict(model)
    whole = Zs3ForSemanticSegmentation(trained.config)  # FSDP made another class of the old one
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    return whole
