"""The rows of the report: what this machine has, and what each part of it limits.

A row never fails: what cannot be found out is said to be unknown. No row shows the name of the machine, of its user, of
its addresses, or a variable of the environment that is not in VARIABLES.
"""

import importlib.metadata
import math
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from config.errors import first_line
from config.gpus import BF16, TRITON
from config.options import Options
from runtime.doctor.obstacle import ask_driver, driver_version, find_obstacle, gpu_files, gpus_on_bus

PACKAGES = (
    *("transformers", "datasets", "safetensors", "tqdm", "numpy", "tokenizers", "triton", "nvidia-nccl-cu12"),
    *("nvidia-nccl-cu13", "tensorboard", "wandb", "swanlab", "peft", "zstandard", "deepspeed"),
)
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NET", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "CUDA_LAUNCH_BLOCKING"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCHDYNAMO_DISABLE"),
)
TRAINING, CHECKPOINT = 16, 12  # bytes of a parameter: fp32 parameter, gradient, 2 moments; without the gradient
SMALL_SHM = 256 << 20  # bytes; docker gives 64 MiB
FEW_FILES = 4096
SECONDS = 20  # that a program may take; nvidia-smi hangs if a GPU does

Row = tuple[str, str, str]  # name; value, which may have several lines; what it limits, or ""


def rows(options: Options, root: Path = Path("/")) -> list[Row]:
    """All rows, for the directories of `options`. `root` is the directory that holds dev, proc, sys and etc."""
    parts: tuple[tuple[str, Callable[[], Iterator[Row]]], ...] = (
        ("trainer", _versions),
        ("system", lambda: _system(root)),
        ("driver", lambda: _driver(root)),
        ("GPUs", lambda: _gpus(root)),
        ("links", _links),
        ("network", lambda: _network(root)),
        ("cores", lambda: _cores(options, root)),
        ("memory", lambda: _memory(root)),
        ("/dev/shm", _shared_memory),
        ("limits", lambda: _limits(root)),
        ("disks", lambda: _disks(options, root)),
        ("variables", _variables),
        ("problem", lambda: _problems(root)),
    )
    found: list[Row] = []
    for name, part in parts:
        try:
            found += part()
        except Exception as error:  # of any library, driver or file system
            found.append((name, f"unknown: {type(error).__name__}: {first_line(error)}", ""))
    return found


def _run(*command: str) -> str:
    """What a program prints, or "" if it is absent, fails, or hangs."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _parameters(count: float) -> str:
    return f"{count / 1e9:,.1f} billion" if count >= 1e9 else f"{count / 1e6:,.0f} million"


def _versions() -> Iterator[Row]:
    tree = str(Path(__file__).parent)
    commit = _run("git", "-C", tree, "describe", "--always", "--dirty", "--abbrev=12") or "unknown, without git"
    yield "trainer", f"commit {commit}", ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    built = f"ROCm {torch.version.hip}" if torch.version.hip else built
    libraries = []
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        libraries.append(f"cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]
    if torch.cuda.is_available() and dist.is_nccl_available():
        libraries.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]
    yield "torch", ", ".join([torch.__version__, f"built for {built}", *(libraries or ["no cuDNN, no NCCL"])]), ""
    installed = []
    for name in PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield "packages", ", ".join(installed), ""
    compiler = next((name for name in ("cc", "gcc", "clang", "g++") if shutil.which(name)), "")
    yield "compiler", compiler or "none", "" if compiler else "torch_compile is off, so training is slower"


def _system(root: Path) -> Iterator[Row]:
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read(root / "etc/os-release"), re.MULTILINE)
    marks = (root / ".dockerenv", root / "run/.containerenv", root / "run/secrets/kubernetes.io")
    inside = ", in a container" if any(mark.exists() for mark in marks) else ""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "system", f"{name[1] if name else 'unknown distribution'}, {system}{inside}", ""
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})", ""


def _driver(root: Path) -> Iterator[Row]:
    version = driver_version(root) or _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")[:20]
    if not version and not gpu_files(root):
        return
    answer = ask_driver()
    supported = "its library libcuda.so.1 cannot be loaded"
    if answer:
        supported = f"for CUDA up to {answer[0] // 1000}.{answer[0] % 1000 // 10}, cuInit {answer[1]}"
    yield "driver", f"NVIDIA {version.split()[0] if version else 'unknown'}, {supported}", ""


def _gpus(root: Path) -> Iterator[Row]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        total = properties.total_memory
        lacks = [] if torch.version.hip or capability >= BF16 else ["bf16 (fp32 is used)"]
        if not torch.version.hip and capability < TRITON:
            lacks.append("torch_compile")
        if not torch.version.hip and capability < (8, 9):
            lacks.append("float8")
        try:
            free = f", {_gib(torch.cuda.mem_get_info(index)[0])} free"
        except RuntimeError as error:
            free = f"; it cannot be used: {first_line(error)}"
        limit = (
            f"with DDP and AdamW, fewer than {_parameters(total / TRAINING)} parameters ({TRAINING} bytes each, and "
            "activations: python -m estimate)"
        )
        value = f"{properties.name}, {_gib(total)}{free}, compute capability {capability[0]}.{capability[1]}"
        yield f"GPU {index}", value, f"{limit}; lacks {', '.join(lacks)}" if lacks else limit
    if torch.cuda.device_count():
        return
    bus = ", ".join(f"{count} of {vendor} on the PCI bus" for vendor, count in gpus_on_bus(root).items())
    files = ", ".join(path.name for path in gpu_files(root))
    yield (
        "GPUs",
        f"none that torch can use; {bus or 'none on the PCI bus'}; in /dev: {files or 'none'}",
        ("the CPU trains the demo, and models of some million parameters"),
    )
    query = "index,name,memory.total,memory.used,driver_version,compute_mode"
    if shown := _run("nvidia-smi", f"--query-gpu={query}", "--format=csv"):
        yield "nvidia-smi", shown, ""


def _links() -> Iterator[Row]:
    count = torch.cuda.device_count()
    matrix = re.sub(r"\x1b\[[\d;]*m", "", _run("nvidia-smi", "topo", "-m"))
    lines = [line.expandtabs(6).rstrip() for line in matrix.splitlines() if re.match(r"\s*(GPU|NIC)\d+\s", line)]
    if lines and (count > 1 or len(lines) > 2):
        slow = any(re.search(r"\b(SYS|NODE|PHB)\b", line) for line in lines if line.startswith("GPU"))
        limit = (
            "SYS, NODE or PHB: traffic through a processor, slow for fsdp and tensor_parallel; NV: NVLink"
            if slow
            else ""
        )
        yield "links", "\n".join(lines), limit
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        yield (
            "peers",
            f"GPU {apart[0][0]} has no direct access to GPU {apart[0][1]} ({len(apart)} of {len(pairs)} pairs)",
            ("NCCL copies through host memory"),
        )


def _infiniband(root: Path) -> list[str]:
    """The devices of InfiniBand or RoCE."""
    return sorted(path.name for path in (root / "sys/class/infiniband").glob("*"))


def _network(root: Path) -> Iterator[Row]:
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    devices = _infiniband(root)
    fast = f"InfiniBand or RoCE: {', '.join(devices)}" if devices else "no InfiniBand or RoCE"
    limit = "" if devices else "between nodes, NCCL uses TCP: prefer ddp, or fsdp with --replicas"
    yield "network", f"{', '.join(names[:8]) or 'no interface'}; {fast}", limit


def _cores(options: Options, root: Path) -> Iterator[Row]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    allowed = ""
    if len(quota) == 2 and quota[0].isdecimal():
        allowed = f", of which this container may use {int(quota[0]) / int(quota[1]):g}"
    workers = options.dataloader_num_workers
    ranks = max(1, torch.cuda.device_count())
    limit = f"ranks and their loading processes are {ranks * (workers + 1)}: --dataloader_num_workers has fewer"
    yield "cores", f"{usable} of {os.cpu_count()}{allowed}", limit if usable < ranks * (workers + 1) else ""


def _memory(root: Path) -> Iterator[Row]:
    sizes = {name: int(size) << 10 for name, size in re.findall(r"(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"))}
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes.get("MemFree", 0))
    limit = _read(root / "sys/fs/cgroup/memory.max") or _read(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    contained = ""
    if limit.isdecimal() and int(limit) < total:
        total, contained = int(limit), ", the limit of this container"
        free = min(free, total)
    swap = f"; swap {_gib(sizes['SwapTotal'])}" if sizes.get("SwapTotal") else "; no swap"
    yield (
        "memory",
        f"{_gib(free)} free of {_gib(total)}{contained}{swap}",
        (
            f"--cpu_offload and --async_save hold {CHECKPOINT} bytes for each parameter: room for "
            f"{_parameters(free / CHECKPOINT)} on this node"
        ),
    )


def _shared_memory() -> Iterator[Row]:
    space = shutil.disk_usage("/dev/shm")
    small = "small: docker run --shm-size 1g, or pass --dataloader_num_workers 0" if space.total < SMALL_SHM else ""
    yield "/dev/shm", f"{_gib(space.free)} free of {_gib(space.total)}", small


def _limits(root: Path) -> Iterator[Row]:
    """The limits that ulimit shows. A run raises the first number to the second, for files."""
    for name, number, least, remedy in (
        ("open files", resource.RLIMIT_NOFILE, FEW_FILES, "loading processes may fail: ulimit -n 4096"),
        (
            "processes",
            resource.RLIMIT_NPROC,
            4096,
            "threads may not start: ulimit -u, or the pids limit of a container",
        ),
        (
            "locked bytes",
            resource.RLIMIT_MEMLOCK,
            math.inf if _infiniband(root) else 0,
            "InfiniBand between nodes needs it unlimited: ulimit -l",
        ),
    ):
        soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(number))
        numbers = ", at most ".join("unlimited" if limit == math.inf else f"{limit:,}" for limit in (soft, hard))
        yield name, numbers, remedy if hard < least else ""


def _disks(options: Options, root: Path) -> Iterator[Row]:
    hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    places = {
        "output_dir": options.output_dir,
        "data_cache_dir": options.data_cache_dir,
        "hub cache": hub,
        "temporary": os.environ.get("TMPDIR") or tempfile.gettempdir(),
    }
    for name, place in places.items():
        path = Path(place).expanduser().absolute()
        while not path.exists():
            path = path.parent
        space = shutil.disk_usage(path)
        writable = "" if os.access(path, os.W_OK) else ", NOT writable"
        kind = _file_system(path, root)
        limits = []
        if name == "output_dir":
            limits.append(
                f"a checkpoint has {CHECKPOINT} bytes for each parameter: room for "
                f"{_parameters(space.free / CHECKPOINT)}"
            )
        if kind == "overlay" and name in ("output_dir", "data_cache_dir"):
            limits.append("inside the container: its files are lost with it, so mount a directory")
        if kind in ("tmpfs", "ramfs"):
            limits.append("in memory: lost at a restart")
        yield name, f"{_gib(space.free)} free of {_gib(space.total)}, {kind}{writable}", "; ".join(limits)


def _file_system(path: Path, root: Path) -> str:
    """The kind of the file system that holds a path, such as ext4, nfs4 or overlay."""
    resolved = path.resolve()
    best, kind = "", "unknown file system"
    for line in _read(root / "proc/mounts").splitlines():
        _, point, name, *_ = line.split()
        point = point.replace("\\040", " ")
        if resolved.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def _variables() -> Iterator[Row]:
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "variables", " ".join(given) or "none of those that matter", ""


def _problems(root: Path) -> Iterator[Row]:
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if os.environ.get("LOCAL_RANK", "0").isdecimal() else 0
    obstacle = find_obstacle(local_rank, root)
    if obstacle is None:
        yield "problem", "none found", ""
    else:
        refused = "; a run ends with this error" if obstacle.fatal else ""
        yield "problem", f"{obstacle.problem}{refused}", obstacle.remedy
