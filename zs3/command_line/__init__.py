"""The doors of the commands: recipes and flags in, one clear line when the input is bad.

`flags` says what a flag takes, `recipes` reads recipes, `refusals` refuses, `reading` puts them together.
"""

# ruff: noqa: F401
from zs3.command_line.flags import (
    Amount,
    Arguments,
    Batch,
    Count,
    OutputFile,
    OutputFolder,
    Pictures,
    Pixels,
    Positive,
    PositiveShare,
    Processes,
    Seed,
    Share,
    Side,
    Some,
    Whole,
    Workers,
    check_outside,
    check_required,
    checked,
    flag,
    looks_local,
    refuse_alone,
    refuse_together,
    try_output,
)
from zs3.command_line.reading import model_fields, read_arguments
from zs3.command_line.recipes import OLD_NAMES, parse_yaml, renamed
from zs3.command_line.refusals import NO_SPACE, InputError, did_you_mean, in_one_line, printable, run, shown
