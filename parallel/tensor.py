"""Divide each layer among the ranks of a group: tensor parallelism, and sequence parallelism for what lies between.

Shapes: B rows of a micro-batch, T tokens of a row, D width of the model, V vocabulary, C tokens of a chunk; P, one of
as many equal parts as the group has ranks: PT positions, PV entries of the vocabulary.

All ranks of the group read the same rows. Of a projection into heads or into the wider layer, each rank has its rows of
the weight ("colwise"), and of the projection back, its columns ("rowwise"; Shoeybi et al. 2019, section 3). Between the
two, where a rank has whole heads, it computes alone. Elsewhere, on the hidden states, it has a part of the positions
(Korthikanti et al. 2022, section 4.2.2): they are gathered before the first projection and reduced and scattered after
the second, forward and backward, four times a layer. Vocabulary: the embedding and the head have its rows divided, and
no rank ever has all logits.

Parameters are DTensors over the group, those of norms as replicas, for FSDP, the optimizer and checkpoints. What is
computed is computed with plain tensors: DTensor would find out for each operation and each gradient, on the CPU, what
they mean for the parts, and the GPU would wait for that. Dropout is drawn by each rank for itself.
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
from transformers import (
    PreTrainedModel,
)

from parallel.checks import (
    tensor_parallel_plan,
)
from parallel.group import Group, map_hidden_states, pad_sequences


@functools.lru_cache(maxsize=4)
def split_on_meta(model: PreTrainedModel, ranks: int) -> PreTrainedModel:
    """What one of `ranks` ranks that divide each layer (fsdp/tensor_parallel.py) has of `model`, on the meta device.

    For counting: its layers do to all positions what the rank's do, but between them a rank has 1 / `ranks` of those.
    """
    part, styles = copy.deepcopy(model), tensor_parallel_plan(model)
    by_rows = {part.get_input_embeddings(), part.get_output_embeddings()}
    for name, module in part.named_modules():
        style = "colwise" if module in by_rows else styles.get(name, "")
        dimension = {"colwise": 0, "rowwise": 1}.get(style, math.inf)
        for key, whole in module._parameters.items():
            if whole is not None and whole.dim() > dimension:
                shape = [size // (ranks if index == dimension else 1) for index, size in enumerate(whole.shape)]
                module._parameters[key] = torch.nn.Parameter(whole.new_empty(shape), whole.requires_grad)
    part.tie_weights()
    return part


def apply_tensor_parallel(objective: nn.Module, layers: list[nn.Module], mesh: DeviceMesh) -> None:
    """Divide the parameters of `objective.model` among the ranks of `mesh`, of one axis. Every rank must call.

    Follows the plan that the model's configuration carries. Must be called before anything is sharded, with a model
    whose plan is known here and whose sizes divide: model/build.py refuses others. `layers` are the decoder layers.
    """
    model: PreTrainedModel = objective.model
    group = Group(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    fused = getattr(objective, "ends_with_head", False)  # head and loss are computed as one: model/objective.py
    plan = {f"{model.base_model_prefix}.{key}": style for key, style in model.config.base_model_tp_plan.items()}
    projecting = set()  # attention, or the wider layer: its input is gathered once for all projections that take it
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.)", ".*", name))
        if module is embedding:
            module.forward = partial(_embed, module, module.forward, module.padding_idx, group)
            _distribute(module, mesh, Shard(0))
        elif module is head:  # given the hidden states of all positions; their gradient has a summand by each rank
            module.register_forward_pre_hook(lambda head, inputs: _Join.apply(*inputs, group, True))  # type: ignore[no-untyped-call]
            if not fused:  # all ranks get all logits
                module.register_forward_hook(lambda head, inputs, logits: _gather_logits(logits, group))
            _distribute(module, mesh, Shard(0))
        elif style == "colwise":  # what it gives stays on this rank
            projecting.add(model.get_submodule(name.rpartition(".")[0]))
            _distribute(module, mesh, Shard(0))
        elif style == "rowwise":
            assert type(module) is nn.Linear
            module.__class__, module.group = _ProjectBack, group  # type: ignore[assignment]
            _distribute(module, mesh, Shard(1))
        else:
            _distribute(module, mesh, Replicate())
    for module in projecting:
        module.register_forward_pre_hook(partial(_gather_input, group), with_kwargs=True)
    # To gather a parameter of two axes, as the export does, DTensor would warn that it does so in two steps.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    model.tie_weights()  # one tensor again, so that it is sharded as one

    objective.register_forward_pre_hook(partial(pad_sequences, group), with_kwargs=True)
    layers[0].register_forward_pre_hook(partial(_take_positions, group), with_kwargs=True)
    in_layers = {module for layer in layers for module in layer.modules()}
    for unit, modules in [
        (objective, set(objective.modules()) - in_layers),
        *((layer, layer.modules()) for layer in layers),
    ]:
        unit.register_forward_pre_hook(partial(_use_parts, list(modules)))
    if fused:
        pieces = (torch.compile(_log_sum), torch.compile(_exp_)) if objective.compiled else (_log_sum, _exp_)
        objective.cross_entropy_ = partial(_cross_entropy_, group, *pieces)  # type: ignore[assignment]


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Its own parameters as DTensors. The bias of a projection back belongs to no column: all have it."""
    for name, whole in module._parameters.items():
        if whole is not None:
            placements = [Replicate() if whole.dim() == 1 and placement == Shard(1) else placement]
            module._parameters[name] = nn.Parameter(distribute_tensor(whole, mesh, placements), whole.requires_grad)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _use_parts(modules: Iterable[nn.Module], unit: nn.Module, inputs: object) -> None:
    """Before a unit of FSDP runs: instead of the parameters that FSDP has gathered, what this rank has of them.

    FSDP puts its own back when it frees what it has gathered. Where it keeps that for another micro-step, the parts of
    the last one are there still. Others are made: their gradients would come only after FSDP has exchanged the unit's,
    because autograd goes through what was made first last.
    """
    places = [
        (owner._parameters, name, whole)
        for owner in modules
        for name, parameter in owner._parameters.items()
        if isinstance(whole := getattr(parameter, "whole", parameter), DTensor)
    ]
    wholes = list(dict.fromkeys(whole for _, _, whole in places))  # a tied one once
    parts = dict(zip(wholes, _Parts.apply(*wholes), strict=True))  # type: ignore[no-untyped-call]
    for parameters, name, whole in places:
        parameters[name] = parts[whole]
        parameters[name].whole = whole  # type: ignore[union-attr]


class _Parts(torch.autograd.Function):
    """The part of this rank of each parameter, as a plain tensor; for all parameters of a layer at once.

    Of what all ranks have alike, as norms, each has the gradient by its own positions or heads: what counts is the sum.
    """

    @staticmethod
    def forward(ctx: Any, *wholes: DTensor) -> tuple[Tensor, ...]:
        ctx.specs = [whole._spec for whole in wholes]
        return tuple(whole.to_local().detach() for whole in wholes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        parts = list(gradients)
        alike = [index for index, spec in enumerate(ctx.specs) if spec.is_replicated()]
        if alike:
            summed = torch.cat([gradients[index].flatten() for index in alike])
            dist.all_reduce(summed, group=ctx.specs[0].mesh.get_group())
            for index, part in zip(alike, torch.split(summed, [parts[index].numel() for index in alike]), strict=True):
                parts[index] = part.view_as(parts[index])
        # Not DTensor.from_local, which takes longer than all else here.
        return tuple(
            DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]
            for part, spec in zip(parts, ctx.specs, strict=True)
        )


def _join(part: Tensor, group: Group) -> Tensor:
    """[B, PT, D] of each rank as [B, T, D]: all-gather.

    Which rank has which positions is left to where they lie in memory, so that nothing is copied: of all B x T in a
    line, each has a piece.
    """
    pieces = torch.ops._c10d_functional.all_gather_into_tensor(part.contiguous(), group.size, group.name)
    pieces = torch.ops._c10d_functional.wait_tensor(pieces)
    return pieces.view(part.shape[0], group.size * part.shape[1], part.shape[2])


def _share(whole: Tensor, group: Group, summands: bool) -> Tensor:
    """The reverse: [B, PT, D] of [B, T, D]. With `summands`, of the sum over the ranks: reduce-scatter."""
    pieces = whole.contiguous().view(group.size * whole.shape[0], whole.shape[1] // group.size, whole.shape[2])
    if not summands:
        return pieces.chunk(group.size)[group.rank].clone()
    piece = torch.ops._c10d_functional.reduce_scatter_tensor(pieces, "sum", group.size, group.name)
    return torch.ops._c10d_functional.wait_tensor(piece)


class _Join(torch.autograd.Function):
    """`_join`. With `summands`, each rank computes another part of what comes next, and of the gradient a summand."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, summands: bool) -> Tensor:
        ctx.group, ctx.summands = group, summands
        return _join(part, group)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor | None, ...]:
        return _share(d_whole, ctx.group, ctx.summands), None, None


class _Share(torch.autograd.Function):
    """`_share`: its gradient is that of all positions, for each rank."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group, summands: bool) -> Tensor:
        ctx.group = group
        return _share(whole, group, summands)

    @staticmethod
    def backward(ctx: Any, d_part: Tensor) -> tuple[Tensor | None, ...]:
        return _join(d_part, ctx.group), None, None


def _gather_input(group: Group, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return map_hidden_states(lambda part: _Join.apply(part, group, True), inputs, named)  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _take_positions(group: Group, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Before the first layer, all ranks have all positions: what transformers makes of their number would be wrong."""
    return map_hidden_states(lambda whole: _Share.apply(whole, group, False), inputs, named)  # type: ignore[no-untyped-call]


class _ProjectBack(nn.Linear):
    """The projection back: each rank makes a summand of it. The bias counts once.

    A class, not another `forward` for each: compiled code would hold that, and be another for each layer.
    """

    group: Group

    def forward(self, wider: Tensor) -> Tensor:
        part: Tensor = _Share.apply(functional.linear(wider, self.weight), self.group, True)  # type: ignore[no-untyped-call]
        return part if self.bias is None else part + self.bias


def _embed(
    module: nn.Embedding, lookup: Callable[[Tensor], Tensor], padding: int | None, group: Group, ids_BT: Tensor
) -> Tensor:
    """Instead of its forward, `lookup`: each rank looks up the tokens that it has; the sum is the whole [B, T, D].

    `padding` is the token whose row learns nothing from here.
    """
    rows = len(module.weight)
    first = group.rank * rows
    if padding is not None:  # as a row of this part; not before, because initial values are drawn for the whole
        module.padding_idx = padding - first if first <= padding < first + rows else None
    mine_BT = (ids_BT >= first) & (ids_BT < first + rows)
    summand = lookup((ids_BT - first).where(mine_BT, 0)).masked_fill(~mine_BT.unsqueeze(-1), 0)
    whole: Tensor = _Join.apply(_Share.apply(summand, group, True), group, False)  # type: ignore[no-untyped-call]
    return whole


def _gather_logits(logits: Tensor, group: Group) -> Tensor:
    """[B, T, PV] of each rank as [B, T, V]. All ranks make the same loss of it, and the same gradient."""
    rows, tokens, _ = logits.shape
    parts: Tensor = _Join.apply(logits, group, False)  # type: ignore[no-untyped-call]
    return parts.view(group.size, rows, tokens, -1).movedim(0, 2).flatten(2)


def _log_sum(logits: Tensor) -> Tensor:
    """The logarithm of the sum of the exponentials of each row: fp32 [C, 1]."""
    return logits.float().logsumexp(dim=1, keepdim=True)


def _exp_(logits: Tensor, log_total: Tensor) -> None:
    """Probabilities in place of logits."""
    logits.copy_((logits.float() - log_total).exp_())


def _cross_entropy_(
    group: Group,
    log_sum: Callable[[Tensor], Tensor],
    exp_: Callable[[Tensor, Tensor], None],
    logits: Tensor,
    targets_C1: Tensor,
) -> Tensor:
    """The function of that name in model/loss.py, for a part of the vocabulary, [C, PV]. Every rank must call.

    Exchanges two numbers a token, and gives all ranks the same result. `log_sum` and `exp_` are those above, perhaps
    compiled: what they make between reading and writing is then never in memory.
    """
    targets_C1 = targets_C1 - group.rank * logits.shape[1]
    mine_C1 = (targets_C1 >= 0) & (targets_C1 < logits.shape[1])
    targets_C1 = targets_C1.where(mine_C1, 0)
    target_C1 = logits.gather(1, targets_C1).float().where(mine_C1, 0)
    both = _join(torch.stack([log_sum(logits), target_C1]), group).view(group.size, 2, -1, 1)
    log_total_C1 = both[:, 0].logsumexp(dim=0)
    log_p_C1 = both[:, 1].sum(dim=0) - log_total_C1
    exp_(logits, log_total_C1)
    # At the target, on the rank that has it, one less.
    d_target_C1 = log_p_C1.expm1().to(logits.dtype).where(mine_C1, logits.gather(1, targets_C1))
    logits.scatter_(1, targets_C1, d_target_C1)
    return -log_p_C1
