"""The GPU of a rank: which one it is, and that no other rank has it."""

from collections import Counter

import torch
import torch.distributed as dist

from config.errors import OptionError


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank, made the current one; the CPU without GPUs.

    A process may see all GPUs of its node, as under torchrun, or its own alone, as under `srun --gpus-per-task=1`.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


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
