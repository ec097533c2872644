"""The command `zs3`.

    zs3                  # lists the commands
    zs3 NAME --help

Each command is the function `main` of one module. Only that module is imported.
"""

import sys
from functools import partial
from importlib import import_module
from typing import NoReturn

# In the order in which a user meets them: name, module, what it does.
COMMANDS = (
    ("demo", "zs3.scenes.demo", "train, evaluate and try a tiny model on the embedded benchmark"),
    (
        "assemble",
        "zs3.release.assemble",
        "join a Mask2Former and a CLIP or TIPSv2 into a model that names without training",
    ),
    ("scenes", "zs3.scenes.__main__", "draw the embedded benchmark into a folder"),
    ("convert", "zs3.convert.__main__", "convert an official archive to a dataset"),
    ("check", "zs3.data.check", "read every picture and label map of a dataset, and list what cannot be used"),
    ("nouns", "zs3.convert.nouns", "make class names and image labels from captions"),
    ("pseudo_labels", "zs3.pseudo_labels", "find the unseen classes in training pictures with CLIP"),
    ("doctor", "zs3.doctor", "describe a run or a checkpoint, and check that it is complete"),
    ("ensemble_weight", "zs3.evaluation.ensemble_weight", "choose the weight of the ensemble with CLIP"),
    ("compare", "zs3.evaluation.compare", "say whether one result is better than another"),
    ("figure", "zs3.evaluation.figure", "draw images, ground truth and predictions side by side"),
    ("ablation", "zs3.ablation.__main__", "train and evaluate a table of variants over seeds"),
    ("export", "zs3.release.export", "write the visual part of a checkpoint for torch.export or ONNX"),
    ("release", "zs3.release.__main__", "make a checkpoint ready for the Hub, and upload it"),
    ("tiny_encoders", "zs3.scenes.tiny_encoders", "train the encoders of the embedded benchmark"),
)


def overview() -> str:
    """What `zs3` alone prints."""
    width = max(len(name) for name, *_ in COMMANDS)
    lines = [f"  {name:{width}}  {purpose}" for name, _, purpose in COMMANDS]
    return "\n".join(
        [
            "usage: zs3 NAME [--any_flag value ...]     (zs3 NAME --help lists its flags)",
            "",
            *lines,
            "",
            "On one process or several, from the repository:",
            "  accelerate launch train.py                 train",
            "  accelerate launch eval.py                  evaluate",
            "  accelerate launch -m zs3.pseudo_labels     same as zs3 pseudo_labels",
        ]
    )


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else "__help"
    if name in ("__help", "_h"):
        print(overview())
        return
    modules = {name: module for name, module, _ in COMMANDS}
    if name in modules:
        command = import_module(modules[name]).main
        sys.argv = [f"zs3 {name}", *sys.argv[2:]]
    else:
        command = partial(refuse, sys.argv[1])
    from zs3.command_line import run  # imported late, so that --help is fast

    run(command)


def refuse(name: str) -> NoReturn:
    from zs3.command_line import InputError, did_you_mean

    mend = did_you_mean(name, [known for known, *_ in COMMANDS])
    if name in ("train", "eval"):
        mend = f"in the repository, run: accelerate launch {name}.py"
    raise InputError(f"zs3 has no command {name!r}; {mend}")


def run_old_command(module: str) -> None:
    """Runs a command by its old name. module: `zs3.NAME`."""
    name = module.removeprefix("zs3.")
    print(f"note: python -m {module} is called zs3 {name} now", file=sys.stderr)
    sys.argv[1:1] = [name]
    main()


if __name__ == "__main__":
    main()
