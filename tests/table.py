"""Every family of models through train.py, on tiny models. `make families` writes docs/models.md.

Each column is a run of train.py that is compared with another way of computing the same, in fp32 on the CPU. A cell has
the largest difference of the losses and of the relative gradient norms, or the reason for which train.py refuses.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from config.command_line import parse
from data.prepare import prepare_data
from loss.next_token import ends_with_head
from metrics.records import read_records
from tests import world
from tests.launch import ROOT, train
from tests.zoo import NAMES, config

PAGE = ROOT / "docs" / "models.md"
TOKENS, STEPS, MICRO_BATCH = 48, 3, 4
GATE = 2e-5  # nats per token, and the relative difference of gradient norms
# With the default of 1e-8, rounding errors decide the step of a value whose gradient is zero, such as a bias of keys.
EPSILON = 1e-5

# The name of each column, in order, and what it says.
COLUMNS = {
    "plain": "loss, gradient norm and parameters of three steps, against transformers with torch's AdamW",
    "fsdp": "FSDP on two ranks, against one rank",
    "packed": "documents packed into one sequence, against each document alone",
    "checkpointed": "with `--gradient_checkpointing`, against without",
    "tensor": "`--tensor_parallel 2`, against one rank",
    "context": "`--context_parallel 2`, against one rank",
    "resumed": "the third step after a resume, against the run that was not interrupted",
    "exported": "every tensor of the files, after a run with the learning rate 0",
    "memory": "whether the memory of a run is predicted",
    "head": "whether the loss applies the head in chunks, or to all logits",
}
# transformers builds and loads a model with settings of the whole process: whether weights are initialized, or tied.
ONE_MODEL_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Cell:
    """What a column says of a family: right (with the difference), refused (with the reason), or wrong."""

    verdict: str  # "right", "refused" or "wrong"
    text: str


@dataclass
class Place:
    """Where the runs of a family write: its model, the shared data, and a directory for each run."""

    name: str
    root: Path
    shared: Path
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.root / "model"

    def run(self, label: str, ranks: int, *options: object, file: str = "text.jsonl") -> list[dict[str, Any]]:
        """The records of a run of train.py. Raises Refused with the reason, and AssertionError with a traceback."""
        argv: list[object] = ["--model_name_or_path", self.model, "--train_file", self.shared / file]
        argv += ["--output_dir", self.root / label, "--data_cache_dir", self.shared / "cache", "--block_size", TOKENS]
        argv += ["--validation_split_percentage", 0, "--max_steps", STEPS, "--logging_steps", 1, "--weight_decay", 0.1]
        argv += ["--per_device_train_batch_size", MICRO_BATCH // ranks, "--learning_rate", 1e-3, "--save_steps", 0]
        argv += ["--adam_epsilon", EPSILON, "--lr_scheduler_type", "constant"]
        argv += ["--save_dtype", "float32", "--dataloader_num_workers", 0]
        outcome = train(ranks, [*argv, *options])
        if set(outcome.exit_codes) == {2}:
            raise Refused(outcome.output)
        assert set(outcome.exit_codes) == {0}, outcome.output
        (self.root / f"{label}.txt").write_text(outcome.output)
        return [record for record in read_records(self.root / label / "metrics.jsonl") if "loss" in record]


class Refused(Exception):
    """train.py has refused the options, with this output."""

    def reason(self) -> str:
        """The cause of the refusal in a few words."""
        (line, *_) = [line for line in str(self).splitlines() if "error: " in line]
        return line.partition("error: ")[2]


def make_shared(directory: Path) -> None:
    """Write what all families share: a tokenizer, documents of many lengths, and documents that fill sequences."""
    world.make_model(directory / "tokenizer")
    documents = world.make_documents()
    lines = [json.dumps({"text": text}) for text in documents]
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    ids = tokenizer("".join(documents))["input_ids"]
    texts, start = [], 0
    # With EOS, each pair has TOKENS tokens, so four pairs are four packed sequences or eight alone.
    for length in (13, TOKENS - 15, 29, TOKENS - 31, 20, TOKENS - 22, 7, TOKENS - 9):
        while True:  # a text whose tokens are as many again when it is encoded by itself
            text = tokenizer.decode(ids[start : start + length])
            start += length
            if len(tokenizer(text)["input_ids"]) == length:
                break
        texts.append(text)
    (directory / "pairs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make_model(place: Place) -> None:
    """Write the tiny model of a family. Its values differ from any initialization, so that each one has an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(place.name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(place.model)
    AutoTokenizer.from_pretrained(place.shared / "tokenizer").save_pretrained(place.model)


def difference(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The largest difference of losses, and of gradient norms as a fraction."""
    assert len(records) == len(expected)
    found = 0.0
    for one, other in zip(records, expected, strict=True):
        # maximum() keeps NaN, which max() may drop.
        amounts = abs(one["loss"] - other["loss"]), abs(one["grad_norm"] / other["grad_norm"] - 1)
        found = float(np.maximum.reduce([found, *amounts]))
    return found


def plain(place: Place) -> list[dict[str, Any]]:
    """Three steps by transformers and torch alone, with the batches of train.py. Saves the parameters."""
    argv = ["--model_name_or_path", place.model, "--train_file", place.shared / "text.jsonl", "--block_size", TOKENS]
    argv += ["--data_cache_dir", place.shared / "cache", "--validation_split_percentage", 0, "--max_steps", STEPS]
    argv += ["--per_device_train_batch_size", MICRO_BATCH, "--dataloader_num_workers", 0]
    options = parse([str(word) for word in argv])
    data = prepare_data(options, AutoTokenizer.from_pretrained(place.model))
    sampler: DistributedSampler[int] = DistributedSampler(data.train, 1, 0, shuffle=True, seed=options.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).train()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3, eps=EPSILON)
    numbers = list(sampler)
    records = []
    for step in range(STEPS):
        sequences = [data.train[number] for number in numbers[step * MICRO_BATCH : (step + 1) * MICRO_BATCH]]
        ids_BT = torch.stack([sequence.tokens for sequence in sequences]).long()
        logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"loss": loss.item(), "grad_norm": norm.item()})
    model.save_pretrained(place.root / "plain-model")
    return records


def of_plain(place: Place, first: list[dict[str, Any]]) -> float:
    with ONE_MODEL_AT_A_TIME:
        expected = plain(place)
    trained, other = (load_all(place.root / name) for name in ("one", "plain-model"))
    assert trained.keys() == other.keys()
    moved = [(trained[name] - other[name]).norm() / (1e-3 + other[name].norm()) for name in trained]
    return float(np.maximum.reduce([difference(first, expected), *(step.item() for step in moved)]))


def of_packed(place: Place, first: list[dict[str, Any]]) -> float:
    """One step on all documents: four sequences of two documents, and eight of one."""
    step = ["--max_steps", 1, "--per_device_train_batch_size"]
    packed = place.run("packed", 1, *step, 4, "--packing", "documents", file="pairs.jsonl")
    alone = place.run("alone", 1, *step, 8, "--packing", "none", file="pairs.jsonl")
    return difference(packed, alone)


def of_resumed(place: Place, first: list[dict[str, Any]]) -> float:
    place.run("stopped", 1, "--max_steps", STEPS - 1, "--save_steps", STEPS - 1)
    resumed = place.run("stopped", 1, "--resume_from_checkpoint", "auto")
    return difference(resumed[-1:], first[-1:])


def of_exported(place: Place, first: list[dict[str, Any]]) -> float:
    place.run("unchanged", 1, "--learning_rate", 0, "--max_steps", 1)
    before, after = load_all(place.model), load_all(place.root / "unchanged")
    assert before.keys() == after.keys(), f"other tensors: {sorted(before.keys() ^ after.keys())}"
    wrong = [name for name in before if not torch.equal(before[name], after[name])]
    assert not wrong, f"other values: {wrong}"
    return 0.0


def of_run(
    place: Place, first: list[dict[str, Any]], *, label: str, ranks: int = 1, options: tuple[object, ...] = ()
) -> float:
    """A run with other options, against the first one."""
    return difference(place.run(label, ranks, *options), first)


FSDP = ("--strategy", "fsdp")
WHOLE = ("--per_device_train_batch_size", MICRO_BATCH)  # ranks that split a layer or sequence read the same sequences
MEASURES: dict[str, Callable[[Place, list[dict[str, Any]]], float]] = {
    "plain": of_plain,
    "fsdp": partial(of_run, label="fsdp", ranks=2, options=FSDP),
    "packed": of_packed,
    "checkpointed": partial(of_run, label="checkpointed", options=("--gradient_checkpointing",)),
    "tensor": partial(of_run, label="tensor", ranks=2, options=(*FSDP, *WHOLE, "--tensor_parallel", 2)),
    "context": partial(of_run, label="context", ranks=2, options=(*WHOLE, "--context_parallel", 2)),
    "resumed": of_resumed,
    "exported": of_exported,
}


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of a model."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def measure(name: str, root: Path, shared: Path, columns: tuple[str, ...] = tuple(COLUMNS)) -> dict[str, Cell]:
    """The cells of a family. `root` is a new directory, and `shared` that of make_shared."""
    place = Place(name, root, shared)
    with ONE_MODEL_AT_A_TIME:
        make_model(place)
    cells: dict[str, Cell] = {}
    first = attempt(lambda: place.run("one", 1))
    if isinstance(first, Cell):
        return dict.fromkeys(columns, first)
    for column in columns:
        if column in MEASURES:
            result = attempt(partial(MEASURES[column], place, first))
            cells[column] = result if isinstance(result, Cell) else judged(result)
    if "memory" in columns:
        (line,) = re.findall(r"^memory +(.*)", (root / "one.txt").read_text(), re.MULTILINE)
        told = line.startswith("predicted")
        cells["memory"] = Cell("right" if told else "refused", "predicted" if told else line)
    if "head" in columns:
        with ONE_MODEL_AT_A_TIME:
            chunked = ends_with_head(AutoModelForCausalLM.from_config(config(name)))
        cells["head"] = Cell("right", "in chunks" if chunked else "all logits")
    return cells


def attempt(function: Callable[[], Any]) -> Any:
    """The result of a measurement; a Cell if train.py refused or went wrong."""
    try:
        return function()
    except Refused as refusal:
        return Cell("refused", refusal.reason())
    except Exception as error:
        lines = str(error).strip().splitlines() or [traceback.format_exc().splitlines()[-1]]
        told = [line for line in lines if re.match(r"^\w*(Error|Exception)\b|.*Error: ", line)] or lines
        return Cell("wrong", f"{type(error).__name__}: {told[-1][:200]}")


def judged(value: float) -> Cell:
    return Cell("right" if value <= GATE else "wrong", "equal" if value == 0 else f"{value:.0e}")


def page(table: dict[str, dict[str, Cell]]) -> str:
    """docs/models.md: the table, and the reasons for refusals as notes."""
    notes: list[str] = []

    def shown(cell: Cell) -> str:
        if cell.verdict == "right":
            return cell.text
        reason = re.sub(r"\s+", " ", cell.text).replace("|", "\\|")
        if cell.verdict == "wrong":
            return f"**wrong: {reason}**"
        if reason not in notes:
            notes.append(reason)
        return f"refused [{notes.index(reason) + 1}](#refusals)"

    rows = [f"| {name} | {' | '.join(shown(cells[column]) for column in COLUMNS)} |" for name, cells in table.items()]
    head = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    columns = [f"- **{name}**: {text}." for name, text in COLUMNS.items()]
    refusals = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    versions = f"torch {torch.__version__.split('+')[0]} and transformers {transformers.__version__}"
    return "\n".join(
        [
            "# Families of models",
            "",
            f"`make families` writes this page, with {versions}. Each row is a tiny model of the",
            "family with random values and each kind of its layers. Each cell compares a run of train.py, in fp32 on",
            "the CPU, with another run. A number is the largest difference of losses (nats per token) and of gradient",
            f"norms (as a fraction); up to {GATE:.0e} is right. [tests/table.py](../tests/table.py) measures,",
            "[tests/zoo.py](../tests/zoo.py) has the configurations. A family that is not in the table may work,",
            "because the checks do not look at names.",
            "",
            *columns,
            "",
            *head,
            *rows,
            "",
            "## Refusals",
            "",
            "train.py prints these before it trains, with a remedy.",
            "",
            *refusals,
            "",
        ]
    )


def read_page(text: str) -> dict[str, dict[str, str]]:
    """The verdict of each cell of a page: families, then columns."""
    told = {}
    for line in text.splitlines():
        name, *cells = re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |"))
        if len(cells) == len(COLUMNS) and name != "family":
            words = [cell.removeprefix("**").partition(" ")[0].rstrip(":") for cell in cells]
            verdicts = [word if word in ("refused", "wrong") else "right" for word in words]
            told[name] = dict(zip(COLUMNS, verdicts, strict=True))
    return told


def main(argv: list[str]) -> int:
    """Measure families, two at a time, and write the page if all were measured. Results are kept in --output_dir."""
    parser = argparse.ArgumentParser(description="Measure families of models, and write docs/models.md.")
    parser.add_argument("names", nargs="*", help="families; without any, all of them, and the page is written")
    parser.add_argument(
        "--output_dir", help="where results are kept: families with a result there are not measured again"
    )
    arguments = parser.parse_args(argv)
    names = arguments.names or NAMES
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        shared, kept = Path(temporary) / "shared", Path(arguments.output_dir or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        make_shared(shared)

        def cells(name: str) -> dict[str, Cell]:
            saved = kept / f"{name}.json"
            if not saved.exists():
                measured = measure(name, Path(temporary) / name, shared)
                saved.write_text(json.dumps({column: vars(cell) for column, cell in measured.items()}))
                print(f"{name}: " + ", ".join(f"{column} {cell.text}" for column, cell in measured.items()), flush=True)
            return {column: Cell(**values) for column, values in json.loads(saved.read_text()).items()}

        with ThreadPoolExecutor(2) as threads:
            table = dict(zip(names, threads.map(cells, names), strict=True))
    if not arguments.names:
        PAGE.write_text(page(table))
    wrong = [
        f"{name}, {column}: {cell.text}"
        for name, row in table.items()
        for column, cell in row.items()
        if cell.verdict == "wrong"
    ]
    print("\n".join(wrong) or "no cell is wrong")
    return len(wrong) > 0


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main(sys.argv[1:]))
