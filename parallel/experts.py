"""Expert parallelism: the experts of each layer are split among the ranks of a group, and tokens travel to them.

Each of P neighboring ranks holds E / P experts of every layer with experts, and reads sequences of its own: the ranks
of a group are data-parallel ranks. After the router has chosen, an all-to-all sends each token to the ranks that hold
its experts, and a second one returns the outputs (GShard, Lepikhin et al. 2020, section 3.2). No token is dropped. So
the number of tokens that a rank sends differs from layer to layer. The ranks tell each other these numbers first, and
the CPU waits for them, because the sizes of an all-to-all are numbers on the CPU.

FSDP then shards a rank's experts over the ranks with equal experts (world size / P), and everything else over all
ranks.

Shapes: S tokens of a rank; K experts of a token; R = S x K tokens that a rank sends; M tokens that it receives; E
experts of a layer; P ranks of a group; L = E / P experts of a rank; D hidden size.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.checks import expert_modules

# The outputs [M, D] of a module's experts, from the module, tokens [M, D] that are sorted by expert, where the tokens
# of each expert end (int32 [L]), and the weight of each output [M].
GroupedMLP = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh, grouped_mlp: GroupedMLP) -> None:
    """Split the experts of `model` over `mesh["expert"]`. Must be called before `fsdp.wrap`. Every rank must call.

    `mesh` has the dimensions "expert_shard" and "expert". fsdp/wrap.py shards each module with a `shard_mesh` over that
    mesh. parallel/checks.py refuses a model whose experts cannot be split.
    """
    ranks = mesh["expert"].size()
    for module in expert_modules(model):
        template: Any = copy.copy(module)  # to compute with: FSDP will not know it
        template.num_experts //= ranks
        for name, full in module._parameters.items():
            if full is not None:
                split = distribute_tensor(full, mesh["expert"], [Shard(0)])
                module._parameters[name] = nn.Parameter(split, full.requires_grad)
        module.forward = partial(_compute_experts, module, template, mesh["expert"].get_group(), grouped_mlp)
        module.shard_mesh = mesh["expert_shard"]  # type: ignore[assignment]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the sizes of an all-to-all are numbers on the CPU
def _compute_experts(
    module: nn.Module,
    template: Any,
    group: dist.ProcessGroup,
    grouped_mlp: GroupedMLP,
    hidden_SD: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
) -> Tensor:
    """The sum [S, D] of the outputs of each token's experts, times the weights of the router. Every rank must call.

    Stands for the forward function of an experts module of transformers. A token for no expert (index E or above)
    gets nothing from it.
    """
    local = copy.copy(template)
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    shards = _LocalExperts.apply(group.size(), *(module._parameters[name] for name in names))  # type: ignore[no-untyped-call]
    local._parameters = dict(zip(names, shards, strict=True))
    tokens, choices = expert_SK.shape
    device = hidden_SD.device

    # Sort what this rank sends by expert, so also by the rank that holds the expert.
    sorted_R, order_R = expert_SK.flatten().sort(stable=True)
    experts = torch.arange(local.num_experts * group.size(), device=device)
    ends_E = torch.searchsorted(sorted_R, experts, right=True)
    sent_PL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(group.size(), -1)
    received_PL = torch.empty_like(sent_PL)
    dist.all_to_all_single(received_PL, sent_PL, group=group)
    sent, received = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()  # the CPU waits for the device here
    order_R = order_R[: sum(sent)]
    rows_RD = _TakeTokens.apply(hidden_SD.to(shards[0].dtype), order_R, choices)  # type: ignore[no-untyped-call]
    rows_MD = _AllToAll.apply(rows_RD, sent, received, group)  # type: ignore[no-untyped-call]
    # The rank with the expert applies the weight of the router, so that no rank saves outputs for the backward pass.
    weight_R1 = _TakeTokens.apply(weight_SK.reshape(-1, 1), order_R, 1)  # type: ignore[no-untyped-call]
    weight_M1 = _AllToAll.apply(weight_R1, sent, received, group)  # type: ignore[no-untyped-call]

    # They arrive by rank of origin, and by expert within each. Sort them by expert, compute, and restore their order.
    expert_M = experts[: received_PL.shape[1]].repeat(group.size())
    expert_M = expert_M.repeat_interleave(received_PL.flatten(), output_size=sum(received))
    by_expert_M = expert_M.argsort(stable=True)
    rows_MD = _TakeTokens.apply(rows_MD, by_expert_M, 1)  # type: ignore[no-untyped-call]
    if by_expert_M.numel():
        ends_L = received_PL.sum(0).cumsum(0).to(torch.int32)
        weight_M1 = _TakeTokens.apply(weight_M1, by_expert_M, 1)  # type: ignore[no-untyped-call]
        outputs_MD = grouped_mlp(local, rows_MD, ends_L, weight_M1.squeeze(1)).to(rows_MD.dtype)
    else:  # nothing to multiply; the graph still leads to the experts, so that they get gradients of zeros
        outputs_MD = rows_MD * weight_M1 + sum(shard.flatten()[:0].sum() for shard in shards)
    outputs_MD = torch.empty_like(outputs_MD).index_copy(0, by_expert_M, outputs_MD)

    outputs_RD = _AllToAll.apply(outputs_MD, received, sent, group)  # type: ignore[no-untyped-call]
    outputs_RD = outputs_RD.new_zeros(tokens * choices, outputs_RD.shape[1]).index_copy(0, order_R, outputs_RD)
    return outputs_RD.view(tokens, choices, hidden_SD.shape[1]).sum(1).to(hidden_SD.dtype)


class _LocalExperts(torch.autograd.Function):
    """This rank's experts as plain tensors, from the DTensors that FSDP has gathered.

    A gradient that enters the backward pass is a sum over the tokens of P ranks. FSDP averages it over world size / P
    ranks, and all other gradients over all ranks, so the backward pass divides by P. A rank that received no token has
    a gradient of zeros, because FSDP reduce-scatters it together with those of other ranks.
    """

    @staticmethod
    def forward(ctx: Any, ranks: int, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.specs = ranks, [parameter._spec for parameter in parameters]
        return tuple(parameter.to_local().detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *(
            DTensor(gradient / ctx.ranks, spec, requires_grad=False)  # type: ignore[no-untyped-call]
            for gradient, spec in zip(gradients, ctx.specs, strict=True)
        )


class _TakeTokens(torch.autograd.Function):
    """Rows `order_R` of tokens [S, D], each repeated `choices` times: [R, D].

    No index may occur twice. So the backward pass needs no atomic additions, and adds in the same order each time.
    """

    @staticmethod
    def forward(ctx: Any, tokens_SD: Tensor, order_R: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.choices, ctx.tokens = choices, len(tokens_SD)
        return tokens_SD[order_R // choices]

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        repeated = gradient_RD.new_zeros(ctx.tokens * ctx.choices, gradient_RD.shape[1])
        repeated.index_copy_(0, order_R, gradient_RD)
        return repeated.view(ctx.tokens, ctx.choices, gradient_RD.shape[1]).sum(1), None, None


class _AllToAll(torch.autograd.Function):
    """Send the first `sent[0]` rows to rank 0 of the group, and so on; receive `received[p]` rows from rank p.

    The backward pass sends gradients the other way. Every rank of the group must call, also with no rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
