"""The drawings of the book are those that the code draws, their texts can be read, and they show what the code does."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import checkpoint.save
from checkpoint.files import MANIFEST
from checkpoint.load import problems
from config.options import Options
from data.batches import IGNORE_INDEX
from estimate.memory import memory_by_phase
from model.build import build_model, load_config_and_tokenizer
from tests.drawings import steps
from tests.drawings.pictures import (
    DOCUMENTS,
    MOMENTS,
    OLD,
    PACKED_LENGTH,
    PICTURES,
    SAVING,
    STAGE_OPTIONS,
    STAGES,
    packed_batch,
)
from tests.drawings.svg import FILLS, SIZE, TEXTS, WIDTH, width_of
from tests.launch import ROOT, train
from tests.test_atomic import copy_before_each_change

FOLDER = ROOT / "docs" / "book" / "drawings"
SVG = "{http://www.w3.org/2000/svg}"
each_picture = pytest.mark.parametrize("name", PICTURES)

RANKS = 4  # of the picture of shards

# Words that must be in each picture.
LABELS = {
    "step-ddp": {"rank 0", "rank 1", "forward", "backward", "update", "all-reduce", "counts", "bucket 1", "bucket 4"},
    "step-fsdp": {"rank 1", "forward", "backward", "update", "all-gather", "reduce-scatter", "root", "3", "norm"},
    "shards": {*STAGES, "rank 3", "parameters", "gradients", "optimizer states"},
    "rank-grid": {f"rank {rank}" for rank in range(8)} | {f"data-parallel rank {rank}" for rank in range(4)},
    "packed-sequence": {"token", "position", "label", "target", "a6", "b4", "c3", "pad", str(IGNORE_INDEX)},
    "checkpoint-life": {*MOMENTS, OLD, f"{SAVING}/", MANIFEST},
}


def test_files_are_those_of_the_script() -> None:
    """`make drawings` would change nothing."""
    assert {path.stem for path in FOLDER.iterdir()} == PICTURES.keys() == LABELS.keys()
    for name, picture in PICTURES.items():
        assert (FOLDER / f"{name}.svg").read_text() == picture(), f"{name}: run make drawings"


@each_picture
def test_labels(name: str) -> None:
    """Title, description and labels exist. No text covers another one or leaves the picture."""
    root = ElementTree.fromstring((FOLDER / f"{name}.svg").read_text())
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title description"
    for part in ("title", "desc"):
        assert len(root.findtext(f"{SVG}{part}") or "") > 20
    texts = root.findall(f"{SVG}text")
    assert LABELS[name] <= {text.text for text in texts}
    boxes = []
    for text in texts:
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        width = width_of(text.text or "", bold=text.get("class") == "bold")
        x -= {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
        assert x >= 0, text.text
        assert x + width <= WIDTH, text.text
        assert SIZE <= y <= float(root.get("height", 0)), text.text
        boxes.append((x, x + width, y - SIZE * 0.75, y, text.text))
    for one, other in itertools.combinations(boxes, 2):
        apart = one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
        assert apart, (one, other)


def test_contrast() -> None:
    """WCAG's ratio of a text to each color behind it, on both pages, is that of its level AA."""

    def luminance(color: str) -> float:
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    behind = {"text": FILLS, "soft": {name: FILLS[name] for name in ("page", "lane")}}
    for text, fills in behind.items():
        for page in (0, 1):
            for name, colors in fills.items():
                pair = sorted([luminance(TEXTS[text][page]), luminance(colors[page])])
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (text, name, page)


def test_stages_hold_what_the_forecast_says(model_dir: Path) -> None:
    """The bytes of gradients and moments at the end of the backward pass: all of them, or one shard."""
    held = {}
    for stage, others in STAGE_OPTIONS.items():
        options = Options(model_name_or_path=str(model_dir), block_size=64, bf16=False, torch_compile=False, **others)  # type: ignore[arg-type]
        model = build_model(options, load_config_and_tokenizer(options)[0])
        held[stage] = memory_by_phase(model, options, RANKS)[-1]
    for stage, (_, gradients, moments) in STAGES.items():
        for term, everything in (("gradients", gradients), ("optimizer", moments)):
            fraction = getattr(held[stage], term) / getattr(held["DDP"], term)
            assert fraction == pytest.approx(1 if everything else 1 / RANKS, abs=0.05), (stage, term)


def test_packed_sequence() -> None:
    """A token sees itself and what is before it in its document. The picture has the tensors of a batch."""
    _, batch, mask = packed_batch()
    document = [number for number, length in enumerate(DOCUMENTS.values()) for _ in range(length)]
    document += [len(DOCUMENTS)] * (PACKED_LENGTH - len(document))
    for query, key in itertools.product(range(PACKED_LENGTH), repeat=2):
        assert bool(mask[query, key]) == (key <= query and document[key] == document[query])
    assert int(batch["targets"]) == sum(DOCUMENTS.values()) - len(DOCUMENTS)


def test_life_of_a_checkpoint(tiny: list[object], tmp_path: Path) -> None:
    """A real save leaves the directories of each moment, in this order; a run resumes as the picture says."""
    run, copies = tmp_path / "run", tmp_path / "copies"
    options = [*tiny, "--output_dir", run, "--validation_split_percentage", 0, "--save_total_limit", 1]
    options += ["--max_steps", 4, "--save_steps", 2]
    outcome = train(1, options, before=partial(copy_before_each_change_of_step_4, run, copies))
    assert outcome.exit_codes == [0], outcome.output
    seen = sorted(copies.iterdir(), key=lambda path: int(path.name))
    moments = iter(MOMENTS.items())
    moment, (directories, resumed) = next(moments)
    for copy in [*seen, run]:
        if listing(copy) == {name: sorted(found) for name, found in directories.items()}:
            assert newest_whole(copy) == resumed, moment
            moment, (directories, resumed) = next(moments, ("", ({}, "")))
    assert not moment, f"no save was seen at {moment}"


def copy_before_each_change_of_step_4(run: Path, copies: Path) -> None:
    """In the process: copy the run's directory before each change that the save of step 4 makes to the disk."""
    write = checkpoint.save._write

    def write_first(*arguments: Any) -> None:
        checkpoint.save._write = write
        write(*arguments)
        copy_before_each_change(run, copies)

    checkpoint.save._write = write_first  # type: ignore[assignment]


def listing(run: Path) -> dict[str, list[str]]:
    """The directories of checkpoints in a run, finished or not, with their files."""
    found = [*run.glob("checkpoint-*"), *run.glob(SAVING)]
    return {
        re.sub(r"\.saving-.*", SAVING, path.name): sorted(
            inner.name for inner in path.iterdir() if not inner.is_dir() or any(inner.iterdir())
        )
        for path in found
    }


def newest_whole(run: Path) -> str:
    whole = [path.name for path in run.glob("checkpoint-*") if problems(path) == []]
    return max(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_record(strategy: str, tmp_path: Path) -> None:
    """A new trace has the lanes and the collectives of the recorded one, on both ranks."""

    def names(ranks: list[list[dict[str, object]]]) -> list[list[tuple[object, object]]]:
        lanes = [sorted({str(span["lane"]) for span in spans if not span["label"]}) for spans in ranks]
        collectives = [[(span["lane"], span["label"]) for span in spans if span["label"]] for spans in ranks]
        return [[("lanes", lane) for lane in lanes], *collectives]

    recorded = json.loads(steps.STEPS.read_text())[strategy]
    assert names(steps.record(strategy, tmp_path)) == names(recorded)
