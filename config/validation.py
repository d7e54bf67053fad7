"""Validation in the options: the sets by name, the metric that chooses the best model, and what that needs."""

import re
from pathlib import Path

from config.errors import OptionError
from config.options import Options
from config.text import load_json

NAME = re.compile(r"[\w-]+")  # of a validation set

ASK = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model")  # options that compare evaluations


def validation_files(value: str) -> dict[str, str]:
    """The files of each validation set, by the start of the names of its metrics. Raises OptionError.

    --validation_file names one set, `eval`: a file, or several with commas between them. Or it names each set, as
    NAME=FILE,NAME=FILE or as a JSON mapping, where a list holds the files of a set. A set NAME is `eval_NAME`, as in
    transformers.
    """
    parts = [tuple(part.split("=", 1)) for part in value.split(",")]
    if value.lstrip().startswith("{"):
        try:
            parts = [
                (name, ",".join(files) if isinstance(files, list) else files)
                for name, files in load_json(value, object_pairs_hook=list)
            ]
        except (ValueError, TypeError) as error:
            raise OptionError(f"validation_file {value}: pass a JSON mapping of names to files: {error}") from error
    elif len(parts[0]) == 1 or Path(value).expanduser().exists() or not NAME.fullmatch(parts[0][0]):
        return {"eval": value}  # a path may have a = in it
    sets: dict[str, str] = {}
    for name, *files in parts:
        named = NAME.fullmatch(name) and f"eval_{name}" not in sets
        if not named or not files or not isinstance(files[0], str) or not files[0]:
            raise OptionError(
                f"validation_file {value}: pass each set once, as NAME=FILE\n"
                "a name has letters, digits, _ and -; a directory or a quoted glob holds several files"
            )
        sets[f"eval_{name}"] = files[0]
    if not sets:
        raise OptionError(f"validation_file {value}: pass a JSON mapping of names to files: it is empty")
    return sets


def best_metric(options: Options) -> str | None:
    """The metric by which evaluations are compared, lower is better; None if no option asks to compare them."""
    if not any(getattr(options, name) for name in ASK):
        return None
    name = options.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def check_metric(options: Options) -> None:
    """Refuse a metric that no evaluation has. Raises OptionError."""
    name = best_metric(options)
    sets = validation_files(options.validation_file) if options.validation_file else {"eval": ""}
    kinds = ("loss",) if options.objective == "dpo" else ("loss", "perplexity", "bits_per_byte")
    known = [f"{start}_{kind}" for start in sets for kind in kinds]
    if name and name not in known:
        raise OptionError(f"metric_for_best_model {name}: no evaluation has it\npass one of {', '.join(known)}")


def check_intervals(options: Options) -> None:
    """Refuse to choose among checkpoints that are not evaluated. Raises OptionError."""
    evaluate, save = options.eval_steps, options.save_steps
    if options.early_stopping_patience and not evaluate:
        raise OptionError(
            f"early_stopping_patience {options.early_stopping_patience}: evaluations decide, but there are none during "
            "training\npass --eval_steps"
        )
    if options.load_best_model_at_end and not (evaluate and save and save % evaluate == 0):
        raise OptionError(
            f"load_best_model_at_end true: each checkpoint must be evaluated, but save_steps {save} is no multiple of "
            f"eval_steps {evaluate}\npass --eval_steps, and --save_steps as a multiple of it"
        )


def check_validation(options: Options, exists: bool) -> None:
    """Refuse to evaluate only, or to compare evaluations, if there is no validation data. Raises OptionError."""
    if options.evaluates_only and not exists:
        raise OptionError(
            "num_train_epochs 0: only evaluates, and there is no validation data\n"
            "pass --validation_file, or a --validation_split_percentage above 0"
        )
    if best_metric(options) and not exists:
        asked = next(name for name in ASK if getattr(options, name))
        raise OptionError(
            f"{asked}: there is no validation data, so nothing is evaluated\n"
            "pass --validation_file, or a --validation_split_percentage above 0"
        )
