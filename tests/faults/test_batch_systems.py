"""Proves examples/slurm.sbatch and kubernetes.yaml: the commands in them run, are stopped, and continue.

srun and scontrol are stand-ins, and two nodes are two launchers on this machine. Signals go where the batch system
sends them.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoint.load import problems
from metrics.records import read_records
from tests.launch import ROOT, train_ok
from tests.test_resume import trajectory

SLURM, KUBERNETES = ROOT / "examples" / "slurm.sbatch", ROOT / "examples" / "kubernetes.yaml"
TORCHRUN = f'exec {sys.executable} -m torch.distributed.run "$@"'
STAND_INS = {
    "torchrun": TORCHRUN,
    # One task per node, all in the background. SIGTERM goes to every task.
    "srun": """
        [ "$1" = --kill-on-bad-exit=1 ] || exit 99
        shift
        for node in 0 1; do
            SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_STEP_ID=0 "$@" &
            tasks="$tasks $!"
        done
        trap 'kill -TERM $tasks' TERM
        for task in $tasks; do
            while kill -0 $task 2>/dev/null; do wait $task; status=$?; done
        done
        exit $status""",
    "scontrol": """
        case "$1 $2" in
            "show hostnames") echo localhost; echo node2 ;;
            *) echo "$@" >> "$REQUESTS" ;;
        esac""",
}


def free_port(least: int, most: int) -> int:
    for port in range(least, most):
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", port)):
                return port
    raise OSError("no free port")


def wait_for(condition: Callable[[], object], run: "subprocess.Popen[Any]") -> None:
    """Poll until `condition` is true, or the run has ended or hung."""
    deadline = time.monotonic() + 300
    while not condition():
        assert run.poll() is None, "the run ended before"
        assert time.monotonic() < deadline, "the run hung"
        time.sleep(0.02)


def steps_of(output_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    records = read_records(output_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def processes_of(run: "subprocess.Popen[Any]") -> dict[int, str]:
    """The children of a run and theirs, with their command lines."""
    found: dict[int, str] = {}
    waiting = [run.pid]
    while waiting:
        pid = waiting.pop()
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        waiting += map(int, children)
    del found[run.pid]
    return found


def same_curve(one: Path, other: Path) -> None:
    """The records of the loss, step by step; those after a resume, too."""
    for row, reference in zip(trajectory(one), trajectory(other), strict=True):
        assert {name: row[name] for name in ("step", "tokens_seen")} == {
            name: reference[name] for name in ("step", "tokens_seen")
        }
        if "loss" in row:
            assert row["loss"] == pytest.approx(reference["loss"], abs=1e-5)


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    assert SLURM.read_text().startswith("#!/bin/bash\n")


def test_the_manifest_holds_together() -> None:
    """Names that must agree, and what a run on several nodes needs."""
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert (service["metadata"]["name"], service["spec"]["clusterIP"]) == (pod["subdomain"], "None")
    assert spec["completions"] == spec["parallelism"] == int(option(command, "nnodes"))
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(option(command, "nproc_per_node"))
    assert option(command, "rdzv_endpoint").startswith(f"{name}-0.{pod['subdomain']}:")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > 30


def option(command: list[str], name: str) -> str:
    (value,) = (word.partition("=")[2] for word in command if word.startswith(f"--{name}="))
    return value


@pytest.mark.slow
@pytest.mark.fault(
    "process",
    "a Slurm job on two nodes reaches its time limit, or is canceled, and runs again",
    "a checkpoint is saved, and the same command continues: the curve of an unbroken run",
)
def test_slurm(tiny: list[object], tmp_path: Path) -> None:
    """Canceled: SIGTERM to all processes. Time limit: SIGUSR1 to the script. Then the same command to the end."""
    programs, output, requests = tmp_path / "bin", tmp_path / "output", tmp_path / "requests"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    port = free_port(20000, 29999)
    environment = {
        **os.environ,
        **{"PATH": f"{programs}:{os.environ['PATH']}", "REQUESTS": str(requests), "CUDA_VISIBLE_DEVICES": ""},
        **{"SLURM_JOB_ID": str(port - 20000), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,node2"},
        **{"SLURM_GPUS_PER_NODE": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"},
    }
    options = [*tiny, "--max_steps", 150, "--dataloader_num_workers", 1]
    command = ["bash", str(SLURM), *map(str, options), "--output_dir", str(output)]

    def start(restart: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, cwd=ROOT, env=environment | {"SLURM_RESTART_COUNT": str(restart)})

    canceled = start(0)
    wait_for(lambda: steps_of(output) > 3, canceled)
    for pid, words in processes_of(canceled).items():
        if "srun" not in words:
            os.kill(pid, signal.SIGTERM)
    assert canceled.wait(timeout=60) != 0
    assert not requests.exists()
    (saved,) = output.glob("checkpoint-*")
    assert problems(saved) == []
    first = steps_of(output)
    assert saved.name == f"checkpoint-{first}"

    limited = start(0)
    wait_for(lambda: steps_of(output) > first + 3, limited)
    limited.send_signal(signal.SIGUSR1)
    assert limited.wait(timeout=60) != 0
    assert requests.read_text() == f"requeue {port - 20000}\n"
    last = steps_of(output)
    assert first < last < 150
    assert problems(output / f"checkpoint-{last}") == []

    assert start(1).wait(timeout=300) == 0
    train_ok(2, *options, "--output_dir", tmp_path / "unbroken")
    same_curve(output, tmp_path / "unbroken")
    assert requests.read_text() == f"requeue {port - 20000}\n"


@pytest.mark.slow
@pytest.mark.fault(
    "process",
    "a Kubernetes pod of two is evicted, and both are started again",
    "a checkpoint is saved, both pods fail, and the same command continues: the curve of an unbroken run",
)
def test_kubernetes(tiny: list[object], tmp_path: Path) -> None:
    """Two pods are two namespaces of processes, in which torchrun is the first process. One gets the preStop hook."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"]).returncode:
        pytest.skip("needs root, to give each pod its own processes")
    _, job = yaml.safe_load_all(KUBERNETES.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    port = free_port(29500, 29999)
    options = [*tiny, "--max_steps", 150, "--dataloader_num_workers", 1]
    command = [sys.executable, "-m", "torch.distributed.run"]
    for word in container["command"][1:]:
        name = word.partition("=")[0]
        if name not in ("--model_name_or_path", "--train_file"):
            value = {"--nproc_per_node": "1", "--rdzv_endpoint": f"localhost:{port}"}.get(name)
            value = str(tmp_path / "output") if name == "--output_dir" else value
            command.append(f"{name}={value}" if value else word)
    command += map(str, options)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        **{each["name"]: each["value"] for each in container["env"]},
    }

    def start() -> list["subprocess.Popen[bytes]"]:
        pods = []
        for address in ("127.0.0.1", "127.0.0.2"):  # torchrun identifies a node by address and process number
            pod = [*command[:3], f"--local_addr={address}", *command[3:]]
            pods.append(
                subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", *pod], cwd=ROOT, env=environment)
            )
        return pods

    pods = start()
    output = tmp_path / "output"
    wait_for(lambda: steps_of(output) > 3, pods[0])
    (torchrun,) = Path(f"/proc/{pods[1].pid}/task/{pods[1].pid}/children").read_text().split()
    prestop = subprocess.Popen(["nsenter", "-t", torchrun, "-p", "-m", *hook])
    assert [pod.wait(timeout=60) != 0 for pod in pods] == [True, True]
    prestop.kill()
    prestop.wait()
    (saved,) = output.glob("checkpoint-*")
    assert problems(saved) == []
    assert saved.name == f"checkpoint-{steps_of(output)}"

    assert [pod.wait(timeout=300) for pod in start()] == [0, 0]
    train_ok(2, *options, "--output_dir", tmp_path / "unbroken")
    same_curve(output, tmp_path / "unbroken")


def test_the_command_is_that_of_the_page() -> None:
    """docs/launch.md and the example folder name both files."""
    for page in (ROOT / "docs" / "launch.md", ROOT / "examples" / "README.md"):
        text = page.read_text()
        assert all(path.name in text for path in (SLURM, KUBERNETES)), page
    assert "--resume_from_checkpoint auto" in shlex.join(shlex.split(SLURM.read_text(), comments=True))
