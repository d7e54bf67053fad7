"""Shard a model over all ranks."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

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
    """The module to call in the forward pass. Its backward averages gradients over all ranks. Every rank must call.

    `objective` is a module of loss/ on the meta device. It gets uninitialized fp32 memory on `device` for this rank's
    shard of each parameter, 1 / `mesh["shard"].size()` of each. The caller then loads the weights (model/weights.py).

    Each of `decoder_layers`, the decoder layers of the model, is one FSDP unit. FSDP all-gathers its parameters just
    before their use, in bf16 with `bf16`. It reduce-scatters the gradients in `reduce_dtype` and stores them in fp32.
    With `reshard_after_forward`, the full parameters of a layer are freed after its forward pass and gathered again for
    its backward pass. Embedding and head belong to the root unit, so that tied weights stay one tensor. So do layers
    that share parameters with another layer (Zamba 2).

    Ranks along `mesh["shard"]` have consecutive numbers, so their collectives can use the fast links of one node.
    With several replicas, the reduced shards are then averaged along `mesh["replicate"]` (all-reduce).

    With `cpu_offload`, host memory holds the shards, their gradients and the optimizer state. FSDP copies shards to
    `device` before it gathers them, and copies reduced gradients back.
    """
    model: PreTrainedModel = objective.model
    # With a single replica, FSDP gets a mesh of one dimension, because there is nothing to all-reduce.
    mesh = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
    storage_device, offload = device, OffloadPolicy()
    if cpu_offload:
        # The CPU does not wait for copies from and to page-locked memory.
        storage_device, offload = torch.device("cpu"), CPUOffloadPolicy(pin_memory=device.type == "cuda")
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=reduce_dtype)
    # With expert parallelism, experts are units of their own, sharded over the ranks with equal experts. The weights of
    # the router are among their inputs, and keep their dtype.
    experts = [module for module in objective.modules() if hasattr(module, "shard_mesh")]
    for module in experts:
        inputs_as_given = dataclasses.replace(precision, cast_forward_inputs=False)
        shard_mesh: Any = module.shard_mesh
        fully_shard(module, mesh=shard_mesh, reshard_after_forward=reshard_after_forward, mp_policy=inputs_as_given)
    decoder_layers = _without_shared_parameters(decoder_layers)
    for layer in decoder_layers:
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=precision, offload_policy=offload
        )
    # The root unit is not resharded between forward and backward pass, because its backward pass starts first. Its
    # floating-point inputs belong to the loss, so they stay fp32.
    root_precision = dataclasses.replace(precision, cast_forward_inputs=False)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, mp_policy=root_precision, offload_policy=offload)
    objective.gathered_after_forward = [objective] if reshard_after_forward else [objective, *decoder_layers, *experts]  # type: ignore[assignment]
    if experts:
        _prefetch(decoder_layers)
    objective.register_forward_hook(_reshard_if_no_backward)
    objective.to_empty(device=storage_device)
    for module in objective.modules():  # FSDP does not offload buffers
        module._buffers = {
            name: None if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()
        }
    model.tie_weights()  # because to_empty gave a tied weight new memory for each of its uses
    return objective


def _prefetch(layers: list[nn.Module]) -> None:
    """All-gather the units of a layer during the layer before it, and in the backward pass during the one after it.

    By default, FSDP relies on a CPU that is ahead of the GPU. With expert parallelism, the CPU waits in each layer.
    """
    units: list[list[FSDPModule]] = [
        [module for module in layer.modules() if isinstance(module, FSDPModule)] for layer in layers
    ]
    for (layer, *_), following in itertools.pairwise(units):
        layer.set_modules_to_forward_prefetch(following)
    for previous, (layer, *_) in itertools.pairwise(units):
        layer.set_modules_to_backward_prefetch(previous)


def _without_shared_parameters(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers whose parameters belong to no other layer. A parameter can be in one FSDP unit only."""
    uses = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    return [layer for layer in layers if all(uses[id(parameter)] == 1 for parameter in layer.parameters())]


def _reshard_if_no_backward(objective: nn.Module, inputs: object, outputs: object) -> None:
    """Free the full parameters after a forward pass of an evaluation, which has no backward pass to free them.

    Otherwise the optimizer and the checkpoint would find full parameters instead of this rank's shards.
    """
    if not torch.is_grad_enabled():
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
