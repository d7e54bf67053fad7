"""Files of JSON lines: read, and cut after a step."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that a killed process left unfinished is not one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def drop_records_beyond(path: Path, step: int) -> None:
    """Leave only the rows of the first `step` steps, and none at 0, in a file that is then there whole or as before."""
    kept = [row for row in read_records(path) if row["step"] <= step] if step else []
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(beside, path)
