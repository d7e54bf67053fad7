"""The optimizer of a run: AdamW, with moments in fp32 or bf16, or Muon with AdamW."""

from collections import defaultdict
from typing import Any

import torch

from config.options import Options
from model.layers import decoder_matrices, expert_stacks
from optim.bf16_adamw import Bf16AdamW
from optim.muon import Muon


def build_optimizer(model: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019). Weight decay applies to matrices only, not to norms and biases.

    With `optim` muon, Muon updates the matrices of the decoder layers, and AdamW the other parameters. Call it after
    wrapping, because sharding replaces the parameters. The state is fp32, as the parameters are, or with
    `optim_state_dtype` bfloat16 both moments are bf16. Each parameter group also holds the names of its parameters, as
    `param_names`.
    """
    orthogonal = decoder_matrices(model) if options.optim == "muon" else {}
    trainable = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in orthogonal
    ]
    matrices = [(name, parameter) for name, parameter in trainable if parameter.dim() >= 2]
    vectors = [(name, parameter) for name, parameter in trainable if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [of_mesh for group in groups for of_mesh in _by_mesh(group)]
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "fused": True,
    }
    if options.optim_state_dtype == "bfloat16":
        return Bf16AdamW(groups, options.seed, options.torch_compile, **settings)
    if not orthogonal:
        return torch.optim.AdamW(groups, **settings)
    # Ranks work on consecutive matrices at the same time, so these should have equal sizes.
    largest_first = sorted(orthogonal.items(), key=lambda item: -item[1].numel())
    muon_group = {"params": largest_first, "weight_decay": options.weight_decay}
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    return Muon(muon_group, groups, expert_stacks(model), dtype, **settings)


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter group as one group for each device mesh, because a fused update takes DTensors of one mesh.

    With expert parallelism, experts have a mesh of their own.
    """
    by_mesh: dict[Any, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, parameter in group["params"]:
        by_mesh[getattr(parameter, "device_mesh", None)].append((name, parameter))
    return [{**group, "params": named} for named in by_mesh.values()]
