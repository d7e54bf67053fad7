"""Run train.py on real processes that meet over gloo, as torchrun would start them.

torchrun needs seconds to start each rank, because each rank imports torch. Here ranks are forked from a server that has
imported everything and run tests/warm.py. The store through which they meet is hosted by the test, as torchrun's agent
hosts it, so that no port has to be guessed.
"""

import importlib
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
PROJECT = {
    path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
}  # our modules
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.warm"])
# For the server, which starts with the first rank: where our modules are, and no CUDA context that a fork would break.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
DEADLINE = 180  # seconds; a run takes a few


@dataclass
class Outcome:
    """How the ranks of one run ended: exit codes by rank (negative: killed by that signal), and all they printed."""

    exit_codes: list[int | None]
    output: str


Ranks = list["multiprocessing.process.BaseProcess"]


def train(
    world_size: int,
    argv: Sequence[object],
    before: Callable[[], None] | None = None,
    meanwhile: Callable[[Ranks], None] | None = None,
    store: dist.TCPStore | None = None,
) -> Outcome:
    """Run `train.py argv` on `world_size` ranks and wait for their end.

    `before` is called in each process first, and may patch what it likes there; `meanwhile` here, while they run.
    With the `store` of an earlier run, the ranks are as torchrun restarts them.
    """
    store = store or host_store()
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        environment = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        ranks = [
            PROCESSES.Process(
                target=_go_to_tree,
                args=(ROOT, rank, environment, [str(word) for word in argv], log.name, pickle.dumps(before)),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            if meanwhile:
                meanwhile(list(ranks))
        finally:
            for process in ranks:
                process.join(timeout=DEADLINE)
                process.kill()  # one that hangs ends here with exit code -9, which no test expects; others have ended
                process.join()
        return Outcome([process.exitcode for process in ranks], log.read())


def host_store() -> dist.TCPStore:
    """A store through which ranks meet."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def train_ok(world_size: int, *argv: object) -> str:
    """The same; the run must end well on every rank. Gives what it printed."""
    outcome = train(world_size, argv)
    assert outcome.exit_codes == [0] * world_size, f"exit codes {outcome.exit_codes}\n{outcome.output}"
    return outcome.output


def run_instead(module: str) -> None:
    """For `before`: run this module as a program, and not train.py."""
    runpy.run_module(module, run_name="__main__")
    sys.exit()


def _go_to_tree(root: Path, *arguments: Any) -> None:
    """Run a rank with the modules of `root`. The server has imported those of the right tree, this one too."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in PROJECT and not (module.__file__ or "").startswith(f"{root}/"):
            del sys.modules[name]  # `root` is a copy of the tree, with a planted bug (tests/museum)
    importlib.import_module("tests.launch")._run(*arguments)


def _run(rank: int, environment: dict[str, str], argv: list[str], log: str, pickled_before: bytes) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *argv]
    # Loaders start their workers as they would under torchrun, and not, as a child of our server would, with servers.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    sleep = time.sleep  # torchrun ends the other ranks as soon as rank 0 has ended: they need not wait long here either
    time.sleep = lambda seconds: sleep(min(float(seconds), 0.5))
    before = pickle.loads(pickled_before)  # only now, so that it patches the modules that will run
    if before:
        before()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
