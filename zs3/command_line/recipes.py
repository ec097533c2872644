"""Recipes: YAML files of a command's flags. Renamed flags are accepted by their old names, too."""

import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from configuration_zs3 import one_line, shortened
from files_zs3 import read_text
from zs3.command_line.refusals import InputError, did_you_mean

# Renamed flags: class of arguments -> old name -> present name. Recipes and commands may still have the old names.
OLD_NAMES = {
    "AblationArgs": {"benchmark": "dataset", "processes": "num_jobs", "result": "output"},
    "ConvertArgs": {"num_proc": "num_workers"},
    "NounArgs": {"num_proc": "num_workers"},
    "SceneArgs": {"train": "num_train", "validation": "num_validation"},
    "TrainArgs": {"clip": "encoder", "mask2former": "proposals"},
}
GONE = {  # flags that were removed
    "EvalArgs": ("ensemble_tolerance",),
    "NounArgs": ("tagger",),
    "PseudoLabelArgs": ("expansion", "num_threads", "threshold_sweep"),
}
MOST_OF_A_YAML = 100_000  # values; a value counts as often as the file refers to it


class RecipeLoader(yaml.SafeLoader):
    """Reads 5e-5 as a number. YAML 1.1 reads it as a string, because it has no dot."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_NULL = ("", "~", "null", "Null", "NULL")  # how YAML writes None


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Raises yaml.YAMLError if the text is no YAML, or has an impossible number or date."""
    if re.search(r"^\s*<<\s*:", text, re.MULTILINE):  # each merge key may double the time
        raise yaml.YAMLError("it has a merge key, <<: write the fields out")
    try:
        content = yaml.load(text, loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # bugs of the library: a wrong date, a tag without value, 1,000 brackets
        raise yaml.YAMLError(one_line(error)) from error
    if _count(content) > MOST_OF_A_YAML:
        raise yaml.YAMLError(f"it holds more than {MOST_OF_A_YAML:,} values")
    return content


def _count(content: Any) -> int:
    """The number of values in a content; counting stops above MOST_OF_A_YAML."""
    count, waiting = 0, [content]
    while waiting and count <= MOST_OF_A_YAML:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    return count


def read_recipe(
    path: str | None, command: str, types: dict[str, Any], names: list[str], config_names: list[str]
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """A recipe in three parts: flags; fields that are None or [], which no flag can give; model configuration."""
    flags, empty, overrides = [], {}, {}
    if path is None:
        return flags, empty, overrides
    as_written, as_typed = _load_recipe(path, command)
    for name, value in as_written.items():
        if name in config_names:
            overrides[name] = as_typed[name]
        elif name not in names:
            raise InputError(f"{path}: unknown field {shortened(name)}; {did_you_mean(name, names + config_names)}")
        elif value in _NULL and type(None) in get_args(types[name]):
            empty[name] = None
        elif value == [] and _is_list(types[name]):
            empty[name] = []
        elif isinstance(value, str):
            flags.append(f"--{name}={value}")
        elif _is_list(types[name]) and isinstance(value, list) and all(isinstance(v, str) for v in value):
            flags += [f"--{name}", *value]
        else:
            kind = "a list of plain values" if _is_list(types[name]) else "one plain value"
            raise InputError(f"{path}: field {name!r} takes {kind}, not {shortened(as_typed[name])}")
    return flags, empty, overrides


def _load_recipe(path: str, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's mapping twice: with scalars as strings, as they are written, and as typed values."""
    try:
        text = read_text(path)
        as_written, as_typed = parse_yaml(text, yaml.BaseLoader), parse_yaml(text, RecipeLoader)
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}; --config takes a file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: broken YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8
        raise InputError(f"{path} is no YAML file: {one_line(error)}") from error
    if as_typed is None:  # an empty file, or comments alone
        return {}, {}
    if not isinstance(as_typed, dict):
        raise InputError(f"{path}: a recipe is a mapping, one `field: value` a line")
    for old, name in OLD_NAMES.get(command, {}).items():
        if old in as_written:
            say_renamed(old, name)
    as_typed = {str(name): value for name, value in as_typed.items()}
    return renamed(as_written, path, command), renamed(as_typed, path, command)


def renamed(recipe: dict[str, Any], path: str | Path, command: str) -> dict[str, Any]:
    """A recipe with the present names. command: the class of its arguments, a key of OLD_NAMES."""
    names = OLD_NAMES.get(command, {})
    for name in GONE.get(command, ()):
        if name in recipe:
            raise InputError(f"{path}: the field {name} was removed; leave it out")
    both = [old for old, name in names.items() if old in recipe and name in recipe]
    if both:
        raise InputError(f"{path} has {both[0]!r} and {names[both[0]]!r}, which are one flag: leave out the first")
    return {names.get(name, name): value for name, value in recipe.items()}


def say_renamed(old: str, name: str) -> None:
    print(f"note: --{old} is called --{name} now", file=sys.stderr)


def _is_list(kind: Any) -> bool:
    return any(list in (option, get_origin(option)) for option in (kind, *get_args(kind)))
