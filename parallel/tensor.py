"""Tensor parallelism: split the matrices of each layer over the ranks of a group, with sequence parallelism in between.

All ranks of a group read the same sequences. The q/k/v, gate and up projections are split by output features
("colwise"), and the output and down projections by input features ("rowwise"; Megatron-LM, Shoeybi et al. 2019, section
3). Between the two, a rank computes its own heads or intermediate features without communication. Elsewhere, a rank
holds the hidden states of its fraction of the positions (sequence parallelism, Korthikanti et al. 2022, section 4.2.2).
An all-gather before the first projection and a reduce-scatter after the second convert one into the other. That is four
collectives per layer in the forward pass, and four in the backward pass. Embedding and head are split by vocabulary.
Where head and loss are fused, no rank holds all logits.

FSDP, the optimizer and checkpoints see parameters as DTensors over the group (norms are replicated). Forward and
backward compute with plain local tensors, because DTensor dispatch costs CPU time for each operation, for which the GPU
would wait. Each rank draws dropout for itself.

Shapes: B sequences of a micro-batch, T positions of a sequence, D hidden size, V vocabulary size, C tokens of a chunk.
PT and PV are one rank's fraction of T and V. F is one rank's fraction of the input features of a rowwise projection.
"""

import copy
import functools
import logging
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional
from transformers import PreTrainedModel

from parallel.checks import tensor_parallel_plan
from parallel.group import Group, map_hidden_states, pad_sequences


def apply_tensor_parallel(objective: nn.Module, layers: list[nn.Module], mesh: DeviceMesh) -> None:
    """Split the parameters of `objective.model` over the ranks of `mesh`, which has one axis. Every rank must call.

    Follows the tensor-parallel plan of the model's configuration. Must be called before `fsdp.wrap`. model/build.py
    refuses a model with an unknown plan, or with sizes that `mesh` does not divide. `layers` are the decoder layers.
    """
    model: PreTrainedModel = objective.model
    group = Group(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    fused = getattr(objective, "ends_with_head", False)  # head and loss are fused (loss/next_token.py)
    plan = {f"{model.base_model_prefix}.{key}": style for key, style in model.config.base_model_tp_plan.items()}
    projecting = set()  # attention and MLP modules: one all-gather of the input serves all their colwise projections
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.)", ".*", name))
        if module is embedding:
            module.forward = partial(_embed, module, module.forward, module.padding_idx, group)
            _distribute(module, mesh, Shard(0))
        elif module is head:  # each rank computes a partial gradient of the hidden states
            module.register_forward_pre_hook(lambda head, inputs: _AllGather.apply(*inputs, group, True))  # type: ignore[no-untyped-call]
            if not fused:  # the model changes the logits, so every rank needs all of them
                module.register_forward_hook(lambda head, inputs, logits: _gather_logits(logits, group))
            _distribute(module, mesh, Shard(0))
        elif style == "colwise":  # no communication, because the rowwise projection takes this rank's features
            projecting.add(model.get_submodule(name.rpartition(".")[0]))
            _distribute(module, mesh, Shard(0))
        elif style == "rowwise":
            assert type(module) is nn.Linear
            module.__class__, module.group = RowwiseLinear, group  # type: ignore[assignment]
            _distribute(module, mesh, Shard(1))
        else:
            _distribute(module, mesh, Replicate())
    for module in projecting:
        module.register_forward_pre_hook(partial(_all_gather_input, group), with_kwargs=True)
    # The export gathers parameters over two mesh axes, and DTensor would warn that this takes two steps.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    model.tie_weights()  # so that FSDP shards a tied weight once

    objective.register_forward_pre_hook(partial(pad_sequences, group), with_kwargs=True)
    layers[0].register_forward_pre_hook(partial(_slice_positions, group), with_kwargs=True)
    in_layers = {module for layer in layers for module in layer.modules()}
    for unit, modules in [
        (objective, set(objective.modules()) - in_layers),
        *((layer, layer.modules()) for layer in layers),
    ]:
        unit.register_forward_pre_hook(partial(_use_local_shards, list(modules)))
    if fused:
        kernels = (torch.compile(_log_sum), torch.compile(_exp_)) if objective.compiled else (_log_sum, _exp_)
        objective.cross_entropy_ = partial(_cross_entropy_, group, *kernels)  # type: ignore[assignment]


@functools.lru_cache(maxsize=4)
def split_on_meta(model: PreTrainedModel, ranks: int) -> PreTrainedModel:
    """A copy of `model`, on the meta device, with the parameter shapes of one of `ranks` tensor-parallel ranks.

    estimate/ uses it to count. Its layers compute what a rank computes, but its hidden states have all positions, where
    a rank has 1 / `ranks` of them.
    """
    local, styles = copy.deepcopy(model), tensor_parallel_plan(model)
    by_vocabulary = {local.get_input_embeddings(), local.get_output_embeddings()}
    for name, module in local.named_modules():
        style = "colwise" if module in by_vocabulary else styles.get(name, "")
        dimension = {"colwise": 0, "rowwise": 1}.get(style, math.inf)
        for key, full in module._parameters.items():
            if full is not None and full.dim() > dimension:
                shape = [size // (ranks if index == dimension else 1) for index, size in enumerate(full.shape)]
                module._parameters[key] = nn.Parameter(full.new_empty(shape), full.requires_grad)
    local.tie_weights()
    return local


def _embed(
    module: nn.Embedding, lookup: Callable[[Tensor], Tensor], padding: int | None, group: Group, ids_BT: Tensor
) -> Tensor:
    """The embeddings [B, T, D]: each rank looks up the tokens of its vocabulary shard, and the results are summed.

    `lookup` is the module's own forward, and `padding` the token whose embedding gets no gradient.
    """
    rows = len(module.weight)
    first = group.rank * rows
    if padding is not None:  # an index into this shard; set only here, because weights are initialized in full
        module.padding_idx = padding - first if first <= padding < first + rows else None
    local_BT = (ids_BT >= first) & (ids_BT < first + rows)
    partial_BTD = lookup((ids_BT - first).where(local_BT, 0)).masked_fill(~local_BT.unsqueeze(-1), 0)
    embedded_BTD: Tensor = _AllGather.apply(_ReduceScatter.apply(partial_BTD, group), group, False)  # type: ignore[no-untyped-call]
    return embedded_BTD


def _gather_logits(logits: Tensor, group: Group) -> Tensor:
    """All-gather [B, T, PV] of each rank to [B, T, V]. All ranks then compute the same loss and the same gradient."""
    sequences, tokens, _ = logits.shape
    gathered: Tensor = _AllGather.apply(logits, group, False)  # type: ignore[no-untyped-call]
    return gathered.view(group.size, sequences, tokens, -1).movedim(0, 2).flatten(2)


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make the module's own parameters DTensors. The bias of a rowwise projection is replicated."""
    for name, full in module._parameters.items():
        if full is not None:
            placements = [Replicate() if full.dim() == 1 and placement == Shard(1) else placement]
            module._parameters[name] = nn.Parameter(distribute_tensor(full, mesh, placements), full.requires_grad)


class RowwiseLinear(nn.Linear):
    """A linear module that is split by input features: reduce-scatters its partial outputs, then adds the bias once.

    It is a class, because compiled code would hold a `forward` of each module, and then be compiled for each layer.
    """

    group: Group

    def forward(self, input_BTF: Tensor) -> Tensor:
        """[B, T, F] to this rank's positions [B, PT, D]. Every rank of the group must call."""
        output: Tensor = _ReduceScatter.apply(functional.linear(input_BTF, self.weight), self.group)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


def _all_gather_input(group: Group, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return map_hidden_states(lambda local: _AllGather.apply(local, group, True), inputs, named)  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _slice_positions(group: Group, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Only before the first layer, because transformers derives masks and positions from the full length."""
    return map_hidden_states(lambda full: _Slice.apply(full, group), inputs, named)  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _use_local_shards(modules: Iterable[nn.Module], unit: nn.Module, inputs: object) -> None:
    """Before an FSDP unit runs, replace each DTensor that FSDP has gathered by this rank's local shard.

    FSDP restores its own parameters when it frees the gathered ones. Where it does not free them between micro-steps,
    the local shards of the last micro-step are still here and must be replaced by new ones. Autograd runs the nodes
    that were created last first, so the gradients of old ones would arrive after FSDP has reduced the unit's gradients.
    """
    uses = [
        (owner._parameters, name, full)
        for owner in modules
        for name, parameter in owner._parameters.items()
        if isinstance(full := getattr(parameter, "full_parameter", parameter), DTensor)
    ]
    parameters = list(dict.fromkeys(full for _, _, full in uses))  # a tied weight once
    shards = dict(zip(parameters, _LocalShards.apply(*parameters), strict=True))  # type: ignore[no-untyped-call]
    for owned, name, full in uses:
        owned[name] = shards[full]
        owned[name].full_parameter = full  # type: ignore[union-attr]


class _LocalShards(torch.autograd.Function):
    """This rank's shards of all parameters of a unit, as plain tensors.

    Each rank has a partial gradient of a replicated parameter (such as a norm), from its own positions or heads. The
    backward pass all-reduces these gradients.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.specs = [parameter._spec for parameter in parameters]
        return tuple(parameter.to_local().detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        shards = list(gradients)
        replicated = [index for index, spec in enumerate(ctx.specs) if spec.is_replicated()]
        if replicated:
            summed = torch.cat([gradients[index].flatten() for index in replicated])
            dist.all_reduce(summed, group=ctx.specs[0].mesh.get_group())
            sizes = [shards[index].numel() for index in replicated]
            for index, gradient in zip(replicated, torch.split(summed, sizes), strict=True):
                shards[index] = gradient.view_as(shards[index])
        # DTensor.from_local would take longer than the rest of this function.
        return tuple(
            DTensor(shard, spec, requires_grad=False)  # type: ignore[no-untyped-call]
            for shard, spec in zip(shards, ctx.specs, strict=True)
        )


def _cross_entropy_(
    group: Group,
    log_sum: Callable[[Tensor], Tensor],
    exp_: Callable[[Tensor, Tensor], None],
    logits: Tensor,
    targets_C1: Tensor,
) -> Tensor:
    """`cross_entropy_` of loss/cross_entropy.py for one rank's vocabulary shard, [C, PV]. Every rank must call.

    Communicates two numbers per token, and returns the same result on all ranks. `log_sum` and `exp_` are `_log_sum`
    and `_exp_`, or these compiled, so that their fp32 intermediates need no memory.
    """
    targets_C1 = targets_C1 - group.rank * logits.shape[1]
    local_C1 = (targets_C1 >= 0) & (targets_C1 < logits.shape[1])
    targets_C1 = targets_C1.where(local_C1, 0)
    target_C1 = logits.gather(1, targets_C1).float().where(local_C1, 0)
    both = _all_gather(torch.stack([log_sum(logits), target_C1]), group).view(group.size, 2, -1, 1)
    log_total_C1 = both[:, 0].logsumexp(dim=0)
    log_p_C1 = both[:, 1].sum(dim=0) - log_total_C1
    exp_(logits, log_total_C1)
    # The gradient is the probabilities, minus 1 at the target on the rank that has it.
    d_target_C1 = log_p_C1.expm1().to(logits.dtype).where(local_C1, logits.gather(1, targets_C1))
    logits.scatter_(1, targets_C1, d_target_C1)
    return -log_p_C1


def _log_sum(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) of each token: fp32 [C, 1]."""
    return logits.float().logsumexp(dim=1, keepdim=True)


def _exp_(logits: Tensor, log_total: Tensor) -> None:
    """Overwrite logits with probabilities."""
    logits.copy_((logits.float() - log_total).exp_())


class _AllGather(torch.autograd.Function):
    """`_all_gather`. With `partial_gradients`, the ranks' gradients are summands, and backward reduce-scatters them.

    Otherwise all ranks have the same gradient, and each takes a slice of it.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group, partial_gradients: bool) -> Tensor:
        ctx.group, ctx.partial_gradients = group, partial_gradients
        return _all_gather(local, group)

    @staticmethod
    def backward(ctx: Any, d_full: Tensor) -> tuple[Tensor | None, ...]:
        d_local = _reduce_scatter(d_full, ctx.group) if ctx.partial_gradients else _slice(d_full, ctx.group)
        return d_local, None, None


class _ReduceScatter(torch.autograd.Function):
    """`_reduce_scatter`. Each rank needs the gradient of all positions: backward is an all-gather."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(full, group)

    @staticmethod
    def backward(ctx: Any, d_local: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(d_local, ctx.group), None


class _Slice(torch.autograd.Function):
    """`_slice`. Each rank needs the gradient of all positions: backward is an all-gather."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _slice(full, group)

    @staticmethod
    def backward(ctx: Any, d_local: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(d_local, ctx.group), None


def _all_gather(local: Tensor, group: Group) -> Tensor:
    """[B, PT, D] of each rank to [B, T, D].

    Rank n has fraction n of the B x T positions as they are in memory, so that the result needs no copy. It may have
    positions of some sequences only.
    """
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(local.contiguous(), group.size, group.name)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)
    return gathered.view(local.shape[0], group.size * local.shape[1], local.shape[2])


def _reduce_scatter(full: Tensor, group: Group) -> Tensor:
    """This rank's positions [B, PT, D] of the sum of [B, T, D] over the ranks: the inverse layout of `_all_gather`."""
    scattered = torch.ops._c10d_functional.reduce_scatter_tensor(_by_rank(full, group), "sum", group.size, group.name)
    return torch.ops._c10d_functional.wait_tensor(scattered)


def _slice(full: Tensor, group: Group) -> Tensor:
    """This rank's positions [B, PT, D] of [B, T, D], which is equal on all ranks: the inverse of `_all_gather`."""
    return _by_rank(full, group).chunk(group.size)[group.rank].clone()


def _by_rank(full: Tensor, group: Group) -> Tensor:
    """[B, T, D] as [N x B, PT, D], where the first B belong to rank 0."""
    return full.contiguous().view(group.size * full.shape[0], full.shape[1] // group.size, full.shape[2])
