"""A whole training step beside transformers' Mask2Former with its own losses, at the same weights.

    python -m benchmarks.train_step --output docs/results/train_step.json
    python -m benchmarks.train_step --device cuda --dtype bfloat16 --batch_size 8

A step is forward, loss of all decoder outputs, backward, clipping of the gradient's norm, AdamW, and letting the
gradients go. Labels are Voronoi cells; transformers is given its binary masks ready-made. This project runs with
Mask2Former's own losses and with Eq. 8's. In all networks alike, the backbone's batch norms are "frozen" (neither their
statistics nor their weights change) or "live". "compiled" is torch.compile of all but the class heads and the losses.
Before anything is measured or compiled, mask logits and the gradient of a random sum of them must equal those of
transformers' network, in float64: in float32 the gradient of a random ResNet changes by a hundredth where its input
changes by 1e-7. That the losses are equal too is shown by `benchmarks.criterion`.

Each backbone, size, kind of norms and mode has a process of its own, in which the networks and a large matrix product
take turns: time is the median over rounds, a ratio the median of the rounds' ratios; the floor is that of
`benchmarks.network`, of the step with Mask2Former's losses, backward included. Peak memory is the most a step holds at
once beyond what stays between steps, which is weights and AdamW's state: activations, gradients, buffers.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.criterion import SAME_LOSSES, CriterionArgs, device_named, in_fresh_process, make_labels
from benchmarks.network import (
    BACKBONES,
    EQUAL,
    PEER,
    check_choices,
    check_sizes,
    compile_network,
    make_peer,
    make_zs3,
    measure_all,
    operations,
    operator_table,
    relative_difference,
    report,
)
from losses_zs3 import mask_ids
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import Arguments, Count, InputError, OutputFile, Pixels, Some, flag, read_arguments, run
from zs3.tables import markdown_table

SAME, EQ8 = "zs3, the same losses", "zs3, Eq. 8"
EQUAL_GRADIENTS = 1e-3  # of the gradient's norm
CLIP, LEARNING_RATE, WEIGHT_DECAY = 0.01, 5e-5, 1e-4  # section 4.3


@dataclass
class TrainStepArgs(Arguments):
    """Sizes of the comparison."""

    backbones: Some[str] = flag(list(BACKBONES), f"Backbones, of {', '.join(BACKBONES)}.")
    sizes: Some[Pixels] = flag([512], "Sides of the images, pixels.")
    norms: Some[str] = flag(["frozen", "live"], "Batch norms of a backbone that has some: 'frozen', 'live'.")
    modes: Some[str] = flag(["eager"], "'eager', 'compiled'.")
    batch_size: Count = flag(2, "Images in the batch.")
    class_names: Count = flag(171, "Names on the class axis.")
    classes: Count = flag(8, "Classes in each image.")
    points: Count = flag(12544, "Points of the mask losses.")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "'bfloat16': forward and loss run under autocast in it.")
    rounds: Count = flag(3, "Rounds; the first is not counted.")
    gemm_size: Count = flag(2048, "Side of the matrices whose product gives the machine's rate; 8192 suits a GPU.")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "'cpu', 'cuda', or 'auto': CUDA where there is one.")
    profile: OutputFile | None = flag(None, "Text file for the operators that took longest.")
    output: OutputFile | None = flag(None, "Result file; the printed table goes beside it as .md.")

    def check(self) -> None:
        check_choices("backbones", self.backbones, list(BACKBONES))
        check_choices("norms", self.norms, ["frozen", "live"])
        check_choices("modes", self.modes, ["eager", "compiled"])
        check_sizes(self.sizes)
        if self.classes > self.class_names:
            raise InputError(f"--classes must be at most --class_names {self.class_names}, got {self.classes}")


def freeze_norms(model: nn.Module) -> None:
    """In training, no batch norm of the backbone learns or moves its statistics."""
    if isinstance(model, Zs3ForSemanticSegmentation):
        model.freeze_backbone_norms()
    else:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # there are none elsewhere
                module.eval().requires_grad_(False)


def logits_and_gradient(model: nn.Module, pixel_values: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits, and the gradient of a random sum of them by all that the networks share, one vector; in float64."""
    outputs = model.double()(pixel_values.double(), **inputs)
    logits = outputs["masks_queries_logits" if "masks_queries_logits" in outputs else "mask_logits"]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (logits * weights).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(model.model.named_parameters())]
    model.zero_grad()
    model.float()
    return logits.detach(), torch.cat([grad.flatten() for grad in grads])


def held_mib(model: nn.Module) -> float:
    """What stays between steps: weights, statistics, and AdamW's two values for every weight that learns."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += 2 * [p for p in model.parameters() if p.requires_grad]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def make_steps(
    args: TrainStepArgs, models: dict[str, nn.Module], pixel_values: Tensor, text_embeds: Tensor, labels: Tensor
) -> dict[str, Callable[[], None]]:
    """A training step of each."""
    ids = [present.to(labels.device) for present in mask_ids(labels)]
    masks = [(label_map == present[:, None, None]).float() for label_map, present in zip(labels, ids, strict=True)]
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
    """All networks on the same batch."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for everyone, the matrix product included
    same = make_zs3(backbone, train_num_points=args.points, **SAME_LOSSES)
    eq8 = make_zs3(backbone, train_num_points=args.points)
    eq8.model.load_state_dict(same.model.state_dict())
    models = {PEER: make_peer(backbone, args.class_names, same, train_num_points=args.points), SAME: same, EQ8: eq8}
    for model in models.values():
        model.to(device).train()
        if norms == "frozen":
            freeze_norms(model)
    pixel_values = torch.randn(args.batch_size, 3, size, size, device=device)
    text_embeds = F.normalize(torch.randn(args.class_names, same.config.projection_dim, device=device), dim=-1)
    sizes = CriterionArgs(batch_size=args.batch_size, size=size, class_names=args.class_names)
    labels = make_labels(sizes, args.classes, device)

    expected = logits_and_gradient(models[PEER], pixel_values)
    found = logits_and_gradient(same, pixel_values, text_embeds=text_embeds)
    difference = relative_difference(found[0], expected[0])
    gradient_difference = float((found[1] - expected[1]).norm() / expected[1].norm())
    if not (difference <= EQUAL and gradient_difference <= EQUAL_GRADIENTS):
        raise InputError(
            f"{backbone}, {size}, {norms}, {mode}: mask logits differ from transformers' by {difference:.1e}, their "
            f"gradient by {gradient_difference:.1e}: no comparison of speed means anything then"
        )
    del found, expected
    row = {"backbone": backbone, "size": size, "norms": norms, "mode": mode}
    row |= {"largest_difference": difference, "gradient_difference": gradient_difference}

    steps = make_steps(args, models, pixel_values, text_embeds, labels)
    row["operations"] = operations(steps[SAME])  # counting does not see into compiled code
    if mode == "compiled":
        for model in models.values():
            compile_network(model)
    row |= measure_all(steps, args.rounds, args.gemm_size, getattr(torch, args.dtype), device)
    for name, model in models.items():
        row["networks"][name]["held_mib"] = held_mib(model)
    if args.profile is not None:
        row["operators"] = {name: operator_table(step, device) for name, step in steps.items()}
    return row


def table(rows: list[dict]) -> str:
    """Markdown."""
    head = ["backbone", "size", "batch norms", "mode", "network", "seconds a step", "times faster", "floor, seconds"]
    head += ["times the floor", "peak MiB", "share of the peer's", "share, with what stays between steps"]
    lines = []
    for row in rows:
        theirs = row["networks"][PEER]
        for name, network in row["networks"].items():
            whole = (network["peak_mib"] + network["held_mib"]) / (theirs["peak_mib"] + theirs["held_mib"])
            cells = [row["backbone"], str(row["size"]), row["norms"], row["mode"], name, f"{network['seconds']:.3f}"]
            cells += [f"{network['times_faster']:.2f}", f"{row['floor_seconds']:.3f}"]
            cells += [f"{network['times_the_floor']:.2f}", f"{network['peak_mib']:.0f}", f"{network['peak_share']:.2f}"]
            differences = f"{row['largest_difference']:.1e}, {row['gradient_difference']:.1e}"
            lines.append([*cells, f"{whole:.2f}", differences])
    return "\n".join(markdown_table([*head, "differences"], lines)) + "\n"


def main() -> None:
    args, _ = read_arguments(TrainStepArgs)
    device = device_named(args.device)
    rows = []
    for backbone in args.backbones:
        kinds = args.norms if BACKBONES[backbone]().model_type == "resnet" else ["none"]
        for size, norms, mode in itertools.product(args.sizes, kinds, args.modes):
            rows.append(in_fresh_process(compare, args, backbone, size, norms, mode, device))
    title = f"Batch of {args.batch_size}, {args.classes} classes an image, {args.points} points"
    note = "\nDifferences from transformers': of the mask logits, of their gradient.\n"
    report(args, rows, device, title, lambda rows: table(rows) + note)


if __name__ == "__main__":
    run(main)
