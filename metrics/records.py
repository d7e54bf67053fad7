"""Files of JSON lines, one record each: read, and cut after a step."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from config.errors import writing


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, without a last line that a killed process left unfinished."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def drop_records_beyond(path: Path, step: int) -> None:
    """Keep only the records of the first `step` steps; none for step 0. The file is replaced in one rename."""
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    beside = path.with_suffix(".tmp")
    with writing(path):
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(beside, path)
