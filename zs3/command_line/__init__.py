"""Command lines: recipes and flags are read, and bad input gives one clear line.

`flags` checks values, `recipes` reads recipe files, `refusals` prints errors, `reading` combines them.
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
from zs3.command_line.recipes import GONE, OLD_NAMES, parse_yaml, renamed
from zs3.command_line.refusals import NO_SPACE, InputError, did_you_mean, in_one_line, printable, run, shown
