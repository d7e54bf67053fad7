"""Proves runtime/launcher.py and gpus.py: ranks that torchrun, srun, mpirun or a script has started find each other.

A launcher that is only half recognized must end within a second: ranks that wait for each other say nothing.
"""

import os
import socket
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config.checks import check
from config.errors import OptionError
from config.options import Options
from metrics.hardware import gpu_memory
from runtime import rank_from_environment, require_own_gpu
from runtime.launcher import LAUNCHERS, TORCH
from runtime.process import _mistake
from tests.launch import train

HOST = socket.gethostname()
HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
MEET = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
# What Slurm 24 sets in a job of two nodes and five tasks: for the batch script, and for a task of srun.
JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[007-008]"}
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "3,2"}
TASK = {**STEP, "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
# The daemon of mpirun on the second node is a task of srun; its own ranks have the variables of Open MPI.
OPEN_MPI = {
    **{**TASK, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "PMIX_NAMESPACE": "prterun-1"},
    **dict(zip(LAUNCHERS["mpirun"], ("3", "4", "1", "2"), strict=True)),
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PBS_JOBID": "7.pbs"}
ALONE = (0, 1, 0, "1", "localhost", "0")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, without the variables of any launcher."""
    launchers = (*TORCH, "SLURM", "OMPI", "PMI")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    monkeypatch.setattr(os, "environ", variables)
    return variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, ALONE, id="alone"),
        pytest.param({"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "WORLD_SIZE": "1"}, ALONE, id="left over"),
        pytest.param({**HAND, **MEET}, (1, 2, 1, None, "node7", "1234"), id="by hand, or Kubeflow"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, None, "localhost", "0"), id="by hand, one"),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2", **MEET}, (1, 2, 0, None, "node7", "1234"), id="one GPU a node"),
        pytest.param(TASK, (4, 5, 1, "2", "gpu007", None), id="srun"),
        pytest.param({**TASK, **MEET, "WORLD_SIZE": "5"}, (4, 5, 1, "2", "node7", "1234"), id="srun with addresses"),
        pytest.param({**TASK, "RANK": "4"}, (4, 5, 1, "2", "gpu007", None), id="srun with RANK"),
        # Three of the five tasks of the job, on its second node alone.
        pytest.param(
            {**TASK, "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0"}
            | {"SLURM_STEP_NODELIST": "gpu008", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
            (2, 3, 2, "3", "127.0.0.1", None),
            id="srun for a part of the job",
        ),
        pytest.param({**TASK, **HAND, **MEET}, (1, 2, 1, None, "node7", "1234"), id="torchrun in srun"),
        pytest.param(BATCH, ALONE, id="batch script"),
        pytest.param({**BATCH, "SLURM_STEP_ID": "4294967291"}, ALONE, id="batch step"),
        pytest.param({**BATCH, **MEET}, ALONE, id="batch script with addresses"),
        pytest.param({**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_PTY_PORT": "1"}, ALONE, id="salloc with a step"),
        pytest.param(JOB, ALONE, id="salloc"),
        pytest.param({**BATCH, **HAND, **MEET}, (1, 2, 1, None, "node7", "1234"), id="torchrun in a batch script"),
        pytest.param(
            {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"} | {"SLURM_PTY_PORT": "1"},
            ALONE,
            id="srun --pty",
        ),
        pytest.param(OPEN_MPI, (3, 4, 1, "2", "gpu007", None), id="mpirun of Open MPI in Slurm"),
        pytest.param(MPICH, (1, 2, 1, "2", "127.0.0.1", None), id="mpiexec of MPICH or Intel"),
    ],
)
def test_rank(
    variables: dict[str, str], expected: tuple[Any, ...], environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    environment.update(variables)
    assert rank_from_environment() == expected[:3]
    assert [int(environment[name]) for name in TORCH[:3]] == list(expected[:3])
    assert environment.get("LOCAL_WORLD_SIZE") == expected[3]
    assert environment["MASTER_ADDR"] == expected[4]
    if expected[5] is None:
        assert 10000 <= int(environment["MASTER_PORT"]) < 29000
    else:
        assert environment["MASTER_PORT"] == expected[5]
    started_once = "SLURM_NTASKS 5: started without srun and torchrun: one process\n"
    one_of_several = (
        variables.get("SLURM_PROCID") == "0" and expected == ALONE and "SLURM_STEP_NUM_TASKS" not in variables
    )
    assert capfd.readouterr().err == started_once * one_of_several


def test_ports_of_two_jobs_and_of_two_steps(environment: dict[str, str]) -> None:
    """The ranks of a step have one port. Another step or job, perhaps on the same node, has another."""

    def port(**changes: str) -> str:
        for name in TORCH:
            environment.pop(name, None)
        environment.update({**TASK, **changes})
        rank_from_environment()
        return environment["MASTER_PORT"]

    ports = [port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="4712")]
    assert len(set(ports)) == 3
    assert port(SLURM_PROCID="3", SLURM_LOCALID="0", SLURMD_NODENAME="gpu008") == ports[0]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-008,011],cpu1", "gpu007"),
        ("a12,b[1-2]", "a12"),
        ("rack[2-3]node[05,07]-ib", "rack2node05-ib"),
    ],
)
def test_first_node(nodes: str, first: str, environment: dict[str, str]) -> None:
    environment.update({**TASK, "SLURM_STEP_NODELIST": nodes})
    rank_from_environment()
    assert environment["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "1"},
            "RANK 1: WORLD_SIZE is not set\nstart with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MAST",
        ),
        ({"RANK": "0"}, "RANK 0: WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE 2: RANK is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK 1: RANK is not set"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK 1: OMPI_COMM_WORLD_SIZE is not set"),
        (HAND, "WORLD_SIZE 2: not set: MASTER_ADDR, MASTER_PORT\nset for each process LOCAL_RANK"),
        ({**HAND, "MASTER_ADDR": "a"}, "WORLD_SIZE 2: not set: MASTER_PORT"),
        ({**HAND, **MEET, "MASTER_PORT": "0"}, "MASTER_PORT 0: must be a number from 1 to 65535"),
        ({**HAND, **MEET, "MASTER_PORT": "tcp://10.0.0.1:1"}, "MASTER_PORT tcp://10.0.0.1:1: must be a number"),
        ({**HAND, **MEET, "RANK": "2"}, "RANK 2: must be a number from 0 to 1"),
        ({**HAND, **MEET, "WORLD_SIZE": "two"}, "WORLD_SIZE two: must be a number"),
        ({**HAND, **MEET, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE x: must be a number"),
        # A variable that the batch script exports, and that srun contradicts.
        ({**TASK, "WORLD_SIZE": "2"}, "WORLD_SIZE 2: the launcher of this process says rank 4 of 5\nunset WORLD_SIZE"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, "2: not set: MASTER_ADDR, MASTER_PORT"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, "2: not set: MASTER_ADDR, MASTER_PORT"),
        ({**BATCH, "SLURM_PROCID": "1"}, "SLURM_PROCID 1: SLURM_STEP_ID is not set"),
        (
            {**TASK, "SLURM_PTY_PORT": "1", "SLURM_PROCID": "0"},
            "within srun --pty, this may be one process or one of 5",
        ),
        ({**MPICH, "MPI_LOCALNRANKS": "1", "PBS_JOBID": ""}, "WORLD_SIZE 2: not set: MASTER_ADDR, MASTER_PORT"),
        # mpirun with a host file that does not begin with the first node of the job.
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "SLURM_JOB_NODELIST": "192.0.2.1"},
            "MASTER_ADDR 192.0.2.1: the fir",
        ),
    ],
)
def test_what_to_set(variables: dict[str, str], message: str, environment: dict[str, str]) -> None:
    environment.update(variables)
    with pytest.raises(OptionError) as error:
        rank_from_environment()
    assert message in str(error.value)
    assert 2 <= len(str(error.value).splitlines()) <= 3


def test_local_rank_among_several_gpus(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without LOCAL_RANK, nothing says which of the visible GPUs a process has."""
    environment.update({"RANK": "1", "WORLD_SIZE": "2", **MEET})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(OptionError, match="WORLD_SIZE 2: not set: LOCAL_RANK\n"):
        rank_from_environment()


def started_by(variables: dict[str, str]) -> None:
    """Replace the variables of torchrun by those of another launcher; {rank} is the rank."""
    rank = os.environ["RANK"]
    for name in (*TORCH, "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    os.environ.update({name: value.format(rank=rank) for name, value in variables.items()})


@pytest.mark.parametrize("launcher", ["srun", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_two_real_ranks(tiny: list[object], tmp_path: Any, launcher: str) -> None:
    """Two processes with the variables of srun or mpirun train together."""
    variables = {
        "srun": {**STEP, "SLURM_NNODES": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
        | {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_STEP_ID": str(os.getpid())},
        "mpirun": dict(zip(LAUNCHERS["mpirun"], ("{rank}", "2", "{rank}", "2"), strict=True))
        | {"PMIX_NAMESPACE": str(os.getpid())},
    }[launcher]
    outcome = train(2, [*tiny, "--output_dir", tmp_path, "--max_steps", 2], before=partial(started_by, variables))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "ranks         2 on CPU, backend gloo" in outcome.output


def test_ranks_that_do_not_meet(environment: dict[str, str]) -> None:
    """A port in use, and ranks that do not come, are told in a line; here with the errors that torch raises."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        environment.update({**HAND, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
        with pytest.raises(torch.distributed.DistNetworkError) as in_use:
            torch.distributed.TCPStore("localhost", port, 2, is_master=True)
    with pytest.raises(torch.distributed.DistStoreError) as timeout:
        torch.distributed.TCPStore("localhost", port, 2, is_master=True, timeout=timedelta(seconds=0.2))
    place = f"MASTER_ADDR localhost, MASTER_PORT {port}: "
    assert f"{place}this port is in use\nset another MASTER_PORT" in str(_mistake(in_use.value))
    assert f"{place}2 ranks did not meet there: Timed out after" in str(_mistake(timeout.value))


def test_mistakes_of_the_system() -> None:
    """Only errors of meeting and of a full disk are mistakes of the user; a bug keeps its traceback."""
    assert "/x: No space left on device\nmake room" in str(_mistake(OSError(28, "No space left on device", "/x")))
    assert _mistake(OSError(2, "No such file", "/x")) is None
    assert _mistake(RuntimeError("No space left")) is None


@pytest.mark.parametrize(
    ("gpus", "environment", "refused"),
    [
        (1, {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, True),
        (1, {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": "1"}, False),
        (1, {"LOCAL_WORLD_SIZE": "2"}, False),
        (2, {"LOCAL_WORLD_SIZE": "4"}, True),
        (2, {"LOCAL_WORLD_SIZE": "2"}, False),
    ],
)
def test_number_of_visible_gpus(
    gpus: int, environment: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One visible GPU may be the own one of a rank: of srun --gpus-per-task=1, or of a script under torchrun."""
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("config.checks.lacking", lambda capability: None)
    options = Options(output_dir="o", torch_compile=False)
    if refused:
        with pytest.raises(OptionError, match=f"the number of GPUs of this node is {gpus}"):
            check(options, 4)
    else:
        check(options, 4)


@pytest.mark.parametrize(
    ("gpus", "shared", "message"),
    [
        (["a", "b"], False, None),
        (["a", "b", "a"], False, "ranks [0, 2]: they have the same GPU (a)"),
        (["a", "a"], True, None),
        (["", ""], True, None),
        (["a", "", "b"], False, "ranks [1]: no GPU is visible to them"),
    ],
)
def test_own_gpus(gpus: list[str], shared: bool, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL fails for two ranks on one GPU; only the ranks together know it."""

    def all_gather_object(result: list[str], own: str) -> None:
        assert own == gpus[0]
        result[:] = gpus

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=gpus[0]))
    device = torch.device("cuda", 0) if gpus[0] else torch.device("cpu")
    if message is None:
        return require_own_gpu(device, shared)
    with pytest.raises(OptionError) as error:
        require_own_gpu(device, shared)
    assert str(error.value).startswith(message)


def test_memory_of_the_only_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL a GPU is a rank's own, although its node has more ranks than the rank sees GPUs."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    assert gpu_memory(torch.device("cuda"), shared=False) == 80
    assert gpu_memory(torch.device("cuda"), shared=True) == 20
