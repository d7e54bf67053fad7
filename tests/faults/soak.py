"""Random faults against training runs of random topology, strategy and data source, for as long as asked.

    make soak MINUTES=30 [SEED=7]
    PYTHONPATH=. python -m tests.faults.soak --minutes 30 [--seed 7]

Each round draws a run from its seed, and breaks it several times: ranks are killed, stopped or signaled at random
steps, and between two attempts a checkpoint or prepared data are damaged. Each attempt continues with
--resume_from_checkpoint auto. At the end, the losses, the ledger, the finished model and the files must be those of a
run without faults: to the bit on one topology, and within 1e-5 where attempts change it. A round that differs prints
its seed, and `--seed` replays it alone.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from data.ledger import differences, problems, read
from tests import world
from tests.faults.torchrun import last_step
from tests.kills import kill_at_random
from tests.launch import Ranks, train
from tests.proof import relative_l2
from tests.test_resume import trajectory

STEPS = 18
ATTEMPTS = 4  # that are broken, of each run
DEADLINE = 90  # seconds; a run takes a few

TOPOLOGIES = [
    (1, ""),
    (2, ""),
    (2, "--shard_optimizer"),
    (2, "--strategy fsdp"),
    (2, "--strategy fsdp --reshard_after_forward false"),
    (2, "--strategy fsdp --gradient_checkpointing"),
    (4, "--strategy fsdp --replicas 2"),
    (2, "--strategy fsdp --tensor_parallel 2"),
]
SOURCES = ["--packing none", "--packing concat", "--packing documents", "--packing concat --streaming"]
OTHERS = ["", "--dataloader_num_workers 1", "--async_save false", "--save_total_limit 2", "--eval_steps 4"]


class Plan(NamedTuple):
    """What a round draws: a run, and where its attempts run."""

    topologies: list[tuple[int, str]]  # of the attempts; the run without faults has the first
    options: list[str]


def draw_plan(draw: random.Random) -> Plan:
    """A run of one topology, or of two that the attempts change between. A stream keeps its topology."""
    source = draw.choice(SOURCES)
    topologies = draw.sample(TOPOLOGIES, 1 if "--streaming" in source else draw.choice([1, 1, 2]))
    return Plan(
        topologies, [*source.split(), *draw.choice(OTHERS).split(), "--save_steps", str(draw.choice([2, 3, 5]))]
    )


# --- Faults during an attempt: each waits for a random step, and acts on the ranks ------------------------------------


def wait_for_step(draw: random.Random, run: Path, ranks: Ranks) -> None:
    """Until a random step after the last one, or the end of rank 0."""
    aim = last_step(run) + draw.randrange(1, 7)
    end = time.monotonic() + DEADLINE
    while ranks[0].is_alive() and last_step(run) < aim and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.1))


def signal_ranks(numbers: list[int], everyone: bool, draw: random.Random, run: Path, ranks: Ranks) -> None:
    """Send signals to one rank, or to all."""
    wait_for_step(draw, run, ranks)
    chosen = ranks if everyone else [draw.choice(ranks)]
    for number in numbers:
        for rank in chosen:
            with suppress(ProcessLookupError):
                os.kill(rank.pid or 0, number)
        time.sleep(draw.uniform(0, 0.3))


def stop_one(draw: random.Random, run: Path, ranks: Ranks) -> None:
    """Stop a rank until the others have ended."""
    wait_for_step(draw, run, ranks)
    chosen = draw.choice(ranks)
    with suppress(ProcessLookupError):
        os.kill(chosen.pid or 0, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE
    for rank in ranks:
        if rank is not chosen:
            rank.join(max(0.0, end - time.monotonic()))
    left = [rank.pid for rank in ranks if rank is not chosen and rank.is_alive()]
    chosen.kill()
    assert not left, "ranks wait for ever for one that is stopped"


def kill_any(draw: random.Random, run: Path, ranks: Ranks) -> None:
    """Kill one rank or all, in a random step."""
    kill_at_random(draw, run, STEPS, 3.0, ranks)


DURING: dict[str, Callable[..., None]] = {
    "SIGKILL of one rank or of all": kill_any,
    "SIGTERM to one rank": partial(signal_ranks, [signal.SIGTERM], False),
    "SIGTERM twice to all ranks": partial(signal_ranks, [signal.SIGTERM, signal.SIGTERM], True),
    "SIGUSR1 to one rank": partial(signal_ranks, [signal.SIGUSR1], False),
    "a rank stopped for a moment": partial(signal_ranks, [signal.SIGSTOP, signal.SIGCONT], False),
    "a rank stopped": stop_one,
}


# --- Damage between two attempts --------------------------------------------------------------------------------------


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def flip_bit(draw: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def damage_checkpoint(draw: random.Random, run: Path, cache: Path) -> None:
    """Flip a bit in the newest checkpoint, cut one of its files, or add a file. An older one must remain."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if len(checkpoints) < 2:
        return
    path = draw.choice(files_of(checkpoints[-1]))
    act = draw.choice(["flip", "cut", "add"])
    if act == "flip":
        flip_bit(draw, path)
    elif act == "cut":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    else:
        shutil.copy(path, checkpoints[-1] / f"another-{path.name}")


def damage_data(draw: random.Random, run: Path, cache: Path) -> None:
    """Flip a bit of prepared data, or remove a file of it."""
    files = [path for path in files_of(cache) if path.suffix != ".lock"]
    if files:
        path = draw.choice(files)
        flip_bit(draw, path) if draw.random() < 0.7 else path.unlink()


def nothing(draw: random.Random, run: Path, cache: Path) -> None:
    """Only the fault of the attempt."""


BETWEEN = {"a damaged checkpoint": damage_checkpoint, "damaged prepared data": damage_data, "": nothing}


# --- Rounds -----------------------------------------------------------------------------------------------------------


def soak_round(seed: int, options: list[object], directory: Path) -> list[str]:
    """One run with faults and one without. Returns what differs."""
    draw = random.Random(seed)
    plan = draw_plan(draw)
    run, cache = directory / "run", directory / "cache"
    steps = ["--max_steps", STEPS, "--ddp_timeout", 10, "--ledger", "--disable_tqdm", "true"]
    argv = [*options, *plan.options, *steps]
    broken = [*argv, "--output_dir", run, "--data_cache_dir", cache, "--resume_from_checkpoint", "auto"]
    size, words = plan.topologies[0]
    print(f"seed {seed}: {plan.topologies}, {' '.join(plan.options)}", flush=True)
    outcome = train(size, [*argv, *words.split(), "--output_dir", directory / "unbroken"])
    if outcome.exit_codes != [0] * size:
        return [f"the run without faults ended with {outcome.exit_codes}\n{outcome.output}"]
    for attempt in range(ATTEMPTS):
        size, words = draw.choice(plan.topologies)
        fault, damage = draw.choice(list(DURING)), draw.choice(list(BETWEEN))
        outcome = train(size, [*broken, *words.split()], meanwhile=partial(DURING[fault], draw, run))
        print(f"  attempt {attempt}, {size} ranks: {fault}, exit codes {outcome.exit_codes}", damage, flush=True)
        if re.search(r'File ".*/train\.py"', outcome.output):  # a worker of a killed rank may print one of its own
            return [f"a traceback after {fault}\n{outcome.output}"]
        if outcome.exit_codes == [0] * size:
            break
        BETWEEN[damage](draw, run, cache)
    size, words = draw.choice(plan.topologies)
    outcome = train(size, [*broken, *words.split()])
    if outcome.exit_codes != [0] * size:
        return [f"the last attempt ended with {outcome.exit_codes}\n{outcome.output}"]
    return compare(run, directory / "unbroken", exact=len(plan.topologies) == 1)


def compare(run: Path, unbroken: Path, exact: bool) -> list[str]:
    """What differs between a run and the one without faults."""
    found = problems(run) + differences(run, unbroken)
    if read(run).keys() != read(unbroken).keys():
        found.append(f"the ledger has {len(read(run))} steps, and not {len(read(unbroken))}")
    losses = [[row.get("loss", row.get("eval_loss")) for row in trajectory(path)] for path in (run, unbroken)]
    models = [load_file(path / "model.safetensors") for path in (run, unbroken)]
    if exact:
        if trajectory(run) != trajectory(unbroken):
            found.append(f"metrics differ: {losses}")
        if any((models[0][name] != models[1][name]).any() for name in models[1]):
            found.append("the finished models differ")
    else:
        if len(losses[0]) != len(losses[1]) or max(map(_distance, *losses)) > 1e-5:
            found.append(f"losses differ: {losses}")
        if (distance := relative_l2(*models)) > 1e-5:
            found.append(f"the finished models differ by {distance}")
    found += [f"left behind: {path.name}" for path in run.iterdir() if path.name.startswith((".saving", ".exporting"))]
    return found


def _distance(a: Any, b: Any) -> float:
    return abs(a - b)


def main(argv: list[str]) -> int:
    """Run rounds until the time is over, or one round with a seed. Returns 1 if one differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, help="Replay this round alone.")
    arguments = parser.parse_args(argv)
    end, rounds = time.monotonic() + 60 * arguments.minutes, 0
    seeds = random.SystemRandom()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model, documents = world.make_model(place / "model"), world.make_train_file(place / "documents.jsonl")
        options = world.options(model, documents, place / "cache")
        while time.monotonic() < end:
            seed = seeds.randrange(10**9) if arguments.seed is None else arguments.seed
            directory = place / "round"
            if found := soak_round(seed, options, directory):
                kept = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
                shutil.move(directory, kept)
                print("\n".join(found))
                print(f"seed {seed} differs, after {rounds} rounds that did not; its files are in {kept}")
                return 1
            shutil.rmtree(directory)
            rounds += 1
            if arguments.seed is not None:
                break
    print(json.dumps({"rounds": rounds, "minutes": arguments.minutes, "differences": 0}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
