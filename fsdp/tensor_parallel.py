"""Divide each layer among the ranks of a group: tensor parallelism, and sequence parallelism for what lies between.

Shapes: B rows of a micro-batch, T tokens of a row, D width of the model, H heads, E entries of a head, V vocabulary, C
tokens of a chunk; V and H are those of this rank where they are divided.

All ranks of the group read the same rows. Of a projection into heads or into the wider layer, each rank has its rows of
the weight ("colwise"), and of the projection back, its columns ("rowwise"; Shoeybi et al. 2019, section 3). Between the
two, where a rank has whole heads, it computes alone. Elsewhere, on the hidden states [B, T, D], it has T / group of the
positions (Korthikanti et al. 2022, section 4.2.2): they are gathered before the first projection and reduced and
scattered after the second, forward and backward, four times a layer. Vocabulary: the embedding and the head have its
rows divided, and no rank ever has all logits.

Parameters are DTensors over the group, those of norms as replicas. So they know what their gradients are: of a norm, a
sum over the group, since each rank has seen other positions or heads. Dropout is drawn by each rank for itself.
"""

import logging
import re
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel


def divide_layers(objective: nn.Module, group: DeviceMesh) -> None:
    """Divide the parameters of `objective.model` among the ranks of `group`, a mesh of one axis. Every rank must call.

    Follows the plan that the model's configuration carries. Must be called before anything is sharded, with a model
    whose plan is known here and whose sizes divide: model/build.py refuses others.
    """
    model: PreTrainedModel = objective.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    fused = getattr(objective, "ends_with_head", False)  # head and loss are computed as one: model/objective.py
    plan = {f"{model.base_model_prefix}.{key}": style for key, style in model.config.base_model_tp_plan.items()}
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        planned = plan.get(re.sub(r"\.\d+(?=\.)", ".*", name))
        if module is embedding:
            styles[name] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
        elif module is head:  # without the fused loss, all ranks get all logits
            gathered = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
            styles[name] = _FusedHead() if fused else gathered
        elif planned == "colwise":  # its outputs stay on this rank, as plain tensors
            styles[name.rpartition(".")[0]] = _Gathered()
            styles[name] = ColwiseParallel()
        elif planned == "rowwise":
            styles[name] = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        elif planned == "replicated_with_grad_allreduce":  # the norm of queries or keys, [B, T, H, E]
            styles[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
        elif module._parameters:
            styles[name] = SequenceParallel()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # on two axes, it would warn
    parallelize_module(model, group, styles)
    # What is still on its way between ranks is not what a compiled layer takes; a copy waits for it.
    embedding.register_forward_hook(lambda module, inputs, hidden_BTD: hidden_BTD.clone())
    model.tie_weights()  # one tensor again, so that it is sharded as one
    if fused:
        objective.cross_entropy_ = partial(_cross_entropy_, group.get_group())  # type: ignore[assignment]


class _Gathered(ParallelStyle):
    """A module whose inputs are gathered once, for all projections that take them; attention or the wider layer."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return tree_map_only(DTensor, lambda part: part.redistribute(placements=[Replicate()]), (positional, named))

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


class _FusedHead(ParallelStyle):
    """The vocabulary head: a rank has its rows of the weight, and is given all hidden states, as a plain tensor."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, whole in list(module.named_parameters()):
            part = nn.Parameter(distribute_tensor(whole, device_mesh, [Shard(0)]), requires_grad=whole.requires_grad)
            module.register_parameter(name, part)

        def gather(module: nn.Module, inputs: tuple[DTensor]) -> Tensor:
            # Each rank makes the gradient by its part of the vocabulary: only their sum is the whole.
            return inputs[0].redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

        module.register_forward_pre_hook(gather)
        return module


def _cross_entropy_(group: dist.ProcessGroup, logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """The function of that name in model/loss.py, where V is this rank's part of the vocabulary. Every rank must call.

    Exchanges three numbers a token, and gives all ranks the same result.
    """
    highest_C1 = logits_CV.amax(dim=1, keepdim=True).float()
    dist.all_reduce(highest_C1, dist.ReduceOp.MAX, group)
    shifted_CV = logits_CV.float().sub_(highest_C1)
    targets_C1 = targets_C1 - group.rank() * logits_CV.shape[1]
    mine_C1 = (targets_C1 >= 0) & (targets_C1 < logits_CV.shape[1])
    targets_C1 = targets_C1.where(mine_C1, 0)
    target_C1 = shifted_CV.gather(1, targets_C1) * mine_C1
    sums_C2 = torch.cat([shifted_CV.exp_().sum(dim=1, keepdim=True), target_C1], dim=1)
    dist.all_reduce(sums_C2, group=group)
    total_C1, target_C1 = sums_C2[:, :1], sums_C2[:, 1:]
    log_p_C1 = target_C1 - total_C1.log()
    probabilities_CV = shifted_CV.div_(total_C1)
    # At the target, on the rank that has it, one less.
    d_target_C1 = log_p_C1.expm1().where(mine_C1, probabilities_CV.gather(1, targets_C1))
    logits_CV.copy_(probabilities_CV.scatter_(1, targets_C1, d_target_C1))
    return -log_p_C1
