"""Train Zs3ForSemanticSegmentation.

    accelerate launch train.py --config recipes/scenes_stage1.yaml --dataset DIR --output_dir runs/stage1
    accelerate launch train.py --config recipes/scenes_stage2_ground_truth.yaml --dataset DIR --output_dir runs/stage2 \
        --init_from runs/stage1/final

A recipe is a YAML file of flags; the command line wins over it, the defaults below stand where both are silent.
Besides the fields of TrainArgs every field of Zs3Config is a flag (losses, architecture); with --init_from the
checkpoint's own values are their defaults. The same command again resumes from the last checkpoint in the output
folder.
"""

import math
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config, shortened
from zs3.command_line import InputError, in_one_line, read_arguments, run
from zs3.data.image_labels import training_space
from zs3.files import write_json
from zs3.label_space import load_label_space, load_text_embeds
from zs3.training.arguments import FILLED_IN, TrainArgs, check_fields
from zs3.training.folder import Checkpoints, MetricsLog, Progress, save_final
from zs3.training.loader import make_dataset, make_loader, with_counts
from zs3.training.pace import Pace, StepMean
from zs3.training.plan import describe
from zs3.training.processes import go_on_after, make_accelerator, straighten_gradients, whole_model
from zs3.training.stamp import record_in
from zs3.training.start import choose_what_learns, claim_folder, make_model, make_processor, text_vectors
from zs3.training.stopping import EXIT_CODE, Termination, agree, all_refuse


def parameter_groups(model: nn.Module, args: TrainArgs) -> list[dict]:
    """Trainable parameters: the backbone learns slower, norms and embeddings do not decay (Mask2Former's rule)."""
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
            "lr": args.learning_rate * (args.backbone_multiplier if in_backbone else 1.0),
            "weight_decay": 0.0 if is_undecayed else args.weight_decay,
        }
        for (in_backbone, is_undecayed), parameters in groups.items()
    ]


def make_scheduler(optimizer: torch.optim.Optimizer, args: TrainArgs) -> torch.optim.lr_scheduler.LRScheduler:
    if args.lr_schedule == "poly":
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=args.max_steps, power=0.9)
    milestones = [step for step in args.lr_milestones if step < args.max_steps]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)


def train(args: TrainArgs, overrides: dict) -> None:
    args.check()
    for name in FILLED_IN:
        if name in overrides:
            raise InputError(f"{name} is written by the training itself: leave it out")
    check_fields(overrides)
    output_dir = Path(args.output_dir)
    whole_space = load_label_space(args.label_space or args.dataset)
    label_space = training_space(whole_space, args.setting)
    accelerator, parts = make_accelerator(args)
    set_seed(args.seed)

    # Text vectors, model, data; nothing is written before they are known to be good
    all_embeds = None
    if args.text_embeds is not None:
        all_embeds = load_text_embeds(args.text_embeds, len(label_space.class_names))
    with accelerator.local_main_process_first():
        model = make_model(args, overrides, label_space, all_embeds).to(accelerator.device)
        processor = make_processor(args, model, label_space)
    choose_what_learns(model, args.backbone_norm)
    all_embeds, prompts = text_vectors(args, model, processor, label_space.class_names, all_embeds)
    model.set_vocabulary(label_space.class_names, all_embeds)
    image_processor = getattr(processor, "image_processor", processor)
    with accelerator.local_main_process_first():  # datasets caches what it prepares
        dataset = make_dataset(args, label_space, image_processor, model.config)
    if args.caption_nouns is None:
        text_embeds = all_embeds[[label_space.class_names.index(name) for name in dataset.class_names]]
    else:
        with in_one_line(f"names of {args.caption_nouns}"):
            text_embeds = model.encode_text(**processor(class_names=dataset.class_names))
    text_embeds = text_embeds.to(accelerator.device)
    lock, stamps = None, [None]
    with all_refuse(accelerator):
        if accelerator.is_main_process:
            lock, stamps[0] = claim_folder(args, whole_space, label_space, dataset, prompts, model)
    (stamp,) = broadcast_object_list(stamps)
    model.config.seen_class_names, model.config.unseen_labels = record_in(stamp)
    if (output_dir / "final").exists():
        accelerator.print(f"{output_dir / 'final'} is there already: nothing to do")
        accelerator.end_training()
        return
    accelerator.print(describe(args, label_space, dataset, model, parts, accelerator))

    # Optimizer, schedule, state
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.learning_rate)
    scheduler = make_scheduler(optimizer, args)
    if args.activation_checkpointing:
        # Called gradient_checkpointing_enable in the oldest transformers supported.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    progress = Progress()
    folder = output_dir / "checkpoints"
    checkpoints = Checkpoints(accelerator, folder, model, scheduler, progress, kept=args.checkpoints_kept, stamp=stamp)
    if accelerator.is_fsdp2:
        model.get_input_embeddings = lambda: None  # accelerate would shard them apart, and stop without a text tower
    elif accelerator.num_processes > 1:
        straighten_gradients(model)
    config = model.config  # no longer to be had when the model is wrapped
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    set_seed((args.seed + 1 + accelerator.process_index) % 2**32)  # point sampling differs between processes
    saved_by = checkpoints.resume()
    if saved_by is not None:
        accelerator.print(f"resumed   at step {progress.step}")
        if saved_by != accelerator.num_processes:
            go_on_after(saved_by, args, accelerator, progress.step)
    elif (output_dir / "metrics.jsonl").exists():
        accelerator.print(f"note      no checkpoint in {folder} yet: from the beginning")
    loader = make_loader(args, dataset, accelerator, parts, progress.step)
    log = MetricsLog(output_dir / "metrics.jsonl", progress.step) if accelerator.is_main_process else None
    # tensorboard drops what a killed run wrote after its last checkpoint.
    accelerator.init_trackers("zs3", init_kwargs={"tensorboard": {"purge_step": progress.step + 1}})

    # Loop
    quiet = not accelerator.is_local_main_process
    pace, seconds_before = Pace(accelerator), progress.seconds
    mean = StepMean(accelerator)
    bar = tqdm(total=args.max_steps, initial=progress.step, unit="step", mininterval=1, disable=quiet)
    step_ids, fault = [], None
    with Termination() as termination, bar:
        for batch in with_counts(pace.timed(loader), parts.micro_batches, config):
            image_ids = batch.pop("image_ids")
            step_ids += image_ids
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    outputs = model(**batch, text_embeds=text_embeds, return_dict=True)
                if not torch.isfinite(outputs.loss):
                    loss = float(outputs.loss.detach())
                    fault = f"the loss is {loss} at step {progress.step}, images {shortened(image_ids)}: stopped"
                mean.add(outputs)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients:
                    terminated = agree(accelerator, termination.received, fault)
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
                    if accelerator.scaler is None and not math.isfinite(grad_norm):  # fp16's scaler skips such a step
                        step_ids = gather_object(step_ids)
                        raise InputError(
                            f"the gradients' norm is {grad_norm} at step {progress.step} although the loss is finite, "
                            f"images {shortened(step_ids)}: stopped"
                        )
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            learning_rate = max(scheduler.get_last_lr())  # the backbone's is smaller
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow
                scheduler.step()
            progress.step += 1
            progress.seconds = seconds_before + pace.seconds
            bar.update()
            forecast = pace.forecast(progress.step, args.max_steps)
            if forecast and accelerator.is_main_process:
                bar.write(forecast)
            if progress.step % args.logging_steps == 0 or progress.step == args.max_steps:
                values = mean.values() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
                values |= {"data_wait": round(pace.data_wait(), 4)}
                bar.set_postfix(loss=f"{values['loss']:.2f}", same=f"{values['same_label_rate']:.2f}")
                if log is not None:
                    log.write(progress, values)
                accelerator.log(values, step=progress.step)
            mean = StepMean(accelerator)
            step_ids = []
            if terminated or progress.step % args.checkpointing_steps == 0 or progress.step == args.max_steps:
                checkpoints.save()
            if terminated:
                break

    # Save
    complete = progress.step == args.max_steps
    accelerator.wait_for_everyone()
    trained = whole_model(accelerator, model) if complete else None
    if complete and accelerator.is_main_process:
        results = {
            "images_per_second": round(progress.step * args.batch_size / max(progress.seconds, 1e-9), 2),
            "num_processes": accelerator.num_processes,
            "setting": args.setting,
            "unseen_labels": args.unseen_labels,
            **log.last,
        }
        write_json(output_dir / "all_results.json", results)
        save_final(trained, processor, output_dir / "final")  # last: where it is, the run is complete
    if complete:
        sittings = "" if saved_by is None else ", all sittings together"
        accelerator.print(f"trained in {progress.seconds:.0f} s{sittings}; the model is in {output_dir / 'final'}")
    else:
        accelerator.print(f"SIGTERM: stopped after step {progress.step}, which is saved; the same command goes on")
    # The model goes before its process group: the other way round, freeing DDP's reducer can wait for ever for a
    # thread of gloo that waits for Python's lock.
    del model, optimizer, trained
    accelerator.free_memory()
    accelerator.end_training()
    if lock is not None:
        lock.close()
    if not complete:
        sys.exit(EXIT_CODE)


def main() -> None:
    train(*read_arguments(TrainArgs, config_class=Zs3Config))


if __name__ == "__main__":
    run(main)
