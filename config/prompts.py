"""The value of --sample_prompts: a text, or a file of prompts."""

from pathlib import Path
from typing import Any

from config.errors import OptionError
from config.text import load_json, read_text

MOST_PROMPTS = 16  # each costs a forward pass for each token that is generated
SUFFIXES = (".txt", ".jsonl", ".json", ".md")  # of a value that must be a file, ...
STARTS = ("/", "~/", "./", "../")  # ... and how one begins


def read_prompts(value: str) -> list[str]:
    """The prompts: the value itself, or the lines of the file that it names. Lines without text are left out.

    Each line of a .jsonl file, and each entry of the list in a .json file, is a string, or an object with one,
    `prompt`. So a prompt can have several lines. Raises OptionError for a file that cannot be read, and for no prompts
    or more than MOST_PROMPTS.
    """
    path = Path(value).expanduser()
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long, or with characters that no path has
        is_file = False
    like_a_path = path.suffix in SUFFIXES or value.startswith(STARTS)
    if not is_file and (not like_a_path or any(character.isspace() for character in value)):
        prompts = [value] if value.strip() else []
    else:
        prompts = _read_file(value, path)
    if not 0 < len(prompts) <= MOST_PROMPTS:
        shown = value if len(value) <= 100 else f"{value[:100]}..."
        raise OptionError(f"sample_prompts {shown}: has {len(prompts)} prompts; pass 1 to {MOST_PROMPTS}")
    return prompts


def _read_file(value: str, path: Path) -> list[str]:
    try:
        text = read_text(path)
        entries = load_json(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"sample_prompts {value}: {reason}; pass a text, or a file that can be read") from error
    if path.suffix == ".json":
        if not isinstance(entries, list):
            raise OptionError(f'sample_prompts {value}: it has no list\nwrite ["prompt", "another prompt"]')
        return [_prompt(value, f"entry {number}", entry) for number, entry in enumerate(entries, 1)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line.rstrip("\r") for _, line in lines]
    return [_prompt(value, f"line {number}", _record(line)) for number, line in lines]


def _record(line: str) -> Any:
    try:
        return load_json(line)
    except ValueError:
        return None


def _prompt(value: str, place: str, record: Any) -> str:
    prompt = record.get("prompt") if isinstance(record, dict) else record
    if not isinstance(prompt, str) or not prompt.strip():
        raise OptionError(
            f'sample_prompts {value}: {place} has no prompt\nwrite it as a JSON string, or as {{"prompt": "text"}}'
        )
    return prompt
