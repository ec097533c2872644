"""A whole training step, compared with transformers' Mask2Former and its own losses at the same weights.

    python -m benchmarks.train_step --output docs/results/train_step.json
    python -m benchmarks.train_step --device cuda --dtype bfloat16 --batch_size 8

A step is forward pass, loss of all decoder outputs, backward pass, gradient clipping and AdamW. Labels are Voronoi
cells; transformers gets ready-made binary masks. This project runs with Mask2Former's losses and with those of Eq. 8.
The backbone's batch norms are "frozen" (neither their statistics nor their weights change) or "live". "compiled" means
torch.compile of everything except the class heads and the losses.

First the networks are compared in float64. The mask logits, and the gradient of a random weighted sum of them, must
equal those of transformers. In float32 that would fail: a change of 1e-7 in the input of a random ResNet changes this
gradient by 1 %. `benchmarks.criterion` shows that the losses are equal.

Processes, times and the floor are as in `benchmarks.network`. The floor counts the step with Mask2Former's losses,
backward pass included. Peak memory does not include the weights and AdamW's state.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measuring, network
from benchmarks.criterion import SAME, SAME_LOSSES, binary_masks, check_classes, make_labels
from benchmarks.network import PEER, make_zs3
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import Count, Pixels, Some, flag, read_arguments, run

EQ8 = "zs3, Eq. 8"
EQUAL_GRADIENTS = 1e-3  # largest difference allowed, as a share of the gradient's norm
CLIP, LEARNING_RATE, WEIGHT_DECAY = 0.01, 5e-5, 1e-4  # section 4.3 of the paper


@dataclass
class TrainStepArgs(network.NetworkArgs):
    """Sizes of the comparison."""

    sizes: Some[Pixels] = flag([512], "Sides of the images, pixels.")
    norms: Some[str] = flag(["frozen", "live"], "Modes of the backbone's batch norms, if it has any: 'frozen', 'live'.")
    modes: Some[str] = flag(["eager"], "Modes: 'eager', 'compiled'.")
    batch_size: Count = flag(2, "Images in the batch.")
    classes: Count = flag(8, "Classes in each image.")
    points: Count = flag(12544, "Points of the mask losses.")
    rounds: Count = flag(3, "Rounds; the first is not counted.")

    def check(self) -> None:
        super().check()
        network.check_choices("norms", self.norms, ["frozen", "live"])
        check_classes(self.classes, self.class_names)


def freeze_norms(model: nn.Module) -> None:
    """Fixes the weights and statistics of the backbone's batch norms in training."""
    if isinstance(model, Zs3ForSemanticSegmentation):
        model.freeze_backbone_norms()
    else:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # only the backbone has batch norms
                module.eval().requires_grad_(False)


def logits_and_gradient(model: nn.Module, pixel_values: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits, and the gradient (one vector) of their random weighted sum for all shared weights; in float64."""
    outputs = model.double()(pixel_values.double(), **inputs)
    logits = outputs["masks_queries_logits" if "masks_queries_logits" in outputs else "mask_logits"]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (logits * weights).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(model.model.named_parameters())]
    model.zero_grad()
    model.float()
    return logits.detach(), torch.cat([grad.flatten() for grad in grads])


def held_mib(model: nn.Module) -> float:
    """The memory that stays between steps: weights, statistics, and AdamW's two values for every trained weight."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += 2 * [p for p in model.parameters() if p.requires_grad]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def make_steps(
    args: TrainStepArgs, models: dict[str, nn.Module], pixel_values: Tensor, text_embeds: Tensor, labels: Tensor
) -> dict[str, Callable[[], None]]:
    """A training step of each model."""
    masks, ids = binary_masks(labels)
    dtype = getattr(torch, args.dtype)

    def make_step(model: nn.Module, inputs: dict) -> Callable[[], None]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def step() -> None:
            with torch.autocast(labels.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(pixel_values, **inputs).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()

        return step

    theirs, own = {"mask_labels": masks, "class_labels": ids}, {"labels": labels, "text_embeds": text_embeds}
    return {name: make_step(model, theirs if name == PEER else own) for name, model in models.items()}


def compare(args: TrainStepArgs, backbone: str, size: int, norms: str, mode: str, device: torch.device) -> dict:
    """Compares all networks on the same batch."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # full float32 in all networks and in the matrix product
    same = make_zs3(backbone, train_num_points=args.points, **SAME_LOSSES)
    eq8 = make_zs3(backbone, train_num_points=args.points)
    eq8.model.load_state_dict(same.model.state_dict())
    peer = network.make_peer(backbone, args.class_names, same, train_num_points=args.points)
    models = {PEER: peer, SAME: same, EQ8: eq8}
    for model in models.values():
        model.to(device).train()
        if norms == "frozen":
            freeze_norms(model)
    pixel_values = torch.randn(args.batch_size, 3, size, size, device=device)
    text_embeds = F.normalize(torch.randn(args.class_names, same.config.projection_dim, device=device), dim=-1)
    labels = make_labels(args.batch_size, size, args.class_names, args.classes, device)

    what = f"{backbone}, {size}, {norms}, {mode}: zs3's and transformers'"
    expected = logits_and_gradient(models[PEER], pixel_values)
    found = logits_and_gradient(same, pixel_values, text_embeds=text_embeds)
    difference = network.relative_difference(found[0], expected[0])
    measuring.check_close(difference, network.EQUAL, f"{what} mask logits")
    gradient_difference = float((found[1] - expected[1]).norm() / expected[1].norm())
    measuring.check_close(gradient_difference, EQUAL_GRADIENTS, f"{what} gradients of the mask logits")
    del found, expected
    row = {"backbone": backbone, "size": size, "norms": norms, "mode": mode}
    row |= {"largest_difference": difference, "gradient_difference": gradient_difference}

    steps = make_steps(args, models, pixel_values, text_embeds, labels)
    counted = network.operations(steps[SAME])  # the counter cannot see inside compiled code
    if mode == "compiled":
        for model in models.values():
            network.compile_network(model)
    row |= network.measure_all(args, steps, counted, device)
    for name, model in models.items():
        row["networks"][name]["held_mib"] = held_mib(model)
    if args.profile is not None:
        row["operators"] = {name: network.operator_table(step, device) for name, step in steps.items()}
    return row


TITLES = "backbone | size | batch norms | mode | network | seconds a step | times faster | floor, seconds | "
TITLES += "times the floor | peak MiB | share of the peer's | share, with what stays between steps | differences"
CELLS = "{backbone} | {size} | {norms} | {mode} | {network} | {seconds:.3f} | {times_faster:.2f} | "
CELLS += "{floor_seconds:.3f} | {times_the_floor:.2f} | {peak_mib:.0f} | {peak_share:.2f} | {whole_share:.2f} | "
CELLS += "{largest_difference:.1e}, {gradient_difference:.1e}"


def all_tables(rows: list[dict]) -> str:
    for row in rows:
        theirs = row["networks"][PEER]
        row["whole_share"] = (row["peak_mib"] + row["held_mib"]) / (theirs["peak_mib"] + theirs["held_mib"])
    note = "\nDifferences from transformers': of the mask logits, of their gradient.\n"
    return measuring.table(TITLES, CELLS, rows) + note


def main() -> None:
    args, _ = read_arguments(TrainStepArgs)
    device = measuring.device_named(args.device)
    rows = []
    for backbone in args.backbones:
        kinds = args.norms if network.BACKBONES[backbone]().model_type == "resnet" else ["none"]
        for case in itertools.product(args.sizes, kinds, args.modes):
            rows.append(measuring.in_fresh_process(compare, args, backbone, *case, device))
    title = f"Batch of {args.batch_size}, {args.classes} classes an image, {args.points} points"
    network.report(args, rows, device, title, all_tables)


if __name__ == "__main__":
    run(main)
