"""Draws the embedded benchmark `scenes` into a folder.

zs3 scenes --output DIR [--num_train 3000] [--num_validation 200] [--seed 0]
"""

from dataclasses import dataclass

from zs3.command_line import Arguments, OutputFolder, Pictures, Seed, check_required, flag, read_arguments, run
from zs3.scenes.dataset import write_dataset


@dataclass
class SceneArgs(Arguments):
    """Draws the embedded benchmark `scenes`."""

    output: OutputFolder | None = flag(None, "New folder for the scenes; it must not exist.")
    num_train: Pictures = flag(3000, "Training pictures.")
    num_validation: Pictures = flag(200, "Validation pictures.")
    seed: Seed = flag(0, "Random seed of the pictures.")

    def check(self) -> None:
        check_required(self, "output")


def main() -> None:
    args, _ = read_arguments(SceneArgs)
    write_dataset(args.output, args.num_train, args.num_validation, args.seed)
    print(f"{args.num_train} training and {args.num_validation} validation scenes are in {args.output}")


if __name__ == "__main__":
    run(main)
