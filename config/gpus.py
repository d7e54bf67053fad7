"""What the visible GPUs can compute, which decides the defaults of options."""

import torch

BF16, TRITON = (8, 0), (7, 0)  # compute capabilities: bf16 arithmetic, and what torch.compile's compiler supports


def lacking(capability: tuple[int, int]) -> str:
    """The name of a visible NVIDIA GPU below a compute capability, with its own, or "" if there is none.

    All visible GPUs count, not that of this rank alone, because all ranks must agree.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return ""
    for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        if (properties.major, properties.minor) < capability:
            return f"{properties.name} (compute capability {properties.major}.{properties.minor})"
    return ""
