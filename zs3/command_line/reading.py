"""Reads a command's arguments from its recipe and its flags.

A recipe is a YAML file of flags, so one parser checks both. Its entries come before those of the command line, which
therefore win.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, PreTrainedConfig
from transformers.hf_argparser import string_to_bool

from configuration_zs3 import beginning, shortened
from zs3.command_line.flags import ANY, Arguments, checked, try_outputs
from zs3.command_line.recipes import GONE, OLD_NAMES, RecipeLoader, parse_yaml, read_recipe, say_renamed
from zs3.command_line.refusals import InputError, did_you_mean

METAVARS = {int: "N", float: "X", string_to_bool: "BOOL"}
Args = TypeVar("Args", bound=Arguments)
# A field in a docstring: `name: text` or, as in transformers, ``name (`int`, ...):``. Further lines are indented more.
# `a, b: text` describes two fields. The text is a lookahead, because the text of a section holds fields itself.
ENTRY = re.compile(r"^( *)(\w+(?:, \w+)*)(?: \(.*\))?:(?=(.*(?:\n\1 +\S.*)*))", re.MULTILINE)


def read_arguments(
    args_class: type[Args], argv: list[str] | None = None, config_class: type | None = None, check: bool = True
) -> tuple[Args, dict[str, Any]]:
    """The command's arguments, and the fields of the model configuration that recipe or flags give.

    args_class: a dataclass whose fields carry `metadata={"help": ...}`; each is a flag and a recipe key.
        It has no field named config.
    argv: without the program's name; None is the command line of this process.
    config_class: a transformers configuration. The fields that it or a base below PreTrainedConfig annotates, and
        that args_class lacks, are flags and recipe keys too. The dict has the given ones, read as YAML
        (`--backbone_config "{hidden_size: 8}"` is a mapping). The configuration checks their types.
    check: whether to call `Arguments.check`, which refuses missing flags and flags that do not go together.

    `--config FILE` names the recipe. Unknown names, wrong values and outputs that cannot be written raise InputError.
    """
    types = get_type_hints(args_class)  # without Annotated
    names = [field.name for field in fields(args_class) if field.init]
    config_names = [name for name in model_fields(config_class) if name not in names]
    argv = _with_first_flags(sys.argv[1:] if argv is None else argv, args_class.first_words)
    known = [*names, *config_names, "config", "help"]
    argv = [_known_flag(token, known, args_class.__name__) for token in argv]

    parser = _parser(args_class, config_class, config_names)
    flags, empty, overrides = read_recipe(_recipe_path(argv), args_class.__name__, types, names, config_names)
    parser.set_defaults(**empty)
    args, others, unexpected = parser.parse_args_into_dataclasses(
        flags + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unexpected:
        raise InputError(f"unexpected argument {shortened(unexpected[0])} (--help lists the flags)")
    for name, values in vars(others).items():
        if name in config_names:
            overrides[name] = values[0] if len(values) == 1 else values
    for name, value in overrides.items():
        _check_inner_numbers(name, value)
    try_outputs(args)
    if check:
        args.check()
    return args, overrides


# ---- the parser ------------------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Leaves the checks to `checked`, because messages of argparse hold the whole value.

        --help shows one spelling of a flag, and no `--no_flip`: `--flip false` does the same.
        """
        if "choices" in options:
            options["metavar"] = f"{{{','.join(options.pop('choices'))}}}"
        if "type" in options:
            options.setdefault("metavar", METAVARS.get(options["type"], "TEXT"))
            options["type"] = partial(_typed, options["type"])
        if options.get("action") == "store_false":
            options["help"] = argparse.SUPPRESS
        elif options.get("default") not in (None, [], argparse.SUPPRESS):
            options["help"] = f"{options.get('help', '')} (default: {options['default']})"
        return super().add_argument(*(name for name in names if "-" not in name.strip("-")), **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{beginning(message, 150)} (--help lists the flags)")


def _parser(args_class: type[Arguments], config_class: type | None, config_names: list[str]) -> _Parser:
    first = "".join(f"{name.upper()} " for name in args_class.first_words)
    usage = f"%(prog)s {first}[--config FILE] [--any_field value ...]"
    doc = args_class.__doc__ or ""
    parser = _Parser(
        args_class,
        allow_abbrev=False,
        description=None if doc.startswith(f"{args_class.__name__}(") else doc,  # the dataclass's own docstring
        usage=usage,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these flags; the command line wins.")
    group, texts = parser.add_argument_group("model configuration, values in YAML"), field_texts(config_class)
    for name in config_names:
        default = getattr(config_class, name, None)
        text = texts.get(name, "") + ("" if default is None else f" (default: {default})")
        options = {"nargs": "+", "default": argparse.SUPPRESS, "metavar": "VALUE", "help": text}
        group.add_argument(f"--{name}", type=_yaml_value, **options)
    return parser


def _typed(kind: Callable[[str], Any], text: str) -> Any:
    """The text as a value of the flag's type. A text that does not fit stays a text, and `checked` refuses it."""
    try:
        return kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        return text


def _with_first_flags(words: list[str], names: tuple[str, ...]) -> list[str]:
    """The words of a command line. Each leading value gets its flag before it."""
    words, place = list(words), 0
    for name in names:
        if len(words) > place and not words[place].startswith("-"):
            words.insert(place, f"--{name}")
            place += 2
    return words


def _known_flag(token: str, known: list[str], command: str) -> str:
    """A flag with underscores and by its present name. Other arguments are returned unchanged.

    command: the class of its arguments, a key of OLD_NAMES.

    Unknown flags are refused here. The parser would complain about the missing flag instead of the misspelled one.
    """
    given, equals, value = token.partition("=")
    if not given.startswith("--"):
        return token
    name, old_names = given[2:].replace("-", "_"), OLD_NAMES.get(command, {})
    if name in GONE.get(command, ()):
        raise InputError(f"the flag --{name} was removed; leave it out")
    old = name if name in old_names else name.removeprefix("no_")  # a switch that is turned off
    if old in old_names:
        say_renamed(old, old_names[old])
        name = name.removesuffix(old) + old_names[old]
    if name not in known and name.removeprefix("no_") not in known:
        raise InputError(f"unknown flag --{beginning(name, 60)}; {did_you_mean(name, known, '--')}")
    return f"--{name}{equals}{value}"


def _recipe_path(argv: list[str]) -> str | None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(argv)[0].config
    if path is not None and not isinstance(path, str):  # argparse makes a list of `--config=--`
        raise InputError("--config takes a file")
    return path


def _yaml_value(text: str) -> Any:
    try:
        return parse_yaml(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is no YAML value") from error


# ---- a model's configuration -----------------------------------------------------------------------------------


def model_fields(config_class: type | None) -> list[str]:
    """The model flags: the annotated fields of the configuration and its bases below PreTrainedConfig, bases first."""
    found = {}
    for base in _configurations(config_class):
        found |= inspect.get_annotations(base)
    inherited = inspect.get_annotations(PreTrainedConfig)
    return [n for n, kind in found.items() if n not in inherited and get_origin(kind) is not ClassVar]


def _configurations(config_class: type | None) -> list[type]:
    """A configuration's class and its bases below PreTrainedConfig, the bases first."""
    bases = reversed(config_class.__mro__ if config_class else ())
    return [base for base in bases if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]


def field_texts(config_class: type | None) -> dict[str, str]:
    """The description of each field in the docstrings of a configuration and its bases."""
    texts: dict[str, str] = {}
    known = set(model_fields(config_class))
    for base in _configurations(config_class):
        for _, names, text in ENTRY.findall(inspect.cleandoc(base.__doc__ or "")):
            if known.issuperset(names.split(", ")):
                texts |= dict.fromkeys(names.split(", "), " ".join(text.split()).replace("%", "%%"))
    return texts


def _check_inner_numbers(name: str, value: object) -> None:
    """Refuses NaN and infinity inside a model field such as `backbone_config`; transformers does not check there."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if type(inner) in ANY:
            checked(name, inner, type(inner))
        _check_inner_numbers(name, inner)
