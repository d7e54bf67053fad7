"""Which rank this process is, from the variables of the launcher that started it: torchrun, mpirun or srun."""

import contextlib
import json
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from config.errors import OptionError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
NEEDED = {*TORCH} - {"LOCAL_WORLD_SIZE"}

# Where a launcher says the rank of this process, the number of ranks, the rank within its node, and the ranks of its
# node. MPI comes before Slurm, because mpirun may start its daemons with srun.
LAUNCHERS = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpirun_rsh": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
}
JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")  # equal on all ranks
FIRST_RESERVED_STEP = 0xFFFFFFF0  # Slurm numbers the steps of batch scripts and interactive shells from here
REMEDY = "start with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process"


def rank_from_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank from the variables of torchrun, mpirun or srun; without these, rank 0 of 1.

    Completes the variables in os.environ that torch reads (TORCH). Raises OptionError if there are several ranks and
    a variable is missing that they need to find each other.
    """
    given = {name: os.environ[name] for name in TORCH if os.environ.get(name)}
    launched = {} if given.keys() >= NEEDED else _from_launcher(os.environ)
    if {"RANK", "WORLD_SIZE"} <= given.keys() and any(launched.get(name) != given[name] for name in TORCH[:2]):
        launched = {}  # a launcher within one task of another
    for name in ("RANK", "WORLD_SIZE"):
        if launched and given.get(name, launched[name]) != launched[name]:
            raise OptionError(
                f"{name} {given[name]}: the launcher of this process says rank {launched['RANK']} of "
                f"{launched['WORLD_SIZE']}\nunset {name}"
            )
    known = launched | given
    if "RANK" not in given and known.get("WORLD_SIZE", "1") == "1" and known.get("LOCAL_RANK", "0") == "0":
        known = dict(zip(TORCH, ("0", "1", "0", "1", "localhost", "0"), strict=True))  # alone: it meets no other rank
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK"), ("LOCAL_RANK", "RANK")):
        if name in known and other not in known:
            raise OptionError(f"{name} {known[name]}: {other} is not set\n{REMEDY}")
    os.environ["RANK"] = known["RANK"]  # only rank 0 prints an error at once
    size = _number(known, "WORLD_SIZE", 1, 2**31)
    rank = _number(known, "RANK", 0, size - 1)
    if size == 1:
        known = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"} | known
    if "LOCAL_RANK" not in known and torch.cuda.device_count() < 2:
        known["LOCAL_RANK"] = "0"  # there is no choice between GPUs
    if missing := [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in known]:
        raise OptionError(
            f"WORLD_SIZE {size}: not set: {', '.join(missing)}\n"
            "set for each process LOCAL_RANK, its rank within the node; and for all of them MASTER_ADDR, the address\n"
            "of the node of rank 0, and MASTER_PORT, a free port of that node; or start with torchrun"
        )
    local_rank = _number(known, "LOCAL_RANK", 0, size - 1)
    _number(known, "MASTER_PORT", 0 if size == 1 else 1, 65535)
    _number({"LOCAL_WORLD_SIZE": "1"} | known, "LOCAL_WORLD_SIZE", 1, size)
    if rank == 0 and size > 1 and "MASTER_ADDR" not in given:
        _require_local(known["MASTER_ADDR"])
    os.environ.update(known)
    return rank, size, local_rank


def tell_torchrun(reason: str) -> None:
    """Put `reason` into the summary that torchrun prints when a rank has failed; otherwise its traceback hides it.

    torchrun reads it from a file of this rank: https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # a full disk
            Path(path).write_text(json.dumps({"message": message}))


def _from_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set (TORCH), as far as mpirun or srun says them; {} without such a launcher."""
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        srun = launcher == "srun"
        if rank not in environ or (srun and not _is_task_of_srun(environ)):
            continue
        # A step of srun may have fewer tasks than the job.
        ranks = (environ.get("SLURM_STEP_NUM_TASKS") if srun else None) or environ.get(size)
        if ranks is None:
            raise OptionError(f"{rank} {environ[rank]}: {size} is not set\n{REMEDY}")
        ranks_of_node = environ.get(local_size, "")
        if srun:
            ranks_of_node = _tasks_of_node(ranks_of_node, environ.get("SLURM_NODEID", "0"))
        if ranks_of_node == ranks or environ.get("SLURM_NNODES") == "1":
            ranks_of_node, address = ranks, "127.0.0.1"
        elif srun:  # rank 0 is on the first node of the step
            nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
            address = _first_node(nodes) or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
        else:
            address = _first_node(environ.get("SLURM_JOB_NODELIST", ""))
        job = next((environ[name] for name in JOB if environ.get(name)), "")
        if srun:
            job = " ".join(filter(None, [environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")]))
        # Two jobs on one node need two ports. These are below those that Linux gives to clients.
        port = str(10000 + zlib.crc32(job.encode()) % 19000) if job else ""
        found = (environ[rank], ranks, environ.get(local_rank), ranks_of_node, address, port)
        return {name: value for name, value in zip(TORCH, found, strict=True) if value}
    return {}


def _is_task_of_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process. Slurm sets SLURM_PROCID 0 in batch scripts and interactive shells, too."""
    ranks, step = environ.get("SLURM_NTASKS", "1"), environ.get("SLURM_STEP_ID", "")
    ranks = environ.get("SLURM_STEP_NUM_TASKS", ranks) if step else ranks
    if step.isdecimal() and int(step) < FIRST_RESERVED_STEP:
        if "SLURM_PTY_PORT" in environ and ranks != "1":
            raise OptionError(
                f"SLURM_NTASKS {ranks}: within srun --pty, this may be one process or one of {ranks}\n"
                "start with torchrun, or with srun without --pty; or unset SLURM_PROCID to train on one process"
            )
        return True
    if not step and "SLURM_JOB_ID" not in environ:
        return True  # not set by Slurm, which always sets the job
    if environ["SLURM_PROCID"] != "0":
        raise OptionError(f"SLURM_PROCID {environ['SLURM_PROCID']}: SLURM_STEP_ID is not set\n{REMEDY}")
    if environ.get("SLURM_NTASKS", "1") != "1":
        print(
            f"SLURM_NTASKS {environ['SLURM_NTASKS']}: started without srun and torchrun: one process", file=sys.stderr
        )
    return False


def _first_node(nodes: str) -> str:
    """The first name of a Slurm node list: node003 of `node[003-006,010],gpu1`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]


def _tasks_of_node(tasks_per_node: str, node: str) -> str:
    """The tasks of a node in a Slurm list: with `4(x2),3`, nodes 0 and 1 have 4, node 2 has 3. "" if it is unknown."""
    tasks: list[str] = []
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        tasks += [count] * int(nodes or "1")
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else ""


def _number(known: Mapping[str, str], name: str, least: int, most: int) -> int:
    value = known[name]
    if not value.isdecimal() or not least <= int(value) <= most:
        raise OptionError(f"{name} {value}: must be a number from {least} to {most}\n{REMEDY}")
    return int(value)


def _require_local(address: str) -> None:
    """Refuse an address of a node list that is not this node's. For rank 0, because the others come to it."""
    try:
        socket.create_server((address, 0)).close()
    except OSError as error:
        raise OptionError(
            f"MASTER_ADDR {address}: the first node of the job, but rank 0 is on {socket.gethostname()}: "
            f"{error.strerror}\nset MASTER_ADDR to the address of the node of rank 0, for all ranks"
        ) from error
