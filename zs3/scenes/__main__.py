"""Draws the embedded benchmark `scenes` into a folder.

zs3 scenes --output DIR [--label_space scenes:3] [--num_train 3000] [--num_validation 200] [--num_test 1000] [--seed 0]
"""

from dataclasses import dataclass
from typing import Annotated

from configuration_zs3 import Number
from zs3.command_line import (
    Arguments,
    OutputFolder,
    Pictures,
    Seed,
    check_required,
    flag,
    read_arguments,
    run,
)
from zs3.scenes.dataset import world_space, write_dataset


@dataclass
class SceneArgs(Arguments):
    """Draws the embedded benchmark `scenes`."""

    output: OutputFolder | None = flag(None, "New folder for the scenes; it must not exist.")
    label_space: str = flag(
        "scenes",
        "Classes: 'scenes' (24 names) or 'scenes_90' (all names of the world), with a class split, 0 to 11: scenes:3. "
        "The pictures are the same.",
    )
    num_train: Pictures = flag(3000, "Training pictures.")
    num_validation: Pictures = flag(200, "Validation pictures, for choices.")
    num_test: Annotated[int, Number(int, 0, 10**6)] = flag(1000, "Test pictures, for the numbers of a table.")
    seed: Seed = flag(0, "Random seed of the pictures.")

    def check(self) -> None:
        check_required(self, "output")
        world_space(self.label_space)


def main() -> None:
    args, _ = read_arguments(SceneArgs)
    write_dataset(args.output, args.num_train, args.num_validation, args.seed, args.num_test, args.label_space)
    print(
        f"{args.num_train} training, {args.num_validation} validation and {args.num_test} test scenes are in "
        f"{args.output}"
    )


if __name__ == "__main__":
    run(main)
