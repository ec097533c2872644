"""The network's forward pass, compared with transformers' Mask2Former at the same weights, and with a floor.

    python -m benchmarks.network --output docs/results/network.json
    python -m benchmarks.network --device cuda --dtype bfloat16 --backbones resnet50 --sizes 512 --modes eager

Both networks are in eval mode. All weights are random, also in batch norms. "compiled" means torch.compile of
everything except the class heads. Mask logits must equal those of transformers' eager network to 1e-4 of the largest
logit; eager networks are compared in float64, compiled ones in float32. Each backbone, size and mode is measured in its
own process, where the networks and a large matrix product take turns. A time is the median over the rounds; a ratio is
the median of the rounds' ratios. Memory is the peak that a forward pass allocates in addition to the weights.

The floor is the time that the convolutions and matrix products of a forward pass (attention included) would need at the
speed of the large matrix product in its best round. The last table has the floor of each part of zs3's eager network,
and the seconds that its convolutions and matrix products take; other operators take the rest.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

import network_zs3
from benchmarks import measuring
from configuration_zs3 import Zs3Config
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import Count, InputError, OutputFile, Pixels, Some, flag, read_arguments, run
from zs3.files import write_text

PEER, OURS, GEMM = "transformers' Mask2Former", "zs3", "matrix product"
EQUAL = 1e-4  # largest difference allowed, as a share of the largest mask logit
STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "resnet50": lambda: ResNetConfig(out_features=STAGES),
    # Swin-T without stochastic depth, so that outputs can be compared in training mode.
    "swin_tiny": lambda: SwinConfig(drop_path_rate=0.0, out_features=STAGES),
}
ARCHITECTURE: dict[str, int] = {}  # fields that differ from Mask2Former's defaults
PARTS, REST = ("backbone", "deformable encoder", "rest of the pixel decoder", "transformer decoder"), "rest"
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class NetworkArgs(measuring.DeviceArguments):
    """Sizes of the comparison."""

    backbones: Some[str] = flag(list(BACKBONES), f"Backbones, from {', '.join(BACKBONES)}.")
    sizes: Some[Pixels] = flag([512, 640], "Sides of the images, pixels.")
    modes: Some[str] = flag(["eager"], "Modes: 'eager', 'compiled'.")
    batch_size: Count = flag(1, "Images at once.")
    class_names: Count = flag(171, "Number of class names.")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "With 'bfloat16' the forward passes run under autocast.")
    gemm_size: Count = flag(2048, "Side of the matrices in the large matrix product; 8192 suits a GPU.")
    profile: OutputFile | None = flag(None, "Text file for the slowest operators.")

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
    """A model whose random weights give batch norms and attention an effect. Its sampling points lie between pixels,
    because on a pixel the gradient has two values."""
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
    """transformers' network with the weights of this project's network, except in the class head."""
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone](), **ARCHITECTURE, **losses, num_labels=class_names)
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.load_state_dict(weights.model.state_dict())
    return model


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest absolute value of `theirs`; NaN if either has a NaN."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


class Products(TorchDispatchMode):
    """Counts the operations and the seconds of convolutions and matrix products, attention included.

    PyTorch's FlopCounterMode cannot be used: it hooks all modules, and a hooked network runs transformers' own forward.
    """

    def __init__(self, device: torch.device = measuring.CPU):
        super().__init__()
        self.device, self.operations, self.seconds = device, 0, 0.0

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        kwargs, operator = kwargs or {}, function.overloadpacket
        if operator not in flop_registry and operator is not FUSED:
            with self:  # a linear layer is made of products
                made = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if made is NotImplemented else made
        results = []
        self.seconds += measuring.seconds_of(lambda: results.append(function(*args, **kwargs)), self.device)
        if operator is not FUSED:
            self.operations += flop_registry[operator](*args, **kwargs, out_val=results[0])
        return results[0]


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of a step's convolutions and matrix products, two for each multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), Products() as products:  # not FUSED, whose operations are not counted
        step()
    return products.operations


def compile_network(model: nn.Module) -> None:
    """Compiles everything except transformers' class heads and this project's comparison with text vectors."""
    if isinstance(model, Zs3ForSemanticSegmentation):
        model._proposals = torch.compile(model._proposals)
    else:
        model.model.compile()


def graph_breaks(step: Callable[[], object]) -> int:
    """The number of graph breaks in a step that compiles its network."""
    counters["graph_break"].clear()
    step()
    return sum(counters["graph_break"].values())


def parts_of(model: nn.Module) -> dict[str, tuple[object, str]]:
    """The function that computes each part of a network: the object that has it, and its name."""
    if isinstance(model, Zs3ForSemanticSegmentation):
        names = ("backbone_features", "encoder_layer", "pixel_decoder", "transformer_decoder")
        return {part: (network_zs3, name) for part, name in zip(PARTS, names, strict=True)}
    decoder = model.model.pixel_level_module.decoder
    modules = (model.model.pixel_level_module.encoder, decoder.encoder, decoder, model.model.transformer_module)
    return {part: (module, "forward") for part, module in zip(PARTS, modules, strict=True)}


def by_part(
    parts: dict[str, tuple[object, str]], step: Callable[[], object], meter: Callable[[], float]
) -> dict[str, float]:
    """How much a meter rises in each part of a step. The rise of a part excludes the parts inside it."""
    rises = dict.fromkeys([*parts, REST], 0.0)
    running, last = [REST], 0.0

    def charge() -> None:
        nonlocal last
        now = meter()
        rises[running[-1]] += now - last
        last = now

    def metered(part: str, function: Callable) -> Callable:
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
            stack.enter_context(patch.object(owner, name, metered(part, getattr(owner, name))))
        last = meter()
        step()
        charge()
    return rises


def seconds_of_parts(
    parts: dict[str, tuple[object, str]], step: Callable[[], object], rounds: int, device: torch.device
) -> dict[str, float]:
    """The mean seconds of each part in a step. The time of a part excludes the parts inside it."""

    def clock() -> float:
        measuring.wait_for(device)
        return time.perf_counter()

    seconds = by_part(parts, lambda: [step() for _ in range(rounds)], clock)
    return {part: total / rounds for part, total in seconds.items()}


def floor_of_parts(
    parts: dict[str, tuple[object, str]], step: Callable[[], object], rate: float, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """By part: the floor at a rate of operations a second, and the mean seconds that the products take."""
    with sdpa_kernel(SDPBackend.MATH), Products() as counted:
        operations = by_part(parts, step, lambda: counted.operations)
    with Products(device) as timed:
        seconds = by_part(parts, lambda: [step() for _ in range(rounds)], lambda: timed.seconds)
    return {
        part: {"floor_seconds": operations[part] / rate, "product_seconds": seconds[part] / rounds} for part in seconds
    }


def operator_table(step: Callable[[], object], device: torch.device) -> str:
    """A table of the slowest operators in a step."""
    with profile() as profiler:
        step()
    kind = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=kind, row_limit=25)


def difference_in_float64(ours: nn.Module, peer: nn.Module, pixel_values: Tensor, text_embeds: Tensor) -> float:
    """The difference of the mask logits. In float32, rounding alone can change the attention mask of a pixel."""
    ours.double(), peer.double()
    theirs = peer(pixel_values.double()).masks_queries_logits
    difference = relative_difference(ours(pixel_values.double(), text_embeds=text_embeds).mask_logits, theirs)
    ours.float(), peer.float()
    return difference


def compare(args: NetworkArgs, backbone: str, size: int, mode: str, device: torch.device) -> dict:
    """Compares both networks at the same weights and on the same images."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # full float32 in all networks and in the matrix product
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
        counted = operations(steps[OURS])  # the counter cannot see inside compiled code
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
                rate = row["operations_per_second"]
                row["parts_floor"] = floor_of_parts(parts_of(ours), steps[OURS], rate, args.rounds, device)
            if args.profile is not None:
                row["operators"] = {name: operator_table(step, device) for name, step in steps.items()}
    return row


def measure_all(
    args: NetworkArgs, steps: dict[str, Callable[[], object]], operations: int, device: torch.device
) -> dict:
    """Times of the steps and of a matrix product that take turns; memory of the steps. operations: for the floor."""
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
    """The rows of a table: one for each network of each result."""
    return [{**row, "network": name, **figures} for row in rows for name, figures in row["networks"].items()]


def parts_table(rows: list[dict]) -> str:
    """A Markdown table of the time of each part in one eager forward pass."""
    parts = list(rows[0]["parts"])
    lines = []
    for row in rows:
        whole = sum(row["parts"].values())
        cells = (f"{seconds:.4f} s, {seconds / whole:.0%}" for seconds in row["parts"].values())
        lines.append([row["backbone"], str(row["size"]), row["network"], *cells])
    return measuring.table_of(["backbone", "size", "network", *parts], lines)


FLOOR_TITLES = "backbone | size | part | seconds | floor, seconds | times the floor | products, seconds"
FLOOR_CELLS = "{backbone} | {size} | {part} | {seconds:.4f} | {floor_seconds:.4f} | {times:.2f} | {product_seconds:.4f}"


def floor_table(rows: list[dict]) -> str:
    """A Markdown table of the parts of zs3's eager network beside their floor."""
    lines = []
    for row in rows:
        for part in PARTS:
            seconds, floor = row["parts"][part], row["parts_floor"][part]
            lines.append({**row, **floor, "part": part, "seconds": seconds, "times": seconds / floor["floor_seconds"]})
    return measuring.table(FLOOR_TITLES, FLOOR_CELLS, lines)


def pop_operators(rows: list[dict]) -> str:
    """Removes the operator tables from all rows and returns them as one text."""
    texts = []
    for row in rows:
        title = ", ".join(str(value) for value in row.values() if isinstance(value, str | int))
        texts += [f"{title}: {name}\n{text}\n" for name, text in row.pop("operators", {}).items()]
    return "\n".join(texts)


def report(
    args: NetworkArgs, rows: list[dict], device: torch.device, title: str, tables: Callable[[list[dict]], str]
) -> None:
    """Prints the tables and writes the files that `args` name."""
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
    if eager:
        text += f"\nOne eager forward by part of the network:\n\n{parts_table(eager)}"
        ours = [row for row in eager if row["network"] == OURS]
        text += f"\nThe parts of {OURS} beside their floor:\n\n{floor_table(ours)}"
    return text


def main() -> None:
    args, _ = read_arguments(NetworkArgs)
    device = measuring.device_named(args.device)
    cases = itertools.product(args.backbones, args.sizes, args.modes)
    rows = [measuring.in_fresh_process(compare, args, *case, device) for case in cases]
    report(args, rows, device, f"Forward of {args.batch_size} image(s)", all_tables)


if __name__ == "__main__":
    run(main)
