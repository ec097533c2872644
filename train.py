"""Train Zs3ForSemanticSegmentation: start, claim the output folder, prepare, loop, save.

    accelerate launch train.py --config recipes/scenes_stage1.yaml --dataset DIR --output_dir runs/stage1
    accelerate launch train.py --config recipes/scenes_stage2_ground_truth.yaml --dataset DIR --output_dir runs/stage2 \
        --init_from runs/stage1/final

A recipe is a YAML file of flags. The command line wins over the recipe, and the recipe over the defaults. The flags are
the fields of TrainArgs and of Zs3Config (losses, architecture). With --init_from the defaults of Zs3Config's fields are
the values of that checkpoint. The same command again resumes from the last checkpoint in the output folder.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, PolynomialLR
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config
from zs3.command_line import read_arguments, run
from zs3.data.batches import BatchParts
from zs3.files import write_json
from zs3.training.arguments import TrainArgs, check_overrides
from zs3.training.folder import MetricsLog, claim_folder, label_quality, save_final
from zs3.training.loader import make_loader, with_counts
from zs3.training.pace import Pace, StepMean
from zs3.training.plan import describe
from zs3.training.processes import go_on_after, make_accelerator, straighten_gradients, whole_model
from zs3.training.resume import Progress, RunCheckpoints
from zs3.training.start import Start, make_start
from zs3.training.stopping import EXIT_CODE, Termination, agree, check_grad_norm, loss_fault


def train(args: TrainArgs, overrides: dict) -> None:
    """Trains from the first step, or from the run's last checkpoint. overrides: fields of Zs3Config."""
    args.check()
    check_overrides(overrides)
    accelerator, parts = make_accelerator(args)
    set_seed(args.seed)

    start = make_start(args, overrides, accelerator)
    lock, stamp = claim_folder(asdict(args), start, accelerator)
    with lock:
        final = Path(args.output_dir) / "final"
        if final.exists():
            accelerator.print(f"{final} is there already: nothing to do")
            accelerator.end_training()
            return
        accelerator.print(describe(args, start, parts, accelerator))
        ready = prepare(args, start, stamp, parts, accelerator)
        loop(args, start, ready, parts, accelerator)
        is_complete = save(args, start, ready, accelerator)
        # The model is freed before its process group. Otherwise DDP's reducer may wait for a thread of gloo, which
        # itself waits for Python's lock.
        del ready
        accelerator.free_memory()
        accelerator.end_training()
    if not is_complete:
        sys.exit(EXIT_CODE)


class Ready(NamedTuple):
    """What the loop needs, at the step from which the run continues."""

    model: nn.Module  # as accelerate has prepared it
    optimizer: Optimizer
    scheduler: LRScheduler
    progress: Progress
    checkpoints: RunCheckpoints
    is_resumed: bool
    batches: Iterator[dict]  # micro-batches of this process
    log: MetricsLog | None  # None: not the main process


def prepare(args: TrainArgs, start: Start, stamp: dict, parts: BatchParts, accelerator: Accelerator) -> Ready:
    """Optimizer, schedule, checkpoints and loader. If the run has a checkpoint, it is loaded."""
    model, folder, progress = start.model, Path(args.output_dir), Progress()
    optimizer = AdamW(parameter_groups(model, args.learning_rate, args.weight_decay, args.backbone_multiplier))
    scheduler = make_scheduler(optimizer, args.lr_schedule, args.lr_milestones, args.max_steps)
    if args.activation_checkpointing:
        # Its name is gradient_checkpointing_enable in the oldest supported version of transformers.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    checkpoints = RunCheckpoints(
        accelerator, folder / "checkpoints", model, scheduler, progress, kept=args.checkpoints_kept, stamp=stamp
    )
    if accelerator.is_fsdp2:
        model.get_input_embeddings = lambda: None  # else accelerate shards them alone; no text tower: an error
    elif accelerator.num_processes > 1:
        straighten_gradients(model)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    set_seed((args.seed + 1 + accelerator.process_index) % 2**32)  # each process samples different points

    saved_by = checkpoints.resume()
    if saved_by is not None:
        accelerator.print(f"resumed   at step {progress.step}")
        if saved_by != accelerator.num_processes:
            go_on_after(saved_by, progress.step, accelerator, streaming=args.streaming, seed=args.seed)
    elif (folder / "metrics.jsonl").exists():
        accelerator.print(f"note      no checkpoint in {checkpoints.folder} yet: training starts from the beginning")
    steps = range(progress.step, args.max_steps)
    options = {"num_workers": args.num_workers, "shuffle_buffer": args.shuffle_buffer}
    batches = make_loader(start.dataset, accelerator, parts, steps, **options)
    log = MetricsLog(folder / "metrics.jsonl", progress.step) if accelerator.is_main_process else None
    # With purge_step tensorboard drops the values that a killed run wrote after its last checkpoint.
    accelerator.init_trackers("zs3", init_kwargs={"tensorboard": {"purge_step": progress.step + 1}})
    return Ready(model, optimizer, scheduler, progress, checkpoints, saved_by is not None, batches, log)


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_multiplier: float
) -> list[dict]:
    """Trainable parameters. The backbone has a lower rate; norms and embeddings have no decay (as in Mask2Former)."""
    undecayed = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                in_backbone = module_name.startswith("model.pixel_level_module.encoder")
                groups.setdefault((in_backbone, isinstance(module, undecayed)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (backbone_multiplier if in_backbone else 1.0),
            "weight_decay": 0.0 if is_undecayed else weight_decay,
        }
        for (in_backbone, is_undecayed), parameters in groups.items()
    ]


def make_scheduler(optimizer: Optimizer, lr_schedule: str, lr_milestones: list[int], max_steps: int) -> LRScheduler:
    if lr_schedule == "poly":
        return PolynomialLR(optimizer, total_iters=max_steps, power=0.9)
    return MultiStepLR(optimizer, milestones=[step for step in lr_milestones if step < max_steps], gamma=0.1)


def loop(args: TrainArgs, start: Start, ready: Ready, parts: BatchParts, accelerator: Accelerator) -> None:
    """Optimizer steps until the last one or SIGTERM. Checkpoints are saved on the way and at the end."""
    model, optimizer, scheduler, progress = ready[:4]
    text_embeds, config = start.text_embeds, start.model.config
    pace, seconds_before = Pace(accelerator), progress.seconds
    mean, step_ids, fault = StepMean(accelerator), [], None
    quiet = not accelerator.is_local_main_process
    bar = tqdm(total=args.max_steps, initial=progress.step, unit="step", mininterval=1, disable=quiet)
    with Termination() as termination, bar:
        for batch in with_counts(pace.timed(ready.batches), parts.micro_batches, config):
            image_ids = batch.pop("image_ids")
            step_ids += image_ids
            progress.label_counts += batch.pop("label_counts")
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    outputs = model(**batch, text_embeds=text_embeds, return_dict=True)
                fault = loss_fault(outputs.loss, progress.step, image_ids) or fault
                mean.add(outputs)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients:
                    terminated = agree(accelerator, termination.received, fault)
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
                    check_grad_norm(accelerator, grad_norm, progress.step, step_ids)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            learning_rate = max(scheduler.get_last_lr())  # the rate of the backbone is smaller
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step if its gradients overflow
                scheduler.step()
            progress.step += 1
            progress.seconds = seconds_before + pace.seconds
            is_last = progress.step == args.max_steps
            bar.update()
            forecast = pace.forecast(progress.step, args.max_steps)
            if forecast and accelerator.is_main_process:
                bar.write(forecast)
            if progress.step % args.logging_steps == 0 or is_last:
                values = mean.values() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
                values |= {"data_wait": round(pace.data_wait(), 4)}
                bar.set_postfix(loss=f"{values['loss']:.2f}", same=f"{values['same_label_rate']:.2f}")
                if ready.log is not None:
                    ready.log.write(progress, values)
                accelerator.log(values, step=progress.step)
            mean, step_ids = StepMean(accelerator), []
            if terminated or progress.step % args.checkpointing_steps == 0 or is_last:
                ready.checkpoints.save()
            if terminated:
                break


def save(args: TrainArgs, start: Start, ready: Ready, accelerator: Accelerator) -> bool:
    """Writes the results and the final model if the run has made its last step. Returns whether it has."""
    folder, progress = Path(args.output_dir), ready.progress
    accelerator.wait_for_everyone()
    if progress.step < args.max_steps:
        accelerator.print(f"SIGTERM: stopped after step {progress.step}, which is saved; the same command resumes it")
        return False
    trained = whole_model(accelerator, ready.model)
    measured = label_quality(progress.all_label_counts())
    if accelerator.is_main_process:
        results = {
            "images_per_second": round(progress.step * args.batch_size / max(progress.seconds, 1e-9), 2),
            "num_processes": accelerator.num_processes,
            "setting": args.supervision,  # the supervision; older files have this key
            "unseen_labels": args.unseen_labels,
            **measured,
            **ready.log.last,
        }
        write_json(folder / "all_results.json", results)
        trained.config.update({name: value for name, value in measured.items() if value is not None})
        save_final(trained, start.processor, folder / "final")  # comes last: it shows that the run is complete
    sittings = ", over all starts of the run" if ready.is_resumed else ""
    accelerator.print(f"trained in {progress.seconds:.0f} s{sittings}; the model is in {folder / 'final'}")
    return True


def main() -> None:
    train(*read_arguments(TrainArgs, config_class=Zs3Config))


if __name__ == "__main__":
    run(main)
