"""Proves runtime/doctor/: a GPU that cannot be used is said with its remedy, and the report never fails.

Files of /dev, /proc and /sys are made in a directory, or mounted over the real ones. The library of the driver and
nvidia-smi are stand-ins. Which build of torch this is, and that it sees no GPU, is set before the program starts.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import config
from config.options import Options
from runtime.doctor import obstacle, report
from tests.launch import ROOT

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 12 00:00:00 UTC 2023\nGCC version: 12\n"
BUILT = ("2.13.0+cu130", "13.0")
LIBRARY = """
int cuDriverGetVersion(int *version) { *version = %d; return 0; }
int cuInit(unsigned flags) { return %d; }
"""
# A program that runs another file or module as __main__, in a torch of another build, which sees no GPU.
AS_BUILD = (
    "import runpy, sys, warnings, torch; see = lambda: warnings.warn('CUDA initialization: too old'); "
    "torch.__version__, torch.version.cuda = sys.argv[1], sys.argv[2] or None; "
    "torch.cuda.is_available, torch.cuda.device_count = lambda: bool(see()), lambda: 0; "
    "del sys.argv[:3]; sys.argv[0].endswith('.py') and runpy.run_path(sys.argv[0], run_name='__main__'); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
# Over the real files, in a mount namespace: $1 is a directory with the files of dev, proc/driver and pci.
MOUNTS = """
set -e
mkdir -p "$1/new"; mount -t tmpfs tmpfs "$1/new"
for name in null zero full random urandom; do touch "$1/new/$name"; mount --bind "/dev/$name" "$1/new/$name"; done
ln -s /proc/self/fd "$1/new/fd"; mkdir -m 1777 "$1/new/shm"
cp -a "$1"/dev/. "$1/new/"; mount --rbind "$1/new" /dev
mount --bind "$1/proc/driver" /proc/driver
shift; exec "$@"
"""


def make_root(root: Path, *files: str, driver: str = "", bus: tuple[tuple[str, str, str], ...] = ()) -> Path:
    """A directory with files in dev, the version of a driver, and devices (address, vendor, class) on the bus."""
    (root / "dev").mkdir(parents=True, exist_ok=True)
    (root / "proc/driver/nvidia").mkdir(parents=True, exist_ok=True)
    for name in files:
        (root / "dev" / name).touch()
    if driver:
        (root / "proc/driver/nvidia/version").write_text(VERSION.format(driver))
    for address, vendor, kind in bus:
        device = root / "sys/bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    return root


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA 13.0 that sees no GPU, and no CUDA_VISIBLE_DEVICES."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in zip(("__version__", "version.cuda"), BUILT, strict=True):
        monkeypatch.setattr(f"torch.{name}", value)


NVIDIA = ("nvidia0", "nvidiactl", "nvidia-uvm")
H100, RADEON, ARC, GRAPHICS = (
    ("0000:01:00.0", "0x10de", "0x030200"),
    ("0000:03:00.0", "0x1002", "0x038000"),
    ("0000:04:00.0", "0x8086", "0x030000"),
    ("0000:00:02.0", "0x8086", "0x030000"),
)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("driver", "cuda", "answer", "problem", "remedy"),
    [
        ("535.104.05", "13.0", (12020, 0), "driver 535.104.05 supports CUDA 12.2, but torch 2.13.0+cu130 is for CUDA "
         "13.0", "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126, or install driver 580"),
        ("470.82.01", "12.6", (11040, 0), "supports CUDA 11.4", "install driver 580 or newer, then pip install"),
        ("580.65.06", "13.0", None, "libcuda.so.1 of the NVIDIA driver cannot be loaded", "docker run --gpus all"),
        ("580.65.06", "13.0", (13000, 802), "the links between the GPUs are not set up", "nvidia-fabricmanager"),
        ("580.65.06", "13.0", (13000, 803), "the driver was updated", "reboot"),
        ("580.65.06", "13.0", (13000, 100), "the driver finds no GPU", "nvidia-smi"),
        ("580.65.06", None, (13000, 0), "torch 2.13.0+cu130 was built without CUDA", "whl/cu130"),
        ("525.60.13", None, (12000, 0), "was built without CUDA", "whl/cu126"),
    ],
)  # fmt: skip
@pytest.mark.fault(
    "configuration",
    "an NVIDIA driver that is too old for torch, has no library or does not start; a torch for CPUs beside a GPU",
    "refused with the cause and the build of torch to install; exit code 2",
)
def test_nvidia(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    cuda: str | None,
    answer: tuple[int, int] | None,
    problem: str,
    remedy: str,
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(obstacle, "ask_driver", lambda: answer)
    found = obstacle.find_obstacle(0, make_root(tmp_path, *NVIDIA, driver=driver))
    assert found is not None
    assert found.fatal
    assert problem in found.problem
    assert remedy in found.remedy
    assert found.remedy.endswith("to train on the CPU, set CUDA_VISIBLE_DEVICES= (empty)")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("visible", "fatal", "problem"),
    [
        ("", False, "CUDA_VISIBLE_DEVICES is empty, so the GPUs of this machine are not used"),
        ("-1", False, "CUDA_VISIBLE_DEVICES is -1, so the GPUs of this machine are not used"),
        ("7", True, "CUDA_VISIBLE_DEVICES 7: this machine has no such GPU (it has 1)"),
        ("GPU-5ebe", True, "CUDA_VISIBLE_DEVICES GPU-5ebe: this machine has no such GPU (it has 1)"),
    ],
)
@pytest.mark.fault(
    "configuration",
    "CUDA_VISIBLE_DEVICES is empty, or names a GPU that is not there",
    "empty: one line says that the CPU is used; otherwise refused",
)
def test_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, fatal: bool, problem: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(obstacle, "ask_driver", lambda: (13000, 100))
    empty, root = make_root(tmp_path / "empty"), make_root(tmp_path / "root", *NVIDIA, driver="580.65.06")
    found = obstacle.find_obstacle(0, root)
    assert found is not None
    assert (found.problem, found.fatal) == (problem, fatal)
    without = obstacle.find_obstacle(0, empty)
    assert without.fatal if fatal and without else without is None


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("files", "bus", "driver", "problem"),
    [
        ((), (), "", None),
        ((), (GRAPHICS,), "", None),
        ((), (H100,), "", "this machine has an NVIDIA GPU, but its driver is not loaded, so the CPU is used"),
        ((), (H100,), "580.65.06", "this machine has an NVIDIA GPU, but this container may not use it, so the CPU"),
        (("kfd",), (RADEON,), "", "torch 2.13.0+cu130 cannot use the AMD GPU of this machine, so the CPU is used"),
        ((), (RADEON,), "", "torch cannot use the AMD GPU of this machine, so the CPU is used"),
        ((), (GRAPHICS, ARC), "", "torch cannot use the Intel GPU of this machine, so the CPU is used"),
    ],
)
def test_gpus_that_the_process_was_not_given(
    tmp_path: Path, files: tuple[str, ...], bus: tuple[tuple[str, str, str], ...], driver: str, problem: str | None
) -> None:
    """A GPU on the bus is mentioned, and the run goes on: a container may be without GPUs on purpose."""
    found = obstacle.find_obstacle(0, make_root(tmp_path, *files, bus=bus, driver=driver))
    assert (found is None) == (problem is None)
    if found and problem:
        assert found.problem.startswith(problem)
        assert not found.fatal


def see_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Let torch see NVIDIA GPUs with these compute capabilities."""
    gpus = [
        SimpleNamespace(name=f"Tesla {major}{minor}", major=major, minor=minor, total_memory=16 << 30)
        for major, minor in capabilities
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"])
    monkeypatch.setattr("torch.__version__", BUILT[0])


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [((7, 0), "whl/cu126"), ((10, 0), "whl/cu130"), ((7, 5), None), ((8, 9), None), ((9, 0), None), ((12, 0), None)],
)
def test_torch_has_no_code_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], remedy: str | None
) -> None:
    """Rank 1 has the second GPU. Code for 8.6 runs on 8.9, but not on 9.0."""
    see_gpus(monkeypatch, (9, 0), capability)
    assert obstacle.find_obstacle(0, make_root(tmp_path)) is None
    found = obstacle.find_obstacle(1, tmp_path)
    if remedy is None:
        assert found is None
    else:
        assert found is not None
        assert found.fatal
        assert f"Tesla {capability[0]}{capability[1]} has compute capability" in found.problem
        assert remedy in found.remedy


def test_some_of_the_visible_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA ignores an unknown name and all after it. -1 ends the list on purpose; a MIG instance is alone."""
    see_gpus(monkeypatch, (9, 0))
    for visible, fatal in (("0,9", True), ("0", False), ("0,-1,1", False), ("MIG-1,MIG-2", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = obstacle.find_obstacle(0, tmp_path)
        assert (found is not None and found.fatal) == fatal, visible


@pytest.mark.parametrize(
    ("capability", "argv", "bf16", "said"),
    [
        ((7, 5), [], False, "bf16 false: Tesla 75 (compute capability 7.5) has no bf16 arithmetic: fp32 is used"),
        ((7, 5), ["--bf16"], True, "bf16 true: Tesla 75 (compute capability 7.5) has no bf16 arithmetic: bf16 is emul"),
        ((8, 0), [], Options().bf16, ""),
    ],
)
@pytest.mark.fault(
    "configuration",
    "a GPU without bf16 arithmetic",
    "fp32 is the default, and one line says so; --bf16 true also works",
)
def test_gpu_without_bf16(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    argv: list[str],
    bf16: bool,
    said: str,
) -> None:
    see_gpus(monkeypatch, (9, 0), capability)
    options = config.parse([*argv, "--torch_compile", "false"])
    config.check(options, 1)
    assert options.bf16 == bf16
    errors = capsys.readouterr().err
    assert errors.startswith(said) if said else "bf16" not in errors
    assert len(errors.splitlines()) == bool(said)


def test_gpu_too_old_for_the_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    see_gpus(monkeypatch, (6, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = config.parse(["--torch_compile", "true"])
    config.check(options, 1)
    assert not options.torch_compile
    assert "torch_compile: off, because a GPU of compute capability 7.0, instead of Tesla 61" in capsys.readouterr().err


def start(
    words: list[object], *around: str, build: tuple[str, str] | None = None, **environment: str
) -> tuple[int, str]:
    """The exit code and output of a Python program, perhaps as a torch of another build that sees no GPU."""
    as_build = ["-c", AS_BUILD, *build] if build else ["-m" if str(words[0]).startswith("runtime") else "-u"]
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    ended = subprocess.run(
        [*around, sys.executable, *as_build, *map(str, words)],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=150,  # it hung
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture
def machine(tmp_path: Path) -> list[str]:
    """The start of a command that sees an NVIDIA GPU, its driver, and libcuda.so.1 for CUDA 12.2."""
    compiler = shutil.which("cc")
    if not compiler or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs a C compiler, and root to mount over /dev")
    root = make_root(tmp_path / "machine", *NVIDIA, driver="535.104.05")
    (root / "cuda.c").write_text(LIBRARY % (12020, 0))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", root / "libcuda.so.1", root / "cuda.c"], check=True)
    return ["unshare", "--mount", "env", f"LD_LIBRARY_PATH={root}", "bash", "-c", MOUNTS, "bash", str(root)]


@pytest.mark.slow
def test_train_on_a_machine_with_an_old_driver(machine: list[str], tiny: list[object], tmp_path: Path) -> None:
    """train.py itself: refused at once in two lines; on the CPU if the user asks for it, with one line."""
    argv = [ROOT / "train.py", *tiny, "--output_dir", tmp_path / "run"]
    code, output = start(argv, *machine, build=BUILT)
    assert code == 2, output
    assert "train.py: error: the NVIDIA driver 535.104.05 supports CUDA 12.2, but torch 2.13.0+cu130" in output
    assert "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126, or install driver 5" in output
    assert "CUDA initialization" not in output, "torch warns of the driver, in each rank"
    assert not (tmp_path / "run").exists()
    code, output = start([*argv, "--max_steps", 2], *machine, build=BUILT, CUDA_VISIBLE_DEVICES="")
    assert code == 0, output
    assert "CUDA_VISIBLE_DEVICES is empty, so the GPUs of this machine are not used; unset it" in output


@pytest.mark.slow
def test_train_without_permission(machine: list[str], tiny: list[object], tmp_path: Path) -> None:
    """Another user, for whom the files of the GPU are closed."""
    root = Path(machine[-1])
    for name in NVIDIA:
        (root / "dev" / name).chmod(0o600)
    user = [
        "setpriv",
        "--reuid=12345",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    ]
    if subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("needs root, to become another user")
    argv = [ROOT / "train.py", *tiny, "--output_dir", tmp_path / "run"]
    code, output = start(argv, *machine, *user, build=BUILT, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert code == 2, output
    assert "/dev/nvidiactl: this user has no permission to use the NVIDIA GPU" in output


def rows_of(output: str) -> dict[str, str]:
    """The rows of a report by their names, with the lines that follow each."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        if line[:14].strip():
            name = line[:14].strip()
            found[name] = line[15:]
        else:
            found[name] += f"\n{line[15:]}"
    return found


def test_report(machine: list[str], tmp_path: Path) -> None:
    """The command itself, beside an old driver and an nvidia-smi that prints its table. No secret is shown."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 'index, name'; echo '0, NVIDIA L4'\n")
    (programs / "nvidia-smi").chmod(0o755)
    output_dir = tmp_path / "runs" / "one"
    code, output = start(
        ["runtime.doctor", "--output_dir", output_dir],
        *machine,
        build=BUILT,
        PATH=f"{programs}:{os.environ['PATH']}",
        HF_TOKEN="hf_secret",
        NCCL_DEBUG="WARN",
    )
    assert code == 0, output
    rows = rows_of(output)
    names = "trainer torch packages compiler system python driver GPUs nvidia-smi network cores memory /dev/shm"
    others = {"open files", "processes", "locked bytes", "output_dir", "data_cache_dir", "hub cache", "temporary"}
    assert {*names.split(), *others, "variables", "problem"} == rows.keys()
    assert rows["driver"] == "NVIDIA 535.104.05, for CUDA up to 12.2, cuInit 0"
    assert "NVIDIA L4" in rows["nvidia-smi"]
    assert "the NVIDIA driver 535.104.05 supports CUDA 12.2" in rows["problem"]
    assert "whl/cu126" in rows["problem"]
    assert rows["variables"] == "OMP_NUM_THREADS=1 NCCL_DEBUG=WARN"
    assert re.match(r"[\d,.]+ GiB free of [\d,.]+ GiB, ", rows["output_dir"])
    assert "secret" not in output
    assert "unknown" not in output.replace("unknown, without git", "")
    assert os.uname().nodename not in re.sub(r"\S*/\S*", "", output) or len(os.uname().nodename) < 4


@pytest.mark.usefixtures("no_gpu")
def test_report_of_a_machine_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc, no /sys, no programs, no GPU, libraries that fail: such a row says so, and the others stay."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (_ for _ in ()).throw(OSError("Stale file handle")))
    rows = {name: value for name, value, _ in report.rows(Options(output_dir=str(tmp_path)), tmp_path)}
    assert rows["memory"] == "unknown: KeyError: unknown key 'MemTotal'"
    assert rows["disks"] == "unknown: OSError: Stale file handle"
    assert rows["problem"] == "unknown: ZeroDivisionError: division by zero"
    assert rows["GPUs"].startswith("none that torch can use")
    assert rows["open files"]


def test_report_of_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with little shared memory, processor time and memory: the report says what each one limits."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\nSwapTotal: 0 kB\n")
    (tmp_path / "proc/mounts").write_text(f"overlay / overlay rw 0 0\nnode:/x {tmp_path} nfs4 rw 0 0\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{12 << 30}\n")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    usage = SimpleNamespace(total=64 << 20, free=60 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    options = Options(output_dir="/nonexistent/run", data_cache_dir=str(tmp_path))
    rows = {name: (value, limit) for name, value, limit in report.rows(options, tmp_path)}
    assert rows["memory"][0] == "12.0 GiB free of 12.0 GiB, the limit of this container; no swap"
    assert "room for 1.1 billion on this node" in rows["memory"][1]
    assert ", of which this container may use 1.5" in rows["cores"][0]
    assert rows["/dev/shm"] == (
        "60 MiB free of 64 MiB",
        "small: docker run --shm-size 1g, or pass --dataloader_num_workers 0",
    )
    assert rows["output_dir"][0].startswith("60 MiB free of 64 MiB, overlay")
    assert "room for 5 million; inside the container" in rows["output_dir"][1]
    assert rows["data_cache_dir"] == ("60 MiB free of 64 MiB, nfs4", "")
