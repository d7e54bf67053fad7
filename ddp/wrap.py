"""Replicate a model over all ranks."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ddp.buckets import FixedBuckets


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
    """The module to call in the forward pass. Its backward averages gradients over all ranks. Every rank must call.

    `objective` is a module of loss/ on the meta device. It gets uninitialized fp32 memory on `device` for all
    parameters. The caller then loads equal weights on every rank (model/weights.py), because nothing is broadcast here.

    Each backward pass all-reduces the fp32 gradients of all parameters, in buckets, overlapped with the rest of the
    backward pass. `decoder_layers`, the decoder layers of the model, tell in which order gradients come. All ranks of
    `mesh` are replicas. A single rank gets `objective` itself, because it has no other rank to communicate with.

    The options from `bf16` on are unused, because DDP replicates the model as one unit and torch.autocast does the
    casts. They keep the signature equal to that of `fsdp.wrap`.
    """
    model: PreTrainedModel = objective.model
    objective.to_empty(device=device)
    model.tie_weights()  # because to_empty gave a tied weight new memory for each of its uses
    if mesh.size() == 1:
        return objective  # saves the memory of the buckets, which are as large as the model
    device_ids = [device.index] if device.type == "cuda" else None
    # Buffers need no broadcast before each forward pass, because they are constants that are equal on all ranks.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.13.0 or 2.11
    settings: dict[str, Any] = {"init_sync": False, sync: False}
    # As views of the buckets, gradients need no second copy in memory and no time to copy.
    return FixedBuckets(objective, decoder_layers, device_ids=device_ids, gradient_as_bucket_view=True, **settings)
