"""Whether this trainer and others do the same work, before anyone compares how fast they do it.

    python -m compare.peers.same [--ranks 2] [--peers "HF Trainer;Accelerate"] [options of train.py]

All start from the same random weights and make 20 steps on the same blocks in the same order: learning rate constant,
no weight decay, clipping to 1. compare/peers/witness.py sees from inside of each process what it did. Prints for each:

    tokens        SHA-256 over the token ids of all global batches; a peer whose hash differs has other data
    loss          the largest difference of its losses from ours, of 20 global batches
    weights, gradients, moments    dtypes that the optimizer updates with
    products      dtypes of the factors of all matrix products of the second step
    lines         of Python that a user writes (in trainers.py, without what is shared), or of train.py, can read

Exits with 1 if a peer trained on other tokens, or ended early. A peer that is not installed is named and left out.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import data.ledger
from compare.bench import ON_GPU, SHAPES, started
from compare.packing import TRAIN
from compare.peers import titan
from compare.peers.trainers import PEERS, package_of, versions_of
from compare.peers.witness import STEPS
from compare.sharded import configuration
from config.command_line import parse
from metrics.records import read_records
from model.build import load_config_and_tokenizer

COLUMNS = ("weights", "gradients", "moments", "products")


def main() -> int:
    """Run one trainer after another, and print the table; 1 if one of them did other work."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", choices=SHAPES, default="0.6B", help="The shape of this Qwen3; on a GPU only.")
    parser.add_argument("--ranks", type=int, default=1 if ON_GPU else 2, help="Processes, one per GPU.")
    parser.add_argument("--peers", help='Names between semicolons, as in "HF Trainer;Lightning".')
    arguments, more = parser.parse_known_args()
    names = [name for name in PEERS if not name.endswith("compiled")]
    if arguments.peers:
        names = arguments.peers.split(";")
        if unknown := [name for name in names if name not in PEERS]:
            parser.error(f"--peers {unknown[0]}: pass some of {'; '.join(PEERS)}")
    for name in [name for name in names if not importlib.util.find_spec(package_of(name))]:
        print(f"{name}: {package_of(name)} is not installed")
        names.remove(name)
    with tempfile.TemporaryDirectory() as folder:
        argv = common_options(folder, arguments.model, more)
        where = torch.cuda.get_device_name() if ON_GPU else "CPU"
        print(f"{arguments.ranks} ranks, {where}, {versions_of(names)}\n{' '.join(argv[2:])}\n")
        print(f"| | tokens | loss | {' | '.join(COLUMNS)} | lines |\n" + "|---" * (len(COLUMNS) + 4) + "|")
        expected = ours(folder, arguments.ranks, argv)
        print(row("train.py", expected, 0.0, len(TRAIN.read_text().splitlines())), flush=True)
        others = []
        for name in names:
            seen = peer(name, folder, arguments.ranks, argv)
            if not seen:
                print(f"{name}: ended early\n" + Path(f"{folder}/{name}.log").read_text()[-2000:], flush=True)
            pairs = zip(seen.get("losses", []), expected["losses"], strict=False)
            difference = max((abs(loss - other) for loss, other in pairs), default=float("nan"))
            if seen:
                written = titan if name.startswith("torchtitan") else PEERS[name][0]
                print(row(name, seen, difference, len(inspect.getsource(written).splitlines())), flush=True)
            others += [name] if seen.get("tokens") != expected["tokens"] else []
    if others:
        print(f"\nother work: {', '.join(others)}")
    return int(bool(others))


def common_options(folder: str, model: str, more: list[str]) -> list[str]:
    """The options of all: a model with random weights and the demo's tokenizer is in `folder`/model."""
    argv = ["--model_name_or_path", f"{folder}/model", "--validation_split_percentage", "0", "--weight_decay", "0"]
    argv += ["--lr_scheduler_type", "constant", "--learning_rate", "1e-4", "--save_steps", "0", "--eval_steps", "0"]
    argv += ["--per_device_train_batch_size", "4", *(["--block_size", "4096"] if ON_GPU else []), *more]
    config, tokenizer = load_config_and_tokenizer(parse([]))
    if ON_GPU:
        config = configuration({**SHAPES[model], "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    text = Path(folder) / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted(TRAIN.parent.glob("*/*.py"))))
    return [*argv, "--train_file", str(text)]


def ours(folder: str, ranks: int, argv: list[str]) -> dict[str, Any]:
    """What train.py did. Raises RuntimeError if it failed."""
    more = ["--output_dir", f"{folder}/ours", "--ledger", "--logging_steps", "1", "--max_steps", str(STEPS)]
    with started(
        ranks, ["-m", "compare.peers.witness", f"{folder}/ours", *argv, *more], f"{folder}/ours.log"
    ) as processes:
        if any(process.wait() for process in processes):
            raise RuntimeError(Path(f"{folder}/ours.log").read_text()[-4000:])
    batches = [[entry[2] for entry in entries] for entries in data.ledger.read(Path(folder) / "ours").values()]
    losses = [record["loss"] for record in read_records(Path(folder) / "ours" / "metrics.jsonl") if "loss" in record]
    return witnessed(folder, "ours", 1) | {"tokens": hash_of(batches), "losses": losses}


def peer(name: str, folder: str, ranks: int, argv: list[str]) -> dict[str, Any]:
    """What a peer did; {} if it failed."""
    program = [
        "-m",
        "compare.peers.trainers",
        name,
        "--witness",
        f"{folder}/{name}",
        *argv,
        "--output_dir",
        f"{folder}/{name}",
    ]
    with started(ranks, program, f"{folder}/{name}.log") as processes:
        if any(process.wait() for process in processes):
            return {}
    return witnessed(folder, name, ranks)


def witnessed(folder: str, name: str, ranks: int) -> dict[str, Any]:
    """What the witnesses of all ranks saw, as one: the global batches and their mean losses."""
    seen = [json.loads(Path(f"{folder}/{name}-{rank}.json").read_text()) for rank in range(ranks)]
    steps = range(len(seen[0]["tokens"]))
    tokens = [[hashed for one in seen for hashed in one["tokens"][step]] for step in steps]
    losses = [[loss for one in seen for loss in one["losses"][step]] for step in steps]
    means = [sum(values) / max(1, len(values)) for values in losses]
    return {name: seen[0][name] for name in COLUMNS} | {"tokens": hash_of(tokens), "losses": means}


def hash_of(batches: list[list[str]]) -> str:
    """One hash of all steps, whatever the order within a global batch."""
    return hashlib.sha256(json.dumps([sorted(batch) for batch in batches]).encode()).hexdigest()[:12]


def row(name: str, seen: dict[str, Any], difference: float, lines: int) -> str:
    """A line of the table."""
    cells = [seen["tokens"], f"{difference:.1e}", *(", ".join(seen[column]) for column in COLUMNS), str(lines)]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
