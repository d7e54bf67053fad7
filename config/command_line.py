"""From the command line, a run file and a DeepSpeed file to `Options`."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from config.deepspeed import read_deepspeed_file
from config.demo import DEMO_RECIPE
from config.errors import OptionError
from config.options import GROUPS, RENAMED, Options

USAGE = "train.py [run.json | run.yaml] [--OPTION VALUE ...]"

INTRODUCTION = (
    "Train a causal language model. Brackets show the default of an option. A BOOL without a value means true. If its "
    "default is true, --no_OPTION sets it to false. docs/options.md explains more."
)

DEMO_LINE = (
    "Without model_name_or_path and config_name, the demo model is trained, with defaults of its own: config/demo.py."
)

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")  # as in transformers


def parse(argv: list[str], world_size: int | None = None, **defaults: Any) -> Options:
    """Read options from `argv`: `--name value` pairs, after an optional run.json or run.yaml.

    An option on the command line wins over the run file. Both win over DEMO_RECIPE, which is used if no model is
    named, and DEMO_RECIPE wins over `defaults`. A DeepSpeed file is read, and its table printed. Its batch arithmetic
    needs `world_size`, the number of ranks; without ranks, pass None.
    Raises OptionError for an unknown option, a value of the wrong type or an unreadable file.
    """
    if argv and not argv[0].startswith("-"):
        argv = _read_run_file(argv[0]) + argv[1:]
    namespace, unknown = _parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(Options)], n=1)
        hint = f"did you mean --{close[0]}?" if close else "`python train.py --help` lists every option"
        raise OptionError(f"{unknown[0]}: unknown option; {hint}")
    given = vars(namespace)
    _rename(given)
    if not given.keys() & {"model_name_or_path", "config_name"}:
        defaults |= DEMO_RECIPE
        if "num_train_epochs" in given:
            del defaults["max_steps"]  # it would override the epochs that the user asked for
        if given.get("lr_scheduler_type") == "constant":
            del defaults["warmup_steps"]  # the warmup of the demo belongs to its own schedule
    options = Options(**defaults | given)
    if options.deepspeed:
        table = read_deepspeed_file(options, set(given), world_size)
        if os.environ.get("RANK", "0") == "0":
            print(table, flush=True)
    return options


def _read_run_file(name: str) -> list[str]:
    """The options of a .json or .yaml file as command-line words, so that both go through the same checks."""
    path = Path(name)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise OptionError(f"{name}: not an option and not a .json or .yaml file of options")
    try:
        text = path.read_text()
        # BaseLoader keeps every YAML scalar a string: 1e-4 would otherwise not be read as a number.
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"{name}: cannot be read as a file of options: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{name}: must hold one mapping from option to value, as in learning_rate: 1e-4")
    return [f"--{key}={value}" for key, value in values.items() if value not in (None, "null")]


class _Parser(argparse.ArgumentParser):
    """argparse that raises an OptionError, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}\n`python train.py --help` lists every option")


def _parser() -> _Parser:
    """The parser of all options, in groups. Options that are not given stay out of its namespace."""
    parser = _Parser(
        usage=USAGE,
        description=INTRODUCTION,
        epilog=DEMO_LINE,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=38, width=120),
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    types = get_type_hints(Options)
    for field in dataclasses.fields(Options):
        name, default, group = field.name, field.default, groups[field.metadata["group"]]
        value = _value(types[name])
        shown = "" if default is None else f" [{str(default).lower() if isinstance(default, bool) else default}]"
        group.add_argument(f"--{name}", help=field.metadata["help"] + shown, **value)
        if "_" in name:  # as in transformers: hyphens, too
            group.add_argument(f"--{name.replace('_', '-')}", dest=name, help=argparse.SUPPRESS, **value)
        if default is True:
            words = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            group.add_argument(*words, dest=name, action="store_false", help=argparse.SUPPRESS)
    for old, new in RENAMED.items():
        parser.add_argument(f"--{old}", f"--{old.replace('_', '-')}", help=argparse.SUPPRESS, **_value(types[new]))
    return parser


def _value(kind: Any) -> dict[str, Any]:
    """Keywords of add_argument for an option of this type."""
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "BOOL"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _true_or_false(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text}: pass true or false")
    return text.lower() in TRUE


def _rename(given: dict[str, Any]) -> None:
    """Give options that have an old name their new one, in place. Rank 0 says so."""
    for old, new in RENAMED.items():
        if old not in given:
            continue
        if new in given:
            raise OptionError(f"{old} {given[old]}: cannot be combined with {new}, its new name\nremove --{old}")
        given[new] = given.pop(old)
        if os.environ.get("RANK", "0") == "0":
            print(f"{old}: this option is now called {new}", file=sys.stderr)
