"""Changes to a model before it is wrapped: packed attention, parallelism within it, compilation."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from config.options import Options
from model.compile import compile_layers
from model.documents.attention import (
    attend,
    attend_within_documents,
    expect_one_document_per_sequence,
    supports_variable_length,
)
from model.documents.trial import keep_documents_apart
from model.experts import grouped_mlp
from model.layers import decoder_layers
from parallel.context import apply_context_parallel
from parallel.experts import apply_expert_parallel
from parallel.tensor import apply_tensor_parallel


def adapt_model(objective: nn.Module, options: Options, packing: str, mesh: DeviceMesh) -> None:
    """Change `objective` (loss/objective.py) and its model in place, as `options` ask, before it is wrapped.

    `packing` is the packing of the data: with "documents", attention and layers with a state see each document alone.
    `mesh` has the dimensions replicate, shard and tensor. Every rank must call, because context and expert parallelism
    create process groups.
    """
    model: PreTrainedModel = objective.model
    device = torch.device(mesh.device_type)
    if packing == "documents":
        attend_within_documents(model, device, options.bf16)
        keep_documents_apart(model, device, options.bf16, options.trust_remote_code)
    else:
        expect_one_document_per_sequence()
    if options.context_parallel > 1:
        timeout = timedelta(seconds=options.ddp_timeout)
        group, _ = dist.new_subgroups(options.context_parallel, timeout=timeout)  # type: ignore[no-untyped-call]
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        apply_context_parallel(objective, group, attend if supports_variable_length(device, dtype) else None)
    if options.tensor_parallel > 1:
        apply_tensor_parallel(objective, decoder_layers(model), mesh["tensor"])
    if options.expert_parallel > 1:
        shape = dist.get_world_size() // options.expert_parallel, options.expert_parallel
        expert_mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("expert_shard", "expert"))
        # A layer's graph ends where tokens travel, so what a rank computes for them is compiled on its own.
        apply_expert_parallel(model, expert_mesh, torch.compile(grouped_mlp) if options.torch_compile else grouped_mlp)
    if options.torch_compile:
        compile_layers(model, options, packing)
