"""Files of JSON lines, one record each: read, and cut after a step."""

import contextlib
import json
from pathlib import Path
from typing import Any

from runtime.files import replace_text


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines. Other lines are left out, as one that a killed process left unfinished."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def drop_records_beyond(path: Path, step: int, evaluation_due: bool = False) -> None:
    """Keep only the records of the first `step` steps; none for step 0. The file is replaced in one rename.

    With `evaluation_due`, the evaluation after `step` comes again, and its record goes, too. Raises OSError.
    """
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    if evaluation_due:
        kept = [record for record in kept if record["step"] < step or "loss" in record]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
