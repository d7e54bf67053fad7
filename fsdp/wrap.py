"""Shard a model over all ranks."""

import dataclasses

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
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

    `objective` (model/objective.py) comes without values, on the meta device, and gets memory for this rank's part of
    it on `device`, in fp32: 1 / `mesh["shard"]` of every parameter. A decoder layer of its model is one unit: its
    parameters are gathered, in bf16 if `bf16`, just before they are used, and its gradients are reduced in
    `reduce_dtype`, and kept in fp32. With `reshard_after_forward` a layer's full parameters are freed after its forward
    and gathered again for its backward. Embedding and head belong to the root unit, so that tied weights stay one
    tensor.

    Ranks along `mesh["shard"]` are next to each other, and gather and reduce among themselves (fast links, one host);
    with several replicas, the reduced shards are then averaged along `mesh["replicate"]`.

    With `cpu_offload`, the shards and their gradients are in host memory, and so are the optimizer that is built over
    them and its state: what is gathered is copied to `device` first, and what was reduced is copied back.
    """
    model: PreTrainedModel = objective.model
    mesh = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]  # one would reduce for nothing
    home, offload = device, OffloadPolicy()
    if cpu_offload:
        # From and to page-locked memory, a copy needs no detour, and is not waited for.
        home, offload = torch.device("cpu"), CPUOffloadPolicy(pin_memory=device.type == "cuda")
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=reduce_dtype)
    for layer in decoder_layers:
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=precision, offload_policy=offload
        )
    # The root is left whole between forward and backward: its backward is the first to start. What it is given, beside
    # tokens, belongs to the loss: it stays fp32.
    root_precision = dataclasses.replace(precision, cast_forward_inputs=False)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, mp_policy=root_precision, offload_policy=offload)
    objective.kept_after_forward = [objective] if reshard_after_forward else [objective, *decoder_layers]  # type: ignore[assignment]
    objective.register_forward_hook(_reshard_if_no_backward)
    objective.to_empty(device=home)
    for module in objective.modules():  # buffers are used where they lie
        module._buffers = {
            name: None if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()
        }
    model.tie_weights()  # one tensor again, where each use of it got memory of its own
    return objective


def _reshard_if_no_backward(objective: nn.Module, inputs: object, outputs: object) -> None:
    """What is kept whole for a backward must be freed in evaluation, where none will come.

    Otherwise the optimizer and the checkpoint would meet full parameters instead of this rank's shards.
    """
    if not torch.is_grad_enabled():
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
