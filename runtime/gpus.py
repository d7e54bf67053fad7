"""The GPU of a rank: that torch can use it, which one it is, and that no other rank has it."""

import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from config.errors import OptionError, first_line
from runtime.doctor.obstacle import find_obstacle

ALLOCATIONS = 200_000  # newest allocations and frees that a memory snapshot holds, each with its stack


def require_usable_gpu() -> None:
    """Refuse to train on the CPU, or on other GPUs, if torch cannot use a GPU that this process was given.

    Where the process may not have a GPU, rank 0 only says why the CPU is used. Raises OptionError.
    """
    obstacle = find_obstacle(int(os.environ["LOCAL_RANK"]))
    if obstacle and obstacle.fatal:
        raise OptionError(f"{obstacle.problem}\n{obstacle.remedy}")
    if obstacle and os.environ["RANK"] == "0":
        print(f"{obstacle.problem}; {obstacle.remedy}", file=sys.stderr)


def choose_device(local_rank: int, record_memory: bool) -> torch.device:
    """The GPU of this rank, made the current one; the CPU without GPUs.

    A process may see all GPUs of its node, as under torchrun, or its own alone, as under `srun --gpus-per-task=1`.
    With `record_memory`, torch records who allocates memory, for `write_memory_snapshot`. Raises OptionError if the
    driver refuses the GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # creates the context of the process on this GPU
    except RuntimeError as error:
        raise OptionError(
            f"{device}: the driver refuses it: {first_line(error)}\n"
            "look in `nvidia-smi` at its processes, memory, compute mode and errors; or hide it: CUDA_VISIBLE_DEVICES"
        ) from error
    if record_memory:
        torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    return device


def write_memory_snapshot(output_dir: str) -> str:
    """Write what each allocation of this rank's GPU is for, and return a line that says where.

    The file is for https://pytorch.org/memory_viz. A disk that is full changes the line, and not the end of the run.
    """
    path = Path(output_dir) / "memory" / f"rank-{os.environ.get('RANK', '0')}.pickle"
    try:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # a link is not followed
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises what its writer raises
        return f"memory snapshot: {path} cannot be written: {first_line(error)}"
    return f"memory snapshot: {path}, for https://pytorch.org/memory_viz"


def require_own_gpu(device: torch.device, shared: bool) -> None:
    """Refuse two ranks on one GPU unless it may be `shared`, and ranks without a GPU among others. All must call.

    Only after the ranks have met can they know it, because each sees its own CUDA_VISIBLE_DEVICES. Raises OptionError.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    gpus: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gpus, gpu)
    without = [rank for rank, gpu in enumerate(gpus) if not gpu]
    if without and len(without) < len(gpus):
        raise OptionError(f"ranks {without}: no GPU is visible to them, but to the other ranks\ncheck their nodes")
    twice = [gpu for gpu, ranks in Counter(gpus).items() if gpu and ranks > 1]
    if twice and not shared:
        ranks = [rank for rank, gpu in enumerate(gpus) if gpu == twice[0]]
        raise OptionError(
            f"ranks {ranks}: they have the same GPU ({twice[0]})\nstart as many processes as there are GPUs, let each "
            "see its own or all GPUs of the node, or let ranks share a GPU with --ddp_backend gloo"
        )
