"""The GPU of this rank: its peak FLOP/s and its memory."""

import math
import os
import re
import resource
import sys

import torch

# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets of these products; the first name that matches counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 FLOP/s of a GPU in PEAK_FLOPS; None for other devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for product, peak in PEAK_FLOPS.items() if re.search(rf"\b{product}\b", name)), None)


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process in GiB: allocated on its GPU by torch, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def gpu_memory(device: torch.device, shared: bool) -> int | None:
    """The bytes of GPU memory for this rank, if the ranks of a node share a GPU equally; None on a CPU.

    Without `shared`, the GPU is the rank's own, and perhaps the only one of the node that it sees.
    """
    if device.type != "cuda":
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if shared else 1
    sharing = math.ceil(ranks / torch.cuda.device_count())
    return int(torch.cuda.get_device_properties(device).total_memory) // sharing
