"""The gradient norm of each term of Eq. 8, at three points of a training run on the embedded benchmark.

    zs3 scenes --output runs/scenes
    accelerate launch train.py --config recipes/scenes_stage1.yaml --dataset runs/scenes --output_dir runs/stage1
    python -m benchmarks.gradient_sizes --dataset runs/scenes --init_from runs/stage1/final \
        --output docs/results/gradient_sizes.json

Each number is an L2 norm over all trained parameters: that of the gradient of weight x term. It is averaged over
batches. A term is summed over the decoder outputs. Weights and losses are those of stage 2's recipe. The class term is
measured with both values of `class_norm`, the mask term with both mask losses.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks import measuring
from configuration_zs3 import Zs3Config
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import Count, check_required, flag, read_arguments, run
from zs3.data.batches import StepSampler, collate, cut_batch
from zs3.scenes.demo import train_stage
from zs3.training.arguments import TrainArgs
from zs3.training.start import make_start

RECIPE = "scenes_stage2_ground_truth.yaml"


@dataclass
class GradientArgs(measuring.BenchmarkArguments):
    """Where to start and how long to train."""

    dataset: str | None = flag(None, "Folder made by `zs3 scenes`.")
    init_from: str | None = flag(None, "Checkpoint of stage 1, from which stage 2 starts.")
    output_dir: str = flag("runs/gradient_sizes", "Output folder of the training run between the measurements.")
    steps: Count = flag(200, "Steps of stage 2 before the last measurement.")
    batches: Count = flag(8, "Batches in each measurement.")

    def check(self) -> None:
        check_required(self, "dataset", "init_from")


def gradient_norms(model: Zs3ForSemanticSegmentation, batches: list[dict], text_embeds: Tensor) -> dict[str, float]:
    """The mean norm of each weighted term's gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = {name: getattr(model.config, f"{name}_weight") for name in ("class", "mask", "dice", "rank")}
    norms = dict.fromkeys(weights, 0.0)
    for batch in batches:
        terms = model(**batch, text_embeds=text_embeds, return_dict=True).loss_terms
        for name, weight in weights.items():
            gradients = torch.autograd.grad(weight * terms[name], parameters, retain_graph=True, allow_unused=True)
            squares = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
            norms[name] += float(squares) ** 0.5 / len(batches)
    return norms


def main() -> None:
    args, _ = read_arguments(GradientArgs)
    folder = Path(args.output_dir)
    train_stage(RECIPE, Path(args.dataset), folder, 1, args.steps, "--init_from", args.init_from)

    recipe = ["--config", str(Path("recipes", RECIPE)), "--dataset", args.dataset, "--output_dir", args.output_dir]
    train_args, overrides = read_arguments(TrainArgs, [*recipe, "--init_from", args.init_from], config_class=Zs3Config)
    start = make_start(train_args, overrides, Accelerator(cpu=True))
    sampler = StepSampler(len(start.dataset), cut_batch(train_args.batch_size, 1), range(args.batches), seed=1)
    batches = list(DataLoader(start.dataset, batch_sampler=sampler, collate_fn=collate))
    for batch in batches:
        del batch["image_ids"], batch["label_counts"]

    torch.manual_seed(0)
    models = {
        "random weights": Zs3ForSemanticSegmentation(start.model.config),
        "start of stage 2": start.model,
        f"after {args.steps} steps": Zs3ForSemanticSegmentation.from_pretrained(folder / "final"),
    }
    columns = {}
    for title, model in tqdm(models.items(), desc="models"):
        columns[title] = {}
        for class_norm, mask_loss in (("groups", "focal"), ("queries", "bce")):
            model.config.class_norm, model.config.mask_loss = class_norm, mask_loss
            torch.manual_seed(0)
            norms = gradient_norms(model.train(), batches, start.text_embeds)
            columns[title][f"class, {class_norm}"] = norms.pop("class")
            columns[title][f"mask, {mask_loss}"] = norms.pop("mask")
        columns[title] |= norms
    terms = ("class, groups", "class, queries", "mask, focal", "mask, bce", "dice", "rank")
    rows = [[term, *(f"{column[term]:.2f}" for column in columns.values())] for term in terms]
    text = f"""# The gradient norm of each weighted term

Made by `{measuring.head()["command"]}`, on the embedded synthetic benchmark.

{measuring.table_of(["weight x term", *columns], rows)}"""
    measuring.publish(args.output, {**measuring.head(), **vars(args), "recipe": RECIPE, "norms": columns}, text)


if __name__ == "__main__":
    run(main)
