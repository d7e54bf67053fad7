"""From the command line, a run file and a DeepSpeed file to `Options`."""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from config.demo import DEMO_RECIPE
from config.errors import OptionError
from config.gpus import BF16, lacking
from config.options import EPOCH, GROUPS, INTERVALS, PATHS, RENAMED, TRACKERS, Options
from config.peers.answers import ANY, FALSE, TRUE, accepted_words, check_accelerate, parse_words
from config.peers.deepspeed import read_deepspeed_file
from config.peers.names import VALUES, explain, find_answer, translate
from config.run_file import RUN_FILES, read_run_file

USAGE = "train.py [run.json | run.yaml] [--OPTION VALUE ...]"

INTRODUCTION = (
    "Train a causal language model. Brackets show the default of an option. A BOOL without a value means true, and "
    "--no_OPTION means false. docs/options.md explains more."
)

DEMO_LINE = (
    "Without model_name_or_path and config_name, the demo model is trained, with defaults of its own: config/demo.py."
)

SEE_HELP = "`python train.py --help` lists every option"

TYPES = get_type_hints(Options)

ADAPTER_LEARNING_RATE = 2e-4  # the default with use_peft: adapters learn at a higher rate than full models

# Options whose values peers separate by spaces, too.
SEVERAL_WORDS = ("lora_target_modules", "target_modules", "report_to")


def parse(argv: list[str], world_size: int | None = None, **defaults: Any) -> Options:
    """Read options from `argv`: `--name value` pairs, and names of run files between them, also after --config.

    An option on the command line wins over the run files, and a later run file over an earlier one. All win over
    DEMO_RECIPE, which is used if no model is named, and DEMO_RECIPE wins over `defaults`. Options of other trainers
    are translated or refused (config/peers/names.py). A DeepSpeed file is read, and its table printed. Its batch
    arithmetic needs `world_size`, the number of ranks; without ranks, pass None.
    Raises OptionError for unknown options, a value of the wrong type or an unreadable file.
    """
    given = vars(_parser().parse_args([f"--{name}={value}" for name, value in _our_words(argv).items()]))
    _expand_paths(given)
    if not given.keys() & {"model_name_or_path", "config_name"}:
        defaults |= DEMO_RECIPE
        if "num_train_epochs" in given:
            del defaults["max_steps"]  # it would override the epochs that the user asked for
        if given.get("num_train_epochs") == 0:
            del defaults["prompt"]  # no trained model completes it
        if given.get("lr_scheduler_type") == "constant":
            del defaults["warmup_steps"]  # the warmup of the demo belongs to its own schedule
    if given.get("use_peft"):
        defaults = {"learning_rate": ADAPTER_LEARNING_RATE} | defaults
    if lacking(BF16):
        defaults = {"bf16": False} | defaults
    options = Options(**defaults | given)
    check_accelerate(options, given)
    if options.deepspeed:
        table = read_deepspeed_file(options, set(given), world_size)
        if os.environ.get("RANK", "0") == "0":
            print(table, flush=True)
    return options


def _our_words(argv: list[str]) -> dict[str, str]:
    """The options of run files and command line under our names, with their values as text.

    Raises one OptionError for all options that are unknown or refused.
    """
    on_line, files = _split(argv)
    sources = [read_run_file(file) for file in files] + [on_line]
    everything = {name: value for source in sources for name, value in source.items()}
    _check_old_names(everything)
    words: dict[str, str] = {}
    notes: dict[str, None] = {}
    problems: dict[str, str] = {}
    for source in sources:
        words |= _translate(source, everything, notes, problems)
    if problems:
        raise OptionError(_explain(problems))
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note, file=sys.stderr)
    return words


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options on the command line, the last value of each, and the names of run files.

    A word after an option is its value, unless it begins like an option; after a switch, also unless it names a file.
    --no_SWITCH means false.
    """
    options: dict[str, str] = {}
    files: list[str] = []
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        if word in ("-h", "--help"):
            _parser().parse_args(["--help"])  # prints, and exits
        if not word.startswith("-"):
            files.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        known, opposite = (
            other in TYPES or find_answer(other) is not None for other in (name, name.removeprefix("no_"))
        )
        if opposite and not known and not equals and _is_switch(name[3:]):
            options[name[3:]] = "false"
            continue
        switch = _is_switch(name)
        if not equals:
            follows = bool(words) and _is_value(words[0]) and not (switch and Path(words[0]).suffix in RUN_FILES)
            if not follows and not switch and name != "deepspeed":  # a switch beside deepspeed_config
                raise OptionError(f"argument --{name}: expected one argument\n{SEE_HELP}")
            value = words.popleft() if follows else "true"
            while name in SEVERAL_WORDS and words and _is_value(words[0]) and Path(words[0]).suffix not in RUN_FILES:
                value += f",{words.popleft()}"
        if name == "config":
            files.append(value)
        else:
            options[name] = value
    return options, files


def _is_value(word: str) -> bool:
    """Whether a word is a value, and no option: also a negative number, and a text with a space."""
    return not word.startswith("-") or " " in word or word[1:2].isdigit() or word == "-"


def _is_switch(name: str) -> bool:
    """Whether an option may stand without a value, and means true then. An unknown one may."""
    if name in ("fsdp", "packing"):  # transformers and TRL have them as switches
        return True
    if name in TYPES or name == "config":
        return TYPES.get(name) in (bool, bool | None)
    answer = find_answer(name)
    if answer and (ours := parse_words(answer.accepted.get(ANY, ""))):  # another name of an option of ours
        return any(TYPES[option] is bool for option in ours)
    return answer is None or answer.is_switch


def _translate(
    source: dict[str, str], everything: dict[str, str], notes: dict[str, None], problems: dict[str, str]
) -> dict[str, str]:
    """The options of one source under our names. Adds to `notes`, and to `problems` a message for each option."""
    words: dict[str, str] = {}
    origin: dict[str, str] = {}  # which option of the source has set one of ours
    # Our own names come first, so that a conflict names the other one.
    for name, value in sorted(source.items(), key=lambda item: item[0] not in TYPES):
        override = False
        try:
            if name in TYPES:
                words_of_value = accepted_words(VALUES[name], value, everything) if name in VALUES else None
                if words_of_value is None:
                    ours = {name: value}
                else:
                    ours = words_of_value
                    notes[explain(f"{name} {value}", VALUES[name], ours)] = None
            elif name in RENAMED:
                ours = {RENAMED[name]: value}
                notes[f"{name}: this option is now called {RENAMED[name]}"] = None
            elif answer := find_answer(name):
                override = answer.overrides
                ours, note = translate(name, value, everything)
                if name != "local_rank":  # launchers add it, the user has not typed it
                    notes[note] = None
            else:
                problems[name] = _unknown(name)
                continue
            for option, setting in ours.items():
                if words.get(option, setting) != setting and not override:
                    other = f"{origin[option]} {source[origin[option]]}"
                    raise OptionError(
                        f"{name} {value}: it means {option} {setting}, and cannot be combined with {other}\n"
                        f"remove --{name} or --{origin[option]}"
                    )
                words[option], origin[option] = setting, name
        except OptionError as error:
            problems[name] = str(error)
    return words


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, list(TYPES), n=1)
    return f"--{name}: unknown option; " + (f"did you mean --{close[0]}?" if close else SEE_HELP)


def _explain(problems: dict[str, str]) -> str:
    """One message of at most three lines that names every option with a problem."""
    (_, first), *others = problems.items()
    if not others:
        return first
    unknown = ": unknown option; "
    if all(unknown in text for text in problems.values()):
        hints = [text.partition(unknown) for text in problems.values()]
        shown = [f"{name} ({hint})" if hint != SEE_HELP else name for name, _, hint in hints]
        return f"{', '.join(shown)}: unknown options\n{SEE_HELP}"
    lines = first.splitlines()[:2]
    rest = [text.replace("\n", "; ").replace(f"; {SEE_HELP}", "") for _, text in others]
    return "\n".join([*lines, f"and {'. '.join(rest)}"])


def _check_old_names(given: dict[str, str]) -> None:
    for old, new in RENAMED.items():
        if old in given and new in given:
            raise OptionError(f"{old} {given[old]}: cannot be combined with {new}, its new name\nremove --{old}")


def _expand_paths(given: dict[str, Any]) -> None:
    """Expand ~ in every path, in place. Raises OptionError for an empty one, perhaps an unset variable."""
    for name in given.keys() & set(PATHS):
        paths = given[name].split(",")
        if not given[name]:
            if name == "train_file" and given.keys() & {"dataset_name", "train_mixture"}:
                continue
            raise OptionError(f"{name}: it is empty; pass a value, or remove --{name}")
        given[name] = ",".join(map(os.path.expanduser, paths))


class _Parser(argparse.ArgumentParser):
    """argparse that raises an OptionError, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}\n{SEE_HELP}")


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
    for field in dataclasses.fields(Options):
        name, default, group = field.name, field.default, groups[field.metadata["group"]]
        value = {"type": _interval, "metavar": "STEPS"} if name in INTERVALS else _value(TYPES[name])
        if name == "report_to":
            value = {"type": _trackers, "metavar": "NAMES"}
        shown = "" if default is None else f" [{str(default).lower() if isinstance(default, bool) else default}]"
        group.add_argument(f"--{name}", help=field.metadata["help"] + shown, **value)
    return parser


def _value(kind: Any) -> dict[str, Any]:
    """Keywords of add_argument for an option of this type."""
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "BOOL"}
    return {"type": _whole_number if kind is int else kind, "metavar": kind.__name__.upper()}


def _whole_number(text: str) -> int:
    """An integer of less than 63 bits, which may be written as 1e3."""
    with contextlib.suppress(ValueError, OverflowError):
        number = int(text) if re.fullmatch(r"\s*[-+]?\d+\s*", text) else float(text)
        if number == int(number) and abs(number) < 2**62:
            return int(number)
    raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")


def _interval(text: str) -> float:
    """A number of steps, a fraction of all steps, or EPOCH."""
    if text.lower() == "epoch":
        return EPOCH
    try:
        steps = float(text)
        if 0 <= steps < 1 or steps == int(steps) >= 1:
            return steps if 0 < steps < 1 else int(steps)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text}: pass a number of steps, a fraction of all steps below 1, or epoch")


def _trackers(text: str) -> str:
    """Names of trackers, once each, with commas between them; or none, or all."""
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    if names not in (["none"], ["all"]) and not set(names) <= set(TRACKERS):
        raise argparse.ArgumentTypeError(f"{text}: pass none, all, or some of {','.join(TRACKERS)}")
    return ",".join(names)


def _true_or_false(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text}: pass true or false")
    return text.lower() in TRUE
