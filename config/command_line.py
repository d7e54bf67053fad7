"""From the command line, a run file and a DeepSpeed file to `Options`."""

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from config.deepspeed import read
from config.demo import DEMO_RECIPE
from config.errors import OptionError
from config.options import Options


class _Parser(HfArgumentParser):
    """argparse that raises what it has to say instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}\n`python train.py --help` lists every option")


def parse(argv: list[str], world_size: int | None = None, **defaults: Any) -> Options:
    """Read options from `argv`: `--name value` pairs, after an optional run.json or run.yaml.

    An option on the command line wins over the file, and both win over `EMBEDDED_RECIPE` and other `defaults`. What a
    DeepSpeed file says is read and printed here, too; who trains on it gives the `world_size`.
    Raises OptionError for an unknown option, a value of the wrong type or an unreadable file.
    """
    parser = _Parser(Options, prog="train.py", allow_abbrev=False)
    if argv and not argv[0].startswith("-"):
        argv = _read_run_file(argv[0]) + argv[1:]
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    parser.set_defaults(**defaults)
    if not given & {"model_name_or_path", "config_name"}:
        recipe = dict(DEMO_RECIPE)
        if "num_train_epochs" in given:
            del recipe["max_steps"]  # it would win over what the user asked for
        parser.set_defaults(**recipe)
    options, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(Options)], n=1)
        hint = f"did you mean --{close[0]}?" if close else "`python train.py --help` lists every option"
        raise OptionError(f"{unknown[0]}: unknown option; {hint}")
    if options.lr_scheduler_type == "constant" and "warmup_steps" not in given:
        options.warmup_steps = 0.0  # the warmup of the demo recipe belongs to its own schedule
    if options.deepspeed:
        table = read(options, {name.removeprefix("no_") for name in given}, world_size)
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
