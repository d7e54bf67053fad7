"""Draw docs/book/drawings/*.svg; `record` first traces the steps of two of them again.

make drawings
make drawings ARGS=record
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.drawings.pictures import PICTURES
from tests.drawings.steps import STEPS, record
from tests.launch import ROOT

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.drawings", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["record"], help="trace the steps of the timelines again")
    if parser.parse_args().what == "record":
        with tempfile.TemporaryDirectory() as name:
            recorded = {strategy: record(strategy, Path(name)) for strategy in ("ddp", "fsdp")}
        STEPS.write_text(json.dumps(recorded, indent=1) + "\n")
    folder = ROOT / "docs" / "book" / "drawings"
    folder.mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        (folder / f"{name}.svg").write_text(picture())
        print(f"wrote {folder / name}.svg")
