"""The network's forward beside transformers' Mask2Former at the same weights, and beside what the operations allow.

    python -m benchmarks.network --output docs/results/network.json
    python -m benchmarks.network --device cuda --dtype bfloat16 --backbones resnet50 --sizes 512 --modes eager

Both networks are in eval mode. "compiled" is torch.compile of all but the class heads. Weights are random, those of
batch norms too. Mask logits must equal those of transformers' eager network to 1e-4 of the largest: of eager networks
in float64, of compiled ones in float32. Each backbone, size and mode has a process of its own, in which the networks
and a large matrix product take turns. Time is the median over rounds, a ratio the median of the rounds' ratios. Memory
is the peak of what a forward allocates beyond the weights.

The floor is the time that the convolutions and matrix products (attention included) of a forward would take at the rate
of the large matrix product's best round.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

import network_zs3
from benchmarks import measuring
from configuration_zs3 import Zs3Config
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import Count, InputError, OutputFile, Pixels, Some, flag, read_arguments, run
from zs3.files import write_text

PEER, OURS, GEMM = "transformers' Mask2Former", "zs3", "matrix product"
EQUAL = 1e-4  # of the largest mask logit
STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "resnet50": lambda: ResNetConfig(out_features=STAGES),
    # Swin-T. It has no stochastic depth, so that outputs can be compared in training.
    "swin_tiny": lambda: SwinConfig(drop_path_rate=0.0, out_features=STAGES),
}
ARCHITECTURE: dict[str, int] = {}  # what differs from Mask2Former's own
PARTS, REST = ("backbone", "deformable encoder", "rest of the pixel decoder", "transformer decoder"), "rest"


@dataclass
class NetworkArgs(measuring.DeviceArguments):
    """Sizes of the comparison."""

    backbones: Some[str] = flag(list(BACKBONES), f"Backbones, of {', '.join(BACKBONES)}.")
    sizes: Some[Pixels] = flag([512, 640], "Sides of the images, pixels.")
    modes: Some[str] = flag(["eager", "compiled"], "'eager', 'compiled'.")
    batch_size: Count = flag(1, "Images at once.")
    class_names: Count = flag(171, "Names on the class axis.")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "'bfloat16': the forwards run under autocast in it.")
    gemm_size: Count = flag(2048, "Side of the matrices whose product gives the machine's rate; 8192 suits a GPU.")
    profile: OutputFile | None = flag(None, "Text file for the operators that took longest.")

    def check(self) -> None:
        check_choices("backbones", self.backbones, list(BACKBONES))
        check_choices("modes", self.modes, ["eager", "compiled"])
        for size in self.sizes:
            if size < 64 or size % 32:
                raise InputError(f"a side must be 64 or more and a multiple of 32, got {size}")


def check_choices(name: str, given: list[str], known: list[str]) -> None:
    for word in given:
        if word not in known:
            raise InputError(f"--{name} takes some of {', '.join(known)}, got {word!r}")


def make_zs3(backbone: str, **losses: object) -> Zs3ForSemanticSegmentation:
    """Random weights: batch norms and attention that do something, sampling points that lie between pixels, not on
    them, where a gradient has two values."""
    config = Zs3Config(
        backbone_config=BACKBONES[backbone](), **ARCHITECTURE, **losses, text_config=None, vision_config=None
    )
    model = Zs3ForSemanticSegmentation(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if hasattr(module, "sampling_offsets"):
            nn.init.normal_(module.sampling_offsets.weight, std=0.02)
            module.sampling_offsets.bias.data.add_(0.3 * torch.randn_like(module.sampling_offsets.bias))
            nn.init.normal_(module.attention_weights.weight, std=0.02)
    return model


def make_peer(
    backbone: str, class_names: int, weights: Zs3ForSemanticSegmentation, **losses: object
) -> Mask2FormerForUniversalSegmentation:
    """transformers' network with the weights of this project's; its class head is its own."""
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone](), **ARCHITECTURE, **losses, num_labels=class_names)
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.load_state_dict(weights.model.state_dict())
    return model


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, of the largest size; NaN where either has one."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products of a step, two a multiplication."""
    # Fused attention on the CPU is no operation that the counter knows; taken apart, its products are counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compile_network(model: nn.Module) -> None:
    """All but transformers' class heads, and this project's comparison with the text vectors."""
    if isinstance(model, Zs3ForSemanticSegmentation):
        model._proposals = torch.compile(model._proposals)
    else:
        model.model.compile()


def graph_breaks(step: Callable[[], object]) -> int:
    """Of the compiled networks in a step that compiles them."""
    counters["graph_break"].clear()
    step()
    return sum(counters["graph_break"].values())


def parts_of(model: nn.Module) -> dict[str, tuple[object, str]]:
    """What is called for each part of a network: an object and the name of its method or function."""
    if isinstance(model, Zs3ForSemanticSegmentation):
        names = ("backbone_features", "encoder_layer", "pixel_decoder", "transformer_decoder")
        return {part: (network_zs3, name) for part, name in zip(PARTS, names, strict=True)}
    decoder = model.model.pixel_level_module.decoder
    modules = (model.model.pixel_level_module.encoder, decoder.encoder, decoder, model.model.transformer_module)
    return {part: (module, "forward") for part, module in zip(PARTS, modules, strict=True)}


def seconds_of_parts(
    parts: dict[str, tuple[object, str]], step: Callable[[], object], rounds: int, device: torch.device
) -> dict[str, float]:
    """Mean seconds of a step by part, without the parts inside it."""
    seconds = dict.fromkeys([*parts, REST], 0.0)
    running, since = [REST], 0.0

    def charge() -> None:
        nonlocal since
        measuring.wait_for(device)
        now = time.perf_counter()
        seconds[running[-1]] += now - since
        since = now

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            charge()
            running.append(part)
            result = function(*args, **kwargs)
            charge()
            running.pop()
            return result

        return call

    with ExitStack() as stack:
        for part, (owner, name) in parts.items():
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        since = time.perf_counter()
        for _ in range(rounds):
            step()
        charge()
    return {part: total / rounds for part, total in seconds.items()}


def operator_table(step: Callable[[], object], device: torch.device) -> str:
    """The operators of a step that took longest."""
    with profile() as profiler:
        step()
    kind = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=kind, row_limit=25)


def difference_in_float64(ours: nn.Module, peer: nn.Module, pixel_values: Tensor, text_embeds: Tensor) -> float:
    """Of the mask logits. In float32 rounding alone may move a pixel into the mask that attention is held to."""
    ours.double(), peer.double()
    theirs = peer(pixel_values.double()).masks_queries_logits
    difference = relative_difference(ours(pixel_values.double(), text_embeds=text_embeds).mask_logits, theirs)
    ours.float(), peer.float()
    return difference


def compare(args: NetworkArgs, backbone: str, size: int, mode: str, device: torch.device) -> dict:
    """Both networks at the same weights and images."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for everyone, the matrix product included
    ours = make_zs3(backbone).eval().to(device)
    peer = make_peer(backbone, args.class_names, ours).eval().to(device)
    pixel_values = torch.randn(args.batch_size, 3, size, size, device=device)
    text_embeds = F.normalize(torch.randn(args.class_names, ours.config.projection_dim, device=device), dim=-1)
    row = {"backbone": backbone, "size": size, "mode": mode}
    what = f"{backbone}, {size}, {mode}: mask logits of zs3 and transformers"
    with torch.inference_mode():
        steps = {PEER: lambda: peer(pixel_values), OURS: lambda: ours(pixel_values, text_embeds=text_embeds)}
        if mode == "eager":
            row["largest_difference"] = difference_in_float64(ours, peer, pixel_values, text_embeds)
        counted = operations(steps[OURS])  # counting does not see into compiled code
        if mode == "compiled":
            expected = steps[PEER]().masks_queries_logits
            for model in (ours, peer):
                compile_network(model)
            row["graph_breaks"] = {name: graph_breaks(step) for name, step in steps.items()}
            row["largest_difference"] = relative_difference(steps[OURS]().mask_logits, expected)
        measuring.check_close(row["largest_difference"], EQUAL, what)
        dtype = getattr(torch, args.dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            row |= measure_all(args, steps, counted, device)
            if mode == "eager":
                for name, model in ((PEER, peer), (OURS, ours)):
                    row["networks"][name]["parts"] = seconds_of_parts(parts_of(model), steps[name], args.rounds, device)
            if args.profile is not None:
                row["operators"] = {name: operator_table(step, device) for name, step in steps.items()}
    return row


def measure_all(
    args: NetworkArgs, steps: dict[str, Callable[[], object]], operations: int, device: torch.device
) -> dict:
    """Times of all steps and of the matrix product in turns, memory of the steps. operations: of the floor."""
    matrix = torch.randn(args.gemm_size, args.gemm_size, device=device, dtype=getattr(torch, args.dtype))
    seconds = measuring.take_turns({**steps, GEMM: lambda: matrix @ matrix}, args.rounds, device)
    rate = 2 * args.gemm_size**3 / min(seconds[GEMM])
    networks = measuring.compared(steps, seconds, PEER, device)
    for figures in networks.values():
        figures["times_the_floor"] = figures["seconds"] * rate / operations
    floor = {"operations": operations, "operations_per_second": rate, "floor_seconds": operations / rate}
    return {**floor, "networks": networks}


TITLES = "backbone | size | mode | network | seconds | times faster | floor, seconds | times the floor | "
TITLES += "peak MiB | share of the peer's | graph breaks | largest difference"
CELLS = "{backbone} | {size} | {mode} | {network} | {seconds:.4f} | {times_faster:.2f} | {floor_seconds:.4f} | "
CELLS += "{times_the_floor:.2f} | {peak_mib:.0f} | {peak_share:.2f} | {breaks} | {largest_difference:.1e}"


def by_network(rows: list[dict]) -> list[dict]:
    """A row for each network of each row, for a table."""
    return [{**row, "network": name, **figures} for row in rows for name, figures in row["networks"].items()]


def parts_table(rows: list[dict]) -> str:
    """Markdown: where the time of one eager forward goes."""
    parts = list(rows[0]["parts"])
    lines = []
    for row in rows:
        whole = sum(row["parts"].values())
        cells = (f"{seconds:.4f} s, {seconds / whole:.0%}" for seconds in row["parts"].values())
        lines.append([row["backbone"], str(row["size"]), row["network"], *cells])
    return measuring.table_of(["backbone", "size", "network", *parts], lines)


def pop_operators(rows: list[dict]) -> str:
    """The operator tables of all rows, taken out of them: a text file of their own."""
    texts = []
    for row in rows:
        title = ", ".join(str(value) for value in row.values() if isinstance(value, str | int))
        texts += [f"{title}: {name}\n{text}\n" for name, text in row.pop("operators", {}).items()]
    return "\n".join(texts)


def report(
    args: NetworkArgs, rows: list[dict], device: torch.device, title: str, tables: Callable[[list[dict]], str]
) -> None:
    """Prints and writes what `args` ask for."""
    operators, facts = pop_operators(rows), measuring.head(device)
    rate = max(row["operations_per_second"] for row in rows)
    text = f"{title}, {args.dtype}, torch {facts['torch']}, {facts['machine']}; matrix product of "
    text += f"{args.gemm_size} x {args.gemm_size}: {rate:.3g} operations a second.\n\n{tables(by_network(rows))}"
    if args.profile is not None:
        write_text(Path(args.profile), operators)
    measuring.publish(args.output, {**facts, **vars(args), "results": rows}, text)


def all_tables(rows: list[dict]) -> str:
    for row in rows:
        if "graph_breaks" in row:
            row["breaks"] = row["graph_breaks"][row["network"]]
    text = measuring.table(TITLES, CELLS, rows)
    eager = [row for row in rows if "parts" in row]
    return text + (f"\nOne eager forward by part of the network:\n\n{parts_table(eager)}" if eager else "")


def main() -> None:
    args, _ = read_arguments(NetworkArgs)
    device = measuring.device_named(args.device)
    cases = itertools.product(args.backbones, args.sizes, args.modes)
    rows = [measuring.in_fresh_process(compare, args, *case, device) for case in cases]
    report(args, rows, device, f"Forward of {args.batch_size} image(s)", all_tables)


if __name__ == "__main__":
    run(main)
