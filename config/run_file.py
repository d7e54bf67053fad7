"""Run files: options in YAML or JSON, with values as text, as they would stand on the command line."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml

from config.errors import OptionError, first_line
from config.options import LISTS, Options
from config.text import load_json, read_text

RUN_FILES = (".json", ".yaml", ".yml")

MOST_VALUES = 100_000  # in a YAML file, where aliases of aliases can stand for any number of values

OURS = {field.name for field in dataclasses.fields(Options)}


class RepeatedKeyError(ValueError):
    """A key that a mapping has twice."""


def read_run_file(name: str) -> dict[str, str]:
    """The options of a .json or .yaml file by name, with their values as text. Those that are null are left out.

    A list becomes its elements with commas between them, and a mapping becomes JSON.
    Raises OptionError for a file that cannot be read, a file of torchtune, a key that appears twice, and a list or
    mapping for an option that takes none.
    """
    path = Path(name).expanduser()
    if path.suffix not in RUN_FILES:
        python = "\na Python file of nanoGPT becomes a YAML file: docs/coming-from.md" if path.suffix == ".py" else ""
        raise OptionError(f"{name}: not an option and not a .json or .yaml file of options{python}")
    try:
        text = read_text(path)
        values = read_json(text) if path.suffix == ".json" else _read_yaml(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        cause = getattr(error, "problem", None) or first_line(error)
        raise OptionError(f"{name}: cannot be read as a file of options: {line}{cause}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{name}: must hold one mapping from option to value, as in learning_rate: 1e-4")
    if any(isinstance(value, dict) and "_component_" in value for value in values.values()):
        raise OptionError(
            f"{name}: a file of torchtune, whose _component_ keys name Python functions\n"
            "write a file with the options of this trainer, as docs/coming-from.md shows"
        )
    options: dict[str, str] = {}
    for key, value in values.items():
        option = str(key).lstrip("-").replace("-", "_")
        if option in options:
            raise OptionError(f"{name}: the option {option} appears twice, with a hyphen and without; remove one")
        if value is not None:
            options[option] = _as_text(name, option, value)
    return options


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises RepeatedKeyError, with the line, for a key that appears twice in a mapping."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(mapping := dict(pairs)) < len(pairs):
            # JSON is YAML, once tabs, which can only stand between values, are spaces. YAML knows the lines.
            _refuse_repeats(yaml.compose(text.replace("\t", " "), yaml.SafeLoader))
        return mapping

    return load_json(text, object_pairs_hook=without_repeats)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2: 1e-4 is a number, too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(text: str) -> Any:
    """The mapping of a YAML text. Its scalars stay text, and so do those of lists; those of mappings have types."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            return None
        if _size(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases make it a file of more than {MOST_VALUES:,} values")
        _refuse_repeats(node)
        loader.flatten_mapping(node)  # merges << into it
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError("each key must be the name of an option")
        return {key.value: _value(loader, value) for key, value in node.value}
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(child, yaml.ScalarNode) for child in node.value):
        return [_value(loader, child) for child in node.value]
    return loader.construct_object(node, deep=True)


def _size(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """The number of values in a node, if each alias is written out. `sizes` are those of the nodes so far, by id."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(node)]


def _refuse_repeats(node: yaml.Node | None) -> None:
    """Raise RepeatedKeyError if a mapping within `node` has a key twice."""
    children = [] if node is None or isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, yaml.Node] = {}
        for key, _ in children:
            if key.value != "<<" and isinstance(key.value, str) and seen.setdefault(key.value, key) is not key:
                lines = [place.start_mark.line + 1 for place in (seen[key.value], key)]
                raise RepeatedKeyError(f"the key {key.value} appears twice, in lines {lines[0]} and {lines[1]}")
        children = [value for _, value in children]
    for child in children:
        _refuse_repeats(child)


def _as_text(file: str, option: str, value: Any) -> str:
    """A value as one word of the command line."""
    if isinstance(value, list) and value and all(type(element) in (str, int, float) for element in value):
        if option in OURS - LISTS and len(value) > 1:
            raise OptionError(f"{file}: {option} {json.dumps(value)}: it takes one value, not a list")
        return ",".join(map(str, value))
    if isinstance(value, dict) and option == "train_mixture":
        return ",".join(f"{source}={weight}" for source, weight in value.items())
    if isinstance(value, dict) and option == "validation_file":
        return json.dumps(value)
    if isinstance(value, dict | list):
        text, kind = json.dumps(value, default=str), "mapping" if isinstance(value, dict) else "list"
        if option in OURS and value and not option.endswith("_kwargs"):
            raise OptionError(f"{file}: {option} {text}: it takes one value, not a {kind}")
        return text
    return json.dumps(value) if isinstance(value, bool) else str(value)
