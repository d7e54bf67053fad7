"""Replicate a model over all ranks."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


def wrap(
    objective: nn.Module,
    decoder_layers: list[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    bf16: bool,
    reshard_after_forward: bool,
    cpu_offload: bool,
    reduce_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The module to call in the forward pass; its backward averages gradients over all ranks. Every rank must call.

    `objective` (model/objective.py) comes without values, on the meta device, and gets memory for all of it on
    `device`, in fp32. Whoever fills it does so alike on every rank (model/weights.py): nothing is broadcast.
    Each backward exchanges the fp32 gradients of all parameters, in buckets, while it still computes. `bf16` and
    what follows it are the concern of the twin: here torch.autocast casts, nothing is sharded or offloaded, and all
    ranks of `mesh` are replicas. One rank alone has nobody to exchange with: it gets `objective`.
    """
    model: PreTrainedModel = objective.model
    objective.to_empty(device=device)
    model.tie_weights()  # one tensor again, where each use of it got memory of its own
    if mesh.size() == 1:
        return objective  # without the buckets, which are as large as the model and always there
    device_ids = [device.index] if device.type == "cuda" else None
    # Buffers are constants, equal on all ranks: a broadcast before each forward would be for nothing.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    settings: dict[str, Any] = {"init_sync": False, sync: False}
    # Gradients live inside the exchange buckets: one copy less in memory and in time.
    return DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True, **settings)
