"""Shard a model over all ranks."""

import dataclasses

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel


def wrap(
    objective: nn.Module, device: torch.device, bf16: bool, reshard_after_forward: bool, replicas: int
) -> nn.Module:
    """The module to call in the forward pass; its backward averages gradients over all ranks. Every rank must call.

    `objective` (model/objective.py) comes without values, on the meta device, and gets memory for this rank's part of
    it on `device`, in fp32: `replicas` / world size of every parameter. A decoder layer of its model is one unit: its
    parameters are gathered, in bf16 if `bf16`, just before they are used, and its gradients are reduced in fp32. With
    `reshard_after_forward` a layer's full parameters are freed after its forward and gathered again for its backward.
    Embedding and head belong to the root unit, so that tied weights stay one tensor.

    With `replicas` above 1, shards are spread over world size / `replicas` ranks next to each other, which gather and
    reduce among themselves (fast links, one host); the reduced shards are then averaged over the replicas.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))
    if replicas > 1:
        shape = (replicas, get_world_size() // replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    model: PreTrainedModel = objective.model
    decoder_layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for layer in decoder_layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=precision)
    # The root is left whole between forward and backward: its backward is the first to start. What it is given, beside
    # tokens, belongs to the loss: it stays fp32.
    root_precision = dataclasses.replace(precision, cast_forward_inputs=False)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, mp_policy=root_precision)
    objective.register_forward_hook(_reshard_if_no_backward)
    objective.to_empty(device=device)
    model.tie_weights()  # one tensor again, where each use of it got memory of its own
    return objective


def _reshard_if_no_backward(objective: nn.Module, inputs: object, outputs: object) -> None:
    """What is kept whole for a backward must be freed in evaluation, where none will come.

    Otherwise the optimizer and the checkpoint would meet full parameters in the place of this rank's shards.
    """
    if not torch.is_grad_enabled():
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
