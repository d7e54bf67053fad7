"""The value of --sample_prompts: a text, or a file of prompts."""

from pathlib import Path

from config.errors import OptionError
from config.text import load_json, read_text

MOST_PROMPTS = 16  # each costs a forward pass for each token that is generated
SUFFIXES = (".txt", ".jsonl", ".json", ".md")  # of a value that must be a file


def read_prompts(value: str) -> list[str]:
    """The prompts: the value itself, or the lines of the file that it names. Lines without text are left out.

    Each line of a .jsonl file is a JSON string, or an object with one, `prompt`. So a prompt can have several lines.
    Raises OptionError for a file that cannot be read, and for no prompts or more than MOST_PROMPTS.
    """
    path = Path(value).expanduser()
    try:
        is_file = path.exists()
    except (OSError, ValueError):  # too long, or with characters that no path has
        is_file = False
    if not is_file and (path.suffix not in SUFFIXES or any(character.isspace() for character in value)):
        prompts = [value] if value.strip() else []
    else:
        try:
            lines = [line for line in read_text(path).split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OptionError(f"sample_prompts {value}: {reason}; pass a text, or a file that can be read") from error
        prompts = [_prompt(value, line) if path.suffix == ".jsonl" else line.rstrip("\r") for line in lines]
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise OptionError(f"sample_prompts {value}: has {len(prompts)} prompts; pass 1 to {MOST_PROMPTS}")
    return prompts


def _prompt(value: str, line: str) -> str:
    try:
        record = load_json(line)
    except ValueError:
        record = None
    prompt = record.get("prompt") if isinstance(record, dict) else record
    if not isinstance(prompt, str) or not prompt.strip():
        raise OptionError(
            f"sample_prompts {value}: this line has no prompt: {line[:100]}\n"
            'write each line as a JSON string, or as {"prompt": "text"}'
        )
    return prompt
